"""What is printed fits the terminal: tables, progress, colours, and the next command."""

from __future__ import annotations

import io
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ddim._io.terminal import counted, table, wrapped
from ddim.check.finding import at_most, info
from ddim.cli import _progress, check, main
from models import ddim, save_tiny, write_pictures


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("count", [1, 5, 12, 40])
def test_tables_fit_and_have_every_number(count: int, width: int) -> None:
    columns: list[tuple[str, list[float | None]]] = [(f"c{k}", [k + 0.25, None, -k / 8]) for k in range(count)]
    lines = table([("key", ["a", "b", "c"]), *columns], width)
    assert max(map(len, lines)) <= width
    assert len({line.index("a") for line in lines if " a " in line}) == 1 or count < 2
    words = " ".join(lines).split()
    for head, cells in columns:
        assert head in words
        assert all(float(word) in cells for word in words if re.fullmatch(r"-?\d+\.\d+", word) and float(word) in cells)
    assert words.count(".") == count
    assert words.count("key") == words.count("a")


def test_small_numbers_keep_their_digits() -> None:
    [_, cell] = table([("x", [4.04e-5])])
    assert float(cell) == pytest.approx(4.04e-5, abs=1e-6)
    narrow = table([(f"column {k}", [1.2e-7]) for k in range(7)], 80)
    assert all(float(word) == 1.2e-7 for word in narrow[1].split())


def test_wrapped_texts_and_counts() -> None:
    text = "a text of a few words " * 8
    assert " ".join(line.strip() for line in wrapped(text, 40, "  ")).split() == text.split()
    assert all(len(line) <= 40 and line.startswith("  ") for line in wrapped(text, 40, "  "))
    assert (counted(1, "images"), counted(2, "images"), counted(0, "images")) == ("1 image", "2 images", "0 images")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (51, "51 s"), (60, "1:00"), (189, "3:09"), (3600, "1:00:00"), (7389.6, "2:03:10")],
)
def test_durations(seconds: float, text: str) -> None:
    assert _progress.duration(seconds) == text


@pytest.mark.parametrize("rate", ["", "12.3 images/s", "loss 0.3129  12345 images/s"])
def test_progress_is_one_line_of_80_columns(rate: str) -> None:
    with _progress.progress_bar(transient=True) as bar:
        task = bar.add_task("20 network evaluations each", total=800_000, rate=rate)
        bar.update(task, completed=1000, left=3 * 3600.0)
        bar.tasks[0].start_time = (bar.tasks[0].start_time or 0.0) - 51
        console = Console(width=80, record=True, file=io.StringIO())
        console.print(bar.get_renderable())
    lines = console.export_text().rstrip("\n").splitlines()
    assert len(lines) == 1
    assert len(lines[0]) <= 80
    assert lines[0].rstrip().endswith("51 s, 3:00:00 left")


def test_findings_fit_the_width_and_have_colours() -> None:
    results = [
        ("part", at_most("good", 1.0, 2.0, "a note " * 20)),
        ("part", at_most("bad", 3.0, 2.0)),
        ("part", info("x", 1)),
    ]
    text = check._as_table(["part"], results, 80)
    plain = re.sub(r"\x1b\[\d+m", "", text)
    assert max(map(len, plain.splitlines())) <= 80
    assert plain.splitlines() == [line.rstrip() for line in plain.splitlines()]
    assert "\x1b[32mpass\x1b[0m" in text
    assert "\x1b[31mFAIL\x1b[0m" in text


@pytest.mark.parametrize(
    ("environment", "colours"),
    [({}, None), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, None), ({"TERM": "dumb"}, False)],
)
def test_no_color_is_respected(
    environment: dict[str, str], colours: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    passed: dict[str, Any] = {}
    monkeypatch.setattr(main.cli, "main", lambda **options: passed.update(options) or 0)
    assert ddim("info", "mnist") == 0
    assert passed["color"] is colours


def next_command(err: str) -> list[str]:
    """The words after `ddim` of the command that was suggested."""
    [line] = [line for line in err.splitlines() if line.startswith("next: ddim ")]
    return shlex.split(line)[2:]


def test_the_suggested_commands_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "a model")
    image = write_pictures(tmp_path / "images", 1)[0]
    assert ddim("encode", "a model", image, "--steps", 3, "--out", "z.safetensors") == 0
    assert ddim(*next_command(capsys.readouterr().err)) == 0
    assert Path("z-decoded.png").is_file()
    assert ddim("convert", "a model", "--out", "copy") == 0
    words = next_command(capsys.readouterr().err)
    assert ddim(*words, "-n", 2, "--steps", 2) == 0
    assert Path("copy.png").is_file()
