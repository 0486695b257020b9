from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import GAUSSIAN, MIXTURE, SCHEDULES, equal_angles, levels_of, randn
from ddim.errors import DdimError
from ddim.exact import EmpiricalData, GaussianData, MixtureData
from ddim.process.parameterization import eps_from_x0
from ddim.process.rng import Noise
from ddim.process.schedule import Level
from ddim.samplers import ddim
from ddim.sampling.loop import run

LINEAR = SCHEDULES["linear"]
NOTHING = SCHEDULES["linear+zero-terminal-snr"].level(1000)
CLEAN = LINEAR.level(0)
NOISY = [LINEAR.level(1), LINEAR.level(150), LINEAR.level(600), LINEAR.level(1000), NOTHING]
LEVELS = [CLEAN, *NOISY]
POINTS = EmpiricalData(randn(40, 2, 3, seed=21))
SMOOTH: dict[str, Any] = {"gaussian": GAUSSIAN, "mixture": MIXTURE}
every_data = pytest.mark.parametrize("data", [*SMOOTH.values(), POINTS], ids=[*SMOOTH, "empirical"])
every_smooth = pytest.mark.parametrize("data", SMOOTH.values(), ids=SMOOTH)


def levels_for(data: Any) -> list[Level]:
    return NOISY if data is POINTS else LEVELS


def states(data: Any, level: Level, n: int = 20) -> Tensor:
    """States that are likely at a level, and one that is not."""
    x0 = data.sample(n, seed=3).double()
    x = level.signal * x0 + level.noise * randn(*x0.shape, seed=4)
    x[0] += 1.5
    return x


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def line(low: float, high: float, count: int = 20_001) -> tuple[Tensor, float]:
    """Points of a line, (count, 1), and their spacing."""
    return torch.linspace(low, high, count, dtype=torch.float64)[:, None], (high - low) / (count - 1)


def jacobians(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """(N, D, D) of a function of each row alone."""
    x = x.detach().requires_grad_()
    y = function(x)
    rows = [torch.autograd.grad(y[:, d].sum(), x, retain_graph=True)[0] for d in range(y.shape[1])]
    return torch.stack(rows, 1)


@every_data
def test_the_score_is_the_gradient_of_the_density(data: Any) -> None:
    for level in levels_for(data):
        x = states(data, level).requires_grad_()
        [gradient] = torch.autograd.grad(data.log_density(x, level).sum(), x)
        close(data.score(x, level), gradient)
        assert gradient.abs().max() > 0.1


@every_data
def test_the_pair_is_consistent_and_eps_is_the_score(data: Any) -> None:
    for level in levels_for(data):
        x = states(data, level)
        pair = data.denoise(x, level)
        close(level.signal * pair.x0 + level.noise * pair.eps, x, 1e-13)
        close(pair.eps, -level.noise * data.score(x, level))
        assert pair.x0.isfinite().all()


@every_data
def test_clean_data_is_unchanged(data: Any) -> None:
    x = states(data, CLEAN)
    pair = data.denoise(x, CLEAN)
    close(pair.x0, x, 1e-12)
    assert not pair.eps.any()


@every_smooth
def test_without_signal_the_prediction_is_the_prior_mean(data: Any) -> None:
    x = states(data, NOTHING)
    pair = data.denoise(x, NOTHING)
    mean = data.mean if data is GAUSSIAN else data.weights @ data.means
    close(pair.x0, mean.expand_as(x))
    close(pair.eps, x)
    close(data.log_density(x, NOTHING), torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(-1))


def test_the_density_of_a_gaussian() -> None:
    for level in LEVELS:
        x = states(GAUSSIAN, level)
        spread = level.alpha_bar * GAUSSIAN.variance + 1 - level.alpha_bar
        peer = torch.distributions.Normal(level.signal * GAUSSIAN.mean, spread.sqrt())
        close(GAUSSIAN.log_density(x, level), peer.log_prob(x).sum(-1))


def test_the_density_of_a_mixture() -> None:
    for level in LEVELS:
        x = states(MIXTURE, level)
        spread = level.alpha_bar * MIXTURE.covariances + level.variance * torch.eye(3, dtype=torch.float64)
        each = torch.distributions.MultivariateNormal(level.signal * MIXTURE.means, spread)
        peer = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(MIXTURE.weights), each)
        close(MIXTURE.log_density(x, level), peer.log_prob(x))


