"""`PlanScheduler.from_scheduler` repeats the steps of diffusers' own schedulers in float32, and in their pipelines."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMParallelScheduler,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    UNet2DModel,
)
from torch import Tensor

import ddim
from ddim.errors import DdimError
from ddim.interop.diffusers_scheduler import PlanScheduler
from ddim.samplers import recommended

SHAPE = (2, 1, 8, 8)
TYPES = ("epsilon", "sample", "v_prediction")
SPACINGS = ("leading", "trailing", "linspace")


def network(x: Tensor, t: Any) -> Tensor:
    """A smooth network with outputs large enough for clipping to matter."""
    return torch.tanh(x.roll(1, -1)) * 0.9 + torch.cos(torch.as_tensor(t) / 100.0) * 0.3


def states(scheduler: Any, steps: int, seed: int = 0, channels: int = 1, **settings: Any) -> list[Tensor]:
    """The states of a loop as in diffusers' pipelines."""
    generator = torch.Generator().manual_seed(seed)
    x, result = torch.randn(SHAPE, generator=generator), []
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, t), t).repeat(1, channels, 1, 1)
        x = scheduler.step(output, t, x, generator=generator, **settings).prev_sample
        result.append(x)
    return result


def agree(actual: list[Tensor], expected: list[Tensor], within: float = 1e-5) -> None:
    """Equal up to float32 rounding of terms of the states' size, which an eps network without clipping lets grow."""
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert float((a - b).abs().max()) <= within * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("clip", [False, True])
def test_every_ddim_configuration(spacing: str, prediction_type: str, clip: bool) -> None:
    for offset, to_one, steps, eta in itertools.product((0, 1), (False, True), (7, 10), (0.0, 1.0)):
        settings: dict[str, Any] = {"timestep_spacing": spacing, "clip_sample": clip, "steps_offset": offset}
        theirs = DDIMScheduler(prediction_type=prediction_type, set_alpha_to_one=to_one, **settings)
        ours = PlanScheduler.from_scheduler(theirs)
        # With noise, diffusers' step from t = 2 to 1 loses digits of 1 - alpha_t / alpha_(t - 1) in float32.
        agree(states(ours, steps, eta=eta), states(theirs, steps, eta=eta), 1e-4 if eta and not to_one else 1e-5)
        assert torch.equal(ours.timesteps, theirs.timesteps)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("clip", [False, True])
def test_every_ddpm_configuration(spacing: str, prediction_type: str, clip: bool) -> None:
    for offset, steps, variance in itertools.product(
        (0, 1), (7, 10), ("fixed_small", "fixed_small_log", "fixed_large", "learned_range")
    ):
        settings: dict[str, Any] = {"timestep_spacing": spacing, "clip_sample": clip, "steps_offset": offset}
        theirs = DDPMScheduler(prediction_type=prediction_type, variance_type=variance, **settings)
        ours = PlanScheduler.from_scheduler(theirs)
        channels = 2 if variance == "learned_range" else 1
        agree(states(ours, steps, channels=channels), states(theirs, steps, channels=channels))
        assert torch.equal(ours.timesteps, theirs.timesteps)


@pytest.mark.parametrize(
    "theirs",
    [
        DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False),
        DDIMScheduler(beta_schedule="squaredcos_cap_v2"),
        DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction"),
        DDIMScheduler(trained_betas=[0.01 * k for k in range(1, 51)], num_train_timesteps=50),
        DDIMParallelScheduler(),
    ],
    ids=lambda theirs: f"{type(theirs).__name__}-{theirs.config.beta_schedule}",
)
def test_noise_schedules(theirs: Any) -> None:
    for settings in ({}, {"eta": 0.5}, {"use_clipped_model_output": True}):
        ours = PlanScheduler.from_scheduler(theirs)
        agree(states(ours, 10, **settings), states(theirs, 10, **settings))


def test_all_timesteps() -> None:
    for theirs in (DDIMScheduler(num_train_timesteps=100), DDPMScheduler(num_train_timesteps=100)):
        agree(states(PlanScheduler.from_scheduler(theirs), 100)[-1:], states(theirs, 100)[-1:], 1e-4)


def test_custom_timesteps_of_ddpm() -> None:
    times, theirs = [900, 500, 120, 3], DDPMScheduler()
    ours = PlanScheduler.from_scheduler(theirs)
    results = []
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(timesteps=times)
        x = torch.randn(SHAPE, generator=(generator := torch.Generator().manual_seed(0)))
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t), t, x, generator=generator).prev_sample
        results.append([x])
    agree(*results)


def test_a_run_from_a_later_row() -> None:
    """As image-to-image pipelines do."""
    theirs = DDIMScheduler(timestep_spacing="linspace")
    ours = PlanScheduler.from_scheduler(theirs)
    results = []
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
        if scheduler is ours:
            scheduler.set_begin_index(4)
        x = torch.randn(SHAPE, generator=(generator := torch.Generator().manual_seed(0)))
        for t in scheduler.timesteps[4:]:
            x = scheduler.step(network(x, t), t, x, eta=0.5, generator=generator).prev_sample
        results.append([x])
    agree(*results)


