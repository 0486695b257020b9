"""How near every deterministic plan comes to the converged solution, and how good its samples are: docs/solvers.md.

    python scripts/solvers.py mixture mnist fashion-mnist     # measures what is not in docs/results/solvers.json yet
    python scripts/solvers.py --report                        # the tables and the picture of what is there

A bed is `mixture`, ten Gaussians fitted to scikit-learn's 8x8 digits with the exact denoiser, in float64, or a bundled
model, in float32. The error is the root mean square difference per dimension from the converged solution of the same
x_T, and quality the energy distance of a bed's samples to data. Stopped at any moment, it goes on where it was.
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
PICTURE = ROOT / "docs" / "images" / "solvers.png"
CALLS = (5, 6, 8, 10, 12, 15, 20, 30, 40, 50, 100)
TUNED = {"mixture": (5, 6, 8, 10, 12, 15, 20), "mnist": (5, 8, 10, 15), "fashion-mnist": (10, 15)}
GRIDS = ("equal-angle", "linear", "quadratic", "log-snr")
SAMPLERS = tuple(name for name in samplers.SAMPLERS if name not in ("rk4", "probability-flow"))
# On models, where each costs minutes: at least one of each family.
FEWER = ("ddim", "ipndm4", "unipc3", "ab3-v", "dpm++2m", "unipc2", "deis3", "ipndm3", "ab2-v", "heun", "ab2", "ab3")
FEWEST = ("ddim", "ipndm3", "ipndm4", "unipc3")
SHOWN = ("ddim", "heun", "dpm++2m", "unipc3", "ab3-v", "ipndm4", "tuned")
QUALITY = (5, 8, 10, 15, 20, 50)
REFERENCE = 300
PILOTS = 128


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
        """x_T of the first n samples of a seed; tuning's pilots have another one."""
        if self.name == "mixture":
            return ddim.Noise(seed, tuple(range(n)), (64,)).start().double()
        return self.model.noise(n, seed).start()

    def converged(self, nodes: int) -> Tensor:
        """The solution by so many calls, even in log-SNR down to t = 1."""
        teacher = ReferenceSolution(self.schedule, nodes)
        return run(CachedDenoiser(self.denoise, self.size, 0), teacher.plan, self.start)


def digits() -> MixtureData:
    """Ten Gaussians, of the mean and covariance of each class of scikit-learn's digits in [-1, 1]."""
    from sklearn.datasets import load_digits

    found = load_digits()
    data = torch.tensor(found.data / 8 - 1, dtype=torch.float64)
    classes = [data[torch.tensor(found.target == label)] for label in range(10)]
    wide = 1e-3 * torch.eye(64, dtype=torch.float64)
    covariances = torch.stack([torch.cov(one.T) + wide for one in classes])
    weights = torch.tensor([len(one) for one in classes], dtype=torch.float64) / len(data)
    return MixtureData(weights, torch.stack([one.mean(0) for one in classes]), covariances)


def plans(bed: Bed) -> Iterator[tuple[str, str, int, Callable[[], Plan | None]]]:
    """Sampler, grid, calls, and how the plan is made; None where the grid or the sampler has no plan of so many."""
    for name in {"mixture": SAMPLERS, "mnist": FEWER}.get(bed.name, FEWEST):
        for grid_name in GRIDS:
            for calls in CALLS:
                if name != "ddim" and (calls == 40 or (calls == 100 and bed.name != "mixture")):
                    continue
                if bed.name == "fashion-mnist" and calls not in (*QUALITY, 40, 100):
                    continue
                yield name, grid_name, calls, lambda n=name, g=grid_name, c=calls: plain(bed, n, g, c)


