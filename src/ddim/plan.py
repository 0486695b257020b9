"""The plan: a sampler as a small float64 table, which can be printed, checked, saved, inverted and run.

With states x_0 (where the run starts), x_1, ... and one network call per row, which gives the pair
(x0_k, eps_k) = prediction at x_k, row k says (x_{-1}, ... being states that a run may be given beside its start)

    x_{k+1} = sum_j X[j] x_{k-j}  +  sum_j P[j] x0_{k-j}  +  sum_j E[j] eps_{k-j}  +  z z_k,    z_k ~ N(0, I)

Since x = signal x0 + noise eps, the three kinds of weight overlap; they are kept apart so that each sampler stands
in the form its paper prints, and so that rows stay finite where there is no signal (zero terminal SNR).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass

from ddim.errors import DdimError
from ddim.plan_file import FORMAT, VERSION, read_plan, word
from ddim.schedule import Level, Schedule

TOLERANCE = 1e-9


@dataclass(frozen=True, slots=True)
class Row:
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
    """

    now: Level
    next: Level
    x: tuple[float, ...] = ()
    x0: tuple[float, ...] = ()
    eps: tuple[float, ...] = ()
    z: float = 0.0
    sigma: float = 0.0
    at: Level | None = None

    @property
    def query(self) -> Level:
        """The level the network is told."""
        return self.at or self.now

    @property
    def memory(self) -> int:
        """How many states or predictions, the newest included, the row looks at."""
        return max(len(self.x), len(self.x0), len(self.eps))

    @property
    def size(self) -> float:
        """What rounding is held against: a wrong weight shows against what is added up, not against the sum."""
        return 1 + max((abs(value) for value in (*self.x, *self.x0, *self.eps)), default=0.0)


