"""Measures the errors of deterministic plans and the quality of their samples, for docs/solvers.md.

    python scripts/solvers.py mixture mnist fashion-mnist     # measures what docs/results/solvers.json lacks
    python scripts/solvers.py --report                        # only prints the tables and draws the figures

A bed is `mixture`, ten Gaussians fitted to scikit-learn's 8x8 digits with the exact denoiser, in float64, or a bundled
model, in float32. The error is the root mean square difference per dimension from the converged solution of the same
x_T, and quality the energy distance of a bed's samples to data. An interrupted run resumes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ddim
from ddim import samplers
from ddim.exact import MixtureData
from ddim.plan.plan import Plan
from ddim.process import timesteps
from ddim.process.parameterization import Denoiser
from ddim.sampling.fitting import CachedDenoiser, ReferenceSolution
from ddim.sampling.loop import run
from ddim.sampling.tuning import iter_tuning

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results" / "solvers.json"
TEN = ROOT / "docs" / "images" / "ten-calls.png"
FIGURE = ROOT / "docs" / "images" / "solvers.png"
CALLS = (5, 6, 8, 10, 12, 15, 20, 30, 40, 50, 100)
TUNED = {"mixture": (5, 6, 8, 10, 12, 15, 20), "mnist": (5, 8, 10, 15), "fashion-mnist": (10, 15)}
GRIDS = ("equal-angle", "linear", "quadratic", "log-snr")
SAMPLERS = tuple(name for name in samplers.SAMPLERS if name not in ("rk4", "probability-flow"))
# For models, where each takes minutes: at least one of each family.
FEWER = ("ddim", "ipndm4", "unipc3", "ab3-v", "dpm++2m", "unipc2", "deis3", "ipndm3", "ab2-v", "heun", "ab2", "ab3")
FEWEST = ("ddim", "ipndm3", "ipndm4", "unipc3")
SHOWN = ("ddim", "heun", "dpm++2m", "unipc3", "ab3-v", "ipndm4", "tuned")
QUALITY = (5, 8, 10, 15, 20, 50)
REFERENCE = 300
CALIBRATION = 128


class Bed:
    """A denoiser, its schedule, and the samples on which plans are compared."""

    def __init__(self, name: str, samples: int):
        self.name = name
        if name == "mixture":
            data = digits()
            self.denoise: Denoiser = data.denoise
            self.schedule, self.size = ddim.schedule.linear(), 512
            self.start = self.noise(0, samples)
        else:
            self.model = ddim.load(name, "cpu", dtype="float32")
            self.denoise, self.schedule, self.size = self.model.denoise, self.model.schedule, self.model.micro_batch
            self.start = self.noise(0, samples)

    def noise(self, seed: int, n: int) -> Tensor:
        """x_T of the first n samples of a seed; the calibration samples of tuning have another one."""
        if self.name == "mixture":
            return ddim.Noise(seed, tuple(range(n)), (64,)).start().double()
        return self.model.noise(n, seed).start()

    def converged(self, nodes: int) -> Tensor:
        """The solution with `nodes` evaluations, evenly spaced in log-SNR down to t = 1."""
        solution = ReferenceSolution(self.schedule, nodes)
        return run(CachedDenoiser(self.denoise, self.size, 0), solution.plan, self.start)


def digits() -> MixtureData:
    """Ten Gaussians with the mean and covariance of each class of scikit-learn's digits in [-1, 1]."""
    from sklearn.datasets import load_digits

    dataset = load_digits()
    data = torch.tensor(dataset.data / 8 - 1, dtype=torch.float64)
    classes = [data[torch.tensor(dataset.target == label)] for label in range(10)]
    wide = 1e-3 * torch.eye(64, dtype=torch.float64)
    covariances = torch.stack([torch.cov(part.T) + wide for part in classes])
    weights = torch.tensor([len(part) for part in classes], dtype=torch.float64) / len(data)
    return MixtureData(weights, torch.stack([part.mean(0) for part in classes]), covariances)


def plans(bed: Bed) -> Iterator[tuple[str, str, int, Callable[[], Plan | None]]]:
    """Sampler, spacing, NFE, and a function that returns the plan, or None if there is none with this NFE."""
    for name in {"mixture": SAMPLERS, "mnist": FEWER}.get(bed.name, FEWEST):
        for grid_name in GRIDS:
            for calls in CALLS:
                if name != "ddim" and (calls == 40 or (calls == 100 and bed.name != "mixture")):
                    continue
                if bed.name == "fashion-mnist" and calls not in (*QUALITY, 40, 100):
                    continue
                yield name, grid_name, calls, lambda n=name, g=grid_name, c=calls: plain(bed, n, g, c)


