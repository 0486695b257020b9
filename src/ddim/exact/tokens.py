"""Token sequences with an exact posterior given a noised sequence, for the discrete case of Appendix A.

Each token is independently unchanged with probability abar_t and else drawn from pi: q(x_t | x_0) =
Cat(abar_t x_0 + (1 - abar_t) pi). In the paper pi is uniform; with all of pi on one token, that token is the mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ddim.errors import DdimError
from ddim.exact.draws import distribution, uniforms
from ddim.process.rng import sample_categorical
from ddim.process.schedule import Level


@dataclass(frozen=True, eq=False)
class IidTokens:
    """Sequences of any length of i.i.d. tokens from a vocabulary of size K.

    Args:
        probabilities: (K,), >= 0, of sum 1.
        pi: The noise distribution, (K,), >= 0, of sum 1; uniform if None.

    Raises:
        DdimError: If one of them is not a distribution.
    """

    probabilities: Tensor
    pi: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "probabilities", distribution("probabilities", self.probabilities, None))
        object.__setattr__(self, "pi", distribution("pi", self.pi, len(self.probabilities)))

    def predict(self, x: Tensor, level: Level) -> Tensor:
        """The posterior p(x_0[l] = k | x_t) by Bayes' rule.

        Args:
            x: x_t, int64, (N, L).
            level: Its level.

        Returns:
            float64, (N, L, K).

        Raises:
            DdimError: If x contains invalid ids, or tokens that cannot occur at this level.
        """
        joint = self.probabilities * _likelihood(x, level, self.pi)
        return _possible(joint / joint.sum(-1, keepdim=True))

    def log_prob(self, x0: Tensor) -> Tensor:
        """log p of clean sequences (N, L) in nats: float64, (N,); -inf for those that cannot occur."""
        return self.probabilities.log()[_ids(x0, len(self.probabilities))].sum(-1)

    def noised_log_prob(self, x: Tensor, level: Level) -> Tensor:
        """log q(x_t) of noised sequences (N, L) in nats: float64, (N,); -inf for those that cannot occur."""
        return (self.probabilities * _likelihood(x, level, self.pi)).sum(-1).log().sum(-1)

    def sample(self, n: int, length: int, seed: int) -> Tensor:
        """Clean sequences: int64, (n, length); sequence i is a function of (seed, i)."""
        u = uniforms(n, seed, length).to(self.probabilities.device)
        return sample_categorical(u.flatten(), self.probabilities).reshape(n, length)


@dataclass(frozen=True, eq=False)
class MarkovTokens:
    """Sequences of any length from a Markov chain over a vocabulary of size K.

    With noise on each token this is a hidden Markov model; the forward-backward algorithm computes its posterior.

    Args:
        initial: The distribution of the first token, (K,).
        transition: Row j is the distribution of the token that follows j, (K, K).
        pi: The noise distribution, (K,); uniform if None.

    Raises:
        DdimError: If one of them, or a row of `transition`, is not a distribution.
    """

    initial: Tensor
    transition: Tensor
    pi: Tensor | None = None

    def __post_init__(self) -> None:
        initial = distribution("initial", self.initial, None)
        size = len(initial)
        object.__setattr__(self, "initial", initial)
        rows = torch.as_tensor(self.transition)
        if rows.shape != (size, size):
            raise DdimError(f"transition of shape {tuple(rows.shape)}", f"does not fit K = {size}", "pass (K, K)")
        distributions = [distribution(f"transition row {j}", row, size) for j, row in enumerate(rows)]
        object.__setattr__(self, "transition", torch.stack(distributions))
        object.__setattr__(self, "pi", distribution("pi", self.pi, size))

    def predict(self, x: Tensor, level: Level) -> Tensor:
        """The posterior p(x_0[l] = k | x_t) of every token, given the whole noised sequence.

        Args:
            x: x_t, int64, (N, L).
            level: Its level.

        Returns:
            float64, (N, L, K).

        Raises:
            DdimError: If x contains invalid ids, or a sequence that cannot occur at this level.
        """
        log_likelihood = _likelihood(x, level, self.pi).log()
        log_transition = self.transition.log()
        backward = [torch.zeros_like(log_likelihood[:, -1])]
        for position in reversed(range(1, log_likelihood.shape[1])):
            ahead = (log_likelihood[:, position] + backward[-1])[:, None, :]
            backward.append((log_transition + ahead).logsumexp(-1))
        joint = self._forward(log_likelihood) + torch.stack(backward[::-1], 1)
        return _possible(joint.softmax(-1))

    def log_prob(self, x0: Tensor) -> Tensor:
        """log p of clean sequences (N, L) in nats: float64, (N,); -inf for those that cannot occur."""
        ids = _ids(x0, len(self.initial))
        return self.initial.log()[ids[:, 0]] + self.transition.log()[ids[:, :-1], ids[:, 1:]].sum(-1)

    def noised_log_prob(self, x: Tensor, level: Level) -> Tensor:
        """log q(x_t) of noised sequences (N, L) in nats: float64, (N,); -inf for those that cannot occur."""
        return self._forward(_likelihood(x, level, self.pi).log())[:, -1].logsumexp(-1)

    def sample(self, n: int, length: int, seed: int) -> Tensor:
        """Clean sequences: int64, (n, length); sequence i is a function of (seed, i)."""
        u = uniforms(n, seed, length).to(self.initial.device)
        drawn = [sample_categorical(u[:, 0], self.initial)]
        for position in range(1, length):
            drawn.append(sample_categorical(u[:, position], self.transition[drawn[-1]]))
        return torch.stack(drawn, 1)

    def _forward(self, log_likelihood: Tensor) -> Tensor:
        """log p(x_0[l] = k, x_t[..l]) from the log-likelihoods of the tokens, both (N, L, K)."""
        log_transition = self.transition.log()
        forward = [self.initial.log() + log_likelihood[:, 0]]
        for position in range(1, log_likelihood.shape[1]):
            forward.append((forward[-1][:, :, None] + log_transition).logsumexp(1) + log_likelihood[:, position])
        return torch.stack(forward, 1)


def _likelihood(x: Tensor, level: Level, pi: Tensor | None) -> Tensor:
    """q(x_t[l] | x_0[l] = k): float64, (N, L, K)."""
    assert pi is not None  # set on construction
    ids = _ids(x, len(pi))
    same = torch.nn.functional.one_hot(ids, len(pi)).double()
    return level.alpha_bar * same + level.variance * pi[ids][..., None]


def _ids(x: Tensor, size: int) -> Tensor:
    if x.ndim != 2 or not x.shape[1] or x.is_floating_point():
        raise DdimError(f"tokens of shape {tuple(x.shape)} and {x.dtype}", "are not sequences", "pass int64 (N, L)")
    if x.numel() and not (int(x.min()) >= 0 and int(x.max()) < size):
        raise DdimError(f"tokens {int(x.min())}..{int(x.max())}", f"are outside 0..{size - 1}", "fix the ids")
    return x.long()


def _possible(posterior: Tensor) -> Tensor:
    if posterior.isnan().any():
        raise DdimError("tokens x_t", "have probability 0 at this level", "pass sequences that the data and pi allow")
    return posterior
