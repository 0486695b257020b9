"""The base class of all networks: a conditioning tensor from time and label, and a body that depends on nothing else.

The graph of the body does not depend on the time, so it can be compiled or captured once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Net = TypeVar("Net", bound="Network")
Time = TypeVar("Time", Tensor, float)


def network_time(t: Time) -> Time:
    """The time that a network is passed at timestep t in 1..T: t - 1, in 0..T - 1. The shift has its home here."""
    return t - 1


def as_timed(network: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """A network as a function of x and the timestep t in 1..T.

    Args:
        network: Called as network(x, `network_time(t)`), or as network(x, t) if it is a `Network`, which shifts t
            itself.
    """
    return network if isinstance(network, Network) else lambda x, t: network(x, network_time(t))


def from_index(network: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A `Network`, which is trained with float32 times in 1..T, as a function of x and `network_time`."""
    return lambda x, time, *labels: network(x, (time + 1).float(), *labels)


def sinusoidal(t: Tensor, channels: int, cos_first: bool = False, shift: int = 1) -> Tensor:
    """The sinusoidal embedding of the transformer as used in DDPM: [sin, cos], frequencies 1 to 1/10000.

    Args:
        t: float32, (B,).
        channels: Even number of channels.
        cos_first: Whether the order is [cos, sin].
        shift: With 0 the lowest frequency is one step above 1/10000, as in the original transformer.

    Returns:
        float32, (B, channels).
    """
    half = channels // 2
    positions = torch.arange(half, device=t.device, dtype=torch.float32)
    rates = torch.exp(positions * (-math.log(10000) / max(half - shift, 1)))
    angles = t.float()[:, None] * rates[None, :]
    return torch.cat([angles.cos(), angles.sin()] if cos_first else [angles.sin(), angles.cos()], dim=1)


class Network(nn.Module, ABC):
    """A network whose time-dependent part is computed once per time and reused.

    `condition` computes everything that depends on time and label as one tensor; `body` is the rest of the network. A
    subclass defines the layers `time`, `label` and `time_to_blocks`, and `entry`, the body's first layer with weights.
    """

    config: Any
    time: nn.Sequential
    label: nn.Embedding | None
    time_to_blocks: nn.Linear

    @property
    @abstractmethod
    def entry(self) -> nn.Module:
        """The body's first layer with weights; its dtype and device are those of the body."""

    @abstractmethod
    def body(self, x: Tensor, condition: Tensor) -> Tensor:
        """Everything but the time layers.

        Args:
            x: The output of `enter`.
            condition: The output of `condition`, (B or 1, ...).

        Returns:
            The network's output.
        """

    def enter(self, x: Tensor) -> Tensor:
        """Convert a state to the dtype and memory format of the body."""
        return x

    def embed(self, t: Tensor) -> Tensor:
        """Embed times 1..T, (B,), for the time layers: (B, channels).

        The shift to the network's times, t - 1, is done here and in overrides only.
        """
        return sinusoidal(network_time(t), cast(nn.Linear, self.time[0]).in_features)

    def condition(self, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The conditioning of all blocks: everything that depends on time and label alone.

        Args:
            t: Times 1..T, integer or fractional, (B,).
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
        """The output of `body` with `condition`, for x (B, ...), t (B,) in 1..T and labels (B,) or None."""
        condition = self.condition(t, labels)
        return self.body(x, condition.to(x.dtype) if x.is_floating_point() else condition)

    def cast_body(self: Net, dtype: torch.dtype) -> Net:
        """Convert all but the time layers to a dtype and channels-last memory; the time layers stay float32."""
        layers = [self.time, self.time_to_blocks, *([] if self.label is None else [self.label])]
        time = {id(parameter) for layer in layers for parameter in layer.parameters()}
        with torch.no_grad():
            for parameter in self.parameters():
                if id(parameter) not in time:
                    layout: Any = {"memory_format": torch.channels_last} if parameter.ndim == 4 else {}
                    parameter.data = parameter.data.to(dtype=dtype, **layout)
        return self


def zero(module: Any) -> Any:
    """Initialise a layer's parameters to zero and return the layer."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
