"""Checks of a denoiser: what any good one does, on data of its own kind."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ddim import samplers
from ddim.check.finding import Finding, at_most, between, largest, left_out
from ddim.errors import DdimError, DdimWarning
from ddim.names import Predicts
from ddim.process import timesteps
from ddim.process.gaussian import diffuse
from ddim.process.parameterization import Denoiser, Prediction, v_from_pair
from ddim.process.rng import Noise
from ddim.process.schedule import Level, Schedule
from ddim.sampling.latents import reconstruction_error
from ddim.sampling.loop import run

NUMBERS = 4096  # of which statistics are made, at least
TIMES, QUICK_TIMES = 8, 4
STEPS, QUICK_STEPS = (10, 20, 50), (5, 10, 20)
OWN_STEPS = 20
NOISE_FOR_X0 = 0.1


@dataclass(frozen=True, slots=True)
class _Bench:
    """What all checks of one denoiser share. States are kept on the CPU, the denoiser is asked where it computes."""

    denoise: Denoiser
    schedule: Schedule
    predicts: Predicts
    noise: Noise
    quick: bool
    batch: int
    device: torch.device | str

    def ask(self, x: Tensor, level: Level, batch: int | None = None) -> Prediction:
        """The prediction, a part of the batch at a time."""
        with torch.no_grad():
            parts = [self.denoise(part.to(self.device), level) for part in torch.split(x, batch or self.batch)]
        return Prediction(torch.cat([part.x0.cpu() for part in parts]), torch.cat([part.eps.cpu() for part in parts]))

    def walk(self, steps: int, encode: bool = False) -> tuple[Level, ...]:
        """An equal-angle grid of the schedule, as a model of this kind walks it."""
        return quiet_walk(self.schedule, self.predicts, steps, encode)

    def run(self, x: Tensor, levels: Sequence[Level]) -> Tensor:
        """DDIM at eta = 0 over these levels."""
        plan = samplers.ddim(levels, clean_as=self.schedule.level(1) if levels[0].t == 0 else None)
        return torch.cat([run(self.denoise, plan, part.to(self.device)).cpu() for part in torch.split(x, self.batch)])

    def levels(self) -> list[Level]:
        """Whole times, in equal rotations from 1 to T; without T where there is no signal to predict from.

        For a network of x_0, without those where eps is that of x_0 many times over: there it need not be small.
        """
        count, top = (QUICK_TIMES if self.quick else TIMES), self.schedule.level(self.schedule.T).angle
        times = {max(1, round(self.schedule.time_at_angle(top * i / (count - 1)))) for i in range(count)}
        found = self.schedule.levels(sorted(times))
        least = NOISE_FOR_X0 if self.predicts == "x0" else 0.0
        return [level for level in found if level.signal > 0 and level.noise > least] or [*found]


def quiet_walk(schedule: Schedule, predicts: Predicts, steps: int, encode: bool = False) -> tuple[Level, ...]:
    """The equal-angle grid; that a walk for eps starts below T is not what is asked here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DdimWarning)
        return timesteps.sampling_levels(schedule, predicts, "equal-angle", steps, encode)


def denoiser(
    denoise: Denoiser,
    schedule: Schedule,
    shape: Sequence[int],
    predicts: Predicts = "v",
    x0: Tensor | None = None,
    quick: bool = False,
    device: torch.device | str = "cpu",
    rounding: float | None = None,
) -> Iterator[Finding]:
    """Hold a denoiser against what every good one does.

    Its pair is consistent; it takes part of the noise away; what it leaves does not follow x; its eps is of unit size
    on noise; a sample's prediction is the same alone and in a batch, and the second time; and pictures come back from
    a round trip, the nearer the more steps. A network whose times are off by one passes all of these, and one on
    a wrong schedule may.

    Args:
        denoise: The denoiser.
        schedule: Its schedule.
        shape: The shape of one sample.
        predicts: What its network predicts; for "eps", walks start below T, see `ddim.process.start`.
        x0: Data of the kind it was trained on, float (N, *shape); samples of its own if None.
        quick: Fewer samples, times and steps.
        device: Where it computes.
        rounding: By how much a prediction alone and in a batch may differ; by default 1e-4 on a CPU, 1e-2 elsewhere,
            where convolutions may keep ten bits.

    Yields:
        One finding per check; where the samples are not finite, that alone.

    Raises:
        DdimError: If x0 is empty or not of that shape.
    """
    if x0 is not None and (not len(x0) or x0.shape[1:] != tuple(shape)):
        wrong = f"are {tuple(x0.shape)}, one sample is {tuple(shape)}"
        raise DdimError("pictures", wrong, "give one or more of that shape")
    dimensions = math.prod(shape)
    count = max(4 if quick else 8, math.ceil(NUMBERS / (2 if quick else 1) / dimensions))
    if x0 is not None:  # few and small pictures more than once, each with noise of its own
        x0 = x0.repeat(math.ceil(count / len(x0)), *(1 for _ in shape)) if len(x0) < count else x0
        count = len(x0)
    noise, batch = Noise(0, tuple(range(count)), tuple(shape)), max(8, math.ceil(NUMBERS / dimensions))
    bench = _Bench(denoise, schedule, predicts, noise, quick, batch, device)
    if predicts == "eps" and schedule.level(schedule.T).signal == 0:
        why = "eps says nothing of x_0 where there is no signal: use v or x_0"
        yield Finding("signal at T, for a network of eps", 0.0, "> 0", False, why)
    if x0 is None:
        steps = min(OWN_STEPS, schedule.T)
        x0 = bench.run(noise.start(), bench.walk(steps))
        broken = int((~x0.isfinite()).sum())
        told = f"{count} of its own, S = {steps}, root mean square {float(x0.square().mean().sqrt()):.3g}"
        yield at_most("samples, numbers not finite", broken, 0, told)
        if broken:
            return
    x0 = x0.to("cpu", torch.float32)
    yield from _denoising(bench, x0)
    yield _unit(bench)
    yield from _alike(bench, x0, rounding or (1e-4 if torch.device(device).type == "cpu" else 1e-2))
    yield from _round_trips(bench, x0)


