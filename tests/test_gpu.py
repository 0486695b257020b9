"""What only a GPU can show; left out where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from ddim.kinds import kind_of
from ddim.model import of
from ddim.training import Trainer
from models import COUNT, new_network, recipe, tiny_config, tiny_set

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
EVERYTHING: dict[str, Any] = {
    "flip": True,
    "label_drop": 0.3,
    "accumulate": 2,
    "decay": "cosine",
    "times": "importance",
}


def trainer(**changes: Any) -> Trainer:
    config = tiny_config(classes=3, dropout=0.3)
    device = torch.device("cuda")
    changes = EVERYTHING | {"precision": "auto"} | changes
    made = kind_of(config)
    loss = made.loss("sigmoid", device, changes["times"])
    labels = np.arange(COUNT) % 3
    return Trainer(
        new_network(config.network).to(device), loss, tiny_set().batch, COUNT, recipe(**changes), labels, 3, made.read
    )


@pytest.fixture
def no_waiting() -> Iterator[Any]:
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("place", ["host", "device"])
def test_no_step_waits_for_the_gpu(place: str, compiled: bool, no_waiting: Any) -> None:
    updates = trainer(data_on=place, compile=compiled).updates()
    for _ in range(3):
        next(updates)
    no_waiting()
    made = [next(updates) for _ in range(4)]
    torch.cuda.set_sync_debug_mode("default")
    assert all(bool(torch.isfinite(update.loss)) for update in made)


def test_unasked_small_data_lie_on_the_gpu() -> None:
    assert trainer().feed.held is not None


def test_wherever_the_data_lie_the_steps_are_the_same() -> None:
    states = []
    for place in ("host", "device"):
        some = trainer(data_on=place, precision="float32")
        for update in some.updates():
            if update.step == 3:
                break
        states.append(some.state())
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_state_is_gone_on_from_in_channels_last_memory(compiled: bool) -> None:
    one, other = trainer(compile=compiled), trainer(compile=compiled)
    for update in one.updates():
        if update.step == 2:
            break
    other.load_state({key: value.cpu().contiguous() for key, value in one.state().items()})
    for update in other.updates():
        if update.step == 4:
            break
    assert other.step == 4
    assert any(parameter.stride() != parameter.contiguous().stride() for parameter in other.network.parameters())


@pytest.mark.parametrize("compiled", [False, True])
def test_samples_are_those_of_the_cpu(compiled: bool) -> None:
    config = tiny_config()
    networks = [new_network(config.network) for _ in range(3)]
    exact = of(networks[0], config, "cpu", dtype="float32").sample(4, steps=5)
    same = of(networks[1], config, "cuda", dtype="float32", compile=compiled).sample(4, steps=5).cpu()
    near = of(networks[2], config, "cuda", dtype="bfloat16", compile=compiled).sample(4, steps=5).cpu()
    torch.testing.assert_close(same, exact, rtol=0, atol=1e-4)  # TF32 would be off by more
    assert (near - exact).square().mean().sqrt() < 0.05
