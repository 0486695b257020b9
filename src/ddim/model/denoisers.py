"""Adapters from a network to a denoiser: `NetworkDenoiser` for this library's, `ExternalDenoiser` for any other.

The input, output and default time of a wrapped network at a level:

| predicts | input                    | output                                      | time by default |
|----------|--------------------------|---------------------------------------------|-----------------|
| eps      | x                        | eps                                         | t - 1           |
| x0       | x                        | x_0                                         | t - 1           |
| v        | x                        | signal eps - noise x_0 (Salimans & Ho 2022) | t - 1           |
| edm      | y = x / signal           | x_0, as D(y; sigma) (Karras et al. 2022)    | sigma           |
| velocity | y = x / (signal + noise) | eps - x_0, rectified flow (Liu et al. 2023) | s               |

with sigma = noise / signal and s = noise / (signal + noise). The input y is x_0 + sigma eps for edm, and
(1 - s) x_0 + s eps for velocity.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Generic, Literal, Self, TypeVar, get_args

import torch
from torch import Tensor

from ddim.errors import DdimError
from ddim.names import Predicts
from ddim.nn.base import Network, network_time
from ddim.process.categorical import Alphabet
from ddim.process.parameterization import Prediction, TokenPrediction, predict, predict_tokens
from ddim.process.schedule import Level

P = TypeVar("P", bound=Prediction | TokenPrediction)
OutputFn = Callable[[Tensor, Tensor, Level], P]
"""Function from a network's output, x and the level to a prediction."""

Output = Literal["eps", "x0", "v", "edm", "velocity"]

MEANS: dict[Output, Predicts] = {"eps": "eps", "x0": "x0", "v": "v", "edm": "x0", "velocity": "v"}
"""The equivalent prediction type of each output after the change of variables."""

Time = Literal["index", "index+1", "fraction", "log-snr", "sigma", "flow"]
"""How a level is passed to a network as time, see `ddim.model.wrap`."""


def image_output(predicts: Predicts) -> OutputFn[Prediction]:
    """The output function of a network over real-valued data that predicts eps, x_0 or v."""
    return partial(_read_images, predicts=predicts)


def _read_images(output: Tensor, x: Tensor, level: Level, predicts: Predicts) -> Prediction:
    values = output.to(x.dtype, memory_format=torch.contiguous_format)
    if values.shape == x.shape:
        return predict(values, x, level, predicts)
    mean, variance = values.chunk(2, dim=1)  # learned variance, in [-1, 1]
    prediction = predict(mean, x, level, predicts)
    prediction.variance_fraction = (variance + 1) / 2
    return prediction


def token_output(alphabet: Alphabet) -> OutputFn[TokenPrediction]:
    """The output function of a network over discrete data, which returns logits."""
    return partial(predict_tokens, alphabet=alphabet)


class NetworkDenoiser(Generic[P]):
    """A trained network as a denoiser; the conditioning on time and labels is computed once per time and cached.

    Args:
        network: The network, with its body in the compute dtype.
        hub: Function from the network's output to a prediction.
        labels: int64, (N,), one label for each sample of every batch, or None.
        body: A replacement for the network's body, such as a compiled one.
    """

    def __init__(
        self,
        network: Network,
        hub: OutputFn[P],
        labels: Tensor | None = None,
        body: Callable[..., Tensor] | None = None,
    ):
        self.network, self.hub = network, hub
        self._labels = None if labels is None else torch.unique(labels, return_inverse=True)
        self.body = body or network.body
        first = next(network.entry.parameters())
        self.dtype, self.device = first.dtype, first.device
        self._conditions: dict[float, Tensor] = {}

    def __call__(self, x: Tensor, level: Level, /) -> P:
        """The prediction at x, (N, ...): floats, differentiable if x requires a gradient, or ids."""
        return self.hub(self.body(self.network.enter(x), self._condition(level.t)), x, level)

    def evaluate_many(self, states: Sequence[Tensor], levels: Sequence[Level]) -> list[Callable[[Tensor, Level], P]]:
        """Evaluate the network once on several states (N, ...), each at its level.

        Returns:
            One function per state, from another state and its level to the prediction from the stored network output.
        """
        n = len(states[0])
        conditions = torch.cat([self._condition(level.t).expand(n, -1) for level in levels])
        outputs = self.body(self.network.enter(torch.cat([*states])), conditions)
        return [partial(self.hub, output) for output in torch.split(outputs, n)]

    def _condition(self, t: float) -> Tensor:
        # Computed for one time and one label at a time: in a batch, the bits would depend on which others are in it.
        if t not in self._conditions:
            self._conditions[t] = self._new_condition(t)
        return self._conditions[t]

    @torch.no_grad()
    def _new_condition(self, t: float) -> Tensor:
        times = torch.full((1,), t, dtype=torch.float32, device=self.device)
        if self._labels is None:
            return self.network.condition(times).to(self.dtype)
        distinct, inverse = self._labels
        return torch.cat([self.network.condition(times, label[None]) for label in distinct])[inverse].to(self.dtype)

    @property
    def labelled(self) -> bool:
        """Whether the denoiser has labels."""
        return self._labels is not None

    def take_labels(self, other: NetworkDenoiser[P]) -> None:
        """Copy the labels of another denoiser, of the same number; cached conditioning is overwritten in place.

        A CUDA graph reads these tensors, see `ddim.model.cuda_graphs`.
        """
        if self.labelled:
            self._labels = other._labels
            for t, condition in self._conditions.items():
                condition.copy_(other._condition(t))


