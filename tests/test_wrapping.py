"""Anyone's network as a model: on the exact bench every kind of network, told time in any way, is the same model."""

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
from ddim.model.image import Model
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


# What a network is told, and what it makes of that.
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
    """The exact denoiser of the mixture as a network of some kind: it knows nothing but what it is shown and told."""

    def __init__(self, kind: str, understand: Callable[[float], Level], data: Any = MIXTURE):
        super().__init__()
        self.kind, self.understand, self.data = kind, understand, data
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.eval()

    def forward(self, shown: Tensor, time: Tensor) -> Tensor:
        assert time.shape == (len(shown),)
        assert shown.dtype == torch.float64
        level = self.understand(float(time[0]))
        if self.kind == "edm":
            return self.data.denoise(level.signal * shown, level).x0
        if self.kind.startswith("velocity"):
            pair = self.data.denoise((level.signal + level.noise) * shown, level)
            return (pair.eps - pair.x0) * (-1 if "data at 1" in self.kind else 1)
        pair = self.data.denoise(shown, level)
        return {"eps": pair.eps, "x0": pair.x0, "v": level.signal * pair.eps - level.noise * pair.x0}[self.kind]


def wrapped(kind: str, convention: str = "index", data: Any = MIXTURE, **settings: Any) -> Wrapped:
    time, understand = CONVENTIONS[convention]
    if kind == "velocity, data at 1":
        settings |= {"data_at": 1}
        if convention == "flow":
            understand = lambda told: at_log_snr(2 * math.log(told / (1 - told)))  # noqa: E731
    given: Any = kind.partition(",")[0]
    return wrap(Ideal(kind, understand, data), LINEAR, given, time=time, **settings)


def close(found: Prediction, expected: Prediction) -> None:
    torch.testing.assert_close(found.x0, expected.x0, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.eps, expected.eps, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_network_says_the_same(kind: str, convention: str) -> None:
    made = wrapped(kind, convention)
    for t in (1, 20, 333, 700.5, 1000):
        level = LINEAR.level(t)
        x = diffuse(MIXTURE.sample(6, seed=1), randn(6, 3, seed=2), level)
        close(made(x, level), MIXTURE.denoise(x, level))


@pytest.mark.parametrize(("kind", "told"), [("edm", "sigma"), ("velocity", "flow"), ("velocity, data at 1", "flow")])
def test_what_edm_and_flow_matching_are_told_by_default(kind: str, told: str) -> None:
    made = wrapped(kind, told)
    left_out = wrap(made.module, LINEAR, made.predicts, data_at=int("data" in kind))  # type: ignore[arg-type]
    x, level = randn(3, 3), LINEAR.level(400)
    close(left_out(x, level), MIXTURE.denoise(x, level))


@hypothesis.given(st.sampled_from(KINDS), st.sampled_from([*CONVENTIONS]), st.floats(1, 1000), st.integers(0, 99))
def test_at_any_time_and_state(kind: str, convention: str, t: float, seed: int) -> None:
    level, x = LINEAR.level(t), 2 * randn(2, 3, seed=seed)
    found = wrapped(kind, convention)(x, level)
    close(found, MIXTURE.denoise(x, level))
    torch.testing.assert_close(level.signal * found.x0 + level.noise * found.eps, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("told", "understood"), [*itertools.permutations(CONVENTIONS, 2)])
def test_a_wrong_convention_is_another_model(told: str, understood: str) -> None:
    """So that the tests above can fail. Off by one is little, and still seen."""
    module = Ideal("v", lambda value: at_log_snr(CONVENTIONS[understood][1](value).log_snr))
    made = wrap(module, LINEAR, "v", time=CONVENTIONS[told][0])
    x, level = randn(4, 3), LINEAR.level(300)
    try:
        found = made(x, level)
    except (DdimError, ValueError):  # a time that does not exist, as t = 1.3 of 0..1 would be
        return
    assert (found.x0 - MIXTURE.denoise(x, level).x0).abs().max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_kind_is_another_model(kind: str) -> None:
    x, level = randn(4, 3), LINEAR.level(300)
    for other in {"eps", "x0", "v", "edm", "velocity"} - {kind}:
        made = wrap(Ideal(kind, CONVENTIONS["index"][1]), LINEAR, other, time="index")  # type: ignore[arg-type]
        assert (made(x, level).x0 - MIXTURE.denoise(x, level).x0).abs().max() > 1e-2


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
        made = wrapped(kind, convention)
        torch.testing.assert_close([*made.trajectory(plan, start, noise)][-1].x, expected, rtol=1e-6, atol=1e-6)
        own = {**settings, "grid": [row.now.t for row in reversed(plan.rows)], "steps": None}
        found = made.sample(5, (3,), seed=4, **own)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, drawn, rtol=1e-3, atol=1e-3)


