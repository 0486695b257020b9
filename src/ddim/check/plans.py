"""Checks of a plan: the exactness of its rows, its marginals, its end and its order of convergence."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ddim import samplers
from ddim.check.convergence import gaussian_error, order, refined
from ddim.check.finding import Finding, at_most, between, info, largest, skipped
from ddim.errors import DdimError
from ddim.plan.plan import TOLERANCE, Plan
from ddim.plan.row import Row
from ddim.process.schedule import Level, Schedule

NFE = 100


def plan(plan: Plan, schedule: Schedule | None = None) -> Iterator[Finding]:
    """Verify a plan, which need not have passed `Plan.check`.

    Args:
        plan: The plan.
        schedule: The schedule that its levels must come from; not checked if None.

    Yields:
        One finding per check; only the first one if there are no rows.
    """
    if not plan.rows:
        yield Finding("network evaluations", 0.0, ">= 1", False, "the plan has no rows")
        return
    yield info("network evaluations", str(plan.nfe), plan.name)
    yield _connected(plan)
    if schedule is not None:
        yield _on_schedule(plan, schedule)
    yield _end(plan)
    yield from _straight(plan)
    yield _sigma_range(plan)
    yield from _marginals(plan)
    yield from _flow(plan)


def _where(row: Row) -> str:
    return f"t = {row.now.t:g} to {row.next.t:g}"


def _largest(plan: Plan, off: list[float]) -> str:
    """A note that names the row with the largest deviation."""
    at = int(np.argmax(off))
    return f"largest in row {at} ({_where(plan.rows[at])})" if off[at] else "in every row"


def _connected(plan: Plan) -> Finding:
    broken = [
        f"row {k} ({_where(row)})"
        for k, row in enumerate(plan.rows)
        if len(row.x) > k + 1 + len(plan.before)
        or max(len(row.x0), len(row.eps)) > k + 1
        or (k and plan.rows[k - 1].next != row.now)
    ]
    note = f"first {broken[0]}" if broken else "each row starts where the last one ended"
    return at_most("disconnected rows", len(broken), 0, note)


def _on_schedule(plan: Plan, schedule: Schedule) -> Finding:
    try:
        plan.check_schedule(schedule)
    except DdimError as error:
        return Finding(f"levels of {schedule.name}", "differ", "equal", False, error.problem)
    return Finding(f"levels of {schedule.name}", "equal", "equal", True, "log-SNR of every time")


def _falling(plan: Plan) -> bool:
    return plan.end.log_snr > plan.start.log_snr


def _end(plan: Plan) -> Finding:
    levels = f"from t = {plan.start.t:g}, alpha_bar {plan.start.alpha_bar:.3g}, to {plan.end.alpha_bar:.3g}"
    if _falling(plan):
        clean = plan.end.t == 0 and plan.end.variance == 0
        return Finding("ends at", f"t = {plan.end.t:g}", "t = 0", clean, levels)
    return info("ends at", f"t = {plan.end.t:g}", f"{levels}; it encodes")


def _straight(plan: Plan) -> Iterator[Finding]:
    """Check each row on x_t = signal x_0 + noise eps with constant x_0 and eps, relative to the size of its terms."""
    errors = [[off / row.size for off in plan.line_error(k)] for k, row in enumerate(plan.rows)]
    parts = [list(column) for column in zip(*errors, strict=True)]
    for name, off in zip(("x_0", "eps"), parts, strict=True):
        title = f"straight line, error in {name}"
        if name == "eps" and not plan.straight:
            yield info(title, largest(off), f"{_largest(plan, off)}; correct for small steps only")
        else:
            yield at_most(title, largest(off), TOLERANCE, _largest(plan, off))


def _sigma_range(plan: Plan) -> Finding:
    """Check that sigma^2 is within 0..1 - abar_next, and so 0 if the next level is clean."""
    parts, name = [], "sigma^2 / (1 - abar)"
    for row in plan.rows:
        if min(row.sigma, row.z) < 0:
            note = f"sigma = {row.sigma:.3g}, z = {row.z:.3g} at {_where(row)}"
            return Finding(name, "negative", "<= 1", False, note)
        limit = row.next.variance
        parts.append(row.sigma**2 / limit if limit else math.inf if row.sigma else 0.0)
    worst = largest(parts)
    note = _largest(plan, parts) if worst else "sigma is 0 in every row"
    return Finding(name, worst, "<= 1", worst <= 1 + TOLERANCE, note)


def _marginals(plan: Plan) -> Iterator[Finding]:
    """Lemma 1 along the plan: with the true x_0 as the prediction, x_t | x_0 is N(signal x_0, 1 - abar_t) throughout.

    Each state is represented by its coefficients on x_0, the initial noise and the noise of each row.
    """
    basis = np.eye(2, len(plan) + 2)
    initial = [level.signal * basis[0] + level.noise * basis[1] for level in (plan.start, *plan.before)]
    states = deque(initial, maxlen=max(plan.memory, len(initial)))
    noises: deque[np.ndarray] = deque(maxlen=plan.memory)
    mean, off, sizes = [], [], [1.0]
    for k, row in enumerate(plan.rows):
        # At clean data any predicted noise is consistent: use the noise that the path leads to.
        predicted = (states[0] - row.now.signal * basis[0]) / row.now.noise if row.now.noise else basis[1]
        noises.appendleft(predicted)
        after = sum(row.x0) * basis[0]
        for weights, vectors in ((row.x, states), (row.eps, noises)):
            for weight, vector in zip(weights, vectors, strict=False):
                after = after + weight * vector
        after[k + 2] += row.z
        states.appendleft(after)
        sizes.append(max(sizes[-1], row.size))  # the rounding error of a large row stays in later states
        mean.append(abs(after[0] - row.next.signal) / sizes[-1])
        off.append(abs(float(after[1:] @ after[1:]) - row.next.variance))
    yield at_most("marginals, error of the mean", largest(mean), TOLERANCE, "Lemma 1, with the true x_0 as prediction")
    if plan.keeps_marginals and plan.straight:
        off = [value / size for value, size in zip(off, sizes[1:], strict=True)]
        yield at_most("marginals, error of the variance", largest(off), TOLERANCE, _largest(plan, off))
    else:
        why = "its noise has another sigma than its mean" if plan.straight else "correct for small steps only"
        yield info("marginals, error of the variance", largest(off), f"{_largest(plan, off)}; {why}")


def _flow(plan: Plan) -> Iterator[Finding]:
    """Measure the distance from the exact ODE solution on Gaussian data, and the order of convergence."""
    names = "error on exact Gaussian data", "order of convergence"
    if plan.stochastic:
        yield from (skipped(name, "the plan adds noise, so there is no single path") for name in names)
        return
    yield info(names[0], gaussian_error(plan), _compared(plan))
    rebuilt = _rebuilt(plan)
    if rebuilt is None:
        yield skipped(names[1], "this sampler cannot be rebuilt with more steps from its table")
        return
    levels, make = rebuilt
    parts = max(1, math.ceil(NFE / plan.nfe))
    measured = order(make, refined(levels, parts * 2), refined(levels, parts * 4))
    note = f"S = {plan.nfe * parts * 2} to {plan.nfe * parts * 4}, its steps split into equal rotations"
    if plan.straight:
        yield between(names[1], measured, 0.85, 1.15, note)
    else:  # the long first steps are not in the asymptotic regime yet
        yield Finding(names[1], measured, ">= 0.85", measured >= 0.85, note)


def _compared(plan: Plan) -> str:
    """A note with the error of plain DDIM on the same levels."""
    visited = {level.log_snr: level for row in plan.rows for level in (row.now, row.next)}
    levels = [visited[key] for key in sorted(visited, reverse=not _falling(plan))]
    try:
        plain = samplers.ddim(levels, clean_as=plan.rows[0].at)
    except DdimError:
        return "root mean square"
    if plain.nfe == plan.nfe and all(_same(*pair) for pair in zip(plan.rows, plain.rows, strict=True)):
        return "root mean square; the rows are those of plain DDIM"
    return f"root mean square; plain DDIM on the same levels, {plain.nfe} NFE: {gaussian_error(plain):.3g}"


def _rebuilt(plan: Plan) -> tuple[list[Level], Callable[[Sequence[Level]], Plan]] | None:
    """The plan's levels and the one-evaluation sampler that reproduces its rows from them, or None."""
    levels = [*(row.now for row in plan.rows), plan.end]
    makers: tuple[Callable[[Sequence[Level]], Plan], ...] = (
        lambda chosen: samplers.ddim(chosen, clean_as=plan.rows[0].at),
        samplers.probability_flow,
    )
    for make in makers:
        try:
            candidate = make(levels)
        except DdimError:
            continue
        if all(_same(*pair) for pair in zip(plan.rows, candidate.rows, strict=True)):
            return levels, make
    return None


def _same(row: Row, other: Row) -> bool:
    for these, others in ((row.x, other.x), (row.x0, other.x0), (row.eps, other.eps), ((row.z,), (other.z,))):
        for a, b in itertools.zip_longest(these, others, fillvalue=0.0):
            if not abs(a - b) <= TOLERANCE * (1 + abs(a)):
                return False
    return row.next == other.next
