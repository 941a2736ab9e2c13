"""A gold reward from two heaps of sentences: the judge that a simulated annotator has in mind.

``r(text) = sum of word weights / sqrt(number of words)``. The square root keeps the reward of a
long text on the scale of a short one without paying for brevity as a mean would.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jax_klrlhf.errors import InputError

_WORD = re.compile(r"[a-z']+")
CLASSES = ("positive", "negative")
"""Files ``<class>.txt`` of the folder."""


@dataclasses.dataclass(frozen=True)
class WordReward:
    """A reward in nats that adds up word weights; words without a weight count zero."""

    weights: Mapping[str, float]

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Rewards ``[len(texts)]``, float32. A text without words has reward 0."""
        return np.array([self._one(text) for text in texts], np.float32)

    def _one(self, text: str) -> float:
        words = _WORD.findall(text.lower())
        return sum(self.weights.get(word, 0.0) for word in words) / max(1, len(words)) ** 0.5


def words_of(text: str) -> list[str]:
    """What a text is counted by: its words, in lower case."""
    return _WORD.findall(text.lower())


def sentences(folder: str | Path) -> dict[str, list[str]]:
    """``positive.txt`` and ``negative.txt`` of a folder, one sentence a line.

    Raises:
        InputError: when the folder or one of its two classes is missing or empty.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder; a gold reward is fitted on a folder with positive.txt and "
            "negative.txt."
        )
    found = {}
    for name in CLASSES:
        path = folder / f"{name}.txt"
        if not path.is_file():
            raise InputError(
                f"{path}: missing; a gold reward is fitted on two classes, so put sentences of the "
                f"{name} class there, one a line."
            )
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        found[name] = [line for line in lines if words_of(line)]
        if not found[name]:
            raise InputError(f"{path}: no words in it; a gold reward needs both classes.")
    return found


def log_odds(counts: Mapping[str, Counter[str]], *, smoothing: float = 1.0) -> dict[str, float]:
    """``log p(word | positive) - log p(word | negative)``, naive Bayes with additive smoothing."""
    vocabulary = counts["positive"].keys() | counts["negative"].keys()
    total = {name: c.total() + smoothing * len(vocabulary) for name, c in counts.items()}
    return {
        word: float(
            np.log((counts["positive"][word] + smoothing) / total["positive"])
            - np.log((counts["negative"][word] + smoothing) / total["negative"])
        )
        for word in sorted(vocabulary)
    }


def fit_sentiment(folder: str | Path, *, smoothing: float = 1.0) -> WordReward:
    """Unigram log-odds of ``positive.txt`` against ``negative.txt``, one sentence a line.

    The weight of a word is :func:`log_odds`, in nats.

    Raises:
        InputError: when the folder or one of its two classes is missing or empty.
    """
    counts = {
        name: Counter(word for line in lines for word in words_of(line))
        for name, lines in sentences(folder).items()
    }
    return WordReward(log_odds(counts, smoothing=smoothing))
