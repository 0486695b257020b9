"""The JSON format of plans: its schema and its validation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ddim._io.checksum import unseal
from ddim._io.reading import of_kind, parse_json
from ddim.errors import DdimError
from ddim.process.schedule import Level

FORMAT = "ddim-plan"
VERSION = 1


_STRICT = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
_Index = Annotated[int, Field(ge=0)]
_Weight = Annotated[float, Field(ge=0)]


class FileRow(BaseModel):
    """A row; its levels are indices into the file's list of levels."""

    model_config = _STRICT
    now: _Index
    next: _Index
    at: _Index | None = None

    def levels(self, levels: Sequence[Level]) -> dict[str, Any]:
        """The row's levels by field name."""
        return {
            "now": levels[self.now],
            "next": levels[self.next],
            "at": None if self.at is None else levels[self.at],
        }


class File(BaseModel):
    """The fields of every plan file."""

    model_config = _STRICT
    format: str
    version: int
    sampler: str
    about: str
    made_for: str = ""
    levels: Sequence[tuple[float, float | Literal["inf", "-inf"]]]

    def parsed_levels(self) -> list[Level]:
        """The file's levels."""
        return [Level(t, float(log_snr)) for t, log_snr in self.levels]


class PlanFileRow(FileRow):
    """A row over real-valued data."""

    x: tuple[float, ...] = ()
    x0: tuple[float, ...] = ()
    eps: tuple[float, ...] = ()
    z: float = 0.0
    sigma: float = 0.0
    z_high: float = 0.0


class PlanFile(File):
    """A plan over real-valued data."""

    clip_x0: bool
    keeps_marginals: bool
    straight: bool = True
    before: tuple[_Index, ...] = ()
    lattice: float = 0.0
    emulates: str = ""
    eps_kept: bool = False
    rows: Sequence[PlanFileRow]


class MixtureFileRow(FileRow):
    """A row over discrete data."""

    keep: _Weight = 0.0
    to_x0: _Weight = 0.0
    fresh: _Weight = 0.0


class MixtureFile(File):
    """A plan over discrete data."""

    kind: Literal["categorical"]
    kernel: Literal["ddim", "markov"] = "ddim"
    categories: int = Field(ge=2)
    pi: Literal["uniform"] | _Index | tuple[_Weight, ...] = "uniform"
    temperature: float = 1.0
    top_p: float = 1.0
    rows: Sequence[MixtureFileRow]


FileType = TypeVar("FileType", bound=File)


def json_float(value: float) -> Any:
    """A float for JSON, with infinities as strings, because JSON has none."""
    return value if math.isfinite(value) else str(value)


def read_plan(text: str, name: str, kind: type[FileType]) -> FileType:
    """Parse a plan file and validate its schema; `check` of the plan validates the numbers.

    Args:
        text: The file's text.
        name: The file's name, for messages.
        kind: `PlanFile` or `MixtureFile`.

    Raises:
        DdimError: If the text is not a plan of this version and kind, or is damaged.
    """
    again = "write it with `ddim plan --json`"
    if not isinstance(text, str):
        raise DdimError(name, f"is a {type(text).__name__}, not the text of a plan", again)
    text = unseal(text.encode("utf-8", "surrogatepass"), name).decode("utf-8", "surrogatepass")
    body = of_kind(parse_json(text, name, again), dict, name, again)
    discrete = "kind" in kind.model_fields
    if discrete != ("kind" in body) and body.get("format") == FORMAT:
        data, other = ("discrete", "real-valued") if discrete else ("real-valued", "discrete")
        raise DdimError(name, f"is a plan for {other} data, not {data} data", "create a plan for this model")
    try:
        file = kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        location = ".".join(str(part) for part in first["loc"]) or "the text"
        raise DdimError(name, f"is not a plan: {location}: {first['msg']}", again) from None
    if file.format != FORMAT or file.version != VERSION:
        raise DdimError(name, f"is {file.format} version {file.version}, not {FORMAT} version {VERSION}", again)
    return file