def test_a_mixture_of_one_is_a_gaussian() -> None:
    one = MixtureData(torch.ones(1), GAUSSIAN.mean[None], GAUSSIAN.variance.diag()[None])
    # Two halves of it, and one that never is, are no different.
    three = MixtureData(
        torch.tensor([0.5, 0.0, 0.5]), GAUSSIAN.mean.expand(3, 4), GAUSSIAN.variance.diag().expand(3, 4, 4)
    )
    for mixture, level in itertools.product((one, three), LEVELS):
        x = states(GAUSSIAN, level)
        actual, expected = mixture.denoise(x, level), GAUSSIAN.denoise(x, level)
        close(actual.x0, expected.x0)
        close(actual.eps, expected.eps)
        close(mixture.score(x, level), GAUSSIAN.score(x, level))
        close(mixture.log_density(x, level), GAUSSIAN.log_density(x, level))


def test_the_posterior_mean_of_a_mixture_by_quadrature() -> None:
    data = MixtureData(torch.tensor([0.3, 0.7]), torch.tensor([[-1.0], [0.8]]), torch.tensor([[[0.04]], [[0.3]]]))
    x0, _ = line(-8, 8)
    prior = data.log_density(x0, CLEAN)
    for level in NOISY[1:]:
        for at in (-1.3, 0.1, 2.0):
            weight = (prior - 0.5 * (at - level.signal * x0[:, 0]) ** 2 / level.variance).softmax(0)
            got = data.denoise(torch.tensor([[at]], dtype=torch.float64), level).x0
            close(got[0], weight @ x0, 1e-9)


def test_a_mixture_of_points_is_the_data_set() -> None:
    points = randn(12, 3, seed=22)
    thin = MixtureData(torch.full((12,), 1 / 12), points, 1e-13 * torch.eye(3).expand(12, 3, 3))
    for level in NOISY[1:]:
        x = states(thin, level)
        data = EmpiricalData(points)
        actual, expected = data.denoise(x, level), thin.denoise(x, level)
        close(actual.x0, expected.x0, 1e-9)
        close(actual.eps, expected.eps, 1e-9)
        close(data.log_density(x, level), thin.log_density(x, level), 1e-9)


@pytest.mark.parametrize("block", [1, 90, 2**22])
def test_a_finite_data_set_by_brute_force(block: int) -> None:
    data = EmpiricalData(POINTS.data + 5.0, block=block)
    for level in NOISY:
        x = states(data, level)
        x0, density = [], []
        for row in x:
            far = ((row - level.signal * data.data) ** 2).sum((1, 2))
            each = torch.exp(-(far - far.min()) / (2 * (1 - level.alpha_bar)))
            x0.append((each[:, None, None] * data.data).sum(0) / each.sum())
            normal = torch.distributions.Normal(level.signal * data.data, level.noise)
            density.append(normal.log_prob(row).sum((1, 2)).logsumexp(0) - math.log(40))
        pair = data.denoise(x, level)
        close(pair.x0, torch.stack(x0))
        close(pair.eps, eps_from_x0(torch.stack(x0), x, level))
        close(data.log_density(x, level), torch.stack(density))


def test_memory_is_bounded_by_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    held = []
    softmax = Tensor.softmax
    monkeypatch.setattr(Tensor, "softmax", lambda self, dim: held.append(self.numel()) or softmax(self, dim))
    EmpiricalData(POINTS.data, block=400).denoise(randn(35, 2, 3), LINEAR.level(300))
    assert held == [400, 400, 400, 200]


def test_the_densities_integrate_to_one() -> None:
    gaussian = GaussianData(torch.tensor([0.7]), torch.tensor([0.2]))
    mixture = MixtureData(torch.tensor([0.3, 0.7]), torch.tensor([[-1.0], [0.8]]), torch.tensor([[[0.04]], [[0.3]]]))
    x, step = line(-12, 12)
    for level in LEVELS:
        for data in (gaussian, mixture):
            assert data.log_density(x, level).exp().sum() * step == pytest.approx(1, abs=1e-9)
        for top in (LINEAR.level(1000), LINEAR.level(300)):
            assert gaussian.flow_log_density(x, level, top).exp().sum() * step == pytest.approx(1, abs=1e-9)
    points = EmpiricalData(torch.tensor([[-1.0], [0.4], [0.5]]))
    for level in NOISY:
        assert points.log_density(x, level).exp().sum() * step == pytest.approx(1, abs=1e-9)


