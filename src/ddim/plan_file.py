"""The JSON file a plan is kept in: what it holds, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ddim.errors import DdimError

FORMAT = "ddim-plan"
VERSION = 1


class PlanFileRow(BaseModel):
    """A row; levels are places in the file's list."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    now: int = Field(ge=0)
    next: int = Field(ge=0)
    at: int | None = Field(None, ge=0)
    x: tuple[float, ...] = ()
    x0: tuple[float, ...] = ()
    eps: tuple[float, ...] = ()
    z: float = 0.0
    sigma: float = 0.0


class PlanFile(BaseModel):
    """A whole file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    format: str
    version: int
    sampler: str
    about: str
    clip_x0: bool
    keeps_marginals: bool
    straight: bool = True
    before: tuple[Annotated[int, Field(ge=0)], ...] = ()
    lattice: float = 0.0
    made_for: str = ""
    levels: Sequence[tuple[float, float | Literal["inf", "-inf"]]]
    rows: Sequence[PlanFileRow]


def word(value: float) -> Any:
    """JSON has no infinities; they are written as words."""
    return value if math.isfinite(value) else str(value)


def read_plan(text: str, name: str) -> PlanFile:
    """The file, its form validated; whether it is a sound plan is seen elsewhere.

    Raises:
        DdimError: If it is not a plan of this version.
    """
    try:
        file = PlanFile.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the text"
        raise DdimError(name, f"is not a plan: {where}: {first['msg']}", "write it with `ddim plan --json`") from None
    if file.format != FORMAT or file.version != VERSION:
        raise DdimError(name, f"is {file.format} version {file.version}", f"this ddim reads version {VERSION}")
    return file
