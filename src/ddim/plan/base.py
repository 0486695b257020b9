"""What every plan is, whatever its rows do: a table over levels that prints, saves, and knows which model it fits."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor

from ddim.errors import DdimError, either
from ddim.plan.serialization import FORMAT, VERSION, json_float
from ddim.process.parameterization import (
    AnyDenoiser,
    Prediction,
    _check_hook,
)
from ddim.process.schedule import Level, Schedule

Hook = Callable[[Tensor, Level], Tensor]
"""What is done to a predicted x_0, (N, ...), at a level; see `ddim.x0_hooks`."""


class BaseRow(ABC):
    """One network call and the update that follows it. Subclasses are frozen dataclasses with these fields."""

    __slots__ = ()
    now: Level
    next: Level
    at: Level | None

    @property
    def query(self) -> Level:
        """The level the network is told: `at`, or `now` if that is None."""
        return self.at or self.now

    @property
    @abstractmethod
    def memory(self) -> int:
        """How many states or predictions, the newest included, the row looks at."""

    @property
    @abstractmethod
    def draws(self) -> bool:
        """Whether the row draws anything."""


R = TypeVar("R", bound=BaseRow)
T = TypeVar("T", bound="BasePlan[Any]")


class BasePlan(ABC, Generic[R]):
    """A plan: rows to be run in order. Subclasses are frozen dataclasses with these fields."""

    __slots__ = ()
    sampler: str
    rows: tuple[R, ...]
    about: str
    made_for: str

    @property
    def before(self) -> tuple[Level, ...]:
        """Levels of states older than the start that a run must be given beside it."""
        return ()

    @property
    @abstractmethod
    def hook(self) -> Hook | None:
        """What is done to each predicted x_0 before a row uses it."""

    @property
    def eps_kept(self) -> bool:
        """Whether the rest of the prediction stays as it was where the hook changed x_0."""
        return False

    def begin(self, states: Sequence[Tensor]) -> list[Tensor]:
        """The states a run starts from, as the rows want them."""
        return list(states)

    @abstractmethod
    def advance(self, row: R, states: Sequence[Tensor], predictions: Sequence[Any], fresh: Tensor | None) -> Tensor:
        """The state after a row.

        Args:
            row: The row.
            states: The states so far, newest first, (N, ...) each.
            predictions: The predictions so far, newest first, the row's own included.
            fresh: What was drawn for the row, where it draws.
        """

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def calls(self) -> int:
        """The number of network calls."""
        return len(self.rows)

    @property
    def start(self) -> Level:
        """The level of the state the run starts from."""
        return self.rows[0].now

    @property
    def end(self) -> Level:
        """The level of the state the run ends with."""
        return self.rows[-1].next

    @property
    def stochastic(self) -> bool:
        """Whether any row draws."""
        return any(row.draws for row in self.rows)

    @property
    def memory(self) -> int:
        """How many states or predictions must be kept."""
        return max(row.memory for row in self.rows)

    @property
    def name(self) -> str:
        """The sampler and its settings in one line."""
        return f"{self.sampler}({self.about})" if self.about else self.sampler

    def where(self, k: int) -> str:
        """Row k in words."""
        return f"plan row {k} (t = {self.rows[k].now.t:g} to {self.rows[k].next.t:g})"

    def check_levels(self, k: int) -> None:
        """See that row k starts where the one before ended, over levels that are some.

        Raises:
            DdimError: Saying what is wrong with the row.
        """
        row = self.rows[k]
        if k and self.rows[k - 1].next != row.now:
            raise DdimError(self.where(k), "does not start where the row before it ended", "mend the plan's levels")
        named = (row.now, row.next, row.query, *self.before)
        if min(level.t for level in named) < 0:
            raise DdimError(self.where(k), "names a time before 0", "mend the plan's levels")
        if not all(math.isfinite(value) for level in named for value in (level.t, level.alpha_bar)):
            raise DdimError(self.where(k), "holds a number that is not finite", "choose other times or another sampler")

    def check_model(self: T, fingerprint: Callable[[], str]) -> T:
        """The plan itself, if it was made for the model of that checksum, or for any.

        Args:
            fingerprint: Gives the checksum; it is asked only where it matters.

        Raises:
            DdimError: If it was made for another model.
        """
        if self.made_for and self.made_for != fingerprint():
            wrong = f"was made for another model, {self.made_for[:12]}..."
            raise DdimError(
                f"plan {self.name}", wrong, either("tune one for this model", "run it all the same with any_model=True")
            )
        return self

    def _starts(self) -> str:
        return " and ".join(f"{level.t:g}" for level in (self.start, *self.before))

    def check_schedule(self: T, schedule: Schedule, to_clean: bool = False) -> T:
        """The plan itself, if its times have the levels that a schedule gives them.

        Args:
            schedule: A model's schedule.
            to_clean: Whether the plan must go to clean data, as to sample it must.

        Raises:
            DdimError: Naming a level that is not the schedule's, or where the plan goes.
        """
        if to_clean and (self.end.t != 0 or self.start.t == 0):
            wrong = f"goes from t = {self.start.t:g} to {self.end.t:g}"
            raise DdimError("plan", wrong, "to sample it must end at t = 0")
        if to_clean and self.before:
            raise DdimError("plan", f"starts from the states at t = {self._starts()}", "run it with `ddim decode`")
        for level in {level for row in self.rows for level in (row.now, row.next, row.query)} | {*self.before}:
            own = schedule.level(level.t).log_snr if 0 <= level.t <= schedule.T else math.nan
            if not (own == level.log_snr or abs(own - level.log_snr) < 1e-6):
                wrong = f"t = {level.t:g} has log-SNR {level.log_snr:.6g}, on the model's schedule {own:.6g}"
                raise DdimError("plan", wrong, "make the plan for this model")
        return self

    def levels(self) -> list[Level]:
        """Every level that is named, each once, in the order of the rows."""
        named = [level for row in self.rows for level in (row.now, row.next, row.query)]
        return list({(level.t, level.log_snr): level for level in (*named, *self.before)}.values())

    def to_json(self) -> str:
        """The plan as JSON; floats keep all their digits."""
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
        """What the file holds beside the rows."""

    @abstractmethod
    def _weights(self, row: R) -> dict[str, Any]:
        """What the file holds of a row beside its levels."""

    def _title(self) -> str:
        """The line above the printed table."""
        return f"{self.name}: {self.calls} network calls"

    @abstractmethod
    def _columns(self) -> list[tuple[str, list[str]]]:
        """The printed columns after the levels'."""

    def __str__(self) -> str:
        columns = [
            ("from", [_time(row.now, row.query) for row in self.rows]),
            ("to", [f"{row.next.t:g}" for row in self.rows]),
            ("alpha_bar", [f"{row.now.alpha_bar:.6f}" for row in self.rows]),
            ("alpha_bar next", [f"{row.next.alpha_bar:.6f}" for row in self.rows]),
            *self._columns(),
        ]
        widths = [max(len(head), *(len(cell) for cell in cells)) for head, cells in columns]
        lines = ["  ".join(head.rjust(width) for (head, _), width in zip(columns, widths, strict=True))]
        for k in range(len(self.rows)):
            lines.append("  ".join(cells[k].rjust(width) for (_, cells), width in zip(columns, widths, strict=True)))
        return "\n".join([self._title(), *lines])