def test_ddim_of_a_velocity_is_eulers_rule_of_rectified_flow() -> None:
    """Over the very times s, typed out in y = (1 - s) x_0 + s eps, from pure noise at s = 1."""
    s = np.arange(1, 101) / 100
    with np.errstate(divide="ignore"):
        flow = Schedule(2 * np.log((1 - s) / s), "flow")
    module = Ideal("velocity", CONVENTIONS["flow"][1])
    plain: Any = Ideal("velocity", CONVENTIONS["flow"][1])

    def network(y: Tensor, time: Tensor) -> Tensor:
        told = float(time[0])
        if told == 1:  # at s = 1 the state says nothing of x_0
            return y - MIXTURE.denoise(y, Level(math.nan, -math.inf)).x0
        return plain(y, time)

    plan = wrap(module, flow, "velocity").plan(grid=[20, 50, 80, 100])
    x = y = randn(4, 3)
    made = wrap(network, flow, "velocity")
    for step, (now, following) in zip(made.trajectory(plan, x), itertools.pairwise([1, 0.8, 0.5, 0.2, 0]), strict=True):
        y = y + (following - now) * network(y, torch.full((4,), now, dtype=torch.float64))
        assert flow_time(step.row.next) == pytest.approx(following, abs=1e-12)
        scale = step.row.next.signal + step.row.next.noise
        torch.testing.assert_close(step.x / scale, y, rtol=1e-9, atol=1e-9)


def test_ddim_of_edm_is_eulers_rule_in_sigma() -> None:
    sigmas = np.geomspace(0.002, 80, 50)
    module = Ideal("edm", CONVENTIONS["sigma"][1])
    made = wrap(module, Schedule(-2 * np.log(sigmas), "edm"), "edm")
    plan = made.plan(grid=[5, 20, 35, 50])
    levels = [*(row.now for row in plan.rows), plan.end]
    x = randn(4, 3)
    y = x / levels[0].signal
    for step, (now, following) in zip(made.trajectory(plan, x), itertools.pairwise(levels), strict=True):
        slope = (y - module(y, torch.full((4,), now.ratio, dtype=torch.float64))) / now.ratio
        y = y + (following.ratio - now.ratio) * slope
        torch.testing.assert_close(step.x / following.signal, y, rtol=1e-9, atol=1e-9)


class Tiny(nn.Module):
    """A convolution that heeds time and a condition."""

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


def test_a_sample_does_not_depend_on_how_many_are_made() -> None:
    made = wrap(Tiny(), LINEAR, "v", micro_batch=4)
    for settings in ({"steps": 5}, {"steps": 5, "eta": 1.0}, {"grid": [1, 200.5, 1000]}):
        nine = made.sample(9, (1, 6, 6), seed=3, **settings)
        assert nine.shape == (9, 1, 6, 6)
        assert torch.equal(made.sample(5, (1, 6, 6), seed=3, **settings), nine[:5])
        assert torch.equal(made.sample(2, (1, 6, 6), seed=3, start=6, **settings), nine[6:8])
        assert not torch.equal(made.sample(5, (1, 6, 6), seed=2, **settings), nine[:5])
    assert made.sample(0, (1, 6, 6)).shape == (0, 1, 6, 6)


