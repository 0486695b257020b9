"""Checksums inside the files of this package, which detect flipped bits and truncation on reading.

- A JSON file: its last entry, "checksum", is the SHA-256 of everything before it without white space.
- A safetensors file with JSON in its metadata: the last entry of that JSON, "checksum", is the SHA-256 of the whole
  file with 64 zeros in place of the checksum.
- A line of a journal: its last entry, "checksum", is the first 8 hexadecimal digits of the SHA-256 of the line without
  it.

A file without the entry was written by an earlier version of this library and is read without verification.
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
_PLACE = rb"\"" + KEY.encode() + rb"\": \""  # precedes the checksum in the header of a safetensors file
_SPACE = rb"[ \t\r\n]"
_LAST = re.compile(rb',(?P<before>%b*)"(?P<key>[^"]*)"%b*:%b*"(?P<sum>[0-9a-f]{64}|)"%b*\}%b*\Z' % ((_SPACE,) * 5))
_LAST_OF_LINE = re.compile(r', "(?P<key>[^"]*)": "(?P<sum>[^"]{8})"\}\Z')


def seal(text: str) -> bytes:
    """Add a checksum as the last entry to the text of a JSON object that is not empty; UTF-8."""
    body = text.rstrip()
    indent = re.match(r"\{(\s*)", body)
    space = indent[1] if indent else ""
    end = body[:-1]
    inner, after = end.rstrip(), end[len(end.rstrip()) :]
    value = _digest(body.encode())
    return f'{inner},{space or " "}"{KEY}": "{value}"{after}}}{text[len(body) :]}'.encode()


def unseal(data: bytes, path: Path | str) -> bytes:
    """Verify and remove the checksum of a JSON object; data without a checksum are returned unchanged.

    An empty checksum, as after an edit by hand, is not verified.

    Raises:
        DdimError: If the checksum does not match.
    """
    hint = f'copy it again, or, if you changed it on purpose, set its "{KEY}" to ""'
    match = _LAST.search(data)
    if match is not None and match["key"] == KEY.encode():
        rest = data[: match.start()] + b"}"
        if match["sum"] and match["sum"].decode() != _digest(rest):
            raise DdimError(path, PROBLEM, hint)
        return rest
    parsed = _object(data) if KEY.encode() in data else {}
    if parsed.get(KEY) == "":  # cleared by hand, and no longer the last entry
        return json.dumps({key: value for key, value in parsed.items() if key != KEY}).encode()
    if KEY in parsed or (match is not None and _nearly_key(match["key"].decode("latin-1"))):
        raise DdimError(path, PROBLEM, hint)
    return data


def read_sealed(path: Path, most: int = JSON_BYTES, hint: str = "check the path") -> bytes:
    """Read a JSON file, and verify and remove its checksum.

    Args:
        path: The file.
        most: The largest size in bytes.
        hint: How to fix a missing file.

    Raises:
        DdimError: As `ddim._io.reading.read_bytes` and `unseal`.
    """
    return unseal(read_bytes(path, most, hint), path)


def read_sealed_json(path: Path, kind: type[T], hint: str = "check the path", again: str = AGAIN) -> T:
    """The value of a JSON file with a checksum; arguments as in `ddim._io.reading.read_json`.

    Raises:
        DdimError: As `ddim._io.reading.read_json` and `unseal`.
    """
    return of_kind(parse_json(read_sealed(path, JSON_BYTES, hint), path, again), kind, path, again)


def _nearly_key(key: str) -> bool:
    """Whether a key differs from "checksum" in exactly one character, as after a flipped bit."""
    return len(key) == len(KEY) and sum(a != b for a, b in zip(key, KEY, strict=True)) == 1


def _object(data: bytes) -> dict[str, Any]:
    """The parsed JSON object; empty if the data are not a JSON object."""
    try:
        value = parse_json(data, "")
    except DdimError:
        return {}
    return value if isinstance(value, dict) else {}


def _digest(data: bytes) -> str:
    return hashlib.sha256(re.sub(_SPACE + b"+", b"", data)).hexdigest()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object that is not empty, with its checksum, atomically.

    Raises:
        DdimError: If it cannot be written.
    """
    write_atomic(path, seal(json.dumps(content, indent=1) + "\n"))


