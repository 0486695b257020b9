"""Training images per second against the inner loop of diffusers' `train_unconditional`, the same network."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DDPMScheduler
from torch.nn import functional as F

from benchmarks import peers
from benchmarks.gpu.bench import Bench
from benchmarks.measuring import turns
from ddim.model.config import TrainConfig
from ddim.objective.mse import Objective
from ddim.train.trainer import Trainer

IMAGES = 10_000
ROUNDS = 3
SHARE = 0.05  # assumed fraction of the bfloat16 ceiling before any was measured
UNKNOWN = 1e14


class Job(NamedTuple):
    """A training: a function that runs one step, and one that releases it."""

    step: Callable[[], object]
    close: Callable[[], None] = lambda: None


def measure(bench: Bench, batch: int) -> None:
    """Measure the variants that fit at one batch size, in alternating runs."""
    makers: dict[str, Callable[[], Job]] = {
        "ours, bf16 compiled": partial(_ours, bench, batch, True),
        "diffusers, default": partial(_diffusers, bench, batch, False),
        "diffusers, bf16": partial(_diffusers, bench, batch, True),
        "ours, bf16": partial(_ours, bench, batch, False),
    }
    jobs: dict[str, Job] = {}
    guess = 3 * batch * bench.flops / (SHARE * (bench.ceiling or UNKNOWN))
    steps, total = bench.sizes.training_steps, 0.0
    try:
        for name, make in makers.items():
            compiled = name.endswith("compiled")
            cost = 5 + 3 * guess + (bench.compile_cost("training") if compiled else 0)
            what = f"training, batch {batch}: {name}"
            started = bench.deadline.attempt(what, cost, partial(_start, bench, batch, name, make))
            if started is None:
                bench.free()
                continue
            job, pace = started
            cost = (ROUNDS + 1) * steps * pace
            if bench.deadline.fits(what, total + cost):
                jobs[name], total = job, total + cost
            else:
                job.close()
        if jobs:
            what = f"training, batch {batch}"
            bench.deadline.attempt(what, total, lambda: _compare(bench, batch, jobs))
    finally:
        for job in jobs.values():
            job.close()
        bench.free()


def _start(bench: Bench, batch: int, name: str, make: Callable[[], Job]) -> tuple[Job, float]:
    """A training after its first steps, and its seconds per step."""
    job = make()
    first = bench.once(job.step)
    bench.once(job.step)
    pace = bench.once(job.step)
    if name.endswith("compiled"):
        bench.compiled["training"] = max(first, bench.compiled.get("training", 0.0))
    row = {"variant": f"training: {name}", "batch": batch, "first step (s)": first, "third step (s)": pace}
    bench.add("start-up", row)
    return job, pace


def _compare(bench: Bench, batch: int, jobs: dict[str, Job]) -> None:
    steps = bench.sizes.training_steps

    def many(step: Callable[[], object]) -> Callable[[], None]:
        def whole() -> None:
            for _ in range(steps):
                step()

        return bench.synced(whole)

    times = turns({name: many(job.step) for name, job in jobs.items()}, ROUNDS)
    median = {name: statistics.median(seconds) / steps for name, seconds in times.items()}
    row: dict[str, Any] = {"batch": batch}
    row |= {f"{name} (img/s)": batch / seconds for name, seconds in median.items()}
    row |= {f"spread of {name}": (max(t) - min(t)) / (steps * median[name]) for name, t in times.items()}
    for a, b in (("ours, bf16 compiled", "diffusers, bf16"), ("ours, bf16 compiled", "diffusers, default")):
        if a in median and b in median:
            row[f"{a} / {b}"] = median[b] / median[a]
    fastest = min(median.values())
    row["TFLOP/s of the fastest"] = 3 * batch * bench.flops / fastest / 1e12
    bench.add("training", row)


def _ours(bench: Bench, batch: int, compiled: bool) -> Job:
    """This library's trainer on random images; a trial does not compile."""
    c = bench.config.network
    count = max(2 * batch, 16) if bench.tiny else IMAGES
    drawn = np.random.Generator(np.random.Philox(key=0))
    images = drawn.integers(0, 256, (count, c.height, c.width, c.in_channels), dtype=np.uint8)
    recipe = TrainConfig(batch=batch, warmup=10, precision="bfloat16", compile=compiled and not bench.tiny, flip=True)
    objective = Objective(bench.config.schedule.build(), bench.config.predicts, "simple", torch.device(bench.device))
    network = copy.deepcopy(bench.network).to(bench.device)
    trainer = Trainer(network, objective, lambda index: images[index], count, recipe)
    steps: Any = trainer.updates()
    return Job(lambda: next(steps), steps.close)


def _diffusers(bench: Bench, batch: int, fast: bool) -> Job:
    """The script's loop with images already on the device; `fast` is its --mixed_precision bf16."""
    unet = peers.diffusers(bench.config, bench.network, device=bench.device).unet.train()
    images = bench.randn(4 * batch, *bench.config.network.shape).clamp(-1, 1)
    scheduler = DDPMScheduler(prediction_type="epsilon")
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    generator = bench.generator(1)
    device_type = bench.device.split(":")[0]

    def step() -> None:
        draw: dict[str, Any] = {"generator": generator, "device": bench.device}
        clean = images[torch.randint(len(images), (batch,), **draw)]
        noise = torch.randn(clean.shape, **draw)
        times = torch.randint(0, 1000, (batch,), **draw)
        noisy = scheduler.add_noise(clean, noise, times)
        with torch.autocast(device_type, torch.bfloat16, enabled=fast):
            output = unet(noisy, times).sample
        loss = F.mse_loss(output.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return Job(step)
