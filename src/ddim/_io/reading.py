"""Reading of untrusted files: regular files only, with limits on size, nesting and digits.

Every file that the library reads whole goes through `read_bytes`, every JSON text through `parse_json`, and a value is
taken out of parsed JSON by `entry`. Every failure is a `DdimError` that names the file; nothing is ever executed.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from ddim.errors import DdimError, shorten

T = TypeVar("T")

JSON_BYTES = 64 << 20
"""The largest JSON file that is read: a schedule of a million betas takes status 20 MB."""
TEXT_BYTES = 1 << 30
"""The largest text file that is read."""
DEPTH = 64
"""Maximum nesting depth of JSON; no file of the library is nested deeper than 8."""
DIGITS = 40
"""Maximum number of digits of an integer."""
_PIECE = 16 << 20
_UNREADABLE = "is not JSON"
AGAIN = "copy or write it again"
"""Default hint for a damaged file."""


def memory() -> int:
    """Physical memory of this machine in bytes; 2^40 if it cannot be determined."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 1 << 40


def check_file(path: Path, most: int | None = None, hint: str = "check the path") -> int:
    """Check that a path is a regular file, and return its size in bytes.

    The file is not opened: opening a FIFO or a device could block.

    Args:
        path: The file.
        most: The largest size in bytes; None for this machine's memory.
        hint: How to fix a missing file.

    Raises:
        DdimError: If it does not exist, is not a regular file, or is larger than `most`.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise _read_error(path, error, hint) from None
    return _check(status, path, most)


def read_bytes(path: Path, most: int = JSON_BYTES, hint: str = "check the path") -> bytes:
    """Read a regular file.

    Args:
        path: The file.
        most: The largest size in bytes.
        hint: How to fix a missing file.

    Raises:
        DdimError: As `check_file`, or if the file cannot be read.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise _read_error(path, error, hint) from None
    try:
        _check(os.fstat(handle), path, most)
        with os.fdopen(handle, "rb", closefd=False) as file:
            data = read_stream(file, most + 1)
    except OSError as error:
        raise _read_error(path, error, hint) from None
    finally:
        os.close(handle)
    if len(data) > most:
        raise _too_large(path, len(data), most)
    return data


def read_stream(file: BinaryIO, most: int) -> bytes:
    """Read at most so many bytes, in pieces: `file.read(most)` would first allocate all of them."""
    pieces, left = [], most
    while left > 0 and (piece := file.read(min(left, _PIECE))):
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)


def read_text(path: Path, most: int = TEXT_BYTES, hint: str = "check the path") -> str:
    """Read a regular UTF-8 file.

    Args:
        path: The file.
        most: The largest size in bytes.
        hint: How to fix a missing file.

    Raises:
        DdimError: As `read_bytes`, or if the file is not UTF-8.
    """
    data = read_bytes(path, most, hint)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DdimError(path, f"is not UTF-8 text (byte {error.start})", "convert it") from None


def read_json(path: Path, kind: type[T] | tuple[type[T], ...], hint: str = "check the path", again: str = AGAIN) -> T:
    """Read a JSON file and check the type of its value.

    Args:
        path: The file.
        kind: The type, such as dict, or several.
        hint: How to fix a missing file.
        again: How to fix a damaged file.

    Raises:
        DdimError: As `read_bytes` and `parse_json`, or if the value has another type.
    """
    return of_kind(parse_json(read_bytes(path, JSON_BYTES, hint), path, again), kind, path, again)


def parse_json(text: str | bytes, name: str | Path, hint: str = AGAIN) -> Any:
    """Parse JSON strictly.

    Duplicate keys in an object are refused, because parsers differ in which value they use; so are lone surrogates,
    integers of more than `DIGITS` digits, and nesting deeper than `DEPTH`.

    Args:
        text: The text; bytes are UTF-8.
        name: Its name in an error.
        hint: How to fix it.

    Raises:
        DdimError: If it is not JSON or is refused.
    """
    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8")
        value = json.loads(decoded, parse_int=_whole, object_pairs_hook=_object)
        if "\\ud" in decoded or "\\uD" in decoded:
            json.dumps(value, ensure_ascii=False).encode()
        _check_depth(value)
    except UnicodeDecodeError as error:
        raise DdimError(name, f"{_UNREADABLE}: byte {error.start} is not UTF-8 text", hint) from None
    except UnicodeEncodeError:
        raise DdimError(name, "has a string that is not Unicode (a lone surrogate)", hint) from None
    except RecursionError:
        raise DdimError(name, f"is nested more than {DEPTH} deep", hint) from None
    except ValueError as error:
        raise DdimError(name, f"{_UNREADABLE}: {shorten(str(error))}", hint) from None
    return value


