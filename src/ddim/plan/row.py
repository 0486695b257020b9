"""The row of a plan over real-valued data: one network call, and the sum that makes the next state."""

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
    """One network call and the update that follows it.

    Args:
        now: The level of the state the row starts from.
        next: The level of the state it makes; noisier than `now` when encoding.
        x: Weights X[j] of the states, newest first.
        x0: Weights P[j] of the predicted x_0, newest first.
        eps: Weights E[j] of the predicted eps, newest first.
        z: Standard deviation of the fresh noise that is added.
        sigma: The sigma of eq. (12) in the row's mean; equal to z except for sigma-hat and sigma optimal.
        at: The level the network is told; `now` if None.
        z_high: If not 0, the network says for each number where between z and z_high its noise lies, on a log scale.
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
        """How many states or predictions, the newest included, the row looks at."""
        return max(len(self.x), len(self.x0), len(self.eps))

    @property
    def draws(self) -> bool:
        """Whether the row adds noise."""
        return self.z > 0

    @property
    def size(self) -> float:
        """What rounding is held against: a wrong weight shows against what is added up, not against the sum."""
        return 1 + max((abs(value) for value in (*self.x, *self.x0, *self.eps)), default=0.0)

    def update(
        self, states: Sequence[Tensor], predictions: Sequence[Prediction], fresh: Tensor | None, lattice: float = 0.0
    ) -> Tensor:
        """The state after the row: the sum of the plan's head line.

        Args:
            states: The states so far, newest first, (N, ...) each.
            predictions: The predictions so far, newest first.
            fresh: Standard normal noise, where z > 0.
            lattice: See `ddim.Plan`.
        """
        kept = [*zip(self.x, states, strict=False)]
        added = self._predicted(predictions)
        if fresh is not None:
            added.append((self.z, self._learned(fresh, predictions[0]).to(states[0].dtype)))
        if not lattice:
            return _sum([*kept, *added], states[0].dtype)
        # Whole multiples of the lattice add without rounding in float64, so only the rest is put on it.
        whole = [(weight, state) for weight, state in kept if weight == int(weight)]
        others = [*(term for term in kept if term[0] != int(term[0])), *added]
        rest = _sum(others or [(0.0, states[0])], torch.float64)
        return _sum([(1.0, on_lattice(rest, lattice)), *whole], torch.float64)

    def _predicted(self, predictions: Sequence[Prediction]) -> list[tuple[float, Tensor]]:
        """The terms of the predictions; where x_0 and eps are sums themselves, of what those are made of."""
        terms: list[tuple[float, Tensor]] = []
        for j in range(max(len(self.x0), len(self.eps))):
            made = predictions[j]
            of_x0 = self.x0[j] if j < len(self.x0) else 0.0
            of_eps = self.eps[j] if j < len(self.eps) else 0.0
            if made.linear is None:
                terms += [(of_x0, made.x0)] if of_x0 else []
                terms += [(of_eps, made.eps)] if of_eps else []
                continue
            (a, b), (c, d) = made.linear.of_x0, made.linear.of_eps
            terms += [(of_x0 * a + of_eps * c, made.linear.x), (of_x0 * b + of_eps * d, made.linear.output)]
        return terms

    def _learned(self, fresh: Tensor, prediction: Prediction) -> Tensor:
        """The noise times z^-f z_high^f, f being the network's `fraction`."""
        if not self.z_high:
            return fresh
        if prediction.variance_fraction is None:
            raise ValueError("this plan takes its noise from the network, which does not say any")
        return fresh * (self.z_high / self.z) ** prediction.variance_fraction


def on_lattice(x: Tensor, lattice: float) -> Tensor:
    """The nearest whole multiples of the lattice."""
    return (x / lattice).round() * lattice


def _sum(terms: list[tuple[float, Tensor]], dtype: torch.dtype) -> Tensor:
    weight, tensor = terms[0]
    out = tensor * weight
    if out.dtype != dtype:  # a denoiser in a lower precision must not lower the state's
        out = out.to(dtype)
    for weight, tensor in terms[1:]:
        if weight:
            out.add_(tensor, alpha=weight)
    return out
