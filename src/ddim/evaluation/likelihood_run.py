"""Bits per dimension of images, or per token of text, computed into a folder from which an interrupted run resumes."""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ddim import samplers
from ddim._io.atomic import Appender, claimed, write_atomic
from ddim._io.checksum import journal_line, read_journal
from ddim._io.temporary import remove_parts
from ddim.errors import DdimError, either
from ddim.evaluation.likelihood import bits, discrete_nats, log_density
from ddim.evaluation.sample_folder import MANIFEST, identity, write_or_verify
from ddim.model.model import Model
from ddim.objective import categorical_elbo, elbo
from ddim.plan.base import BasePlan
from ddim.plan.categorical import CategoricalPlan
from ddim.plan.plan import Plan
from ddim.process import rng
from ddim.process.rng import Noise

BLOCKS = "blocks.jsonl"

_ROWS = 0x726F7773  # seed component of the generator that chooses rows

Dequantize = Literal["decoder", "uniform"]


@dataclass(frozen=True, slots=True)
class Block:
    """Likelihoods of one micro-batch of samples.

    Args:
        first: Index of the first sample.
        bits: Bits per dimension of each sample.
        error: Estimated solver error of each sample in bits per dimension: the difference to the result with half the
            steps; empty for the bound.
        terms: Terms of the bound in the plan's order, KL(q(x_T | x_0) || N(0, I)) first, in bits per dimension, summed
            over the samples, 0 for rows that were not evaluated; empty for the ODE.
    """

    first: int
    bits: list[float]
    error: list[float]
    terms: list[float]


def measure(
    model: Model, images: np.ndarray, names: Sequence[str], request: Request, folder: Path, name: str = ""
) -> Generator[list[Block], None, None]:
    """Compute likelihoods in micro-batches into a folder, resuming from the results in it.

    Args:
        model: The model, in float32 for accurate results.
        images: uint8, (N, H, W, C); or token ids, (N, L).
        names: Name of each sample.
        request: What to compute.
        folder: Output folder.
        name: The model's name, for the manifest.

    Yields:
        The micro-batches so far: once at the start, then after each one. After the last, the summary is written.

    Raises:
        DdimError: If the folder holds something else or is in use, or a result is not finite.
    """
    what = {"format": "ddim-likelihood", "version": 1, "method": request.method, "last_sigma": request.last_sigma}
    what |= {"probes": request.probes if request.method == "ode" else None, "seed": request.seed}
    what |= {"draws": request.draws} if request.draws else {}
    what |= {"data_sha256": hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()}
    what |= identity(model, request.plan, name) | {"network_calls": request.nfe}
    with claimed(folder, MANIFEST, BLOCKS) as owned:
        write_or_verify(folder, what, 0, len(images), "likelihoods")
        remove_parts(folder)
        blocks = _read_blocks(folder / BLOCKS, request, model.micro_batch, len(images))
        yield blocks
        with Appender(folder / BLOCKS) as file:
            for first in range(sum(len(b.bits) for b in blocks), len(images), model.micro_batch):
                block = _block(model, images[first : first + model.micro_batch], first, request)
                file.write(journal_line({key: getattr(block, key) for key in Block.__slots__}))
                owned.keep()
                blocks = [*blocks, block]
                yield blocks
        _write_summary(folder, blocks, names, request, name)


def _read_blocks(path: Path, request: Request, size: int, total: int) -> list[Block]:
    """Read the complete lines of the results file and truncate the file after them."""

    def parse(line: Any, before: int) -> Block | None:
        first = before * size
        count = min(size, total - first)
        lengths = (count, 0, 1 + len(request.plan)) if request.method == "bound" else (count, count, 0)
        block = Block(**line)
        parts = [np.array(part, dtype=np.float64) for part in (block.bits, block.error, block.terms)]
        valid = all(p.shape == (n,) and np.isfinite(p).all() for p, n in zip(parts, lengths, strict=True))
        return block if valid and block.first == first else None

    return read_journal(path, parse)


def _block(model: Model, images: np.ndarray, first: int, request: Request) -> Block:
    """Results of one micro-batch, padded to its fixed size so that a sample's result does not depend on the others."""
    count, size = len(images), model.micro_batch
    indices = [first + min(i, count - 1) for i in range(size)]
    x0 = model.kind.read(images[[i - first for i in indices]]).to(model.device)
    noise = model.noise(indices, request.seed)
    if request.method == "bound":
        with torch.no_grad():
            each = _bound(model, x0, noise, request, request.rows(first))
        terms = torch.stack([bits(term, x0[0].numel()) for term in each])[:, :count].cpu()
        values, error = terms.sum(0), torch.empty(0)
    else:
        terms = torch.empty(0, 0)
        values, error = (value[:count].cpu() for value in _ode(model, x0, noise, request))
    if not (torch.isfinite(values).all() and torch.isfinite(error).all()):
        raise DdimError(
            f"images {first}..{first + count - 1}",
            "have a value that is not finite",
            "use float32, or a less extreme sigma, in a new folder",
        )
    return Block(first, values.tolist(), error.tolist(), terms.sum(1).tolist())


