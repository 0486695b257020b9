"""The values of options and settings, as Literal types and as tuples. Imports nothing heavy, so `--help` is fast."""

from __future__ import annotations

from typing import Literal, get_args

Spacing = Literal[
    "equal-angle",
    "linear",
    "quadratic",
    "official-linear",
    "official-quadratic",
    "leading",
    "trailing",
    "linspace",
    "log-snr",
    "angle-log-snr",
]
"""Rules that choose timesteps, see `ddim.timesteps`."""
SPACINGS: tuple[str, ...] = get_args(Spacing)

Sampler = Literal[
    "ddim",
    "ab2",
    "ab3",
    "ab4",
    "ab2-v",
    "ab3-v",
    "ab4-v",
    "ipndm2",
    "ipndm3",
    "ipndm4",
    "deis2",
    "deis3",
    "deis4",
    "dpm++2m",
    "dpm++3m",
    "unipc2",
    "unipc3",
    "heun",
    "rk4",
    "probability-flow",
]
"""Samplers by name, see `ddim.samplers`."""
SAMPLER_NAMES: tuple[str, ...] = get_args(Sampler)

Predicts = Literal["eps", "x0", "v"]
"""What a network predicts."""
PREDICTIONS: tuple[str, ...] = get_args(Predicts)

Method = Literal["ddim", "ddim-target", "fixed-point", "reversible", "lossless"]
"""Inversion methods, see `ddim.inversion`."""
METHODS: tuple[str, ...] = get_args(Method)

DType = Literal["auto", "float32", "float32-fast", "bfloat16"]
"""Precision of a network: "auto" is bfloat16 if the device has matrix units for it, else "float32-fast" if available,
else "float32", see `ddim.nn.cpu.units.sampling_precision`. "float32-fast" uses our own float32 kernels (Winograd
convolutions), equal to "float32" within about 1e-5; "float32" is torch's arithmetic, on a GPU without TF32 (except for
gradients, which follow torch's setting)."""
DTYPES: tuple[str, ...] = get_args(DType)

LossWeight = Literal["simple", "v", "x0", "min-snr", "p2", "sigmoid", "theorem1", "vlb"]
"""Weights gamma_t of the objective, see `ddim.objective.weights`."""
LOSS_WEIGHTS: tuple[str, ...] = get_args(LossWeight)

TimestepDraw = Literal["uniform", "importance"]
"""How timesteps are drawn: "uniform", with errors multiplied by their weight; or "importance", in proportion to the
weights, with equally weighted errors. The expected gradients agree up to a constant factor, the sum of the weights over
T; importance sampling wastes no draws on timesteps of small weight."""

Residency = Literal["auto", "host", "device"]
"""Where the decoded dataset is stored: "auto" is the device if it fits, else the host."""

ScheduleName = Literal["linear", "scaled-linear", "quadratic", "sigmoid", "cosine", "betas"]
"""Noise schedules, see `ddim.schedule`; "betas" is a schedule from a list of betas."""
SCHEDULE_NAMES: tuple[str, ...] = get_args(ScheduleName)

Emulated = Literal["diffusers", "diffusers-ddpm", "official", "openai"]
"""Libraries whose samplers can be emulated, see `ddim.emulate`."""
EMULATED: tuple[str, ...] = get_args(Emulated)

LoggerName = Literal["tensorboard", "wandb", "mlflow", "none"]
"""Where training metrics are logged, see `ddim.train.logger`."""
LOGGERS: tuple[str, ...] = get_args(LoggerName)

PresetName = Literal[
    "photos",
    "digits",
    "mnist",
    "fashion-mnist",
    "mnist-4level",
    "tinyshakespeare",
    "cifar10",
    "cifar10-fast",
    "cifar10-paper",
    "celeba64",
    "celeba64-10k",
    "lsun-bedroom256",
    "lsun-church256",
]
"""Training presets, see `ddim.train.presets`."""
PRESET_NAMES: tuple[str, ...] = get_args(PresetName)
