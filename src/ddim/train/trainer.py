"""The trainer: each optimiser step is a function of the previous state and the step number alone.

All randomness of step n comes from generators keyed by (seed, n), and the data order from (seed, epoch), so that a
resumed run gives the same result as an uninterrupted one, bit for bit on a CPU.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddim.data.pixels import to_float
from ddim.errors import DdimError, either, warn
from ddim.model.config import TrainConfig
from ddim.model.precision import fast_dtype
from ddim.nn.base import Network, from_index
from ddim.nn.ema import EMA
from ddim.objective.base import Loss
from ddim.process import rng
from ddim.train.batches import Data, loader_of

DROPOUT = 1  # hashed into the seed of a step's dropout, to separate it from the step's other random numbers


@dataclass(frozen=True, slots=True)
class Update:
    """The result of one optimiser step.

    Args:
        step: Step number, counted from 1.
        loss: Loss of the batch, a scalar on the training device.
        grad_norm: Norm of the gradient before clipping, a scalar on the training device.
        lr: Learning rate used.
    """

    step: int
    loss: Tensor
    grad_norm: Tensor
    lr: float


class StepAbandoned(Exception):
    """A step was abandoned on request; the trainer's state is that of the last complete step."""


class TimestepError:
    """Exponential moving average of the network's error at each timestep (`Loss.eps_mse`) during training.

    The decay is the same as in the EMA of the weights; timesteps not drawn for a long time are dropped.

    Args:
        T: Number of timesteps.
        device: The training device; only `means` synchronises with it.
    """

    MIN_WEIGHT = 1e-12

    def __init__(self, T: int, device: torch.device):
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.sums, self.counts = torch.zeros((2, T), dtype=dtype, device=device).unbind()

    def add(self, t: Tensor, errors: Tensor, decay: float) -> None:
        """Multiply the averages by `decay` and add a step's errors (B,) at its timesteps t (B,)."""
        for table, new in ((self.sums, errors), (self.counts, torch.ones_like(errors))):
            table.mul_(decay).index_add_(0, t - 1, (1 - decay) * new.to(table.dtype))

    def means(self) -> tuple[np.ndarray, np.ndarray]:
        """The timesteps with an estimate, int64, (K,), increasing, and the mean error at each, float64, (K,)."""
        sums, counts = self.sums.cpu().double().numpy(), self.counts.cpu().double().numpy()
        (indices,) = np.nonzero(counts > self.MIN_WEIGHT)
        return indices + 1, sums[indices] / counts[indices]


