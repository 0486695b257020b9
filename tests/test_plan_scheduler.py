"""Plans as schedulers in diffusers' pipelines with tiny random networks equal the sampling loop."""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import json
import sys
import types
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
    UNet2DModel,
    UniPCMultistepScheduler,
    VQModel,
)
from torch import Tensor, nn

from bench import SCHEDULES, falling, levels_of, randn
from ddim import samplers
from ddim.errors import DdimError, DdimWarning
from ddim.interop.diffusers_scheduler import PlanScheduler
from ddim.plan.plan import Plan
from ddim.plan.row import on_lattice
from ddim.process.categorical import Alphabet
from ddim.process.gaussian import diffuse
from ddim.process.parameterization import Denoiser, Prediction, predict, v_from_pair
from ddim.process.schedule import Level
from ddim.process.timesteps import sampling_levels
from ddim.samplers import SAMPLERS, ddim, named
from ddim.sampling import inversion
from ddim.sampling.guidance import Guided
from ddim.sampling.loop import run

LINEAR = SCHEDULES["linear"]
SCALED = SCHEDULES["scaled-linear"]
SHAPE = (2, 1, 8, 8)
S = 5
# Timesteps that start below T and steps with several evaluations warn; other tests cover the warnings.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ddim.DdimWarning"),
    pytest.mark.filterwarnings("ignore:Passing `image` as"),
    pytest.mark.filterwarnings("ignore:The configuration file of"),
]


def close(a: Any, b: Any, within: float = 1e-5) -> None:
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=within, atol=within)


def randomised(make: Any, seed: int = 0, **config: Any) -> Any:
    """A network with random weights, including its norms."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = make(**config).eval().requires_grad_(False)
        for module in network.modules():
            if isinstance(module, nn.GroupNorm):
                nn.init.normal_(module.weight, 1.0, 0.3)
                nn.init.normal_(module.bias, 0.0, 0.3)
    return network


class NearIdealUNet(UNet2DModel):
    """A U-Net near the ideal network of Gaussian data of std 0.3, so that images are not saturated."""

    predicts = "eps"

    def forward(self, sample: Tensor, timestep: Any, **settings: Any) -> Any:
        result = super().forward(sample, timestep, **settings)
        level = LINEAR.level(float(timestep) + 1)
        x0 = 0.09 * level.signal / (0.09 * level.alpha_bar + level.variance) * sample
        eps = (sample - level.signal * x0) / level.noise
        ideal = {"x0": x0, "eps": eps, "v": v_from_pair(x0, eps, level)}[self.predicts]
        result.sample = result.sample * 0.2 + ideal.repeat(1, result.sample.shape[1] // sample.shape[1], 1, 1)
        return result


@cache
def unet(predicts: str = "eps", out_channels: int = 1) -> NearIdealUNet:
    blocks = {"down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")}
    shape = {"sample_size": 8, "in_channels": 1, "out_channels": out_channels, "layers_per_block": 1}
    network = randomised(NearIdealUNet, block_out_channels=(8, 16), norm_num_groups=4, **shape, **blocks)
    network.predicts = predicts
    return network


def denoiser(predicts: Any = "eps") -> Denoiser:
    """The U-Net as a denoiser, without the library's adapter."""

    def denoise(x: Tensor, level: Level, /) -> Prediction:
        output = unet(predicts)(x.float(), torch.tensor(level.t - 1, dtype=torch.float32)).sample
        return predict(output.to(x.dtype), x, level, predicts)

    return denoise