def plain(bed: Bed, name: str, grid_name: str, calls: int) -> Plan | None:
    steps = (calls + 1) // 2 if name == "heun" else calls  # its last step, to clean data, is one call
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ddim.DdimWarning)
        times = timesteps.tau(bed.schedule, grid_name, steps)
    plan = samplers.named(name, bed.schedule.levels([*reversed(times), 0.0]), bed.schedule)
    return plan if plan.nfe in (calls, calls - 1 if name == "heun" else calls) else None


def measure(bed: Bed, found: dict[str, Any], save: Callable[[], None]) -> None:
    """Measure what is missing of a bed."""
    if "reference" not in found:
        reference, coarser = bed.converged(REFERENCE), bed.converged(REFERENCE // 2)
        found["reference"] = {"calls": REFERENCE, "half_differs_by": rms(reference, coarser)}
        torch.save(reference, cache(bed))
        save()
    if not cache(bed).exists():
        torch.save(bed.converged(REFERENCE), cache(bed))
    reference = torch.load(cache(bed), weights_only=True)
    rows = found.setdefault("rows", [])
    done = {(row["sampler"], row["grid"], row["calls"]) for row in rows}
    memo = CachedDenoiser(bed.denoise, bed.size)
    for calls in TUNED[bed.name]:
        if ("tuned", "", calls) in done:
            continue
        begun = time.monotonic()
        calibration_samples = bed.noise(2**63, PILOTS)
        result = None
        for step in iter_tuning(bed.denoise, bed.schedule, calls, calibration_samples, size=bed.size):
            result = step.found or result
        assert result is not None
        seconds = time.monotonic() - begun
        error = each(run(memo, result.plan, bed.start), reference)
        kept = {"plan": result.plan.name, "rows": json.loads(result.plan.to_json())}
        rows.append({"sampler": "tuned", "grid": "", "calls": calls, **error, "seconds": seconds, **kept})
        print(f"{bed.name} {result.plan.name}: {error['rms']:.4f} ({seconds:.0f} s)", flush=True)
        save()
    for name, grid_name, calls, make in plans(bed):
        if (name, grid_name, calls) in done:
            continue
        plan = make()
        begun = time.monotonic()
        error = math.nan if plan is None else each(run(memo, plan, bed.start), reference)
        if plan is not None:
            rows.append({"sampler": name, "grid": grid_name, "calls": calls, **error})
            print(
                f"{bed.name} {plan.name} {plan.nfe}: {error['rms']:.4f} ({time.monotonic() - begun:.1f} s)",
                flush=True,
            )
        save()


def each(reached: Tensor, reference: Tensor) -> dict[str, float]:
    """Root mean square error per dimension: over all samples, and the median sample's."""
    off = (reached.double() - reference.double()).square().flatten(1).mean(1)
    return {"rms": float(off.mean().sqrt()), "median": float(off.sqrt().median())}


def rms(a: Tensor, b: Tensor) -> float:
    return each(a, b)["rms"]


def cache(bed: Bed) -> Path:
    """Where the converged solution of a bed is kept from one run to the next; not part of the repository."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddim"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"solvers-{bed.name}-{len(bed.start)}.pt"


def quality(bed: Bed, found: dict[str, Any], save: Callable[[], None], data: str | None) -> None:
    """The energy distance between a plan's samples and data: of the mixture as it is, of a model in the features of a
    small classifier trained here on the data's labels."""
    if bed.name != "mixture" and data is None:
        return
    samples = 4000 if bed.name == "mixture" else 256
    seen: Callable[[Tensor], Tensor] = lambda x: x  # noqa: E731
    if bed.name == "mixture":
        truth = [digits().sample(samples, seed) for seed in (1, 2)]
    else:
        seen, truth, found["classifier"] = classifier(bed, str(data))
    rows = found.setdefault("quality", {"samples": samples, "data": energy(*truth), "rows": []})["rows"]
    done = {(row["plan"], row["calls"]) for row in rows}
    start, memo = bed.noise(3, samples), CachedDenoiser(bed.denoise, bed.size, 0)
    kept = {row["calls"]: Plan.from_json(json.dumps(row["rows"])) for row in found["rows"] if row["sampler"] == "tuned"}
    for calls in QUALITY:
        made = {
            "ddim": plain(bed, "ddim", "equal-angle", calls),
            "auto": plain(bed, *samplers.recommended(calls, bed.schedule.T), calls),
            "tuned": kept.get(calls),
        }
        for name, plan in made.items():
            if plan is not None and (name, calls) not in done:
                rows.append({"plan": name, "calls": calls, "energy": energy(seen(run(memo, plan, start)), truth[0])})
                print(f"quality of {name} at {calls} calls: {rows[-1]['energy']:.5f}", flush=True)
                save()


def classifier(bed: Bed, data: str) -> tuple[Callable[[Tensor], Tensor], list[Tensor], dict[str, Any]]:
    """A small network trained for two epochs on labelled pictures: its last hidden layer, that of the test pictures in
    two halves, and how well it knows them."""
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
        for some in torch.randperm(len(train), generator=drawn).split(128):
            x, y = to_float(train.batch(some.numpy())), torch.as_tensor(train.labels[some.numpy()]).long()
            optimiser.zero_grad()
            nn.functional.cross_entropy(both(x), y).backward()
            optimiser.step()

    def features(x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([body(part) for part in x.float().clamp(-1, 1).split(500)]).double()

    known = features(to_float(test.batch(range(len(test)))))
    right = head(known.float()).argmax(1) == torch.as_tensor(test.labels)
    about = {"test_accuracy": float(right.double().mean()), "test_pictures": len(test)}
    print(f"{bed.name}: classifier {about}", flush=True)
    return features, [known[::2], known[1::2]], about


def energy(x: Tensor, y: Tensor) -> float:
    """Energy distance: 2 E|X - Y| - E|X - X'| - E|Y - Y'|, 0 where both have the same distribution; unbiased."""

    def inner(z: Tensor) -> Tensor:
        return torch.cdist(z, z).sum() / (len(z) * (len(z) - 1))

    return float(2 * torch.cdist(x, y).mean() - inner(x) - inner(y))


def report(results: dict[str, Any]) -> None:
    """The tables of docs/solvers.md."""
    for name, found in results.items():
        rows = found["rows"]
        print(f"\n## {name}: RMS error, {found['samples']} samples\n")
        best: dict[tuple[str, int], dict[str, Any]] = {}
        for row in rows:
            key = (row["sampler"], row["calls"])
            if key not in best or row["rms"] < best[key]["rms"]:
                best[key] = row
        print("| sampler | " + " | ".join(map(str, CALLS)) + " |\n|-|" + "-|" * len(CALLS))
        known = [sampler for sampler in (*SAMPLERS, "tuned") if any(name == sampler for name, _ in best)]
        for sampler in known:
            cells = [best.get((sampler, calls)) for calls in CALLS]
            print(f"| {sampler} | " + " | ".join(cell_of(cell) for cell in cells) + " |")
        print(
            "\nauto, its error and its median against the smallest of any plan that is not tuned: "
            + ", ".join(auto(rows))
        )
        if "quality" in found:
            quality_table(found["quality"])
        for at in (40, 100):
            limit = min(row["rms"] for row in rows if row["sampler"] == "ddim" and row["calls"] == at)
            need = {
                s: min((c for (n, c), row in best.items() if n == s and row["rms"] <= limit), default=None)
                for s in known
            }
            print(
                f"\ncalls for the error of ddim at {at} ({limit:.4f}): "
                + ", ".join(f"{s} {c or 'more than 100'}" for s, c in need.items())
            )


def auto(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """At each number of calls, by which factors the recommended plan is farther than the nearest there."""
    for calls in CALLS:
        here = {
            (row["sampler"], row["grid"]): row for row in rows if row["calls"] == calls and row["sampler"] != "tuned"
        }
        own = here.get(samplers.recommended(calls))
        if own:
            least = {key: min(row[key] for row in here.values()) for key in ("rms", "median")}
            yield f"{calls}: {own['rms'] / least['rms']:.2f} and {own['median'] / least['median']:.2f}"


def quality_table(found: dict[str, Any]) -> None:
    print(f"\nenergy distance of {found['samples']} samples to data (two halves of the data: {found['data']:.5f})\n")
    print("| plan | " + " | ".join(map(str, CALLS)) + " |\n|-|" + "-|" * len(CALLS))
    known = {(row["plan"], row["calls"]): row["energy"] for row in found["rows"]}
    for name in ("ddim", "auto", "tuned"):
        cells = [f"{known[name, calls]:.5f}" if (name, calls) in known else "-" for calls in CALLS]
        print(f"| {name} | " + " | ".join(cells) + " |")


def cell_of(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    letter = {"equal-angle": "a", "linear": "l", "quadratic": "q", "log-snr": "s"}.get(row["grid"], "")
    return f"{row['rms']:.4f} {letter}".strip()


def draw(results: dict[str, Any]) -> None:
    """Error against calls, a panel for each bed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(results), figsize=(4.2 * len(results), 3.6), squeeze=False)
    for panel, (name, found) in zip(panels[0], results.items(), strict=True):
        for sampler in SHOWN:
            points = {}
            for row in found["rows"]:
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
    figure.savefig(PICTURE, dpi=110)
    print(f"picture: {PICTURE.relative_to(ROOT)}")


def ten_calls(found: dict[str, Any], samples: int = 12) -> None:
    """The same latents of `mnist` in ten calls by three plans, beside what they converge to."""
    from ddim._io.png import labelled_rows, save_png
    from ddim.data.pixels import to_uint8

    bed = Bed("mnist", samples)
    tuned = next(row for row in found["rows"] if row["sampler"] == "tuned" and row["calls"] == 10)
    made = {
        "ddim, 10 calls": plain(bed, "ddim", "equal-angle", 10),
        "auto, 10 calls": plain(bed, *samplers.recommended(10), 10),
        "tuned, 10 calls": Plan.from_json(json.dumps(tuned["rows"])),
        "ddim, 100 calls": plain(bed, "ddim", "equal-angle", 100),
        "converged": ReferenceSolution(bed.schedule, REFERENCE).plan,
    }
    memo = CachedDenoiser(bed.denoise, bed.size, 0)
    rows = [(name, to_uint8(run(memo, plan, bed.start))) for name, plan in made.items() if plan is not None]
    save_png(TEN, labelled_rows(rows, zoom=2))
    print(f"picture: {TEN.relative_to(ROOT)}")


def main(beds: Sequence[str], data: str | None, samples: int, out: Path, report_only: bool) -> None:
    results: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}

    def save() -> None:
        part = out.with_suffix(".part")
        part.write_text(json.dumps(results, indent=1) + "\n")
        part.replace(out)

    for name in () if report_only else beds:
        bed = Bed(name, 512 if name == "mixture" else samples)
        found = results.setdefault(name, {"samples": len(bed.start)})
        if found["samples"] != len(bed.start):
            raise SystemExit(f"error: {out}: holds {found['samples']} samples of {name}; give --out another file")
        measure(bed, found, save)
        quality(bed, found, save, data and str(Path(data) / name.replace("-", "_")))
    report(results)
    draw(results)
    if report_only and "mnist" in results:
        ten_calls(results["mnist"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("beds", nargs="*", default=["mixture"], help="mixture, or bundled models")
    parser.add_argument("--data", help="a folder with mnist/ and fashion_mnist/, for the quality of models")
    parser.add_argument("--samples", type=int, default=24, help="of a model; the mixture has 512")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="only the tables and the picture of what is there")
    given = parser.parse_args()
    main(given.beds, given.data, given.samples, given.out, given.report)
