"""The base class of plans: a table over levels that can be printed, saved, and checked against a model."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor

from ddim._io.terminal import WIDTH, Cells, counted, table, wrapped
from ddim.errors import DdimError, either
from ddim.plan.serialization import FORMAT, VERSION, json_float
from ddim.process.parameterization import (
    AnyDenoiser,
    Prediction,
    _check_hook,
)
from ddim.process.schedule import Level, Schedule

Hook = Callable[[Tensor, Level], Tensor]
"""A function of a predicted x_0, (N, ...), and its level that returns the modified x_0; see `ddim.x0_hooks`."""


class BaseRow(ABC):
    """One network evaluation and the update that follows it. Subclasses are frozen dataclasses with these fields."""

    __slots__ = ()
    now: Level
    next: Level
    at: Level | None

    @property
    def query(self) -> Level:
        """The level passed to the network: `at`, or `now` if `at` is None."""
        return self.at or self.now

    @property
    @abstractmethod
    def memory(self) -> int:
        """The number of states or predictions that the row uses, including the newest."""

    @property
    @abstractmethod
    def draws(self) -> bool:
        """Whether the row uses random numbers."""


R = TypeVar("R", bound=BaseRow)
T = TypeVar("T", bound="BasePlan[Any]")


class BasePlan(ABC, Generic[R]):
    """A plan: rows that are run in order. Subclasses are frozen dataclasses with these fields."""

    __slots__ = ()
    sampler: str
    rows: tuple[R, ...]
    about: str
    made_for: str

    @property
    def before(self) -> tuple[Level, ...]:
        """The levels of states older than the start that a run needs in addition to it."""
        return ()

    @property
    @abstractmethod
    def hook(self) -> Hook | None:
        """The function applied to each predicted x_0 before a row uses it, or None."""

    @property
    def eps_kept(self) -> bool:
        """Whether the rest of the prediction stays unchanged when the hook changes x_0."""
        return False

    def begin(self, states: Sequence[Tensor]) -> list[Tensor]:
        """The initial states of a run, converted to the form the rows need."""
        return list(states)

    @abstractmethod
    def advance(self, row: R, states: Sequence[Tensor], predictions: Sequence[Any], fresh: Tensor | None) -> Tensor:
        """The state after a row.

        Args:
            row: The row.
            states: The states so far, newest first, (N, ...) each.
            predictions: The predictions so far, newest first, including this row's.
            fresh: The random numbers of the row; None if it uses none.
        """

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def nfe(self) -> int:
        """The number of network evaluations (NFE)."""
        return len(self.rows)

    @property
    def start(self) -> Level:
        """The level of the initial state."""
        return self.rows[0].now

    @property
    def end(self) -> Level:
        """The level of the final state."""
        return self.rows[-1].next

    @property
    def stochastic(self) -> bool:
        """Whether any row uses random numbers."""
        return any(row.draws for row in self.rows)

    @property
    def memory(self) -> int:
        """The number of states or predictions that a run must store."""
        return max(row.memory for row in self.rows)

    @property
    def name(self) -> str:
        """The sampler and its settings in one line."""
        return f"{self.sampler}({self.about})" if self.about else self.sampler

    def where(self, k: int) -> str:
        """A description of row k for messages."""
        return f"plan row {k} (t = {self.rows[k].now.t:g} to {self.rows[k].next.t:g})"

    def check_levels(self, k: int) -> None:
        """Check that row k starts where the previous row ended, and that its levels are finite with t >= 0.

        Raises:
            DdimError: If it does not, naming the row.
        """
        row = self.rows[k]
        if k and self.rows[k - 1].next != row.now:
            raise DdimError(self.where(k), "does not start where the previous row ended", "fix the plan's levels")
        named = (row.now, row.next, row.query, *self.before)
        if min(level.t for level in named) < 0:
            raise DdimError(self.where(k), "has a timestep below 0", "fix the plan's levels")
        if not all(math.isfinite(value) for level in named for value in (level.t, level.alpha_bar)):
            raise DdimError(self.where(k), "has a number that is not finite", "use other timesteps or another sampler")

    def check_model(self: T, fingerprint: Callable[[], str]) -> T:
        """Check that the plan was made for a model, or for any model. Returns the plan.

        Args:
            fingerprint: Returns the model's checksum; called only if the plan was made for one model.

        Raises:
            DdimError: If the plan was made for another model.
        """
        if self.made_for and self.made_for != fingerprint():
            problem = f"was made for another model, {self.made_for[:12]}..."
            raise DdimError(
                f"plan {self.name}",
                problem,
                either("tune one for this model", "use any_model=True"),
            )
        return self

    def _starts(self) -> str:
        return " and ".join(f"{level.t:g}" for level in (self.start, *self.before))

    def check_schedule(self: T, schedule: Schedule, to_clean: bool = False) -> T:
        """Check that the plan's levels are those of a schedule at the same timesteps. Returns the plan.

        Args:
            schedule: A model's schedule.
            to_clean: Whether the plan must end at clean data, which sampling requires.

        Raises:
            DdimError: If a level differs from the schedule's, or the plan does not sample to clean data as required.
        """
        if to_clean and (self.end.t != 0 or self.start.t == 0):
            problem = f"goes from t = {self.start.t:g} to {self.end.t:g}"
            raise DdimError("plan", problem, "use a plan that ends at t = 0")
        if to_clean and self.before:
            raise DdimError("plan", f"starts from the states at t = {self._starts()}", "run it with `ddim decode`")
        for level in {level for row in self.rows for level in (row.now, row.next, row.query)} | {*self.before}:
            expected = schedule.level(level.t).log_snr if 0 <= level.t <= schedule.T else math.nan
            if not (expected == level.log_snr or abs(expected - level.log_snr) < 1e-6):
                problem = f"has log-SNR {level.log_snr:.6g} at t = {level.t:g}, the model's schedule {expected:.6g}"
                raise DdimError("plan", problem, "create a plan for this model")
        return self

    def levels(self) -> list[Level]:
        """Every level in the plan, each once, in the order of the rows."""
        named = [level for row in self.rows for level in (row.now, row.next, row.query)]
        return list({(level.t, level.log_snr): level for level in (*named, *self.before)}.values())

    def to_json(self) -> str:
        """The plan as JSON, with floats at full precision."""
        levels = self.levels()
        places = {(level.t, level.log_snr): place for place, level in enumerate(levels)}

        def place(level: Level) -> int:
            return places[(level.t, level.log_snr)]

        body = {
            "format": FORMAT,
            "version": VERSION,
            "sampler": self.sampler,
            "about": self.about,
            **self._fields(place),
            **({"made_for": self.made_for} if self.made_for else {}),
            "levels": [[level.t, json_float(level.log_snr)] for level in levels],
            "rows": [
                {
                    "now": place(row.now),
                    "next": place(row.next),
                    **({"at": place(row.query)} if row.query != row.now else {}),
                    **self._weights(row),
                }
                for row in self.rows
            ],
        }
        return json.dumps(body)

    @abstractmethod
    def _fields(self, place: Callable[[Level], int]) -> dict[str, Any]:
        """The entries of the file other than the rows."""

    @abstractmethod
    def _weights(self, row: R) -> dict[str, Any]:
        """The entries of a row in the file other than its levels."""

    def _remarks(self) -> list[str]:
        """The remarks below the plan's name in the printed table."""
        return []

    @abstractmethod
    def _columns(self) -> list[tuple[str, list[float | None]]]:
        """The printed columns after those of the levels; None is printed as a dot."""

    def table(self, width: int = WIDTH) -> str:
        """The plan as text: its name, remarks and one line per row, at most `width` characters wide.

        Columns without a number other than 0 are left out. Numbers have 4 to 6 decimals, as many as fit.

        Args:
            width: The maximum length of a line.
        """
        columns: list[tuple[str, Cells]] = [
            ("from", [_time(row.now, row.query) for row in self.rows]),
            ("to", [f"{row.next.t:g}" for row in self.rows]),
            ("alpha_bar", [row.now.alpha_bar for row in self.rows]),
            ("alpha_bar next", [row.next.alpha_bar for row in self.rows]),
            *((head, cells) for head, cells in self._columns() if any(cells)),
        ]
        title = f"{self.name}: {counted(self.nfe, 'network evaluations')}"
        remarks = wrapped(", ".join(self._remarks()), width, "  ")
        lines = table(columns, width, keys=2, optional=("alpha_bar next",))
        return "\n".join([*wrapped(title, width, again="  "), *remarks, *lines])

    def __repr__(self) -> str:
        ends = f"t = {self.start.t:g} to {self.end.t:g}" if self.rows else "no rows"
        return f"{type(self).__name__}({self.name!r}, {counted(self.nfe, 'network evaluations')}, {ends})"

    def __str__(self) -> str:
        return self.table()


