"""`--animate`: the predicted x_0 and the state x_t along the steps, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from ddim.model.model import Model
    from ddim.plan.base import BasePlan
    from ddim.sampling.guidance import Guidance

SHOWN = 16
"""The maximum number of samples in an animation."""
FRAMES = 100
"""The maximum number of frames: with more steps, evenly spaced ones are shown."""
SIDE = 300
"""The number of pixels of each of the two halves, approximately."""


def animate(
    path: Path,
    model: Model,
    plan: BasePlan[Any],
    indices: Sequence[int],
    seed: int,
    labels: Sequence[int] | None,
    guidance: Guidance | None,
) -> str:
    """Write an animation of samples, which are computed again, with one frame per step.

    Args:
        path: The file: GIF, WebP or MP4, see `ddim._io.animation`.
        model: A model of real-valued images.
        plan: The plan.
        indices: The samples' indices; the first `SHOWN` are shown.
        seed: The run's seed.
        labels: One label per sample, for a model with labels.
        guidance: Scale of classifier-free guidance, or a function from level to scale.

    Returns:
        What is shown, in one line.
    """
    import torch

    from ddim._io.animation import save_animation
    from ddim._io.terminal import counted
    from ddim.data.pixels import to_uint8
    from ddim.sampling.loop import trajectory
    from ddim.sampling.microbatch import sample_micro_batches

    shown = list(indices)[:SHOWN]
    rows = sorted({round(k) for k in np.linspace(0, len(plan) - 1, min(len(plan), FRAMES))})

    def record(denoise: Any, plan: BasePlan[Any], start: Tensor, noise: Any) -> Tensor:
        """The pairs (x_0, x_t) before each row of `rows` and at the end: (N, frames, 2, ...)."""
        x, pairs = start, []
        for step in trajectory(denoise, plan, start, noise):
            if step.index in rows:
                pairs.append(torch.stack([step.x0.to(start), x.to(start)], 1))
            x = step.x
        return torch.stack([*pairs, torch.stack([x.to(start)] * 2, 1)], 1)

    at, varies = model.denoiser_of(len(shown), None if labels is None else list(labels)[:SHOWN], guidance)
    parts = sample_micro_batches(
        at, plan, lambda part: model.noise(part, seed), shown, model.micro_batch, varies, None, model.padded, record
    )
    pairs = torch.cat([*parts])
    times = [*(plan.rows[k].now.t for k in rows), plan.end.t]
    frames = [
        _frame(to_uint8(pairs[:, frame, 0]), to_uint8(pairs[:, frame, 1]), f"x_t, t = {t:g}")
        for frame, t in enumerate(times)
    ]
    save_animation(path, frames)
    of = "" if len(rows) == len(plan) else f" of {len(plan)}"
    return f"{counted(len(shown), 'images')}, {counted(len(rows), 'steps')}{of}"


def _frame(x0: np.ndarray, x: np.ndarray, title: str) -> np.ndarray:
    """One frame, (H, W, 3): two grids of images, uint8 (N, H, W, C), with titles above."""
    from PIL import Image, ImageDraw, ImageFont

    from ddim._io.png import sheet

    n, height, width, _ = x0.shape
    columns = max(1, round(n**0.5))
    zoom = max(1, round(SIDE / (columns * max(height, width))))
    halves = [sheet(images, columns, zoom=zoom) for images in (x0, x)]
    tall, wide, _ = halves[0].shape
    page, font, top, gap = Image.new("RGB", (2 * wide + 12, tall + 22), "white"), ImageFont.load_default(13), 20, 12
    draw = ImageDraw.Draw(page)
    for left, text, half in zip((0, wide + gap), ("predicted x_0", title), halves, strict=True):
        draw.text((left + 3, 3), text, "black", font)
        page.paste(Image.fromarray(half[:, :, 0] if half.shape[2] == 1 else half), (left, top))
    return np.asarray(page)
