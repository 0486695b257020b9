"""The levels a sampler walks, for a schedule, a grid and what the network predicts."""

from __future__ import annotations

from collections.abc import Sequence

from ddim.denoiser import Predicts
from ddim.errors import DdimError, say
from ddim.grid import DEFAULT, tau
from ddim.schedule import Level, Schedule
from ddim.start import start_time


def walk(
    schedule: Schedule,
    predicts: Predicts,
    grid: str | Sequence[float] = DEFAULT,
    steps: int | None = None,
    encode: bool = False,
    top: int | None = None,
) -> tuple[Level, ...]:
    """The grid's levels from the noisiest down, then clean data.

    For a network that predicts eps, every named grid ends where noise / signal is about 60, which is warned about where
    that is below T: see `ddim.start`. A list of times is taken as it is.

    Args:
        schedule: The schedule.
        predicts: What the network predicts.
        grid: A grid's name (see `ddim.grid`) or a rising list of times.
        steps: S, the number of network evaluations; left out with a list.
        encode: Rising instead, from clean data to the noisiest.
        top: The noisiest time of a named grid, where a run starts from an image partly noised.

    Raises:
        DdimError: See `ddim.grid.tau`; or if top is given beside a list of times.

    Warns:
        DdimWarning: As `ddim.grid.tau`, or if the grid ends below T because the network predicts eps.
    """
    if top is not None and not isinstance(grid, str):
        raise DdimError(f"top {top}", "is given beside a list of times", "let the list end there")
    if top is None and predicts == "eps" and isinstance(grid, str) and steps:
        top = max(start_time(schedule, predicts), min(steps, schedule.T))
        if top < schedule.T:
            why = f"this network predicts eps, and noise / signal is {schedule.level(top).ratio:.3g} there"
            say(f"grid {grid}: starts at t = {top}, not T = {schedule.T}: {why}")
    times = [0.0, *tau(schedule, grid, steps, top)]
    return schedule.levels(times if encode else times[::-1])
