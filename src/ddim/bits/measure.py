"""Bits per dimension of a set of pictures, image by image, in a folder that a killed run goes on with.

OUT/manifest.json      what the figures depend on; another request is refused
OUT/blocks.jsonl       one line per micro-batch, written when it is done
OUT/likelihood.json    mean, standard error, the terms' means; OUT/values.csv: one line per picture
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddim.bits.request import Request
from ddim.checksum import journal_line, read_journal
from ddim.engine import Engine
from ddim.errors import DdimError
from ddim.files import Appender, claimed, remove_parts, write_atomic
from ddim.likelihood import bits, discrete_nats, log_density
from ddim.manifest import MANIFEST, claim, identity
from ddim.mixture import CategoricalPlan
from ddim.plan import Plan
from ddim.seeds import Noise

BLOCKS = "blocks.jsonl"


@dataclass(frozen=True, slots=True)
class Block:
    """Some pictures' figures.

    Args:
        first: Index of the first one.
        bits: Bits per dimension of each.
        error: The solver's error in each, bits per dimension: the difference to half the steps; empty for the bound.
        terms: The bound's terms in the plan's order, KL(q(x_T | x_0) || N(0, I)) first, in bits per dimension,
            summed over the block's pictures, 0 for rows it did not have; empty for the ODE.
    """

    first: int
    bits: list[float]
    error: list[float]
    terms: list[float]


def measure(
    model: Engine, pictures: np.ndarray, names: Sequence[str], request: Request, folder: Path, name: str = ""
) -> Iterator[list[Block]]:
    """Measure pictures block by block into a folder, going on with what is there.

    Args:
        model: The model, in float32 for figures to be trusted.
        pictures: uint8, (N, H, W, C); or token ids, (N, L).
        names: A name for each.
        request: What to measure.
        folder: Where to.
        name: The model's name, for the manifest.

    Yields:
        The blocks so far: once at the start, then after each; after the last, the summary is in the folder.

    Raises:
        DdimError: If the folder holds something else or is in use, or a figure is not finite.
    """
    what = {"format": "ddim-likelihood", "version": 1, "method": request.method, "last_sigma": request.last_sigma}
    what |= {"probes": request.probes if request.method == "ode" else None, "seed": request.seed}
    what |= {"draws": request.draws} if request.draws else {}
    what |= {"data_sha256": hashlib.sha256(np.ascontiguousarray(pictures).tobytes()).hexdigest()}
    what |= identity(model, request.plan, name) | {"network_calls": request.calls}
    with claimed(folder, MANIFEST, BLOCKS) as owned:
        claim(folder, what, 0, len(pictures), "figures")
        remove_parts(folder)
        blocks = _read_blocks(folder / BLOCKS, request, model.micro_batch, len(pictures))
        yield blocks
        with Appender(folder / BLOCKS) as file:
            for first in range(sum(len(b.bits) for b in blocks), len(pictures), model.micro_batch):
                block = _block(model, pictures[first : first + model.micro_batch], first, request)
                file.write(journal_line({key: getattr(block, key) for key in Block.__slots__}))
                owned.keep()
                blocks = [*blocks, block]
                yield blocks
        _write_summary(folder, blocks, names, request, name)


def _read_blocks(path: Path, request: Request, size: int, total: int) -> list[Block]:
    """The whole lines of a file of blocks, which is cut to them."""

    def parse(line: Any, before: int) -> Block | None:
        first = before * size
        count = min(size, total - first)
        lengths = (count, 0, 1 + len(request.plan)) if request.method == "bound" else (count, count, 0)
        block = Block(**line)
        parts = [np.array(part, dtype=np.float64) for part in (block.bits, block.error, block.terms)]
        right = all(p.shape == (n,) and np.isfinite(p).all() for p, n in zip(parts, lengths, strict=True))
        return block if right and block.first == first else None

    return read_journal(path, parse)


def _block(model: Engine, pictures: np.ndarray, first: int, request: Request) -> Block:
    """One micro-batch, padded to its fixed size, so that a picture's figures do not depend on its neighbours."""
    count, size = len(pictures), model.micro_batch
    indices = [first + min(i, count - 1) for i in range(size)]
    x0 = model.kind.read(pictures[[i - first for i in indices]]).to(model.device)
    noise = model.noise(indices, request.seed)
    if request.method == "bound":
        with torch.no_grad():
            each = _bound(model, x0, noise, request, request.rows(first))
        terms = torch.stack([bits(term, x0[0].numel()) for term in each])[:, :count].cpu()
        figures, error = terms.sum(0), torch.empty(0)
    else:
        terms = torch.empty(0, 0)
        figures, error = (value[:count].cpu() for value in _ode(model, x0, noise, request))
    if not (torch.isfinite(figures).all() and torch.isfinite(error).all()):
        raise DdimError(
            f"pictures {first}..{first + count - 1}",
            "have a figure that is not finite",
            "use float32, or a less extreme sigma, in a new folder",
        )
    return Block(first, figures.tolist(), error.tolist(), terms.sum(1).tolist())