def pipeline(scheduler: Any = None, predicts: str = "eps") -> DDIMPipeline:
    pipe = DDIMPipeline(unet(predicts), DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scheduler or pipe.scheduler
    return pipe


def sample_images(pipe: Any, seed: int = 1, steps: int = S, **settings: Any) -> Tensor:
    drawn = torch.Generator().manual_seed(seed)
    return pipe(batch_size=2, generator=drawn, num_inference_steps=steps, output_type="pt", **settings).images


def start(seed: int = 1) -> Tensor:
    """The initial noise of the pipeline."""
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def shown(x: Tensor) -> Tensor:
    """A state as the pipeline's output."""
    return (x / 2 + 0.5).clamp(0, 1)


class Drawn:
    """Noise as a pipeline's generator draws it, row by row."""

    def __init__(self, seed: int = 1):
        self.generator = torch.Generator().manual_seed(seed)
        torch.randn(SHAPE, generator=self.generator)

    def row(self, k: int) -> Tensor:
        return torch.randn(SHAPE, generator=self.generator)


def by_hand(scheduler: PlanScheduler, x: Tensor, steps: int, net: Any = None) -> list[Tensor]:
    """The states of a loop over the scheduler's timesteps, as a user writes it; `x` is the first."""
    scheduler.set_timesteps(steps)
    states = [x]
    for t in scheduler.timesteps:
        output = (net or unet())(scheduler.scale_model_input(states[-1], t).float(), t).sample
        states.append(scheduler.step(output, t, states[-1]).prev_sample)
    return states


class TestDDIMPipeline:
    @pytest.mark.parametrize("eta", [0.0, 1.0])
    def test_ddim_equals_diffusers(self, eta: float) -> None:
        """With clip_sample False and set_alpha_to_one True, S dividing T."""
        expected = sample_images(pipeline(), steps=10, eta=eta)
        actual = sample_images(pipeline(PlanScheduler.from_scheduler(pipeline().scheduler, eta=eta)), steps=10)
        close(actual, expected)
        times = [level.t for level in levels_of(LINEAR, "leading", 10)[-2::-1]]
        close(sample_images(pipeline(PlanScheduler(LINEAR, grid=times, eta=eta)), steps=10), expected)
        assert expected.std() > 0.05

    def test_clipped(self) -> None:
        """With eps recomputed, and with a plan that leaves eps unchanged, which is diffusers' default."""
        theirs = DDIMScheduler(clip_sample=True)
        expected = sample_images(pipeline(theirs), steps=10, use_clipped_model_output=True)
        ours = pipeline(PlanScheduler.from_scheduler(theirs, sampler="ddim"))
        close(sample_images(ours, steps=10), expected)
        close(sample_images(ours, steps=10, use_clipped_model_output=True), expected)
        plan = replace(ddim(levels_of(LINEAR, "leading", 10), clip_x0=True), eps_kept=True)
        unclipped_eps = sample_images(pipeline(theirs), steps=10)
        close(sample_images(pipeline(PlanScheduler(LINEAR, plan=plan)), steps=10), unclipped_eps)
        assert (expected - unclipped_eps).abs().max() > 1e-3

    @pytest.mark.parametrize(
        ("sampler", "predicts"),
        [*((name, "eps") for name in SAMPLERS), ("unipc3", "x0"), ("unipc3", "v"), ("heun", "v")],
    )
    def test_every_sampler_equals_the_sampling_loop(self, sampler: str, predicts: Any) -> None:
        plan = named(sampler, sampling_levels(LINEAR, predicts, "log-snr", S), LINEAR)
        scheduler = PlanScheduler(LINEAR, sampler, "log-snr", predicts=predicts)
        close(sample_images(pipeline(scheduler, predicts)), shown(run(denoiser(predicts), plan, start())))
        assert scheduler.step_index == len(plan) == len(scheduler.timesteps)
        assert scheduler.num_inference_steps == S

    def test_noise_comes_from_the_generator(self) -> None:
        plan = ddim(sampling_levels(LINEAR, "eps", "log-snr", S), eta=0.7)
        scheduler = PlanScheduler(LINEAR, grid="log-snr", eta=0.7)
        expected = shown(run(denoiser(), plan, start(), Drawn()))
        before = torch.get_rng_state()
        close(sample_images(pipeline(scheduler)), expected)
        close(sample_images(pipeline(scheduler), eta=0.7), expected)
        close(sample_images(pipeline(PlanScheduler(LINEAR, plan=plan))), expected)
        assert torch.equal(torch.get_rng_state(), before)

    def test_variance_noise(self) -> None:
        scheduler = PlanScheduler(LINEAR, eta=1.0)
        scheduler.set_timesteps(S)
        [x, output, z] = [randn(*SHAPE, seed=k) for k in range(3)]
        row = scheduler.plan.rows[0]
        there = scheduler.step(output, scheduler.timesteps[0], x, variance_noise=z).prev_sample
        scheduler.set_timesteps(S)
        close(there - scheduler.step(output, scheduler.timesteps[0], x, variance_noise=0 * z).prev_sample, row.z * z)

    def test_zero_terminal_snr(self) -> None:
        schedule = SCHEDULES["linear+zero-terminal-snr"]
        plan = ddim(levels_of(schedule, "trailing", S))
        scheduler = PlanScheduler(schedule, grid="trailing", predicts="v")
        close(sample_images(pipeline(scheduler, "v")), shown(run(denoiser("v"), plan, start())))
        eps = PlanScheduler(schedule, grid="trailing")
        eps.set_timesteps(S)
        assert eps.plan.start == sampling_levels(schedule, "eps", "trailing", S)[0] != schedule.level(schedule.T)
        with pytest.raises(DdimError, match=r"^plan row 0 \(t = 1000 to 500\): "):
            PlanScheduler(schedule, grid=[1, 500, 1000]).set_timesteps(3)

    def test_tuned_plan_from_a_file(self, tmp_path: Path) -> None:
        """Fractional times, custom weights, evaluation times other than the state's, and a model's checksum."""
        times = [1000, 700.25, 333.5, 12.75]
        base = samplers.adams_bashforth(falling(LINEAR, times[::-1]), order=3)
        rows = list(base.rows)
        eps = (rows[2].eps[0] - 0.03, rows[2].eps[1] + 0.03, *rows[2].eps[2:])
        rows[2] = replace(rows[2], x0=(0.02, -0.02), eps=eps, at=LINEAR.level(300))
        plan = replace(base, sampler="tuned", rows=tuple(rows), made_for="0" * 64).check()
        path = tmp_path / "tuned.json"
        path.write_text(plan.to_json())
        with pytest.warns(DdimWarning, match=r"\b000000000000\b"):
            scheduler = PlanScheduler(LINEAR, plan=Plan.from_json(path.read_text(), str(path)))
        assert scheduler.timesteps.dtype == torch.float32
        close(scheduler.timesteps, torch.tensor([999, 699.25, 299, 11.75]))
        close(sample_images(pipeline(scheduler), steps=4), shown(run(denoiser(), plan, start())))

    def test_learned_variance(self) -> None:
        """The second half of the network's output is the variance."""
        levels = levels_of(LINEAR, "log-snr", S)
        plan = ddim(levels, sigma="learned")
        scheduler = PlanScheduler(LINEAR, plan=plan)
        states = by_hand_noisy(scheduler, start(), unet("eps", 2))

        def denoise(x: Tensor, level: Level, /) -> Prediction:
            mean, message = unet("eps", 2)(x, level.t - 1).sample.chunk(2, dim=1)
            scheduler = predict(mean, x, level, "eps")
            return Prediction(scheduler.x0, scheduler.eps, (message + 1) / 2)

        close(states[-1], run(denoise, plan, start(), Drawn()))
        scheduler.set_timesteps(S)
        with pytest.raises(DdimError, match=r"^plan ddpm\(sigma learned\): "):
            scheduler.step(start(), scheduler.timesteps[0], start())


def by_hand_noisy(scheduler: PlanScheduler, x: Tensor, net: Any) -> list[Tensor]:
    scheduler.set_timesteps(len(scheduler.plan))
    drawn, states = Drawn().generator, [x]
    for t in scheduler.timesteps:
        states.append(scheduler.step(net(states[-1], t).sample, t, states[-1], generator=drawn, return_dict=False)[0])
    return states


class Stub(types.ModuleType):
    """A replacement of transformers, whose classes these pipelines only name: embeddings are passed in."""

    __path__: Sequence[str] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (nn.Module,), {})