def of_kind(value: Any, kind: type[T] | tuple[type[T], ...], name: str | Path, hint: str = AGAIN) -> T:
    """Check the type of a JSON value, and return it.

    Raises:
        DdimError: If it has another type.
    """
    if not _is(value, kind):
        raise DdimError(name, f"is {_describe(value)}, not {_type_names(kind)}", hint)
    return value  # type: ignore[no-any-return]


def entry(
    values: Mapping[str, Any],
    key: str,
    kind: type[T] | tuple[type[T], ...],
    name: str | Path,
    default: T | None = None,
    hint: str = AGAIN,
) -> T:
    """Look up a value of a JSON object and check its type.

    Args:
        values: The object.
        key: The key.
        kind: The type, or several; float accepts integers and finite numbers only, int accepts no bool.
        name: The file's name in an error.
        default: The value of a missing key; None if the key is required.
        hint: How to fix it.

    Raises:
        DdimError: Naming the file and the field.
    """
    if key not in values:
        if default is None:
            raise DdimError(name, f"lacks {key}", hint)
        return default
    value = values[key]
    if not _is(value, kind):
        raise DdimError(name, f"{key} is {_describe(value)}, not {_type_names(kind)}", hint)
    return float(value) if kind is float else value  # type: ignore[return-value]


def list_of(values: Any, item: type[T], key: str, name: str | Path, hint: str = AGAIN) -> list[T]:
    """Check that a JSON value is an array of items of one type, and return it.

    Raises:
        DdimError: Naming the file, the field and the first item of another type.
    """
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise DdimError(name, f"{key} is {_describe(values)}, not a list", hint)
    for index, value in enumerate(values):
        if not _is(value, item):
            raise DdimError(name, f"{key}[{index}] is {_describe(value)}, not {_type_names(item)}", hint)
    return list(values)


def _check(status: os.stat_result, path: Path, most: int | None) -> int:
    if not stat.S_ISREG(status.st_mode):
        actual = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise DdimError(path, f"is {actual}", "pass the path of a file")
    limit = memory() if most is None else most
    if status.st_size > limit:
        raise _too_large(path, status.st_size, limit)
    return status.st_size


def _read_error(path: Path, error: OSError | ValueError, hint: str) -> DdimError:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return DdimError(path, "no such file", hint)
    reason = (isinstance(error, OSError) and error.strerror) or str(error)
    return DdimError(path, f"cannot be read ({reason})", "check the path and its permissions")


def _too_large(path: Path, size: int, most: int) -> DdimError:
    return DdimError(path, f"has {size:,} bytes, more than the limit of {most:,}", "check the path")


def _whole(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        duplicate = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"duplicate key {duplicate!r}")
    return value


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > DEPTH:
            raise RecursionError
        children = (
            each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list)
        )
        level = [inner for values in children for inner in values if isinstance(inner, dict | list)]


def _is(value: Any, kind: Any) -> bool:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, int) and float in kinds:
        return abs(value) < 2**1000
    if isinstance(value, float):
        return float in kinds and value - value == 0
    return isinstance(value, kinds)


_TYPE_NAMES = {dict: "an object", list: "a list", str: "a string", int: "an integer", float: "a finite number"}
_TYPE_NAMES |= {bool: "true or false", type(None): "null"}


def _type_names(kind: Any) -> str:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join(_TYPE_NAMES[each] for each in kinds)


def _describe(value: Any) -> str:
    if isinstance(value, dict | list):
        return _TYPE_NAMES[type(value)]
    return shorten(json.dumps(value), 60)
