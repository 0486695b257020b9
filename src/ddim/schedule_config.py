"""The configuration of a noise schedule."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ddim import limits
from ddim import schedule as schedules
from ddim.errors import DdimError


class ScheduleConfig(BaseModel):
    """A noise schedule by name.

    Args:
        name: "linear", "scaled-linear", "quadratic", "sigmoid", "cosine", or "betas" for a list.
        T: The number of times.
        beta_start: First beta, where the name has one.
        beta_end: Last beta, where the name has one.
        betas: The list, with "betas".
        zero_terminal_snr: Whether it is rescaled to alpha_bar_T = 0.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: Literal["linear", "scaled-linear", "quadratic", "sigmoid", "cosine", "betas"] = "linear"
    T: int = Field(1000, ge=1, le=limits.TIMES)
    beta_start: float | None = Field(None, gt=0, le=1)
    beta_end: float | None = Field(None, gt=0, le=1)
    betas: tuple[float, ...] | None = None
    zero_terminal_snr: bool = False

    @model_validator(mode="after")
    def _complete(self) -> ScheduleConfig:
        if (self.name == "betas") != (self.betas is not None):
            raise ValueError('a list of betas goes with the name "betas", and only with it')
        if self.betas is not None and len(self.betas) != self.T:
            raise ValueError(f"T is {self.T}, there are {len(self.betas)} betas")
        if self.name in ("cosine", "betas") and (self.beta_start is not None or self.beta_end is not None):
            raise ValueError(f"{self.name} takes no beta_start or beta_end")
        try:
            self.build()  # whoever reads a schedule that is none is told so then, not whoever uses it
        except DdimError as error:
            raise ValueError(error.wrong) from None
        return self

    def build(self) -> schedules.Schedule:
        """The schedule."""
        if self.betas is not None:
            made = schedules.from_betas(self.betas)
        else:
            bounds = {"beta_start": self.beta_start, "beta_end": self.beta_end}
            given: dict[str, Any] = {key: value for key, value in bounds.items() if value is not None}
            made = schedules.NAMED[self.name](self.T, **given)
        return schedules.zero_terminal_snr(made) if self.zero_terminal_snr else made
