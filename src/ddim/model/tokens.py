"""`TokenModel`: a trained model of discrete data, which is text or images with few grey levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ddim import samplers
from ddim._io.arguments import whole
from ddim._io.limits import check_samples
from ddim.errors import DdimError
from ddim.model.base import ModelBase
from ddim.plan.categorical import CategoricalPlan
from ddim.process.categorical import Alphabet
from ddim.process.timesteps import DEFAULT
from ddim.sampling.guidance import Guidance


class TokenModel(ModelBase):
    """A trained model of discrete data: a `ModelBase` with plans, sampling and decoding of text.

    Samples are ids, int64: (N, L) for text, which `text` converts to strings, or (N, C, H, W) for images.
    """

    SETTINGS = frozenset({"eta", "temperature", "top_p"})

    @property
    def alphabet(self) -> Alphabet:
        """The alphabet of x_t and the distribution that noise is drawn from."""
        assert self.config.categorical is not None
        return self.config.categorical.alphabet()

    def plan(
        self,
        steps: int | None = None,
        grid: str | Sequence[float] | None = None,
        eta: float = 0.0,
        sampler: str = "ddim",
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> CategoricalPlan:
        """A plan for this model.

        Args:
            steps: S, the number of network evaluations; 20 by default.
            grid: The name of a timestep spacing (see `ddim.timesteps`) or an increasing list of timesteps; equal-angle
                by default.
            eta: See `ddim.samplers.discrete`: 0 is the least random kernel, 1 the most.
            sampler: "ddim" ("auto" means "ddim"), or "markov", see `ddim.samplers.discrete_markov`.
            temperature: Below 1, the predicted distribution of x_0 is sharpened before sampling from it.
            top_p: Below 1, unlikely values of x_0 are excluded (nucleus sampling).

        Raises:
            DdimError: If a setting is out of range.
        """
        sampler = "ddim" if sampler == "auto" else sampler
        if sampler not in samplers.DISCRETE:
            names = ", ".join(samplers.DISCRETE)
            raise DdimError(f"sampler {sampler!r}", "is not for discrete data", f"choose one of {names}")
        if sampler == "markov" and eta:
            raise DdimError("sampler markov", "has no eta", "remove eta, or use ddim")
        grid = DEFAULT if grid is None else grid
        levels = self.levels(grid, steps)
        about = f"{grid if isinstance(grid, str) else 'custom grid'}, S={len(levels) - 1}"
        if sampler == "markov":
            return samplers.discrete_markov(levels, self.alphabet, temperature, top_p, about)
        return samplers.discrete(levels, self.alphabet, eta, temperature, top_p, about)

    def sample(
        self,
        n: int,
        steps: int | None = None,
        seed: int = 0,
        start: int = 0,
        labels: int | Sequence[int] | None = None,
        guidance: Guidance | None = None,
        plan: CategoricalPlan | None = None,
        **settings: Any,
    ) -> Tensor:
        """Sample ids. Sample i is a function of (model, plan, seed, start + i) and does not depend on n.

        Args:
            n: The number of samples.
            steps: S, the number of network evaluations; 20 by default.
            seed: The run's seed.
            start: The first sample's index.
            labels: One label for all samples or one per sample, for a model with labels.
            guidance: Scale of classifier-free guidance, or a function from level to scale.
            plan: The plan to run, instead of steps and settings.
            settings: The arguments of `TokenModel.plan`: grid, eta, sampler, temperature, top_p.

        Returns:
            int64, (n, L) or (n, C, H, W).

        Raises:
            DdimError: If an argument is out of range, or the plan does not fit this model.
        """
        each = self.check_request(n, labels, plan, settings or steps is not None)
        check_samples(n, whole(start, "start", 0))
        plan = plan or self.plan(steps, **settings)
        blocks = self.sample_blocks(plan, range(start, start + n), seed, each, guidance)
        return torch.cat([self.empty().long(), *blocks])

    def text(self, ids: Tensor) -> list[str]:
        """Decode sequences of ids, int64, (N, L), to strings.

        Raises:
            DdimError: If this is a model of images.
        """
        if len(self.shape) != 1:
            raise DdimError("model", "is a model of images, not of text", "use ddim.pixels.dequantize")
        return list(self.kind.render(ids))
