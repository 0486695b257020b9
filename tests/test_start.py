"""Where sampling starts, its default number of steps, clipping by default, and samples that cannot be images."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bench import GRIDS, SCHEDULES
from ddim import exact, samplers, wrap
from ddim.data.policy import DataStatistics
from ddim.errors import DdimError, DdimWarning
from ddim.model.config import ModelConfig, Origin, parse, to_json
from ddim.model.model import Model
from ddim.model.plausible import implausible, statistics_of
from ddim.names import METHODS
from ddim.plan.plan import Plan
from ddim.process import schedule, timesteps
from ddim.process.schedule import Level, Schedule
from ddim.process.start import RATIO, default_counts, default_steps, start_time
from ddim.process.timesteps import tau
from ddim.samplers.registry import Planner
from ddim.samplers.settings import SamplerSettings
from ddim.sampling import inversion
from ddim.train.run import train
from ddim.train.run_config import RunConfig
from models import contents, ddim, load_tiny, recipe, save_tiny, tiny_config, tiny_model, tiny_set, write_pictures

QUIET = pytest.mark.filterwarnings("ignore::ddim.DdimWarning")
NOISY = {name: make for name, make in SCHEDULES.items() if make.level(make.T).ratio > 2 * RATIO}


def auto(made: Schedule, predicts: Any, steps: int | None = None, **settings: Any) -> Plan:
    """The plan that `sample` runs."""
    return Planner(made, predicts).plan(SamplerSettings(steps=steps, **settings))


class TestStart:
    @QUIET
    @pytest.mark.parametrize("made", SCHEDULES.values(), ids=SCHEDULES.keys())
    @pytest.mark.parametrize("grid", GRIDS)
    def test_spacings_for_eps_start_at_a_signal_to_noise_ratio(self, made: Schedule, grid: str) -> None:
        """It is the nearest whole time to the ratio, or T where there is less noise; a list of times stays as it is."""
        ratios = [made.level(t).ratio for t in range(1, made.T + 1)]
        nearest = 1 + min(range(made.T), key=lambda k: abs(math.log(ratios[k] / RATIO)) if ratios[k] < 1e9 else 1e9)
        for encode in (False, True):
            levels = timesteps.sampling_levels(made, "eps", grid, 9, encode)
            assert levels[-1 if encode else 0].t == nearest == start_time(made, "eps")
            assert levels[0 if encode else -1].t == 0
        assert timesteps.sampling_levels(made, "v", grid, 9) == made.levels([*reversed(tau(made, grid, 9)), 0])
        assert timesteps.sampling_levels(made, "eps", [1, 500, made.T])[0].t == made.T

    @QUIET
    @pytest.mark.parametrize("made", SCHEDULES.values(), ids=SCHEDULES.keys())
    def test_every_kind_of_plan_starts_at_the_start_time(self, made: Schedule) -> None:
        start = start_time(made, "eps")
        assert auto(made, "eps", 10).start.t == start
        for sampler in samplers.SAMPLERS:
            assert auto(made, "eps", 4, sampler=sampler, grid="linear").start.t == start
        for method in METHODS:
            found = inversion.plan_inversion(Planner(made, "eps"), method, 10, None)
            assert found.decode_plan.start.t == start
            assert found.encode_plan is None or found.encode_plan.end.t == start
        for predicts in ("v", "x0"):
            assert auto(made, predicts, 10).start.t == made.T

    @QUIET
    def test_there_are_at_least_as_many_timesteps_as_steps(self) -> None:
        """More steps than there are times up to the start begin further up."""
        made = SCHEDULES["cosine"]
        for grid in ("linear", "equal-angle", "log-snr", "angle-log-snr"):
            assert timesteps.sampling_levels(made, "eps", grid, 995)[0].t == 995

    @pytest.mark.parametrize("name", NOISY)
    def test_a_start_below_T_is_warned_about(self, name: str) -> None:
        with pytest.warns(DdimWarning):
            timesteps.sampling_levels(NOISY[name], "eps", "linear", 5)

    def test_the_default_spacing_depends_on_the_noise_alone(self) -> None:
        """Whatever T is, and on every schedule, the levels are the same but for rounding to whole times."""
        made = [schedule.cosine(4000), schedule.linear(4000, 2.5e-5, 0.005)]
        found = [
            [level.angle for level in timesteps.sampling_levels(one, "eps", "angle-log-snr", 10, top=3900)]
            for one in made
        ]
        starts = [one.time_at_angle(math.atan(RATIO)) for one in made]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DdimWarning)
            found = [
                [level.angle for level in timesteps.sampling_levels(one, "eps", "angle-log-snr", 10)] for one in made
            ]
        assert abs(starts[0] - starts[1]) > 100
        np.testing.assert_allclose(found[0], found[1], atol=5e-3)

    @QUIET
    @pytest.mark.parametrize("predicts", ["eps", "v"])
    @pytest.mark.parametrize("name", ["linear", "scaled-linear", "cosine", "sigmoid"])
    def test_a_rare_mode_keeps_its_probability(self, name: str, predicts: Any) -> None:
        """An exact network of data of which 1 in 10 is bright: within three standard errors of 10 %, at few steps."""
        means = 0.3 * torch.tensor([[1.0], [-1.0]]).double().expand(2, 16)
        data = exact.MixtureData(torch.tensor([0.1, 0.9]), means, 0.01 * torch.eye(16).double().expand(2, 16, 16))

        def network(x: Tensor, level: Level) -> Tensor:
            pair = data.denoise(x, level)
            return pair.eps if predicts == "eps" else level.signal * pair.eps - level.noise * pair.x0

        made = schedule.NAMED[name]()
        model = wrap(lambda x, t: network(x, made.level(float(t[0]) + 1)), made, predicts=predicts, dtype=torch.float64)
        share = (model.sample(400, (16,), steps=10).mean(1) > 0).double().mean()
        assert abs(float(share) - 0.1) < 3 * math.sqrt(0.1 * 0.9 / 400)

    @QUIET
    @pytest.mark.parametrize("T", [50, 1000])
    def test_a_small_error_in_eps_stays_small(self, T: int) -> None:
        """On a cosine schedule, whose noise / signal at T is 20,000: samples are near the data points all the same."""
        points = torch.tensor([[0.5, -0.5], [-0.7, 0.1], [0.9, 0.8]]).double()
        data, made = exact.EmpiricalData(points), schedule.cosine(T)

        def network(x: Tensor, t: Tensor) -> Tensor:
            return data.denoise(x, made.level(float(t[0]) + 1)).eps + 0.02 * torch.tanh(x.flip(1))

        x = wrap(network, made, predicts="eps", dtype=torch.float64).sample(60, (2,), steps=8).double()
        assert float(torch.cdist(x, points).amin(1).max()) < 0.15


class TestSteps:
    @pytest.mark.parametrize("T", [1, 2, 10, 50, 1000])
    @pytest.mark.parametrize("predicts", ["eps", "v"])
    def test_defaults_are_bounded(self, T: int, predicts: Any) -> None:
        made = schedule.cosine(T)
        for steps in (20, 50):
            assert default_steps(steps, made, predicts) == min(steps, start_time(made, predicts)) <= T
        assert default_counts((10, 20, 1000), made) == ([n for n in (10, 20, 1000) if n <= T] or [T])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DdimWarning)
            assert auto(made, predicts).nfe == default_steps(20, made, predicts)
            for method in METHODS if T > 2 else METHODS[:2]:
                found = inversion.plan_inversion(Planner(made, predicts), method, None, None)
                assert found.decode_plan.start.t == start_time(made, predicts)

    @pytest.mark.parametrize("predicts", ["eps", "v"])
    def test_commands_without_steps(self, predicts: str, tmp_path: Path) -> None:
        model = save_tiny(tmp_path / "model", predicts=predicts, schedule={"T": 10, "name": "cosine"})
        image = write_pictures(tmp_path / "images", 1)[0]
        plain = ("--precision", "float32")
        assert ddim("sample", model, "-n", 2, "--out", tmp_path / "samples", *plain) == 0
        assert ddim("encode", model, image, "--out", tmp_path / "z.safetensors", *plain) == 0
        assert ddim("reconstruct", model, image, "--out", tmp_path / "trip", *plain) == 0
        words = ("--seeds", "1,2", "--frames", 2, "--force", "--out", tmp_path / "strip.png")
        assert ddim("interpolate", model, *words, *plain) == 0
        assert ddim("edit", model, image, "--start-at", 6, "-n", 1, "--out", tmp_path / "edit", *plain) == 0
        assert ddim("plan", model, "--like", "openai") == 0

    @QUIET
    def test_the_preview_of_a_training(self, tmp_path: Path) -> None:
        """With T = 10; and the model records mean and standard deviation of its data."""
        data, made = tiny_set(), tiny_config(predicts="eps", schedule={"T": 10})
        train_config = recipe(steps=2, preview_every=1, checkpoint_every=2, gamma="simple")
        about = {"data": data.name, "split": data.split, "data_fingerprint": data.fingerprint()}
        run = RunConfig(**about, model=made, train=train_config)
        assert "preview" in [*train(tmp_path / "run", run, data, "cpu")][-1].event
        found = load_tiny(tmp_path / "run").config.statistics
        values = torch.as_tensor(data.batch(np.arange(len(data)))).double() / 127.5 - 1
        assert found is not None
        assert [found.mean, found.std] == pytest.approx(
            [float(values.mean()), float(values.std(correction=0))], abs=1e-6
        )


def of_diffusers(predicts: str = "eps", **settings: Any) -> Model:
    """A tiny model with the scheduler settings of a diffusers folder."""
    model = tiny_model(predicts=predicts)
    origin = Origin(format="diffusers", settings={"scheduler": "DDIMScheduler", **settings})
    return Model(model.network, model.config.model_copy(update={"origin": origin}), device="cpu", dtype="float32")


class TestClipping:
    @QUIET
    @pytest.mark.parametrize("sampler", ["auto", "ddim", "unipc3"])
    def test_eps_networks_are_clipped_and_no_clip_changes_only_that(self, sampler: str) -> None:
        model = tiny_model(predicts="eps")
        clipped, plain = model.plan(8, sampler=sampler), model.plan(8, sampler=sampler, clip_x0=False)
        assert clipped.clip_x0
        assert not plain.clip_x0
        assert clipped.rows == plain.rows
        assert not tiny_model(predicts="v").plan(8, sampler=sampler).clip_x0

    def test_clipping_is_warned_about(self) -> None:
        with pytest.warns(DdimWarning, match=r"\bx0\b"):
            tiny_model(predicts="eps").plan(grid=[10, 1000])

    @QUIET
    @pytest.mark.parametrize("make", [lambda: tiny_model(predicts="eps"), lambda: of_diffusers(clip_sample=True)])
    def test_inversion_never_clips(self, make: Any) -> None:
        model = make()
        assert not model.plan(5, encode=True).clip_x0
        for method in METHODS:
            found = model.inversion(method, 5)
            assert not any(plan.clip_x0 for plan in (found.encode_plan, found.decode_plan, found.resume_plan) if plan)

    @QUIET
    @pytest.mark.parametrize("predicts", ["eps", "v"])
    @pytest.mark.parametrize(
        ("settings", "clips"),
        [({"clip_sample": True}, True), ({"clip_sample": False}, False), ({}, True), ({"scheduler": "PNDM"}, False)],
    )
    def test_a_diffusers_folder_clips_like_its_scheduler(
        self, settings: dict[str, Any], clips: bool, predicts: str
    ) -> None:
        model = of_diffusers(predicts, **settings)
        assert model.plan(5).clip_x0 == clips
        assert model.plan(5, clip_x0=not clips).clip_x0 != clips

    @QUIET
    @pytest.mark.parametrize("settings", [{"thresholding": True}, {"clip_sample": True, "clip_sample_range": 2.0}])
    def test_unsupported_scheduler_settings_are_errors_until_clip_x0_is_set(self, settings: dict[str, Any]) -> None:
        model = of_diffusers(**settings)
        with pytest.raises(DdimError, match="clip_x0") as caught:
            model.plan(5)
        assert "clip_x0: " in str(caught.value)
        assert "\n" not in str(caught.value)
        assert [model.plan(5, clip_x0=clip).clip_x0 for clip in (True, False)] == [True, False]
        assert not model.plan(5, encode=True).clip_x0

    @pytest.mark.parametrize("words", [(), ("--no-clip",), ("--grid", "quadratic"), ("--steps", 6, "--eta", 1)])
    def test_the_printed_plan_is_the_one_that_runs(
        self, words: tuple[Any, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model = save_tiny(tmp_path / "model", predicts="eps", schedule={"name": "cosine"})
        assert ddim("plan", model, *words, "--json") == 0
        output = capsys.readouterr()
        assert ("--no-clip" in output.err) == ("--no-clip" not in words)
        plan = Plan.from_json(output.out)
        assert plan.clip_x0 == ("--no-clip" not in words)
        assert ddim("sample", model, *words, "-n", 1, "--force", "--out", tmp_path / "out") == 0
        assert json.loads((tmp_path / "out/manifest.json").read_text())["plan"] == json.loads(plan.to_json())


def wrecked(folder: Path) -> Path:
    """A model folder whose samples are far beyond the range."""
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.mul_(4)
    model.save(folder)
    return folder


class TestPlausible:
    def test_implausible_samples_are_an_error_before_anything_is_written(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model, image = wrecked(tmp_path / "model"), write_pictures(tmp_path / "images", 1)[0]
        plain = ("--steps", 3, "--precision", "float32")
        assert ddim("encode", model, image, "--out", tmp_path / "z.safetensors", *plain) == 0
        before = contents(tmp_path)
        commands: list[tuple[Any, ...]] = [
            ("sample", model, "-n", 3, *plain, "--out", tmp_path / "samples"),
            ("edit", model, image, "--start-at", 999, "-n", 1, *plain, "--out", tmp_path / "edits"),
            ("interpolate", model, "--seeds", "1,2", "--frames", 2, *plain, "--out", tmp_path / "strip.png"),
        ]
        for words in commands:
            capsys.readouterr()
            assert ddim(*words) == 2
            [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
            assert line.startswith("error: samples: ")
            assert "--force" in line
            assert contents(tmp_path) == before
            assert not Path(str(words[-1])).exists()
        for words in commands:
            assert ddim(*words, "--force") == 0
            assert len([line for line in capsys.readouterr().err.splitlines() if line.startswith("note: samples")]) == 1
        assert len([*(tmp_path / "samples").glob("*.png")]) == 3

    def test_a_rejected_run_keeps_existing_images(self, tmp_path: Path) -> None:
        model = wrecked(tmp_path / "model")
        words = ("sample", model, "--steps", 3, "--out", tmp_path / "out")
        assert ddim(*words, "-n", 2, "--force") == 0
        before = contents(tmp_path / "out")
        assert ddim(*words, "-n", 4) == 2
        assert {**contents(tmp_path / "out"), "manifest.json": b""} == {**before, "manifest.json": b""}

    def test_plausibility_of_samples(self) -> None:
        """Images of the recorded spread, blank ones too, are; far values, or noise of another spread, are not."""
        plain = tiny_config()
        known = plain.model_copy(update={"statistics": DataStatistics(mean=-0.2, std=0.5)})
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn((8, 1, 8, 8), generator=generator)
        for config in (plain, known):
            for good in (0.5 * noise - 0.2, torch.ones(1, 1, 8, 8), -torch.ones(1, 1, 8, 8), noise.clamp(-1, 1)):
                assert not implausible(good, config)
            assert implausible(5 * noise, config)
        assert implausible(noise, known)
        assert not implausible(noise, plain)
        assert not implausible(torch.full((2, 12), 99), tiny_config("text"))

    def test_the_statistics_are_optional(self) -> None:
        """Configurations written before there were any are read; written ones come back."""
        known = tiny_config().model_copy(
            update={"statistics": statistics_of(tiny_set(), lambda b: torch.as_tensor(b) / 127.5 - 1)}
        )
        assert parse(ModelConfig, to_json(known), "config") == known
        old = json.loads(to_json(tiny_config()))
        del old["statistics"]
        assert parse(ModelConfig, json.dumps(old), "config").statistics is None
