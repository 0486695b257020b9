"""`main` turns exceptions into one line and an exit code; a bug keeps its traceback."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import click
import pytest
import torch

from ddim.cli import main as cli_main
from ddim.errors import DdimError
from models import ddim, process


def allocate() -> None:
    torch.empty(1 << 60)


def overflow_storage() -> None:
    torch.empty(1 << 62, 1 << 10)


def meta() -> None:
    torch.zeros(1, device="meta").cpu()


def encode() -> None:
    "\ud800".encode()


def recurse() -> None:
    recurse()


RAISED = {
    "memory": MemoryError("x"),
    "allocation": allocate,
    "storage": overflow_storage,
    "CUDA": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    "device": RuntimeError("CUDA error: no kernel image is available"),
    "meta": meta,
    "recursion": recurse,
    "overflow": OverflowError("int too large to convert to float"),
    "unicode": encode,
    "file name as bytes": OSError(errno.ENOSPC, "No space left on device", b"/x/\xff"),
    "no file name": OSError("odd"),
    "DdimError": DdimError("x\x1b]0;y\x07" * 2000, "z\n" * 3000, "w"),
    "usage": click.UsageError("v" * 5000),
}


@pytest.mark.parametrize("name", RAISED)
def test_errors_of_size_device_and_input_print_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = RAISED[name]

    def command(**_: object) -> None:
        if isinstance(case, BaseException):
            raise case
        case()

    monkeypatch.setattr(cli_main.cli, "main", command)
    assert ddim() == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert len(line) < 1600
    assert line.isprintable()
    assert "b'" not in line


@pytest.mark.parametrize("bug", [RuntimeError("shape mismatch"), KeyError("x"), ZeroDivisionError("x"), TypeError("x")])
def test_a_bug_keeps_its_traceback(bug: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def command(**_: object) -> None:
        raise bug

    monkeypatch.setattr(cli_main.cli, "main", command)
    with pytest.raises(type(bug)):
        cli_main.main([])


def test_a_thread_that_fails_prints_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def command(**_: object) -> None:
        thread = threading.Thread(target=fail, name="writer")
        thread.start()
        thread.join()

    before = threading.excepthook
    monkeypatch.setattr(cli_main.cli, "main", command)
    try:
        assert ddim() == 0
    finally:
        threading.excepthook = before
    [line] = capsys.readouterr().err.splitlines()
    assert "writer" in line


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_to_a_full_device_exits_with_2(stream: str) -> None:
    arguments, env = process(*(["--version"] if stream == "stdout" else ["train"]))
    with open("/dev/full", "w") as full:
        streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} | {stream: full}
        assert subprocess.run(arguments, env=env | {"PYTHONUNBUFFERED": ""}, check=False, **streams).returncode == 2


def test_a_closed_output_pipe_exits_without_a_traceback(tmp_path: Path) -> None:
    arguments, env = process("--help")
    script = 'set -o pipefail; "$@" | true'
    code = subprocess.run(["bash", "-c", script, "bash", *arguments], env=env, check=False, capture_output=True)
    assert code.returncode in (0, 1)
    assert b"Traceback" not in code.stderr
    assert sys.executable in arguments[0]