def test_conditioning_goes_with_its_sample() -> None:
    each, scale = torch.linspace(-1, 1, 6), torch.linspace(0.5, 1, 6)
    plain = wrap(Tiny(), LINEAR, "v", micro_batch=4)
    made = plain.with_conditioning(condition=each, text={"scale": scale, "words": "none"})
    six = made.sample(6, (1, 4, 4), steps=3, seed=1)
    for k in range(6):
        one = plain.with_conditioning(condition=each[k : k + 1], text={"scale": scale[k : k + 1]})
        assert torch.equal(one.sample(1, (1, 4, 4), steps=3, seed=1, start=k), six[k : k + 1])
    assert not torch.equal(plain.sample(6, (1, 4, 4), steps=3, seed=1), six)
    assert made.module.seen[0][3]["words"] == "none"  # type: ignore[attr-defined]
    with pytest.raises(DdimError, match=r"^conditioning condition: "):
        made.sample(5, (1, 4, 4), steps=3)
    with pytest.raises(DdimError, match=r"^conditioning text\.scale: "):
        plain.with_conditioning(text={"scale": scale})(randn(5, 1, 4, 4), LINEAR.level(5))
    latents = made.encode(six, steps=3)
    alone = plain.with_conditioning(condition=each[4:5], text={"scale": scale[4:5]})
    assert torch.equal(alone.encode(six[4:5], steps=3), latents[4:5])
    assert torch.equal(alone.decode(latents[4:5], steps=3), made.decode(latents, steps=3)[4:5])


@pytest.mark.filterwarnings("ignore::ddim.DdimWarning")
@pytest.mark.parametrize("predicts", ["eps", "x0", "v"])
def test_a_network_of_ours_wrapped_is_the_model(predicts: Any) -> None:
    """Plans, samples and latents are those of `Model`, but for its clipping, to the last bits of a convolution."""
    model = tiny_model(predicts=predicts, micro_batch=4)
    made = wrap(model.network, LINEAR, predicts, time="index+1", micro_batch=4)
    for settings in (
        {"steps": 7, "grid": "linear"},
        {"steps": 7, "sampler": "auto"},
        {"steps": 5, "sampler": "heun", "grid": "linear"},
        {"steps": 5, "sigma": "hat", "grid": "linear"},
        {"grid": [3, 500.5, 1000], "clip_x0": True, "eta": 0.3},
        {"steps": 6, "encode": True, "grid": "linear"},
    ):
        settings = {"clip_x0": False} | settings
        assert made.plan(**settings) == model.plan(**settings)
    for method, grid in (
        ("ddim", None),
        ("reversible", [1, 90, 1000]),
        ("fixed-point", None),
        ("fixed-point", "linear"),
    ):
        assert made.inversion(method, 3, grid) == model.inversion(method, 3, grid)
    for settings in ({"steps": 6, "clip_x0": False}, {"steps": 6, "grid": "linear", "eta": 1.0, "clip_x0": False}):
        found, expected = made.sample(5, model.shape, seed=2, **settings), model.sample(5, seed=2, **settings)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    pictures = model.sample(3, steps=4, grid="linear").clamp(-1, 1)
    for method in ("ddim", "lossless"):
        found, expected = (one.encode(pictures, 4, "linear", method) for one in (made, model))
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        down, other = (one.decode(expected, 4, "linear", method) for one in (made, model))
        torch.testing.assert_close(down, other, rtol=1e-3, atol=1e-3)


