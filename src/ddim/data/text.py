"""Text datasets: windows of token ids, where tokens are characters or come from a `tokenizers` file."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ddim._io import limits, reading
from ddim.data.image import SUFFIXES as IMAGES
from ddim.data.image import list_files
from ddim.errors import DdimError, printable

SHARES = {"train": (0.0, 0.9), "validation": (0.9, 0.95), "test": (0.95, 1.0)}
"""The splits of a single file, by characters: the first 90 %, the next 5 %, the last 5 %."""

UNKNOWN = "\N{WHITE SQUARE}"
"""The character shown for a masked token."""


class TextPolicy(BaseModel):
    """How text is converted to token ids; stored in a model's config.

    Attributes:
        length: Tokens per sequence, at least 1.
        characters: The vocabulary if tokens are characters: id i is characters[i].
        tokenizer: Otherwise the JSON text of a tokenizer of the `tokenizers` library.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    length: int = Field(ge=1, le=limits.LENGTH)
    characters: str = ""
    tokenizer: str = Field("", repr=False)

    @model_validator(mode="after")
    def _one_vocabulary(self) -> TextPolicy:
        if self.characters and self.tokenizer:
            raise ValueError("characters and tokenizer are both set")
        if len(set(self.characters)) < len(self.characters):
            raise ValueError("the vocabulary has a duplicate character")
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a sequence, (L,)."""
        return (self.length,)

    @property
    def categories(self) -> int:
        """Vocabulary size K; 0 without a vocabulary."""
        return _tokenizer(self.tokenizer).get_vocab_size() if self.tokenizer else len(self.characters)

    def facts(self) -> dict[str, str]:
        """A description for people: label to text."""
        tokens = "tokens of a tokenizer" if self.tokenizer else "characters"
        return {"text": f"sequences of {self.length} tokens, of {self.categories} {tokens}"}

    def encode(self, text: str, name: str = "the text") -> np.ndarray:
        """Convert text to ids.

        Args:
            text: The text.
            name: Its name in an error.

        Returns:
            int64, (number of tokens,).

        Raises:
            DdimError: If a character is not in the vocabulary.
        """
        if self.tokenizer:
            return np.asarray(_tokenizer(self.tokenizer).encode(text, add_special_tokens=False).ids, np.int64)
        points = np.frombuffer(text.encode("utf-32-le"), "<u4")
        vocabulary = np.array([ord(character) for character in self.characters], np.uint32)
        order = np.argsort(vocabulary)
        positions = np.minimum(np.searchsorted(vocabulary[order], points), len(vocabulary) - 1)
        ids = order[positions]
        if len(points) and (unknown := vocabulary[ids] != points).any():
            at = int(np.argmax(unknown))
            line = text.count("\n", 0, at) + 1
            raise DdimError(name, f"line {line} has {text[at]!r}, which is not in the vocabulary", "replace it")
        return ids.astype(np.int64)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Convert ids (L,) to text.

        The mask, an id beyond the vocabulary, becomes a square; with a tokenizer it is left out.
        """
        if self.tokenizer:
            tokens = [int(i) for i in ids if i < self.categories]
            return str(_tokenizer(self.tokenizer).decode(tokens, skip_special_tokens=False))
        return "".join(self.characters[i] if i < len(self.characters) else UNKNOWN for i in map(int, ids))


