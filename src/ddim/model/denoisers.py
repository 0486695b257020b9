"""Networks as denoisers: our own (`NetworkDenoiser`), and anyone's (`ForeignDenoiser`).

What a wrapped network is shown and told at a level, and what its output says:

| predicts | shown                    | output                                      | time by default |
|----------|--------------------------|---------------------------------------------|-----------------|
| eps      | x                        | eps                                         | t - 1           |
| x0       | x                        | x_0                                         | t - 1           |
| v        | x                        | signal eps - noise x_0 (Salimans & Ho 2022) | t - 1           |
| edm      | y = x / signal           | x_0, as D(y; sigma) (Karras et al. 2022)    | sigma           |
| velocity | y = x / (signal + noise) | eps - x_0, rectified flow (Liu et al. 2023) | s               |

with sigma = noise / signal and s = noise / (signal + noise), which every level has: y is x_0 + sigma eps, and
(1 - s) x_0 + s eps.
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
from ddim.nn.base import Network
from ddim.process.categorical import Alphabet
from ddim.process.parameterization import Prediction, TokenPrediction, predict, predict_tokens
from ddim.process.schedule import Level

P = TypeVar("P", bound=Prediction | TokenPrediction)
OutputFn = Callable[[Tensor, Tensor, Level], P]
"""What a network's output at x and a level says."""

Output = Literal["eps", "x0", "v", "edm", "velocity"]

MEANS: dict[Output, Predicts] = {"eps": "eps", "x0": "x0", "v": "v", "edm": "x0", "velocity": "v"}
"""What each output is once the change of variables is made."""

Time = Literal["index", "index+1", "fraction", "log-snr", "sigma", "flow"]
"""What a network may be told of a level, see `ddim.model.wrap`."""


def image_output(predicts: Predicts) -> OutputFn[Prediction]:
    """The hub of a network over real-valued data that predicts eps, x_0 or v."""
    return partial(_read_pictures, predicts=predicts)


def _read_pictures(output: Tensor, x: Tensor, level: Level, predicts: Predicts) -> Prediction:
    said = output.to(x.dtype, memory_format=torch.contiguous_format)
    if said.shape == x.shape:
        return predict(said, x, level, predicts)
    mean, variance = said.chunk(2, dim=1)  # of a network with learned variance, which says -1..1
    prediction = predict(mean, x, level, predicts)
    prediction.variance_fraction = (variance + 1) / 2
    return prediction


def token_output(alphabet: Alphabet) -> OutputFn[TokenPrediction]:
    """The hub of a network over categories, which gives logits."""
    return partial(predict_tokens, alphabet=alphabet)


class NetworkDenoiser(Generic[P]):
    """A trained network as a denoiser; what depends on time alone is computed once per time.

    Args:
        network: The network, its body in the dtype to compute in.
        hub: What its output says.
        labels: int64, (N,), one label for each sample of the batches to come, or None.
        body: The network's body, if it is to be replaced by a compiled one.
    """

    def __init__(
        self,
        network: Network,
        hub: OutputFn[P],
        labels: Tensor | None = None,
        body: Callable[..., Tensor] | None = None,
    ):
        self.network, self.hub = network, hub
        self._known = None if labels is None else torch.unique(labels, return_inverse=True)
        self.body = body or network.body
        first = next(network.entry.parameters())
        self.dtype, self.device = first.dtype, first.device
        self._conditions: dict[float, Tensor] = {}

    def __call__(self, x: Tensor, level: Level, /) -> P:
        """The prediction at x, (N, ...): floats, differentiable in x where x asks for it, or ids."""
        return self.hub(self.body(self.network.enter(x), self._condition(level.t)), x, level)

    def evaluate_many(self, states: Sequence[Tensor], levels: Sequence[Level]) -> list[Callable[[Tensor, Level], P]]:
        """One call at many states (N, ...), each at its level: what its output says of other states, for each."""
        n = len(states[0])
        conditions = torch.cat([self._condition(level.t).expand(n, -1) for level in levels])
        outputs = self.body(self.network.enter(torch.cat([*states])), conditions)
        return [partial(self.hub, output) for output in torch.split(outputs, n)]

    def _condition(self, t: float) -> Tensor:
        # One time after another: made together, their bits would depend on which times were asked for before.
        # And one label after another, for the same reason.
        if t not in self._conditions:
            self._conditions[t] = self._new_condition(t)
        return self._conditions[t]

    @torch.no_grad()
    def _new_condition(self, t: float) -> Tensor:
        times = torch.full((1,), t, dtype=torch.float32, device=self.device)
        if self._known is None:
            return self.network.condition(times).to(self.dtype)
        known, place = self._known
        return torch.cat([self.network.condition(times, label[None]) for label in known])[place].to(self.dtype)

    @property
    def labelled(self) -> bool:
        """Whether it was given labels."""
        return self._known is not None

    def take_labels(self, other: NetworkDenoiser[P]) -> None:
        """Take over another's labels, as many: what was computed for each time is replaced in place.

        A CUDA graph reads these tensors, see `ddim.model.cuda_graphs`.
        """
        if self.labelled:
            self._known = other._known
            for t, condition in self._conditions.items():
                condition.copy_(other._condition(t))


