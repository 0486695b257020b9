"""A small convolutional classifier whose pooled features serve to compare sets of pictures."""

from __future__ import annotations

from typing import Literal, cast

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn


class ClassifierConfig(BaseModel):
    """The shape of a `Classifier`.

    Args:
        kind: Always "classifier".
        in_channels: Picture channels.
        side: Height and width of the pictures it was made for.
        widths: Channels of each level; every level but the first begins by halving the resolution.
        classes: Number of labels.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["classifier"] = "classifier"
    in_channels: int = Field(1, ge=1)
    side: int = Field(28, ge=4)
    widths: tuple[int, ...] = Field((24, 48, 64), min_length=1)
    classes: int = Field(10, ge=2)

    @property
    def features(self) -> int:
        """D, the number of features: the last level's channels."""
        return self.widths[-1]


class Classifier(nn.Module):
    """Convolutions of 3x3, batch norm and ReLU; the mean over the last level's places is the feature vector."""

    def __init__(self, config: ClassifierConfig):
        super().__init__()
        self.config = config
        layers: list[nn.Module] = []
        before = config.in_channels
        for level, width in enumerate(config.widths):
            strides = (2, 1) if level else (1,)
            for stride in strides:
                layers += [
                    nn.Conv2d(before, width, 3, stride=stride, padding=1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(),
                ]
                before = width
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(before, config.classes)

    def features(self, x: Tensor) -> Tensor:
        """Pictures (B, C, H, W) in [-1, 1] to features (B, D), each >= 0."""
        return cast(Tensor, self.body(x)).mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Pictures (B, C, H, W) in [-1, 1] to the logits of the labels (B, classes)."""
        return cast(Tensor, self.head(self.features(x)))
