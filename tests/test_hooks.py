"""Hooks on x_0: consistent pairs, thresholds, and consistency with measurements."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from bench import GAUSSIAN, SCHEDULES, levels_of, mixture, randn
from ddim import samplers
from ddim.errors import DdimError
from ddim.exact import MixtureData
from ddim.plan.base import Hook, Hooked
from ddim.process.rng import Noise
from ddim.process.schedule import Level
from ddim.sampling.loop import run, trajectory
from ddim.sampling.x0_hooks import LUMA, Clipped, Grey, Mask, MeanPool, Operator, clip, consistent, eps_kept, threshold
from models import tiny_model

LEVEL = SCHEDULES["linear"].level(300)
MIXED = mixture(3, 4)
SHAPE = (3, 8, 8)
PART = torch.zeros(SHAPE, dtype=torch.bool)
PART[:, :4], PART[1, 6, 2:5] = True, True

OPERATORS: dict[str, Operator] = {
    "mask": Mask(PART),
    "mean of 2x2": MeanPool(2),
    "mean of 4x4": MeanPool(4),
    "grey": Grey(),
    "luma": Grey(LUMA),
}
HOOKS: dict[str, Hook] = {
    "clip": clip(-0.5, 0.5),
    "threshold": threshold(0.9),
    "consistent": consistent(Mask(torch.tensor([True, False, False, True])), torch.tensor([[0.3, -0.2]])),
}


@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
def test_hooked_pairs_stay_consistent(hook: Hook) -> None:
    x = 3 * randn(20, 4, seed=7)
    raw, pair = GAUSSIAN.denoise(x, LEVEL), Hooked(GAUSSIAN.denoise, hook)(x, LEVEL)
    assert torch.equal(pair.x0, hook(raw.x0, LEVEL))
    assert not torch.equal(pair.x0, raw.x0)
    torch.testing.assert_close(LEVEL.signal * pair.x0 + LEVEL.noise * pair.eps, x, rtol=0, atol=1e-12)


def test_clipped_is_a_hook() -> None:
    x = 3 * randn(20, 4, seed=7)
    one, other = Clipped(GAUSSIAN.denoise, -0.5, 1.0)(x, LEVEL), Hooked(GAUSSIAN.denoise, clip(-0.5, 1.0))(x, LEVEL)
    assert torch.equal(one.x0, other.x0)
    assert torch.equal(one.eps, other.eps)


def test_a_hook_receives_the_level() -> None:
    levels: list[Level] = []

    def hook(x0: Tensor, level: Level) -> Tensor:
        levels.append(level)
        return x0

    plan = samplers.ddim(levels_of(SCHEDULES["linear"], "equal-angle", 5))
    end = run(Hooked(GAUSSIAN.denoise, hook), plan, randn(3, 4))
    assert levels == [row.now for row in plan.rows]
    torch.testing.assert_close(end, run(GAUSSIAN.denoise, plan, randn(3, 4)), rtol=1e-10, atol=1e-10)


def test_dynamic_thresholding() -> None:
    """Saharia et al. 2022: per sample, clip to [-s, s] and divide by s, s = max(1, quantile of |x0|)."""
    x0 = randn(6, 1, 8, 8, seed=3) * torch.tensor([0.1, 0.5, 1, 2, 5, 50])[:, None, None, None]
    hooked = threshold(0.9)(x0, LEVEL)
    for before, after in zip(x0, hooked, strict=True):
        ordered = before.abs().flatten().sort().values
        place = 0.9 * (len(ordered) - 1)
        low = int(place)
        s = max(1.0, float(ordered[low] + (place - low) * (ordered[low + 1] - ordered[low])))
        torch.testing.assert_close(after, before.clamp(-s, s) / s, rtol=1e-6, atol=1e-6)
    assert hooked.abs().max() <= 1
    within = x0.clamp(-1, 1)
    assert torch.equal(threshold(0.995)(within, LEVEL), within)
    assert torch.equal(threshold(1.0)(x0, LEVEL).abs().amax((1, 2, 3))[3:], torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_a_right_inverse_and_its_projection(operator: Operator, dtype: torch.dtype) -> None:
    """A A^+ = I, and A (I - A^+ A) x = 0."""
    x, atol = randn(4, *SHAPE, dtype=dtype), 1e-12 if dtype == torch.float64 else 1e-6
    y = operator.apply(x)
    assert operator.pinv(y).shape == x.shape
    assert operator.pinv(y).dtype == dtype
    torch.testing.assert_close(operator.apply(operator.pinv(y)), y, rtol=0, atol=atol)
    rest = x - operator.pinv(y)
    torch.testing.assert_close(operator.apply(rest), torch.zeros_like(y), rtol=0, atol=atol)


@pytest.mark.parametrize("name", ["mask", "mean of 2x2", "mean of 4x4", "grey"])
def test_pseudo_inverses_make_the_smallest_change(name: str) -> None:
    """For the Moore-Penrose inverse, the measured part and the rest are orthogonal."""
    x, other, operator = randn(4, *SHAPE, seed=1), randn(4, *SHAPE, seed=2), OPERATORS[name]
    measured, rest = operator.pinv(operator.apply(x)), other - operator.pinv(operator.apply(other))
    assert float((measured * rest).sum(dim=(1, 2, 3)).abs().max()) < 1e-10


def test_luma_preserves_differences_of_colours() -> None:
    x, y = randn(2, *SHAPE, seed=1), randn(2, 1, 8, 8, seed=2)
    samples = consistent(Grey(LUMA), y)(x, LEVEL)
    torch.testing.assert_close(samples[:, 0] - samples[:, 1], x[:, 0] - x[:, 1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_samples_satisfy_the_measurements(operator: Operator, eta: float) -> None:
    """DDNM, in float32: the last row to clean data is x_0 itself, so A x = y for any network."""
    model = tiny_model(in_channels=3)
    y = operator.apply(randn(1, *SHAPE, seed=4, dtype=torch.float32).clamp(-1, 1))
    samples = model.sample(3, steps=6, eta=eta, hook=consistent(operator, y))
    assert samples.dtype == torch.float32
    torch.testing.assert_close(operator.apply(samples), y.expand(3, *y.shape[1:]), rtol=0, atol=1e-6)
    assert not torch.allclose(samples[0], samples[1], atol=0.1)


def test_alternating_projections_reach_the_range_of_images() -> None:
    """Projections by turns onto two convex sets that meet: never further from any picture in both, here the one that y
    was measured of; and what sticks out of [-1, 1] dies away."""
    image, x0 = randn(4, *SHAPE, seed=5).clamp(-1, 1), 3 * randn(4, *SHAPE, seed=6)
    for operator in (MeanPool(4), Grey(), Mask(PART)):
        y, far, out = operator.apply(image), [], []
        for rounds in (0, 1, 2, 5, 20, 100):
            samples = consistent(operator, y, rounds)(x0, LEVEL)
            torch.testing.assert_close(operator.apply(samples), y, rtol=0, atol=1e-12)
            far.append(float((samples - image).norm()))
            out.append(float((samples.abs() - 1).clamp_min(0).max()))
        assert all(after <= before + 1e-12 for before, after in itertools.pairwise(far))
        assert out[-1] < 0.01 * out[0]


def test_measured_values_are_bit_exact() -> None:
    y = randn(1, int(PART.sum()), seed=4, dtype=torch.float32)
    model, hook = tiny_model(in_channels=3), consistent(Mask(PART), y)
    plan = model.plan(4, sampler="ddim")
    for variant in (hook, eps_kept(hook, plan)):
        assert torch.equal(model.sample(2, plan=plan, hook=variant)[:, PART], y.expand(2, -1))


def test_measurements_may_differ_between_samples() -> None:
    operator, plan = OPERATORS["mask"], tiny_model(in_channels=3).plan(4, sampler="ddim")
    y = operator.apply(randn(3, *SHAPE, dtype=torch.float32))
    samples = run(Hooked(tiny_model(in_channels=3).denoise, consistent(operator, y)), plan, Noise(0, (0, 1, 2), SHAPE))
    assert torch.equal(operator.apply(samples), y)


def test_without_noise_measured_values_follow_a_straight_line() -> None:
    """eta = 0: measured values are signal y + noise z with a fixed z, at the denoiser's noise level."""
    plan, y = samplers.ddim(levels_of(SCHEDULES["linear"], "equal-angle", 7)), torch.tensor([[0.3, -0.2]]).double()
    operator, x = Mask(torch.tensor([True, False, False, True])), randn(5, 4)
    z = (operator.apply(x) - plan.start.signal * y) / plan.start.noise
    denoise = Hooked(GAUSSIAN.denoise, consistent(operator, y))
    for step in trajectory(denoise, plan, x):
        expected = step.row.next.signal * y + step.row.next.noise * z
        torch.testing.assert_close(operator.apply(step.x), expected, rtol=0, atol=1e-12)


