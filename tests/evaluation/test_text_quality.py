"""Quality metrics of text samples."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from pathlib import Path

import pytest

from ddim.evaluation.text_quality import NGram, Reference, divergence, grams, words
from models import contents, ddim

TEXT = "the cat sat on the mat.\nthe dog isn't at the door,\nand the cat knows it.\n" * 12


def test_words_at_the_ends_are_left_out() -> None:
    assert words("ing the cat, isn't 'tis O'er; 3rd wor") == ["the", "cat", "isn't", "tis", "o'er", "rd"]
    assert words("ing THE wor", whole=True) == ["ing", "the", "wor"]
    assert words("") == []


@pytest.mark.parametrize("history", ["", "t", "the c", "at the d", "xyz", "thz"])
def test_the_ngram_model_is_a_distribution_with_one_unseen_character(history: str) -> None:
    model = NGram(TEXT)
    characters = sorted(set(TEXT))
    total = sum(model.probability(history, character) for character in characters)
    assert total + model.probability(history, "§") == pytest.approx(1, abs=1e-12)
    assert min(model.probability(history, character) for character in [*characters, "§"]) > 0


def test_witten_bell_matches_the_formula() -> None:
    """In abab, a is followed by b twice: p(b | a) = (2 + 1 p(b)) / (2 + 1), p(b) = (2 + 2 / 3) / (4 + 2)."""
    model = NGram("abab", order=2)
    p_b = (2 + 2 / 3) / 6
    assert model.probability("", "b") == pytest.approx(p_b)
    assert model.probability("xa", "b") == pytest.approx((2 + p_b) / 3)
    assert model.bits("ab") == pytest.approx(-(math.log2(p_b) + math.log2((2 + p_b) / 3)) / 2)


def test_longer_context_fits_the_training_text_better() -> None:
    bits = [NGram(TEXT, order).bits(TEXT) for order in (1, 2, 3, 5)]
    assert all(after < before for before, after in itertools.pairwise(bits))
    shuffled = "".join(sorted(TEXT, key=lambda c: hash((c, 7)) % 97))
    assert NGram(TEXT).bits(shuffled) > 2 * bits[-1]


def test_the_divergence_of_counts() -> None:
    a, b = Counter({"x": 3, "y": 1}), Counter({"z": 5})
    assert divergence(a, a) == 0
    assert divergence(a, Counter({"x": 30, "y": 10})) == pytest.approx(0, abs=1e-15)
    assert divergence(a, b) == pytest.approx(1)
    assert divergence(a, b) == divergence(b, a)
    half = divergence(Counter({"x": 1}), Counter({"x": 1, "y": 1}))
    assert half == pytest.approx((math.log2(4 / 3) + 0.5 * math.log2(2 / 3) + 0.5 * math.log2(2)) / 2)
    assert grams(["abcd", "bcd"]) == Counter({"abc": 1, "bcd": 2})


def test_real_text_scores_best() -> None:
    reference = Reference(TEXT, TEXT)
    real = reference.measure([TEXT[i : i + 120] for i in (3, 50, 200, 333)])
    typos = reference.measure([TEXT[i : i + 120].replace("t", "q") for i in (3, 50, 200, 333)])
    assert real["valid_words"] == 1
    assert typos["valid_words"] < 0.5
    assert real["valid_words_error"] == 0 < typos["valid_words_error"] < 0.3
    assert real["gram_divergence"] < 0.2 < typos["gram_divergence"]
    assert real["bits_per_character"] < typos["bits_per_character"] / 3


def test_the_command_writes_the_table_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cats.txt").write_text(TEXT)
    shape = ("network.width=16", "network.depth=1", "network.heads=2", "train.warmup=1")
    settings = [word for setting in shape for word in ("--set", setting)]
    run = ("train", tmp_path / "cats.txt", "--preset", "tinyshakespeare", "--length", 16, "--steps", 4, "--batch", 4)
    assert ddim(*run, *settings, "--preview-every", 4, "--device", "cpu", "--out", tmp_path / "run") == 0
    assert len((tmp_path / "run/previews/00000004.txt").read_text().splitlines()) > 36
    evaluate = ("evaluate", tmp_path / "run", tmp_path / "cats.txt", "-n", 3, "--steps", "2,4", "--device", "cpu")
    assert ddim(*evaluate, "--eta", "0,0.5", "--out", tmp_path / "table") == 0
    output = capsys.readouterr().out
    assert "real text" in output
    assert "eta = 0.5" in output
    before = contents(tmp_path / "table")
    table = json.loads(before["evaluate.json"])
    assert [(cell["row"], cell["steps"]) for cell in table["cells"]] == [
        ("real text", None),
        ("0", 2),
        ("0.5", 2),
        ("0", 4),
        ("0.5", 4),
    ]
    texts = [name for name in before if name.startswith("samples/") and name.endswith(".txt")]
    assert len(texts) == 12
    (tmp_path / "table/samples/S4-0/000001.txt").unlink()
    (tmp_path / "table/evaluate.json").unlink()
    assert ddim(*evaluate, "--eta", "0,0.5", "--out", tmp_path / "table") == 0
    assert contents(tmp_path / "table") == before
    assert ddim(*evaluate, "--eta", "0,hat", "--out", tmp_path / "other") == 2
    assert "--eta hat: " in capsys.readouterr().err