LOADERS = {
    "FromSingleFileMixin": "single_file",
    "StableDiffusionLoraLoaderMixin": "lora_pipeline",
    "TextualInversionLoaderMixin": "textual_inversion",
    "IPAdapterMixin": "ip_adapter",
}


@cache
def stable_diffusion(name: str) -> Any:
    """The class of a real Stable Diffusion pipeline, without transformers if need be."""
    home = {"StableDiffusionPipeline": "", "StableDiffusionImg2ImgPipeline": "_img2img"}[name]
    loaders = importlib.import_module("diffusers.loaders")
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("transformers") is None:
            patch.setitem(sys.modules, "transformers", Stub("transformers"))
            for mixin, place in LOADERS.items():
                patch.setitem(loaders._class_to_module, mixin, place)
        place = f"diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion{home}"
        return getattr(importlib.import_module(place), name)


@cache
def conditional(**config: Any) -> UNet2DConditionModel:
    shape = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}
    shape |= {"sample_size": 8, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 8}
    blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
    blocks |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    return randomised(UNet2DConditionModel, **(shape | blocks | config))


@cache
def autoencoder(kind: Any = AutoencoderKL) -> Any:
    return randomised(
        kind,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )


WORDS, NOTHING = randn(1, 5, 8, dtype=torch.float32), randn(1, 5, 8, seed=1, dtype=torch.float32)
SCALE = 3.0


def guided(scale: float = SCALE) -> Denoiser:
    """Classifier-free guidance by hand, of a network that predicts v."""

    def conditioned(words: Tensor) -> Denoiser:
        def denoise(x: Tensor, level: Level, /) -> Prediction:
            t = torch.tensor(level.t - 1, dtype=torch.float32)
            output = conditional()(x, t, encoder_hidden_states=words.expand(len(x), -1, -1)).sample
            return predict(output, x, level, "v")

        return denoise

    return Guided(conditioned(WORDS), conditioned(NOTHING), scale)


def texts(name: str, scheduler: Any) -> Any:
    parts = {"vae": autoencoder(), "unet": conditional(), "scheduler": scheduler}
    parts |= dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipe = stable_diffusion(name)(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: Any, seed: int = 1, kind: str = "latent", **settings: Any) -> Tensor:
    drawn = torch.Generator().manual_seed(seed)
    embeds = {"prompt_embeds": WORDS, "negative_prompt_embeds": NOTHING, "guidance_scale": SCALE}
    return pipe(**embeds, generator=drawn, output_type=kind, **settings).images


LATENT = (1, 4, 8, 8)


def drawn(seed: int = 1) -> Tensor:
    return torch.randn(LATENT, generator=torch.Generator().manual_seed(seed))


class TestStableDiffusion:
    @pytest.mark.parametrize("sampler", ["ddim", "unipc3", "heun"])
    def test_classifier_free_guidance(self, sampler: str) -> None:
        plan = named(sampler, levels_of(SCALED, "log-snr", S), SCALED)
        pipe = texts("StableDiffusionPipeline", PlanScheduler(SCALED, sampler, "log-snr", predicts="v"))
        close(latents(pipe, num_inference_steps=S), run(guided(), plan, drawn()))

    def test_decoded_images(self) -> None:
        pipe = texts("StableDiffusionPipeline", PlanScheduler(SCALED, predicts="v"))
        latent = latents(pipe, num_inference_steps=S) / autoencoder().config.scaling_factor
        close(latents(pipe, kind="pt", num_inference_steps=S), shown(autoencoder().decode(latent).sample))

    def test_equals_diffusers_ddim(self) -> None:
        theirs = DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            clip_sample=False,
            steps_offset=1,
            prediction_type="v_prediction",
        )
        ours = PlanScheduler.from_scheduler(theirs)
        results = [latents(texts("StableDiffusionPipeline", each), num_inference_steps=10) for each in (theirs, ours)]
        close(*results, within=1e-4)  # their float32 table of alpha_bar is off by as much

    def test_creating_a_pipeline_changes_nothing(self) -> None:
        """The pipeline rewrites configurations that look outdated."""
        scheduler = PlanScheduler(SCALED, predicts="v", clip_x0=True)
        plan = ddim(levels_of(SCALED, "equal-angle", S), clip_x0=True)
        pipe = texts("StableDiffusionPipeline", scheduler)
        close(latents(pipe, num_inference_steps=S), run(guided(), plan, drawn()))

    def test_states_are_float32_inside_a_half_precision_loop(self) -> None:
        """The network gets states in bfloat16; the history of rows is stored in float32."""
        scheduler = PlanScheduler(SCALED, "ab3", "log-snr", predicts="v")
        scheduler.set_timesteps(S)
        x = drawn().bfloat16()
        for t in scheduler.timesteps:
            output = conditional()(x.float(), t, encoder_hidden_states=WORDS).sample.bfloat16()
            x = scheduler.step(output, t, x).prev_sample
            assert x.dtype == torch.bfloat16

        def denoise(x: Tensor, level: Level, /) -> Prediction:
            output = conditional()(x.bfloat16().float(), level.t - 1, encoder_hidden_states=WORDS).sample
            return predict(output.bfloat16().float(), x, level, "v")

        plan = named("ab3", levels_of(SCALED, "log-snr", S), SCALED)
        close(scheduler.states[0], run(denoise, plan, drawn().bfloat16().float()))
        assert torch.equal(scheduler.states[0].bfloat16(), x)