def flow_time(level: Level) -> float:
    """The time s = noise / (signal + noise) of flow matching, in [0, 1], that mixes x_0 and eps as a level does."""
    return level.noise / (level.signal + level.noise)


def _data_time(level: Level) -> float:
    return level.signal / (level.signal + level.noise)


def _index(level: Level) -> float:
    return level.t - 1


def _fraction(level: Level, T: int) -> float:
    return level.t / T


def teller(name: str, T: int, data_at: int) -> Callable[[Level], float]:
    """The function of a level that gives its time by a name.

    It is no lambda, so that a wrapped network can be pickled where its module can.

    Args:
        name: One of `Time`.
        T: The number of times of the schedule.
        data_at: 1 where the flow's time is 1 at the data.

    Raises:
        DdimError: If there is no time of that name.
    """
    told: dict[Time, Callable[[Level], float]] = {
        "index": _index,
        "index+1": operator.attrgetter("t"),
        "fraction": partial(_fraction, T=T),
        "log-snr": operator.attrgetter("log_snr"),
        "sigma": operator.attrgetter("ratio"),
        "flow": _data_time if data_at else flow_time,
    }
    if name not in get_args(Time):
        raise DdimError(f"time {name!r}", "is unknown", f"choose one of {', '.join(told)}, or a function of the level")
    return next(tell for known, tell in told.items() if known == name)


