"""Checks that any well-trained denoiser passes on its own data distribution."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ddim import samplers
from ddim.check.finding import Finding, at_most, between, largest, skipped
from ddim.errors import DdimError, DdimWarning
from ddim.names import Predicts
from ddim.process import timesteps
from ddim.process.gaussian import diffuse
from ddim.process.parameterization import Denoiser, Prediction, v_from_pair
from ddim.process.rng import Noise
from ddim.process.schedule import Level, Schedule
from ddim.sampling.latents import reconstruction_error
from ddim.sampling.loop import run

NUMBERS = 4096  # fewest values that a statistic is computed from
TIMES, QUICK_TIMES = 8, 4
STEPS, QUICK_STEPS = (10, 20, 50), (5, 10, 20)
SAMPLE_STEPS = 20
NOISE_FOR_X0 = 0.1


@dataclass(frozen=True, slots=True)
class _Context:
    """Settings shared by all checks of one denoiser. States stay on the CPU, the denoiser runs on `device`."""

    denoise: Denoiser
    schedule: Schedule
    predicts: Predicts
    noise: Noise
    quick: bool
    batch: int
    device: torch.device | str

    def predict(self, x: Tensor, level: Level, batch: int | None = None) -> Prediction:
        """The prediction, computed in batches."""
        with torch.no_grad():
            parts = [self.denoise(part.to(self.device), level) for part in torch.split(x, batch or self.batch)]
        return Prediction(torch.cat([part.x0.cpu() for part in parts]), torch.cat([part.eps.cpu() for part in parts]))

    def sampling_levels(self, steps: int, encode: bool = False) -> tuple[Level, ...]:
        """The levels of equal-angle timesteps, as for sampling with this prediction type."""
        return quiet_levels(self.schedule, self.predicts, steps, encode)

    def run(self, x: Tensor, levels: Sequence[Level]) -> Tensor:
        """Run DDIM at eta = 0 over these levels."""
        plan = samplers.ddim(levels, clean_as=self.schedule.level(1) if levels[0].t == 0 else None)
        return torch.cat([run(self.denoise, plan, part.to(self.device)).cpu() for part in torch.split(x, self.batch)])

    def levels(self) -> list[Level]:
        """Levels of integer times from 1 to T, in equal rotations; T is omitted if there is no signal at T.

        For x_0-prediction, levels with little noise are omitted too: eps magnifies the error in x_0 there.
        """
        count, top = (QUICK_TIMES if self.quick else TIMES), self.schedule.level(self.schedule.T).angle
        times = {max(1, round(self.schedule.time_at_angle(top * i / (count - 1)))) for i in range(count)}
        levels = self.schedule.levels(sorted(times))
        least = NOISE_FOR_X0 if self.predicts == "x0" else 0.0
        return [level for level in levels if level.signal > 0 and level.noise > least] or [*levels]


def quiet_levels(schedule: Schedule, predicts: Predicts, steps: int, encode: bool = False) -> tuple[Level, ...]:
    """The levels of equal-angle timesteps, without the warning that eps-prediction starts below T."""
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
    """Verify properties that every well-trained denoiser has.

    - (x_0, eps) is a consistent pair.
    - The prediction removes part of the noise, and its error is uncorrelated with x.
    - The mean square of eps on pure noise is about 1.
    - The prediction is deterministic and does not depend on the batch.
    - The error of encoding and decoding images falls with the number of steps.

    A network whose times are off by one passes all of these, and one with a wrong schedule may.

    Args:
        denoise: The denoiser.
        schedule: Its schedule.
        shape: The shape of one sample.
        predicts: What its network predicts; for "eps", sampling starts below T, see `ddim.process.start`.
        x0: Data from the training distribution, float (N, *shape); if None, samples are drawn from the denoiser.
        quick: Fewer samples, times and steps.
        device: The device of the denoiser.
        rounding: The largest difference between a prediction alone and in a batch; by default 1e-4 on a CPU and 1e-2
            elsewhere, where convolutions may use TF32 (10 bits).

    Yields:
        One finding per check; only the first one if the drawn samples are not finite.

    Raises:
        DdimError: If x0 is empty or not of that shape.
    """
    if x0 is not None and (not len(x0) or x0.shape[1:] != tuple(shape)):
        problem = f"are {tuple(x0.shape)}, one sample is {tuple(shape)}"
        raise DdimError("images", problem, "pass one or more of that shape")
    dimensions = math.prod(shape)
    count = max(4 if quick else 8, math.ceil(NUMBERS / (2 if quick else 1) / dimensions))
    if x0 is not None:  # repeat few or small images, each copy with independent noise
        x0 = x0.repeat(math.ceil(count / len(x0)), *(1 for _ in shape)) if len(x0) < count else x0
        count = len(x0)
    noise, batch = Noise(0, tuple(range(count)), tuple(shape)), max(8, math.ceil(NUMBERS / dimensions))
    context = _Context(denoise, schedule, predicts, noise, quick, batch, device)
    if predicts == "eps" and schedule.level(schedule.T).signal == 0:
        why = "eps does not determine x_0 without signal: use v or x_0"
        yield Finding("signal at T, for eps-prediction", 0.0, "> 0", False, why)
    if x0 is None:
        steps = min(SAMPLE_STEPS, schedule.T)
        x0 = context.run(noise.start(), context.sampling_levels(steps))
        broken = int((~x0.isfinite()).sum())
        note = f"{count} drawn from it, S = {steps}, root mean square {float(x0.square().mean().sqrt()):.3g}"
        yield at_most("samples, non-finite numbers", broken, 0, note)
        if broken:
            return
    x0 = x0.to("cpu", torch.float32)
    yield from _denoising(context, x0)
    yield _unit_variance(context)
    yield from _batch_invariance(context, x0, rounding or (1e-4 if torch.device(device).type == "cpu" else 1e-2))
    yield from _round_trips(context, x0)


def _denoising(context: _Context, x0: Tensor) -> Iterator[Finding]:
    """Check the error in eps, its correlation with x, and the consistency of the pair, at several times.

    The error of a conditional mean given x is uncorrelated with every function of x, and so with x itself. It is
    correlated if the wrong prediction type is assumed, or another schedule than in training.
    """
    broken, slopes, pairs = 0, [], []
    chance, output = 4 / math.sqrt(x0.numel()), "v" if context.predicts == "v" else "eps"
    levels = context.levels()
    for level in levels:
        truth = Prediction(x0, context.noise.row(int(level.t) - 1))
        x = diffuse(truth.x0, truth.eps, level)
        prediction = context.predict(x, level)
        broken += int((~prediction.eps.isfinite()).sum() + (~prediction.x0.isfinite()).sum())
        left = truth.eps.double() - prediction.eps
        error = float(left.square().sum() / truth.eps.double().square().sum())
        if output == "v":
            left = v_from_pair(truth.x0.double(), truth.eps, level) - v_from_pair(
                prediction.x0.double(), prediction.eps, level
            )
        slopes.append(float((left * x).mean() / x.square().mean()))
        pairs.append(float((x - diffuse(prediction.x0, prediction.eps, level)).norm() / x.norm()))
        note = f"predicting 0 has error 1; signal {level.signal:.3g}"
        yield at_most(f"error in eps at t = {level.t:g}", error, 1 + chance, note)
    yield at_most("non-finite predictions", broken, 0, f"at {len(levels)} times")
    worst = levels[int(np.argmax(np.abs(slopes)))]
    cause = "another prediction type, schedule or times, or too little training"
    note = f"slope of the error in {output} on x, t = {worst.t:g}; else: {cause}"
    yield at_most("error correlated with x", largest(map(abs, slopes)), 0.1 + chance, note)
    yield at_most("x - (signal x_0 + noise eps)", largest(pairs), 1e-5, "relative to x: a consistent pair")


def _unit_variance(context: _Context) -> Finding:
    top = context.schedule.level(context.schedule.T)
    name = "mean square of eps on noise"
    if top.signal == 0 and context.predicts == "eps":
        return skipped(name, "there is no signal at T")
    count = math.ceil(NUMBERS / math.prod(context.noise.shape))
    eps = context.predict(replace(context.noise, indices=tuple(range(count))).start(), top).eps
    return between(name, float(eps.double().square().mean()), 0.8, 1.2, "at T, where x is noise")


def _batch_invariance(context: _Context, x0: Tensor, rounding: float) -> Iterator[Finding]:
    """Check determinism and batch invariance at a middle level, where neither x_0 nor eps magnifies rounding."""
    t = max(1, round(context.schedule.time_at_angle(math.pi / 4)))
    level, noise = context.schedule.level(t), replace(context.noise, indices=(0, 1, 2))
    x = diffuse(x0[[k % len(x0) for k in range(3)]], noise.row(t - 1), level)
    together, again = context.predict(x, level, 3).eps, context.predict(x, level, 3).eps
    note = f"largest difference in eps, t = {t}; else:"
    off = float((together - again).abs().max())
    yield at_most("repeated evaluation, difference", off, rounding, f"{note} dropout")
    name = "alone and in a batch, difference"
    try:
        alone = context.predict(x, level, 1).eps
    except DdimError:
        raise
    except (RuntimeError, ValueError) as error:
        yield Finding(
            name,
            "error",
            f"<= {rounding:g}",
            False,
            f"one sample alone: {(str(error) or type(error).__name__).splitlines()[0]}",
        )
        return
    off = float((together - alone).abs().max())
    yield at_most(name, off, rounding, f"{note} batch norm")


def _round_trips(context: _Context, x0: Tensor) -> Iterator[Finding]:
    """Check that the error of encoding and decoding falls with the number of steps, down to float32 rounding."""
    counts = [steps for steps in (QUICK_STEPS if context.quick else STEPS) if steps <= context.schedule.T]
    if len(counts) < 2:
        yield skipped("round trip", f"the schedule has {context.schedule.T} times only")
        return
    images, before = x0[: 2 if context.quick and x0[0].numel() > 256 else 4], math.inf
    for steps in counts:
        latents = context.run(images, context.sampling_levels(steps, encode=True))
        error = float(reconstruction_error(images, context.run(latents, context.sampling_levels(steps))).mean())
        name, note = f"round trip, S = {steps}", "mean square, images in [0, 1]"
        if math.isinf(before):
            yield Finding(name, error, "finite", math.isfinite(error), note)
        else:
            limit = max(before, 1e-9)
            yield Finding(name, error, f"< {limit:.3g}", error < limit, f"{note}; lower than with fewer steps")
        before = error