class TestImageToImage:
    @pytest.mark.parametrize(("sampler", "strength"), [*((name, 0.5) for name in SAMPLERS), ("heun", 1.0)])
    def test_a_plan_over_the_remaining_levels(self, sampler: str, strength: float) -> None:
        levels = levels_of(SCALED, "log-snr", 6)[6 - int(6 * strength) :]
        plan = named(sampler, levels, SCALED)
        x = diffuse(randn(*LATENT, seed=2, dtype=torch.float32), drawn(), levels[0])
        scheduler = PlanScheduler(SCALED, sampler, "log-snr", predicts="v")
        pipe = texts("StableDiffusionImg2ImgPipeline", scheduler)
        image = randn(*LATENT, seed=2, dtype=torch.float32)
        latent = latents(pipe, image=image, strength=strength, num_inference_steps=6)
        close(latent, run(guided(), plan, x))
        assert scheduler.plan.rows == plan.rows
        assert scheduler.begin_index == (6 - int(6 * strength)) * scheduler.order
        assert scheduler.step_index == len(scheduler.timesteps)

    def test_fixed_plans(self) -> None:
        """A one-step plan starts anywhere; a plan that needs earlier rows is an error."""
        levels = levels_of(SCALED, "log-snr", 8)
        image = randn(*LATENT, seed=2, dtype=torch.float32)
        settings = {"image": image, "strength": 0.5, "num_inference_steps": 8}
        pipe = texts("StableDiffusionImg2ImgPipeline", PlanScheduler(SCALED, predicts="v", plan=ddim(levels)))
        x = diffuse(image, drawn(), levels[4])
        close(latents(pipe, **settings), run(guided(), ddim(levels[4:]), x))
        for plan in (samplers.unipc(levels), samplers.bdia(levels)):
            pipe.scheduler = PlanScheduler(SCALED, predicts="v", plan=plan)
            with pytest.raises(DdimError, match=r"^plan row 4 \(t = 134 to 32\): "):
                latents(pipe, **settings)

    def test_later_timesteps_without_begin_index(self) -> None:
        """Some pipelines slice the timesteps and set no index."""
        plan = named("unipc3", sampling_levels(LINEAR, "eps", "log-snr", S)[2:], LINEAR)
        scheduler = PlanScheduler(LINEAR, "unipc3", "log-snr")
        scheduler.set_timesteps(S)
        x = start()
        for t in scheduler.timesteps[2:]:
            x = scheduler.step(unet()(x, t).sample, t, x).prev_sample
        close(x, run(denoiser(), plan, start()))
        assert scheduler.begin_index is None
        assert scheduler.step_index == S

    def test_starting_within_a_step_is_an_error(self) -> None:
        scheduler = PlanScheduler(LINEAR, "rk4", "log-snr")
        scheduler.set_timesteps(S)
        for row in range(len(scheduler.timesteps)):
            with contextlib.nullcontext() if row % 4 == 0 else pytest.raises(DdimError, match=r"^plan row"):
                scheduler.set_begin_index(row)

    def test_add_noise(self) -> None:
        scheduler = PlanScheduler(LINEAR)
        x0, eps = randn(3, 1, 8, 8), randn(3, 1, 8, 8, seed=1)
        times = [0.0, 499.5, 999.0]
        x = scheduler.add_noise(x0, eps, torch.tensor(times))
        for k, t in enumerate(times):
            close(x[k], diffuse(x0[k], eps[k], LINEAR.level(t + 1)), within=1e-12)
            close(scheduler.add_noise(x0, eps, torch.tensor([t]))[k], x[k], within=1e-12)
        theirs = DDIMScheduler().add_noise(x0, eps, torch.tensor([0, 499, 999]))
        close(scheduler.add_noise(x0, eps, torch.tensor([0, 499, 999])), theirs, within=1e-4)


