"""Plans for whoever has a schedule and a network that predicts something: what `Model` and `Wrapped` share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ddim import inversion, samplers
from ddim.denoiser import Predicts
from ddim.errors import DdimError, say
from ddim.grid import DEFAULT
from ddim.plan import Plan
from ddim.schedule import Level, Schedule


@dataclass(frozen=True, slots=True)
class Planner:
    """Makes the plans of one network.

    Args:
        schedule: Its noise schedule.
        predicts: What it predicts: "eps", "x0" or "v".
        error_at: E ||eps - eps_theta||^2 / d at a level, for sigma "optimal"; None where it is not known.
        learned: Whether the network says a variance, for sigma "learned".
    """

    schedule: Schedule
    predicts: Predicts
    error_at: Callable[[Level], float] | None = None
    learned: bool = False

    def plan(
        self,
        steps: int | None,
        grid: str | Sequence[float] | None,
        eta: float,
        sigma: Sequence[float] | str | None,
        clip_x0: bool | None,
        encode: bool,
        default: int,
        top: int | None,
        sampler: str,
    ) -> Plan:
        """A plan; the arguments are those of `ddim.Model.plan`.

        Raises:
            DdimError: See `ddim.grid.tau` and `ddim.samplers.ddim`; or if a setting is not one of the sampler's.
        """
        chosen = ""
        if sampler == "auto":
            sampler = "ddim"
            if grid is None and not eta and sigma is None and clip_x0 is None and not encode and top is None:
                sampler, grid = samplers.recommended(steps or default, self.schedule.T)
                chosen = "auto: "
        grid = DEFAULT if grid is None else grid
        some = default if steps is None and isinstance(grid, str) else steps
        levels = samplers.walk(self.schedule, self.predicts, grid, some, encode, top)
        clean_as = self.schedule.level(1) if encode else None
        about = f"{chosen}{grid if isinstance(grid, str) else 'own grid'}, S={len(levels) - 1}"
        if sampler == "ddim":
            if sigma == "learned" and not self.learned:
                raise DdimError("sigma learned", "this model's network does not say it", "use eta, hat or optimal")
            return samplers.ddim(levels, eta, sigma, clip_x0, clean_as, about, self.error_at)
        if eta or sigma is not None:
            raise DdimError(f"sampler {sampler}", "adds no noise", "leave eta and sigma out, or use ddim")
        made = replace(samplers.named(sampler, levels, self.schedule, clean_as, about), clip_x0=bool(clip_x0))
        if made.calls != len(levels) - 1:
            say(f"sampler {sampler}: {len(levels) - 1} steps are {made.calls} network calls")
        return made

    def way(self, method: str, steps: int | None, grid: str | Sequence[float] | None) -> inversion.Way:
        """The plans of a way to latents and back; the arguments are those of `ddim.Model.way`.

        Raises:
            DdimError: If the method is unknown; see `ddim.grid.tau`.
        """
        some = 50 if steps is None and (grid is None or isinstance(grid, str)) else steps
        levels = samplers.walk(self.schedule, self.predicts, DEFAULT if grid is None else grid, some)
        label = (DEFAULT if grid is None else grid) if grid is None or isinstance(grid, str) else "own grid"
        if method == "fixed-point" and grid is None:
            times = inversion.graded(self.schedule, len(levels) - 1, levels[0].t)
            levels, label = self.schedule.levels(times[::-1]), "graded"
        return inversion.way(method, levels, self.schedule.level(1), label)
