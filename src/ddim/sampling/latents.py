"""Latents: interpolation, reconstruction error, and the latents file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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

    Computed in float64, per sample. For z0 and z1 in the same direction (or if one is 0) the limit is linear
    interpolation. For opposite ones the great circle is not unique: the one through z0 with its coordinates swapped in
    pairs, one sign changed, is used, with linearly interpolated length.

    Args:
        z0: (N, ...) latents.
        z1: (N, ...) latents.
        a: The position between them, 0 gives z0 and 1 gives z1; a number, or (N,).

    Returns:
        (N, ...), the dtype of z0.

    Raises:
        DdimError: If they are not finite floats of the same shape.
    """
    z0, z1 = floats(z0, "latents"), floats(z1, "latents")
    if z0.shape != z1.shape:
        raise DdimError("latents", f"are {tuple(z0.shape)} and {tuple(z1.shape)}", "pass two of one shape")
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
    """Unit vectors orthogonal to the unit vectors u, (N, d); 0 for d = 1, where there are none."""
    even = u.shape[1] // 2 * 2
    turned = torch.zeros_like(u)
    turned[:, 0:even:2], turned[:, 1:even:2] = -u[:, 1:even:2], u[:, 0:even:2]
    return turned.div(turned.norm(dim=1, keepdim=True).clamp_min(torch.finfo(u.dtype).tiny))


def slerp_path(z0: Tensor, z1: Tensor, frames: int) -> Tensor:
    """Latents from z0 to z1, both ends included.

    Args:
        z0: The first latent, (...).
        z1: The last latent, (...).
        frames: Number of latents, at least 2.

    Returns:
        (frames, ...).
    """
    a = torch.linspace(0, 1, frames, dtype=torch.float64)
    return slerp(z0.expand(frames, *z0.shape), z1.expand(frames, *z1.shape), a)


def slerp_grid(corners: Tensor, rows: int, columns: int) -> Tensor:
    """A grid of latents: slerp down the left and right edges, then across (the paper's figure of grids).

    Args:
        corners: (4, ...): top left, top right, bottom left, bottom right.
        rows: Number of rows, at least 2.
        columns: Number of columns, at least 2.

    Returns:
        (rows * columns, ...), row by row.
    """
    left, right = slerp_path(corners[0], corners[2], rows), slerp_path(corners[1], corners[3], rows)
    return torch.cat([slerp_path(a, b, columns) for a, b in zip(left, right, strict=True)])


def blend(latents: Tensor, weights: Tensor | Sequence[float] | Sequence[Sequence[float]]) -> Tensor:
    """sum_i w_i z_i / sqrt(sum_i w_i^2): N(0, I) again for independent N(0, I) latents (Bodin et al. 2024).

    Computed in float64. With one weight it is that latent (its negative for a negative weight), and only the ratios of
    the weights matter. For two orthogonal latents of equal length, the weights cos(a pi / 2), sin(a pi / 2) give slerp
    at a. Blends of dependent latents, for example of encoded images, are not exactly N(0, I).

    Args:
        latents: (n, ...).
        weights: (n,), or (m, n) for m blends; finite, of any sign, not all 0.

    Returns:
        (...), or (m, ...), the dtype of latents.

    Raises:
        DdimError: If there are no latents or they are not finite, or the weights do not match their number, are not
            finite or all 0.
    """
    if not len(floats(latents, "latents")):
        raise DdimError("latents", "to blend are missing", "pass at least one")
    w = torch.as_tensor(weights, dtype=torch.float64, device=latents.device)
    if w.ndim not in (1, 2) or w.shape[-1] != len(latents):
        raise DdimError("weights", f"are {tuple(w.shape)} for {len(latents)} latents", "pass one for each latent")
    largest = w.abs().amax(-1, keepdim=True) if w.numel() else w
    if not (torch.isfinite(w).all() and (largest > 0).all()):
        raise DdimError("weights", "are all 0, or not finite", "pass a weight that is not 0 for each blend")
    w = w / largest
    total = torch.tensordot(w / w.norm(dim=-1, keepdim=True), latents.double(), 1)
    result: Tensor = total.to(latents.dtype)
    return result