class TestOtherPipelines:
    """Pipelines that use schedulers in other ways."""

    def kandinsky(self, kind: str, scheduler: Any) -> Any:
        config = {"out_channels": 8, "addition_embed_type": "image", "encoder_hid_dim_type": "image_proj"}
        net = conditional(**config, encoder_hid_dim=8)
        home = importlib.import_module(f"diffusers.pipelines.kandinsky2_2.pipeline_kandinsky2_2{kind}")
        name = {"": "KandinskyV22Pipeline", "_img2img": "KandinskyV22Img2ImgPipeline"}[kind]
        pipe = getattr(home, name)(unet=net, scheduler=scheduler, movq=autoencoder(VQModel))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def conditioned(self, pipe: Any, embed: Tensor) -> Denoiser:
        def denoise(x: Tensor, level: Level, /) -> Prediction:
            known = {"encoder_hidden_states": None, "added_cond_kwargs": {"image_embeds": embed}}
            output = pipe.unet(x, torch.tensor(level.t - 1, dtype=torch.float32), **known).sample
            return predict(output[:, :4], x, level, "v")

        return denoise

    @pytest.mark.parametrize("kind", ["", "_img2img"])
    def test_kandinsky(self, kind: str) -> None:
        """It drops the variance itself, and image-to-image starts at a later timestep without an index."""
        embeds = [randn(1, 8, seed=k, dtype=torch.float32) for k in (4, 5)]
        pipe = self.kandinsky(kind, PlanScheduler(SCALED, "deis3", "log-snr", predicts="v"))
        settings: dict[str, Any] = {"height": 16, "width": 16, "output_type": "latent", "guidance_scale": SCALE}
        levels = levels_of(SCALED, "log-snr", S)
        if kind:
            image = randn(1, 3, 16, 16, seed=6, dtype=torch.float32).clamp(-1, 1)
            settings |= {"image": image, "strength": 0.5, "generator": torch.Generator().manual_seed(1)}
            levels = levels[S - S // 2 :]
            x = diffuse(pipe.movq.encode(image).latents, drawn(), levels[0])
        else:
            settings["latents"] = x = drawn()
        settings |= {"image_embeds": embeds[0], "negative_image_embeds": embeds[1]}
        images = pipe(num_inference_steps=S, **settings).images
        guide = Guided(*(self.conditioned(pipe, embed) for embed in embeds), SCALE)
        close(images, run(guide, named("deis3", levels, SCALED), x))

    def test_dit_passes_two_copies_of_each_state(self) -> None:
        """With guidance it passes two copies of each state and drops one of the results."""
        shape: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1, "sample_size": 4}
        net = randomised(DiTTransformer2DModel, in_channels=4, out_channels=8, norm_num_groups=4, **shape)
        scheduler = PlanScheduler(SCALED, "ab2", "log-snr", predicts="v")
        pipe = DiTPipeline(net, autoencoder(), scheduler)
        pipe.set_progress_bar_config(disable=True)
        seed = torch.Generator().manual_seed(1)
        images = pipe([7], SCALE, seed, num_inference_steps=S, output_type="pt").images

        def conditioned(label: int) -> Denoiser:
            def denoise(x: Tensor, level: Level, /) -> Prediction:
                output = net(x, timestep=torch.tensor([level.t - 1]), class_labels=torch.tensor([label])).sample
                return predict(output[:, :4], x, level, "v")

            return denoise

        x = torch.randn((1, 4, 4, 4), generator=torch.Generator().manual_seed(1))
        plan = named("ab2", levels_of(SCALED, "log-snr", S), SCALED)
        latent = run(Guided(conditioned(7), conditioned(1000), SCALE), plan, x) / autoencoder().config.scaling_factor
        close(images, shown(autoencoder().decode(latent).sample))


IMAGES = (0.3 * randn(*SHAPE, seed=7, dtype=torch.float32)).clamp(-1, 1)


class TestEncoding:
    def inversion(self, method: str, steps: int) -> inversion.Inversion:
        return inversion.make_inversion(method, levels_of(LINEAR, "equal-angle", steps), LINEAR.level(1))

    def round_trip(self, inverter: inversion.Inversion) -> tuple[PlanScheduler, PlanScheduler]:
        up, down = (PlanScheduler(LINEAR, plan=plan) for plan in (inverter.encode_plan, inverter.resume_plan))
        *_, before, latent = by_hand(up, IMAGES, len(up.plan))
        if inverter.two_state:
            down.set_states(up.states[1::-1])
        by_hand(down, before if inverter.two_state else latent, len(down.plan))
        return up, down

    @pytest.mark.parametrize("method", ["ddim", "ddim-target", "reversible", "lossless"])
    def test_encoding_equals_the_library(self, method: str) -> None:
        inverter = self.inversion(method, S)
        up, _ = self.round_trip(inverter)
        now, before, _ = inversion.encode(denoiser(), inverter, IMAGES)
        close(up.states[0], now)
        if inverter.two_state:
            close(up.states[1], before)

    def test_reconstruction_error(self) -> None:
        """The error of DDIM falls with the steps, reversible is exact up to rounding, lossless bit-exact."""

        def error(method: str, steps: int) -> float:
            _, down = self.round_trip(self.inversion(method, steps))
            return float((down.states[0] - IMAGES).abs().max())

        coarse, fine = error("ddim", 8), error("ddim", 24)
        assert 1e-3 < fine < coarse / 2
        assert error("reversible", 10) < 1e-4
        assert error("lossless", 10) <= inversion.LATTICE / 2

    def test_lattice_states_are_exact_inside(self) -> None:
        up, down = self.round_trip(self.inversion("lossless", S))
        for scheduler in (up, down):
            for state in scheduler.states:
                assert state.dtype == torch.float64
                assert torch.equal(state / inversion.LATTICE, (state / inversion.LATTICE).round())
        assert not torch.equal(up.states[0].float().double(), up.states[0])
        assert torch.equal(down.states[0], on_lattice(IMAGES.double(), inversion.LATTICE))

    def test_changing_a_lattice_state_is_an_error(self) -> None:
        scheduler = PlanScheduler(LINEAR, plan=self.inversion("lossless", S).decode_plan)
        scheduler.set_timesteps(S)
        x = scheduler.step(start(), scheduler.timesteps[0], start()).prev_sample
        with pytest.raises(DdimError, match=r"^sample: "):
            scheduler.step(start(), scheduler.timesteps[1], x + 1e-3)

    def test_by_name(self) -> None:
        levels = sampling_levels(LINEAR, "eps", "log-snr", S, encode=True)
        scheduler = PlanScheduler(LINEAR, "ab2", "log-snr", encode=True)
        states = by_hand(scheduler, IMAGES, S)
        close(states[-1], run(denoiser(), named("ab2", levels, LINEAR, LINEAR.level(1)), IMAGES))
        assert scheduler.timesteps[0] == 0

    def test_a_plan_from_two_states_needs_both(self) -> None:
        scheduler = PlanScheduler(LINEAR, plan=self.inversion("reversible", S).resume_plan)
        with pytest.raises(DdimError, match=r"^plan bdia\(S=5, gamma=0\.3981\): "):
            scheduler.step(start(), scheduler.timesteps[0], start())
        scheduler.set_states([start(2), start(3)])
        with pytest.raises(DdimError, match=r"^sample: "):
            scheduler.step(start(), scheduler.timesteps[0], start())
        scheduler.set_states([start(), start(3)])
        scheduler.step(start(), scheduler.timesteps[0], start())
        scheduler.set_timesteps(S - 1)
        with pytest.raises(DdimError, match=r"^plan bdia\(S=5, gamma=0\.3981\): "):  # they serve one run
            scheduler.step(start(), scheduler.timesteps[0], start())


