"""The pictures of docs/editing.md: `python scripts/editing.py`; a name, such as `blend`, makes that one alone.

Made with the bundled models, from their own samples and from drawings of a few straight lines; nothing is downloaded.
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
    """Drawings made anew from three times."""
    model = mnist()
    drawn = to_float(np.stack([drawing(lines) for lines in LINES.values() for _ in range(3)]))
    rows = [("drawn", to_uint8(drawn))]
    for top in (250, 350, 450):
        made = model.sample(len(drawn), STEPS, seed=1, eta=ETA, top=top, origin=drawn)
        rows.append((f"from t = {top}", to_uint8(made)))
    return labelled_rows(rows, zoom=2)


def known(operator: Operator, name: str, variants: int) -> np.ndarray:
    """Pictures, what is known of them, variants of them, and one with eps derived again."""
    model = mnist()
    pictures = model.sample(24, 30, seed=5, sampler="ddim")[::3][:8]
    y, plan = operator.apply(pictures), model.plan(STEPS, eta=ETA)
    held = consistent(operator, y, rounds=5)
    rows = [("picture", to_uint8(pictures)), (name, to_uint8(operator.pinv(y)))]
    hooks = [(f"variant {k + 1}", eps_kept(held, plan), k) for k in range(variants)]
    for label, hook, seed in [*hooks, ("eps derived again", held, 0)]:
        rows.append((label, to_uint8(run(Hooked(model.denoise, hook), plan, model.noise(len(pictures), seed)))))
    return labelled_rows(rows, zoom=2)


def inpainting() -> np.ndarray:
    """The lower half made anew."""
    upper = torch.zeros(1, 28, 28, dtype=torch.bool)
    upper[:, :14] = True
    return known(Mask(upper), "known", 4)


def upscaling() -> np.ndarray:
    """From 7x7 pixels."""
    return known(MeanPool(4), "7x7", 3)


def blend() -> np.ndarray:
    """Three latents at the corners, and blends of them between."""
    model, side = mnist(), 8
    corners = torch.cat([model.noise(1, seed).start() for seed in (3, 14, 8)])
    places = [(row, column) for row in range(side) for column in range(row + 1)]
    weights = [(side - 1 - row, row - column, column) for row, column in places]
    made = to_uint8(model.decode(ddim.blend(corners, weights), STEPS))
    page = np.full((side * side, *made.shape[1:]), 255, np.uint8)
    page[[row * side + column for row, column in places]] = made
    return sheet(page, columns=side, zoom=2)


def guidance() -> np.ndarray | None:
    """Ten classes under guidance of several scales, where a model with labels is bundled."""
    if not (Path(ddim.__file__).parent / "weights" / "fashion-mnist").is_dir():
        return None
    model = ddim.load("fashion-mnist", device="cpu")
    plan, labels, rows = model.plan(STEPS), range(10), []
    for scale in (1.0, 2.0, 4.0):
        rows.append((f"guidance {scale:g}", to_uint8(model.sample(10, plan=plan, labels=labels, guidance=scale))))
    for lam in (0.2, 0.6, 1.0):
        scales = ddim.guidance.cfg_plus_plus(plan, lam)
        rows.append((f"CFG++ {lam:g}", to_uint8(model.sample(10, plan=plan, labels=labels, guidance=scales))))
    return labelled_rows(rows, zoom=2)


PICTURES = {made.__name__: made for made in (sdedit, inpainting, upscaling, blend, guidance)}


def main(names: list[str]) -> None:
    for name in names or PICTURES:
        page = PICTURES[name]()
        if page is None:
            print(f"{name}: left out, no model with labels is bundled")
            continue
        save_png(IMAGES / f"{name}.png", page)
        print(f"{name}: {(IMAGES / f'{name}.png').stat().st_size // 1000} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