def plain(bed: Bed, name: str, grid_name: str, calls: int) -> Plan | None:
    steps = (calls + 1) // 2 if name == "heun" else calls  # its last step, to clean data, takes one evaluation
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ddim.DdimWarning)
        times = timesteps.tau(bed.schedule, grid_name, steps)
    plan = samplers.named(name, bed.schedule.levels([*reversed(times), 0.0]), bed.schedule)
    return plan if plan.nfe in (calls, calls - 1 if name == "heun" else calls) else None


def measure(bed: Bed, measured: dict[str, Any], save: Callable[[], None]) -> None:
    """Measure what the results of a bed lack."""
    if "reference" not in measured:
        reference, coarser = bed.converged(REFERENCE), bed.converged(REFERENCE // 2)
        measured["reference"] = {"calls": REFERENCE, "half_differs_by": rms(reference, coarser)}
        torch.save(reference, cache(bed))
        save()
    if not cache(bed).exists():
        torch.save(bed.converged(REFERENCE), cache(bed))
    reference = torch.load(cache(bed), weights_only=True)
    rows = measured.setdefault("rows", [])
    done = {(row["sampler"], row["grid"], row["calls"]) for row in rows}
    cached = CachedDenoiser(bed.denoise, bed.size)
    for calls in TUNED[bed.name]:
        if ("tuned", "", calls) in done:
            continue
        started = time.monotonic()
        calibration_samples = bed.noise(2**63, CALIBRATION)
        result = None
        for step in iter_tuning(bed.denoise, bed.schedule, calls, calibration_samples, size=bed.size):
            result = step.found or result
        assert result is not None
        seconds = time.monotonic() - started
        error = each(run(cached, result.plan, bed.start), reference)
        plan_entry = {"plan": result.plan.name, "rows": json.loads(result.plan.to_json())}
        rows.append({"sampler": "tuned", "grid": "", "calls": calls, **error, "seconds": seconds, **plan_entry})
        print(f"{bed.name} {result.plan.name}: {error['rms']:.4f} ({seconds:.0f} s)", flush=True)
        save()
    for name, grid_name, calls, make in plans(bed):
        if (name, grid_name, calls) in done:
            continue
        plan = make()
        started = time.monotonic()
        error = math.nan if plan is None else each(run(cached, plan, bed.start), reference)
        if plan is not None:
            rows.append({"sampler": name, "grid": grid_name, "calls": calls, **error})
            print(
                f"{bed.name} {plan.name} {plan.nfe}: {error['rms']:.4f} ({time.monotonic() - started:.1f} s)",
                flush=True,
            )
        save()


def each(reached: Tensor, reference: Tensor) -> dict[str, float]:
    """Root mean square error per dimension: over all samples, and of the median sample."""
    off = (reached.double() - reference.double()).square().flatten(1).mean(1)
    return {"rms": float(off.mean().sqrt()), "median": float(off.sqrt().median())}


def rms(a: Tensor, b: Tensor) -> float:
    return each(a, b)["rms"]


def cache(bed: Bed) -> Path:
    """Cache file of the converged solution of a bed, outside the repository."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddim"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"solvers-{bed.name}-{len(bed.start)}.pt"


def quality(bed: Bed, measured: dict[str, Any], save: Callable[[], None], data: str | None) -> None:
    """Energy distance between samples and data: directly for the mixture; for a model in the features of a small
    classifier trained here on the labels."""
    if bed.name != "mixture" and data is None:
        return
    samples = 4000 if bed.name == "mixture" else 256
    features: Callable[[Tensor], Tensor] = lambda x: x  # noqa: E731
    if bed.name == "mixture":
        truth = [digits().sample(samples, seed) for seed in (1, 2)]
    else:
        features, truth, measured["classifier"] = classifier(bed, str(data))
    rows = measured.setdefault("quality", {"samples": samples, "data": energy(*truth), "rows": []})["rows"]
    done = {(row["plan"], row["calls"]) for row in rows}
    start, cached = bed.noise(3, samples), CachedDenoiser(bed.denoise, bed.size, 0)
    tuned = {
        row["calls"]: Plan.from_json(json.dumps(row["rows"])) for row in measured["rows"] if row["sampler"] == "tuned"
    }
    for calls in QUALITY:
        candidates = {
            "ddim": plain(bed, "ddim", "equal-angle", calls),
            "auto": plain(bed, *samplers.recommended(calls, bed.schedule.T), calls),
            "tuned": tuned.get(calls),
        }
        for name, plan in candidates.items():
            if plan is not None and (name, calls) not in done:
                rows.append(
                    {"plan": name, "calls": calls, "energy": energy(features(run(cached, plan, start)), truth[0])}
                )
                print(f"quality of {name} at NFE {calls}: {rows[-1]['energy']:.5f}", flush=True)
                save()


def classifier(bed: Bed, data: str) -> tuple[Callable[[Tensor], Tensor], list[Tensor], dict[str, Any]]:
    """Train a small network for two epochs on labelled images; returns the function to its last hidden layer, the
    features of the test images in two halves, and its test accuracy."""
    from torch import nn

    from ddim.data import load
    from ddim.data.pixels import to_float

    train, test = (load(data, bed.model.config.data, split) for split in ("train", "test"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 16, 5, 2, 2), nn.ReLU(), nn.Conv2d(16, 32, 5, 2, 2), nn.ReLU(), nn.Flatten()]
        body = nn.Sequential(*layers, nn.Linear(32 * 49, 64), nn.ReLU())
        head = nn.Linear(64, 10)
    both = nn.Sequential(body, head)
    optimiser = torch.optim.AdamW(both.parameters(), 2e-3)
    drawn = torch.Generator().manual_seed(0)
    for _ in range(2):
        for indices in torch.randperm(len(train), generator=drawn).split(128):
            x, y = to_float(train.batch(indices.numpy())), torch.as_tensor(train.labels[indices.numpy()]).long()
            optimiser.zero_grad()
            nn.functional.cross_entropy(both(x), y).backward()
            optimiser.step()

    def features(x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([body(part) for part in x.float().clamp(-1, 1).split(500)]).double()

    test_features = features(to_float(test.batch(range(len(test)))))
    correct = head(test_features.float()).argmax(1) == torch.as_tensor(test.labels)
    about = {"test_accuracy": float(correct.double().mean()), "test_pictures": len(test)}
    print(f"{bed.name}: classifier {about}", flush=True)
    return features, [test_features[::2], test_features[1::2]], about


def energy(x: Tensor, y: Tensor) -> float:
    """Energy distance: 2 E|X - Y| - E|X - X'| - E|Y - Y'|, 0 for equal distributions; unbiased."""

    def inner(z: Tensor) -> Tensor:
        return torch.cdist(z, z).sum() / (len(z) * (len(z) - 1))

    return float(2 * torch.cdist(x, y).mean() - inner(x) - inner(y))


def report(results: dict[str, Any]) -> None:
    """The tables of docs/solvers.md."""
    for name, measured in results.items():
        rows = measured["rows"]
        print(f"\n## {name}: RMS error, {measured['samples']} samples\n")
        best: dict[tuple[str, int], dict[str, Any]] = {}
        for row in rows:
            key = (row["sampler"], row["calls"])
            if key not in best or row["rms"] < best[key]["rms"]:
                best[key] = row
        print("| sampler | " + " | ".join(map(str, CALLS)) + " |\n|-|" + "-|" * len(CALLS))
        names = [sampler for sampler in (*SAMPLERS, "tuned") if any(name == sampler for name, _ in best)]
        for sampler in names:
            cells = [best.get((sampler, calls)) for calls in CALLS]
            print(f"| {sampler} | " + " | ".join(cell_of(cell) for cell in cells) + " |")
        print("\nauto, RMS and median error relative to the best plan that is not tuned: " + ", ".join(auto(rows)))
        if "quality" in measured:
            quality_table(measured["quality"])
        for at in (40, 100):
            limit = min(row["rms"] for row in rows if row["sampler"] == "ddim" and row["calls"] == at)
            need = {
                s: min((c for (n, c), row in best.items() if n == s and row["rms"] <= limit), default=None)
                for s in names
            }
            print(
                f"\nNFE for the error of ddim at NFE {at} ({limit:.4f}): "
                + ", ".join(f"{s} {c or 'more than 100'}" for s, c in need.items())
            )


def auto(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """RMS and median error of the recommended plan relative to the best plan, for each NFE."""
    for calls in CALLS:
        here = {
            (row["sampler"], row["grid"]): row for row in rows if row["calls"] == calls and row["sampler"] != "tuned"
        }
        recommended = here.get(samplers.recommended(calls))
        if recommended:
            least = {key: min(row[key] for row in here.values()) for key in ("rms", "median")}
            yield f"{calls}: {recommended['rms'] / least['rms']:.2f} and {recommended['median'] / least['median']:.2f}"


def quality_table(measured: dict[str, Any]) -> None:
    print(
        f"\nenergy distance of {measured['samples']} samples to data (two halves of the data: {measured['data']:.5f})\n"
    )
    print("| plan | " + " | ".join(map(str, CALLS)) + " |\n|-|" + "-|" * len(CALLS))
    energies = {(row["plan"], row["calls"]): row["energy"] for row in measured["rows"]}
    for name in ("ddim", "auto", "tuned"):
        cells = [f"{energies[name, calls]:.5f}" if (name, calls) in energies else "-" for calls in CALLS]
        print(f"| {name} | " + " | ".join(cells) + " |")


def cell_of(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    letter = {"equal-angle": "a", "linear": "l", "quadratic": "q", "log-snr": "s"}.get(row["grid"], "")
    return f"{row['rms']:.4f} {letter}".strip()


def draw(results: dict[str, Any]) -> None:
    """Plot the error against NFE, one panel per bed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(results), figsize=(4.2 * len(results), 3.6), squeeze=False)
    for panel, (name, measured) in zip(panels[0], results.items(), strict=True):
        for sampler in SHOWN:
            points = {}
            for row in measured["rows"]:
                if row["sampler"] == sampler:
                    points[row["calls"]] = min(points.get(row["calls"], math.inf), row["rms"])
            thick = 2.2 if sampler in ("ddim", "tuned") else 1.2
            panel.loglog(sorted(points), [points[c] for c in sorted(points)], "o-", ms=3, lw=thick, label=sampler)
        panel.set_title(name)
        panel.set_xlabel("network evaluations")
        panel.set_xticks([5, 10, 20, 50, 100], labels=["5", "10", "20", "50", "100"])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("RMS error to the converged solution")
    panels[0][-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(FIGURE, dpi=110)
    print(f"figure: {FIGURE.relative_to(ROOT)}")


def ten_calls(measured: dict[str, Any], samples: int = 12) -> None:
    """Draw samples of `mnist` from the same latents: three plans of NFE 10, and the converged solution."""
    from ddim._io.png import labelled_rows, save_png
    from ddim.data.pixels import to_uint8

    bed = Bed("mnist", samples)
    tuned = next(row for row in measured["rows"] if row["sampler"] == "tuned" and row["calls"] == 10)
    plans_shown = {
        "ddim, NFE 10": plain(bed, "ddim", "equal-angle", 10),
        "auto, NFE 10": plain(bed, *samplers.recommended(10), 10),
        "tuned, NFE 10": Plan.from_json(json.dumps(tuned["rows"])),
        "ddim, NFE 100": plain(bed, "ddim", "equal-angle", 100),
        "converged": ReferenceSolution(bed.schedule, REFERENCE).plan,
    }
    cached = CachedDenoiser(bed.denoise, bed.size, 0)
    rows = [(name, to_uint8(run(cached, plan, bed.start))) for name, plan in plans_shown.items() if plan is not None]
    save_png(TEN, labelled_rows(rows, zoom=2))
    print(f"figure: {TEN.relative_to(ROOT)}")


def main(beds: Sequence[str], data: str | None, samples: int, out: Path, report_only: bool) -> None:
    results: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}

    def save() -> None:
        part = out.with_suffix(".part")
        part.write_text(json.dumps(results, indent=1) + "\n")
        part.replace(out)

    for name in () if report_only else beds:
        bed = Bed(name, 512 if name == "mixture" else samples)
        measured = results.setdefault(name, {"samples": len(bed.start)})
        if measured["samples"] != len(bed.start):
            raise SystemExit(f"error: {out}: has {measured['samples']} samples of {name}; use another --out")
        measure(bed, measured, save)
        quality(bed, measured, save, data and str(Path(data) / name.replace("-", "_")))
    report(results)
    draw(results)
    if report_only and "mnist" in results:
        ten_calls(results["mnist"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("beds", nargs="*", default=["mixture"], help="mixture, or bundled models")
    parser.add_argument("--data", help="a folder with mnist/ and fashion_mnist/, for the quality of models")
    parser.add_argument("--samples", type=int, default=24, help="samples of a model; the mixture has 512")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="only print the tables and draw the figures")
    arguments = parser.parse_args()
    main(arguments.beds, arguments.data, arguments.samples, arguments.out, arguments.report)