class TestLoops:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_state_may_be_changed_between_steps(self, dtype: torch.dtype) -> None:
        """Like inpainting: the run continues from the state that is passed in."""

        def denoise(x: Tensor, level: Level, /) -> Prediction:
            return predict(unet()(x.to(dtype).float(), level.t - 1).sample, x, level, "eps")

        scheduler = PlanScheduler(LINEAR, grid="log-snr")
        scheduler.set_timesteps(S)
        x = changed = start().to(dtype)
        for k, t in enumerate(scheduler.timesteps):
            x = scheduler.step(unet()(x.float(), t).sample, t, x).prev_sample
            if k == 2:
                x = changed = x * 0.9 + 0.1
        close(
            scheduler.states[0], run(denoise, ddim(sampling_levels(LINEAR, "eps", "log-snr", S)[3:]), changed.float())
        )

    def test_reused_buffers(self) -> None:
        """A compiled network may reuse one output buffer, and a loop one state buffer."""
        scheduler = PlanScheduler(LINEAR, "ab3", "log-snr")
        scheduler.set_timesteps(S)
        x, output = start(), start()
        for t in scheduler.timesteps:
            output.copy_(unet()(x, t).sample)
            x.copy_(scheduler.step(output, t, x).prev_sample)
        close(x, run(denoiser(), named("ab3", sampling_levels(LINEAR, "eps", "log-snr", S), LINEAR), start()))

    def test_custom_timesteps(self) -> None:
        scheduler = PlanScheduler(LINEAR, "ab2")
        scheduler.set_timesteps(timesteps=[999, 500, 120, 3])
        assert scheduler.timesteps.tolist() == [999, 500, 120, 3]
        assert scheduler.plan.rows == samplers.adams_bashforth(LINEAR.levels([1000, 501, 121, 4, 0]), order=2).rows

    def test_custom_grid(self) -> None:
        scheduler = PlanScheduler(LINEAR, grid=[10, 100.5, 1000])
        scheduler.set_timesteps(3)
        assert scheduler.timesteps.tolist() == [999, 99.5, 9]
        with pytest.raises(DdimError, match=r"^steps 4: "):
            scheduler.set_timesteps(4)

    def test_a_copy_runs_independently(self) -> None:
        scheduler = PlanScheduler(LINEAR, "ab2", "log-snr")
        scheduler.set_timesteps(S)
        scheduler.step(start(), scheduler.timesteps[0], start())
        other = copy.deepcopy(scheduler)
        scheduler.step(start(2), scheduler.timesteps[1], start())
        assert (scheduler.step_index, other.step_index) == (2, 1)
        assert torch.equal(other.step(start(2), scheduler.timesteps[1], start()).prev_sample, scheduler.states[0])

    def test_attributes_that_pipelines_use(self) -> None:
        scheduler = PlanScheduler(LINEAR, "heun", "log-snr", predicts="v")
        theirs = DDIMScheduler(prediction_type="v_prediction")
        assert (scheduler.order, scheduler.init_noise_sigma, len(scheduler), scheduler.step_index) == (
            2,
            1.0,
            1000,
            None,
        )
        for key in ("num_train_timesteps", "prediction_type", "set_alpha_to_one"):
            assert scheduler.config[key] == theirs.config[key]
        torch.testing.assert_close(scheduler.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-3, atol=1e-6)
        scheduler.set_timesteps(S)
        assert scheduler.num_inference_steps == S
        assert scheduler.timesteps.dtype == torch.int64
        assert scheduler.scale_model_input(IMAGES, scheduler.timesteps[0]) is IMAGES
        result = scheduler.step(IMAGES, scheduler.timesteps[0], IMAGES)
        close(result.pred_original_sample, predict(IMAGES, IMAGES, scheduler.plan.start, "v").x0)
        scheduler.set_timesteps(S)
        assert torch.equal(
            scheduler.step(IMAGES, scheduler.timesteps[0], IMAGES, return_dict=False)[0], result.prev_sample
        )
        assert str(scheduler) == "PlanScheduler(sampler heun, log-snr, predicts v, schedule linear, T = 1000)"


