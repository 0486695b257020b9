"""Plans for whoever has a schedule and a network that predicts something: what `Model` and `Wrapped` share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ddim import inversion, samplers
from ddim.denoiser import Predicts
from ddim.errors import DdimError, either, say
from ddim.grid import DEFAULT
from ddim.plan import Plan
from ddim.schedule import Level, Schedule
from ddim.start import default_steps, start_time

WAY_STEPS = 50


@dataclass(frozen=True, slots=True)
class Planner:
    """Makes the plans of one network.

    Args:
        schedule: Its noise schedule.
        predicts: What it predicts: "eps", "x0" or "v".
        error_at: E ||eps - eps_theta||^2 / d at a level, for sigma "optimal"; None where it is not known.
        learned: Whether the network says a variance, for sigma "learned".
        clipping: Called for a plan that samples and does not say `clip_x0`: why x_0 is clipped in it, or "" where it is
            not. It may raise a DdimError.
    """

    schedule: Schedule
    predicts: Predicts
    error_at: Callable[[Level], float] | None = None
    learned: bool = False
    clipping: Callable[[], str] | None = None

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

        A plan that encodes clips only where `clip_x0` is true.

        Raises:
            DdimError: See `ddim.grid.tau` and `ddim.samplers.ddim`; or if a setting is not one of the sampler's.
        """
        chosen = ""
        if sampler == "auto":
            sampler = "ddim"
            plain = clip_x0 is None or self.predicts == "eps" or self.clipping is not None
            if grid is None and not eta and sigma is None and plain and not encode and top is None:
                count = self._default(default) if steps is None else steps
                sampler, grid = samplers.recommended(count, self.schedule, self.predicts)
                chosen = "auto: "
        grid = DEFAULT if grid is None else grid
        some = self._default(default) if steps is None and isinstance(grid, str) else steps
        if clip_x0 is None and not encode and self.clipping is not None and (why := self.clipping()):
            clip_x0 = True
            say(f"x0 is clipped to [-1, 1] in every step, {why}", either("clip_x0=False leaves it as predicted"))
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
        some = steps
        if steps is None and (grid is None or isinstance(grid, str)):
            some = self._default(WAY_STEPS, method == "fixed-point" and grid is None)
        levels = samplers.walk(self.schedule, self.predicts, DEFAULT if grid is None else grid, some)
        label = (DEFAULT if grid is None else grid) if grid is None or isinstance(grid, str) else "own grid"
        if method == "fixed-point" and grid is None:
            times = inversion.graded(self.schedule, len(levels) - 1, levels[0].t)
            levels, label = self.schedule.levels(times[::-1]), "graded"
        return inversion.way(method, levels, self.schedule.level(1), label)

    def _default(self, steps: int, above_first: bool = False) -> int:
        """A default number of steps, bounded by the times there are; `above_first` leaves t = 1 out of them."""
        bound = default_steps(steps, self.schedule, self.predicts)
        last = start_time(self.schedule, self.predicts)
        return max(1, min(bound, last - 1)) if above_first else bound
