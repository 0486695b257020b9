"""Settings of image preprocessing: crop box, aspect ratio, resolution, channels, matte."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ddim._io import limits

Side = Annotated[int, Field(ge=1, le=16384)]
Edge = Annotated[int, Field(ge=0)]


class ImagePolicy(BaseModel):
    """How images are preprocessed; stored in a model's config.

    An image is rotated by its EXIF orientation, composited over the matte where it is transparent, converted to 8 bits
    and to `channels`, cropped to `box`, then fitted to `height` x `width`.

    Attributes:
        height: Height in pixels, 1..16384.
        width: Width in pixels, 1..16384.
        channels: 1 for grey (ITU-R 601 luma of a colour image), 3 for RGB.
        box: Left, upper, right, lower edge in pixels of a crop before resizing; for instance (10, 25, 80, 95), the
            usual face crop of CelebA at 89x109.
        fit: "crop" resizes the largest centred part with the target's aspect ratio, "stretch" resizes without keeping
            the aspect ratio, "exact" rejects an image of another size.
        filter: The resampling filter; all of them antialias when downsampling.
        matte: Grey level 0..255 behind transparent pixels.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    height: Side
    width: Side
    channels: Literal[1, 3]
    box: tuple[Edge, Edge, Edge, Edge] | None = None
    fit: Literal["crop", "stretch", "exact"] = "crop"
    filter: Literal["lanczos", "bicubic", "box", "bilinear"] = "lanczos"
    matte: Annotated[int, Field(ge=0, le=255)] = 0

    @model_validator(mode="after")
    def _box_is_not_empty(self) -> ImagePolicy:
        if self.box is not None and not (self.box[0] < self.box[2] and self.box[1] < self.box[3]):
            raise ValueError(f"box {self.box} is empty; use (left, upper, right, lower) in pixels")
        limits.check_pixels(self.height, self.width)
        return self

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of every image, (H, W, C)."""
        return self.height, self.width, self.channels

    def facts(self) -> dict[str, str]:
        """A description for people: label to text."""
        box = f", box {list(self.box)}" if self.box else ""
        return {
            "images": f"{self.height}x{self.width}, {'grey' if self.channels == 1 else 'colour'}",
            "data policy": f"fit {self.fit}, filter {self.filter}, matte {self.matte}{box}",
        }


class DataStatistics(BaseModel):
    """Mean and standard deviation of the training images over all their values, in [-1, 1], see `ddim.model.plausible`.

    Args:
        mean: The mean.
        std: The standard deviation.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    mean: float = Field(allow_inf_nan=False)
    std: float = Field(ge=0, allow_inf_nan=False)