class Trainer:
    """Trains a network on data of any shape.

    Args:
        network: Called as network(x, t - 1) or network(x, t - 1, labels), with x (B, ...) and int64 times in
            0..T - 1 (B,), as `ddim.wrap` calls it; a bundled network is passed t in float32.
        objective: L_gamma, or the cross-entropy.
        data: A tensor, a torch Dataset, a DataLoader, ... (see `ddim.train.batches.Data`), or a function from indices
            (B,) to a batch.
        count: Number of samples, if `data` is a function.
        recipe: A `ddim.model.config.TrainConfig`; its defaults if None.
        labels: int64, (count,), if the network takes labels.
        classes: Number of classes.
        read: Function from a batch of the data to x_0, (B, ...). By default uint8 images (B, H, W, C) are scaled to
            [-1, 1], and floats (B, ...) are x_0 themselves.
        start_step: Steps the initial weights were already trained for. The data order continues from there; the
            learning rate schedule, the optimiser state and the EMA restart.

    Attributes:
        spent: Function that returns the fraction of the recipe's time budget used, in [0, 1]; set by the caller if
            there is a budget.
        abandon: Function called often during a step on a CPU; once it returns True, the step is abandoned.

    Raises:
        DdimError: If the data, or a setting of the recipe, do not suit the network.
    """

    def __init__(
        self,
        network: nn.Module,
        objective: Loss,
        data: Data | Callable[[np.ndarray], np.ndarray],
        count: int | None = None,
        recipe: Any = None,
        labels: np.ndarray | None = None,
        classes: int = 0,
        read: Callable[[Tensor], Tensor] | None = None,
        start_step: int = 0,
    ):
        self.read = read or read_data
        recipe = TrainConfig() if recipe is None else recipe
        self.objective, self.recipe, self.classes = objective, recipe, classes
        self.device = next(network.parameters()).device
        if channels_last(network, recipe.layout, self.device):
            network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.network = network.train()
        self.loader = loader_of(data, count, recipe.batch, recipe.seed, labels, self.device, recipe.data_on)
        self.ema = EMA(network, recipe.ema, recipe.ema_half_life)
        forward: Callable[..., Tensor] = network
        if recipe.compile:
            forward = torch.compile(network, mode=recipe.compile_mode, dynamic=False)
        self.forward = from_index(forward) if isinstance(network, Network) else forward
        self.trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained,
            lr=recipe.lr,
            betas=recipe.betas,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        self.autocast = autocast_dtype(recipe.precision, self.device)
        self.errors = TimestepError(objective.schedule.T, self.device)
        self.step = self.start_step = start_step
        self.spent: Callable[[], float] = lambda: 0.0
        self.abandon: Callable[[], bool] | None = None

    def lr(self, step: int) -> float:
        """The learning rate of a step, counted from 0: warm-up, constant, then the recipe's decay to 0."""
        r, done = self.recipe, step - self.start_step
        rate = r.lr * min(1.0, (done + 1) / r.warmup) if r.warmup else r.lr
        left = (1 - self.spent()) / r.decay_fraction
        if r.steps is not None:
            steps = r.steps - self.start_step
            left = min(left, (steps - done) / max(1.0, r.decay_fraction * steps))
        if r.decay == "none" or left >= 1:
            return float(rate)
        left = max(left, 0.0)
        return float(rate * (left if r.decay == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)))

    @property
    def over(self) -> bool:
        """Whether the recipe's last step is done or its budget used up."""
        return (self.recipe.steps is not None and self.step >= self.recipe.steps) or self.spent() >= 1

    def updates(self) -> Iterator[Update]:
        """Train until `over`, yielding after each step; the next batch is prefetched.

        Raises:
            DdimError: On a CPU, if the loss or gradient is not finite; the update of that step is not applied. On a
                GPU the caller must check the losses before saving anything, and raise `not_finite`.
            StepAbandoned: If `abandon` returns True during a step.
        """
        with contextlib.closing(self.loader.batches(self.step)) as batches, self._abandonable():
            while not self.over:
                yield self.update(*next(batches))

    @contextlib.contextmanager
    def _abandonable(self) -> Iterator[None]:
        """Call `abandon` after each layer, forward and backward; nothing changes the state before that is over."""

        def check(*_: Any) -> None:
            if self.abandon and self.abandon():
                raise StepAbandoned

        def after(module: nn.Module, inputs: Any, output: Any) -> None:
            check()
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(check)  # type: ignore[no-untyped-call]

        watched = self.abandon and self.device.type == "cpu" and not self.recipe.compile
        layers = [module for module in self.network.modules() if not [*module.children()]] if watched else []
        handles = [layer.register_forward_hook(after) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def update(self, batch: Tensor, labels: Tensor | None) -> Update:
        """Train one step on a batch of the data and its labels, on the training device; see `updates`."""
        return self._update(batch, labels)

    def _update(self, batch: Tensor, labels: Tensor | None) -> Update:
        rate, recipe = self.lr(self.step), self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        draw = rng.generator(self.device, recipe.seed, self.step)
        x0 = self.read(batch)
        if recipe.flip:
            if x0.ndim != 4:
                raise DdimError("train.flip", f"is for images, but the data are {tuple(x0.shape)}", "set it to false")
            flipped = torch.rand(len(x0), generator=draw, device=self.device) < 0.5
            x0 = torch.where(flipped[:, None, None, None], x0.flip(3), x0)
        t = self.objective.times.draw(len(x0), draw, recipe.antithetic)
        noise = self.objective.draw(x0, draw)
        labels = self._drop(labels, draw)
        total, errors = torch.zeros((), device=self.device), []
        with rng.temporary_seed(self.device, rng.hash_seed(recipe.seed, self.step, DROPOUT)):
            for part in torch.arange(len(x0), device=self.device).chunk(recipe.accumulate):
                loss, error = self._loss(x0[part], t[part], noise[part], None if labels is None else labels[part])
                (loss / recipe.accumulate).backward()
                total += loss.detach() / recipe.accumulate
                errors.append(error)
        for parameter in self.trained:  # the optimiser's state must cover parameters that the network does not use
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norm = nn.utils.clip_grad_norm_(self.trained, recipe.clip_grad)
        # On a GPU this check would synchronise at every step, so the caller checks from time to time instead.
        if self.device.type == "cpu" and not (torch.isfinite(total) and torch.isfinite(norm)):
            raise not_finite(self.step + 1)
        self.optimizer.step()
        self.ema.update(self.network, self.step - self.start_step)
        self.errors.add(t, torch.cat(errors), self.ema.decay_at(self.step - self.start_step))
        self.step += 1
        return Update(self.step, total, norm, rate)

    def _loss(self, x0: Tensor, t: Tensor, noise: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """The mean loss of a micro-batch, and the squared error of eps of each sample, (n,)."""

        def network(x: Tensor, t: Tensor) -> Tensor:
            with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
                return self.forward(x, t, labels) if labels is not None else self.forward(x, t)

        error = self.objective.error(network, x0, t, noise)
        return self.objective.times.apply_weight(error, t).mean(), self.objective.eps_mse(error.detach(), t)

    def _drop(self, labels: Tensor | None, draw: torch.Generator) -> Tensor | None:
        if labels is None or not self.classes:
            return None
        dropped = torch.rand(len(labels), generator=draw, device=self.device) < self.recipe.label_drop
        return torch.where(dropped, self.classes, labels)

    def state(self) -> dict[str, Tensor]:
        """Everything the next step depends on, as named tensors."""
        tensors = {f"network.{key}": value for key, value in self.network.state_dict().items()}
        tensors |= {f"ema.{key}": value for key, value in self.ema.module.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": value for key, value in moments.items()}
        tensors |= {"errors.sums": self.errors.sums, "errors.counts": self.errors.counts}
        return {**tensors, "step": torch.tensor(self.step)}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Resume from a `state`; warns if it comes from an older version and has no error table.

        Raises:
            KeyError, RuntimeError, ValueError: If it belongs to another network, or is incomplete.
        """

        def select(prefix: str) -> dict[str, Tensor]:
            return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

        self.network.load_state_dict(select("network."))
        self.ema.module.load_state_dict(select("ema."))
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in select("optimizer.").items():
            index, name = key.split(".", 1)
            moments.setdefault(int(index), {})[name] = value
        self._check_moments(moments)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        for parameter, values in self.optimizer.state.items():
            for name, value in values.items():  # the fused optimiser needs the weights' memory layout
                if value.shape == parameter.shape:
                    values[name] = torch.empty_like(parameter).copy_(value)
        self.step = int(tensors["step"])
        if table := select("errors."):
            self.errors.sums.copy_(table["sums"])
            self.errors.counts.copy_(table["counts"])
        else:
            warn(f"the state of step {self.step} has no error table; a new one is started")

    def _check_moments(self, moments: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Raise ValueError for an optimiser state that would fail at the first step."""
        parameters = self.trained
        if moments and sorted(moments) != list(range(len(parameters))):
            raise ValueError("the optimiser and the network have different parameters")
        for index, values in moments.items():
            shapes = {"step": torch.Size(()), "exp_avg": parameters[index].shape, "exp_avg_sq": parameters[index].shape}
            if {name: value.shape for name, value in values.items()} != shapes:
                raise ValueError(f"the optimiser state of parameter {index} is not step, exp_avg and exp_avg_sq")


def read_data(batch: Tensor) -> Tensor:
    """x_0, (B, ...), of a batch: uint8 images (B, H, W, C) scaled to [-1, 1], or floats as they are.

    Raises:
        DdimError: If the batch is neither.
    """
    if batch.dtype == torch.uint8 and batch.ndim == 4:
        return to_float(batch)
    if not batch.is_floating_point():
        problem = f"is {str(batch.dtype).removeprefix('torch.')} {tuple(batch.shape)}"
        raise DdimError("data", problem, "pass floats scaled to about [-1, 1], or uint8 images (N, H, W, C)")
    return batch.float()


def channels_last(network: nn.Module, layout: str, device: torch.device) -> bool:
    """Whether a network is converted to channels-last memory: if asked for, or on a GPU if it is one of images.

    Raises:
        DdimError: If it is asked for, and the network has no 2-D convolution or also a 3-D one.
    """
    ranks = {parameter.ndim for parameter in network.parameters()}
    suits = 4 in ranks and 5 not in ranks
    if layout == "channels-last" and not suits:
        raise DdimError("train.layout", "channels-last is for networks of 2-D convolutions", "use auto or contiguous")
    return suits and (layout == "channels-last" or (layout == "auto" and device.type == "cuda"))


def not_finite(step: int) -> DdimError:
    """The error for a loss or gradient that is not finite."""
    hints = "restart in another folder with a lower learning rate", "use precision='float32' there"
    hint = either(*hints)  # the recipe of a started run cannot change
    return DdimError(f"step {step}", "the loss or its gradient is not finite", hint)


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The autocast dtype of a recipe; None for float32."""
    if precision == "float32" or (precision == "auto" and fast_dtype(device) == torch.float32):
        return None
    return torch.bfloat16
