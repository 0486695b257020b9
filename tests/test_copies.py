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

WAYS: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda it: pickle.loads(pickle.dumps(it)),
    "copy": copy.deepcopy,
}
every_way = pytest.mark.parametrize("way", WAYS)


@every_way
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("dtype", ["float32", "float32-fast", "bfloat16"])
def test_a_model(way: str, used: bool, dtype: str) -> None:
    model = tiny_model(dtype=dtype, classes=3)
    try:
        if dtype == "float32-fast":
            kernels.kernels()
    except library.Unavailable as reason:
        pytest.skip(f"no kernels here: {reason}")
    first = model.sample(2, steps=2, labels=[0, 1]) if used else None
    other = WAYS[way](model)
    made = other.sample(2, steps=2, labels=[0, 1])
    assert torch.equal(made, model.sample(2, steps=2, labels=[0, 1]))
    assert first is None or torch.equal(made, first)
    assert other.conditions == model.conditions
    assert other.fingerprint == model.fingerprint
    with torch.no_grad():  # a copy with weights of its own, of which it has one set
        for parameter in other.network.parameters():
            parameter.zero_()
    again = WAYS[way](other).sample(2, steps=2, labels=[0, 1])
    assert not torch.equal(again, made)
    assert torch.equal(model.sample(2, steps=2, labels=[0, 1]), made)


@every_way
@pytest.mark.parametrize("kind", CATEGORICAL)
def test_a_token_model(way: str, kind: str) -> None:
    model = tiny_model(kind=kind)
    first = model.sample(2, steps=2)
    assert torch.equal(WAYS[way](model).sample(2, steps=2), first)
    assert WAYS[way](model.plan(3)) == model.plan(3)


@every_way
def test_what_is_compiled_or_cached_stays_behind(way: str) -> None:
    model = tiny_model()
    model.sample(1, steps=2)
    for owner in (model, model.compute):
        there = vars(WAYS[way](owner))
        assert there.keys() < vars(owner).keys()
        assert not {"body", "denoise", "_plain"} & there.keys()


@every_way
@pytest.mark.parametrize("sampler", ["ddim", "ab3", "ipndm4", "unipc2"])
def test_a_plan(way: str, sampler: str) -> None:
    plan = tiny_model().plan(4, sampler=sampler)
    assert WAYS[way](plan) == plan
    assert str(WAYS[way](plan)) == str(plan)


@every_way
def test_a_schedule_stays_read_only(way: str) -> None:
    for schedule in SCHEDULES.values():
        other = WAYS[way](schedule)
        assert isinstance(other, Schedule)
        assert other == schedule
        assert (other.name, other.level(3.5)) == (schedule.name, schedule.level(3.5))
        with pytest.raises(ValueError, match="read-only"):
            other.log_snr[0] = np.float64(0)


class Net(nn.Module):
    """A network that knows what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.weight * x + 0.01 * time.to(x).view(-1, 1).tanh()


@every_way
@pytest.mark.parametrize(("time", "data_at"), [*((time, 0) for time in get_args(Time)), ("flow", 1)])
def test_a_wrapped_network(way: str, time: Any, data_at: Any) -> None:
    made = wrap(Net().eval(), SCHEDULES["linear"], "velocity", time=time, data_at=data_at)
    first = made.sample(2, (3,), steps=2)
    other = WAYS[way](made)
    assert torch.equal(other.sample(2, (3,), steps=2), first)
    assert other.schedule == made.schedule