def test_exact_latents_come_back() -> None:
    pictures = randn(3, 1, 4, 4, dtype=torch.float32).clamp(-1, 1)
    made = wrap(Tiny(), LINEAR, "v", micro_batch=2)
    back = made.decode(made.encode(pictures, 10, method="lossless"), 10, method="lossless")
    torch.testing.assert_close(back, pictures, rtol=0, atol=1e-6)
    solved = made.decode(made.encode(pictures, 10, method="fixed-point"), 10, method="fixed-point")
    torch.testing.assert_close(solved, pictures, rtol=0, atol=1e-3)
    with pytest.raises(DdimError, match=r"^latents: "):
        made.decode(pictures, 10, method="lossless")
    with pytest.raises(DdimError, match=r"^data to encode: "):
        made.encode(pictures.byte())
    with pytest.raises(DdimError, match=r"^fixed-point: "):
        wrap(Tiny(), LINEAR, "v", dtype=torch.bfloat16).encode(pictures, 4, method="fixed-point")


def unet() -> Any:
    """A tiny UNet2DModel of diffusers, of three classes."""
    from diffusers import UNet2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "norm_num_groups": 4}
        blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
        return UNet2DModel(**shape, **blocks, block_out_channels=(8,), num_class_embeds=3)


def test_a_unet_of_diffusers_is_run_as_by_hand() -> None:
    network, labels = unet().eval(), torch.tensor([0, 2, 1, 2])
    made = wrap(network, "linear", "eps", micro_batch=4).with_conditioning(class_labels=labels)
    found = made.sample(4, (1, 8, 8), seed=7, grid=[200, 400, 600, 800, 1000], sampler="ddim")
    x = Noise(7, tuple(range(4)), (1, 8, 8)).start()
    table = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    for t, after in itertools.pairwise([999, 799, 599, 399, 199, -1]):
        a, b = table[t], table[after] if after >= 0 else 1.0
        with torch.no_grad():
            eps = network(x, torch.full((4,), t), class_labels=labels).sample
        x = math.sqrt(b) * (x - math.sqrt(1 - a) * eps) / math.sqrt(a) + math.sqrt(1 - b) * eps
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-3)


def test_the_same_unet_in_another_time_is_another_model() -> None:
    network = unet().eval()
    settings: dict[str, Any] = {"seed": 7, "grid": [200, 400, 600, 800, 1000], "sampler": "ddim"}
    labels = torch.zeros(1, dtype=torch.int64)
    one, other = (
        wrap(network, "linear", "eps", time=time, conditioning={"class_labels": labels}).sample(
            2, (1, 8, 8), **settings
        )
        for time in ("index", "fraction")
    )
    assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("shape", ["tensor", "tuple", "list", "object"])
def test_what_a_module_may_return(shape: str) -> None:
    form: Any = {"tensor": lambda out: out, "tuple": lambda out: (out, 1), "list": lambda out: [out]}
    form |= {"object": lambda out: SimpleNamespace(sample=out)}
    tiny, x, level = Tiny(), randn(2, 1, 4, 4, dtype=torch.float32), LINEAR.level(300)
    made = wrap(lambda y, t: form[shape](tiny(y, t)), LINEAR, "v")
    assert torch.equal(made(x, level).x0, wrap(tiny, LINEAR, "v")(x, level).x0)


@pytest.mark.parametrize("output", [None, (), {"out": 1}, SimpleNamespace(sample=3), torch.zeros(2, 3, 4, 4)])
def test_what_a_module_may_not_return(output: Any) -> None:
    made = wrap(lambda y, t: output, LINEAR, "v")
    with pytest.raises(DdimError, match=r"^wrapped module: "):
        made(randn(2, 1, 4, 4), LINEAR.level(5))