def _time(level: Level, query: Level) -> str:
    return f"{level.t:g}" + (f" (as {query.t:g})" if query != level else "")


@dataclass(frozen=True, slots=True)
class Hooked:
    """A denoiser with a hook applied to x_0; the rest of the prediction is recomputed by `Prediction.with_x0`.

    Args:
        denoiser: The denoiser to wrap.
        hook: `hook(x0, level) -> x0` of the same shape; see `ddim.x0_hooks`.
        eps_kept: Leave the rest as predicted, as some other libraries do, see `ddim.emulate`.
        checked: Whether the hook's output is validated at each call; a plan's own hook is not.
    """

    denoiser: AnyDenoiser
    hook: Hook
    eps_kept: bool = False
    checked: bool = True

    def __call__(self, x: Tensor, level: Level, /) -> Any:
        """The modified prediction.

        Raises:
            DdimError: If the hook does not return finite numbers of the same shape.
        """
        predicted = self.denoiser(x, level)
        x0 = self.hook(predicted.x0, level)
        if self.checked:
            _check_hook(x0, predicted.x0, level)
        if self.eps_kept:
            return Prediction(x0, predicted.eps, predicted.variance_fraction)
        return predicted.with_x0(x0, x, level)


def as_planned(denoise: AnyDenoiser, plan: BasePlan[Any]) -> AnyDenoiser:
    """The denoiser with the plan's own hook, such as clipping, applied to x_0 if there is one."""
    return Hooked(denoise, plan.hook, plan.eps_kept, checked=False) if plan.hook else denoise
