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


def fit_sentiment(folder: str | Path, *, smoothing: float = 1.0) -> WordReward:
    """Unigram log-odds of ``positive.txt`` against ``negative.txt``, one sentence a line.

    The weight of a word is ``log p(word | positive) - log p(word | negative)`` with additive
    ``smoothing``: the naive-Bayes log-odds, in nats.

    Raises:
        InputError: when the folder or one of its two classes is missing or empty.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder; a gold reward is fitted on a folder with positive.txt and "
            "negative.txt."
        )
    counts = {}
    for name in CLASSES:
        path = folder / f"{name}.txt"
        if not path.is_file():
            raise InputError(
                f"{path}: missing; a gold reward is fitted on two classes, so put sentences of the "
                f"{name} class there, one a line."
            )
        words = Counter(_WORD.findall(path.read_text(encoding="utf-8", errors="replace").lower()))
        if not words:
            raise InputError(f"{path}: no words in it; a gold reward needs both classes.")
        counts[name] = words
    vocabulary = counts["positive"].keys() | counts["negative"].keys()
    total = {name: c.total() + smoothing * len(vocabulary) for name, c in counts.items()}
    return WordReward(
        {
            word: float(
                np.log((counts["positive"][word] + smoothing) / total["positive"])
                - np.log((counts["negative"][word] + smoothing) / total["negative"])
            )
            for word in sorted(vocabulary)
        }
    )