def test_of_a_learned_variance_the_mean_is_taken_and_the_rest_kept() -> None:
    tiny, x, level = Tiny(doubled=True), randn(3, 1, 4, 4, dtype=torch.float32), LINEAR.level(300)
    found = wrap(tiny, LINEAR, "eps")(x, level)
    mean, variance = tiny(x, torch.full((3,), 299)).chunk(2, dim=1)
    assert torch.equal(found.eps, mean)
    torch.testing.assert_close(found.variance_fraction, (variance + 1) / 2)
    assert wrap(Tiny(), LINEAR, "eps")(x, level).variance_fraction is None
    grid = [250, 500, 750, 1000]
    learned = wrap(tiny, LINEAR, "eps").sample(2, (1, 4, 4), sigma="learned", grid=grid)
    assert torch.isfinite(learned).all()
    with pytest.raises(ValueError):
        wrap(Tiny(), LINEAR, "eps").sample(2, (1, 4, 4), sigma="learned", grid=grid)
    with pytest.raises(DdimError, match=r"^wrapped module: "):
        wrap(tiny, LINEAR, "velocity")(x, level)


def test_the_module_computes_in_its_own_dtype_and_the_state_keeps_its_own() -> None:
    half, x = Tiny(dtype=torch.bfloat16), randn(2, 1, 4, 4)
    for state in (x, x.float()):
        found = wrap(half, LINEAR, "v")(state, LINEAR.level(300))
        assert half.seen[-1][0] == torch.bfloat16
        assert found.x0.dtype == found.eps.dtype == state.dtype
    single = Tiny()
    wrap(single, LINEAR, "v")(x, LINEAR.level(300))
    assert single.seen[-1][0] == torch.float32
    assert wrap(half, LINEAR, "v").sample(2, (1, 4, 4), steps=2).dtype == torch.float32
    seen: list[torch.dtype] = []
    wrap(lambda y, t: seen.append(y.dtype) or y, LINEAR, "v")(x, LINEAR.level(3))  # type: ignore[func-returns-value]
    wrap(lambda y, t: seen.append(y.dtype) or y, LINEAR, "v", dtype=torch.float16)(x, LINEAR.level(3))  # type: ignore[func-returns-value]
    assert seen == [torch.float64, torch.float16]


def test_what_times_are_made_of() -> None:
    """Whole indices are whole numbers, so that a table of embeddings can be asked."""
    tiny, x = Tiny(), randn(2, 1, 4, 4)

    def told(t: float, **settings: Any) -> Tensor:
        wrap(tiny, LINEAR, "v", **settings)(x, LINEAR.level(t))
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
    for given in (LINEAR, "linear", betas, betas.tolist(), torch.from_numpy(betas)):
        made = wrap(Tiny(), given, "v").schedule
        np.testing.assert_allclose(made.log_snr, LINEAR.log_snr, rtol=1e-12)
    assert len(wrap(Tiny(), [0.1, 0.2], "v").schedule.log_snr) == 2


@pytest.mark.parametrize("predicts", ["eps", "x0", "v", "edm", "velocity"])
def test_without_signal_some_networks_say_nothing(predicts: Any) -> None:
    made, top = wrap(lambda y, t: torch.zeros_like(y), ZERO, predicts, time="index"), ZERO.level(1000)
    x = randn(2, 3)
    if predicts in ("eps", "edm"):
        with pytest.raises(DdimError, match=r"^a network of.*\bt = 1000\b") as caught:
            made(x, top)
        assert "\n" not in str(caught.value)
        with pytest.raises(DdimError, match=r"^a network of.*\bt = 1000\b"):
            made.plan(grid=[10, 500, 1000])
        with pytest.warns(DdimWarning, match=r"\bt = 999\b"):
            assert made.plan(grid=[10, 999]).nfe == 2
    else:
        found = made(x, top)
        expected = {"x0": 0 * x, "v": 0 * x, "velocity": x}[predicts]  # of u = 0, eps = x_0 = y, and y = x
        torch.testing.assert_close(found.x0, expected)
        torch.testing.assert_close(found.eps, x)
        assert torch.isfinite(made.sample(2, (3,), steps=5, grid="linear")).all()


