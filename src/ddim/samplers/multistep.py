"""Multistep samplers: a polynomial through past predictions, integrated exactly over each step.

With v_ = noise / signal, the DDIM ODE can be written in three forms, with eps, x_0 or v on the right-hand side:

    d (x / signal) = eps d v_        d (x / noise) = x0 d (1 / v_)        d x = x0 d signal + eps d noise

With the polynomial of degree below the order through the newest predictions, in a coordinate c, a step is

    x_next = X x + sum_j (integral of L_j(c) d m) prediction_j,    L_j(c) the Lagrange polynomials of the past levels,

where m is the measure on the right-hand side. Order 1 is DDIM in all three forms, and all orders are exact if x_0 and
eps are constant. The third form is v-prediction with each past v rotated along its own straight line.

| sampler            | quantity | coordinate | weights                                                              |
|--------------------|----------|------------|----------------------------------------------------------------------|
| `adams_bashforth`  | any      | any        | exact                                                                |
| `deis`             | eps      | log-snr    | exact (log-rho of Zhang & Chen 2023; `ratio` is their rho-AB)        |
| `dpm_solver_pp` 2  | x0       | log-snr    | those of the value at the middle of the step (2M of Lu et al. 2022)  |
| `dpm_solver_pp` 3  | x0       | log-snr    | exact                                                                |
| `unipc`            | x0       | log-snr    | as `dpm_solver_pp`, and a corrector without network evaluations      |
| `ipndm`            | eps      | -          | those of even spacing, on any levels (2022 code of Zhang & Chen)     |
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np

from ddim.errors import DdimError
from ddim.plan.plan import Plan
from ddim.plan.row import Row
from ddim.process.schedule import Level
from ddim.samplers.ddim import ddim

Quantity = Literal["eps", "x0", "v"]
Coordinate = Literal["ratio", "log-snr", "angle"]

NATURAL: dict[Quantity, Coordinate] = {"eps": "ratio", "x0": "log-snr", "v": "angle"}
EVEN = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
_COORDINATES: dict[str, Callable[[Level], float]] = {
    "ratio": lambda level: level.ratio,
    "log-snr": lambda level: level.log_snr,
    "angle": lambda level: level.angle,
}


def adams_bashforth(
    levels: Sequence[Level],
    order: int = 2,
    quantity: Quantity = "eps",
    coordinate: Coordinate | None = None,
    clean_as: Level | None = None,
    about: str = "",
) -> Plan:
    """Adams-Bashforth methods on any levels: the polynomial through the newest `order` predictions, exactly integrated.

    The first steps have fewer past predictions and lower order. From T this does not matter, because eps hardly changes
    there; a run that starts elsewhere, such as encoding, converges with order 2 unless its first steps are shorter than
    the others. A step also has lower order if the coordinate is infinite at one of its ends (to clean data in log-snr;
    from zero terminal SNR except in angle), and predictions at such levels are omitted from later polynomials.

    Args:
        levels: S + 1 levels, the start first; falling, or rising to encode.
        order: 1 (which is DDIM) to 4.
        quantity: The extrapolated prediction: "eps", "x0" or "v".
        coordinate: The variable of the polynomial: "ratio" (noise / signal), "log-snr" or "angle"; by default the one
            in which the quantity's ODE is simplest: ratio for eps, log-snr for x0, angle for v.
        clean_as: As for `ddim`: the level passed to the network for clean data when encoding starts at t = 0.
        about: Settings to add to the plan's name.

    Returns:
        A checked plan of S rows.

    Raises:
        DdimError: If the order, quantity or coordinate is unknown, there are no steps, or levels neither fall nor rise
            throughout.
    """
    _check_choice("order", order, (1, 2, 3, 4))
    _check_choice("quantity", quantity, tuple(NATURAL))
    coordinate = coordinate or NATURAL[quantity]
    _check_choice("coordinate", coordinate, tuple(_COORDINATES))
    rows = _rows(levels, order, quantity, coordinate, clean_as)
    return _plan("adams-bashforth", rows, about, f"order={order}, {quantity} in {coordinate}")


def deis(
    levels: Sequence[Level],
    order: int = 3,
    coordinate: Coordinate = "log-snr",
    clean_as: Level | None = None,
    about: str = "",
) -> Plan:
    """DEIS (Zhang & Chen 2023): eps extrapolated in log(noise / signal), or in noise / signal with "ratio".

    Their variant with a polynomial in t depends on how a schedule numbers its timesteps, and is not implemented.
    Returns and raises as `adams_bashforth`.

    Args:
        levels: As for `adams_bashforth`.
        order: 1 to 4; the paper counts from 0.
        coordinate: "log-snr", "ratio" or "angle".
        clean_as: As for `adams_bashforth`.
        about: Settings to add to the plan's name.
    """
    plan = adams_bashforth(levels, order, "eps", coordinate, clean_as)
    return _plan("deis", plan.rows, about, f"order={order}" + (f", in {coordinate}" if coordinate != "log-snr" else ""))


def dpm_solver_pp(levels: Sequence[Level], order: int = 2, clean_as: Level | None = None, about: str = "") -> Plan:
    """DPM-Solver++ multistep (Lu et al. 2022): x0 extrapolated in the log-SNR.

    Order 2 is their 2M: the prediction extrapolated to the middle of the step and constant over it,
    x0 + (x0 - x0_1) / (2 r) with r = h_1 / h. Order 3, whose second step is 2M, integrates the parabola exactly; the 3M
    of their code has half of its second difference and is of order 2. Returns and raises as `adams_bashforth`.

    Args:
        levels: As for `adams_bashforth`.
        order: 2 or 3.
        clean_as: As for `adams_bashforth`.
        about: Settings to add to the plan's name.
    """
    _check_choice("order", order, (2, 3))
    rows = _rows(levels, order, "x0", "log-snr", clean_as, midpoint=True)
    return _plan("dpm++", rows, about, f"{order}M")


def unipc(levels: Sequence[Level], order: int = 3, clean_as: Level | None = None, about: str = "") -> Plan:
    """UniPC (Zhao et al. 2023, B2): the predictor of `dpm_solver_pp` and a corrector without network evaluations.

    The prediction at a new state is added to the nodes of the step that led there, and the state is corrected by the
    difference before the next step; one row does both. The last state is not corrected. Returns and raises as
    `adams_bashforth`.

    Args:
        levels: As for `adams_bashforth`.
        order: The order of the predictor, 2 or 3. The corrector, and so the sampler, has one order more (but order 3
            for both if the low order of the first steps matters, see `adams_bashforth`).
        clean_as: As for `adams_bashforth`.
        about: Settings to add to the plan's name.
    """
    _check_choice("order", order, (2, 3))
    rows: list[Row] = []
    steps = [*_steps(levels, order, "log-snr", clean_as)]
    for k, (row, nodes) in enumerate(steps):
        if not nodes:
            rows.append(row)
            continue
        keep = row.next.noise / row.now.noise
        weights = _weights(row, nodes, "x0", "log-snr", midpoint=True)["x0"]
        previous, previous_nodes = steps[k - 1] if k else (row, [])
        change = [keep * weight for weight in _correction(previous, previous_nodes)]
        rows.append(Row(row.now, row.next, x=(keep,), x0=tuple(_add(weights, change))))
    return _plan("unipc", tuple(rows), about, f"order={order}")


def ipndm(levels: Sequence[Level], order: int = 4, clean_as: Level | None = None, about: str = "") -> Plan:
    """iPNDM (the code of Zhang & Chen 2023): eps extrapolated as if the levels were evenly spaced in noise / signal.

    On evenly spaced levels it is Adams-Bashforth; on others it converges with order 2 for every `order`, but is among
    the best at few steps. Returns and raises as `adams_bashforth`.

    Args:
        levels: As for `adams_bashforth`; all except the first with signal.
        order: 1 to 4.
        clean_as: As for `adams_bashforth`.
        about: Settings to add to the plan's name.
    """
    _check_choice("order", order, tuple(EVEN))
    rows = []
    for row, nodes in _steps(levels, order, "ratio", clean_as):
        if len(nodes) > 1:
            step = row.next.ratio - row.now.ratio
            row = _row(row, {"eps": [step * row.next.signal * weight for weight in EVEN[len(nodes)]]})
        rows.append(row)
    return _plan("ipndm", tuple(rows), about, f"order={order}")


def _rows(
    levels: Sequence[Level],
    order: int,
    quantity: Quantity,
    coordinate: Coordinate,
    clean_as: Level | None,
    midpoint: bool = False,
) -> tuple[Row, ...]:
    return tuple(
        _row(row, _weights(row, nodes, quantity, coordinate, midpoint)) if len(nodes) > 1 else row
        for row, nodes in _steps(levels, order, coordinate, clean_as)
    )


def _steps(
    levels: Sequence[Level], order: int, coordinate: Coordinate, clean_as: Level | None
) -> Iterator[tuple[Row, list[Level]]]:
    """The rows of DDIM, each with the nodes of its polynomial: the levels of at most `order` past predictions.

    Nodes are listed newest first. There are none if the coordinate is infinite at either end of the step. The list ends
    before a prediction on clean data (evaluated at another level), or one whose coordinate rounds to that of a node
    already listed.
    """
    rows = ddim(levels, clean_as=clean_as).rows
    place = _COORDINATES[coordinate]
    for k, row in enumerate(rows):
        nodes: list[Level] = []
        for past in rows[k::-1][:order]:
            at = place(past.now)
            if not math.isfinite(at) or past.at is not None or at in map(place, nodes):
                break
            nodes.append(past.now)
        yield row, nodes if math.isfinite(place(row.next)) else []


def _weights(
    row: Row, nodes: Sequence[Level], quantity: Quantity, coordinate: Coordinate, midpoint: bool = False
) -> dict[str, list[float]]:
    """The weights of the predictions in a step: the integrals of the nodes' Lagrange polynomials, by quantity.

    The measure is noise / signal for eps and signal / noise for x0 (times signal and noise at the step's end); the two
    parts of v are integrated over signal and noise. With `midpoint`, two nodes give the weights of 2M.
    """
    now, end, place = row.now, row.next, _COORDINATES[coordinate]
    if quantity == "v":
        u, du = _gauss(now.angle, end.angle)
        along = _lagrange(place, nodes, [Level(0.0, -2 * math.log(math.tan(angle))) for angle in u])
        return {"x0": list(along @ (-np.sin(u) * du)), "eps": list(along @ (np.cos(u) * du))}
    if midpoint and len(nodes) == 2:
        whole = end.signal - now.signal * end.noise / now.noise
        half = whole * (end.log_snr - now.log_snr) / (now.log_snr - nodes[1].log_snr) / 2
        return {quantity: [whole + half, -half]}
    sign, scale = (-1, end.signal) if quantity == "eps" else (1, end.noise)
    if scale == 0:  # the measure is infinite at the step's end, so all the weight is on the value there
        return {quantity: list(_lagrange(place, nodes, [end])[:, 0])}
    if (coordinate == "ratio" and quantity == "eps") or math.isinf(end.log_snr):
        u, du = _gauss(math.exp(sign * now.log_snr / 2), math.exp(sign * end.log_snr / 2))
        along = _lagrange(place, nodes, [Level(0.0, sign * 2 * math.log(value)) for value in u])
        return {quantity: list(along @ (scale * du))}
    u, du = _gauss(now.log_snr, end.log_snr)
    along = _lagrange(place, nodes, [Level(0.0, value) for value in u])
    return {quantity: list(along @ (scale * sign / 2 * np.exp(sign * u / 2) * du))}


def _correction(row: Row, nodes: Sequence[Level]) -> list[float]:
    """The UniC correction of a step's result: weights of the prediction there and of the predictions at the nodes."""
    if not nodes:
        return []
    predictor = _weights(row, nodes, "x0", "log-snr", midpoint=True)["x0"]
    if len(nodes) == 1:
        return [predictor[0] / 2, -predictor[0] / 2]
    return _add(_weights(row, [row.next, *nodes], "x0", "log-snr")["x0"], [0.0, *(-weight for weight in predictor)])


def _add(first: Sequence[float], second: Sequence[float]) -> list[float]:
    return [a + b for a, b in itertools.zip_longest(first, second, fillvalue=0.0)]


def _lagrange(place: Callable[[Level], float], nodes: Sequence[Level], levels: Sequence[Level]) -> np.ndarray:
    """The Lagrange polynomials of the nodes, evaluated at levels: float64, (nodes, levels)."""
    at, points = np.array([place(level) for level in levels]), [place(node) for node in nodes]
    out = np.ones((len(nodes), len(at)))
    for j, i in itertools.permutations(range(len(nodes)), 2):
        out[j] *= (at - points[i]) / (points[j] - points[i])
    return out


def _gauss(first: float, last: float) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre nodes and weights between two numbers."""
    u, weights = _legendre()
    return first + (last - first) * (u + 1) / 2, weights * (last - first) / 2


@functools.cache
def _legendre() -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(64)


def _row(row: Row, weights: dict[str, list[float]]) -> Row:
    """The step of a row with the given weights of predictions; the weight of the state follows from the ODE's form."""
    now, end = row.now, row.next
    keep = 1.0 if len(weights) == 2 else end.noise / now.noise if "x0" in weights else end.signal / now.signal
    x0, eps = (tuple(float(value) for value in weights.get(name, ())) for name in ("x0", "eps"))
    return Row(now, end, x=(keep,), x0=x0, eps=eps)


def _plan(name: str, rows: tuple[Row, ...], about: str, setting: str) -> Plan:
    encode = "encode" if rows[-1].next.log_snr < rows[0].now.log_snr else ""
    return Plan(name, rows, about=", ".join(part for part in (about, setting, encode) if part)).check()


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise DdimError(f"{name} {value!r}", "is unknown", f"choose one of {', '.join(map(str, choices))}")
