"""The row of a plan over real-valued data: one network evaluation and the weighted sum that gives the next state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddim.plan.base import BaseRow
from ddim.process.parameterization import Prediction
from ddim.process.schedule import Level


@dataclass(frozen=True, slots=True)
class Row(BaseRow):
    """One network evaluation and the update that follows it.

    Args:
        now: The level of the state before the row.
        next: The level of the state after the row; noisier than `now` when encoding.
        x: Weights X[j] of the states, newest first.
        x0: Weights P[j] of the predicted x_0, newest first.
        eps: Weights E[j] of the predicted eps, newest first.
        z: Standard deviation of the added noise.
        sigma: The sigma of eq. (12) in the row's mean; equal to z except for sigma-hat and sigma optimal.
        at: The level passed to the network; `now` if None.
        z_high: If not 0, the network predicts the noise's standard deviation for each element, between z and z_high on
            a log scale.
    """

    now: Level
    next: Level
    x: tuple[float, ...] = ()
    x0: tuple[float, ...] = ()
    eps: tuple[float, ...] = ()
    z: float = 0.0
    sigma: float = 0.0
    at: Level | None = None
    z_high: float = 0.0

    @property
    def memory(self) -> int:
        """The number of states or predictions that the row uses, including the newest."""
        return max(len(self.x), len(self.x0), len(self.eps))

    @property
    def draws(self) -> bool:
        """Whether the row adds noise."""
        return self.z > 0

    @property
    def size(self) -> float:
        """The scale of rounding errors: 1 plus the largest weight. Terms can cancel, so the sum is no measure of it."""
        return 1 + max((abs(value) for value in (*self.x, *self.x0, *self.eps)), default=0.0)

    def update(
        self, states: Sequence[Tensor], predictions: Sequence[Prediction], fresh: Tensor | None, lattice: float = 0.0
    ) -> Tensor:
        """The state after the row: the sum in the docstring of `ddim.plan.plan`.

        Args:
            states: The states so far, newest first, (N, ...) each.
            predictions: The predictions so far, newest first.
            fresh: Standard normal noise if z > 0, else None.
            lattice: See `ddim.Plan`.
        """
        from_states = [*zip(self.x, states, strict=False)]
        added = self._predicted(predictions)
        if fresh is not None:
            added.append((self.z, self._learned(fresh, predictions[0]).to(states[0].dtype)))
        if not lattice:
            return _sum([*from_states, *added], states[0].dtype)
        # Integer multiples of the lattice add without rounding in float64, so only the other terms are rounded to it.
        whole = [(weight, state) for weight, state in from_states if weight == int(weight)]
        others = [*(term for term in from_states if term[0] != int(term[0])), *added]
        rest = _sum(others or [(0.0, states[0])], torch.float64)
        return _sum([(1.0, on_lattice(rest, lattice)), *whole], torch.float64)

    def _predicted(self, predictions: Sequence[Prediction]) -> list[tuple[float, Tensor]]:
        """The terms of the predictions. A linear prediction is expanded into terms of x_t and the network's output."""
        terms: list[tuple[float, Tensor]] = []
        for j in range(max(len(self.x0), len(self.eps))):
            prediction = predictions[j]
            of_x0 = self.x0[j] if j < len(self.x0) else 0.0
            of_eps = self.eps[j] if j < len(self.eps) else 0.0
            linear = prediction.linear
            if linear is None:
                terms += [(of_x0, prediction.x0)] if of_x0 else []
                terms += [(of_eps, prediction.eps)] if of_eps else []
                continue
            (a, b), (c, d) = linear.of_x0, linear.of_eps
            terms += [(of_x0 * a + of_eps * c, linear.x), (of_x0 * b + of_eps * d, linear.output)]
        return terms

    def _learned(self, fresh: Tensor, prediction: Prediction) -> Tensor:
        """The noise scaled by (z_high / z)^f, where f is the `variance_fraction` that the network predicts."""
        if not self.z_high:
            return fresh
        if prediction.variance_fraction is None:
            raise ValueError("this plan needs a predicted variance, the network has none")
        return fresh * (self.z_high / self.z) ** prediction.variance_fraction


def on_lattice(x: Tensor, lattice: float) -> Tensor:
    """x rounded to integer multiples of the lattice."""
    return (x / lattice).round() * lattice


def _sum(terms: list[tuple[float, Tensor]], dtype: torch.dtype) -> Tensor:
    weight, tensor = terms[0]
    out = tensor * weight
    if out.dtype != dtype:  # a denoiser in lower precision must not lower the precision of the state
        out = out.to(dtype)
    for weight, tensor in terms[1:]:
        if weight:
            out.add_(tensor, alpha=weight)
    return out
