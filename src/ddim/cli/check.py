"""`ddim check`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddim.cli._command import json_value
from ddim.cli._datasets import fit_option, refit
from ddim.cli._options import load_model
from ddim.cli._progress import counted, progress_bar
from ddim.cli._ranges import COUNT
from ddim.errors import DdimError, shorten

if TYPE_CHECKING:
    from ddim.check import Finding
    from ddim.plan.plan import Plan
    from ddim.process.schedule import Schedule

    Sections = list[tuple[str, Iterator[Finding]]]

LIMIT = 64
ZERO = "+zero-terminal-snr"


@click.command("check")
@click.argument("what")
@click.option("--data", help="Check a model on these images: a data set or one file. [default: its own samples]")
@click.option("--split", help="Split of the data: train or test.")
@click.option("--limit", type=COUNT, help=f"Maximum number of images. [default: {LIMIT}]")
@click.option("--quick", is_flag=True, help="Check a model with fewer samples, timesteps and steps.")
@click.option("--device", help="Device for a model: cpu, cuda, ... [default: a GPU if there is one]")
@fit_option
@click.option("--schedule", "on", help="Check that a plan's levels come from this model or schedule.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def command(what: str, on: str | None, as_json: bool, **settings: Any) -> None:
    """Verify WHAT: a model, a plan file (.json) or a schedule (linear, cosine, ..., or a .json file).

    A schedule file holds a list of betas, or the `schedule` part of a model's config.json. Exit codes: 0, all checks
    pass; 1, a check fails, marked FAIL; 2, bad input. The checks cannot detect timesteps that are off by one, and a
    network with a wrong schedule may pass.

    \b
    Examples:
      ddim check mnist
      ddim check runs/mine --data ./photos --split test
      ddim plan mnist --steps 10 --json > plan.json && ddim check plan.json --schedule mnist
      ddim check cosine
    """
    results: list[tuple[str, Finding]] = []
    sections = _sections(what, on, settings)
    with progress_bar(transient=True) as bar:
        task = bar.add_task("checks", total=None, rate="")
        for title, findings in sections:
            for finding in findings:
                results.append((title, finding))
                bar.update(task, advance=1, rate=finding.name)
    click.echo(_as_json(what, results) if as_json else _as_table([title for title, _ in sections], results))
    if not all(finding.passed for _, finding in results):
        raise SystemExit(1)


def _sections(what: str, on: str | None, settings: dict[str, Any]) -> Sections:
    """The checks to run, each part with its title; all input is read here."""
    from ddim import check
    from ddim.plan.plan import Plan

    part = _read(what)
    if on is not None and not isinstance(part, Plan):
        raise DdimError("--schedule", "applies to plans only", "leave it out")
    if isinstance(part, str):
        return _model(part, settings)
    for name, value in settings.items():
        if value:
            raise DdimError(f"--{name}", "applies to models only", f"leave it out for {what}")
    if isinstance(part, Plan):
        return [(f"plan {Path(what).name}", check.plan(part, None if on is None else _schedule(on)))]
    return [(f"schedule {part.name}, T = {part.T}", check.schedule(part))]


def _model(name: str, settings: dict[str, Any]) -> Sections:
    from ddim import check

    data = settings["data"]
    for option in ("split", "limit", "fit"):
        if settings[option] is not None and data is None:
            raise DdimError(f"--{option}", "needs --data", "leave it out, or add --data")
    model = load_model(name, settings["device"], "float32", False)
    images = None
    if data is not None:
        from ddim.cli._inputs import read_images

        limit = LIMIT if settings["limit"] is None else settings["limit"]
        images, _ = read_images((data,), refit(model.policy, settings["fit"]), settings["split"], limit)
    schedule = model.schedule
    on = "its own samples" if images is None else f"{Path(data).name}, {counted(len(images), 'images')}"
    title = f"model {Path(name).name}, predicts {model.config.predicts}, on {on}"
    return [
        (f"schedule {schedule.name}, T = {schedule.T}", check.schedule(schedule)),
        (title, check.model(model, images, settings["quick"])),
    ]


def _read(what: str) -> Plan | Schedule | str:
    """The plan or schedule that `what` names, or the name of a model unchanged."""
    from ddim.model.checkpoint import bundled
    from ddim.process import schedule

    path = Path(what)
    if path.is_file():
        return _file(path)
    if path.is_dir() or what in bundled():
        return what
    if what.removesuffix(ZERO) in schedule.NAMED:
        named = schedule.NAMED[what.removesuffix(ZERO)]()
        return schedule.zero_terminal_snr(named) if what.endswith(ZERO) else named
    if path.suffix or len(path.parts) > 1:
        raise DdimError(what, "does not exist", "use a model folder, a plan file or a schedule file")
    names = f"a model ({', '.join(bundled())}, or a folder), a .json file or a schedule ({', '.join(schedule.NAMED)})"
    raise DdimError(what, "is not a model, plan or schedule", f"use {names}")


def _file(path: Path) -> Plan | Schedule:
    """The plan, unchecked, or the schedule in a file."""
    from ddim._io.reading import list_of, parse_json, read_bytes
    from ddim.model.config import ScheduleConfig, parse
    from ddim.plan.plan import Plan
    from ddim.plan.serialization import FORMAT
    from ddim.process.schedule import from_betas

    text = read_bytes(path)
    body = parse_json(text, path, "use a model folder, a plan of `ddim plan --json`, or a schedule file")
    if isinstance(body, list):
        return from_betas(list_of(body, float, "the list", path, "use the betas of a schedule"), path.stem)
    kind = body.get("format") if isinstance(body, dict) else None
    if kind == FORMAT:
        return Plan.from_json(text.decode(), str(path), checked=False)
    if kind is not None or not isinstance(body, dict) or not body.keys() & {"name", "betas"}:
        problem = f"is a {shorten(kind)} file" if isinstance(kind, str) else "is neither a plan nor a schedule"
        raise DdimError(path, problem, "use a model folder, a plan file, or a schedule: a list of betas")
    return parse(ScheduleConfig, text, path).build()


def _schedule(name: str) -> Schedule:
    """The schedule of a model, or a schedule by name or file."""
    from ddim.model.checkpoint import read
    from ddim.plan.plan import Plan

    part = _read(name)
    if isinstance(part, Plan):
        raise DdimError(f"--schedule {name}", "is a plan", "use a model or a schedule")
    return read(part)[0].schedule.build() if isinstance(part, str) else part


def _as_json(what: str, results: list[tuple[str, Finding]]) -> str:
    rows = [
        {
            "part": title,
            "name": finding.name,
            "measured": json_value(finding.measured),
            "limit": finding.limit,
            "result": finding.result,
            "note": finding.note,
        }
        for title, finding in results
    ]
    return json.dumps(
        {"what": what, "passed": all(finding.passed for _, finding in results), "findings": rows}, indent=1
    )


def _as_table(titles: list[str], results: list[tuple[str, Finding]]) -> str:
    head = ("", "measured", "limit", "result", "")
    cells = [
        (title_of_row, (finding.name, finding.value, finding.limit, finding.result, finding.note))
        for title_of_row, finding in results
    ]
    widths = [max(len(row[column]) for row in (head, *(row for _, row in cells))) for column in range(4)]

    def line(name: str, value: str, limit: str, result: str, note: str) -> str:
        start = f"  {name:{widths[0]}}  {value:>{widths[1]}}  {limit:{widths[2]}}  {result:{widths[3]}}"
        return f"{start}  {note}".rstrip()

    lines = [line(*head)]
    for title in titles:
        lines += [title, *(line(*row) for title_of_row, row in cells if title_of_row == title)]
    outcomes = [finding.result for _, finding in results]
    return "\n".join(
        [*lines, ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in ("pass", "FAIL", "info"))]
    )
