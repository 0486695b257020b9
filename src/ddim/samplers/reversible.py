"""Exactly invertible samplers, and the encoding that evaluates the network at the level at the end of each step.

Two-step plans use two states and one prediction, x_{k+1} = a x_k + b x_{k-1} + P x0_k + E eps_k. All terms except
that of x_{k-1} depend on x_k only, so x_{k-1} can be computed from x_k and x_{k+1}: `ddim.inversion.reverse`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ddim.errors import DdimError
from ddim.plan.plan import Plan
from ddim.plan.row import Row
from ddim.process.schedule import Level
from ddim.samplers.ddim import ddim

BUDGET = 1e-2


def bdia(levels: Sequence[Level], gamma: float | None = None, lattice: float = 0.0, about: str = "") -> Plan:
    """BDIA (Zhang, Lewis and Kleijn 2023): x_n = gamma (x_p - DDIM_{i to p}(x_i)) + DDIM_{i to n}(x_i).

    p, i, n are three consecutive levels. The first step is plain DDIM. With gamma = 1 and equal rotations it is the
    leapfrog method in the angle, and of order 2 if step sizes change smoothly. Two-step methods have errors of
    alternating sign, which shrink by gamma at each sampling step and grow by 1 / gamma at each encoding step: gamma = 1
    leaves them undamped, and a smaller gamma gives larger latents.

    Args:
        levels: S + 1 falling levels, the start first; zero signal is allowed.
        gamma: In (0, 1]. By default 10^(-2 / S), so that gamma^S = 1/100, or 1 with a lattice.
        lattice: See `Plan`; requires gamma = 1.
        about: Settings to add to the plan's name.

    Returns:
        A checked plan of S rows.

    Raises:
        DdimError: If the levels do not fall, gamma is out of range, or gamma is not 1 with a lattice.
    """
    rows = list(_falling(levels, "bdia").rows)
    if gamma is None:
        gamma = 1.0 if lattice else BUDGET ** (1 / len(rows))
    gamma = float(gamma)
    if not 0 < gamma <= 1:
        raise DdimError(f"gamma {gamma}", "is outside (0, 1]", "use 1, or omit it")
    if lattice and gamma != 1:
        raise DdimError(f"gamma {gamma}", "is not 1 with a lattice, so it is not invertible", "use 1")
    for k, (p, i, n) in enumerate(zip(levels, levels[1:], levels[2:], strict=False), start=1):
        back = (n.signal - gamma * p.signal, n.noise - gamma * p.noise)
        rows[k] = Row(i, n, x=(0.0, gamma), x0=back[:1], eps=back[1:])
    name = ", ".join(part for part in (about, f"gamma={gamma:.4g}") if part)
    return Plan("bdia", tuple(rows), about=name, lattice=lattice).check()


def o_belm(levels: Sequence[Level], about: str = "") -> Plan:
    """O-BELM (Wang et al. 2024): xbar_n = r^2 xbar_p + (1 - r^2) xbar_i - h (1 + r) eps_i, r = h / h_1.

    p, i, n are three consecutive levels, h = v_i - v_n, h_1 = v_p - v_i, xbar = x / signal and v = noise / signal; the
    first step is plain DDIM. It is of order 2 on any levels. Its latents do not have unit variance: when encoding, the
    error of the second state grows by 1 / r^2 at each step, by (h_max / h_min)^2 in total.

    Args:
        levels: S + 1 falling levels with signal, the start first.
        about: Settings to add to the plan's name.

    Returns:
        A checked plan of S rows.

    Raises:
        DdimError: If the levels do not fall, or one has no signal.
    """
    rows = list(_falling(levels, "o_belm").rows)
    for level in levels:
        if math.isinf(level.ratio):
            raise DdimError(f"level t = {level.t:g}", "has no signal, which O-BELM divides by", "use bdia")
    for k, (p, i, n) in enumerate(zip(levels, levels[1:], levels[2:], strict=False), start=1):
        h = i.ratio - n.ratio
        r = h / (p.ratio - i.ratio)
        weights = ((1 - r**2) * n.signal / i.signal, r**2 * n.signal / p.signal)
        rows[k] = Row(i, n, x=weights, eps=(-n.signal * h * (1 + r),))
    return Plan("o-belm", tuple(rows), about=about).check()


def ddim_target(levels: Sequence[Level], about: str = "") -> Plan:
    """The rising plan of `ddim` with the network evaluated at the level at the end of each step.

    xbar_next = xbar_now + (v_next - v_now) eps_theta(x_now, next level). Other libraries call this DDIM inversion.

    Args:
        levels: S + 1 rising levels, the start first; clean data is allowed.
        about: Settings to add to the plan's name.

    Returns:
        A checked plan of S rows.

    Raises:
        DdimError: If the levels do not rise.
    """
    if len(levels) < 2 or levels[-1].log_snr > levels[0].log_snr:
        raise DdimError("levels", "do not rise", "pass rising levels: this plan encodes")
    rows = []
    for row in ddim(levels).rows:
        stretch = row.next.signal / row.now.signal
        eps = row.next.noise - stretch * row.now.noise
        rows.append(Row(row.now, row.next, x=(stretch,), eps=(eps,), at=row.next))
    name = ", ".join(part for part in (about, "encode, at the next level") if part)
    return Plan("ddim", tuple(rows), about=name).check()


def _falling(levels: Sequence[Level], sampler: str) -> Plan:
    """The plan of `ddim`, which validates the levels' order; raises a DdimError if they rise."""
    plan = ddim(levels)
    if plan.end.log_snr < plan.start.log_snr:
        hint = "pass falling levels, and use ddim.inversion.reverse"
        raise DdimError(sampler, "cannot use rising levels", hint)
    return plan
