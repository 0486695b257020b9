"""Time budgets of training runs, and runs that start from given weights."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ddim._io.safetensors import read_tensors, write_tensors
from ddim.cli._starting import initial_weights, seconds
from ddim.errors import DdimError, DdimWarning
from ddim.model import load as load_
from ddim.model import modality
from ddim.model.load import load
from ddim.nn.ema import EMA
from ddim.train import clock as clock_module
from ddim.train import run as runs
from ddim.train import run_config
from ddim.train.clock import EXIT_TIME
from ddim.train.clock import Clock as Budget
from ddim.train.run_config import RunConfig
from ddim.train.trainer import Trainer
from models import ddim, recipe, tiny_config, tiny_set

SIXTY: dict[str, Any] = {"steps": None, "budget": 60.0, "decay": "linear", "decay_fraction": 0.5, "log_every": 1}


class Clock:
    """A clock that advances only by work: one second per step, two per checkpoint, one per preview."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    fake = Clock()
    monkeypatch.setattr(clock_module, "time", fake)
    for owner, name, cost in (
        (Trainer, "_update", 1.0),
        (runs.TrainingLoop, "_save", 2.0),
        (runs.TrainingLoop, "_preview", 1.0),
    ):
        real = getattr(owner, name)

        def slow(self: Any, *args: Any, real: Any = real, cost: float = cost) -> Any:
            fake.now += cost
            return real(self, *args)

        monkeypatch.setattr(owner, name, slow)
    return fake


def config(**changes: Any) -> RunConfig:
    data = tiny_set()
    train = recipe(**(SIXTY | {"checkpoint_every": 15, "preview_every": 20} | changes))
    return RunConfig(data=data.name, data_fingerprint=data.fingerprint(), model=tiny_config(), train=train)


def go(folder: Path, stop: int = 0, weights: Any = None, **changes: Any) -> list[runs.Report]:
    reports: list[runs.Report] = []
    init_from = changes.pop("init_from", None)
    run = config(**changes).model_copy(update={"init_from": init_from})
    stop_requested = lambda: bool(stop) and bool(reports) and reports[-1].step + 1 == stop  # noqa: E731
    for report in runs.train(folder, run, tiny_set(), "cpu", "ddim train", stop_requested, weights):
        reports.append(report)
    return reports


