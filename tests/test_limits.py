"""Upper limits: sizes beyond them are errors before anything is allocated."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddim._io import limits
from ddim.data.policy import ImagePolicy
from ddim.errors import DdimError
from ddim.evaluation import sample_folder as generation
from ddim.evaluation.sample_folder import generate
from ddim.model.config import ScheduleConfig, TrainConfig, build
from ddim.nn.lucidrains import LucidrainsConfig
from ddim.nn.transformer import TransformerConfig
from ddim.nn.unet import UNetConfig
from ddim.process import schedule
from models import contents, ddim, tiny_model, tiny_network

NETWORKS: tuple[Any, ...] = (
    tiny_network(),
    tiny_network(classes=3, learned_variance=True),
    tiny_network(categories=4),
    UNetConfig(channels=32, multipliers=(1, 2, 2), blocks=3, attention=(16, 8), scale_shift=True, resample="block"),
    LucidrainsConfig(channels=16, first=16),
    TransformerConfig(width=32, depth=3, categories=50),
    TransformerConfig(width=64, depth=1, categories=2000, local=0, classes=7),
)


@pytest.mark.parametrize("config", NETWORKS, ids=lambda config: f"{config.kind}")
def test_the_estimated_number_of_parameters_is_close(config: Any) -> None:
    count = sum(parameter.numel() for parameter in config.build().parameters())
    assert 0.7 * count <= config.parameters <= 1.7 * count


# A configuration, and values of it beyond the limits.
TOO_LARGE: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "T": (ScheduleConfig, {"T": 10**9}),
    "T of 30 digits": (ScheduleConfig, {"T": 10**30}),
    "batch": (TrainConfig, {"batch": 10**9}),
    "steps": (TrainConfig, {"steps": 10**30}),
    "blocks": (UNetConfig, {"blocks": 10**6}),
    "channels": (UNetConfig, {"channels": 10**6 * 32}),
    "levels": (UNetConfig, {"multipliers": (1,) * 20, "height": 2**20, "width": 2**20}),
    "multiples": (UNetConfig, {"multipliers": (1, 10**9)}),
    "size": (UNetConfig, {"height": 16384, "width": 16384}),
    "parameters": (UNetConfig, {"channels": 8192, "blocks": 16}),
    "lucidrains parameters": (LucidrainsConfig, {"channels": 8192, "first": 8192}),
    "depth": (TransformerConfig, {"depth": 10**7}),
    "transformer parameters": (TransformerConfig, {"depth": 1000, "width": 8192}),
    "length": (TransformerConfig, {"length": 10**12}),
    "categories": (TransformerConfig, {"categories": 10**12}),
    "policy": (ImagePolicy, {"height": 16384, "width": 16384, "channels": 1}),
}


@pytest.mark.parametrize("name", TOO_LARGE)
def test_configurations_beyond_the_limits_are_errors_at_once(name: str) -> None:
    kind, values = TOO_LARGE[name]
    started = time.monotonic()
    with pytest.raises(DdimError, match="file: "):
        build(kind, values, "file")  # type: ignore[type-var]
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("name", schedule.NAMED)
def test_a_schedule_with_too_many_timesteps_is_an_error(name: str) -> None:
    with pytest.raises(DdimError, match="T = 1000000000000"):
        schedule.NAMED[name](10**12)


def test_a_batch_with_a_too_large_first_layer_is_an_error() -> None:
    network = UNetConfig(height=4096, width=4096, attention=())
    with pytest.raises(DdimError, match="batch"):
        limits.check_batch(network, TrainConfig(batch=128))
    limits.check_batch(network, TrainConfig(batch=128, accumulate=64))
    limits.check_batch(UNetConfig(), TrainConfig(batch=8192))


@pytest.mark.parametrize(
    "command",
    [
        "sample {0} -n 99999999999999999999 --out {1}",
        "sample {0} --start 99999999999999999999999999 --out {1}",
        "sample {0} --micro-batch 1000000 -n 20 --out {1}",
        "sample {0} --eta 1e308 --out {1}",
        "sample {0} --device meta --out {1}",
        "sample {0} --device " + "x" * 5000 + " --out {1}",
        "sample " + "x" * 5000 + " --out {1}",
        "interpolate {0} --seeds 1,2 --frames 1000000000 --out {1}.png",
        "tune {0} --calls 5 --pilots 1000000000 --out {1}.json",
        "train digits --batch 1000000000 --out {1}",
        "train digits --set schedule.T=1000000000 --out {1}",
        "train digits --set network.blocks=1000000 --out {1}",
        "train digits --size 16384 --out {1}",
        "train digits --size 4096 --out {1}",
        "train digits --set network.channels=" + "9" * 5000 + " --out {1}",
    ],
)
def test_a_command_beyond_the_limits_prints_one_error_and_writes_nothing(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model().save(tmp_path / "model")
    before = contents(tmp_path)
    assert ddim(*command.format(tmp_path / "model", tmp_path / "out").split()) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert len(lines[0]) < 1600
    assert contents(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_a_billion_samples_start_at_once_and_can_be_resumed(tmp_path: Path) -> None:
    model = tiny_model(micro_batch=4)
    plan = model.plan(2)
    started = time.monotonic()
    steps = generate(model, plan, tmp_path / "many", limits.SAMPLES, start=7)
    progress = [*itertools.islice(steps, 3)]
    steps.close()
    assert time.monotonic() - started < 10
    assert [each.existing for each in progress] == [0, 0, 0]
    assert progress[-1].done == 8
    again = generate(model, plan, tmp_path / "many", limits.SAMPLES, start=7)
    assert next(again).existing == 8
    assert next(again).done == 12
    again.close()
    [*generate(model, plan, tmp_path / "few", 12, start=7)]
    many, few = contents(tmp_path / "many"), contents(tmp_path / "few")
    assert {name: many[name] for name in few if name.endswith("png")} == {
        name: data for name, data in few.items() if name.endswith("png")
    }


@pytest.mark.parametrize("batch", [1, 3, 600])
def test_samples_do_not_depend_on_the_parts_of_a_request(
    batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More micro-batches than one part of a request, with missing samples, written in batches of any size."""
    model = tiny_model(micro_batch=4)
    plan = model.plan(1)
    [*generate(model, plan, tmp_path / "a", 30)]
    monkeypatch.setattr(generation, "PART", 2)
    whole = contents(tmp_path / "a")
    for index in (0, 5, 7, 8, 9, 10, 11, 15, 16, 17, 29):
        (tmp_path / f"a/{index:06d}.png").unlink()
    assert [*generate(model, plan, tmp_path / "a", 30, batch=batch)][-1].done == 30
    assert contents(tmp_path / "a") == whole
    [*generate(model, plan, tmp_path / "b", 30, batch=batch)]
    assert {name: data for name, data in contents(tmp_path / "b").items() if "png" in name} == {
        name: data for name, data in whole.items() if "png" in name
    }
