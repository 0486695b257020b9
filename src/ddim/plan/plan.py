"""The plan over real-valued data: a sampler as a float64 table that can be printed, checked, saved, inverted and run.

With states x_0 (the initial state), x_1, ... and one network evaluation per row, which gives the pair
(x0_k, eps_k) = prediction at x_k, row k computes

    x_{k+1} = sum_j X[j] x_{k-j}  +  sum_j P[j] x0_{k-j}  +  sum_j E[j] eps_{k-j}  +  z z_k,    z_k ~ N(0, I)

where x_{-1}, ... are older states that some plans need in addition to the initial one. Since x = signal x0 + noise eps,
the three kinds of weight are redundant; they are separate so that each sampler has the form printed in its paper, and
so that rows stay finite at zero signal (zero terminal SNR).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ddim.errors import DdimError
from ddim.plan.base import BasePlan, Hook
from ddim.plan.row import Row, on_lattice
from ddim.plan.serialization import PlanFile, read_plan
from ddim.process.parameterization import Prediction
from ddim.process.schedule import Level

TOLERANCE = 1e-9


@dataclass(frozen=True, slots=True, repr=False)
class Plan(BasePlan[Row]):
    """A sampler of real-valued data: rows that are run in order.

    Args:
        sampler: The sampler's name, for display: "ddim", "ddpm", ...
        rows: One per network evaluation.
        clip_x0: Whether the predicted x_0 is clipped to [-1, 1] and eps recomputed.
        keeps_marginals: False only for a plan that adds more noise than its kernel's sigma (hat, optimal, learned).
        about: The settings of the plan, for display and manifests.
        straight: False only for a plan that is correct only in the limit of small steps, such as Euler in dt.
        before: Levels of states older than the initial one, newest first, that a run needs in addition to it: the
            inverse of a two-step plan starts from two states, see `ddim.inversion`.
        lattice: If not 0, states are integer multiples of this power of two, in float64: a row's predictions are
            rounded to it and states with integer weights are added exactly, so that a sum can be inverted to the last
            bit.
        made_for: The checksum of the model the plan was fitted to, see `ddim.tuning`; "" for any model.
        emulates: The library whose arithmetic, including its bugs, the plan reproduces, see `ddim.emulate`; otherwise
            "". The rows of such a plan may go to a level other than their `next`.
        eps_kept: With clip_x0: leave eps as predicted, so that the pair no longer satisfies x = signal x0 + noise eps.
    """

    sampler: str
    rows: tuple[Row, ...]
    clip_x0: bool = False
    keeps_marginals: bool = True
    about: str = ""
    straight: bool = True
    before: tuple[Level, ...] = ()
    lattice: float = 0.0
    made_for: str = ""
    emulates: str = ""
    eps_kept: bool = False

    def check(self) -> Plan:
        """Check that the plan is exact on straight lines and that its variances are in range. Returns the plan.

        On x_t = signal_t x_0 + noise_t eps with constant x_0 and eps, every row must give the mean of its next level:
        sum X signal + sum P = signal_next and sum X noise + sum E = sqrt(noise_next^2 - sigma^2), with
        0 <= sigma^2 <= noise_next^2. If `straight` is False, only the first equation must hold. If the plan `emulates`
        another library, each row must be exact for some level: the squares of the two sums and of sigma add up to 1.

        Raises:
            DdimError: If a row fails, naming the first one and its error.
        """
        if not self.rows:
            raise DdimError("plan", "has no rows", "use at least one step")
        if not (self.lattice == 0 or (0 < self.lattice <= 1 and math.frexp(self.lattice)[0] == 0.5)):
            raise DdimError("plan", f"has lattice {self.lattice}", "use 0, or a power of two such as 2**-32")
        if self.eps_kept and not self.clip_x0:
            raise DdimError("plan", "has eps_kept, but x0 is not clipped", "set clip_x0, or unset eps_kept")
        for k, row in enumerate(self.rows):
            self.check_levels(k)
            where, states = self.where(k), k + 1 + len(self.before)
            if len(row.x) > states or max(len(row.x0), len(row.eps)) > k + 1:
                raise DdimError(
                    where, f"uses {row.memory - 1} past states, there are {states - 1}", "shorten its weights"
                )
            numbers = (*row.x, *row.x0, *row.eps, row.z, row.sigma, row.z_high)
            if not all(math.isfinite(value) for value in numbers):
                raise DdimError(where, "has a number that is not finite", "use other timesteps or another sampler")
            highest = 1.0 if self.emulates else row.next.variance
            if row.sigma < 0 or row.z < 0 or row.sigma**2 > highest * (1 + TOLERANCE):
                limit = math.sqrt(highest)
                raise DdimError(where, f"sigma = {row.sigma:.6g} is outside 0..{limit:.6g}", "lower eta or sigma")
            if row.z_high and not 0 < row.z <= row.z_high:
                problem = f"adds noise from {row.z:.6g} to {row.z_high:.6g}"
                raise DdimError(where, problem, "use bounds with 0 < lower <= upper")
            if self.keeps_marginals and row.z != row.sigma:
                raise DdimError(where, f"adds noise {row.z:.6g} at sigma {row.sigma:.6g}", "make them equal")
            self._check_line(k)
        return self

    def _check_line(self, k: int) -> None:
        of_x0, of_eps = self.line_error(k)
        error = max(of_x0, of_eps) if self.straight else of_x0
        problem, row = "on a straight line", self.rows[k]
        if self.emulates:
            signal, noise = self.mean_weights(k)
            error = max(abs(signal**2 + noise**2 + row.sigma**2 - 1), -signal, -noise)
            problem = "from a step to any level"
        if error > TOLERANCE * row.size:
            raise DdimError(self.where(k), f"is off by {error:.3g} {problem}", "fix its weights")

    def mean_weights(self, k: int) -> tuple[float, float]:
        """The weights of x_0 and eps in the mean of row k's result on the states of a straight line, see `check`."""
        row, past = self.rows[k], [*(row.now for row in self.rows[k::-1]), *self.before]
        signal = sum(w * level.signal for w, level in zip(row.x, past, strict=False)) + sum(row.x0)
        noise = sum(w * level.noise for w, level in zip(row.x, past, strict=False)) + sum(row.eps)
        return signal, noise

    def line_error(self, k: int) -> tuple[float, float]:
        """The errors of row k in the weights of x_0 and eps on a straight line, see `check`."""
        row, (signal, noise) = self.rows[k], self.mean_weights(k)
        expected = math.sqrt(max(row.next.variance - row.sigma**2, 0.0))
        return abs(signal - row.next.signal), abs(noise - expected)

    @staticmethod
    def from_json(text: str, name: str = "plan", checked: bool = True) -> Plan:
        """Parse and validate a plan from JSON.

        Args:
            text: The output of `to_json`.
            name: The file's name, for messages.
            checked: Whether to run `check`; False to load an invalid plan for inspection.

        Raises:
            DdimError: If the text is not a plan of this version, or fails `check`.
        """
        file = read_plan(text, name, PlanFile)
        levels = file.parsed_levels()
        try:
            rows = tuple(
                Row(**row.levels(levels), x=row.x, x0=row.x0, eps=row.eps, z=row.z, sigma=row.sigma, z_high=row.z_high)
                for row in file.rows
            )
            before = tuple(levels[place] for place in file.before)
        except IndexError:
            raise DdimError(name, "a row refers to a missing level", "write it again") from None
        flags = (file.clip_x0, file.keeps_marginals, file.about, file.straight, before, file.lattice, file.made_for)
        plan = Plan(file.sampler, rows, *flags, file.emulates, file.eps_kept)
        return plan.check() if checked else plan

    @property
    def hook(self) -> Hook | None:
        """Clipping, or None if the plan does not clip."""
        return _clip if self.clip_x0 else None

    def begin(self, states: Sequence[Tensor]) -> list[Tensor]:
        """The initial states of a run, converted to float64 and rounded to the lattice if there is one."""
        return [on_lattice(state.double(), self.lattice) for state in states] if self.lattice else list(states)

    def advance(
        self, row: Row, states: Sequence[Tensor], predictions: Sequence[Prediction], fresh: Tensor | None
    ) -> Tensor:
        """The state after a row, see `BasePlan.advance`."""
        return row.update(states, predictions, fresh, self.lattice)

    def _fields(self, place: Callable[[Level], int]) -> dict[str, Any]:
        return {
            "clip_x0": self.clip_x0,
            "keeps_marginals": self.keeps_marginals,
            **({} if self.straight else {"straight": False}),
            **({"before": [place(level) for level in self.before]} if self.before else {}),
            **({"lattice": self.lattice} if self.lattice else {}),
            **({"emulates": self.emulates} if self.emulates else {}),
            **({"eps_kept": True} if self.eps_kept else {}),
        }

    def _weights(self, row: Row) -> dict[str, Any]:
        return {
            **{name: list(getattr(row, name)) for name in ("x", "x0", "eps") if getattr(row, name)},
            **{name: getattr(row, name) for name in ("z", "sigma", "z_high") if getattr(row, name)},
        }

    def _remarks(self) -> list[str]:
        remarks = []
        if self.clip_x0:
            remarks.append("x0 clipped to [-1, 1]" + (" with eps left as predicted" if self.eps_kept else ""))
        if self.emulates:
            remarks.append(f"the arithmetic of {self.emulates}, not checked on straight lines")
        if not self.straight:
            remarks.append("not exact on straight lines")
        if self.before:
            remarks.append(f"from the states at t = {self._starts()}")
        if self.lattice:
            remarks.append(f"states on multiples of {self.lattice:g}")
        return remarks

    def _columns(self) -> list[tuple[str, list[float | None]]]:
        columns: list[tuple[str, list[float | None]]] = [("sigma", [row.sigma for row in self.rows])]
        for kind in ("x", "x0", "eps"):
            width = max(len(getattr(row, kind)) for row in self.rows)
            for j in range(width):
                cells = [weights[j] if j < len(weights := getattr(row, kind)) else None for row in self.rows]
                columns.append((f"{kind}[-{j}]" if j else kind, cells))
        columns.append(("z", [row.z or None for row in self.rows]))
        columns.append(("z to", [row.z_high or None for row in self.rows]))
        return columns


def _clip(x0: Tensor, level: Level) -> Tensor:
    return x0.clamp(-1, 1)
