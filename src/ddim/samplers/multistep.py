"""Multistep plans: a polynomial through past predictions, integrated exactly over the step.

DDIM's ODE can be written with each of the three things a network may predict on its right-hand side, v_ = noise/signal:

    d (x / signal) = eps d v_        d (x / noise) = x0 d (1 / v_)        d x = x0 d signal + eps d noise

so with a polynomial p_j of degree below the order through the newest predictions, in a coordinate c of one's choice,

    x_next = X x + sum_j (integral of L_j(c) d m) prediction_j,    L_j(c) Lagrange's polynomials of the past levels,

with m the measure above. Order 1 is DDIM in all of them, and all are exact where x_0 and eps are constant. The third
one is v-prediction with each past v turned along as it would turn on its own straight line.

| sampler            | quantity | coordinate | weights                                                              |
|--------------------|----------|------------|----------------------------------------------------------------------|
| `adams_bashforth`  | any      | any        | exact                                                                |
| `deis`             | eps      | log-snr    | exact (log-rho of Zhang & Chen 2023; `ratio` is their rho-AB)        |
| `dpm_solver_pp` 2  | x0       | log-snr    | the slope held from the middle of the step (2M of Lu et al. 2022)    |
| `dpm_solver_pp` 3  | x0       | log-snr    | exact                                                                |
| `unipc`            | x0       | log-snr    | exact but for order 2's, and a corrector that costs no call          |
| `ipndm`            | eps      | -          | those of evenly spaced times, on any grid (Zhang & Chen, 2022 code)  |
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
    """The polynomial through the newest `order` predictions, integrated exactly: explicit Adams methods on any grid.

    The first steps, which have fewer predictions behind them, are of lower order. From T that is not felt, for there
    eps hardly changes; a run that starts elsewhere, as one that encodes does, is of order 2 as steps get finer unless
    its first steps are shorter than the others. Of lower order is a step, too, that touches a level at which the
    coordinate is infinite (to clean data in log-snr; from zero terminal SNR but for angle), and predictions made
    there are left out of later polynomials.

    Args:
        levels: S + 1 levels, the start first; falling, or rising to encode.
        order: 1 (which is DDIM) to 4.
        quantity: What is extrapolated: "eps", "x0" or "v".
        coordinate: In what it is a polynomial: "ratio" (noise / signal), "log-snr" or "angle"; by default the one in
            which the quantity's ODE is plainest: ratio for eps, log-snr for x0, angle for v.
        clean_as: As for `ddim`: the level the network is told for clean data, when encoding starts at t = 0.
        about: Settings to add to the plan's name.

    Returns:
        A checked plan of S rows.

    Raises:
        DdimError: If the order, quantity or coordinate is unknown, there are no steps, or levels do not fall or rise.
    """
    _known("order", order, (1, 2, 3, 4))
    _known("quantity", quantity, tuple(NATURAL))
    inside = coordinate or NATURAL[quantity]
    _known("coordinate", inside, tuple(_COORDINATES))
    rows = _rows(levels, order, quantity, inside, clean_as)
    return _plan("adams-bashforth", rows, about, f"order={order}, {quantity} in {inside}")


def deis(
    levels: Sequence[Level],
    order: int = 3,
    coordinate: Coordinate = "log-snr",
    clean_as: Level | None = None,
    about: str = "",
) -> Plan:
    """DEIS (Zhang & Chen 2023): eps extrapolated in log(noise / signal), or in noise / signal with "ratio".

    Their polynomial in t itself depends on how a schedule counts its times, and is not here.

    Args:
        levels: As for `adams_bashforth`, as for the rest.
        order: 1 to 4; theirs counts from 0.
        coordinate: "log-snr", "ratio" or "angle".
        clean_as: The level the network is told for clean data.
        about: Settings to add to the plan's name.
    """
    plan = adams_bashforth(levels, order, "eps", coordinate, clean_as)
    return _plan("deis", plan.rows, about, f"order={order}" + (f", in {coordinate}" if coordinate != "log-snr" else ""))


def dpm_solver_pp(levels: Sequence[Level], order: int = 2, clean_as: Level | None = None, about: str = "") -> Plan:
    """DPM-Solver++ multistep (Lu et al. 2022): x0 extrapolated in the log-SNR.

    Order 2 is their 2M: the prediction extrapolated to the middle of the step and held, x0 + (x0 - x0_1) / (2 r) with
    r = h_1 / h. Order 3, begun with such a step, integrates the parabola exactly; their code's 3M has half of its
    second difference, and is of order 2.

    Args:
        levels: As for `adams_bashforth`, as for the rest.
        order: 2 or 3.
        clean_as: The level the network is told for clean data.
        about: Settings to add to the plan's name.
    """
    _known("order", order, (2, 3))
    rows = _rows(levels, order, "x0", "log-snr", clean_as, held=True)
    return _plan("dpm++", rows, about, f"{order}M")


def unipc(levels: Sequence[Level], order: int = 3, clean_as: Level | None = None, about: str = "") -> Plan:
    """UniPC (Zhao et al. 2023, B2): a predictor as of `dpm_solver_pp`, and a corrector that costs no call.

    The prediction made at a predicted state is also put among the nodes of the step that led there, and the state
    corrected by the difference before it goes on; the next row holds both. The last state is not corrected.

    Args:
        levels: As for `adams_bashforth`, as for the rest.
        order: Of the predictor, 2 or 3; the corrector's, and so the sampler's, is one more (but 3 for both where the
            first steps, see `adams_bashforth`, are felt).
        clean_as: The level the network is told for clean data.
        about: Settings to add to the plan's name.
    """
    _known("order", order, (2, 3))
    rows: list[Row] = []
    steps = [*_steps(levels, order, "log-snr", clean_as)]
    for k, (row, nodes) in enumerate(steps):
        if not nodes:
            rows.append(row)
            continue
        keep = row.next.noise / row.now.noise
        weights = _weights(row, nodes, "x0", "log-snr", held=True)["x0"]
        before, behind = steps[k - 1] if k else (row, [])
        change = [keep * weight for weight in _correction(before, behind)]
        rows.append(Row(row.now, row.next, x=(keep,), x0=tuple(_add(weights, change))))
    return _plan("unipc", tuple(rows), about, f"order={order}")


def ipndm(levels: Sequence[Level], order: int = 4, clean_as: Level | None = None, about: str = "") -> Plan:
    """iPNDM (the code of Zhang & Chen 2023): eps extrapolated as if the levels were even in noise / signal.

    On levels that are even it is Adams-Bashforth; on others it is of order 2 as they get finer, whatever `order` says,
    and yet at few steps among the best.

    Args:
        levels: As for `adams_bashforth`, as for the rest; with signal but for the first.
        order: 1 to 4.
        clean_as: The level the network is told for clean data.
        about: Settings to add to the plan's name.
    """
    _known("order", order, tuple(EVEN))
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
    held: bool = False,
) -> tuple[Row, ...]:
    return tuple(
        _row(row, _weights(row, nodes, quantity, coordinate, held)) if len(nodes) > 1 else row
        for row, nodes in _steps(levels, order, coordinate, clean_as)
    )


def _steps(
    levels: Sequence[Level], order: int, coordinate: Coordinate, clean_as: Level | None
) -> Iterator[tuple[Row, list[Level]]]:
    """DDIM's rows, each with the levels of the predictions a polynomial may go through, newest first, at most `order`.

    None, where the coordinate is infinite at the step's end or start; a prediction on clean data, made at a level the
    network was told instead, is not one to go through, nor is one whose coordinate, rounded, is that of another.
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
    row: Row, nodes: Sequence[Level], quantity: Quantity, coordinate: Coordinate, held: bool = False
) -> dict[str, list[float]]:
    """The integrals over a row's step of each node's polynomial, by quantity: of eps over noise / signal, of x0 over
    signal / noise (times signal and noise at the step's end), of v's two parts over signal and noise."""
    now, end, place = row.now, row.next, _COORDINATES[coordinate]
    if quantity == "v":
        u, du = _gauss(now.angle, end.angle)
        along = _lagrange(place, nodes, [Level(0.0, -2 * math.log(math.tan(angle))) for angle in u])
        return {"x0": list(along @ (-np.sin(u) * du)), "eps": list(along @ (np.cos(u) * du))}
    if held and len(nodes) == 2:
        whole = end.signal - now.signal * end.noise / now.noise
        half = whole * (end.log_snr - now.log_snr) / (now.log_snr - nodes[1].log_snr) / 2
        return {quantity: [whole + half, -half]}
    sign, scale = (-1, end.signal) if quantity == "eps" else (1, end.noise)
    if scale == 0:  # the measure is infinite there: all its weight is on the step's end
        return {quantity: list(_lagrange(place, nodes, [end])[:, 0])}
    if (coordinate == "ratio" and quantity == "eps") or math.isinf(end.log_snr):
        u, du = _gauss(math.exp(sign * now.log_snr / 2), math.exp(sign * end.log_snr / 2))
        along = _lagrange(place, nodes, [Level(0.0, sign * 2 * math.log(value)) for value in u])
        return {quantity: list(along @ (scale * du))}
    u, du = _gauss(now.log_snr, end.log_snr)
    along = _lagrange(place, nodes, [Level(0.0, value) for value in u])
    return {quantity: list(along @ (scale * sign / 2 * np.exp(sign * u / 2) * du))}