class Silence:
    """Zero noise: with a linear denoiser the run is then the mean over the noise."""

    def row(self, k: int) -> Tensor:
        return torch.zeros(1)


def filled(correlation: float, y: float, eta: float, steps: int, keep_eps: bool = False) -> float:
    """The mean over the noise of the coordinate that is inpainted beside y; both have variance 1."""
    covariance = torch.tensor([[1.0, correlation], [correlation, 1.0]])[None]
    data = MixtureData(torch.ones(1), torch.zeros(1, 2), covariance)
    plan = samplers.ddim(levels_of(SCHEDULES["linear"], "equal-angle", steps), eta=eta)
    hook = consistent(Mask(torch.tensor([True, False])), torch.tensor([[y]]).double())
    start = torch.tensor([[plan.start.signal * y, 0.0]]).double()
    end = run(Hooked(data.denoise, eps_kept(hook, plan) if keep_eps else hook), plan, start, Silence())  # type: ignore[arg-type]
    assert float(end[0, 0]) == pytest.approx(y, abs=1e-15)
    return float(end[0, 1])


@pytest.mark.parametrize("correlation", [0.95, 0.5, -0.9])
@pytest.mark.parametrize("eta", [0.0, 0.85, 1.0])
def test_inpainted_values_move_towards_the_conditional_mean(eta: float, correlation: float) -> None:
    """With an exact denoiser the mean of the filled coordinate is linear in y, with a slope strictly between the
    prior's, 0, and the conditional mean's, the correlation; nearer to that where eps is kept."""
    slope, near = filled(correlation, 1.0, eta, 30), filled(correlation, 1.0, eta, 30, keep_eps=True)
    assert filled(correlation, -2.0, eta, 30) == pytest.approx(-2 * slope, rel=1e-9)
    assert 0 < slope / correlation < near / correlation < 1


