"""Latents: walks between them, how well pictures come back from them, and the file that keeps them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddim import samplers
from ddim._io.arguments import floats
from ddim._io.reading import entry, list_of
from ddim._io.safetensors import read_tensors, write_tensors
from ddim.errors import DdimError
from ddim.plan.plan import Plan


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

    Raises:
        DdimError: If they are not finite floats of one shape.
    """
    z0, z1 = floats(z0, "latents"), floats(z1, "latents")
    if z0.shape != z1.shape:
        raise DdimError("latents", f"are {tuple(z0.shape)} and {tuple(z1.shape)}", "give two of one shape")
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
    around = length * ((at * torch.pi).cos() * u + (at * torch.pi).sin() * _orthogonal(u))
    opposite = (theta > torch.pi - 1e-6) & (p_norm > 0) & (q_norm > 0)
    near = (theta < 1e-6) | (p_norm == 0) | (q_norm == 0)
    out = torch.where(near, straight, torch.where(opposite, around, curved))
    out = torch.where(at == 0, p, torch.where(at == 1, q, out))
    result: Tensor = out.reshape(shape).to(dtype)
    return result


def _orthogonal(u: Tensor) -> Tensor:
    """Unit vectors at right angles to the unit vectors u, (N, d); for d = 1 there are none, and 0 is given."""
    even = u.shape[1] // 2 * 2
    turned = torch.zeros_like(u)
    turned[:, 0:even:2], turned[:, 1:even:2] = -u[:, 1:even:2], u[:, 0:even:2]
    return turned.div(turned.norm(dim=1, keepdim=True).clamp_min(torch.finfo(u.dtype).tiny))


def slerp_path(z0: Tensor, z1: Tensor, frames: int) -> Tensor:
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


def slerp_grid(corners: Tensor, rows: int, columns: int) -> Tensor:
    """A sheet of latents: slerp down the left and right edges, then across (the paper's figure of grids).

    Args:
        corners: (4, ...): top left, top right, bottom left, bottom right.
        rows: How many rows, at least 2.
        columns: How many columns, at least 2.

    Returns:
        (rows * columns, ...), row by row.
    """
    left, right = slerp_path(corners[0], corners[2], rows), slerp_path(corners[1], corners[3], rows)
    return torch.cat([slerp_path(a, b, columns) for a, b in zip(left, right, strict=True)])


def blend(latents: Tensor, weights: Tensor | Sequence[float] | Sequence[Sequence[float]]) -> Tensor:
    """sum_i w_i z_i / sqrt(sum_i w_i^2): of independent N(0, I) latents again one of N(0, I) (Bodin et al. 2024).

    Computed in float64. With one weight it is that latent (its negative for a negative weight), and only the weights'
    ratios matter. Of two latents of equal length at right angles, the weights cos(a pi / 2), sin(a pi / 2) give slerp
    at a. Blends of latents that are not independent, of pictures encoded for instance, are not N(0, I) exactly.

    Args:
        latents: (n, ...).
        weights: (n,), or (m, n) for m blends; finite, of any sign, not all 0.

    Returns:
        (...), or (m, ...), the dtype of latents.

    Raises:
        DdimError: If the latents are none or not finite, or the weights do not fit them, are not finite or all 0.
    """
    if not len(floats(latents, "latents")):
        raise DdimError("latents", "to blend are none", "give at least one")
    w = torch.as_tensor(weights, dtype=torch.float64, device=latents.device)
    if w.ndim not in (1, 2) or w.shape[-1] != len(latents):
        raise DdimError("weights", f"are {tuple(w.shape)} for {len(latents)} latents", "give one for each latent")
    largest = w.abs().amax(-1, keepdim=True) if w.numel() else w
    if not (torch.isfinite(w).all() and (largest > 0).all()):
        raise DdimError("weights", "are all 0, or not finite", "give each blend a weight that is not 0")
    w = w / largest
    made = torch.tensordot(w / w.norm(dim=-1, keepdim=True), latents.double(), 1)
    result: Tensor = made.to(latents.dtype)
    return result


def reconstruction_error(images: Tensor, again: Tensor) -> Tensor:
    """The paper's Table 2: mean squared error per dimension, pictures scaled to [0, 1], neither clipped nor rounded.

    Args:
        images: (N, C, H, W), in [-1, 1].
        again: The same shape, encoded and decoded.

    Returns:
        float64, (N,).
    """
    return (images.double() - again.double()).div(2).square().flatten(1).mean(1)