def test_eta_may_be_set_when_created() -> None:
    theirs = DDIMScheduler()
    ours = PlanScheduler.from_scheduler(theirs, eta=0.5)
    agree(states(ours, 10), states(theirs, 10, eta=0.5))
    with pytest.raises(DdimError, match=r"^eta 1: "):
        states(ours, 10, eta=1.0)


@pytest.mark.filterwarnings("ignore::ddim.DdimWarning")
def test_other_samplers_are_one_keyword_away() -> None:
    ours = PlanScheduler.from_scheduler(DDIMScheduler(clip_sample=False), sampler="auto")
    for steps in (5, 20):
        ours.set_timesteps(steps)
        expected = ddim.samplers.named(
            recommended(steps, ours.schedule, "eps")[0],
            [*(row.now for row in ours.plan.rows), ours.plan.end],
            ours.schedule,
        )
        assert ours.plan.rows == expected.rows
    assert ours.timesteps.tolist() != list(range(950, -1, -50))
    [x] = states(ours, 20)[-1:]
    ours.set_timesteps(20)
    ours.set_begin_index(10)
    assert ours.plan.sampler == expected.sampler
    assert bool(torch.isfinite(x).all())


def test_a_scheduler_that_is_not_repeated_needs_a_sampler() -> None:
    theirs = DPMSolverMultistepScheduler()
    with pytest.raises(DdimError, match=r"^DPMSolverMultistepScheduler: .*sampler='auto'"):
        PlanScheduler.from_scheduler(theirs)
    assert PlanScheduler.from_scheduler(theirs, sampler="dpm++2m").settings.sampler == "dpm++2m"
    with pytest.raises(DdimError, match=r"^DDPMScheduler: variance_type: "):
        PlanScheduler.from_scheduler(DDPMScheduler(variance_type="learned"))
    with pytest.raises(DdimError, match=r"^DDIMScheduler: "):
        PlanScheduler.from_scheduler(DDIMScheduler()).set_timesteps(timesteps=[9, 3])


@pytest.fixture(scope="module")
def unet() -> UNet2DModel:
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    shape: dict[str, Any] = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DModel(block_out_channels=(8, 16), norm_num_groups=4, **shape, **blocks).eval()


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """The warnings that diffusers prints when it converts configurations."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("diffusers.configuration_utils")
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def sample_of(pipe: Any, **settings: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    images: Tensor = pipe(2, generator, num_inference_steps=7, output_type="pt", **settings).images
    return images


def test_a_saved_pipeline_with_the_same_steps(unet: UNet2DModel, tmp_path: Path, logged: list[str]) -> None:
    """DDIMPipeline loads it as a DDIMScheduler, which loses nothing."""
    pipe = DDIMPipeline(unet, DDIMScheduler(timestep_spacing="trailing", set_alpha_to_one=False))
    expected = sample_of(pipe, eta=0.5)
    pipe.scheduler = PlanScheduler.from_scheduler(pipe.scheduler)
    torch.testing.assert_close(sample_of(pipe, eta=0.5), expected, rtol=0, atol=1e-5)
    pipe.save_pretrained(tmp_path)
    again = DDIMPipeline.from_pretrained(tmp_path)
    assert type(again.scheduler) is DDIMScheduler
    torch.testing.assert_close(sample_of(again, eta=0.5), expected, rtol=0, atol=1e-5)
    assert not logged


@pytest.mark.filterwarnings("ignore::ddim.DdimWarning")
def test_a_saved_pipeline_with_another_sampler(unet: UNet2DModel, tmp_path: Path, logged: list[str]) -> None:
    """DDIMPipeline converts any scheduler to its own: it prints how to restore the plan."""
    pipe = DDIMPipeline(unet, DDIMScheduler())
    pipe.scheduler = PlanScheduler.from_scheduler(pipe.scheduler, sampler="auto")
    expected = sample_of(pipe)
    pipe.save_pretrained(tmp_path)
    assert not logged
    again = DDIMPipeline.from_pretrained(tmp_path)
    assert type(again.scheduler) is DDIMScheduler
    [line] = logged
    assert "pipe.scheduler = ddim.PlanScheduler.from_config(pipe.scheduler.config)" in line
    again.scheduler = ddim.PlanScheduler.from_config(again.scheduler.config)
    assert torch.equal(sample_of(again), expected)


def test_a_saved_pipeline_that_keeps_its_scheduler(unet: UNet2DModel, tmp_path: Path, logged: list[str]) -> None:
    pipe = DDPMPipeline(unet, PlanScheduler.from_scheduler(DDPMScheduler()))
    expected = sample_of(pipe)
    torch.testing.assert_close(sample_of(DDPMPipeline(unet, DDPMScheduler())), expected, rtol=0, atol=1e-5)
    pipe.save_pretrained(tmp_path)
    again = DDPMPipeline.from_pretrained(tmp_path)
    assert type(again.scheduler) is PlanScheduler
    assert torch.equal(sample_of(again), expected)
    assert not logged


def test_overriding_a_stored_scheduler() -> None:
    same = PlanScheduler.from_scheduler(DDIMScheduler())
    assert PlanScheduler.from_config(same.config).settings == same.settings
    other = PlanScheduler.from_config(same.config, sampler="heun")
    assert (other.order, other.settings.clip_x0, other.settings.grid) == (2, True, "leading")