def _bound(model: Model, x0: Tensor, noise: Noise, request: Request, rows: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Terms of the bound in nats, (N,) each, the prior term first; 0 for rows that are not in `rows`."""
    kind, plan, prior = model.kind, request.plan, model.kind.prior(request.plan, x0)
    each = [prior, *(torch.zeros_like(prior) for _ in plan.rows)]
    for k, weight in rows:
        term = kind.term(model.denoise, plan, k, x0, noise.row(k), request.last_sigma or 0.0)
        each[1 + k] = weight * term
    return each


def _ode(model: Model, x0: Tensor, noise: Noise, request: Request) -> tuple[Tensor, Tensor]:
    probes = torch.stack([noise.row(k).sign().flatten(1) for k in range(request.probes)])
    assert request.check is not None
    figures = []
    for plan in (request.plan, request.check):
        density = _density(model, plan, probes)
        nats = discrete_nats(density, model.denoise, plan.start, x0, noise.start(), request.last_sigma)
        figures.append(bits(nats, x0[0].numel()))
    return figures[0], (figures[0] - figures[1]).abs()


def _density(model: Model, plan: Plan, probes: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: log_density(model.denoise, plan, x, probes)


def summary(blocks: Sequence[Block], request: Request) -> dict[str, Any]:
    """Mean and standard error in bits per dimension, with the settings they depend on."""
    values = np.array([value for block in blocks for value in block.bits])
    result: dict[str, Any] = {
        "method": request.method,
        "plan": request.plan.name,
        "network_calls": request.nfe,
        "pictures": len(values),
        "bits_per_dim": float(values.mean()),
        "standard_error": float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None,
        "dequantisation": "uniform" if request.last_sigma is None else "discretised Gaussian at the last step",
        "last_sigma": request.last_sigma,
    }
    if isinstance(request.plan, CategoricalPlan):
        result |= {"dequantisation": None, "last_sigma": None}
    if request.method == "ode":
        errors = np.array([value for block in blocks for value in block.error])
        result |= {"solver_error_mean": float(errors.mean()), "solver_error_max": float(errors.max())}
        return result | {"probes": request.probes}
    terms = np.sum([block.terms for block in blocks], axis=0) / len(values)
    times = [row.now.t for row in request.plan.rows]
    steps = [{"from": t, "bits_per_dim": float(term)} for t, term in zip(times, terms[1:], strict=True)]
    return result | {"prior": float(terms[0]), "last_step": float(terms[-1]), "steps": steps}


def _write_summary(folder: Path, blocks: list[Block], names: Sequence[str], request: Request, name: str) -> None:
    content = {"model": name, **summary(blocks, request)}
    write_atomic(folder / "likelihood.json", (json.dumps(content, indent=1) + "\n").encode())
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["index", "name", "bits_per_dim", *(["solver_error"] if request.method == "ode" else [])])
    for block in blocks:
        for i, value in enumerate(block.bits):
            writer.writerow([block.first + i, names[block.first + i], value, *block.error[i : i + 1]])
    write_atomic(folder / "values.csv", text.getvalue().encode())


@dataclass(frozen=True, slots=True)
class Request:
    """Settings of a likelihood computation.

    Args:
        method: "bound", the variational bound J_sigma of eq. (11), or "ode", the exact density of the probability flow.
        plan: The plan of the bound, or the plan with increasing t along which the ODE is solved.
        last_sigma: sigma_1, the standard deviation of the discretised last step; None for uniform dequantisation.
        check: With "ode", a plan with half the steps, to estimate the solver error.
        probes: With "ode", number of Hutchinson probes per sample.
        seed: Seed; the random numbers of sample i depend on (seed, i).
        draws: With "bound", number of the plan's rows evaluated per micro-batch: the last row, and one random row of
            each of draws - 1 equal parts of the others, weighted by the size of its part for an unbiased mean; 0 for
            all rows.
    """

    method: Literal["bound", "ode"]
    plan: Any
    last_sigma: float | None
    check: Plan | None = None
    probes: int = 1
    seed: int = 0
    draws: int = 0

    def __post_init__(self) -> None:
        if (self.method == "ode") != (self.check is not None) or (self.method == "bound" and self.last_sigma is None):
            raise ValueError("a bound needs last_sigma, the ODE needs check: see `bound_request` and `ode_request`")

    @property
    def nfe(self) -> int:
        """Network evaluations per sample; with "ode" nearly all of them have a backward pass per probe."""
        rows: int = self.draws or len(self.plan)
        return rows if self.check is None else rows + self.check.nfe + (2 if self.last_sigma else 0)

    def rows(self, first: int) -> list[tuple[int, int]]:
        """The rows to evaluate for the micro-batch that starts at sample `first`, as (row, weight)."""
        last = len(self.plan) - 1
        if not self.draws:
            return [(k, 1) for k in range(last + 1)]
        edges = [last * i // (self.draws - 1) for i in range(self.draws)]
        generator = rng.generator("cpu", self.seed, first, _ROWS)
        u = torch.rand(self.draws - 1, generator=generator, dtype=torch.float64).tolist()
        parts = zip(u, itertools.pairwise(edges), strict=True)
        return [*((low + int(part * (high - low)), high - low) for part, (low, high) in parts), (last, 1)]


def bound_request(model: Model, plan: Plan, last_sigma: float | None = None, seed: int = 0, draws: int = 0) -> Request:
    """Request for the variational bound of an image model.

    Args:
        model: The model.
        plan: A plan of eq. (12) with noise at every step but the last.
        last_sigma: sigma_1; None for `default_last_sigma`.
        seed: Seed of the random numbers.
        draws: Number of rows per micro-batch, see `Request`.

    Raises:
        DdimError: If the bound of the plan is infinite, or the plan does not fit the model.
    """
    _check_model(model, seed)
    model.check_plan(plan, to_clean=True)
    _check_draws(plan, draws)
    sigma = default_last_sigma(plan) if last_sigma is None else last_sigma
    elbo.check_bound(plan, sigma)
    return Request("bound", plan, sigma, seed=seed, draws=draws)


def token_request(model: Model, plan: CategoricalPlan, seed: int = 0, draws: int = 0) -> Request:
    """Request for the variational bound of a model of discrete data, see `ddim.objective.categorical_elbo`.

    Args:
        model: The model.
        plan: A plan with noise at every step but the last.
        seed: Seed of the random numbers.
        draws: Number of rows per micro-batch, see `Request`.

    Raises:
        DdimError: If the bound of the plan is infinite, or the plan does not fit the model.
    """
    _check_model(model, seed)
    model.check_plan(plan, to_clean=True)
    _check_draws(plan, draws)
    categorical_elbo.check_bound(plan)
    return Request("bound", plan, 0.0, seed=seed, draws=draws)


def _check_draws(plan: BasePlan[Any], draws: int) -> None:
    if draws and not 2 <= draws <= len(plan):
        raise DdimError(f"draws {draws}", f"is outside 2..{len(plan)}, the plan's steps", "remove it to evaluate all")


def ode_request(
    model: Model,
    steps: int = 40,
    dequantize: Dequantize = "decoder",
    last_sigma: float | None = None,
    probes: int = 1,
    seed: int = 0,
) -> Request:
    """Request for the exact likelihood by the ODE, from t = 1 to T in Runge-Kutta steps of order 4, even in log-SNR.

    Args:
        model: The model.
        steps: Number of steps with four network evaluations each, even, at least 2; the ODE is also solved with half as
            many for the error estimate.
        dequantize: "decoder" or "uniform", see `ddim.likelihood.discrete_nats`.
        last_sigma: sigma_1 for "decoder"; defaults to the value that the bound has at S = T.
        probes: Number of Hutchinson probes per image.
        seed: Seed of the random numbers.

    Raises:
        DdimError: If a number is out of range, or the schedule has no signal at T.
    """
    if steps > model.schedule.T:
        raise DdimError(f"steps {steps}", f"is more than T = {model.schedule.T}", "use fewer; 40 is the default")
    if steps < 2 or steps % 2:
        raise DdimError(f"steps {steps}", "is not an even number >= 2", "use steps=40; half are run for the error")
    if probes < 1:
        raise DdimError(f"probes {probes}", "is less than 1", "use 1 or more")
    _check_model(model, seed)
    schedule = model.schedule
    if schedule.T < 2:
        raise DdimError("the ODE", "needs a schedule with T >= 2", either("use method='bound'"))
    first, top = schedule.level(1), schedule.level(schedule.T)
    if not math.isfinite(top.log_snr):
        raise DdimError("the ODE", "is not defined for a schedule without signal at T", either("use method='bound'"))
    inner = [first.log_snr + (top.log_snr - first.log_snr) * i / steps for i in range(1, steps)]
    levels = schedule.levels([1.0, *(schedule.time_at_log_snr(value) for value in inner), float(schedule.T)])
    plan = samplers.runge_kutta(levels, schedule, about=f"even in log-SNR, {steps} steps")
    check = samplers.runge_kutta(levels[::2], schedule, about=f"even in log-SNR, {steps // 2} steps")
    if dequantize == "uniform":
        last_sigma = None
    elif last_sigma is None:
        last_sigma = default_last_sigma(samplers.ddim(schedule.levels([2, 1, 0]), eta=1.0))
    if last_sigma is not None:
        elbo.check_last_sigma(last_sigma)
    return Request("ode", plan, last_sigma, check, probes, seed)


def _check_model(model: Model, seed: int) -> None:
    """Check the model and the seed before the output folder is created."""
    model.noise(1, seed)
    if model.config.needs_label:
        raise DdimError("model", "was not trained without labels, as this likelihood needs", "use another model")


def default_last_sigma(plan: Plan) -> float:
    """The default sigma_1: the sigma of the step before the last, as in Ho et al. (2020).

    Raises:
        DdimError: If the plan has only one step.
    """
    if len(plan) < 2:
        raise DdimError(
            "plan",
            "has only one step, so no default last_sigma",
            either("use two steps or more", "use last_sigma=0.01"),
        )
    return plan.rows[-2].z