@dataclass(frozen=True, slots=True, eq=False)
class LatentsFile:
    """What a latents file says beside its latents.

    Args:
        names: Where each latent comes from, (N,).
        plan: The plan that decodes; of latents that are two states, from the second of them on.
        model_sha256: The checksum of the model's weights.
        method: The method that encoded, one of `ddim.names.METHODS`.
        earlier: The states one step before the latents, (N, C, H, W), where a latent is two states.
        conditions: What else the last bits depend on, see `ddim.model.base.ModelBase.conditions`.
    """

    names: tuple[str, ...]
    plan: Plan
    model_sha256: str
    method: str = "ddim"
    earlier: Tensor | None = None
    conditions: Mapping[str, Any] = field(default_factory=dict)

    def other_conditions(self, now: Mapping[str, Any]) -> str:
        """How `now` differs from the conditions of the encoding, in words; "" where it does not."""
        return ", ".join(
            f"{key} {value}, now {now.get(key)}" for key, value in self.conditions.items() if value != now.get(key)
        )


def write_latents(path: Path, latents: Tensor, file: LatentsFile) -> None:
    """Write latents, (N, C, H, W), float32 or float64, to a safetensors file with what decoding must know.

    Raises:
        DdimError: If it cannot be written.
    """
    meta = {
        "format": "ddim-latents",
        "version": 2,
        "names": list(file.names),
        "plan": file.plan.to_json(),
        "model_sha256": file.model_sha256,
        "method": file.method,
        "conditions": dict(file.conditions),
    }
    states = {"latents": latents} | ({} if file.earlier is None else {"earlier": file.earlier})
    write_tensors(path, states, meta)


def _digest(states: Mapping[str, Tensor]) -> str:
    """The checksum of the states, in the order of their names, as files of version 0.1 hold it."""
    parts = [states[name].detach().cpu().contiguous().numpy().tobytes() for name in sorted(states)]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def read_latents(path: Path) -> tuple[Tensor, LatentsFile]:
    """Latents, (N, C, H, W), float32 or float64, and what their file says beside them.

    A file of version 1 holds the plan that encoded, always eq. (13) backwards; it is given as the one that decodes.

    Raises:
        DdimError: If it is not such a file, or holds numbers that are not finite.
    """
    tensors, meta = read_tensors(path)
    if meta.get("format") != "ddim-latents" or "latents" not in tensors or not {"names", "plan"} <= meta.keys():
        raise DdimError(path, "is not a latents file", "write one with `ddim encode`")
    if meta.get("version") not in (1, 2):
        raise DdimError(path, f"is a latents file of version {meta.get('version')}", "this ddim reads versions 1 and 2")
    if meta.get("sha256") not in (None, _digest(tensors)):
        raise DdimError(path, "is damaged: its latents are not those that were written", "encode again")
    again = "write it again with `ddim encode`"
    latents, names = tensors["latents"], tuple(list_of(meta["names"], str, "names", path, again))
    if latents.dtype not in (torch.float32, torch.float64):
        raise DdimError(path, f"holds latents that are {latents.dtype}, not float32 or float64", again)
    plan = Plan.from_json(entry(meta, "plan", str, path, hint=again), str(path))
    earlier, conditions = tensors.get("earlier"), entry(meta, "conditions", dict, path, {}, again)
    states = [latents] if earlier is None else [latents, earlier.to(latents.dtype)]
    sound = all(state.shape == latents.shape and torch.isfinite(state).all() for state in states)
    if latents.ndim != 4 or len(names) != len(latents) or not sound or len(plan.before) != len(states) - 1:
        raise DdimError(path, f"holds no usable latents ({list(latents.shape)})", "write it again with `ddim encode`")
    method = entry(meta, "method", str, path, "ddim", again)
    sha256 = entry(meta, "model_sha256", str, path, "", again)
    if plan.stochastic:
        raise DdimError(path, "holds a plan that adds noise", "write it again with `ddim encode`")
    if meta["version"] == 1:
        levels = [*(row.next for row in reversed(plan.rows)), plan.start]
        plan = samplers.ddim(levels, about=plan.about.removesuffix(", encode"))
    return latents, LatentsFile(names, plan, sha256, method, states[1] if earlier is not None else None, conditions)
