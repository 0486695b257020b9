"""The network is wrapped once: what it predicts, its dtype and its time conditioning stay behind this door."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ddim.categorical import Alphabet
from ddim.denoiser import Prediction, Predicts, predict
from ddim.nn.network import Network
from ddim.schedule import Level
from ddim.tokens import TokenPrediction, predict_tokens

P = TypeVar("P", bound=Prediction | TokenPrediction)
Hub = Callable[[Tensor, Tensor, Level], P]
"""What a network's output at x and a level says."""


def pictures_hub(predicts: Predicts) -> Hub[Prediction]:
    """The hub of a network over real-valued data that predicts eps, x_0 or v."""
    return partial(_read_pictures, predicts=predicts)


def _read_pictures(output: Tensor, x: Tensor, level: Level, predicts: Predicts) -> Prediction:
    said = output.to(x.dtype, memory_format=torch.contiguous_format)
    if said.shape == x.shape:
        return predict(said, x, level, predicts)
    mean, variance = said.chunk(2, dim=1)  # of a network with learned variance, which says -1..1
    prediction = predict(mean, x, level, predicts)
    prediction.fraction = (variance + 1) / 2
    return prediction


def tokens_hub(alphabet: Alphabet) -> Hub[TokenPrediction]:
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
        hub: Hub[P],
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

    def held(self, states: Sequence[Tensor], levels: Sequence[Level]) -> list[Callable[[Tensor, Level], P]]:
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

        A CUDA graph reads these tensors, see `ddim.cuda_graphs`.
        """
        if self.labelled:
            self._known = other._known
            for t, condition in self._conditions.items():
                condition.copy_(other._condition(t))