@pytest.mark.parametrize("keep_eps", [False, True])
def test_more_noise_approaches_the_conditional_mean(keep_eps: bool) -> None:
    slopes = [filled(0.9, 1.0, eta, 30, keep_eps) for eta in (0.0, 0.5, 1.0)]
    assert all(less < more < 0.9 for less, more in itertools.pairwise(slopes))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_with_eps_kept_more_steps_approach_the_conditional_mean(eta: float) -> None:
    """With eps recomputed they approach another value."""
    gaps = [1 - filled(0.9, 1.0, eta, steps, keep_eps=True) / 0.9 for steps in (25, 100, 400)]
    assert all(after < 0.7 * before for before, after in itertools.pairwise(gaps))
    derived = [1 - filled(0.9, 1.0, eta, steps) / 0.9 for steps in (100, 400)]
    assert derived[1] > 0.9 * derived[0] > 3 * gaps[2]


def test_with_eps_kept_the_spread_approaches_the_conditional_spread() -> None:
    """eta = 0: the end is linear in the start, so the variance follows from two starts."""
    correlation, y, gaps = 0.9, 0.7, []
    data = MixtureData(torch.ones(1), torch.zeros(1, 2), torch.tensor([[1.0, correlation], [correlation, 1.0]])[None])
    for steps in (25, 100, 400):
        plan = samplers.ddim(levels_of(SCHEDULES["linear"], "equal-angle", steps))
        hook = eps_kept(consistent(Mask(torch.tensor([True, False])), torch.tensor([[y]]).double()), plan)
        starts = torch.tensor([[0, 0], [1, 0], [0, 1]]).double()
        ends = run(Hooked(data.denoise, hook), plan, starts)[:, 1]
        gaps.append(abs(float((ends[1:] - ends[0]).norm()) - (1 - correlation**2) ** 0.5))
    assert all(after < 0.7 * before for before, after in itertools.pairwise(gaps))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("schedule", ["linear", "cosine+zero-terminal-snr"])
def test_keeping_eps_is_a_longer_change_of_the_pair(schedule: str, eta: float) -> None:
    """The identity of `ddim.guidance.eps_kept`, compared with explicit rows of the hook's x_0 and the network's eps."""
    plan = samplers.ddim(levels_of(SCHEDULES[schedule], "equal-angle", 9), eta=eta)
    hook, noise = HOOKS["consistent"], Noise(0, (0, 1, 2), (4,))
    start = x = noise.start().double()
    for k, row in enumerate(plan.rows):
        raw = MIXED.denoise(x, row.now)
        x = row.x0[0] * hook(raw.x0, row.now) + row.eps[0] * raw.eps + row.z * noise.row(k).double()
    samples = run(Hooked(MIXED.denoise, eps_kept(hook, plan)), plan, start, noise)
    torch.testing.assert_close(samples, x, rtol=1e-11, atol=1e-11)


def test_values_independent_of_the_measurements_keep_their_distribution() -> None:
    """For independent coordinates the inpainted part has the exact distribution."""
    plan = samplers.ddim(levels_of(SCHEDULES["linear"], "equal-angle", 9))
    mask, x = torch.tensor([True, False, False, True]), randn(5, 4)
    hooked = Hooked(GAUSSIAN.denoise, consistent(Mask(mask), torch.tensor([[0.3, -0.2]])))
    samples = run(hooked, plan, x)
    torch.testing.assert_close(samples[:, ~mask], run(GAUSSIAN.denoise, plan, x)[:, ~mask], rtol=1e-10, atol=1e-10)


def test_invalid_hooks_are_errors() -> None:
    x = randn(2, *SHAPE)
    for wrong in (
        lambda: clip(1, -1),
        lambda: threshold(1.5),
        lambda: Mask(torch.ones(3)),
        lambda: Mask(PART).apply(x[:, :1]),
        lambda: MeanPool(0),
        lambda: MeanPool(3).apply(x),
        lambda: Grey((0.5, 0.6)),
        lambda: Grey().apply(x[:, :1]),
    ):
        with pytest.raises(DdimError):
            wrong()
