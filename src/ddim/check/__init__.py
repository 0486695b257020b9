"""The theory as a test bench: hold a schedule, a plan, a denoiser, a network or a model against it.

    import ddim

    for finding in ddim.check.schedule(ddim.schedule.cosine()):
        print(finding)

Each function yields one `Finding` after another, as they are measured; `finding.passed` is False where something
deviates. `ddim check` prints them as a table.

It imports `model`, `exact` and what is below.
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
