"""Text as windows of tokens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ddim.data.text import SHARES, TextPolicy, TextSet, characters, load_text, read_text, read_tokenizer
from ddim.errors import DdimError

TEXT = "To be, or not to be:\nthat is the question — ü\n" * 30


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "hamlet.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_text_comes_back_from_its_ids(file: Path) -> None:
    found = load_text(file, TextPolicy(length=16))
    assert found.policy.characters == "".join(sorted(set(TEXT)))
    assert found.policy.decode(found.ids) == TEXT[: len(found.ids)]
    assert found.ids.dtype == np.int64
    assert found.policy.categories == len(set(TEXT))
    assert found.policy.decode([0, found.policy.categories]).endswith("\N{WHITE SQUARE}")


def test_the_splits_are_the_text_and_share_one_vocabulary(file: Path) -> None:
    parts = [read_text(file, split) for split in SHARES]
    assert "".join(parts) == TEXT == read_text(file, None)
    assert len(parts[0]) == round(0.9 * len(TEXT))
    sets = [load_text(file, TextPolicy(length=16), split) for split in SHARES]
    assert len({found.policy.characters for found in sets}) == 1
    assert len({found.fingerprint() for found in sets}) == 3


def test_a_folder_may_hold_one_file_or_one_for_each_split(file: Path, tmp_path: Path) -> None:
    assert read_text(file.parent, "test") == read_text(file, "test")
    named = tmp_path / "named"
    named.mkdir()
    (named / "train.txt").write_text("abcd" * 20)
    (named / "test.txt").write_text("xy" * 20)
    assert read_text(named, "test") == "xy" * 20
    assert characters(named) == "abcdxy"
    with pytest.raises(DdimError, match=r"named: .*'validation'"):
        read_text(named, "validation")
    (file.parent / "other.txt").write_text("a")
    with pytest.raises(DdimError):
        read_text(file.parent, "train")


def test_windows(file: Path) -> None:
    found = load_text(file, TextPolicy(length=16), limit=100)
    assert len(found.ids) == 100
    assert len(found) == 85
    batch = found.batch([0, 84, 7])
    assert batch.shape == (3, 16)
    for window, first in zip(batch, (0, 84, 7), strict=True):
        assert (window == found.ids[first : first + 16]).all()
    assert (found.apart().flatten() == found.ids[:96]).all()
    batch[:] = -1
    assert (found.ids >= 0).all()


@pytest.mark.parametrize("change", ["text", "policy", "name", "split"])
def test_the_fingerprint_tells_sets_apart(change: str, file: Path) -> None:
    found = load_text(file, TextPolicy(length=16))
    ids = found.ids.copy()
    ids[5] = (ids[5] + 1) % found.policy.categories
    other = {
        "text": TextSet(found.name, found.split, found.policy, ids),
        "policy": TextSet(found.name, found.split, found.policy.model_copy(update={"length": 8}), found.ids),
        "name": TextSet("other", found.split, found.policy, found.ids),
        "split": TextSet(found.name, "test", found.policy, found.ids),
    }[change]
    assert other.fingerprint() != found.fingerprint()
    assert TextSet(found.name, found.split, found.policy, found.ids.copy()).fingerprint() == found.fingerprint()


def test_what_is_wrong_is_said_in_one_line(file: Path, tmp_path: Path) -> None:
    policy = TextPolicy(length=8, characters="abc")
    with pytest.raises(DdimError, match=r"^hamlet\.txt: .*'T'"):
        load_text(file, policy)
    with pytest.raises(DdimError, match=r"^x: .*'d'"):
        TextPolicy(length=8, characters="abc\n").encode("ab\nab\ncd", "x")
    with pytest.raises(DdimError, match=r"none\.txt: "):
        read_text(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes("ü".encode("latin-1"))
    with pytest.raises(DdimError, match=r"latin\.txt: .*\bUTF-8\b"):
        read_text(tmp_path / "latin.txt")
    with pytest.raises(DdimError, match=r"^hamlet\.txt: .*\b2000\b"):
        load_text(file, TextPolicy(length=2000))
    with pytest.raises(DdimError, match=r"hamlet\.txt: .*'dev'"):
        read_text(file, "dev")
    with pytest.raises(DdimError, match=r"^limit: "):
        load_text(file, TextPolicy(length=8), limit=0)
    for wrong in ({"characters": "aa"}, {"characters": "a", "tokenizer": "{}"}):
        with pytest.raises(ValueError):
            TextPolicy(length=8, **wrong)  # type: ignore[arg-type]


def test_a_tokenizer_of_the_tokenizers_library(file: Path, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator([TEXT], tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    made.save(str(tmp_path / "tokenizer.json"))
    policy = TextPolicy(length=8, tokenizer=read_tokenizer(tmp_path / "tokenizer.json"))
    assert policy.categories == made.get_vocab_size()
    ids = policy.encode(TEXT)
    assert ids.tolist() == made.encode(TEXT).ids
    assert len(ids) < len(TEXT) / 2
    assert policy.decode(ids) == TEXT
    assert json.loads(policy.model_dump_json())["tokenizer"] == policy.tokenizer
    (tmp_path / "torn.json").write_text(policy.tokenizer[:50])
    with pytest.raises(DdimError, match=r"torn\.json"):
        read_tokenizer(tmp_path / "torn.json")