def _time(level: Level, query: Level) -> str:
    return f"{level.t:g}" + (f" (as {query.t:g})" if query != level else "")


@dataclass(frozen=True, slots=True)
class Hooked:
    """A denoiser whose x_0 goes through a hook; the rest of the prediction follows it, see `Prediction.with_x0`.

    Args:
        denoiser: The denoiser to wrap.
        hook: `hook(x0, level) -> x0`, the shape kept; see `ddim.x0_hooks`.
        eps_kept: Whether the rest stays as predicted instead, which is what some other codes do, see `ddim.emulate`.
        checked: Whether what the hook gives is checked at each call; for a plan's own hook it is not.
    """

    denoiser: AnyDenoiser
    hook: Hook
    eps_kept: bool = False
    checked: bool = True

    def __call__(self, x: Tensor, level: Level, /) -> Any:
        """The changed prediction.

        Raises:
            DdimError: If the hook gives something else than finite numbers of the same shape.
        """
        made = self.denoiser(x, level)
        x0 = self.hook(made.x0, level)
        if self.checked:
            _check_hook(x0, made.x0, level)
        return Prediction(x0, made.eps, made.variance_fraction) if self.eps_kept else made.with_x0(x0, x, level)


def as_planned(denoise: AnyDenoiser, plan: BasePlan[Any]) -> AnyDenoiser:
    """The denoiser that a plan runs: its x_0 through the plan's own hook, such as clipping, where there is one."""
    return Hooked(denoise, plan.hook, plan.eps_kept, checked=False) if plan.hook else denoise