@dataclass(frozen=True, slots=True)
class Plan:
    """A sampler: rows to be run in order.

    Args:
        sampler: What made it, for people: "ddim", "ddpm", ...
        rows: One per network call.
        clip_x0: Whether the predicted x_0 is clipped to [-1, 1], eps being derived again.
        keeps_marginals: False only for a plan that adds more noise than its kernel's sigma (sigma-hat, sigma optimal).
        about: The settings it was made from, for people and manifests.
        straight: False only for a plan that is right in the limit of small steps alone, such as Euler in dt.
        before: Levels of states older than the start, newest first, that a run must be given beside the start: two
            states are what a two-step plan goes back from, see `ddim.inversion`.
        lattice: If not 0, states are whole multiples of this power of two, in float64: a row's predictions are rounded
            to it and states enter with whole weights exactly, so that a sum can be undone to the last bit.
        made_for: The checksum of the model whose own paths it was fitted to, see `ddim.tuning`; "" for any model.
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
        """Whether any row adds noise."""
        return any(row.z > 0 for row in self.rows)

    @property
    def memory(self) -> int:
        """How many states or predictions must be kept."""
        return max(row.memory for row in self.rows)

    @property
    def name(self) -> str:
        """The sampler and its settings in one line."""
        return f"{self.sampler}({self.about})" if self.about else self.sampler

    def check(self) -> Plan:
        """The plan itself, if it is exact on straight lines and its variances are legal.

        On x_t = signal_t x_0 + noise_t eps with constant x_0 and eps, every row must give its next level's mean:
        sum X signal + sum P = signal_next and sum X noise + sum E = sqrt(noise_next^2 - sigma^2), with
        0 <= sigma^2 <= noise_next^2. Where `straight` is False only the first of the two sums must be right.

        Raises:
            DdimError: Naming the first row that fails and by how much.
        """
        if not self.rows:
            raise DdimError("plan", "holds no rows", "give at least one step")
        if not (self.lattice == 0 or (0 < self.lattice <= 1 and math.frexp(self.lattice)[0] == 0.5)):
            raise DdimError("plan", f"has lattice {self.lattice}", "give 0, or a power of two such as 2**-32")
        for k, row in enumerate(self.rows):
            where = f"plan row {k} (t = {row.now.t:g} to {row.next.t:g})"
            if k and self.rows[k - 1].next != row.now:
                raise DdimError(where, "does not start where the row before it ended", "mend the plan's levels")
            known = k + 1 + len(self.before)
            if len(row.x) > known or max(len(row.x0), len(row.eps)) > k + 1:
                raise DdimError(
                    where, f"looks back {row.memory - 1} states, there are {known - 1}", "shorten its weights"
                )
            numbers = (*row.x, *row.x0, *row.eps, row.z, row.sigma)
            named = (row.now, row.next, row.query, *self.before)
            numbers += tuple(value for at in named for value in (at.t, at.alpha_bar))
            if min(level.t for level in named) < 0:
                raise DdimError(where, "names a time before 0", "mend the plan's levels")
            if not all(math.isfinite(value) for value in numbers):
                raise DdimError(where, "holds a number that is not finite", "choose other times or another sampler")
            if row.sigma < 0 or row.z < 0 or row.sigma**2 > row.next.variance * (1 + TOLERANCE):
                limit = math.sqrt(row.next.variance)
                raise DdimError(where, f"sigma = {row.sigma:.6g} is outside 0..{limit:.6g}", "lower eta or sigma")
            if self.keeps_marginals and row.z != row.sigma:
                raise DdimError(where, f"adds noise {row.z:.6g}, its sigma is {row.sigma:.6g}", "make them equal")
            of_x0, of_eps = self.line_error(k)
            off = max(of_x0, of_eps) if self.straight else of_x0
            if off > TOLERANCE * row.size:
                raise DdimError(where, f"is off by {off:.3g} on a straight line", "mend its weights")
        return self

    def line_error(self, k: int) -> tuple[float, float]:
        """By how much row k misses x_0's and eps's part of a straight line, see `check`."""
        row, past = self.rows[k], [*(row.now for row in self.rows[k::-1]), *self.before]
        signal = sum(w * level.signal for w, level in zip(row.x, past, strict=False)) + sum(row.x0)
        noise = sum(w * level.noise for w, level in zip(row.x, past, strict=False)) + sum(row.eps)
        wanted = math.sqrt(max(row.next.variance - row.sigma**2, 0.0))
        return abs(signal - row.next.signal), abs(noise - wanted)

    def check_model(self, fingerprint: Callable[[], str]) -> Plan:
        """The plan itself, if it was made for the model of that checksum, or for any.

        Args:
            fingerprint: Gives the checksum; it is asked only where it matters.

        Raises:
            DdimError: If it was made for another model.
        """
        if self.made_for and self.made_for != fingerprint():
            wrong = f"was made for another model, {self.made_for[:12]}..."
            raise DdimError(f"plan {self.name}", wrong, "tune one for this model, or say --any-model")
        return self

    def _starts(self) -> str:
        return " and ".join(f"{level.t:g}" for level in (self.start, *self.before))

    def check_schedule(self, schedule: Schedule, to_clean: bool = False) -> Plan:
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

    def to_json(self) -> str:
        """The plan as JSON; floats keep all their digits."""
        named = [level for row in self.rows for level in (row.now, row.next, row.query)]
        levels = {(level.t, level.log_snr): None for level in (*named, *self.before)}
        places = {key: place for place, key in enumerate(levels)}

        def place(level: Level) -> int:
            return places[(level.t, level.log_snr)]

        rows = [
            {
                "now": place(row.now),
                "next": place(row.next),
                **({"at": place(row.at)} if row.at else {}),
                **{name: list(getattr(row, name)) for name in ("x", "x0", "eps") if getattr(row, name)},
                **{name: getattr(row, name) for name in ("z", "sigma") if getattr(row, name)},
            }
            for row in self.rows
        ]
        body = {
            "format": FORMAT,
            "version": VERSION,
            "sampler": self.sampler,
            "about": self.about,
            "clip_x0": self.clip_x0,
            "keeps_marginals": self.keeps_marginals,
            **({} if self.straight else {"straight": False}),
            **({"before": [place(level) for level in self.before]} if self.before else {}),
            **({"lattice": self.lattice} if self.lattice else {}),
            **({"made_for": self.made_for} if self.made_for else {}),
            "levels": [[t, word(log_snr)] for t, log_snr in levels],
            "rows": rows,
        }
        return json.dumps(body)

    @staticmethod
    def from_json(text: str, name: str = "plan", checked: bool = True) -> Plan:
        """A plan from its JSON, validated and checked.

        Args:
            text: What `to_json` wrote.
            name: The file's name, for messages.
            checked: Whether it must pass `check`; False for who is going to look what is wrong with it.

        Raises:
            DdimError: If it is not a plan of this version, or fails `check`.
        """
        file = read_plan(text, name)
        levels = [Level(t, float(log_snr)) for t, log_snr in file.levels]
        try:
            rows = tuple(
                Row(
                    now=levels[row.now],
                    next=levels[row.next],
                    x=row.x,
                    x0=row.x0,
                    eps=row.eps,
                    z=row.z,
                    sigma=row.sigma,
                    at=None if row.at is None else levels[row.at],
                )
                for row in file.rows
            )
            before = tuple(levels[place] for place in file.before)
        except IndexError:
            raise DdimError(name, "a row names a level that is not there", "write it again") from None
        flags = (file.clip_x0, file.keeps_marginals, file.about, file.straight, before, file.lattice, file.made_for)
        plan = Plan(file.sampler, rows, *flags)
        return plan.check() if checked else plan

    def __str__(self) -> str:
        title = f"{self.name}: {self.calls} network calls" + (", x0 clipped to [-1, 1]" if self.clip_x0 else "")
        title += "" if self.straight else ", not exact on straight lines"
        title += f", from the states at t = {self._starts()}" if self.before else ""
        title += f", states on multiples of {self.lattice:g}" if self.lattice else ""
        columns = [
            ("from", [_time(row.now, row.at) for row in self.rows]),
            ("to", [f"{row.next.t:g}" for row in self.rows]),
            ("alpha_bar", [f"{row.now.alpha_bar:.6f}" for row in self.rows]),
            ("alpha_bar next", [f"{row.next.alpha_bar:.6f}" for row in self.rows]),
            ("sigma", [f"{row.sigma:.6f}" for row in self.rows]),
        ]
        for kind in ("x", "x0", "eps"):
            width = max(len(getattr(row, kind)) for row in self.rows)
            for j in range(width):
                cells = [_cell(getattr(row, kind), j) for row in self.rows]
                columns.append((f"{kind}[-{j}]" if j else kind, cells))
        columns.append(("z", [f"{row.z:.6f}" if row.z else "." for row in self.rows]))
        widths = [max(len(head), *(len(cell) for cell in cells)) for head, cells in columns]
        lines = ["  ".join(head.rjust(width) for (head, _), width in zip(columns, widths, strict=True))]
        for k in range(len(self.rows)):
            lines.append("  ".join(cells[k].rjust(width) for (_, cells), width in zip(columns, widths, strict=True)))
        return "\n".join([title, *lines])


def _time(level: Level, at: Level | None) -> str:
    return f"{level.t:g}" + (f" (as {at.t:g})" if at else "")


def _cell(weights: tuple[float, ...], j: int) -> str:
    return f"{weights[j]:.6f}" if j < len(weights) else "."