def flow_time(level: Level) -> float:
    """The time s = noise / (signal + noise) of flow matching, in [0, 1], with the same signal-to-noise ratio."""
    return level.noise / (level.signal + level.noise)


def _data_time(level: Level) -> float:
    return level.signal / (level.signal + level.noise)


def _index(level: Level) -> float:
    return network_time(level.t)


def _fraction(level: Level, T: int) -> float:
    return level.t / T


def teller(name: str, T: int, data_at: int) -> Callable[[Level], float]:
    """The function from a level to the time that is passed to a network, by name.

    It is not a lambda, so that a wrapped network can be pickled if its module can.

    Args:
        name: One of `Time`.
        T: The number of timesteps of the schedule.
        data_at: 1 if the time of the flow is 1 at the data, else 0.

    Raises:
        DdimError: If there is no time of that name.
    """
    functions: dict[Time, Callable[[Level], float]] = {
        "index": _index,
        "index+1": operator.attrgetter("t"),
        "fraction": partial(_fraction, T=T),
        "log-snr": operator.attrgetter("log_snr"),
        "sigma": operator.attrgetter("ratio"),
        "flow": _data_time if data_at else flow_time,
    }
    if name not in get_args(Time):
        raise DdimError(
            f"time {name!r}", "is unknown", f"choose one of {', '.join(functions)}, or a function of the level"
        )
    return next(function for key, function in functions.items() if key == name)