GRIDS = {
    "falling": levels_of(LINEAR, "quadratic", 20),
    "from no signal": levels_of(SCHEDULES["linear+zero-terminal-snr"], "linear", 7),
    "one step": levels_of(LINEAR, "linear", 1),
    "part of the way": LINEAR.levels([700, 650, 10, 2]),
    "rising": levels_of(LINEAR, "linear", 9)[::-1],
    "rising from noisy data": LINEAR.levels([3, 80, 1000]),
    "rising in one step": LINEAR.levels([0, 1000]),
    "to no signal": levels_of(SCHEDULES["linear+zero-terminal-snr"], "linear", 7)[::-1],
}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("clean_as", [None, LINEAR.level(1)])
def test_the_map_of_ddim(grid: str, clean_as: Level | None) -> None:
    levels = GRIDS[grid]
    x = states(GAUSSIAN, levels[0])
    close(GAUSSIAN.ddim_map(x, levels, clean_as), run(GAUSSIAN.denoise, ddim(levels, clean_as=clean_as), x))


ENDS = [(LINEAR.level(1000), CLEAN), (CLEAN, LINEAR.level(1000)), (LINEAR.level(700), LINEAR.level(20))]


@every_smooth
@pytest.mark.parametrize(("now", "following"), [*ENDS, (NOTHING, CLEAN)])
def test_the_flow_transports_the_density(data: Any, now: Level, following: Level) -> None:
    """The ODE has the marginals of the diffusion: log q_now(x) = log q_next(flow(x)) + log |det d flow / dx|."""
    x = states(data, now, 7)[1:]

    def flow(state: Tensor) -> Tensor:
        return data.flow(state, now, following) if data is GAUSSIAN else data.reference(state, now, following, 60)

    volume = torch.linalg.slogdet(jacobians(flow, x)).logabsdet
    tolerance = 1e-10 if data is GAUSSIAN else 1e-4
    close(data.log_density(flow(x), following) + volume, data.log_density(x, now), tolerance)


@pytest.mark.parametrize(("now", "following"), ENDS)
def test_the_flow_solves_the_ode(now: Level, following: Level) -> None:
    """d xbar = eps dv, checked by central differences of the closed form along v."""
    x = states(GAUSSIAN, now)
    low, high = sorted((now.angle, following.angle))
    for part in (0.2, 0.5, 0.9):
        v = math.tan(low + part * (high - low))
        around = [Level(0.5, -2 * math.log(v * factor)) for factor in (1 - 1e-5, 1, 1 + 1e-5)]
        before, here, after = (GAUSSIAN.flow(x, now, level) for level in around)
        slope = (after / around[2].signal - before / around[0].signal) / (around[2].ratio - around[0].ratio)
        close(slope, GAUSSIAN.denoise(here, around[1]).eps, 1e-8)
    close(GAUSSIAN.flow(GAUSSIAN.flow(x, now, following), following, now), x)
    close(GAUSSIAN.flow(x, now, now), x)


