"""DDIM in 100 lines: a noise schedule, a choice of times, one step, one loop, without the library.

Equations: Song, Meng & Ermon, "Denoising Diffusion Implicit Models", ICLR 2021; abar is the paper's alpha.
As a script it needs neither data nor network: the best noise prediction of a mixture of Gaussians is known.
"""

import math

import numpy as np
import torch


def linear_schedule(T=1000, beta_1=1e-4, beta_T=0.02):
    """abar_t for t = 0..T: the fraction of the signal's power that is left. t = 0 is clean data."""
    return np.concatenate([[1.0], np.cumprod(1.0 - np.linspace(beta_1, beta_T, T))])


def quadratic_times(abar, S):
    """Section 4.2: tau_i = floor(c i^2) with c = T / S^2, each time once."""
    T = len(abar) - 1
    return sorted({i * i * T // S**2 for i in range(1, S + 1)} - {0})


def equal_angle_times(abar, S):
    """Times with equal differences of arccos sqrt(abar), so that every DDIM step rotates x by the same angle."""
    T, angle = len(abar) - 1, np.arccos(np.sqrt(abar))
    times = [0]
    for i, t in enumerate(np.interp(angle[T] * np.arange(1, S + 1) / S, angle, np.arange(T + 1)), 1):
        # The nearest whole time, after the one before, and early enough for those to come.
        times.append(min(max(round(t), times[-1] + 1), T - (S - i)))
    return times[1:]


def coefficients(abar, t, s, eta):
    """Eqs. (12), (16): the weights of x_0, eps and fresh noise in the step from time t to s < t."""
    sigma = eta * math.sqrt((1 - abar[s]) / (1 - abar[t])) * math.sqrt(1 - abar[t] / abar[s])
    return math.sqrt(abar[s]), math.sqrt(1 - abar[s] - sigma**2), sigma


def prediction(output, x, abar_t, predicts):
    """Convert a network's output at x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps to the pair x_0, eps."""
    signal, noise = math.sqrt(abar_t), math.sqrt(1 - abar_t)
    if predicts == "eps":
        return (x - noise * output) / signal, output  # eq. (9)
    return signal * x - noise * output, noise * x + signal * output  # v = signal eps - noise x_0


@torch.no_grad()
def sample(network, x, abar, times, eta=0.0, fresh_noise=None, predicts="eps"):
    """From noise x at times[-1] to clean data, one evaluation network(x, t) per time; eta 0 is DDIM, 1 DDPM."""
    path = [0, *times]
    for t, s in zip(path[:0:-1], path[-2::-1]):  # t = tau_i, s = tau_{i-1}, and 0 at the end
        x0, eps = prediction(network(x, t), x, abar[t], predicts)
        of_x0, of_eps, sigma = coefficients(abar, t, s, eta)
        x = of_x0 * x0 + of_eps * eps
        if sigma:
            x = x + sigma * fresh_noise(x)
    return x


CENTRES = torch.tensor([[-2.0, 0.0], [1.0, 1.5], [1.5, -1.0]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
SPREAD = 0.25


def exact_noise(abar):
    """The best eps(x, t) for the mixture: -sqrt(1 - abar_t) times the score of the density of x_t."""

    def network(x, t):
        centres, variance = math.sqrt(abar[t]) * CENTRES, abar[t] * SPREAD**2 + 1 - abar[t]
        offsets = x[:, None] - centres  # (N, 3, 2)
        share = (WEIGHTS.log() - offsets.square().sum(-1) / (2 * variance)).softmax(1)  # (N, 3), of each centre
        return math.sqrt(1 - abar[t]) * (share[..., None] * offsets).sum(1) / variance

    return network


def main(n=8000):
    abar, draw = linear_schedule(), torch.Generator().manual_seed(0)
    network = exact_noise(abar)
    start = torch.randn(n, 2, generator=draw, dtype=torch.float64)
    converged = sample(network, start, abar, range(1, 1001))
    power = (WEIGHTS * CENTRES.square().sum(1)).sum() + 2 * SPREAD**2  # E |x_0|^2 of the mixture
    print("      eta = 0: mean distance to 1000-step samples   eta = 1: error of E |x|^2")
    print("   S      quadratic    equal-angle                   equal-angle")
    for S in (5, 10, 20, 50):
        row = []
        for times in (quadratic_times(abar, S), equal_angle_times(abar, S)):
            row.append((sample(network, start, abar, times) - converged).norm(dim=1).mean())
        noisy = sample(network, start, abar, times, 1.0, lambda x: torch.randn(x.shape, generator=draw).to(x))
        print(f"{S:4}  {row[0]:13.4f}  {row[1]:13.4f}  {noisy.square().sum(1).mean() / power - 1:28.1%}")


if __name__ == "__main__":
    main()
