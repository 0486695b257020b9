"""The network is wrapped once: what it predicts, its dtype and its time conditioning stay behind this door."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ddim.denoiser import Prediction, Predicts, predict
from ddim.nn.unet import UNet
from ddim.schedule import Level


class NetworkDenoiser:
    """A trained network as a denoiser; what depends on time alone is computed once per time.

    Args:
        network: The network, its body in the dtype to compute in.
        predicts: What it predicts.
        labels: int64, (N,), one label for each sample of the batches to come, or None.
        body: The network's body, if it is to be replaced by a compiled one.
    """

    def __init__(
        self,
        network: UNet,
        predicts: Predicts,
        labels: Tensor | None = None,
        body: Callable[..., Tensor] | None = None,
    ):
        self.network, self.predicts, self.labels = network, predicts, labels
        self.body = body or network.body
        self.dtype = network.conv_in.weight.dtype
        self.device = network.conv_in.weight.device
        self._conditions: dict[float, Tensor] = {}

    def __call__(self, x: Tensor, level: Level, /) -> Prediction:
        """The prediction at x, (N, C, H, W), float32 or float64; differentiable in x where x asks for it."""
        inner = x.to(self.dtype, memory_format=torch.channels_last)
        output = self.body(inner, self._condition(level.t))
        return predict(output.to(x.dtype, memory_format=torch.contiguous_format), x, level, self.predicts)

    def _condition(self, t: float) -> Tensor:
        # One time after another: made together, their bits would depend on which times were asked for before.
        if t not in self._conditions:
            count = 1 if self.labels is None else len(self.labels)
            times = torch.full((count,), t, dtype=torch.float32, device=self.device)
            with torch.no_grad():
                self._conditions[t] = self.network.condition(times, self.labels).to(self.dtype)
        return self._conditions[t]