def test_a_module_in_training_is_put_into_evaluation_mode_and_this_is_said() -> None:
    module = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 3)).train()
    with pytest.warns(DdimWarning):
        wrap(module, LINEAR, "v")
    assert not any(part.training for part in module.modules())
    wrap(module, LINEAR, "v")


def test_a_wrapped_network_is_a_denoiser_as_any() -> None:
    made = wrapped("velocity", "flow", data=GAUSSIAN)
    plan = samplers.ddim(falling(LINEAR, [100, 400, 700, 1000]), eta=0.5)
    noise = Noise(1, (0, 1, 2), (4,))

    def clip(x0: Tensor, _: Level) -> Tensor:
        return x0.clamp(-0.5, 0.5)

    other = GaussianData(GAUSSIAN.mean + 0.7, GAUSSIAN.variance / 3)
    twin = wrapped("eps", "index", data=other)
    for mine, exact in (
        (made, GAUSSIAN.denoise),
        (Hooked(made, clip), Hooked(GAUSSIAN.denoise, clip)),
        (Guided(made, twin, 2.0), Guided(GAUSSIAN.denoise, other.denoise, 2.0)),
    ):
        for a, b in zip(trajectory(mine, plan, noise), trajectory(exact, plan, noise), strict=True):
            torch.testing.assert_close(a.x, b.x, rtol=1e-4, atol=1e-4)
    hooked = made.sample(3, (4,), seed=1, plan=plan, through=partial(Hooked, hook=clip))
    assert torch.equal(hooked, run(Hooked(made, clip), plan, Noise(1, (0, 1, 2, 2, 2, 2, 2, 2), (4,)))[:3])
    assert hooked.abs().max() <= 0.5


def test_the_likelihood_and_tuning_take_it() -> None:
    first, top = LINEAR.level(1), LINEAR.level(1000)
    made = wrapped("edm", "sigma", data=GAUSSIAN)
    levels = equal_ratios(LINEAR, 60, 1000, 1)[::-1]
    rising = samplers.runge_kutta([first, *levels[1:-1], top], LINEAR, 4)
    x = diffuse(GAUSSIAN.sample(4, seed=2), randn(4, 4, seed=3), first)
    expected = GAUSSIAN.flow_log_density(x, first, top)
    torch.testing.assert_close(log_density(made, rising, x), expected, rtol=1e-3, atol=1e-3)
    start = Noise(0, tuple(range(8)), (4,)).start()
    last = [*iter_tuning(made, LINEAR, 3, start, "ddim", 8)][-1]
    exact = [*iter_tuning(GAUSSIAN.denoise, LINEAR, 3, start, "ddim", 8)][-1]
    assert last.found is not None
    assert exact.found is not None
    assert last.found.error == pytest.approx(exact.found.error, rel=1e-2)


def test_sigma_optimal_takes_the_error_given() -> None:
    made = wrap(Tiny(), LINEAR, "eps", error=lambda level: 0.25 * level.alpha_bar)
    plan = made.plan(grid=[200, 400, 600, 800, 1000], sigma="optimal")
    for row in plan.rows[:-1]:
        assert row.z == pytest.approx(samplers.ddim([row.now, row.next], sigma="optimal", error=made.error).rows[0].z)
        assert row.z > row.sigma
    with pytest.raises(DdimError, match=r"^sigma 'optimal': "):
        wrap(Tiny(), LINEAR, "eps").plan(grid=[500, 1000], sigma="optimal")


def test_global_generators_are_left_alone() -> None:
    made = wrap(Tiny(), LINEAR, "v")
    before = torch.get_rng_state()
    made.sample(2, (1, 4, 4), steps=3, eta=1.0)
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
def test_what_makes_no_sense_is_refused_in_one_line(settings: dict[str, Any], wrong: str) -> None:
    given = {"schedule": LINEAR, "predicts": "eps"} | settings
    with pytest.raises(DdimError, match=wrong) as caught:
        wrap(Tiny(), **given)
    assert "\n" not in str(caught.value)