def tensors_metadata(content: Mapping[str, Any]) -> str:
    """JSON for the metadata of a safetensors file, with zeros where `seal_tensors` writes the checksum."""
    return json.dumps({**content, KEY: _ZEROS})


def seal_tensors(data: bytes) -> bytes:
    """Write the checksum into the bytes of a safetensors file that has `tensors_metadata`."""
    size = int.from_bytes(data[:8], "little")
    place = data.index(_PLACE + _ZEROS.encode(), 8, 8 + size) + len(_PLACE)
    view = memoryview(data)
    value = hashlib.sha256(data).hexdigest().encode()
    return b"".join((view[:place], value, view[place + len(value) :]))


def unseal_tensors(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Verify a safetensors file's checksum, and return the metadata without it.

    Args:
        path: The file.
        content: The JSON of its metadata.

    Raises:
        DdimError: If the checksum does not match.
    """
    hint = "copy it again, or write it again"
    last = next(reversed(content), "")
    value = content.get(last)
    if last != KEY:
        if KEY in content or _nearly_key(last):
            raise DdimError(path, PROBLEM, hint)
        return content
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
    return {key: each for key, each in content.items() if key != KEY}


def journal_line(content: Mapping[str, Any]) -> bytes:
    """Encode an object that is not empty as a line of a journal, with its checksum."""
    text = json.dumps(content)
    return f'{text[:-1]}, "{KEY}": "{_digest(text.encode())[:_SHORT]}"}}\n'.encode()


def read_line(text: str, sealed: bool) -> tuple[Any, bool]:
    """The JSON value of a line of a journal, and whether the line has a checksum.

    Args:
        text: The line.
        sealed: Whether it must have a checksum.

    Raises:
        ValueError: If the line is incomplete or damaged.
    """
    text.encode()  # raises UnicodeEncodeError, a ValueError, if the line was not UTF-8
    match = _LAST_OF_LINE.search(text.removesuffix("\n"))
    if match is not None and match["key"] != KEY and not _nearly_key(match["key"]):
        match = None
    if not text.endswith("\n") or (match is None and sealed):
        raise ValueError("the line is damaged")
    if match is None:
        return parse_json(text, "a line"), False
    rest = text[: match.start()] + "}"
    if match["key"] != KEY or match["sum"] != _digest(rest.encode())[:_SHORT]:
        raise ValueError(PROBLEM)
    return parse_json(rest, "a line"), True


def read_journal(path: Path, parse: Callable[[Any, int], T | None]) -> list[T]:
    """Read a journal up to its first invalid line, and truncate it there: a kill may leave an incomplete line.

    Args:
        path: The file; a missing file has no lines.
        parse: Converts a line's JSON, given the number of lines before it; None marks an invalid line.

    Returns:
        The parsed lines, in order.

    Warns:
        DdimWarning: If lines are dropped.
    """
    parsed: list[T] = []
    if not path.exists():
        return parsed
    lines = read_bytes(path, TEXT_BYTES).decode("utf-8", errors="surrogateescape").split("\n")
    lines = [line + "\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])
    sealed = False
    for line in lines:
        try:
            content, sealed = read_line(line, sealed)
            value = parse(content, len(parsed))
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
            value = None
        if value is None:
            break
        parsed.append(value)
    if len(parsed) < len(lines):
        dropped = len(lines) - len(parsed)
        warn(f"{path}: line {len(parsed) + 1} is damaged; {dropped} line(s) are dropped and recomputed")
        write_atomic(path, "".join(lines[: len(parsed)]).encode())
    return parsed