@pytest.mark.parametrize(("now", "following"), [*ENDS, (NOTHING, CLEAN), (CLEAN, NOTHING)])
def test_the_reference_on_one_component_is_the_closed_form(now: Level, following: Level) -> None:
    one = MixtureData(torch.ones(1), GAUSSIAN.mean[None], GAUSSIAN.variance.diag()[None])
    x = states(GAUSSIAN, now)
    exact = GAUSSIAN.flow(x, now, following)
    errors = [(one.reference(x, now, following, steps) - exact).abs().max().item() for steps in (40, 80)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(4, abs=0.3)
    if now is NOTHING:
        close(one.reference(x, now, following, 800), exact, 1e-9)


def test_ddim_converges_to_the_reference() -> None:
    """At first order; halving the step would not halve the distance to any other limit."""
    x = states(MIXTURE, LINEAR.level(1000), 10)
    exact = MIXTURE.reference(x, LINEAR.level(1000), CLEAN, 200)
    grids = [equal_angles(LINEAR, steps) for steps in (150, 300, 600)]
    # The median: a state between two components may go to the wrong one on a coarse grid.
    errors = [(run(MIXTURE.denoise, ddim(levels), x) - exact).abs().median().item() for levels in grids]
    assert [math.log2(a / b) for a, b in itertools.pairwise(errors)] == pytest.approx([1, 1], abs=0.15)


def test_flow_log_density() -> None:
    for now, top in itertools.product(LEVELS, (LINEAR.level(1000), LINEAR.level(300), NOTHING)):
        x = states(GAUSSIAN, now)
        volume = torch.linalg.slogdet(jacobians(lambda state, a=now, b=top: GAUSSIAN.flow(state, a, b), x)).logabsdet
        prior = torch.distributions.Normal(0.0, 1.0).log_prob(GAUSSIAN.flow(x, now, top)).sum(-1)
        close(GAUSSIAN.flow_log_density(x, now, top), prior + volume)
        if top is NOTHING:  # where N(0, I) is the truth
            close(GAUSSIAN.flow_log_density(x, now, top), GAUSSIAN.log_density(x, now))


@every_data
def test_samples_have_the_moments_of_the_data(data: Any) -> None:
    n = 8000
    if data is GAUSSIAN:
        mean, covariance = data.mean, data.variance.diag()
    elif data is MIXTURE:
        mean = data.weights @ data.means
        apart = data.means - mean
        covariance = torch.einsum("k,kij->ij", data.weights, data.covariances + apart[:, :, None] * apart[:, None])
    else:
        flat = data.data.flatten(1)
        mean, covariance = flat.mean(0), flat.T.cov(correction=0)
    x = data.sample(n, seed=5).flatten(1).double()
    centred = x - mean
    products = centred[:, :, None] * centred[:, None]
    for drawn, expected in ((x, mean), (products, covariance)):
        assert ((drawn.mean(0) - expected).abs() < 5 * drawn.std(0) / math.sqrt(n)).all()
    assert torch.equal(data.sample(3, seed=5).flatten(1).double(), x[:3])
    assert not torch.equal(data.sample(3, seed=6).flatten(1).double(), x[:3])
    with pytest.raises(DdimError, match="seed -1"):
        data.sample(1, seed=-1)


def test_samples_follow_the_axes_of_a_covariance() -> None:
    covariance = torch.tensor([[2.0, 1.4, -0.3], [1.4, 1.1, 0.0], [-0.3, 0.0, 0.5]], dtype=torch.float64)
    drawn = MixtureData(torch.ones(1), torch.ones(1, 3), covariance[None]).sample(4000, seed=5) - 1
    products = drawn[:, :, None] * drawn[:, None]
    assert ((products.mean(0) - covariance).abs() < 5 * products.std(0) / math.sqrt(4000)).all()


def test_data_drawn_with_a_seed_is_independent_of_that_seeds_noise() -> None:
    x0 = (GAUSSIAN.sample(4000, seed=7) - GAUSSIAN.mean) / GAUSSIAN.variance.sqrt()
    eps = Noise(7, tuple(range(4000)), (4,))
    for drawn in (eps.start(), eps.row(0)):
        assert (x0 * drawn.double()).mean(0).abs().max() < 5 / math.sqrt(4000)


def test_the_least_error_of_a_gaussian() -> None:
    n = 8000
    x0, eps = GAUSSIAN.sample(n, seed=8), randn(n, 4, seed=9)
    for level in NOISY:
        missed = ((GAUSSIAN.denoise(level.signal * x0 + level.noise * eps, level).eps - eps) ** 2).mean(1)
        assert abs(missed.mean() - GAUSSIAN.error(level)) <= 5 * missed.std() / math.sqrt(n)
    assert GAUSSIAN.error(NOTHING) == 0
    assert GAUSSIAN.error(CLEAN) == 1


def test_the_least_error_of_a_mixture_by_quadrature() -> None:
    """In one dimension, E (eps - E[eps | x])^2 = 1 - E E[eps | x]^2, an integral over x_t."""
    data = MixtureData(torch.tensor([0.3, 0.7]), torch.tensor([[-1.0], [0.8]]), torch.tensor([[[0.04]], [[0.3]]]))
    x, step = line(-12, 12)
    for level in NOISY:
        density = data.log_density(x, level).exp()
        explained = float((density * data.denoise(x, level).eps[:, 0] ** 2).sum() * step)
        # eps^2 has variance 2, and its error no more than about that.
        assert data.error(level, 5000, seed=1) == pytest.approx(1 - explained, abs=5 * math.sqrt(2 / 5000))
    again = [data.error(LINEAR.level(300), 100, seed) for seed in (1, 1, 2)]
    assert again[0] == again[1] != again[2]


@every_data
def test_a_sample_does_not_depend_on_its_batch(data: Any) -> None:
    level = LINEAR.level(200)
    x = states(data, level, 33)
    together = data.denoise(x, level)
    for rows in (slice(0, 1), slice(7, 9), slice(16, 33)):
        close(data.denoise(x[rows], level).x0, together.x0[rows], 1e-13)
        close(data.denoise(x[rows], level).eps, together.eps[rows], 1e-13)


@every_data
def test_dtype_is_preserved(data: Any) -> None:
    level = LINEAR.level(400)
    x = states(data, level).float()
    pair, wide = data.denoise(x, level), data.denoise(x.double(), level)
    assert torch.equal(pair.x0, wide.x0.float())
    assert torch.equal(pair.eps, wide.eps.float())
    assert data.score(x, level).dtype == torch.float32
    assert data.log_density(x, level).dtype == torch.float64


@every_data
def test_the_denoiser_can_be_differentiated_both_ways(data: Any) -> None:
    level = LINEAR.level(300)
    x = states(data, level, 4)
    along = randn(*x.shape, seed=10)

    def eps(state: Tensor) -> Tensor:
        return data.denoise(state, level).eps

    forward = torch.func.jvp(eps, (x,), (along,))[1]
    backward = torch.func.vjp(eps, x)[1](along)[0]  # the Jacobian is a Hessian, so that both are the same
    close(forward, backward)
    close(forward, (eps(x + 1e-5 * along) - eps(x - 1e-5 * along)) / 2e-5, 1e-6)


EYE = torch.eye(2).expand(3, 2, 2)
THIRD = torch.full((3,), 1 / 3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("make", "wrong"),
    [
        (lambda: GaussianData(torch.zeros(2), torch.ones(3)), r"^mean and variance: .*\(3,\)"),
        (lambda: GaussianData(torch.zeros(2, 1), torch.ones(2, 1)), r"^mean and variance: "),
        (lambda: GaussianData(torch.zeros(0), torch.ones(0)), r"^mean and variance: "),
        (lambda: GaussianData(torch.zeros(2), torch.tensor([1.0, 0.0])), r"^mean and variance: "),
        (lambda: GaussianData(torch.zeros(2), torch.tensor([1.0, math.nan])), r"^mean and variance: "),
        (lambda: MixtureData(THIRD, torch.zeros(3), EYE), r"^means and covariances: "),
        (lambda: MixtureData(THIRD, torch.zeros(3, 2), EYE[:2]), r"^means and covariances: "),
        (lambda: MixtureData(THIRD, torch.full((3, 2), math.inf), EYE), r"^means and covariances: "),
        (lambda: MixtureData(THIRD[:2], torch.zeros(3, 2), EYE), r"^weights of shape \(2,\): "),
        (lambda: MixtureData(THIRD * 2, torch.zeros(3, 2), EYE), r"^weights: "),
        (lambda: MixtureData(torch.tensor([1.5, -0.5, 0.0]), torch.zeros(3, 2), EYE), r"^weights: "),
        (lambda: MixtureData(THIRD, torch.zeros(3, 2), EYE + torch.tensor([[0, 1.0], [0, 0]])), r"^covariances: "),
        (lambda: MixtureData(THIRD, torch.zeros(3, 2), EYE - torch.ones(2, 2)), r"^covariances: "),
        (lambda: EmpiricalData(torch.zeros(0, 2)), r"^data of shape \(0, 2\): "),
        (lambda: EmpiricalData(torch.zeros(2)), r"^data of shape \(2,\): "),
        (lambda: EmpiricalData(torch.full((2, 2), math.nan)), r"^data: "),
        (lambda: POINTS.log_density(randn(1, 2, 3), CLEAN), r"^a finite data set: .*\bt = 0\b"),
        (lambda: POINTS.score(randn(1, 2, 3), CLEAN), r"^a finite data set: .*\bt = 0\b"),
    ],
)
def test_invalid_data_is_an_error(make: Callable[[], Any], wrong: str) -> None:
    with pytest.raises(DdimError, match=wrong):
        make()


@every_data
def test_states_of_another_size_are_errors(data: Any) -> None:
    with pytest.raises(ValueError, match="shape"):
        data.denoise(randn(5, 1), LINEAR.level(5))
