"""Computes the exact distance of the sampler's distribution to the data, with the exact predictor of a Markov chain.

    python scripts/token_convergence.py [--out docs/results/token-convergence.json]

All K^L sequences are enumerated: a row of a plan is a matrix over them, the product over positions of `posterior` or
`markov_posterior` with p(x_0 | x_t) of the position. Nothing is sampled. The distance is total variation, in [0, 1].
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from ddim import exact, samplers
from ddim.plan.categorical import CategoricalPlan
from ddim.process import schedule, timesteps
from ddim.process.categorical import Alphabet, markov_posterior, posterior

K, LENGTH = 3, 4
STEPS = (2, 4, 8, 16, 32, 64, 128)
TRANSITION = torch.tensor([[0.8, 0.15, 0.05], [0.1, 0.1, 0.8], [0.3, 0.6, 0.1]], dtype=torch.float64)
INITIAL = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


def chain(alphabet: Alphabet) -> exact.MarkovTokens:
    """A chain of K tokens; a mask is an additional token that never occurs."""
    extra = alphabet.size - K
    rows = torch.nn.functional.pad(TRANSITION, (0, extra, 0, extra))
    if extra:
        rows[-1, 0] = 1.0  # never used
    return exact.MarkovTokens(torch.nn.functional.pad(INITIAL, (0, extra)), rows, alphabet.pi)


def output(plan: CategoricalPlan, data: exact.MarkovTokens, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    """Output of a plan with the exact predictor: all sequences (M, L), and the probability of each, (M,)."""
    size = len(plan.pi)
    every = torch.cartesian_prod(*[torch.arange(size)] * length)
    pi = torch.tensor(plan.pi, dtype=torch.float64)
    mass = pi[every].prod(1)
    kernel = {"ddim": lambda x, p, row: posterior(x, p, row.now, row.next, row.keep, pi)}
    kernel["markov"] = lambda x, p, row: markov_posterior(x, p, row.now, row.next, pi)
    for row in plan.rows:
        possible = mass > 0
        x = every[possible]
        each = kernel[plan.kernel](x, data.predict(x, row.now), row)  # (M, L, K)
        transition = torch.ones(len(x), len(every), dtype=torch.float64)
        for position in range(length):
            transition *= each[:, position][:, every[:, position]]
        mass = mass[possible] @ transition
    return every, mass


def distance(plan: CategoricalPlan, data: exact.MarkovTokens) -> float:
    """Total variation between the output of a plan and the data."""
    every, mass = output(plan, data)
    truth = data.log_prob(every).exp()
    return float((mass - truth).abs().sum() / 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    cosine = schedule.zero_terminal_snr(schedule.cosine())
    rows = []
    for noise, alphabet in (("uniform", Alphabet.uniform(K)), ("mask", Alphabet.masked(K))):
        data = chain(alphabet)
        for name in ("eta 0", "eta 0.05", "eta 0.2", "eta 1", "eta 1/S", "markov"):
            distances = {}
            for steps in STEPS:
                levels = timesteps.sampling_levels(cosine, "x0", "equal-angle", steps)
                if name == "markov":
                    plan = samplers.discrete_markov(levels, alphabet)
                else:
                    eta = 1 / steps if name == "eta 1/S" else float(name.split()[1])
                    plan = samplers.discrete(levels, alphabet, eta)
                distances[steps] = distance(plan, data)
            rows.append({"noise": noise, "kernel": name, "distance": distances})
            print(f"{noise:8} {name:9}" + "".join(f"{value:10.5f}" for value in distances.values()), flush=True)
    if arguments.out:
        what = {"K": K, "length": LENGTH, "grid": "equal-angle", "schedule": cosine.name, "rows": rows}
        arguments.out.write_text(json.dumps(what, indent=1) + "\n")


if __name__ == "__main__":
    main()
