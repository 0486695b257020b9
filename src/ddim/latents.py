"""Latents: walks between them, how well pictures come back from them, and the file that keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ddim.errors import DdimError
from ddim.plan import Plan
from ddim.tensors import read_tensors, write_tensors


def slerp(z0: Tensor, z1: Tensor, a: float | Tensor) -> Tensor:
    """Eq. (67): sin((1 - a) th) / sin(th) z0 + sin(a th) / sin(th) z1, with th the angle between z0 and z1.

    Computed in float64, per sample. Where z0 and z1 point the same way (or one is 0) the limit is the straight line.
    Where they are opposite no great circle is singled out: the one through z0 with its coordinates swapped in pairs,
    one sign changed, is taken, which keeps the length as on any other.

    Args:
        z0: (N, ...) latents.
        z1: (N, ...) latents.
        a: Where between them, 0 gives z0 and 1 gives z1; a number, or (N,).

    Returns:
        (N, ...), the dtype of z0.
    """
    shape, dtype = z0.shape, z0.dtype
    p, q = z0.reshape(len(z0), -1).double(), z1.reshape(len(z1), -1).double()
    at = torch.as_tensor(a, dtype=torch.float64, device=p.device).expand(len(p))[:, None]
    p_norm, q_norm = p.norm(dim=1, keepdim=True), q.norm(dim=1, keepdim=True)
    tiny = torch.finfo(torch.float64).tiny
    u, v = p / p_norm.clamp_min(tiny), q / q_norm.clamp_min(tiny)
    # Kahan's angle: accurate where the arccos of the inner product loses half of the digits.
    theta = 2 * torch.atan2((u - v).norm(dim=1, keepdim=True), (u + v).norm(dim=1, keepdim=True))
    sine = theta.sin()
    curved = (((1 - at) * theta).sin() * p + (at * theta).sin() * q) / sine.clamp_min(1e-12)
    straight = (1 - at) * p + at * q
    length = (1 - at) * p_norm + at * q_norm
    around = length * ((at * torch.pi).cos() * u + (at * torch.pi).sin() * _turned(u))
    opposite = (theta > torch.pi - 1e-6) & (p_norm > 0) & (q_norm > 0)
    near = (theta < 1e-6) | (p_norm == 0) | (q_norm == 0)
    out = torch.where(near, straight, torch.where(opposite, around, curved))
    out = torch.where(at == 0, p, torch.where(at == 1, q, out))
    result: Tensor = out.reshape(shape).to(dtype)
    return result


def _turned(u: Tensor) -> Tensor:
    """Unit vectors at right angles to the unit vectors u, (N, d); for d = 1 there are none, and 0 is given."""
    even = u.shape[1] // 2 * 2
    turned = torch.zeros_like(u)
    turned[:, 0:even:2], turned[:, 1:even:2] = -u[:, 1:even:2], u[:, 0:even:2]
    return turned.div(turned.norm(dim=1, keepdim=True).clamp_min(torch.finfo(u.dtype).tiny))


def walk(z0: Tensor, z1: Tensor, frames: int) -> Tensor:
    """Latents from z0 to z1, both ends included.

    Args:
        z0: (...), one latent.
        z1: (...), another.
        frames: How many, at least 2.

    Returns:
        (frames, ...).
    """
    a = torch.linspace(0, 1, frames, dtype=torch.float64)
    return slerp(z0.expand(frames, *z0.shape), z1.expand(frames, *z1.shape), a)


def between_four(corners: Tensor, rows: int, columns: int) -> Tensor:
    """A sheet of latents: slerp down the left and right edges, then across (the paper's figure of grids).

    Args:
        corners: (4, ...): top left, top right, bottom left, bottom right.
        rows: How many rows, at least 2.
        columns: How many columns, at least 2.

    Returns:
        (rows * columns, ...), row by row.
    """
    left, right = walk(corners[0], corners[2], rows), walk(corners[1], corners[3], rows)
    return torch.cat([walk(a, b, columns) for a, b in zip(left, right, strict=True)])


def reconstruction_error(images: Tensor, again: Tensor) -> Tensor:
    """The paper's Table 2: mean squared error per dimension, pictures scaled to [0, 1], neither clipped nor rounded.

    Args:
        images: (N, C, H, W), in [-1, 1].
        again: The same shape, encoded and decoded.

    Returns:
        float64, (N,).
    """
    return (images.double() - again.double()).div(2).square().flatten(1).mean(1)


@dataclass(frozen=True, slots=True)
class LatentsFile:
    """What a latents file says beside its latents.

    Args:
        names: Where each latent comes from, (N,).
        plan: The plan that encoded.
        model_sha256: The checksum of the model's weights.
    """

    names: tuple[str, ...]
    plan: Plan
    model_sha256: str


def write_latents(path: Path, latents: Tensor, names: Sequence[str], plan: Plan, model_sha256: str) -> None:
    """Write latents, float32 (N, C, H, W), to a safetensors file with what decoding must know.

    Raises:
        DdimError: If it cannot be written.
    """
    meta = {
        "format": "ddim-latents",
        "version": 1,
        "names": list(names),
        "plan": plan.to_json(),
        "model_sha256": model_sha256,
    }
    write_tensors(path, {"latents": latents}, meta)


def read_latents(path: Path) -> tuple[Tensor, LatentsFile]:
    """Latents, float32 (N, C, H, W), and what their file says beside them.

    Raises:
        DdimError: If it is not such a file, or holds numbers that are not finite.
    """
    tensors, meta = read_tensors(path)
    if meta.get("format") != "ddim-latents" or "latents" not in tensors or not {"names", "plan"} <= meta.keys():
        raise DdimError(path, "is not a latents file", "write one with `ddim encode`")
    latents, names = tensors["latents"].float(), tuple(meta["names"] or ())
    if latents.ndim != 4 or len(names) != len(latents) or not torch.isfinite(latents).all():
        raise DdimError(path, f"holds no usable latents ({list(latents.shape)})", "write it again with `ddim encode`")
    return latents, LatentsFile(names, Plan.from_json(meta["plan"], str(path)), meta.get("model_sha256", ""))
