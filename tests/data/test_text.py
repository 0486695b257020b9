"""Text datasets: windows of tokens."""

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


def test_decoding_ids_restores_the_text(file: Path) -> None:
    dataset = load_text(file, TextPolicy(length=16))
    assert dataset.policy.characters == "".join(sorted(set(TEXT)))
    assert dataset.policy.decode(dataset.ids) == TEXT[: len(dataset.ids)]
    assert dataset.ids.dtype == np.int64
    assert dataset.policy.categories == len(set(TEXT))
    assert dataset.policy.decode([0, dataset.policy.categories]).endswith("\N{WHITE SQUARE}")


def test_the_splits_are_the_text_and_share_one_vocabulary(file: Path) -> None:
    parts = [read_text(file, split) for split in SHARES]
    assert "".join(parts) == TEXT == read_text(file, None)
    assert len(parts[0]) == round(0.9 * len(TEXT))
    sets = [load_text(file, TextPolicy(length=16), split) for split in SHARES]
    assert len({dataset.policy.characters for dataset in sets}) == 1
    assert len({dataset.fingerprint() for dataset in sets}) == 3


def test_a_folder_may_have_one_file_or_one_per_split(file: Path, tmp_path: Path) -> None:
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


def test_batches_are_windows_of_the_ids(file: Path) -> None:
    dataset = load_text(file, TextPolicy(length=16), limit=100)
    assert len(dataset.ids) == 100
    assert len(dataset) == 85
    batch = dataset.batch([0, 84, 7])
    assert batch.shape == (3, 16)
    for window, first in zip(batch, (0, 84, 7), strict=True):
        assert (window == dataset.ids[first : first + 16]).all()
    assert (dataset.non_overlapping().flatten() == dataset.ids[:96]).all()
    batch[:] = -1
    assert (dataset.ids >= 0).all()


@pytest.mark.parametrize("change", ["text", "policy", "name", "split"])
def test_the_fingerprint_differs_between_datasets(change: str, file: Path) -> None:
    dataset = load_text(file, TextPolicy(length=16))
    ids = dataset.ids.copy()
    ids[5] = (ids[5] + 1) % dataset.policy.categories
    other = {
        "text": TextSet(dataset.name, dataset.split, dataset.policy, ids),
        "policy": TextSet(dataset.name, dataset.split, dataset.policy.model_copy(update={"length": 8}), dataset.ids),
        "name": TextSet("other", dataset.split, dataset.policy, dataset.ids),
        "split": TextSet(dataset.name, "test", dataset.policy, dataset.ids),
    }[change]
    assert other.fingerprint() != dataset.fingerprint()
    assert (
        TextSet(dataset.name, dataset.split, dataset.policy, dataset.ids.copy()).fingerprint() == dataset.fingerprint()
    )


def test_invalid_text_data_are_errors_that_name_the_problem(file: Path, tmp_path: Path) -> None:
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


def test_a_tokenizer_file_encodes_as_the_library_does(file: Path, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([TEXT], tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    policy = TextPolicy(length=8, tokenizer=read_tokenizer(tmp_path / "tokenizer.json"))
    assert policy.categories == tokenizer.get_vocab_size()
    ids = policy.encode(TEXT)
    assert ids.tolist() == tokenizer.encode(TEXT).ids
    assert len(ids) < len(TEXT) / 2
    assert policy.decode(ids) == TEXT
    assert json.loads(policy.model_dump_json())["tokenizer"] == policy.tokenizer
    (tmp_path / "torn.json").write_text(policy.tokenizer[:50])
    with pytest.raises(DdimError, match=r"torn\.json"):
        read_tokenizer(tmp_path / "torn.json")