def _bound(model: Engine, x0: Tensor, noise: Noise, request: Request, rows: Sequence[tuple[int, int]]) -> list[Tensor]:
    """The bound's terms in nats, (N,) each, the prior's first; 0 for rows that are not listed."""
    kind, plan, prior = model.kind, request.plan, model.kind.prior(request.plan, x0)
    each = [prior, *(torch.zeros_like(prior) for _ in plan.rows)]
    for k, weight in rows:
        term = kind.term(model.denoise, plan, k, x0, noise.row(k), request.last_sigma or 0.0)
        each[1 + k] = weight * term
    return each


def _ode(model: Engine, x0: Tensor, noise: Noise, request: Request) -> tuple[Tensor, Tensor]:
    probes = torch.stack([noise.row(k).sign().flatten(1) for k in range(request.probes)])
    assert request.check is not None
    figures = []
    for plan in (request.plan, request.check):
        density = _density(model, plan, probes)
        nats = discrete_nats(density, model.denoise, plan.start, x0, noise.start(), request.last_sigma)
        figures.append(bits(nats, x0[0].numel()))
    return figures[0], (figures[0] - figures[1]).abs()


def _density(model: Engine, plan: Plan, probes: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: log_density(model.denoise, plan, x, probes)


def summary(blocks: Sequence[Block], request: Request) -> dict[str, Any]:
    """Mean and standard error in bits per dimension, and what they depend on."""
    values = np.array([value for block in blocks for value in block.bits])
    made: dict[str, Any] = {
        "method": request.method,
        "plan": request.plan.name,
        "network_calls": request.calls,
        "pictures": len(values),
        "bits_per_dim": float(values.mean()),
        "standard_error": float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None,
        "dequantisation": "uniform" if request.last_sigma is None else "discretised Gaussian at the last step",
        "last_sigma": request.last_sigma,
    }
    if isinstance(request.plan, CategoricalPlan):
        made |= {"dequantisation": None, "last_sigma": None}
    if request.method == "ode":
        errors = np.array([value for block in blocks for value in block.error])
        made |= {"solver_error_mean": float(errors.mean()), "solver_error_max": float(errors.max())}
        return made | {"probes": request.probes}
    terms = np.sum([block.terms for block in blocks], axis=0) / len(values)
    times = [row.now.t for row in request.plan.rows]
    steps = [{"from": t, "bits_per_dim": float(term)} for t, term in zip(times, terms[1:], strict=True)]
    return made | {"prior": float(terms[0]), "last_step": float(terms[-1]), "steps": steps}


def _write_summary(folder: Path, blocks: list[Block], names: Sequence[str], request: Request, name: str) -> None:
    made = {"model": name, **summary(blocks, request)}
    write_atomic(folder / "likelihood.json", (json.dumps(made, indent=1) + "\n").encode())
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["index", "name", "bits_per_dim", *(["solver_error"] if request.method == "ode" else [])])
    for block in blocks:
        for i, value in enumerate(block.bits):
            writer.writerow([block.first + i, names[block.first + i], value, *block.error[i : i + 1]])
    write_atomic(folder / "values.csv", text.getvalue().encode())
