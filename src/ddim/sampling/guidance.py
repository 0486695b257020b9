"""Classifier-free guidance, with scales that may depend on the level, and CFG++."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ddim.errors import DdimError
from ddim.plan.plan import Plan
from ddim.plan.row import Row
from ddim.process.parameterization import AnyDenoiser
from ddim.process.schedule import Level

Guidance = float | Callable[[Level], float]
"""A scale of classifier-free guidance: a number, or a function of the level; see `ddim.guidance`."""


def eps_kept(plan: Plan) -> Callable[[Level], float]:
    """The scale w that makes changing a consistent pair equivalent to changing x_0 alone with eps unchanged.

    With weights P of x_0 and E of eps, and signal and noise of the row's level, changing x_0 alone by d changes a row's
    output by P d. Changing x_0 by w d at the same x changes eps by -w d signal / noise, and the output by
    w d (P - E signal / noise). Hence

        w = P noise / (P noise - E signal)

    which for DDIM with eta = 0 is v / (v - v_next), v = noise / signal. On the last step to clean data w = 1.

    Args:
        plan: The plan to be run; each row a sum of the newest x_0, the newest eps and fresh noise, without clipping.

    Returns:
        A function that gives w at each level where the plan evaluates the network, and raises a DdimError at others.

    Raises:
        DdimError: If the plan has other rows.
    """
    scales: dict[Level, float] = {}
    for k, row in enumerate(plan.rows):
        if any(row.x) or row.memory > 1 or plan.clip_x0:
            why = "it clips x0" if plan.clip_x0 else "it uses states or older predictions"
            problem = f"has no eps that could stay unchanged: {why}"
            raise DdimError(f"plan {plan.name}", problem, "use a DDIM plan without clipping")
        scale = _scale(row)
        if not math.isclose(scales.setdefault(row.query, scale), scale, rel_tol=1e-12):
            raise DdimError(f"plan row {k}", f"needs another scale at t = {row.query.t:g}", "use a DDIM plan")
    name = plan.name

    def at(level: Level) -> float:
        if level not in scales:
            raise DdimError(f"t = {level.t:g}", f"is not a level of {name}", "use the scale of the plan that is run")
        return scales[level]

    return at


def cfg_plus_plus(plan: Plan, lam: float) -> Callable[[Level], float]:
    """CFG++ (Chung et al. 2024) as guidance with an equivalent scale at each level of a plan.

    CFG++ takes x_0 from the guided noise eps_off + lam (eps_on - eps_off), but the noise from eps_off: it changes x_0
    alone, so it equals guidance of scale lam w, with w from `eps_kept`.

    Args:
        plan: The plan to be run, see `eps_kept`.
        lam: 0 ignores the label, 1 takes x_0 from the conditional model.

    Raises:
        DdimError: If lam is outside 0..1, or the plan is not one that `eps_kept` accepts.
    """
    if not 0 <= lam <= 1:
        raise DdimError(f"CFG++ of {lam:g}", "is outside 0..1", "use a number such as 0.6")
    scale = eps_kept(plan)
    return lambda level: lam * scale(level)


def _scale(row: Row) -> float:
    moved = sum(row.x0) * row.query.noise
    rest = moved - sum(row.eps) * row.query.signal
    scale = moved / rest if rest else math.nan
    if not math.isfinite(scale):
        raise DdimError(f"row from t = {row.now.t:g}", "has no effect", "use a plan whose steps change the level")
    return scale


@dataclass(frozen=True, slots=True)
class Guided:
    """Classifier-free guidance (Ho & Salimans 2021): unconditional + scale (conditional - unconditional).

    Args:
        conditional: The denoiser with the label.
        unconditional: The denoiser without a label.
        scale: 0 ignores the label, 1 is the conditional model, more amplifies it; or a function of the level.
    """

    conditional: AnyDenoiser
    unconditional: AnyDenoiser
    scale: Guidance

    def __call__(self, x: Tensor, level: Level, /) -> Any:
        """The guided prediction, from two denoiser evaluations."""
        on, off = self.conditional(x, level), self.unconditional(x, level)
        scale = self.scale(level) if callable(self.scale) else self.scale
        if not math.isfinite(scale):
            raise DdimError(f"guidance {scale}", f"at t = {level.t:g} is not a finite number", "use one such as 2")
        return off.lerp(on, scale)