@dataclass(frozen=True, eq=False)
class ExternalDenoiser:
    """A network of another library, or any callable, as a denoiser.

    Args:
        module: The network, called as module(input, time (N,), **conditioning). It returns a tensor, a tuple
            whose first entry is a tensor, or an object whose `sample` is a tensor.
        predicts: What the network predicts, see the table at the head of this module.
        tell: Function from a level to the time that is passed to the network.
        dtype: The dtype of the network's input; that of x if None.
        device: The device of the network's input; that of x if None.
        time_dtype: The dtype of the time; if None, int64 for integer timesteps if `counts`, else float32 (float64 if
            the input is float64).
        counts: Whether the time is a timestep index.
        sign: -1 for a velocity x_0 - eps, else 1.
        conditioning: Keyword arguments of every call.
    """

    module: Callable[..., Any]
    predicts: Output
    tell: Callable[[Level], float]
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    time_dtype: torch.dtype | None = None
    counts: bool = False
    sign: float = 1.0
    conditioning: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, x: Tensor, level: Level, /) -> Prediction:
        """The prediction at x, (N, ...), and one level; differentiable if x requires a gradient.

        Raises:
            DdimError: If the level has no signal and this network needs one, or if the output has neither the shape
                of x nor twice its channels (a learned variance).
        """
        self.check_signal(level)
        total = level.signal + level.noise
        scale = {"edm": level.signal, "velocity": total}.get(self.predicts, 1.0)
        inputs = (x if scale == 1 else x / scale).to(self.device or x.device, self.dtype or x.dtype)
        conditioning = {name: _expand(name, value, inputs) for name, value in self.conditioning.items()}
        output = _tensor(self.module(inputs, self._time(level, inputs), **conditioning)).to(x.device)
        doubled = (*x.shape[:1], *(2 * size for size in x.shape[1:2]), *x.shape[2:])
        if output.shape != x.shape and (output.shape != doubled or self.predicts == "velocity"):
            problem = f"returns {tuple(output.shape)} for {tuple(x.shape)}"
            raise DdimError("wrapped module", problem, "return the shape of x, or twice its channels")
        if self.predicts == "velocity":  # x_0 = y - s u and eps = y + (1 - s) u, in v = signal eps - noise x_0
            output = (x * (level.signal - level.noise) + output.to(x.dtype) * self.sign) / total
        return image_output(MEANS[self.predicts])(output, x, level)

    def with_conditioning(self, **conditioning: Any) -> Self:
        """A copy with additional keyword arguments for every call; existing ones of the same name are replaced.

        Args:
            conditioning: Tensors, including those in dictionaries, have one entry per sample, or one for all. Other
                values, and tensors without a dimension, are passed on unchanged.
        """
        return replace(self, conditioning={**self.conditioning, **conditioning})

    def at(self, places: Tensor, total: int) -> Self:
        """A copy with the conditioning of selected samples of a batch.

        Args:
            places: int64, (M,), the indices of the samples.
            total: The number of samples in the batch.

        Raises:
            DdimError: If the conditioning has another number of entries.
        """
        selected = {name: _select(name, value, places, total) for name, value in self.conditioning.items()}
        return replace(self, conditioning=selected)

    def check_signal(self, level: Level) -> None:
        """Check that the network's output determines x_0 at a level.

        Raises:
            DdimError: If the level has no signal and the network predicts eps, or x_0 from x / signal.
        """
        if level.signal == 0 and self.predicts in ("eps", "edm"):
            problem = f"does not determine x0 at t = {level.t:g}, where there is no signal"
            raise DdimError(f"a network of {self.predicts}", problem, "use lower timesteps, or another schedule")

    def _time(self, level: Level, batch: Tensor) -> Tensor:
        value = float(self.tell(level))
        if not math.isfinite(value):
            raise DdimError(f"time at t = {level.t:g}", f"is {value}", "use other timesteps, or another `time`")
        dtype = self.time_dtype
        if dtype is None:
            floats = torch.float64 if batch.dtype == torch.float64 else torch.float32
            dtype = torch.int64 if self.counts and value == int(value) else floats
        elif not dtype.is_floating_point and value != int(value):
            raise DdimError(f"time at t = {level.t:g}", f"is {value:g}, not an integer", "use integer timesteps")
        return torch.full((len(batch),), value, dtype=dtype, device=batch.device)


def _tensor(output: Any) -> Tensor:
    """The tensor in a network's return value."""
    tensor = output
    if isinstance(output, tuple | list) and output:
        tensor = output[0]
    elif not isinstance(output, Tensor):
        tensor = getattr(output, "sample", None)
    if not isinstance(tensor, Tensor):
        problem = f"returns {type(output).__name__} without a tensor"
        raise DdimError(
            "wrapped module", problem, "return a tensor, a tuple that starts with it, or an object with `.sample`"
        )
    return tensor


def _expand(name: str, value: Any, batch: Tensor) -> Any:
    """Move conditioning to the device of a batch; expand a single entry to all samples."""
    if isinstance(value, Mapping):
        return {key: _expand(f"{name}.{key}", inner, batch) for key, inner in value.items()}
    if not isinstance(value, Tensor) or not value.ndim:
        return value
    _check_count(name, value, len(batch))
    moved = value.to(batch.device)
    return moved if len(value) == len(batch) else moved.expand(len(batch), *value.shape[1:])


def _select(name: str, value: Any, places: Tensor, total: int) -> Any:
    if isinstance(value, Mapping):
        return {key: _select(f"{name}.{key}", inner, places, total) for key, inner in value.items()}
    if not isinstance(value, Tensor) or not value.ndim:
        return value
    _check_count(name, value, total)
    return value if len(value) == 1 else value[places.to(value.device)]


def _check_count(name: str, value: Tensor, total: int) -> None:
    if len(value) not in (1, total):
        problem = f"has {len(value)} entries for {total} samples"
        raise DdimError(f"conditioning {name}", problem, "pass one for each, or one for all")