def _denoising(bench: _Bench, x0: Tensor) -> Iterator[Finding]:
    """The error in eps at several times, whether the error follows x, and the pair.

    A conditional mean given x leaves an error that nothing made of x could still predict, x itself least of all. An
    output that is taken for another than it is does not, nor one that was trained on another schedule.
    """
    broken, slopes, pairs = 0, [], []
    chance, asked = 4 / math.sqrt(x0.numel()), "v" if bench.predicts == "v" else "eps"
    levels = bench.levels()
    for level in levels:
        truth = Prediction(x0, bench.noise.row(int(level.t) - 1))
        x = diffuse(truth.x0, truth.eps, level)
        told = bench.ask(x, level)
        broken += int((~told.eps.isfinite()).sum() + (~told.x0.isfinite()).sum())
        left = truth.eps.double() - told.eps
        error = float(left.square().sum() / truth.eps.double().square().sum())
        if asked == "v":
            left = v_from_pair(truth.x0.double(), truth.eps, level) - v_from_pair(told.x0.double(), told.eps, level)
        slopes.append(float((left * x).mean() / x.square().mean()))
        pairs.append(float((x - diffuse(told.x0, told.eps, level)).norm() / x.norm()))
        note = f"that of predicting 0 is 1; signal {level.signal:.3g}"
        yield at_most(f"error in eps at t = {level.t:g}", error, 1 + chance, note)
    yield at_most("predictions not finite", broken, 0, f"at {len(levels)} times")
    worst = levels[int(np.argmax(np.abs(slopes)))]
    cause = "another output, schedule or times, or too little training"
    note = f"slope of that in {asked} on x, t = {worst.t:g}; if not: {cause}"
    yield at_most("error that follows x", largest(map(abs, slopes)), 0.1 + chance, note)
    yield at_most("x - (signal x_0 + noise eps)", largest(pairs), 1e-5, "beside x: the predicted pair is consistent")


def _unit(bench: _Bench) -> Finding:
    top = bench.schedule.level(bench.schedule.T)
    name = "mean square of eps on noise"
    if top.signal == 0 and bench.predicts == "eps":
        return left_out(name, "there is no signal at T")
    count = math.ceil(NUMBERS / math.prod(bench.noise.shape))
    eps = bench.ask(replace(bench.noise, indices=tuple(range(count))).start(), top).eps
    return between(name, float(eps.double().square().mean()), 0.8, 1.2, "at T, where x is noise")


def _alike(bench: _Bench, x0: Tensor, rounding: float) -> Iterator[Finding]:
    """At a middle level, where neither x_0 nor eps magnifies what the network rounds."""
    t = max(1, round(bench.schedule.time_at_angle(math.pi / 4)))
    level, noise = bench.schedule.level(t), replace(bench.noise, indices=(0, 1, 2))
    x = diffuse(x0[[k % len(x0) for k in range(3)]], noise.row(t - 1), level)
    together, again = bench.ask(x, level, 3).eps, bench.ask(x, level, 3).eps
    told = f"largest difference in eps, t = {t}; if not:"
    off = float((together - again).abs().max())
    yield at_most("the same twice, off by", off, rounding, f"{told} dropout")
    name = "alone and in a batch, off by"
    try:
        alone = bench.ask(x, level, 1).eps
    except DdimError:
        raise
    except (RuntimeError, ValueError) as error:
        yield Finding(
            name,
            "refused",
            f"<= {rounding:g}",
            False,
            f"one sample alone: {(str(error) or type(error).__name__).splitlines()[0]}",
        )
        return
    off = float((together - alone).abs().max())
    yield at_most(name, off, rounding, f"{told} batch norm")


def _round_trips(bench: _Bench, x0: Tensor) -> Iterator[Finding]:
    """Encoding and decoding come nearer with more steps, down to what single precision rounds."""
    counts = [steps for steps in (QUICK_STEPS if bench.quick else STEPS) if steps <= bench.schedule.T]
    if len(counts) < 2:
        yield left_out("round trip", f"the schedule has {bench.schedule.T} times only")
        return
    some, before = x0[: 2 if bench.quick and x0[0].numel() > 256 else 4], math.inf
    for steps in counts:
        latents = bench.run(some, bench.walk(steps, encode=True))
        error = float(reconstruction_error(some, bench.run(latents, bench.walk(steps))).mean())
        name, note = f"round trip, S = {steps}", "mean square, pictures in [0, 1]"
        if math.isinf(before):
            yield Finding(name, error, "finite", math.isfinite(error), note)
        else:
            limit = max(before, 1e-9)
            yield Finding(name, error, f"< {limit:.3g}", error < limit, f"{note}; less than with fewer steps")
        before = error
