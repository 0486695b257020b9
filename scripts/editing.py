"""Creates the figures of docs/editing.md: `python scripts/editing.py`, or only one: `python scripts/editing.py blend`.

Uses the bundled models, their samples, and drawings of a few straight lines; nothing is downloaded.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

import ddim
from ddim._io.png import labelled_rows, save_png, sheet
from ddim.data.pixels import to_float, to_uint8
from ddim.plan.base import Hooked
from ddim.sampling.loop import run
from ddim.sampling.x0_hooks import Mask, MeanPool, Operator, consistent, eps_kept

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
STEPS = 50
ETA = 0.85
LINES = {  # from, to: (row, column)
    "7": [((6, 7), (6, 20)), ((6, 20), (22, 11))],
    "4": [((5, 9), (14, 7)), ((14, 7), (14, 20)), ((6, 17), (22, 17))],
    "0": [((6, 9), (6, 18)), ((6, 18), (21, 18)), ((21, 18), (21, 9)), ((21, 9), (6, 9))],
    "2": [((7, 8), (6, 18)), ((6, 18), (21, 8)), ((21, 8), (21, 20))],
}


def drawing(lines: list[tuple[tuple[int, int], tuple[int, int]]]) -> np.ndarray:
    """A drawing with a square pen: uint8, (28, 28, 1)."""
    page = np.zeros((28, 28, 1), np.uint8)
    for (top, left), (bottom, right) in lines:
        for at in np.linspace(0, 1, 40):
            row, column = round(top + at * (bottom - top)), round(left + at * (right - left))
            page[row : row + 2, column : column + 2] = 255
    return page


def mnist() -> ddim.Model:
    """The bundled model, on the CPU."""
    return ddim.load("mnist", device="cpu")


def sdedit() -> np.ndarray:
    """Drawings regenerated from three timesteps."""
    model = mnist()
    drawn = to_float(np.stack([drawing(lines) for lines in LINES.values() for _ in range(3)]))
    rows = [("drawn", to_uint8(drawn))]
    for top in (250, 350, 450):
        samples = model.sample(len(drawn), steps=STEPS, seed=1, eta=ETA, top=top, origin=drawn)
        rows.append((f"from t = {top}", to_uint8(samples)))
    return labelled_rows(rows, zoom=2)


def inverse_problem(operator: Operator, name: str, variants: int) -> np.ndarray:
    """Images, their measurements, samples consistent with those, and one with eps recomputed."""
    model = mnist()
    images = model.sample(24, steps=30, seed=5, sampler="ddim")[::3][:8]
    y, plan = operator.apply(images), model.plan(STEPS, eta=ETA)
    constraint = consistent(operator, y, rounds=5)
    rows = [("image", to_uint8(images)), (name, to_uint8(operator.pinv(y)))]
    hooks = [(f"variant {k + 1}", eps_kept(constraint, plan), k) for k in range(variants)]
    for label, hook, seed in [*hooks, ("eps recomputed", constraint, 0)]:
        rows.append((label, to_uint8(run(Hooked(model.denoise, hook), plan, model.noise(len(images), seed)))))
    return labelled_rows(rows, zoom=2)


def inpainting() -> np.ndarray:
    """Inpainting of the lower half."""
    upper = torch.zeros(1, 28, 28, dtype=torch.bool)
    upper[:, :14] = True
    return inverse_problem(Mask(upper), "known", 4)


def upscaling() -> np.ndarray:
    """Upscaling from 7x7 pixels."""
    return inverse_problem(MeanPool(4), "7x7", 3)


def blend() -> np.ndarray:
    """Blends of three latents at the corners."""
    model, side = mnist(), 8
    corners = torch.cat([model.noise(1, seed).start() for seed in (3, 14, 8)])
    places = [(row, column) for row in range(side) for column in range(row + 1)]
    weights = [(side - 1 - row, row - column, column) for row, column in places]
    images = to_uint8(model.decode(ddim.blend(corners, weights), STEPS))
    page = np.full((side * side, *images.shape[1:]), 255, np.uint8)
    page[[row * side + column for row, column in places]] = images
    return sheet(page, columns=side, zoom=2)


def guidance() -> np.ndarray | None:
    """Ten classes under guidance of several scales, if a model with labels is bundled."""
    if not (Path(ddim.__file__).parent / "weights" / "fashion-mnist").is_dir():
        return None
    model = ddim.load("fashion-mnist", device="cpu")
    plan, labels, rows = model.plan(STEPS, sampler="ddim"), range(10), []
    for scale in (1.0, 2.0, 4.0):
        rows.append((f"guidance {scale:g}", to_uint8(model.sample(10, plan=plan, labels=labels, guidance=scale))))
    for lam in (0.2, 0.6, 1.0):
        scales = ddim.guidance.cfg_plus_plus(plan, lam)
        rows.append((f"CFG++ {lam:g}", to_uint8(model.sample(10, plan=plan, labels=labels, guidance=scales))))
    return labelled_rows(rows, zoom=2)


FIGURES = {figure.__name__: figure for figure in (sdedit, inpainting, upscaling, blend, guidance)}


def main(names: list[str]) -> None:
    for name in names or FIGURES:
        page = FIGURES[name]()
        if page is None:
            print(f"{name}: skipped, since no model with labels is bundled")
            continue
        save_png(IMAGES / f"{name}.png", page)
        print(f"{name}: {(IMAGES / f'{name}.png').stat().st_size // 1000} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
