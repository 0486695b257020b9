"""`SamplerSettings`: what a user can choose about a sampler, for every modality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from ddim.errors import DdimError

STEPS = 20
"""The default number of steps of sampling."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerSettings:
    """The settings of a sampler. None is a setting's default, which may depend on the other settings and the model.

    Args:
        steps: S, the number of steps: one network evaluation each, but 2 and 4 for "heun" and "rk4". By default 20, or
            all timesteps if there are fewer.
        grid: The name of a timestep spacing (see `ddim.timesteps`) or an increasing list of timesteps.
        eta: Scale of the noise, see `ddim.samplers.ddim` and `ddim.samplers.discrete`. None adds no noise and lets "auto" choose
            the solver; with any value, also 0, "auto" is "ddim".
        sigma: Instead of eta: one standard deviation per step, "hat", "learned" for the network's learned variance, or
            "optimal" for the variance that fits the model's measured error.
        clip_x0: Whether x_0 is clipped to [-1, 1]. By default this follows the model's source, see
            `ddim.model.importers.clipping`, with a warning, or is on with sigma "hat". A plan that encodes does not
            clip by default.
        encode: Whether the plan encodes, from clean data to the latent.
        top: The noisiest timestep of a named spacing, for a run that starts from a partly noised image; by default
            `ddim.process.start.start_time`.
        sampler: For real-valued data one of `ddim.samplers.SAMPLERS`, all but "ddim" deterministic; for discrete data
            "ddim" or "markov". "auto" is the sampler with the spacing that `ddim.samplers.recommended` names for this
            number of steps if no other setting is passed, else "ddim".
        temperature: Discrete data: below 1, the predicted distribution of x_0 is sharpened before sampling from it.
        top_p: Discrete data: below 1, unlikely values of x_0 are excluded (nucleus sampling).
    """

    steps: int | None = None
    grid: str | Sequence[float] | None = None
    eta: float | None = None
    sigma: Sequence[float] | str | None = None
    clip_x0: bool | None = None
    encode: bool = False
    top: int | None = None
    sampler: str = "auto"
    temperature: float | None = None
    top_p: float | None = None

    def passed(self) -> dict[str, Any]:
        """The settings that differ from the default, by name."""
        values = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        return {name: value for name, (value, default) in values.items() if value is not default}

    def require(self, supported: frozenset[str], modality: str) -> None:
        """Check that every setting that was passed is supported.

        Raises:
            DdimError: If one is not.
        """
        for name in self.passed():
            if name not in supported:
                raise DdimError(name, f"is not a setting of samplers over {modality}", "leave it out")
