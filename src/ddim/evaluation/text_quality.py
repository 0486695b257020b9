"""Quality of text samples: share of valid words, n-gram divergence, and bits per character under an n-gram model."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")
ORDER = 5
GRAM = 3


def words(text: str, whole: bool = False) -> list[str]:
    """The words of a text in lower case; an apostrophe inside a word is part of it.

    Args:
        text: The text.
        whole: Whether the text is complete; if not, a word at either end may be cut off and is left out.
    """
    matches = [match for match in _WORD.finditer(text) if whole or (match.start() > 0 and match.end() < len(text))]
    return [match.group().lower() for match in matches]


class NGram:
    """A character n-gram model with Witten-Bell interpolation (1991), down to the uniform distribution.

    p(c | h) = (count(h c) + kinds(h) p(c | h without its first character)) / (count(h) + kinds(h)), where kinds(h) is
    the number of different characters that follow h.

    Args:
        text: Training text.
        order: n, including the predicted character.
    """

    def __init__(self, text: str, order: int = ORDER):
        self.order, self.size = order, len(set(text)) + 1  # plus one for unseen characters
        self.counts: list[Counter[str]] = []
        self.kinds: list[Counter[str]] = []
        for n in range(1, order + 1):
            counts = Counter(text[i : i + n] for i in range(len(text) - n + 1))
            kinds: Counter[str] = Counter(gram[:-1] for gram in counts)
            self.counts.append(counts)
            self.kinds.append(kinds)
        self.totals: list[defaultdict[str, int]] = []
        for counts in self.counts:
            totals: defaultdict[str, int] = defaultdict(int)
            for gram, count in counts.items():
                totals[gram[:-1]] += count
            self.totals.append(totals)

    def probability(self, history: str, character: str) -> float:
        """p(character | history); only the last n - 1 characters of the history are used."""
        p = 1 / self.size
        for n in range(1, min(self.order, len(history) + 1) + 1):
            seen = history[len(history) - n + 1 :]
            kinds = self.kinds[n - 1][seen]
            if not kinds:
                break
            p = (self.counts[n - 1][seen + character] + kinds * p) / (self.totals[n - 1][seen] + kinds)
        return p

    def bits(self, text: str) -> float:
        """-log2 p of a text per character; the first n - 1 characters have a shorter history. nan for no text."""
        if not text:
            return math.nan
        each = (self.probability(text[max(0, i - self.order + 1) : i], text[i]) for i in range(len(text)))
        return -math.fsum(math.log2(p) for p in each) / len(text)


def grams(texts: Sequence[str], n: int = GRAM) -> Counter[str]:
    """Counts of the character n-grams of some texts."""
    return Counter(text[i : i + n] for text in texts for i in range(len(text) - n + 1))


def divergence(a: Counter[str], b: Counter[str]) -> float:
    """The Jensen-Shannon divergence of two counts, normalised to distributions, in bits, in [0, 1]."""
    keys = list(a.keys() | b.keys())
    p, q = (np.array([counts[key] for key in keys], np.float64) / max(counts.total(), 1) for counts in (a, b))
    middle = (p + q) / 2
    total = float(sum(np.sum(x[x > 0] * np.log2(x[x > 0] / middle[x > 0])) for x in (p, q)) / 2)
    return max(0.0, total)  # rounding may make the sum slightly negative for nearly equal distributions


class Reference:
    """Real text that samples are compared with.

    Args:
        training: The model's training text: source of the valid words and of the n-gram model.
        held_out: Real text the model has not seen: source of the n-gram distribution that samples should have.
    """

    def __init__(self, training: str, held_out: str):
        self.vocabulary = {*words(training, whole=True)}
        self.model = NGram(training)
        self.grams = grams([held_out])

    def measure(self, texts: Sequence[str]) -> dict[str, Any]:
        """Quality metrics of some texts.

        Args:
            texts: Two or more texts.

        Returns:
            words: number of whole words;
            valid_words, valid_words_error: share of them that occur in the training text, and its standard error;
            gram_divergence: Jensen-Shannon divergence of the character 3-grams from those of the held-out text, bits;
            bits_per_character, bits_error: under the n-gram model, and its standard error.
        """
        each = [words(text) for text in texts]
        good = np.array([sum(word in self.vocabulary for word in sample_words) for sample_words in each], np.float64)
        count = np.array([len(sample_words) for sample_words in each], np.float64)
        bits = np.array([self.model.bits(text) for text in texts])
        share = good.sum() / max(count.sum(), 1)
        spread = np.sqrt(np.sum((good - share * count) ** 2)) / max(count.sum(), 1)  # standard error of a ratio
        return {
            "words": int(count.sum()),
            "valid_words": float(share),
            "valid_words_error": float(spread),
            "gram_divergence": divergence(grams(texts), self.grams),
            "bits_per_character": float(bits.mean()),
            "bits_error": float(bits.std(ddof=1) / math.sqrt(len(bits))),
        }