def rates(folder: Path) -> list[float]:
    return [json.loads(line)["lr"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_ends_within_its_budget_with_a_checkpoint_and_a_decayed_learning_rate(
    tmp_path: Path, clock: Clock
) -> None:
    before = clock.now
    reports = go(tmp_path)
    assert 60 - 1.5 * (2 + 1) - EXIT_TIME - 3 <= clock.now - before <= 60
    last = reports[-1]
    assert last.over
    assert "checkpoint" in last.event
    assert "preview" in last.event
    assert last.steps == last.step
    assert load(tmp_path, "cpu").config.provenance.steps == last.step
    falling = rates(tmp_path)
    top = max(falling)
    assert falling[-1] < 0.15 * top
    flat = [i for i, rate in enumerate(falling) if rate == top]
    assert all(rate >= later for rate, later in zip(falling[flat[-1] :], falling[flat[-1] + 1 :], strict=False))


def test_the_number_of_steps_is_estimated_during_the_run(tmp_path: Path, clock: Clock) -> None:
    reports = go(tmp_path)
    assert reports[0].steps is None
    estimates = [report.steps for report in reports if report.step >= 20]
    assert all(estimate is not None and abs(estimate - reports[-1].step) <= 12 for estimate in estimates)


@pytest.mark.parametrize("stop", [5, 30])
def test_time_between_stop_and_resume_does_not_count(stop: int, tmp_path: Path, clock: Clock) -> None:
    start = clock.now
    go(tmp_path, stop)
    first = clock.now - start
    clock.now += 10_000
    again = clock.now
    reports = go(tmp_path)
    assert reports[0].step == stop
    assert 60 - 1.5 * (2 + 1) - EXIT_TIME - 3 <= first + clock.now - again <= 60
    assert rates(tmp_path)[-1] < 0.15 * max(rates(tmp_path))


def test_a_finished_run_does_nothing_and_a_larger_budget_resumes_it(tmp_path: Path, clock: Clock) -> None:
    step = go(tmp_path)[-1].step
    (report,) = go(tmp_path)
    assert (report.step, report.over) == (step, True)
    with pytest.warns(DdimWarning, match=r"\b100\b"):
        reports = go(tmp_path, budget=100.0)
    assert reports[-1].step > step
    assert rates(tmp_path)[-1] < 0.15 * max(rates(tmp_path)[step:])


def test_a_run_ends_at_the_first_of_steps_and_budget(tmp_path: Path, clock: Clock) -> None:
    assert go(tmp_path / "steps", steps=10)[-1].step == 10
    by_time = go(tmp_path / "time", steps=500)[-1]
    assert by_time.step < 60
    for name in ("steps", "time"):
        assert rates(tmp_path / name)[-1] < 0.25 * max(rates(tmp_path / name))


def test_a_budget_used_up_before_the_first_step_is_an_error(tmp_path: Path, clock: Clock) -> None:
    late = runs.train(tmp_path, config(), tiny_set(), "cpu", started=clock.now - 61)
    assert next(late).step == 0
    with pytest.raises(DdimError, match=r"^budget of 60 s: .*\b61\b"):
        next(late)


def test_without_a_budget_the_used_share_is_zero() -> None:
    assert Budget(None, time.monotonic() - 1e6).share == 0


def test_time_for_the_final_work_is_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    now = SimpleNamespace(now=0.0, monotonic=lambda: now.now)
    monkeypatch.setattr(clock_module, "time", now)
    clock = Budget(100.0)
    now.now = 49.0
    # Before anything is measured, 2 % are reserved, and the time to exit.
    assert clock.share == pytest.approx(49 / (100 - 2 - EXIT_TIME))
    for task, duration in (("save", 4.0), ("save", 2.0), ("preview", 6.0)):
        with clock.timed(task):
            now.now += duration
    assert clock.share == pytest.approx(61 / (100 - 1.5 * (4 + 6) - EXIT_TIME))
    now.now = 86.0
    assert clock.share == 1


@pytest.mark.parametrize(("text", "expected"), [("25min", 1500), ("90s", 90), ("1h30min", 5400), ("0.5h", 1800)])
def test_durations_are_parsed(text: str, expected: float) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize("half_life", [0.05, 0.5])
def test_half_of_the_ema_weight_lies_within_the_half_life(half_life: float) -> None:
    """The weight of each update in the average is computed from the decays; for runs of any length."""
    module = torch.nn.Linear(1, 1)
    average = EMA(module, 0.0, half_life)
    for length in (200, 5000):
        decays = torch.tensor([average.decay_at(n) for n in range(length)], dtype=torch.float64)
        after = torch.cat([decays.flip(0).cumprod(0).flip(0)[1:], torch.ones(1, dtype=torch.float64)])
        weights = (1 - decays) * after
        assert weights.sum() == pytest.approx(1)
        assert weights[round(length * (1 - half_life)) :].sum() == pytest.approx(0.5, abs=0.02)


def test_loaded_moments_have_the_memory_layout_of_their_weights() -> None:
    """A fused optimiser on a GPU requires this."""

    def trainer() -> Trainer:
        data = tiny_set()
        network = tiny_config().network.build()
        loss = modality.modality_of(tiny_config()).loss("v", torch.device("cpu"))
        return Trainer(network, loss, data.batch, len(data), recipe(layout="channels-last"))

    source, target = trainer(), trainer()
    next(source.updates())
    stored = {key: value.detach().contiguous() for key, value in source.state().items()}
    target.load_state(stored)
    seen = 0
    for parameter, moments in target.optimizer.state.items():
        assert parameter.grad is None
        for value in moments.values():
            if value.shape == parameter.shape and parameter.ndim == 4:
                assert value.stride() == parameter.stride()
                seen += parameter.stride() != torch.empty(parameter.shape).stride()
    assert seen > 4
    for key, value in target.state().items():
        assert torch.equal(value, stored[key])


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_run_can_start_from_bfloat16_weights(weights_only: bool, tmp_path: Path, clock: Clock) -> None:
    """Counts of steps and images and the data order continue; the optimiser and the warm-up restart."""
    go(tmp_path / "first", stop=12, preview_every=0)
    load(tmp_path / "first", "cpu").save(tmp_path / "small", torch.bfloat16)
    weights_file = tmp_path / "small/model.safetensors"
    if weights_only:
        write_tensors(tmp_path / "weights.safetensors", read_tensors(weights_file)[0], {})
        weights_file = tmp_path / "weights.safetensors"
    origin, weights = initial_weights(str(weights_file), config().model)
    assert (origin.steps, origin.images_seen) == ((0, 0) if weights_only else (12, 96))
    reports = go(tmp_path / "second", init_from=origin, weights=weights, stop=origin.steps + 1, preview_every=0)
    assert [report.step for report in reports] == [origin.steps, origin.steps + 1]
    assert reports[-1].images_seen == origin.images_seen + 8
    assert rates(tmp_path / "second") == [pytest.approx(2e-3 / 4)]  # the first rate of the warm-up
    ema = read_tensors(sorted((tmp_path / "second/state").iterdir())[-1])[0]
    far = [key for key in weights if not torch.allclose(ema[f"ema.{key}"], weights[key].float(), atol=1e-2)]
    assert far == []
    provenance = load(tmp_path / "second", "cpu").config.provenance
    assert provenance.init_from == origin.sha256 != ""
    last = go(tmp_path / "second", init_from=origin, weights=weights, preview_every=0)[-1]
    assert last.over
    assert last.step > origin.steps + 5


def test_initial_weights_of_another_network_are_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "other"
    other = tiny_config(channels=24)
    load_.build_model(other.network.build(), other, "cpu").save(folder)
    with pytest.raises(DdimError, match=r"^--from.*\bnetwork\.channels\b"):
        initial_weights(str(folder), config().model)


def test_fewer_steps_than_the_initial_model_has_are_an_error(tmp_path: Path) -> None:
    origin = run_config.RunConfig.model_fields["init_from"].annotation.__args__[0](
        sha256="a", steps=40, images_seen=320
    )
    with pytest.raises(DdimError, match=r"^30 steps: .*\b40\b"):
        go(tmp_path, init_from=origin, steps=30, budget=None)


def test_the_command_respects_the_budget_and_starts_from_weights(tmp_path: Path) -> None:
    shape = ("--set", "network.channels=16", "--set", "network.groups=4", "--batch", 8, "--preview-every", 0)
    assert ddim("train", "digits", *shape, "--steps", 3, "--out", tmp_path / "one") == 0
    options = ("--budget", "45s", "--steps", 40, "--from", tmp_path / "one", "--out", tmp_path / "two")
    start = time.monotonic()
    assert ddim("train", "digits", *shape, *options) == 0
    assert time.monotonic() - start <= 45
    origin = load(tmp_path / "two", "cpu").config.provenance
    assert 3 < origin.steps <= 40
    assert origin.images_seen == 8 * origin.steps


def test_progress_lines_are_printed_without_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ddim.cli import train

    monkeypatch.setattr(train, "QUIET", 0.0)
    shape = ("--set", "network.channels=16", "--set", "network.groups=4", "--batch", 8, "--preview-every", 0)
    assert ddim("train", "digits", *shape, "--steps", 4, "--out", tmp_path / "run") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "of about 4: loss" in line]
    assert 1 <= len(lines) <= 4
    assert lines[0].startswith("step 1 of about 4: loss ")
    assert "images/s" in lines[0]