def test_samples_that_make_no_sense_are_refused() -> None:
    made = wrap(Tiny(), LINEAR, "v")
    plan = made.plan(4)
    for arguments, wrong in (
        ({"n": -1}, r"^n -1: "),
        ({"n": 2, "plan": plan, "steps": 4}, r"^plan: "),
        ({"n": 2, "plan": plan, "eta": 1.0}, r"^plan: "),
        ({"n": 2, "top": 500}, r"^top: "),
        ({"n": 2, "plan": made.plan(4, encode=True)}, r"^plan: .*\bt = 0\b"),
        ({"n": 2, "plan": samplers.ddim(falling(SCHEDULES["cosine"], [500, 1000]))}, "log-SNR"),
        ({"n": 2, "seed": -1}, "seed -1"),
    ):
        with pytest.raises(DdimError, match=wrong):
            made.sample(shape=(1, 4, 4), **arguments)  # type: ignore[arg-type]


def test_a_wrapped_network_can_be_changed_without_touching_the_first() -> None:
    made = wrap(Tiny(), LINEAR, "v")
    given = made.with_conditioning(condition=torch.ones(1))
    assert not made.conditioning
    assert isinstance(given, Wrapped)
    assert given.schedule is made.schedule
    x, level = randn(3, 1, 4, 4), LINEAR.level(100)
    assert not torch.equal(made(x, level).x0, given(x, level).x0)
    assert torch.equal(given(x, level).x0, replace(made, conditioning={"condition": torch.ones(3)})(x, level).x0)


def test_models_and_wrapped_networks_of_the_same_weights_agree_on_one_call() -> None:
    model: Model = tiny_model(predicts="eps")
    network = new_network(tiny_network(), 0).eval()
    made = wrap(network, model.schedule, "eps", time="index+1")
    x, level = randn(2, *model.shape, dtype=torch.float32), model.schedule.level(321)
    expected = predict(network(x, torch.full((2,), 321.0)), x, level, "eps")
    torch.testing.assert_close(made(x, level).x0, expected.x0)
    torch.testing.assert_close(made(x, level).x0, model.denoise(x, level).x0, rtol=1e-3, atol=1e-4)


def test_what_is_run_where_nothing_is_said() -> None:
    made = wrap(Tiny(), LINEAR, "v")
    shape: tuple[int, ...] = (1, 4, 4)
    auto, ddim = made.plan(5, sampler="auto"), made.plan(5)
    assert auto != ddim
    assert torch.equal(made.sample(2, shape, 5), made.sample(2, shape, plan=auto))
    assert torch.equal(made.sample(2, shape, 5, through=lambda own: own), made.sample(2, shape, plan=ddim))
    assert made.plan().nfe == made.plan(sampler="auto").nfe == 20
    assert made.inversion().decode_plan.nfe == 50


def test_a_plan_that_encodes_tells_the_network_of_t_1_and_stages_are_said() -> None:
    made = wrap(Tiny(), LINEAR, "v")
    up = made.plan(4, encode=True)
    assert (up.start.t, up.rows[0].query.t) == (0, 1)
    with pytest.warns(DdimWarning, match=r"\b7\b"):
        assert made.plan(4, "linear", sampler="heun").nfe == 7  # one at the last level, to clean data
    with pytest.raises(DdimError, match=r"^sampler heun: "):
        made.plan(4, sampler="heun", eta=1.0)


def test_what_is_finer_than_float32_is_encoded_as_it_is() -> None:
    made, data = wrap(Tiny(), LINEAR, "v"), randn(2, 1, 4, 4)
    latents = made.encode(data, 6, method="lossless")
    assert latents.dtype == torch.float64
    assert not torch.equal(latents, made.encode(data.float(), 6, method="lossless"))