@dataclass(frozen=True, eq=False)
class ExternalDenoiser:
    """A network that knows nothing of levels, as a denoiser.

    Args:
        module: The network, called as module(shown, time (N,), **conditioning). It gives a tensor, a tuple whose first
            entry is it, or an object whose `sample` is it.
        predicts: What its output says, see the head of this file.
        tell: The time it is told at a level.
        dtype: What it is shown is cast to; that of x if None.
        device: Where it computes; that of x if None.
        time_dtype: The dtype of its times; if None int64 for whole numbers that count steps, else float32 (float64
            beside float64).
        counts: Whether its times count steps.
        sign: -1 for a velocity x_0 - eps.
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
        """The prediction at x, (N, ...), and one level; differentiable in x where x asks for it.

        Raises:
            DdimError: Where there is no signal and this network needs some, or its output is neither of the shape of x
                nor, where it says a variance too, of twice its channels.
        """
        self.check_signal(level)
        total = level.signal + level.noise
        scale = {"edm": level.signal, "velocity": total}.get(self.predicts, 1.0)
        shown = (x if scale == 1 else x / scale).to(self.device or x.device, self.dtype or x.dtype)
        given = {name: _spread(name, value, shown) for name, value in self.conditioning.items()}
        said = _tensor(self.module(shown, self._time(level, shown), **given)).to(x.device)
        doubled = (*x.shape[:1], *(2 * size for size in x.shape[1:2]), *x.shape[2:])
        if said.shape != x.shape and (said.shape != doubled or self.predicts == "velocity"):
            wrong = f"gives {tuple(said.shape)} of {tuple(x.shape)}"
            raise DdimError("wrapped module", wrong, "its output must have the shape of x, or twice the channels")
        if self.predicts == "velocity":  # x_0 = y - s u and eps = y + (1 - s) u, in v = signal eps - noise x_0
            said = (x * (level.signal - level.noise) + said.to(x.dtype) * self.sign) / total
        return image_output(MEANS[self.predicts])(said, x, level)

    def with_conditioning(self, **conditioning: Any) -> Self:
        """The same network with keyword arguments for every call, beside or instead of those it has.

        Args:
            conditioning: Tensors, also those in dictionaries, hold one entry for each sample, or one for all; anything
                else, and tensors without a dimension, are passed on as they are.
        """
        return replace(self, conditioning={**self.conditioning, **conditioning})

    def at(self, places: Tensor, total: int) -> Self:
        """The same network for some samples of a batch: with the conditioning of these alone.

        Args:
            places: int64, (M,), which samples.
            total: How many the batch has.

        Raises:
            DdimError: If the conditioning is for another number of samples.
        """
        picked = {name: _picked(name, value, places, total) for name, value in self.conditioning.items()}
        return replace(self, conditioning=picked)

    def check_signal(self, level: Level) -> None:
        """Refuse a level at which the network's output would say nothing.

        Raises:
            DdimError: If there is no signal for one that predicts eps, or x_0 from x / signal.
        """
        if level.signal == 0 and self.predicts in ("eps", "edm"):
            wrong = f"says nothing of x0 at t = {level.t:g}, where there is no signal"
            raise DdimError(f"a network of {self.predicts}", wrong, "choose lower times, or another schedule")

    def _time(self, level: Level, shown: Tensor) -> Tensor:
        value = float(self.tell(level))
        if not math.isfinite(value):
            raise DdimError(f"the time told at t = {level.t:g}", f"is {value}", "choose other times, or tell another")
        dtype = self.time_dtype
        if dtype is None:
            floats = torch.float64 if shown.dtype == torch.float64 else torch.float32
            dtype = torch.int64 if self.counts and value == int(value) else floats
        elif not dtype.is_floating_point and value != int(value):
            raise DdimError(f"the time told at t = {level.t:g}", f"is {value:g}, not a whole number", "use whole times")
        return torch.full((len(shown),), value, dtype=dtype, device=shown.device)


def _tensor(output: Any) -> Tensor:
    """The tensor in what a network returns."""
    found = output
    if isinstance(output, tuple | list) and output:
        found = output[0]
    elif not isinstance(output, Tensor):
        found = getattr(output, "sample", None)
    if not isinstance(found, Tensor):
        wrong = f"gives {type(output).__name__}, in which there is no tensor"
        raise DdimError(
            "wrapped module", wrong, "return a tensor, a tuple that begins with it, or an object with `.sample`"
        )
    return found


def _spread(name: str, value: Any, shown: Tensor) -> Any:
    """Conditioning on the device of a batch, one entry for all standing for each."""
    if isinstance(value, Mapping):
        return {key: _spread(f"{name}.{key}", inner, shown) for key, inner in value.items()}
    if not isinstance(value, Tensor) or not value.ndim:
        return value
    _check_count(name, value, len(shown))
    there = value.to(shown.device)
    return there if len(value) == len(shown) else there.expand(len(shown), *value.shape[1:])


def _picked(name: str, value: Any, places: Tensor, total: int) -> Any:
    if isinstance(value, Mapping):
        return {key: _picked(f"{name}.{key}", inner, places, total) for key, inner in value.items()}
    if not isinstance(value, Tensor) or not value.ndim:
        return value
    _check_count(name, value, total)
    return value if len(value) == 1 else value[places.to(value.device)]


def _check_count(name: str, value: Tensor, total: int) -> None:
    if len(value) not in (1, total):
        wrong = f"holds {len(value)} entries for {total} samples"
        raise DdimError(f"conditioning {name}", wrong, "give one for each, or one for all")
