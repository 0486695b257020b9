"""The results as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.table import cell

TABLES = (
    ("ceilings", "What the device can do"),
    ("sampling", "Sampling: images per second of whole runs, from noise to images"),
    ("ratios", "Speed-ups"),
    ("latency", "One image"),
    ("parallel", "One image, sampled in parallel over time; bfloat16, not compiled, random weights"),
    ("network", "One network evaluation; FLOPs of convolutions and products, difference from ours in float32"),
    ("components", "Device time of entry network evaluation"),
    ("kernels", "Its longest kernels"),
    ("loop", "Overhead of a step, and the start of a run"),
    ("training", "Training: images per second of whole steps"),
    ("start-up", "Set-up and torch.compile, not included above"),
)


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Rows in aligned columns under their headings, without the spreads."""
    heads = [head for head in dict.fromkeys(key for row in rows for key in row) if not head.startswith("spread of")]
    lines = [heads, *([cell(row.get(head)) for head in heads] for row in rows)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(heads))]
    return ["  ".join(value.ljust(width) for value, width in zip(line, widths)).rstrip() for line in lines]


def side_by_side(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Components of several variants side by side: one row per component, and one for the total."""
    merged: dict[str, dict[str, Any]] = {}
    for row in rows:
        for name in (row["component"], "all"):
            entry = merged.setdefault(name, {"component": name})
            for value in ("ms", "share"):
                key = f"{row['variant']} ({value})"
                entry[key] = entry.get(key, 0.0) + row[value]
    return [*(entry for name, entry in merged.items() if name != "all"), merged["all"]]


def text(results: dict[str, Any]) -> str:
    """The results as text."""
    machine = results["machine"]
    where = machine.get("GPU") or machine["processor"]
    lines = ["", f"== {where}, torch {machine['torch']}, diffusers {machine['diffusers']}, commit {machine['commit']}"]
    lines += [f"torch.compile: {results['compile']}"]
    lines += [f"nvidia-smi {when}: {state}" for when, state in results["nvidia-smi"].items() if state]
    for key, about in TABLES:
        if rows := results.get(key):
            ranked = sorted(rows, key=lambda row: (row["batch"], row["S"])) if key in ("sampling", "ratios") else rows
            lines += ["", f"-- {about}", *table(side_by_side(rows) if key == "components" else ranked)]
    for key in ("left out", "failed"):
        if results[key]:
            lines += ["", f"-- {key}", *(f"  {what}" for what in results[key])]
    return "\n".join([*lines, "", f"{results['seconds spent']:.0f} s of {60 * results['minutes']:.0f}"])