class TextSet:
    """A dataset of all windows of a text: sequence i begins at token i.

    Attributes:
        name: The dataset's name, without its folder.
        split: The split.
        policy: The vocabulary and the length of a window.
        ids: The token ids, int64, (number of tokens,).
        labels: None, as for images without labels.
        classes: None.

    Args:
        name: The dataset's name.
        split: The split.
        policy: The vocabulary and the length of a window.
        ids: The token ids, int64, (number of tokens,).

    Raises:
        DdimError: If the text is shorter than a window.
    """

    labels: None = None
    classes: None = None

    def __init__(self, name: str, split: str, policy: TextPolicy, ids: np.ndarray):
        self.name, self.split, self.policy, self.ids = name, split, policy, ids
        if len(ids) < policy.length:
            problem = f"{split} has {len(ids)} tokens, fewer than the length {policy.length}"
            raise DdimError(name, problem, "use more text or a shorter length")
        self._windows = np.lib.stride_tricks.sliding_window_view(ids, policy.length)

    def __len__(self) -> int:
        return len(self._windows)

    def __repr__(self) -> str:
        return f"TextSet({self.name!r}, {self.split!r}: {len(self.ids)} tokens, vocabulary {self.policy.categories})"

    def batch(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """The windows that begin at the token indices: int64, (B, L); a copy."""
        return np.array(self._windows[np.asarray(indices, np.int64)])

    def non_overlapping(self) -> np.ndarray:
        """The non-overlapping windows, from the first token on: int64, (number of tokens // L, L)."""
        return np.array(self._windows[:: self.policy.length])

    def fingerprint(self) -> str:
        """A hash of the name, the split, the vocabulary and all tokens: 16 hexadecimal digits."""
        digest = hashlib.sha256(repr((self.name, self.split, self.policy.model_dump_json())).encode())
        digest.update(self.ids.astype("<i8").tobytes())
        return digest.hexdigest()[:16]


def read_text(source: str | Path, split: str | None = "train") -> str:
    """Read the text of a file, or of a folder with one file or one per split.

    Args:
        source: A UTF-8 file, split by `SHARES`; or a folder with one .txt file, or with `train.txt` and others.
        split: The split; None for all of a single file.

    Raises:
        DdimError: If there is no such file or split, or it is not UTF-8 text.
    """
    path, where = Path(source).expanduser(), printable(source)
    if path.is_dir():
        files = sorted(path.glob("*.txt"))
        by_split = {file.stem: file for file in files if file.stem in SHARES}
        if by_split and split is not None:
            if split not in by_split:
                raise DdimError(where, f"has no split {split!r}", f"use one of {', '.join(by_split)}")
            return _read(by_split[split])
        if len(files) != 1:
            problem = f"has {len(files)} text files"
            raise DdimError(where, problem, "keep one, or name them train.txt, validation.txt and test.txt")
        path = files[0]
    if not path.exists():
        raise DdimError(where, "no such file or folder", "check the path")
    text = _read(path)
    if split is None:
        return text
    if split not in SHARES:
        raise DdimError(where, f"has no split {split!r}", f"use one of {', '.join(SHARES)}")
    first, end = (round(share * len(text)) for share in SHARES[split])
    return text[first:end]


def load_text(source: str | Path, policy: TextPolicy, split: str = "train", limit: int | None = None) -> TextSet:
    """Load a text dataset.

    Args:
        source: As in `read_text`.
        policy: The vocabulary and the length; without a vocabulary, all characters of the source are used.
        split: The split.
        limit: Maximum number of characters, the first ones.

    Raises:
        DdimError: As `read_text`, or if a character is not in the vocabulary, or the text is shorter than a window.
    """
    if limit is not None and limit < 1:
        raise DdimError("limit", f"is {limit}", "use an integer from 1, or None")
    if not policy.categories:
        policy = policy.model_copy(update={"characters": characters(source)})
    name = Path(source).resolve().name
    text = read_text(source, split)[:limit]
    return TextSet(name, split, policy, policy.encode(text, name))


def characters(source: str | Path) -> str:
    """The distinct characters of all splits of a source, sorted.

    Raises:
        DdimError: As `read_text`.
    """
    path = Path(source).expanduser()
    files = [file for file in sorted(path.glob("*.txt")) if file.stem in SHARES] if path.is_dir() else []
    return "".join(sorted({*("".join(map(_read, files)) if files else read_text(source, None))}))


def is_text(source: str | Path) -> bool:
    """Whether a source is a text file, or a folder of texts.

    A folder is of texts if it has a file train.txt, or text files and no images: captions, notes or a licence beside
    images do not make it one.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        texts = any(path.glob("*.txt"))
        return (path / "train.txt").is_file() or (texts and not list_files(path, IMAGES | {".parquet"}))
    return path.suffix.lower() == ".txt"


def read_tokenizer(path: Path) -> str:
    """Read the JSON text of a tokenizer file, and check that it can be loaded.

    Raises:
        DdimError: If there is no such file, or it is not a tokenizer.
    """
    text = reading.read_text(path, reading.JSON_BYTES)
    reading.of_kind(reading.parse_json(text, path), dict, path, "pass the JSON file of a tokenizer")
    _tokenizer(text)
    return text


def _read(path: Path) -> str:
    return reading.read_text(path)


@functools.lru_cache(maxsize=4)
def _tokenizer(text: str) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise DdimError("tokenizer", "the library tokenizers is not installed", "pip install 'ddim[text]'") from None
    try:
        return Tokenizer.from_str(text)
    except Exception as error:
        raise DdimError("tokenizer", f"cannot be read ({error})", "pass the JSON file of a tokenizer") from None
