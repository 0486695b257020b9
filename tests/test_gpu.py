"""Tests that need a GPU; skipped without one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from ddim.model.load import build_model
from ddim.model.modality import modality_of
from ddim.nn.blocks import Norm
from ddim.train.trainer import Trainer
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
    modality = modality_of(config)
    loss = modality.loss("sigmoid", device, changes["times"])
    labels = np.arange(COUNT) % 3
    return Trainer(
        new_network(config.network).to(device),
        loss,
        tiny_set().batch,
        COUNT,
        recipe(**changes),
        labels,
        3,
        modality.read,
    )


@pytest.fixture
def no_synchronisation() -> Iterator[Any]:
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("place", ["host", "device"])
def test_no_step_waits_for_the_gpu(place: str, compiled: bool, no_synchronisation: Any) -> None:
    updates = trainer(data_on=place, compile=compiled).updates()
    for _ in range(3):
        next(updates)
    no_synchronisation()
    results = [next(updates) for _ in range(4)]
    torch.cuda.set_sync_debug_mode("default")
    assert all(bool(torch.isfinite(update.loss)) for update in results)


def test_small_data_are_on_the_gpu_by_default() -> None:
    assert trainer().loader.resident is not None


def test_steps_do_not_depend_on_where_the_data_are() -> None:
    states = []
    for place in ("host", "device"):
        trained = trainer(data_on=place, precision="float32")
        for update in trained.updates():
            if update.step == 3:
                break
        states.append(trained.state())
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_state_is_resumed_in_channels_last_memory(compiled: bool) -> None:
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
def test_samples_match_the_cpu(compiled: bool) -> None:
    config = tiny_config()
    networks = [new_network(config.network) for _ in range(3)]
    exact = build_model(networks[0], config, "cpu", dtype="float32").sample(4, steps=5)
    same = build_model(networks[1], config, "cuda", dtype="float32", compile=compiled).sample(4, steps=5).cpu()
    near = build_model(networks[2], config, "cuda", dtype="bfloat16", compile=compiled).sample(4, steps=5).cpu()
    torch.testing.assert_close(same, exact, rtol=0, atol=1e-4)  # TF32 would be off by more
    assert (near - exact).square().mean().sqrt() < 0.05


def pair(changes: dict[str, Any], compiled: bool = False, **settings: Any) -> tuple[Any, Any]:
    """The same model without and with CUDA graphs."""
    config = tiny_config(**changes)
    settings = {"dtype": "bfloat16", "compile": compiled, "micro_batch": 4} | settings
    eager, graphed = (
        build_model(new_network(config.network), config, "cuda", cuda_graphs=graphs, **settings)
        for graphs in (False, True)
    )
    return eager, graphed


@pytest.mark.parametrize("changes", [{}, {"scale_shift": True, "resample": "block"}, {"in_channels": 3, "patch": 2}])
def test_fused_norms_change_a_network_only_by_rounding(changes: dict[str, Any]) -> None:
    pytest.importorskip("triton")
    config = tiny_config(**changes)
    exact = build_model(new_network(config.network), config, "cuda", dtype="float32")
    fused = build_model(new_network(config.network), config, "cuda", dtype="bfloat16", micro_batch=4)
    plain = build_model(new_network(config.network), config, "cuda", dtype="bfloat16", micro_batch=4)
    assert fused.compute.fused
    for part in plain.compute.network.modules():
        if isinstance(part, Norm):
            part.fused = False
    assert not plain.compute.fused
    x, level = exact.noise(4).start(), exact.schedule.level(300)
    expected, unfused, result = (model.denoise(x, level).x0 for model in (exact, plain, fused))
    off = [(x - expected).square().mean().sqrt() for x in (result, unfused)]
    assert off[0] < 0.05
    assert off[0] < 1.5 * off[1] + 1e-3  # its statistics are float32, so it is no less exact


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("settings", [{"eta": 0.0}, {"eta": 1.0}, {"eta": 0.5, "clip_x0": True}, {"sampler": "ab2"}])
def test_plan_graphs_are_bit_exact(settings: dict[str, Any], dtype: str) -> None:
    eager, graphed = pair({}, dtype=dtype)
    for n, seed in ((10, 0), (3, 1), (1, 2)):  # micro-batches that are not full
        assert torch.equal(
            graphed.sample(n, steps=5, seed=seed, **settings), eager.sample(n, steps=5, seed=seed, **settings)
        )
    assert len(graphed.compute.graphs._recorded) == 1


@pytest.mark.parametrize("guidance", [None, 2.0, lambda level: 1 + level.t / 1000])
def test_plan_graphs_support_labels_and_guidance(guidance: Any) -> None:
    eager, graphed = pair({"classes": 3})
    for labels in ([0, 1, 2, 0, 1, 2], [2, 2, 2, 1, 1, 0]):
        expected, result = (model.sample(6, steps=4, labels=labels, guidance=guidance) for model in (eager, graphed))
        assert torch.equal(result, expected)
    assert len(graphed.compute.graphs._recorded) == 1
    assert torch.equal(graphed.sample(6, steps=4), eager.sample(6, steps=4))


def test_graphs_of_several_plans_share_memory_safely() -> None:
    eager, graphed = pair({})
    expected = {
        (steps, eta): eager.sample(8, steps=steps, eta=eta) for steps in (2, 3, 5) for eta in (0.0, 1.0)
    }  # six plans
    for _ in range(2):
        result = {(steps, eta): graphed.sample(8, steps=steps, eta=eta) for steps, eta in expected}
        torch.cuda.synchronize()
        assert all(torch.equal(result[key], expected[key]) for key in expected)
    blocks = [*graphed.sample_blocks(graphed.plan(3, sampler="auto"), range(8))]
    assert torch.equal(torch.cat(blocks), expected[3, 0.0])


def test_a_compiled_network_is_recorded() -> None:
    eager, graphed = pair({}, compiled=True)
    for eta in (0.0, 1.0):
        expected, result = (model.sample(6, steps=4, eta=eta) for model in (eager, graphed))
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-2)


def test_a_plan_is_recorded_at_its_second_use_by_default() -> None:
    config = tiny_config()
    model = build_model(new_network(config.network), config, "cuda", micro_batch=4)
    result = []
    for count in (0, 1, 1):
        result.append(model.sample(4, steps=3))
        assert len(model.compute.graphs._recorded) == count
    assert torch.equal(result[0], result[1])
    assert torch.equal(result[0], result[2])


def test_a_replay_does_not_wait_for_the_gpu(no_synchronisation: Any) -> None:
    _, graphed = pair({})
    plan = graphed.plan(3)
    start, noise = graphed.noise(4).start(), graphed.noise(4)
    expected = graphed.compute.graphs.run(graphed.denoise, plan, start, noise)
    no_synchronisation()
    result = graphed.compute.graphs.run(graphed.denoise, plan, start, noise)
    torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(result, expected)
