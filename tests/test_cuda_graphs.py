"""CUDA graphs of whole plans: which runs are recorded, their keys, and that inputs and outputs are copied.

A stand-in for CUDA replays a run on its stored tensors; tests/test_gpu.py records real graphs.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ddim.errors import DdimError, DdimWarning
from ddim.model import cuda_graphs
from ddim.model.cuda_graphs import PlanGraphs
from ddim.model.load import build_model
from ddim.model.model import Model
from models import new_network, tiny_config


class Graphs(PlanGraphs):
    """Records a job by storing it, and replays it into the tensor that it returned first."""

    captured = 0
    broken = False

    def _capture(self, job: Callable[[], Tensor], device: torch.device) -> tuple[Any, Tensor]:
        if self.broken:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        self.captured += 1
        out = job()

        class Graph:
            def replay(self) -> None:
                out.copy_(job())

        return Graph(), out

    @contextlib.contextmanager
    def _in_order(self, device: torch.device) -> Iterator[None]:
        yield


@pytest.fixture(autouse=True)
def _as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "_recordable", lambda device: True)


def models(kind: str = "pictures", graphs: Graphs | None = None, **changes: Any) -> tuple[Any, Any, Graphs]:
    """A model without graphs, the same with them, and the graphs."""
    config = tiny_config(kind, **changes)
    plain, recording = (
        build_model(new_network(config.network), config, "cpu", dtype="float32", micro_batch=3) for _ in "ab"
    )
    graphs = graphs or Graphs(always=True)
    recording.compute.graphs = graphs
    return plain, recording, graphs


@pytest.mark.parametrize("settings", [{"eta": 0.0}, {"eta": 1.0}, {"eta": 0.5, "clip_x0": True}, {"sampler": "ab2"}])
def test_samples_are_bit_identical(settings: dict[str, Any]) -> None:
    plain, recording, graphs = models()
    for n, seed in ((8, 0), (2, 1)):  # the last micro-batch is smaller, and every one is another one's
        expected, result = (model.sample(n, steps=4, seed=seed, **settings) for model in (plain, recording))
        assert torch.equal(result, expected)
    assert graphs.captured == 1


@pytest.mark.parametrize("guidance", [None, 2.0, lambda level: 1 + level.t / 1000])
def test_labels_are_inputs_and_guidance_is_part_of_the_key(guidance: Any) -> None:
    plain, recording, graphs = models(classes=5)
    for labels in ([0, 1, 2, 3, 4, 0, 1], [4, 4, 4, 1, 1, 1, 2]):
        expected, result = (
            model.sample(len(labels), steps=3, labels=labels, guidance=guidance) for model in (plain, recording)
        )
        assert torch.equal(result, expected)
    assert graphs.captured == 1
    expected, result = (model.sample(3, steps=3) for model in (plain, recording))
    assert torch.equal(result, expected)
    assert graphs.captured == 2


def test_guidance_scales_are_compared_per_level() -> None:
    plain, recording, graphs = models(classes=5)
    scale = [1.5]
    for value in (1.5, 3.0, 1.5):
        scale[0] = value
        expected, result = (
            model.sample(3, steps=3, labels=1, guidance=lambda level: scale[0]) for model in (plain, recording)
        )
        assert torch.equal(result, expected)
    assert graphs.captured == 2


def test_a_micro_batch_does_not_overwrite_the_previous_one() -> None:
    _, recording, _ = models()
    plan = recording.plan(3)
    blocks = [*recording.sample_blocks(plan, range(6))]
    assert not torch.equal(*blocks)
    assert torch.equal(
        torch.cat(blocks), torch.cat([block.clone() for block in recording.sample_blocks(plan, range(6))])
    )


def test_by_default_small_plans_are_recorded_at_their_second_use(monkeypatch: pytest.MonkeyPatch) -> None:
    _, recording, graphs = models(graphs=Graphs())
    counts = []
    for steps in (2, 2, 3, 2, 3):
        recording.sample(3, steps=steps)
        counts.append(graphs.captured)
    assert counts == [0, 1, 1, 1, 2]
    for limit in ("BATCH", "EVALUATIONS"):
        with monkeypatch.context() as patch:
            patch.setattr(cuda_graphs, limit, 1)
            recording.sample(6, steps=4)
        assert graphs.captured == 2


def test_the_least_recently_used_graph_is_dropped() -> None:
    _, recording, graphs = models(graphs=Graphs(always=True, limit=2))
    for steps, captured in ((2, 1), (3, 2), (2, 2), (4, 3), (2, 3), (3, 4)):
        recording.sample(1, steps=steps)
        assert graphs.captured == captured


def test_a_changed_torch_setting_needs_another_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    _, recording, graphs = models()
    recording.sample(3, steps=2)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    recording.sample(3, steps=2)
    assert graphs.captured == 2


def test_runs_that_cannot_be_recorded_run_without_graphs() -> None:
    plain, recording, graphs = models()
    assert isinstance(recording, Model)
    expected, result = (model.sample(3, steps=2, hook=lambda x0, _: x0 / 2) for model in (plain, recording))
    assert torch.equal(result, expected)
    plain, tokens, more = models("levels")
    assert isinstance(tokens, Model)
    expected, result = (model.sample(3, steps=2) for model in (plain, tokens))
    assert torch.equal(result, expected)
    assert graphs.captured == more.captured == 0


def test_inference_mode_leaves_no_inference_tensors() -> None:
    plain, recording, _ = models(classes=2)
    with torch.inference_mode():
        recording.sample(3, steps=2, labels=1)
    expected, result = (model.sample(3, steps=2, labels=0, seed=1) for model in (plain, recording))
    assert torch.equal(result, expected)


def test_a_failed_recording_warns_once_or_raises_if_requested() -> None:
    _, recording, graphs = models(graphs=Graphs())
    graphs.broken = True
    expected = recording.sample(3, steps=2)
    with pytest.warns(DdimWarning, match=r"\bCUDA\b"):
        result = recording.sample(3, steps=2)
    assert torch.equal(result, expected)
    assert torch.equal(recording.sample(3, steps=2), expected)
    graphs.always = True
    with pytest.raises(RuntimeError):
        recording.sample(3, steps=2)


def test_a_copy_records_its_own_graphs() -> None:
    _, recording, graphs = models()
    recording.sample(3, steps=2)
    other = copy.deepcopy(graphs)
    assert (other.always, other.limit) == (graphs.always, graphs.limit)
    assert not other._recorded


def test_graphs_on_a_cpu_raise_an_error() -> None:
    config = tiny_config()
    assert build_model(new_network(config.network), config, "cpu").compute.graphs is None
    with pytest.raises(DdimError) as error:
        build_model(new_network(config.network), config, "cpu", cuda_graphs=True)
    assert error.value.subject == "cuda_graphs"
