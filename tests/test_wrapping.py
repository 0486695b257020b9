"""Wrapped networks: on exact data every prediction type with every convention of time is the same model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bench import GAUSSIAN, MIXTURE, SCHEDULES, equal_ratios, falling, randn
from ddim import samplers
from ddim.errors import DdimError, DdimWarning
from ddim.evaluation.likelihood import log_density
from ddim.exact import GaussianData
from ddim.model.denoisers import flow_time
from ddim.model.model import Model
from ddim.model.wrap import Wrapped, wrap
from ddim.plan.base import Hooked
from ddim.process.gaussian import diffuse
from ddim.process.parameterization import Prediction, predict
from ddim.process.rng import Noise
from ddim.process.schedule import Level, Schedule
from ddim.sampling.guidance import Guided
from ddim.sampling.loop import run, trajectory
from ddim.sampling.tuning import iter_tuning
from models import new_network, tiny_model, tiny_network

LINEAR = SCHEDULES["linear"]
ZERO = SCHEDULES["cosine+zero-terminal-snr"]
T = LINEAR.T
KINDS = ("eps", "x0", "v", "edm", "velocity", "velocity, data at 1")


def at_log_snr(value: float) -> Level:
    return Level(math.nan, value)


# The time passed to a network, and the level that it means.
CONVENTIONS: dict[str, tuple[Any, Callable[[float], Level]]] = {
    "index": ("index", lambda told: LINEAR.level(told + 1)),
    "index+1": ("index+1", LINEAR.level),
    "fraction": ("fraction", lambda told: LINEAR.level(told * T)),
    "log-snr": ("log-snr", at_log_snr),
    "sigma": ("sigma", lambda told: at_log_snr(-2 * math.log(told))),
    "c_noise": (lambda level: math.log(level.ratio) / 4, lambda told: at_log_snr(-8 * told)),
    "angle": (lambda level: level.angle, lambda told: at_log_snr(-2 * math.log(math.tan(told)))),
    "flow": ("flow", lambda told: at_log_snr(2 * math.log((1 - told) / told))),
}


class Ideal(nn.Module):
    """The exact denoiser of the mixture as a network with a prediction type, from its input and time only."""

    def __init__(self, kind: str, level_of_time: Callable[[float], Level], data: Any = MIXTURE):
        super().__init__()
        self.kind, self.level_of_time, self.data = kind, level_of_time, data
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.eval()

    def forward(self, shown: Tensor, time: Tensor) -> Tensor:
        assert time.shape == (len(shown),)
        assert shown.dtype == torch.float64
        level = self.level_of_time(float(time[0]))
        if self.kind == "edm":
            return self.data.denoise(level.signal * shown, level).x0
        if self.kind.startswith("velocity"):
            pair = self.data.denoise((level.signal + level.noise) * shown, level)
            return (pair.eps - pair.x0) * (-1 if "data at 1" in self.kind else 1)
        pair = self.data.denoise(shown, level)
        return {"eps": pair.eps, "x0": pair.x0, "v": level.signal * pair.eps - level.noise * pair.x0}[self.kind]


def wrapped(kind: str, convention: str = "index", data: Any = MIXTURE, **settings: Any) -> Wrapped:
    time, level_of_time = CONVENTIONS[convention]
    if kind == "velocity, data at 1":
        settings |= {"data_at": 1}
        if convention == "flow":
            level_of_time = lambda time: at_log_snr(2 * math.log(time / (1 - time)))  # noqa: E731
    arguments: Any = kind.partition(",")[0]
    return wrap(Ideal(kind, level_of_time, data), LINEAR, predicts=arguments, time=time, **settings)


def close(found: Prediction, expected: Prediction) -> None:
    torch.testing.assert_close(found.x0, expected.x0, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.eps, expected.eps, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_network_gives_the_same_prediction(kind: str, convention: str) -> None:
    denoiser = wrapped(kind, convention)
    for t in (1, 20, 333, 700.5, 1000):
        level = LINEAR.level(t)
        x = diffuse(MIXTURE.sample(6, seed=1), randn(6, 3, seed=2), level)
        close(denoiser(x, level), MIXTURE.denoise(x, level))


@pytest.mark.parametrize(("kind", "told"), [("edm", "sigma"), ("velocity", "flow"), ("velocity, data at 1", "flow")])
def test_the_default_time_of_edm_and_flow_matching(kind: str, told: str) -> None:
    denoiser = wrapped(kind, told)
    left_out = wrap(denoiser.module, LINEAR, predicts=denoiser.predicts, data_at=int("data" in kind))  # type: ignore[arg-type]
    x, level = randn(3, 3), LINEAR.level(400)
    close(left_out(x, level), MIXTURE.denoise(x, level))


@hypothesis.given(st.sampled_from(KINDS), st.sampled_from([*CONVENTIONS]), st.floats(1, 1000), st.integers(0, 99))
def test_at_any_time_and_state(kind: str, convention: str, t: float, seed: int) -> None:
    level, x = LINEAR.level(t), 2 * randn(2, 3, seed=seed)
    actual = wrapped(kind, convention)(x, level)
    close(actual, MIXTURE.denoise(x, level))
    torch.testing.assert_close(level.signal * actual.x0 + level.noise * actual.eps, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("told", "understood"), [*itertools.permutations(CONVENTIONS, 2)])
def test_a_wrong_convention_is_another_model(told: str, understood: str) -> None:
    """This shows that the tests above can fail, even with times off by one."""
    module = Ideal("v", lambda value: at_log_snr(CONVENTIONS[understood][1](value).log_snr))
    denoiser = wrap(module, LINEAR, predicts="v", time=CONVENTIONS[told][0])
    x, level = randn(4, 3), LINEAR.level(300)
    try:
        actual = denoiser(x, level)
    except (DdimError, ValueError):  # a time that does not exist, as t = 1.3 of 0..1 would be
        return
    assert (actual.x0 - MIXTURE.denoise(x, level).x0).abs().max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_prediction_type_is_another_model(kind: str) -> None:
    x, level = randn(4, 3), LINEAR.level(300)
    for other in {"eps", "x0", "v", "edm", "velocity"} - {kind}:
        denoiser = wrap(Ideal(kind, CONVENTIONS["index"][1]), LINEAR, predicts=other, time="index")  # type: ignore[arg-type]
        assert (denoiser(x, level).x0 - MIXTURE.denoise(x, level).x0).abs().max() > 1e-2


PLANS: dict[str, dict[str, Any]] = {
    "ddim": {"steps": 8, "grid": "linear"},
    "ddpm": {"steps": 8, "grid": "linear", "eta": 1.0},
    "unipc": {"steps": 12, "grid": "log-snr", "sampler": "unipc3"},
}


@pytest.mark.parametrize("settings", PLANS.values(), ids=PLANS)
def test_every_network_gives_the_same_samples(settings: dict[str, Any]) -> None:
    plan = wrapped("v").plan(**settings)
    start, noise = randn(5, 3, seed=3), Noise(4, range(5), (3,))  # type: ignore[arg-type]
    expected = run(MIXTURE.denoise, plan, start, noise)
    drawn = run(MIXTURE.denoise, plan, noise)
    for kind, convention in itertools.product(KINDS, ("index", "fraction", "flow")):
        denoiser = wrapped(kind, convention)
        torch.testing.assert_close([*denoiser.trajectory(plan, start, noise)][-1].x, expected, rtol=1e-6, atol=1e-6)
        options = {**settings, "grid": [row.now.t for row in reversed(plan.rows)], "steps": None}
        actual = denoiser.sample(5, (3,), seed=4, **options)
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, drawn, rtol=1e-3, atol=1e-3)


def test_ddim_of_a_velocity_is_eulers_rule_of_rectified_flow() -> None:
    """Over the very times s, typed out in y = (1 - s) x_0 + s eps, from pure noise at s = 1."""
    s = np.arange(1, 101) / 100
    with np.errstate(divide="ignore"):
        flow = Schedule(2 * np.log((1 - s) / s), "flow")
    module = Ideal("velocity", CONVENTIONS["flow"][1])
    plain: Any = Ideal("velocity", CONVENTIONS["flow"][1])

    def network(y: Tensor, time: Tensor) -> Tensor:
        told = float(time[0])
        if told == 1:  # at s = 1 the state does not determine x_0
            return y - MIXTURE.denoise(y, Level(math.nan, -math.inf)).x0
        return plain(y, time)

    plan = wrap(module, flow, predicts="velocity").plan(grid=[20, 50, 80, 100])
    x = y = randn(4, 3)
    denoiser = wrap(network, flow, predicts="velocity")
    for step, (now, following) in zip(
        denoiser.trajectory(plan, x), itertools.pairwise([1, 0.8, 0.5, 0.2, 0]), strict=True
    ):
        y = y + (following - now) * network(y, torch.full((4,), now, dtype=torch.float64))
        assert flow_time(step.row.next) == pytest.approx(following, abs=1e-12)
        scale = step.row.next.signal + step.row.next.noise
        torch.testing.assert_close(step.x / scale, y, rtol=1e-9, atol=1e-9)


def test_ddim_of_edm_is_eulers_rule_in_sigma() -> None:
    sigmas = np.geomspace(0.002, 80, 50)
    module = Ideal("edm", CONVENTIONS["sigma"][1])
    denoiser = wrap(module, Schedule(-2 * np.log(sigmas), "edm"), predicts="edm")
    plan = denoiser.plan(grid=[5, 20, 35, 50])
    levels = [*(row.now for row in plan.rows), plan.end]
    x = randn(4, 3)
    y = x / levels[0].signal
    for step, (now, following) in zip(denoiser.trajectory(plan, x), itertools.pairwise(levels), strict=True):
        slope = (y - module(y, torch.full((4,), now.ratio, dtype=torch.float64))) / now.ratio
        y = y + (following.ratio - now.ratio) * slope
        torch.testing.assert_close(step.x / following.signal, y, rtol=1e-9, atol=1e-9)


class Tiny(nn.Module):
    """A convolution that depends on time and a condition."""

    def __init__(self, channels: int = 1, doubled: bool = False, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.seen: list[Any] = []
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.body = nn.Conv2d(channels, channels * (2 if doubled else 1), 3, padding=1).to(dtype)
        self.eval()

    def forward(self, x: Tensor, time: Tensor, condition: Tensor | None = None, text: Any = None) -> Tensor:
        self.seen.append((x.dtype, time, condition, text))
        out = self.body(x) + torch.cos(time / 300).to(x.dtype)[:, None, None, None]
        out = out if condition is None else out + condition.to(x.dtype)[:, None, None, None]
        return torch.tanh(out if text is None else out * text["scale"].to(x.dtype)[:, None, None, None])


def test_a_sample_does_not_depend_on_the_number_of_samples() -> None:
    denoiser = wrap(Tiny(), LINEAR, predicts="v", micro_batch=4)
    for settings in ({"steps": 5}, {"steps": 5, "eta": 1.0}, {"grid": [1, 200.5, 1000]}):
        nine = denoiser.sample(9, (1, 6, 6), seed=3, **settings)
        assert nine.shape == (9, 1, 6, 6)
        assert torch.equal(denoiser.sample(5, (1, 6, 6), seed=3, **settings), nine[:5])
        assert torch.equal(denoiser.sample(2, (1, 6, 6), seed=3, start=6, **settings), nine[6:8])
        assert not torch.equal(denoiser.sample(5, (1, 6, 6), seed=2, **settings), nine[:5])
    assert denoiser.sample(0, (1, 6, 6)).shape == (0, 1, 6, 6)


def test_conditioning_follows_its_sample() -> None:
    each, scale = torch.linspace(-1, 1, 6), torch.linspace(0.5, 1, 6)
    plain = wrap(Tiny(), LINEAR, predicts="v", micro_batch=4)
    denoiser = plain.with_conditioning(condition=each, text={"scale": scale, "words": "none"})
    six = denoiser.sample(6, (1, 4, 4), steps=3, seed=1)
    for k in range(6):
        one = plain.with_conditioning(condition=each[k : k + 1], text={"scale": scale[k : k + 1]})
        assert torch.equal(one.sample(1, (1, 4, 4), steps=3, seed=1, start=k), six[k : k + 1])
    assert not torch.equal(plain.sample(6, (1, 4, 4), steps=3, seed=1), six)
    assert denoiser.module.seen[0][3]["words"] == "none"  # type: ignore[attr-defined]
    with pytest.raises(DdimError, match=r"^conditioning condition: "):
        denoiser.sample(5, (1, 4, 4), steps=3)
    with pytest.raises(DdimError, match=r"^conditioning text\.scale: "):
        plain.with_conditioning(text={"scale": scale})(randn(5, 1, 4, 4), LINEAR.level(5))
    latents = denoiser.encode(six, steps=3)
    alone = plain.with_conditioning(condition=each[4:5], text={"scale": scale[4:5]})
    assert torch.equal(alone.encode(six[4:5], steps=3).x, latents.x[4:5])
    assert torch.equal(alone.decode(latents[4:5]), denoiser.decode(latents)[4:5])


@pytest.mark.filterwarnings("ignore::ddim.DdimWarning")
@pytest.mark.parametrize("predicts", ["eps", "x0", "v"])
def test_a_wrapped_network_of_this_library_equals_the_model(predicts: Any) -> None:
    """Plans, samples and latents are those of `Model`, but for its clipping, to the last bits of a convolution."""
    model = tiny_model(predicts=predicts, micro_batch=4)
    denoiser = wrap(model.network, LINEAR, predicts=predicts, time="index+1", micro_batch=4)
    for settings in (
        {"steps": 7, "grid": "linear"},
        {"steps": 7, "sampler": "auto"},
        {"steps": 5, "sampler": "heun", "grid": "linear"},
        {"steps": 5, "sigma": "hat", "grid": "linear"},
        {"grid": [3, 500.5, 1000], "clip_x0": True, "eta": 0.3},
        {"steps": 6, "encode": True, "grid": "linear"},
    ):
        settings = {"clip_x0": False} | settings
        assert denoiser.plan(**settings) == model.plan(**settings)
    for method, grid in (
        ("ddim", None),
        ("reversible", [1, 90, 1000]),
        ("fixed-point", None),
        ("fixed-point", "linear"),
    ):
        assert denoiser.inversion(method, 3, grid=grid) == model.inversion(method, 3, grid=grid)
    for settings in ({"steps": 6, "clip_x0": False}, {"steps": 6, "grid": "linear", "eta": 1.0, "clip_x0": False}):
        actual, expected = denoiser.sample(5, model.shape, seed=2, **settings), model.sample(5, seed=2, **settings)
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
    images = model.sample(3, steps=4, grid="linear").clamp(-1, 1)
    for method in ("ddim", "lossless"):
        actual, expected = (one.encode(images, 4, grid="linear", method=method) for one in (denoiser, model))
        assert actual.x.dtype == expected.x.dtype
        torch.testing.assert_close(actual.x, expected.x, rtol=1e-3, atol=1e-3)
        down, other = (one.decode(expected) for one in (denoiser, model))
        torch.testing.assert_close(down, other, rtol=1e-3, atol=1e-3)


def test_exact_methods_reconstruct_the_images() -> None:
    images = randn(3, 1, 4, 4, dtype=torch.float32).clamp(-1, 1)
    denoiser = wrap(Tiny(), LINEAR, predicts="v", micro_batch=2)
    back = denoiser.decode(denoiser.encode(images, 10, method="lossless"))
    torch.testing.assert_close(back, images, rtol=0, atol=1e-6)
    solved = denoiser.decode(denoiser.encode(images, 10, method="fixed-point"))
    torch.testing.assert_close(solved, images, rtol=0, atol=1e-3)
    with pytest.warns(DdimWarning):
        denoiser.decode(images, 10, method="lossless")
    with pytest.raises(DdimError, match=r"^data to encode: "):
        denoiser.encode(images.byte())
    with pytest.raises(DdimError, match=r"^fixed-point: "):
        wrap(Tiny(), LINEAR, predicts="v", dtype=torch.bfloat16).encode(images, 4, method="fixed-point")


def unet() -> Any:
    """A tiny UNet2DModel of diffusers, of three classes."""
    from diffusers import UNet2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "norm_num_groups": 4}
        blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
        return UNet2DModel(**shape, **blocks, block_out_channels=(8,), num_class_embeds=3)


def test_a_unet_of_diffusers_matches_a_hand_written_loop() -> None:
    network, labels = unet().eval(), torch.tensor([0, 2, 1, 2])
    denoiser = wrap(network, "linear", predicts="eps", micro_batch=4).with_conditioning(class_labels=labels)
    actual = denoiser.sample(4, (1, 8, 8), seed=7, grid=[200, 400, 600, 800, 1000], sampler="ddim")
    x = Noise(7, tuple(range(4)), (1, 8, 8)).start()
    table = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    for t, after in itertools.pairwise([999, 799, 599, 399, 199, -1]):
        a, b = table[t], table[after] if after >= 0 else 1.0
        with torch.no_grad():
            eps = network(x, torch.full((4,), t), class_labels=labels).sample
        x = math.sqrt(b) * (x - math.sqrt(1 - a) * eps) / math.sqrt(a) + math.sqrt(1 - b) * eps
    torch.testing.assert_close(actual, x, rtol=1e-3, atol=1e-3)


def test_the_same_unet_with_another_time_is_another_model() -> None:
    network = unet().eval()
    settings: dict[str, Any] = {"seed": 7, "grid": [200, 400, 600, 800, 1000], "sampler": "ddim"}
    labels = torch.zeros(1, dtype=torch.int64)
    one, other = (
        wrap(network, "linear", predicts="eps", time=time, conditioning={"class_labels": labels}).sample(
            2, (1, 8, 8), **settings
        )
        for time in ("index", "fraction")
    )
    assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("shape", ["tensor", "tuple", "list", "object"])
def test_supported_return_values(shape: str) -> None:
    form: Any = {"tensor": lambda out: out, "tuple": lambda out: (out, 1), "list": lambda out: [out]}
    form |= {"object": lambda out: SimpleNamespace(sample=out)}
    tiny, x, level = Tiny(), randn(2, 1, 4, 4, dtype=torch.float32), LINEAR.level(300)
    denoiser = wrap(lambda y, t: form[shape](tiny(y, t)), LINEAR, predicts="v")
    assert torch.equal(denoiser(x, level).x0, wrap(tiny, LINEAR, predicts="v")(x, level).x0)


@pytest.mark.parametrize("output", [None, (), {"out": 1}, SimpleNamespace(sample=3), torch.zeros(2, 3, 4, 4)])
def test_unsupported_return_values(output: Any) -> None:
    denoiser = wrap(lambda y, t: output, LINEAR, predicts="v")
    with pytest.raises(DdimError, match=r"^wrapped module: "):
        denoiser(randn(2, 1, 4, 4), LINEAR.level(5))


def test_a_learned_variance_is_split_from_the_mean() -> None:
    tiny, x, level = Tiny(doubled=True), randn(3, 1, 4, 4, dtype=torch.float32), LINEAR.level(300)
    actual = wrap(tiny, LINEAR, predicts="eps")(x, level)
    mean, variance = tiny(x, torch.full((3,), 299)).chunk(2, dim=1)
    assert torch.equal(actual.eps, mean)
    torch.testing.assert_close(actual.variance_fraction, (variance + 1) / 2)
    assert wrap(Tiny(), LINEAR, predicts="eps")(x, level).variance_fraction is None
    grid = [250, 500, 750, 1000]
    learned = wrap(tiny, LINEAR, predicts="eps").sample(2, (1, 4, 4), sigma="learned", grid=grid)
    assert torch.isfinite(learned).all()
    with pytest.raises(ValueError):
        wrap(Tiny(), LINEAR, predicts="eps").sample(2, (1, 4, 4), sigma="learned", grid=grid)
    with pytest.raises(DdimError, match=r"^wrapped module: "):
        wrap(tiny, LINEAR, predicts="velocity")(x, level)


def test_module_and_state_keep_their_dtypes() -> None:
    half, x = Tiny(dtype=torch.bfloat16), randn(2, 1, 4, 4)
    for state in (x, x.float()):
        actual = wrap(half, LINEAR, predicts="v")(state, LINEAR.level(300))
        assert half.seen[-1][0] == torch.bfloat16
        assert actual.x0.dtype == actual.eps.dtype == state.dtype
    single = Tiny()
    wrap(single, LINEAR, predicts="v")(x, LINEAR.level(300))
    assert single.seen[-1][0] == torch.float32
    assert wrap(half, LINEAR, predicts="v").sample(2, (1, 4, 4), steps=2).dtype == torch.float32
    seen: list[torch.dtype] = []
    wrap(lambda y, t: seen.append(y.dtype) or y, LINEAR, predicts="v")(x, LINEAR.level(3))  # type: ignore[func-returns-value]
    wrap(lambda y, t: seen.append(y.dtype) or y, LINEAR, predicts="v", dtype=torch.float16)(x, LINEAR.level(3))  # type: ignore[func-returns-value]
    assert seen == [torch.float64, torch.float16]


def test_values_and_dtypes_of_the_time() -> None:
    """Integer indices have an integer dtype, for embedding tables."""
    tiny, x = Tiny(), randn(2, 1, 4, 4)

    def told(t: float, **settings: Any) -> Tensor:
        wrap(tiny, LINEAR, predicts="v", **settings)(x, LINEAR.level(t))
        time: Tensor = tiny.seen[-1][1]
        return time

    assert torch.equal(told(300), torch.tensor([299, 299]))
    assert torch.equal(told(300, time="index+1"), torch.tensor([300, 300]))
    assert torch.equal(told(300.5), torch.tensor([299.5, 299.5]))
    assert torch.equal(told(500, time="fraction"), torch.tensor([0.5, 0.5]))
    assert torch.equal(told(1000, time="fraction"), torch.tensor([1.0, 1.0]))
    assert torch.equal(told(300, time_dtype=torch.float32), torch.tensor([299.0, 299.0]))
    assert torch.equal(told(300, time=lambda level: 7, time_dtype=torch.int64), torch.tensor([7, 7]))
    with pytest.raises(DdimError, match=r"^time at t = 300\.5: .*\b299\.5\b"):
        told(300.5, time_dtype=torch.int64)
    with pytest.raises(DdimError, match=r"^time at t = 0: "):
        told(0, time="log-snr")


def test_a_schedule_by_name_or_betas() -> None:
    betas = np.linspace(1e-4, 0.02, 1000)
    for arguments in (LINEAR, "linear", betas, betas.tolist(), torch.from_numpy(betas)):
        denoiser = wrap(Tiny(), arguments, predicts="v").schedule
        np.testing.assert_allclose(denoiser.log_snr, LINEAR.log_snr, rtol=1e-12)
    assert len(wrap(Tiny(), [0.1, 0.2], predicts="v").schedule.log_snr) == 2


@pytest.mark.parametrize("predicts", ["eps", "x0", "v", "edm", "velocity"])
def test_some_networks_need_signal(predicts: Any) -> None:
    denoiser, top = wrap(lambda y, t: torch.zeros_like(y), ZERO, predicts=predicts, time="index"), ZERO.level(1000)
    x = randn(2, 3)
    if predicts in ("eps", "edm"):
        with pytest.raises(DdimError, match=r"^a network of.*\bt = 1000\b") as caught:
            denoiser(x, top)
        assert "\n" not in str(caught.value)
        with pytest.raises(DdimError, match=r"^a network of.*\bt = 1000\b"):
            denoiser.plan(grid=[10, 500, 1000])
        with pytest.warns(DdimWarning, match=r"\bt = 999\b"):
            assert denoiser.plan(grid=[10, 999]).nfe == 2
    else:
        actual = denoiser(x, top)
        expected = {"x0": 0 * x, "v": 0 * x, "velocity": x}[predicts]  # of u = 0, eps = x_0 = y, and y = x
        torch.testing.assert_close(actual.x0, expected)
        torch.testing.assert_close(actual.eps, x)
        assert torch.isfinite(denoiser.sample(2, (3,), steps=5, grid="linear")).all()


def test_a_module_in_training_mode_is_set_to_evaluation_with_a_warning() -> None:
    module = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 3)).train()
    with pytest.warns(DdimWarning):
        wrap(module, LINEAR, predicts="v")
    assert not any(part.training for part in module.modules())
    wrap(module, LINEAR, predicts="v")


def test_a_wrapped_network_is_a_denoiser() -> None:
    denoiser = wrapped("velocity", "flow", data=GAUSSIAN)
    plan = samplers.ddim(falling(LINEAR, [100, 400, 700, 1000]), eta=0.5)
    noise = Noise(1, (0, 1, 2), (4,))

    def clip(x0: Tensor, _: Level) -> Tensor:
        return x0.clamp(-0.5, 0.5)

    other = GaussianData(GAUSSIAN.mean + 0.7, GAUSSIAN.variance / 3)
    twin = wrapped("eps", "index", data=other)
    for mine, exact in (
        (denoiser, GAUSSIAN.denoise),
        (Hooked(denoiser, clip), Hooked(GAUSSIAN.denoise, clip)),
        (Guided(denoiser, twin, 2.0), Guided(GAUSSIAN.denoise, other.denoise, 2.0)),
    ):
        for a, b in zip(trajectory(mine, plan, noise), trajectory(exact, plan, noise), strict=True):
            torch.testing.assert_close(a.x, b.x, rtol=1e-4, atol=1e-4)
    hooked = denoiser.sample(3, (4,), seed=1, plan=plan, through=partial(Hooked, hook=clip))
    assert torch.equal(hooked, run(Hooked(denoiser, clip), plan, Noise(1, (0, 1, 2, 2, 2, 2, 2, 2), (4,)))[:3])
    assert hooked.abs().max() <= 0.5


def test_likelihood_and_tuning_accept_a_wrapped_network() -> None:
    first, top = LINEAR.level(1), LINEAR.level(1000)
    denoiser = wrapped("edm", "sigma", data=GAUSSIAN)
    levels = equal_ratios(LINEAR, 60, 1000, 1)[::-1]
    rising = samplers.runge_kutta([first, *levels[1:-1], top], LINEAR, 4)
    x = diffuse(GAUSSIAN.sample(4, seed=2), randn(4, 4, seed=3), first)
    expected = GAUSSIAN.flow_log_density(x, first, top)
    torch.testing.assert_close(log_density(denoiser, rising, x), expected, rtol=1e-3, atol=1e-3)
    start = Noise(0, tuple(range(8)), (4,)).start()
    last = [*iter_tuning(denoiser, LINEAR, 3, start, "ddim", 8)][-1]
    exact = [*iter_tuning(GAUSSIAN.denoise, LINEAR, 3, start, "ddim", 8)][-1]
    assert last.result is not None
    assert exact.result is not None
    assert last.result.error == pytest.approx(exact.result.error, rel=1e-2)


def test_sigma_optimal_uses_the_error_argument() -> None:
    denoiser = wrap(Tiny(), LINEAR, predicts="eps", error=lambda level: 0.25 * level.alpha_bar)
    plan = denoiser.plan(grid=[200, 400, 600, 800, 1000], sigma="optimal")
    for row in plan.rows[:-1]:
        assert row.z == pytest.approx(
            samplers.ddim([row.now, row.next], sigma="optimal", error=denoiser.error).rows[0].z
        )
        assert row.z > row.sigma
    with pytest.raises(DdimError, match=r"^sigma 'optimal': "):
        wrap(Tiny(), LINEAR, predicts="eps").plan(grid=[500, 1000], sigma="optimal")


def test_global_generators_are_not_used() -> None:
    denoiser = wrap(Tiny(), LINEAR, predicts="v")
    before = torch.get_rng_state()
    denoiser.sample(2, (1, 4, 4), steps=3, eta=1.0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"predicts": "noise"}, r"^predicts 'noise': "),
        ({"time": "seconds"}, r"^time 'seconds': "),
        ({"schedule": "steep"}, r"^schedule 'steep': "),
        ({"schedule": [[0.1, 0.2]]}, r"^schedule betas: .*\(1, 2\)"),
        ({"schedule": [0.1, 1.2]}, r"^schedule betas: .*\bbeta_2 = 1\.2\b"),
        ({"data_at": 1}, r"^data_at 1: "),
        ({"data_at": 2, "predicts": "velocity"}, "data_at 2"),
        ({"micro_batch": 0}, "micro-batch 0"),
    ],
)
def test_invalid_arguments_raise_a_one_line_error(settings: dict[str, Any], wrong: str) -> None:
    arguments = {"schedule": LINEAR, "predicts": "eps"} | settings
    with pytest.raises(DdimError, match=wrong) as caught:
        wrap(Tiny(), **arguments)
    assert "\n" not in str(caught.value)


def test_invalid_sampling_arguments_raise_an_error() -> None:
    denoiser = wrap(Tiny(), LINEAR, predicts="v")
    plan = denoiser.plan(4)
    for arguments, wrong in (
        ({"n": -1}, r"^n -1: "),
        ({"n": 2, "plan": plan, "steps": 4}, r"^plan: "),
        ({"n": 2, "plan": plan, "eta": 1.0}, r"^plan: "),
        ({"n": 2, "top": 500}, r"^top: "),
        ({"n": 2, "plan": denoiser.plan(4, encode=True)}, r"^plan: .*\bt = 0\b"),
        ({"n": 2, "plan": samplers.ddim(falling(SCHEDULES["cosine"], [500, 1000]))}, "log-SNR"),
        ({"n": 2, "seed": -1}, "seed -1"),
    ):
        with pytest.raises(DdimError, match=wrong):
            denoiser.sample(shape=(1, 4, 4), **arguments)  # type: ignore[arg-type]


def test_replacing_fields_does_not_change_the_original() -> None:
    denoiser = wrap(Tiny(), LINEAR, predicts="v")
    arguments = denoiser.with_conditioning(condition=torch.ones(1))
    assert not denoiser.conditioning
    assert isinstance(arguments, Wrapped)
    assert arguments.schedule is denoiser.schedule
    x, level = randn(3, 1, 4, 4), LINEAR.level(100)
    assert not torch.equal(denoiser(x, level).x0, arguments(x, level).x0)
    assert torch.equal(
        arguments(x, level).x0, replace(denoiser, conditioning={"condition": torch.ones(3)})(x, level).x0
    )


def test_models_and_wrapped_networks_of_the_same_weights_agree_on_one_call() -> None:
    model: Model = tiny_model(predicts="eps")
    network = new_network(tiny_network(), 0).eval()
    denoiser = wrap(network, model.schedule, predicts="eps", time="index+1")
    x, level = randn(2, *model.shape, dtype=torch.float32), model.schedule.level(321)
    expected = predict(network(x, torch.full((2,), 321.0)), x, level, "eps")
    torch.testing.assert_close(denoiser(x, level).x0, expected.x0)
    torch.testing.assert_close(denoiser(x, level).x0, model.denoise(x, level).x0, rtol=1e-3, atol=1e-4)


def test_the_default_plan() -> None:
    denoiser = wrap(Tiny(), LINEAR, predicts="v")
    shape: tuple[int, ...] = (1, 4, 4)
    auto, ddim = denoiser.plan(5, sampler="auto"), denoiser.plan(5, sampler="ddim")
    assert auto != ddim
    assert torch.equal(denoiser.sample(2, shape, steps=5), denoiser.sample(2, shape, plan=auto))
    assert torch.equal(denoiser.sample(2, shape, steps=5, through=lambda x: x), denoiser.sample(2, shape, plan=ddim))
    assert denoiser.plan().nfe == denoiser.plan(sampler="auto").nfe == 20
    assert denoiser.inversion().decode_plan.nfe == 50


def test_encoding_plans_start_at_t_1_and_stages_warn() -> None:
    denoiser = wrap(Tiny(), LINEAR, predicts="v")
    up = denoiser.plan(4, encode=True)
    assert (up.start.t, up.rows[0].query.t) == (0, 1)
    with pytest.warns(DdimWarning, match=r"\b7\b"):
        assert denoiser.plan(4, "linear", sampler="heun").nfe == 7  # one at the last level, to clean data
    with pytest.raises(DdimError, match=r"^sampler heun: "):
        denoiser.plan(4, sampler="heun", eta=1.0)


def test_float64_data_are_encoded_in_float64() -> None:
    denoiser, data = wrap(Tiny(), LINEAR, predicts="v"), randn(2, 1, 4, 4)
    latents = denoiser.encode(data, 6, method="lossless")
    assert latents.x.dtype == torch.float64
    assert not torch.equal(latents.x, denoiser.encode(data.float(), 6, method="lossless").x)
