"""The checksum that every file of ours holds of itself, so that one flipped bit or a cut is noticed when it is read.

- A JSON file: its last entry, "checksum", is the SHA-256 of all before it, white space left out.
- A safetensors file with JSON in its metadata: that JSON's last entry, "checksum", is the SHA-256 of the whole file as
  it would be with 64 zeros in its place.
- A line of a journal: its last entry, "checksum", is the beginning of the SHA-256 of the line without it.

A file without the entry is one of a version of this library that wrote none, and is read as it is.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ddim._io.atomic import write_atomic
from ddim._io.reading import AGAIN, JSON_BYTES, TEXT_BYTES, of_kind, parse_json, read_bytes
from ddim.errors import DdimError, warn

T = TypeVar("T")
KEY = "checksum"
PROBLEM = "is damaged: its checksum does not match"
_ZEROS = "0" * 64
_SHORT = 8
_PLACE = rb"\"" + KEY.encode() + rb"\": \""  # of it in the header of a safetensors file
_SPACE = rb"[ \t\r\n]"
_LAST = re.compile(rb',(?P<before>%b*)"(?P<key>[^"]*)"%b*:%b*"(?P<sum>[0-9a-f]{64}|)"%b*\}%b*\Z' % ((_SPACE,) * 5))
_LAST_OF_LINE = re.compile(r', "(?P<key>[^"]*)": "(?P<sum>[^"]{8})"\}\Z')


def seal(text: str) -> bytes:
    """The text of a JSON object that is not empty, with its checksum as the last entry."""
    body = text.rstrip()
    indent = re.match(r"\{(\s*)", body)
    space = indent[1] if indent else ""
    end = body[:-1]
    inner, after = end.rstrip(), end[len(end.rstrip()) :]
    value = _digest(body.encode())
    return f'{inner},{space or " "}"{KEY}": "{value}"{after}}}{text[len(body) :]}'.encode()


def unseal(data: bytes, path: Path | str) -> bytes:
    """The JSON object without its checksum, which must match; as it is where it has none.

    Raises:
        DdimError: If it is not what was written.
    """
    hint = f'copy it again, or, if you changed it on purpose, set its "{KEY}" to ""'
    found = _LAST.search(data)
    if found is not None and found["key"] == KEY.encode():
        rest = data[: found.start()] + b"}"
        if found["sum"] and found["sum"].decode() != _digest(rest):
            raise DdimError(path, PROBLEM, hint)
        return rest
    there = _object(data) if KEY.encode() in data else {}
    if there.get(KEY) == "":  # not the last entry, by hand
        return json.dumps({key: value for key, value in there.items() if key != KEY}).encode()
    if KEY in there or (found is not None and _nearly_key(found["key"].decode("latin-1"))):
        raise DdimError(path, PROBLEM, hint)
    return data


def read_sealed(path: Path, most: int = JSON_BYTES, hint: str = "check the path") -> bytes:
    """The JSON object of a file without its checksum, which must match.

    Args:
        path: The file.
        most: The largest size in bytes.
        hint: How to fix a missing file.

    Raises:
        DdimError: As `ddim._io.reading.read_bytes` and `unseal`.
    """
    return unseal(read_bytes(path, most, hint), path)


def read_sealed_json(path: Path, kind: type[T], hint: str = "check the path", again: str = AGAIN) -> T:
    """What a JSON file with a checksum holds, as `ddim._io.reading.read_json`.

    Raises:
        DdimError: As `ddim._io.reading.read_json` and `unseal`.
    """
    return of_kind(parse_json(read_sealed(path, JSON_BYTES, hint), path, again), kind, path, again)


def _nearly_key(key: str) -> bool:
    """Whether it may be the word "checksum" with a flipped bit."""
    return len(key) == len(KEY) and sum(a != b for a, b in zip(key, KEY, strict=True)) == 1


def _object(data: bytes) -> dict[str, Any]:
    """The JSON object, or an empty one if it is none."""
    try:
        there = parse_json(data, "")
    except DdimError:
        return {}
    return there if isinstance(there, dict) else {}


def _digest(data: bytes) -> str:
    return hashlib.sha256(re.sub(_SPACE + b"+", b"", data)).hexdigest()


def write_json(path: Path, what: Mapping[str, Any]) -> None:
    """Write a JSON object that is not empty, with its checksum, atomically.

    Raises:
        DdimError: If it cannot be written.
    """
    write_atomic(path, seal(json.dumps(what, indent=1) + "\n"))


def tensors_metadata(what: Mapping[str, Any]) -> str:
    """JSON for the metadata of a safetensors file, with the place for the checksum that `seal_tensors` fills in."""
    return json.dumps({**what, KEY: _ZEROS})


def seal_tensors(data: bytes) -> bytes:
    """The bytes of a safetensors file that has `tensors_metadata`, with its checksum."""
    size = int.from_bytes(data[:8], "little")
    place = data.index(_PLACE + _ZEROS.encode(), 8, 8 + size) + len(_PLACE)
    view = memoryview(data)
    value = hashlib.sha256(data).hexdigest().encode()
    return b"".join((view[:place], value, view[place + len(value) :]))


def unseal_tensors(path: Path, what: dict[str, Any]) -> dict[str, Any]:
    """The metadata of a safetensors file without the file's checksum, which must match.

    Args:
        path: The file.
        what: The JSON of its metadata.

    Raises:
        DdimError: If the file is not what was written.
    """
    hint = "copy it again, or write it again"
    last = next(reversed(what), "")
    value = what.get(last)
    if last != KEY:
        if KEY in what or _nearly_key(last):
            raise DdimError(path, PROBLEM, hint)
        return what
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        size = file.read(8)
        digest.update(size)
        header = file.read(int.from_bytes(size, "little"))
        digest.update(header.replace(_PLACE + str(value).encode(), _PLACE + _ZEROS.encode(), 1))
        while part := file.read(1 << 20):
            digest.update(part)
    if digest.hexdigest() != value:
        raise DdimError(path, PROBLEM, hint)
    return {key: each for key, each in what.items() if key != KEY}


def journal_line(what: Mapping[str, Any]) -> bytes:
    """A line of a journal, with its checksum."""
    text = json.dumps(what)
    return f'{text[:-1]}, "{KEY}": "{_digest(text.encode())[:_SHORT]}"}}\n'.encode()


def read_line(text: str, sealed: bool) -> tuple[Any, bool]:
    """The JSON of a line of a journal, and whether it has a checksum.

    Args:
        text: The line.
        sealed: Whether it must have one.

    Raises:
        ValueError: If it is torn or damaged.
    """
    text.encode()  # fails where it was not UTF-8
    found = _LAST_OF_LINE.search(text.removesuffix("\n"))
    if found is not None and found["key"] != KEY and not _nearly_key(found["key"]):
        found = None
    if not text.endswith("\n") or (found is None and sealed):
        raise ValueError("it is torn or damaged")
    if found is None:
        return parse_json(text, "a line"), False
    rest = text[: found.start()] + "}"
    if found["key"] != KEY or found["sum"] != _digest(rest.encode())[:_SHORT]:
        raise ValueError(PROBLEM)
    return parse_json(rest, "a line"), True


def read_journal(path: Path, parse: Callable[[Any, int], T | None]) -> list[T]:
    """The sound lines at the beginning of a journal, which is cut to them: a kill may leave half a line.

    Args:
        path: The file; if there is none, there are no lines.
        parse: What a line's JSON stands for, given how many lines were before it; None for a line that is not sound.

    Returns:
        What they stand for, in order.

    Warns:
        DdimWarning: If lines are dropped.
    """
    found: list[T] = []
    if not path.exists():
        return found
    lines = read_bytes(path, TEXT_BYTES).decode("utf-8", errors="surrogateescape").split("\n")
    lines = [line + "\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])
    sealed = False
    for line in lines:
        try:
            what, sealed = read_line(line, sealed)
            made = parse(what, len(found))
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
            made = None
        if made is None:
            break
        found.append(made)
    if len(found) < len(lines):
        dropped = len(lines) - len(found)
        warn(f"{path}: line {len(found) + 1} is torn or damaged; {dropped} line(s) are dropped and made again")
        write_atomic(path, "".join(lines[: len(found)]).encode())
    return found
