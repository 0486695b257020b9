"""The results as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.table import cell

TABLES = (
    ("ceilings", "What the device can do"),
    ("sampling", "Sampling: images a second of whole runs, from the noise to the pictures"),
    ("ratios", "How many times as fast"),
    ("latency", "One picture"),
    ("parallel", "One picture, run in parallel over time; bfloat16, not compiled, random weights"),
    ("network", "One network evaluation; FLOPs of convolutions and products, difference from our float32"),
    ("components", "Device time of one network evaluation"),
    ("kernels", "Its longest kernels"),
    ("loop", "A step beside the network, and the start of a run"),
    ("training", "Training: images a second of whole steps"),
    ("start-up", "Set-up and torch.compile, in no figure above"),
)


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Rows under their heads, in columns; spreads are left to the file."""
    heads = [head for head in dict.fromkeys(key for row in rows for key in row) if not head.startswith("spread of")]
    lines = [heads, *([cell(row.get(head)) for head in heads] for row in rows)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(heads))]
    return ["  ".join(value.ljust(width) for value, width in zip(line, widths)).rstrip() for line in lines]


def beside(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Components of several variants, one row for each component and one for all."""
    made: dict[str, dict[str, Any]] = {}
    for row in rows:
        for name in (row["component"], "all"):
            one = made.setdefault(name, {"component": name})
            for value in ("ms", "share"):
                key = f"{row['variant']} ({value})"
                one[key] = one.get(key, 0.0) + row[value]
    return [*(one for name, one in made.items() if name != "all"), made["all"]]


def text(results: dict[str, Any]) -> str:
    """All of it."""
    machine = results["machine"]
    where = machine.get("GPU") or machine["processor"]
    lines = ["", f"== {where}, torch {machine['torch']}, diffusers {machine['diffusers']}, commit {machine['commit']}"]
    lines += [f"torch.compile: {results['compile']}"]
    lines += [f"nvidia-smi {when}: {said}" for when, said in results["nvidia-smi"].items() if said]
    for key, about in TABLES:
        if rows := results.get(key):
            ranked = sorted(rows, key=lambda row: (row["batch"], row["S"])) if key in ("sampling", "ratios") else rows
            lines += ["", f"-- {about}", *table(beside(rows) if key == "components" else ranked)]
    for key in ("left out", "failed"):
        if results[key]:
            lines += ["", f"-- {key}", *(f"  {what}" for what in results[key])]
    return "\n".join([*lines, "", f"{results['seconds spent']:.0f} s of {60 * results['minutes']:.0f}"])
