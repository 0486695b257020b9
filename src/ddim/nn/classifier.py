"""Small convolutional classifiers whose pooled features are used to compare sets of images."""

from __future__ import annotations

from typing import Annotated, Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from torch import Tensor, nn


class ClassifierConfig(BaseModel):
    """The architecture of a `Classifier`.

    Args:
        kind: Always "classifier".
        in_channels: Image channels.
        side: Height and width of the training images.
        widths: Channels of each level; every level but the first starts by halving the resolution.
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

    def build(self) -> Classifier:
        """The network, its weights drawn from the global generator."""
        return Classifier(self)


class Classifier(nn.Module):
    """3x3 convolutions, batch norm and ReLU; the features are the mean over the positions of the last level."""

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
        """Images (B, C, H, W) in [-1, 1] to features (B, D), each >= 0."""
        return cast(Tensor, self.body(x)).mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] to the logits of the labels (B, classes)."""
        return cast(Tensor, self.head(self.features(x)))


class ResNetConfig(BaseModel):
    """The architecture of a `ResNet`.

    Args:
        kind: Always "resnet".
        in_channels: Image channels.
        side: Height and width of the training images.
        widths: Channels of each level; every level halves the resolution.
        classes: Number of labels.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["resnet"] = "resnet"
    in_channels: int = Field(3, ge=1)
    side: int = Field(32, ge=4)
    widths: tuple[int, ...] = Field((64, 128, 256), min_length=1)
    classes: int = Field(10, ge=2)

    @property
    def features(self) -> int:
        """D, the number of features: the last level's channels."""
        return self.widths[-1]

    def build(self) -> ResNet:
        """The network, its weights drawn from the global generator."""
        return ResNet(self)


class Residual(nn.Module):
    """x + GELU(norm(conv(x)))."""

    def __init__(self, width: int):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        return x + nn.functional.gelu(self.norm(self.conv(x)))


class ResNet(nn.Module):
    """A small residual network: whitened 2x2 patches, then levels of a convolution, pooling and a residual block.

    After Page 2018 ("How to train your ResNet") and Jordan 2024 ("94 % on CIFAR-10 in 3.29 seconds on a single GPU").
    The features are the mean over the positions of the last level.
    """

    PATCH = 2

    def __init__(self, config: ResNetConfig):
        super().__init__()
        self.config = config
        before = 2 * config.in_channels * self.PATCH**2
        self.white = nn.Conv2d(config.in_channels, before, self.PATCH)
        layers: list[nn.Module] = []
        for width in config.widths:
            layers += [
                nn.Conv2d(before, width, 3, padding=1, bias=False),
                nn.MaxPool2d(2),
                nn.BatchNorm2d(width),
                nn.GELU(),
                Residual(width),
            ]
            before = width
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(before, config.classes)

    @torch.no_grad()
    def whiten(self, x: Tensor) -> None:
        """Whiten the first layer's outputs on images (B, C, H, W), and freeze its weights."""
        patches = x.unfold(2, self.PATCH, 1).unfold(3, self.PATCH, 1).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)
        variances, vectors = torch.linalg.eigh(torch.cov(patches.double().T))
        rows = (vectors / torch.sqrt(variances + 5e-4)).T.reshape(-1, *self.white.weight.shape[1:]).float()
        self.white.weight.copy_(torch.cat([rows, -rows]))
        self.white.weight.requires_grad_(False)

    def features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] to features (B, D)."""
        return cast(Tensor, self.body(nn.functional.gelu(self.white(x)))).mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] to the logits of the labels (B, classes)."""
        return cast(Tensor, self.head(self.features(x)))


AnyClassifierConfig = Annotated[ClassifierConfig | ResNetConfig, Field(discriminator="kind")]


def config_of(values: object) -> ClassifierConfig | ResNetConfig:
    """The configuration of a classifier of either class, from its JSON values."""
    adapter: TypeAdapter[ClassifierConfig | ResNetConfig] = TypeAdapter(AnyClassifierConfig)
    return adapter.validate_python(values)
