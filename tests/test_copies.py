"""Models, plans, schedules and wrapped networks can be copied and sent to another process, before and after use."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bench import SCHEDULES
from ddim.model.denoisers import Time
from ddim.model.wrap import wrap
from ddim.nn.cpu import kernels, library
from ddim.process.schedule import Schedule
from models import CATEGORICAL, tiny_model

METHODS: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda it: pickle.loads(pickle.dumps(it)),
    "copy": copy.deepcopy,
}
every_method = pytest.mark.parametrize("method", METHODS)


@every_method
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("dtype", ["float32", "float32-fast", "bfloat16"])
def test_a_model(method: str, used: bool, dtype: str) -> None:
    model = tiny_model(dtype=dtype, classes=3)
    try:
        if dtype == "float32-fast":
            kernels.kernels()
    except library.Unavailable as reason:
        pytest.skip(f"no kernels here: {reason}")
    first = model.sample(2, steps=2, labels=[0, 1]) if used else None
    other = METHODS[method](model)
    actual = other.sample(2, steps=2, labels=[0, 1])
    assert torch.equal(actual, model.sample(2, steps=2, labels=[0, 1]))
    assert first is None or torch.equal(actual, first)
    assert other.conditions == model.conditions
    assert other.fingerprint == model.fingerprint
    with torch.no_grad():  # the copy has separate weights
        for parameter in other.network.parameters():
            parameter.zero_()
    again = METHODS[method](other).sample(2, steps=2, labels=[0, 1])
    assert not torch.equal(again, actual)
    assert torch.equal(model.sample(2, steps=2, labels=[0, 1]), actual)


@every_method
@pytest.mark.parametrize("kind", CATEGORICAL)
def test_a_token_model(method: str, kind: str) -> None:
    model = tiny_model(kind=kind)
    first = model.sample(2, steps=2)
    assert torch.equal(METHODS[method](model).sample(2, steps=2), first)
    assert METHODS[method](model.plan(3)) == model.plan(3)


@every_method
def test_compiled_and_cached_values_are_not_copied(method: str) -> None:
    model = tiny_model()
    model.sample(1, steps=2)
    for owner in (model, model.compute):
        there = vars(METHODS[method](owner))
        assert there.keys() < vars(owner).keys()
        assert not {"body", "denoise", "_plain"} & there.keys()


@every_method
@pytest.mark.parametrize("sampler", ["ddim", "ab3", "ipndm4", "unipc2"])
def test_a_plan(method: str, sampler: str) -> None:
    plan = tiny_model().plan(4, sampler=sampler)
    assert METHODS[method](plan) == plan
    assert str(METHODS[method](plan)) == str(plan)


@every_method
def test_a_schedule_stays_read_only(method: str) -> None:
    for schedule in SCHEDULES.values():
        other = METHODS[method](schedule)
        assert isinstance(other, Schedule)
        assert other == schedule
        assert (other.name, other.level(3.5)) == (schedule.name, schedule.level(3.5))
        with pytest.raises(ValueError, match="read-only"):
            other.log_snr[0] = np.float64(0)


class Net(nn.Module):
    """A network whose output depends on the time."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.weight * x + 0.01 * time.to(x).view(-1, 1).tanh()


@every_method
@pytest.mark.parametrize(("time", "data_at"), [*((time, 0) for time in get_args(Time)), ("flow", 1)])
def test_a_wrapped_network(method: str, time: Any, data_at: Any) -> None:
    actual = wrap(Net().eval(), SCHEDULES["linear"], predicts="velocity", time=time, data_at=data_at)
    first = actual.sample(2, (3,), steps=2)
    other = METHODS[method](actual)
    assert torch.equal(other.sample(2, (3,), steps=2), first)
    assert other.schedule == actual.schedule