def reconstruction_error(images: Tensor, again: Tensor) -> Tensor:
    """The paper's Table 2: mean squared error per dimension, images scaled to [0, 1], neither clipped nor rounded.

    Args:
        images: (N, C, H, W), in [-1, 1].
        again: The encoded and decoded images, the same shape.

    Returns:
        float64, (N,).
    """
    return (images.double() - again.double()).div(2).square().flatten(1).mean(1)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Latents:
    """Latents of data, with what decoding them needs; a latents file holds the same.

    Args:
        x: The latents x_T, (N, ...), float32 or float64.
        plan: The plan that decodes; if a latent consists of two states, the plan from the second state on.
        earlier: If a latent consists of two states, the states one step before the latents, (N, ...).
        method: The inversion method, one of `ddim.names.METHODS`.
        names: The source of each latent, (N,), or none.
        model_sha256: The checksum of the model's weights; empty if unknown.
        conditions: The settings that change the last bits, see `ddim.Model.conditions`.
    """

    x: Tensor
    plan: Plan
    earlier: Tensor | None = None
    method: str = "ddim"
    names: tuple[str, ...] = ()
    model_sha256: str = ""
    conditions: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.x)

    def __repr__(self) -> str:
        states = "" if self.earlier is None else ", 2 states each"
        return f"Latents({tuple(self.x.shape)}, {self.method}, {self.plan.name}{states})"

    def __getitem__(self, index: slice | Sequence[int] | Tensor) -> Latents:
        """A selection of the latents, by a slice or by indices."""
        if isinstance(index, int):
            raise TypeError("select latents by a slice or a list of indices; `latents.x[i]` is one tensor")
        selected = torch.arange(len(self))[index].tolist()
        names = tuple(self.names[i] for i in selected) if self.names else ()
        earlier = None if self.earlier is None else self.earlier[selected]
        return replace(self, x=self.x[selected], earlier=earlier, names=names)

    def states(self) -> tuple[Tensor, list[Tensor]]:
        """The state that `plan` starts from, and the states before it, as `ddim.trajectory` takes them."""
        return (self.x, []) if self.earlier is None else (self.earlier, [self.x])

    def to(self, device: torch.device | str) -> Latents:
        """The latents on a device."""
        return replace(self, x=self.x.to(device), earlier=None if self.earlier is None else self.earlier.to(device))

    def other_conditions(self, now: Mapping[str, Any]) -> str:
        """How `now` differs from the conditions of the encoding, as text; "" if it does not."""
        return ", ".join(
            f"{key} {value}, now {now.get(key)}" for key, value in self.conditions.items() if value != now.get(key)
        )


def write_latents(path: Path, latents: Latents) -> None:
    """Write latents to a safetensors file.

    Raises:
        DdimError: If the file cannot be written.
    """
    meta = {
        "format": "ddim-latents",
        "version": 2,
        "names": list(latents.names) or [str(i) for i in range(len(latents))],
        "plan": latents.plan.to_json(),
        "model_sha256": latents.model_sha256,
        "method": latents.method,
        "conditions": dict(latents.conditions),
    }
    states = {"latents": latents.x} | ({} if latents.earlier is None else {"earlier": latents.earlier})
    write_tensors(path, states, meta)


def _digest(states: Mapping[str, Tensor]) -> str:
    """The checksum of the states, in the order of their names, as stored by version 0.1."""
    parts = [states[name].detach().cpu().contiguous().numpy().tobytes() for name in sorted(states)]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def read_latents(path: Path) -> Latents:
    """Read a latents file.

    A file of version 1 contains the encoding plan, always eq. (13) backwards; the matching decoding plan is returned.

    Raises:
        DdimError: If it is not a latents file, or contains numbers that are not finite.
    """
    tensors, meta = read_tensors(path)
    if meta.get("format") != "ddim-latents" or "latents" not in tensors or not {"names", "plan"} <= meta.keys():
        raise DdimError(path, "is not a latents file", "write one with `ddim encode`")
    if meta.get("version") not in (1, 2):
        raise DdimError(path, f"is a latents file of version {meta.get('version')}", "ddim reads versions 1 and 2")
    if meta.get("sha256") not in (None, _digest(tensors)):
        raise DdimError(path, "is damaged: its latents have another checksum", "encode again")
    hint = "write it again with `ddim encode`"
    latents, names = tensors["latents"], tuple(list_of(meta["names"], str, "names", path, hint))
    if latents.dtype not in (torch.float32, torch.float64):
        raise DdimError(path, f"has latents in {latents.dtype}, not float32 or float64", hint)
    plan = Plan.from_json(entry(meta, "plan", str, path, hint=hint), str(path))
    earlier, conditions = tensors.get("earlier"), entry(meta, "conditions", dict, path, {}, hint)
    states = [latents] if earlier is None else [latents, earlier.to(latents.dtype)]
    sound = all(state.shape == latents.shape and torch.isfinite(state).all() for state in states)
    if latents.ndim < 2 or len(names) != len(latents) or not sound or len(plan.before) != len(states) - 1:
        raise DdimError(path, f"holds no usable latents ({list(latents.shape)})", "write it again with `ddim encode`")
    method = entry(meta, "method", str, path, "ddim", hint)
    sha256 = entry(meta, "model_sha256", str, path, "", hint)
    if plan.stochastic:
        raise DdimError(path, "has a plan that adds noise", "write it again with `ddim encode`")
    if meta["version"] == 1:
        levels = [*(row.next for row in reversed(plan.rows)), plan.start]
        plan = samplers.ddim(levels, about=plan.about.removesuffix(", encode"))
    return Latents(latents, plan, states[1] if earlier is not None else None, method, names, sha256, conditions)