def _correction(row: Row, nodes: Sequence[Level]) -> list[float]:
    """What UniC adds to the state a step made: weights of the prediction there and of those the step was made with."""
    if not nodes:
        return []
    made = _weights(row, nodes, "x0", "log-snr", held=True)["x0"]
    if len(nodes) == 1:
        return [made[0] / 2, -made[0] / 2]
    return _add(_weights(row, [row.next, *nodes], "x0", "log-snr")["x0"], [0.0, *(-weight for weight in made)])


def _add(first: Sequence[float], second: Sequence[float]) -> list[float]:
    return [a + b for a, b in itertools.zip_longest(first, second, fillvalue=0.0)]


def _lagrange(place: Callable[[Level], float], nodes: Sequence[Level], levels: Sequence[Level]) -> np.ndarray:
    """Lagrange's polynomials of the nodes at some levels: float64, (nodes, levels)."""
    at, known = np.array([place(level) for level in levels]), [place(node) for node in nodes]
    out = np.ones((len(nodes), len(at)))
    for j, i in itertools.permutations(range(len(nodes)), 2):
        out[j] *= (at - known[i]) / (known[j] - known[i])
    return out


def _gauss(first: float, last: float) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre nodes and weights between two numbers."""
    u, weights = _legendre()
    return first + (last - first) * (u + 1) / 2, weights * (last - first) / 2


@functools.cache
def _legendre() -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(64)


def _row(row: Row, weights: dict[str, list[float]]) -> Row:
    """The step with its polynomial's weights in place of DDIM's; the state keeps what the measure leaves of it."""
    now, end = row.now, row.next
    keep = 1.0 if len(weights) == 2 else end.noise / now.noise if "x0" in weights else end.signal / now.signal
    x0, eps = (tuple(float(value) for value in weights.get(name, ())) for name in ("x0", "eps"))
    return Row(now, end, x=(keep,), x0=x0, eps=eps)


def _plan(name: str, rows: tuple[Row, ...], about: str, setting: str) -> Plan:
    encode = "encode" if rows[-1].next.log_snr < rows[0].now.log_snr else ""
    return Plan(name, rows, about=", ".join(part for part in (about, setting, encode) if part)).check()


def _known(what: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise DdimError(f"{what} {value!r}", "is unknown", f"choose one of {', '.join(map(str, choices))}")
