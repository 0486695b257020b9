"""Verify a schedule, a plan, a denoiser, a network or a model against the theory.

    import ddim

    for finding in ddim.check.schedule(ddim.schedule.cosine()):
        print(finding)

Each function yields one `Finding` per check as soon as it is measured; `finding.passed` is False for a deviation.
`ddim check` prints the findings as a table.

This package imports `model`, `exact` and lower layers.
"""

from ddim.check.denoisers import denoiser
from ddim.check.finding import Finding
from ddim.check.networks import model, network
from ddim.check.plans import plan
from ddim.check.schedules import schedule

__all__ = [
    "Finding",
    "denoiser",
    "model",
    "network",
    "plan",
    "schedule",
]
