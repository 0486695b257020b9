"""Plans over discrete data, Appendix A: each row is a mixture with three weights.

With ids x_k and the network's p(x_0 | x_k), row k leaves each token unchanged with probability `keep`, samples it from
p(x_0 | x_k) with probability `to_x0`, and from the noise distribution pi with probability `fresh`:

    x_{k+1} ~ Cat(keep x_k + to_x0 p(x_0 | x_k) + fresh pi),    keep + to_x0 + fresh = 1
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ddim.errors import DdimError, either
from ddim.plan.base import BasePlan, BaseRow, Hook
from ddim.plan.serialization import MixtureFile, read_plan
from ddim.process.categorical import markov_fresh, markov_weights, mixture_weights, sharpen
from ddim.process.parameterization import TokenPrediction
from ddim.process.rng import sample_categorical
from ddim.process.schedule import Level

TOLERANCE = 1e-9
Kernel = Literal["ddim", "markov"]


@dataclass(frozen=True, slots=True)
class CategoricalRow(BaseRow):
    """One network evaluation and the random update that follows it.

    Args:
        now: The level of the tokens before the row.
        next: The level of the tokens after the row.
        keep: The probability that a token stays unchanged: the sigma of eq. (18).
        to_x0: The probability that it is drawn from the predicted x_0.
        fresh: The probability that it is drawn from pi.
        at: The level passed to the network; `now` if None.
    """

    now: Level
    next: Level
    keep: float = 0.0
    to_x0: float = 0.0
    fresh: float = 0.0
    at: Level | None = None

    @property
    def memory(self) -> int:
        """The number of states or predictions that the row uses: one."""
        return 1

    @property
    def draws(self) -> bool:
        """Whether the row uses random numbers: always."""
        return True


@dataclass(frozen=True, slots=True, repr=False)
class CategoricalPlan(BasePlan[CategoricalRow]):
    """A sampler of discrete data: rows that are run in order.

    Args:
        sampler: The sampler's name, for display.
        rows: One per network evaluation.
        pi: The noise distribution, one probability per category.
        kernel: "ddim", eq. (18), or "markov", the reverse Markov chain (D3PM). The weights of a "markov" row apply when
            the predicted x_0 differs from x_k; `ddim.categorical.markov_fresh` gives those for x_0 = x_k.
        temperature: See `ddim.categorical.sharpen`, which is applied to each predicted x_0.
        top_p: See `ddim.categorical.sharpen`.
        about: The settings of the plan, for display and manifests.
        made_for: The checksum of the model the plan was made for; "" for any model.
    """

    sampler: str
    rows: tuple[CategoricalRow, ...]
    pi: tuple[float, ...]
    kernel: Kernel = "ddim"
    temperature: float = 1.0
    top_p: float = 1.0
    about: str = ""
    made_for: str = ""

    def check(self) -> CategoricalPlan:
        """Check that each row is a mixture that preserves the marginals (17): keep abar + to_x0 = abar_next.

        Returns the plan.

        Raises:
            DdimError: If a row fails, naming the first one and its error.
        """
        if not self.rows:
            raise DdimError("plan", "has no rows", "use at least one step")
        if not (0 < self.temperature < math.inf):
            raise DdimError(f"temperature {self.temperature:g}", "is not a number > 0", "use 1, or less to sharpen")
        if not 0 < self.top_p <= 1:
            raise DdimError(f"top-p {self.top_p:g}", "is outside 0..1", "use 1 to keep every category")
        if min(self.pi) < 0 or abs(math.fsum(self.pi) - 1) > TOLERANCE:
            raise DdimError("plan", "has a pi that is not a distribution", "use numbers >= 0 that sum to 1")
        for k, row in enumerate(self.rows):
            self.check_levels(k)
            weights = (row.keep, row.to_x0, row.fresh)
            if not all(0 <= weight <= 1 for weight in weights):
                values = ", ".join(f"{weight:.6g}" for weight in weights)
                raise DdimError(self.where(k), f"has weights {values} outside 0..1", "choose a sigma within its range")
            if row.next.log_snr <= row.now.log_snr:
                raise DdimError(self.where(k), "goes to a noisier level", "use falling levels")
            required = self._required_weights(row)
            error = max(abs(weight - value) for weight, value in zip(weights, required, strict=True))
            if error > TOLERANCE:
                raise DdimError(
                    self.where(k), f"does not preserve the marginals (error {error:.3g})", "fix its weights"
                )
        return self

    def _required_weights(self, row: CategoricalRow) -> tuple[float, float, float]:
        """The weights that a row with this `keep` must have."""
        if self.kernel == "markov":
            return markov_weights(row.now, row.next)
        try:
            return mixture_weights(row.now, row.next, row.keep)
        except ValueError:
            return (math.inf, math.inf, math.inf)

    @property
    def hook(self) -> Hook | None:
        """Temperature and top-p, or None if both are 1."""
        if self.temperature == 1 and self.top_p == 1:
            return None
        return lambda x0, level: sharpen(x0, self.temperature, self.top_p)

    def advance(
        self,
        row: CategoricalRow,
        states: Sequence[Tensor],
        predictions: Sequence[TokenPrediction],
        fresh: Tensor | None,
    ) -> Tensor:
        """The tokens after a row.

        Args:
            row: The row.
            states: The first entry is the tokens x_k, ids (N, ...).
            predictions: The first entry is p(x_0 | x_k).
            fresh: Uniform on [0, 1), (N, ..., 3): for the choice of the mixture component, the draw of x_0, and the
                draw from pi.
        """
        assert fresh is not None
        if not torch.isfinite(predictions[0].x0.sum()):
            raise DdimError(
                "samples", "come from a prediction that is not finite", either("train longer", "use dtype='float32'")
            )
        x, probabilities = states[0], predictions[0].x0
        pi = torch.tensor(self.pi, dtype=torch.float64, device=x.device)
        component = fresh[..., 0]
        if self.kernel == "markov":
            # The mixture depends on whether x_0 equals x, so x_0 is sampled first.
            x0 = sample_categorical(fresh[..., 1], probabilities)
            again = (x0 == x) & (component >= markov_fresh(row.now, row.next, pi[x]))
            noisy = torch.where(x0 == x, ~again, component >= row.keep + row.to_x0)
            kept_or_x0 = torch.where(again | (component < row.keep) & (x0 != x), x, x0)
            return torch.where(noisy, sample_categorical(fresh[..., 2], pi), kept_or_x0)
        # Only the tokens that change are sampled, which saves time when `keep` is large.
        moved = component >= row.keep
        to_x0 = moved & (component < row.keep + row.to_x0) if row.fresh else moved
        out = x.clone()
        out[to_x0] = sample_categorical(fresh[..., 1][to_x0], probabilities[to_x0])
        renewed = moved & ~to_x0
        out[renewed] = sample_categorical(fresh[..., 2][renewed], pi)
        return out

    @staticmethod
    def from_json(text: str, name: str = "plan", checked: bool = True) -> CategoricalPlan:
        """A plan from its JSON, validated and checked; see `ddim.Plan.from_json`."""
        file = read_plan(text, name, MixtureFile)
        levels = file.parsed_levels()
        try:
            rows = tuple(
                CategoricalRow(**row.levels(levels), keep=row.keep, to_x0=row.to_x0, fresh=row.fresh)
                for row in file.rows
            )
            pi = _pi(file.categories, file.pi)
        except IndexError:
            raise DdimError(name, "a row refers to a missing level or category", "write it again") from None
        settings = (file.kernel, file.temperature, file.top_p, file.about, file.made_for)
        plan = CategoricalPlan(file.sampler, rows, pi, *settings)
        return plan.check() if checked else plan

    def _fields(self, place: Callable[[Level], int]) -> dict[str, Any]:
        pi: Any = list(self.pi)
        if len({*self.pi}) == 1:
            pi = "uniform"
        elif max(self.pi) == 1:
            pi = self.pi.index(1)
        return {
            "kind": "categorical",
            "kernel": self.kernel,
            "categories": len(self.pi),
            "pi": pi,
            **({} if self.temperature == 1 else {"temperature": self.temperature}),
            **({} if self.top_p == 1 else {"top_p": self.top_p}),
        }

    def _weights(self, row: CategoricalRow) -> dict[str, Any]:
        return {"keep": row.keep, "to_x0": row.to_x0, "fresh": row.fresh}

    def _remarks(self) -> list[str]:
        noise = "uniform noise" if len({*self.pi}) == 1 else "a mask" if max(self.pi) == 1 else "custom noise"
        remarks = [f"{len(self.pi)} categories", noise]
        remarks += [f"temperature {self.temperature:g}"] if self.temperature != 1 else []
        return remarks + ([f"top-p {self.top_p:g}"] if self.top_p != 1 else [])

    def _columns(self) -> list[tuple[str, list[float | None]]]:
        return [(name, [getattr(row, name) for row in self.rows]) for name in ("keep", "to_x0", "fresh")]


def _pi(categories: int, pi: Any) -> tuple[float, ...]:
    if pi == "uniform":
        return (1 / categories,) * categories
    if isinstance(pi, int):
        one_hot = [0.0] * categories
        one_hot[pi] = 1.0
        return tuple(one_hot)
    if len(pi) != categories:
        raise IndexError
    return tuple(pi)
