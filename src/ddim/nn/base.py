"""What every network is: one tensor made of time and label alone, and a body that is one graph whatever the time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Net = TypeVar("Net", bound="Network")


def sinusoidal(t: Tensor, channels: int, cos_first: bool = False, shift: int = 1) -> Tensor:
    """The transformer's position embedding as DDPM uses it: [sin, cos], frequencies 1 to 1/10000.

    Args:
        t: float32, (B,).
        channels: Even number of channels.
        cos_first: Whether it is [cos, sin].
        shift: With 0 the lowest frequency stays one step above 1/10000, as in the transformer itself.

    Returns:
        float32, (B, channels).
    """
    half = channels // 2
    places = torch.arange(half, device=t.device, dtype=torch.float32)
    rates = torch.exp(places * (-math.log(10000) / max(half - shift, 1)))
    angles = t.float()[:, None] * rates[None, :]
    return torch.cat([angles.cos(), angles.sin()] if cos_first else [angles.sin(), angles.cos()], dim=1)


class Network(nn.Module, ABC):
    """A network that is run many times at few distinct times.

    All that depends on time alone is one tensor, made by `condition` once per time; `body` is the rest. A subclass
    makes the layers `time`, `label` and `time_to_blocks`, and `entry`, the body's first layer with weights.
    """

    config: Any
    time: nn.Sequential
    label: nn.Embedding | None
    time_to_blocks: nn.Linear

    @property
    @abstractmethod
    def entry(self) -> nn.Module:
        """The body's first layer with weights, whose dtype and device are the body's."""

    @abstractmethod
    def body(self, x: Tensor, condition: Tensor) -> Tensor:
        """All but the time layers: what `enter` gives, and the condition (B or 1, ...), to the output."""

    def enter(self, x: Tensor) -> Tensor:
        """A state as the body takes it."""
        return x

    def embed(self, t: Tensor) -> Tensor:
        """Times in our counting, 1..T, (B,), as the time layers take them, (B, channels).

        This and its overrides are where the network's own counting, t - 1, is made.
        """
        return sinusoidal(t - 1.0, cast(nn.Linear, self.time[0]).in_features)

    def condition(self, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """All that depends on time and label alone, for every block.

        Args:
            t: Times in our counting, 1..T, whole or not, (B,).
            labels: int64, (B,), in 0..classes, where `classes` means no label; None means no label for all.

        Returns:
            (B, sum of all blocks' channels), in the dtype of the time layers.
        """
        first = cast(nn.Linear, self.time[0])
        embedded = self.time(self.embed(t).to(first.weight.dtype))
        if self.label is not None:
            if labels is None:
                labels = torch.full(t.shape, self.config.classes, device=t.device)
            embedded = embedded + self.label(labels)
        return cast(Tensor, self.time_to_blocks(F.silu(embedded)))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """`body` at `condition`: x (B, ...), t (B,) in 1..T, labels (B,) or None."""
        condition = self.condition(t, labels)
        return self.body(x, condition.to(x.dtype) if x.is_floating_point() else condition)

    def cast_body(self: Net, dtype: torch.dtype) -> Net:
        """Put all but the time layers into another dtype, in channels-last memory; the time layers stay float32."""
        layers = [self.time, self.time_to_blocks, *([] if self.label is None else [self.label])]
        time = {id(parameter) for layer in layers for parameter in layer.parameters()}
        with torch.no_grad():
            for parameter in self.parameters():
                if id(parameter) not in time:
                    kind: Any = {"memory_format": torch.channels_last} if parameter.ndim == 4 else {}
                    parameter.data = parameter.data.to(dtype=dtype, **kind)
        return self


def zero(module: Any) -> Any:
    """A layer whose weights start at zero."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