class TestConfigurations:
    @pytest.mark.parametrize(
        "settings",
        [
            {"sampler": "unipc3", "grid": "log-snr", "predicts": "v"},
            {"grid": "leading", "offset": 1, "eta": 0.5, "clip_x0": True},
            {"grid": (10, 100.5, 900)},
            {"plan": samplers.dpm_solver_pp(levels_of(LINEAR, "log-snr", 3), order=3)},
        ],
    )
    def test_saved_and_loaded(self, settings: Any, tmp_path: Path) -> None:
        scheduler = PlanScheduler(LINEAR, **settings)
        scheduler.save_pretrained(tmp_path)
        text = (tmp_path / "scheduler_config.json").read_text()
        json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
        again = PlanScheduler.from_pretrained(tmp_path)
        assert again.schedule == LINEAR
        for each in (scheduler, again):
            each.set_timesteps(3)
        assert again.plan == scheduler.plan
        assert torch.equal(again.timesteps, scheduler.timesteps)
        assert again.settings == scheduler.settings

    def test_zero_terminal_snr_is_saved(self, tmp_path: Path) -> None:
        zero = SCHEDULES["linear+zero-terminal-snr"]
        PlanScheduler(zero, predicts="v").save_pretrained(tmp_path)
        assert "Infinity" not in (tmp_path / "scheduler_config.json").read_text()
        assert PlanScheduler.from_pretrained(tmp_path).schedule == zero

    def test_a_whole_pipeline(self, tmp_path: Path) -> None:
        net = randomised(
            UNet2DModel,
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
        )
        pipe = DDPMPipeline(net, PlanScheduler(LINEAR, "deis2", "log-snr", predicts="v"))
        pipe.save_pretrained(tmp_path)
        again = DDPMPipeline.from_pretrained(tmp_path)
        assert isinstance(again.scheduler, PlanScheduler)
        for each in (pipe, again):
            each.set_progress_bar_config(disable=True)
        assert torch.equal(sample_images(again), sample_images(pipe))

    def test_conversion_to_another_scheduler_class(self) -> None:
        """`DDIMPipeline` does this: betas and prediction type are equal, and it converts back."""
        scheduler = PlanScheduler(SCALED, "unipc3", "trailing", predicts="v", clip_x0=True)
        theirs = DDIMPipeline(unet(), scheduler).scheduler
        assert type(theirs) is DDIMScheduler
        np.testing.assert_allclose(theirs.alphas_cumprod, SCALED.alpha_bar[1:], rtol=1e-3)
        expected = {"prediction_type": "v_prediction", "clip_sample": True, "timestep_spacing": "trailing"}
        assert {key: theirs.config[key] for key in expected} == expected
        assert PlanScheduler.from_config(theirs.config).settings == scheduler.settings
        assert PlanScheduler.from_config(theirs.config, sampler="heun").order == 2

    @pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
    @pytest.mark.parametrize("offset", [0, 1])
    def test_timesteps_of_a_converted_scheduler(self, spacing: Any, offset: int) -> None:
        theirs = DDIMScheduler(timestep_spacing=spacing, steps_offset=offset, clip_sample=False)
        for ours in (PlanScheduler.from_scheduler(theirs, sampler="ddim"), PlanScheduler.from_config(theirs.config)):
            ours.set_timesteps(10)
            theirs.set_timesteps(10)
            assert torch.equal(ours.timesteps, theirs.timesteps)
            assert ours.schedule == LINEAR

    @pytest.mark.parametrize(
        ("theirs", "expected_notes"),
        [
            (DDIMScheduler(), ["linear betas, 0.0001 to 0.02, T = 1000", "eps", "clipped", "leading", "sampler: heun"]),
            (DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample"), ["cosine betas", "x0"]),
            (DPMSolverMultistepScheduler(beta_schedule="scaled_linear"), ["scaled-linear betas", "grid linspace"]),
            (UniPCMultistepScheduler(trained_betas=[0.1, 0.2, 0.3], num_train_timesteps=3), ["betas", "T = 3"]),
        ],
    )
    def test_notes_of_mapped_settings(self, theirs: Any, expected_notes: list[str]) -> None:
        scheduler = PlanScheduler.from_scheduler(theirs, sampler="heun")
        np.testing.assert_allclose(scheduler.schedule.alpha_bar[1:], theirs.alphas_cumprod, rtol=1e-3, atol=1e-6)
        text = "; ".join(scheduler.notes)
        assert all(part in text for part in expected_notes), text
        assert scheduler.settings.predicts == {"epsilon": "eps", "sample": "x0"}[theirs.config.prediction_type]

    def test_a_table_that_differs_from_the_configuration(self) -> None:
        theirs = DDIMScheduler()
        theirs.alphas_cumprod = torch.tensor(SCHEDULES["cosine"].alpha_bar[1:])
        scheduler = PlanScheduler.from_scheduler(theirs)
        np.testing.assert_allclose(scheduler.schedule.log_snr, SCHEDULES["cosine"].log_snr, rtol=1e-9, atol=1e-9)
        assert "its table" in scheduler.notes[0]

    def test_a_scheduler_that_does_not_end_at_clean_data_warns(self) -> None:
        with pytest.warns(DdimWarning, match=r"\bt = 1\b"):
            PlanScheduler.from_scheduler(DDIMScheduler(set_alpha_to_one=False), sampler="ddim")

    def test_a_plan_for_another_schedule_is_an_error(self) -> None:
        plan = named("unipc3", levels_of(SCALED, "log-snr", S), SCALED)
        theirs = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
        assert PlanScheduler.from_scheduler(theirs, plan=plan).plan == plan
        with pytest.raises(DdimError, match=r"^plan: "):
            PlanScheduler.from_scheduler(DDIMScheduler(), plan=plan)


def stepped(scheduler: PlanScheduler, *times: int, **settings: Any) -> None:
    scheduler.set_timesteps(S)
    for k in times:
        scheduler.step(start(), scheduler.timesteps[k], start(), **settings)


PLAN = ddim(levels_of(LINEAR, "log-snr", S))
WRONG: dict[str, tuple[Any, str]] = {
    "no steps": (lambda: PlanScheduler(LINEAR).step(start(), 9, start()), r"^PlanScheduler: .*\bset_timesteps\b"),
    "a number": (lambda: PlanScheduler(LINEAR).set_timesteps(), r"^set_timesteps: .*\bnum_inference_steps\b"),
    "too many": (lambda: PlanScheduler(LINEAR).set_timesteps(1001), r"^steps 1001: .*\b1\.\.1000\b"),
    "another number": (lambda: PlanScheduler(LINEAR, plan=PLAN).set_timesteps(50), r"^plan ddim\(eta=0\): .*\b50\b"),
    "other times": (lambda: PlanScheduler(LINEAR, plan=PLAN).set_timesteps(timesteps=[5]), r"^plan ddim\(eta=0\): "),
    "one too many": (lambda: stepped(PlanScheduler(LINEAR), *range(S), 0), r"^plan ddim\(equal-angle, S=5, eta=0\): "),
    "left out": (lambda: stepped(PlanScheduler(LINEAR), 0, 2), r"^timestep 317: "),
    "twice": (lambda: stepped(PlanScheduler(LINEAR), 0, 0), r"^timestep 899: "),
    "no such time": (lambda: PlanScheduler(LINEAR, plan=PLAN).step(start(), 7, start()), r"^timestep 7: .*\b999\b"),
    "begin index": (lambda: PlanScheduler(LINEAR, plan=PLAN).set_begin_index(S), r"^begin index 5: .*\b0\.\.4\b"),
    "eta": (lambda: stepped(PlanScheduler(LINEAR), 0, eta=0.5), r"^eta 0\.5: "),
    "another eta": (lambda: stepped(PlanScheduler(LINEAR, eta=1), 0, eta=0.5), r"^eta 0\.5: "),
    "a plan's eta": (lambda: stepped(PlanScheduler(LINEAR, plan=PLAN), 0, eta=1), r"^eta 1: "),
    "eps": (
        lambda: stepped(PlanScheduler(LINEAR, clip_x0=True), 0, use_clipped_model_output=False),
        r"^use_clipped_model_output False: ",
    ),
    "output": (
        lambda: PlanScheduler(LINEAR, plan=PLAN).step(start()[:1], 999, start()),
        r"^model_output: .*\b1x1x8x8\b",
    ),
    "no noise": (lambda: PlanScheduler(LINEAR, "heun", eta=1), r"^PlanScheduler: "),
    "sampler": (lambda: PlanScheduler(LINEAR, "euler"), r"^PlanScheduler: .*'euler'"),
    "grid": (lambda: PlanScheduler(LINEAR, grid="karras"), r"^PlanScheduler: .*'karras'"),
    "predicts": (lambda: PlanScheduler(LINEAR, predicts="noise"), "predicts"),  # type: ignore[arg-type]
    "both": (lambda: PlanScheduler(LINEAR, "heun", clip_x0=True, plan=PLAN), r"^PlanScheduler: .*\bclip_x0\b"),
    "its schedule": (lambda: PlanScheduler(SCALED, plan=PLAN), r"^plan: "),
    "no schedule": (lambda: PlanScheduler("linear"), r"^PlanScheduler: "),  # type: ignore[arg-type]
    "tokens": (
        lambda: PlanScheduler(LINEAR, plan=samplers.discrete(PLAN.levels(), Alphabet.uniform(3))),  # type: ignore[arg-type]
        r"^PlanScheduler: ",
    ),
    "below t = 1": (
        lambda: PlanScheduler(LINEAR, plan=ddim(LINEAR.levels([9, 0.5, 0]))),
        r"^plan row 1 \(t = 0\.5 to 0\): ",
    ),
    "thresholding": (lambda: PlanScheduler.from_scheduler(DDIMScheduler(thresholding=True)), r"^DDIMScheduler: "),
    "its range": (
        lambda: PlanScheduler.from_scheduler(DDIMScheduler(clip_sample_range=2)),
        r"^DDIMScheduler: clip_sample_range: ",
    ),
    "flow": (
        lambda: PlanScheduler.from_scheduler(FlowMatchEulerDiscreteScheduler()),
        r"^FlowMatchEulerDiscreteScheduler: .*\balpha_bar\b",
    ),
    "flow's": (
        lambda: PlanScheduler.from_config(FlowMatchEulerDiscreteScheduler().config),
        r"^the configuration: ",
    ),
    "karras": (
        lambda: PlanScheduler.from_scheduler(DPMSolverMultistepScheduler(use_karras_sigmas=True), sampler="dpm++2m"),
        r"^DPMSolverMultistepScheduler: use_karras_sigmas: .*'log-snr'",
    ),
    "a file": (lambda: PlanScheduler.from_config({"_ddim": {"sampler": "heun"}}), r"^PlanScheduler: .*\blog_snr\b"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_have_one_line(name: str) -> None:
    wrong, pattern = WRONG[name]
    with pytest.raises(DdimError, match=pattern) as error:
        wrong()
    assert "\n" not in str(error.value)


def test_a_changed_shape_is_an_error() -> None:
    scheduler = PlanScheduler(LINEAR)
    scheduler.set_timesteps(S)
    scheduler.step(start(), scheduler.timesteps[0], start())
    with pytest.raises(DdimError, match=r"^sample: .*\b2x1x8x8\b"):
        scheduler.step(start()[:1], scheduler.timesteps[1], start()[:1])


def test_without_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ddim.interop.diffusers_scheduler")
    monkeypatch.setitem(sys.modules, "diffusers.configuration_utils", None)
    with pytest.raises(DdimError, match=r"^PlanScheduler: .*'ddim\[interop\]'"):
        importlib.import_module("ddim.interop.diffusers_scheduler")
