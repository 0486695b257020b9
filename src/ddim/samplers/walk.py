"""The levels a sampler walks, for a schedule, a grid and what the network predicts."""

from __future__ import annotations

from collections.abc import Sequence

from ddim.denoiser import Predicts
from ddim.errors import DdimError, say
from ddim.grid import DEFAULT, tau
from ddim.schedule import Level, Schedule

EPS_TOP = 0.85


def walk(
    schedule: Schedule,
    predicts: Predicts,
    grid: str | Sequence[float] = DEFAULT,
    steps: int | None = None,
    encode: bool = False,
    top: int | None = None,
) -> tuple[Level, ...]:
    """The grid's levels from the noisiest down, then clean data.

    For a network that predicts eps, an `equal-angle` grid ends at 0.85 T instead of T, and says so: near T the
    predicted x_0 is the error in eps times noise / signal (157 on the paper's schedule, 37 at 0.85 T), and the grid's
    first step would be a long one made with it.

    Args:
        schedule: The schedule.
        predicts: What the network predicts.
        grid: A grid's name (see `ddim.grid`) or a rising list of times.
        steps: S, the number of network calls; left out with a list.
        encode: Rising instead, from clean data to the noisiest.
        top: The noisiest time, of an `equal-angle` or `log-snr` grid, where a run starts from a picture partly noised.

    Raises:
        DdimError: See `ddim.grid.tau`; or if top is given beside a list of times.

    Warns:
        DdimWarning: As `ddim.grid.tau`, or if the grid ends below T because the network predicts eps.
    """
    if top is not None and not isinstance(grid, str):
        raise DdimError(f"top {top}", "is given beside a list of times", "let the list end there")
    if top is None and predicts == "eps" and isinstance(grid, str) and grid == "equal-angle" and steps:
        top = max(round(EPS_TOP * schedule.T), min(steps, schedule.T))
        if top < schedule.T:
            say(f"grid equal-angle: starts at t = {top}, not T = {schedule.T}: this network predicts eps")
    times = [0.0, *tau(schedule, grid, steps, top)]
    return schedule.levels(times if encode else times[::-1])
