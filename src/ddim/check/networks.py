"""Checks of a user's network and of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ddim import samplers
from ddim.check.denoisers import denoiser, quiet_levels
from ddim.check.finding import Finding, at_most, info
from ddim.data.pixels import to_float
from ddim.errors import DdimError
from ddim.model.model import Model
from ddim.names import Predicts
from ddim.nn.base import as_timed
from ddim.process.parameterization import Prediction, predict
from ddim.process.schedule import Level, Schedule


def network(
    module: Callable[[Tensor, Tensor], Tensor],
    schedule: Schedule,
    predicts: Predicts,
    shape: Sequence[int],
    x0: Tensor | None = None,
    quick: bool = False,
    device: torch.device | str = "cpu",
    time_offset: float = 0.0,
) -> Iterator[Finding]:
    """Verify a user's network with the checks of `denoiser`.

    Args:
        module: A `torch.nn.Module`, called as module(x, t) with x float32 (B, *shape) and t float32 (B,), integers
            0..T - 1 as in training and in `ddim.wrap`. Put it into evaluation mode first; it is used unchanged.
        schedule: The schedule it was trained on.
        predicts: What it predicts: "eps", "x0" or "v".
        shape: The shape of one sample.
        x0: Data from the training distribution, float (N, *shape); if None, samples are drawn from the network.
        quick: Fewer samples, times and steps.
        device: The device of the network.
        time_offset: Added to the time: 1 for a network whose times are 1..T.

    Yields:
        One finding per check, see `denoiser`.

    Raises:
        DdimError: If the network does not return a tensor of x's shape.
    """

    def denoise(x: Tensor, level: Level, /) -> Prediction:
        output = as_timed(module)(x, torch.full((len(x),), level.t + time_offset, device=x.device))
        if not isinstance(output, Tensor) or output.shape != x.shape:
            returned = f"of shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
            raise DdimError("network", f"returns {returned} for x of {tuple(x.shape)}", "return a tensor of x's shape")
        return predict(output.to(x.dtype), x, level, predicts)

    yield from denoiser(denoise, schedule, shape, predicts, x0, quick, device)


def model(model: Model, images: Tensor | np.ndarray | None = None, quick: bool = False) -> Iterator[Finding]:
    """Verify a model: the checks of `denoiser`, and that a sample is bit-identical whatever batch it is drawn in.

    The schedule is not checked, see `schedule`. A model that requires a label is evaluated with label 0.

    Args:
        model: The model, preferably in float32.
        images: Images from its data, uint8 (N, H, W, C) or float (N, C, H, W) in [-1, 1]; its own samples if None.
        quick: Fewer samples, times and steps.

    Yields:
        One finding per check.

    Raises:
        DdimError: If the images do not have the model's shape.
    """
    x0 = None
    if images is not None:
        x0 = to_float(images) if images.dtype in (np.uint8, torch.uint8) else torch.as_tensor(images)
    always = model.config.needs_label
    denoise = model.denoiser(torch.tensor([0])) if always else model.denoise
    if always:
        yield info("label", "0", "the model was not trained without labels")
    rounding = None if model.dtype == torch.float32 else 0.1
    config = model.config
    yield from denoiser(denoise, model.schedule, model.shape, config.predicts, x0, quick, model.device, rounding)
    yield _bit_invariance(model, 0 if always else None)


def _bit_invariance(model: Model, label: int | None) -> Finding:
    plan = samplers.ddim(quiet_levels(model.schedule, model.config.predicts, min(3, model.schedule.T)))
    together = model.sample(3, plan=plan, labels=label)
    alone = model.sample(1, plan=plan, labels=label, start=2)
    off = int((together[2:] != alone).sum())
    return at_most("sample 2 alone, differing numbers", off, 0, "from sample 2 of three, bit for bit")
