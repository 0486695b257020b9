"""The categories of a model's data, as a validated configuration."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ddim import limits
from ddim.categorical import Alphabet

_Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class CategoricalConfig(BaseModel):
    """Data of categories instead of real numbers, see `ddim.categorical`.

    Args:
        categories: Kinds of tokens, or grey levels, of the data.
        pi: What noise draws from: "uniform" as in the paper, "mask" (one more category, absorbing diffusion), or one
            probability for each category.
        carry_over: With a mask, whether a token that is not masked is taken for x_0 with certainty.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    categories: int = Field(ge=2, le=limits.CATEGORIES)
    pi: Literal["uniform", "mask"] | tuple[_Share, ...] = "uniform"
    carry_over: bool = False

    @model_validator(mode="after")
    def _is_one(self) -> CategoricalConfig:
        if isinstance(self.pi, tuple) and len(self.pi) != self.categories:
            raise ValueError(f"there are {self.categories} categories, pi has {len(self.pi)} numbers")
        self.alphabet()
        return self

    @property
    def excludes(self) -> bool:
        """Whether noise never draws some category: then x_T must tell nothing of x_0, or its divergence is infinite."""
        return self.pi == "mask" if isinstance(self.pi, str) else 0 in self.pi

    @property
    def size(self) -> int:
        """Categories of x_t: the data's, and the mask."""
        return self.categories + (self.pi == "mask")

    def alphabet(self) -> Alphabet:
        """The categories of x_t and their pi."""
        if self.pi == "mask":
            return Alphabet.masked(self.categories, self.carry_over)
        if self.pi == "uniform":
            return Alphabet(Alphabet.uniform(self.categories).pi, carry_over=self.carry_over)
        return Alphabet(torch.tensor(self.pi, dtype=torch.float64), carry_over=self.carry_over)
