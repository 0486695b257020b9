"""The inference family as joint distributions over several levels: eq. (6), and eq. (52) for a sub-sequence.

They are conditioned on x_0 and need no network. A path can be sampled, and its density evaluated, in two orders: from
the noisiest level down by eq. (7), or from the cleanest up by eq. (8). Both give the same joint distribution, whose
marginals are those of Lemma 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddim.errors import DdimError
from ddim.process.gaussian import diffuse, forward_weights, log_normal, posterior_weights
from ddim.process.gaussian import sigma as sigma_of_eta
from ddim.process.schedule import Level

Draw = Callable[[int], Tensor]


@dataclass(frozen=True, slots=True)
class Inference:
    """Eq. (6): the joint q_sigma(x_{tau_1}, ..., x_{tau_S} | x_0), from eq. (4) at tau_S and eq. (7) at every step.

    A path is a tensor (S + len(outside), *x0.shape): the states at `levels`, then the states at `outside`. With
    tau = 1..T and nothing outside, this is eq. (6) as printed. Randomness is an argument: `draw(k)` returns the
    standard normal tensor, of x0's shape, that enters path[k]; it is called once for each k.

    Args:
        levels: tau_1, ..., tau_S, S >= 1, each noisier than the one before; none is clean data.
        sigma: S - 1 numbers; sigma[i] is the standard deviation of the state at levels[i] given that at levels[i + 1]
            and x_0, 0 <= sigma[i]^2 <= 1 - alpha_bar of levels[i].
        outside: Levels that are not in tau, in any order; given x_0 they are independent of all others (Appendix C).

    Raises:
        DdimError: If levels do not rise or are clean data, a timestep is repeated, or sigma is out of range.
    """

    levels: tuple[Level, ...]
    sigma: tuple[float, ...]
    outside: tuple[Level, ...] = ()

    def __post_init__(self) -> None:
        _check_levels(self.levels, self.outside)
        if len(self.sigma) != len(self.levels) - 1:
            problem = f"has {len(self.sigma)} values for {len(self.levels)} levels"
            raise DdimError("sigma", problem, "pass one per pair of neighbours")
        for value, level in zip(self.sigma, self.levels, strict=False):
            if not (value >= 0 and value**2 <= level.variance * (1 + 1e-12)):
                problem = f"sigma = {value:.6g} is outside 0..{level.noise:.6g}"
                raise DdimError(f"level t = {level.t:g}", problem, "lower eta or sigma")

    @classmethod
    def of_eta(cls, levels: Sequence[Level], eta: float, outside: Sequence[Level] = ()) -> Inference:
        """The member of the family with sigma = eta times the posterior's, eq. (16).

        Args:
            levels: Rising levels, as for the class.
            eta: 0 is deterministic except for one draw, 1 is the Markov chain of eq. (3).
            outside: As for the class.

        Raises:
            DdimError: As for the class.
        """
        tau, others = tuple(levels), tuple(outside)
        _check_levels(tau, others)
        return cls(tau, tuple(sigma_of_eta(noisier, level, eta) for level, noisier in itertools.pairwise(tau)), others)

    def backward(self, x0: Tensor, draw: Draw) -> Tensor:
        """A path sampled from x_{tau_S} down to x_{tau_1} by eq. (7).

        Args:
            x0: Clean data, any shape.
            draw: The noise of each state, see the class.

        Returns:
            (S + len(outside), *x0.shape), x0's dtype.
        """
        last = len(self.levels) - 1
        states = [diffuse(x0, draw(last), self.levels[last])]
        for i in reversed(range(last)):
            states.insert(0, self._mean(i, states[0], x0) + self.sigma[i] * draw(i))
        return torch.stack(states + self._draw_outside(x0, draw))

    def forward(self, x0: Tensor, draw: Draw) -> Tensor:
        """A path sampled from x_{tau_1} up to x_{tau_S} by eq. (8); it has the same distribution as `backward`.

        Args:
            x0: Clean data, any shape.
            draw: The noise of each state, see the class.

        Returns:
            (S + len(outside), *x0.shape), x0's dtype.
        """
        states = [diffuse(x0, draw(0), self.levels[0])]
        for i, (now, following) in enumerate(itertools.pairwise(self.levels)):
            of_x, of_x0, std = forward_weights(now, following, self.sigma[i])
            states.append(of_x * states[-1] + of_x0 * x0 + std * draw(i + 1))
        return torch.stack(states + self._draw_outside(x0, draw))

    def log_prob(self, path: Tensor, x0: Tensor) -> Tensor:
        """Eqs. (52) and (53): the log-density of a path given x_0, factorised from x_{tau_S} down.

        log q(x_{tau_S} | x_0) + sum_i log q_sigma(x_{tau_i} | x_{tau_{i+1}}, x_0) + sum over outside of
        log q(x_t | x_0). Without levels outside tau it is the log-density of eq. (6).

        Args:
            path: (S + len(outside), N, ...).
            x0: (N, ...).

        Returns:
            (N,), in nats, in the dtype of the path.

        Raises:
            ValueError: If a sigma is 0, so that there is no density, or the shapes do not match.
        """
        self._check_density(path, x0)
        last = len(self.levels) - 1
        total = _log_marginal(path[last], x0, self.levels[last])
        for i, std in enumerate(self.sigma):
            total = total + log_normal(path[i], self._mean(i, path[i + 1], x0), std)
        return total + self._log_outside(path, x0)

    def log_prob_forward(self, path: Tensor, x0: Tensor) -> Tensor:
        """The same log-density, factorised from x_{tau_1} up by eq. (8); arguments and errors as for `log_prob`."""
        self._check_density(path, x0)
        total = _log_marginal(path[0], x0, self.levels[0])
        for i, (now, following) in enumerate(itertools.pairwise(self.levels)):
            of_x, of_x0, std = forward_weights(now, following, self.sigma[i])
            total = total + log_normal(path[i + 1], of_x * path[i] + of_x0 * x0, std)
        return total + self._log_outside(path, x0)

    def _mean(self, i: int, x: Tensor, x0: Tensor) -> Tensor:
        """The mean of eq. (7) at levels[i], given x at levels[i + 1]."""
        now = self.levels[i + 1]
        of_x0, of_eps = posterior_weights(now, self.levels[i], self.sigma[i])
        return of_x0 * x0 + of_eps * (x - now.signal * x0) / now.noise

    def _draw_outside(self, x0: Tensor, draw: Draw) -> list[Tensor]:
        return [diffuse(x0, draw(k), level) for k, level in enumerate(self.outside, len(self.levels))]

    def _log_outside(self, path: Tensor, x0: Tensor) -> Tensor | float:
        states = path[len(self.levels) :]
        return sum(_log_marginal(x, x0, level) for x, level in zip(states, self.outside, strict=True))

    def _check_density(self, path: Tensor, x0: Tensor) -> None:
        for value, level in zip(self.sigma, self.levels, strict=False):
            if value == 0:
                raise ValueError(f"sigma = 0 at t = {level.t:g}: a path has no density where a step adds no noise")
        expected = (len(self.levels) + len(self.outside), *x0.shape)
        if path.shape != expected:
            raise ValueError(f"the path is {tuple(path.shape)}, expected {expected}")


def _log_marginal(x: Tensor, x0: Tensor, level: Level) -> Tensor:
    return log_normal(x, level.signal * x0, level.noise)


def _check_levels(levels: tuple[Level, ...], outside: tuple[Level, ...]) -> None:
    if not levels:
        raise DdimError("levels", "are empty", "pass at least one")
    for level in (*levels, *outside):
        if not (level.t > 0 and level.variance > 0):
            raise DdimError(f"level t = {level.t:g}", "is clean data", "pass levels with t > 0")
    for now, following in itertools.pairwise(levels):
        if not following.log_snr < now.log_snr:
            raise DdimError(f"level t = {following.t:g}", "is out of order", "pass rising levels")
    times = [level.t for level in (*levels, *outside)]
    if len(set(times)) < len(times):
        duplicate = next(t for t in times if times.count(t) > 1)
        raise DdimError(f"level t = {duplicate:g}", "is duplicated", "pass it once, in tau or outside")
