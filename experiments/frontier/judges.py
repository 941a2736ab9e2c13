"""Two judges of the same thing, fitted on different people's sentences.

*Gold* labels and judges: it adds up words, by the naive-Bayes log-odds of every other sentence.
The *second* judge, which nobody learns from, knows the other sentences, and pairs of neighbouring
words besides: what a policy gains by it is not owed to the noise of gold's weights.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jax_klrlhf.programs.gold import WordReward, log_odds, sentences, words_of

Judge = Callable[[Sequence[str]], np.ndarray]


class PairReward(NamedTuple):
    """Weights of words and of pairs of neighbouring words, added up like gold's."""

    weights: dict[str, float]

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Rewards ``[len(texts)]``, float32; 0 of a text without words."""
        return np.array([self._one(grams(text)) for text in texts], np.float32)

    def _one(self, found: list[str]) -> float:
        return sum(self.weights.get(gram, 0.0) for gram in found) / max(1, len(found)) ** 0.5


class Judges(NamedTuple):
    """Both, and how often each tells the sentences of the other's part apart."""

    gold: WordReward
    second: PairReward
    accuracy: tuple[float, float]


def grams(text: str) -> list[str]:
    """Words and pairs of neighbouring words."""
    words = words_of(text)
    return words + [f"{one} {two}" for one, two in itertools.pairwise(words)]


def build(folder: Path) -> Judges:
    """Both judges of a folder with ``positive.txt`` and ``negative.txt``.

    Raises:
        InputError: as :func:`jax_klrlhf.programs.gold.sentences`.
    """
    every = sentences(folder)
    parts = [{name: lines[at::2] for name, lines in every.items()} for at in (0, 1)]

    def counts(part: dict[str, list[str]], of: Callable[[str], list[str]]) -> dict[str, Counter]:
        return {
            name: Counter(g for line in lines for g in of(line)) for name, lines in part.items()
        }

    gold = WordReward(log_odds(counts(parts[0], words_of)))
    second = PairReward(log_odds(counts(parts[1], grams)))
    return Judges(gold, second, (_accuracy(gold, parts[1]), _accuracy(second, parts[0])))


def _accuracy(judge: Judge, part: dict[str, list[str]]) -> float:
    """Share of sentences on their side of the middle, both classes alike."""
    middle = np.median(np.concatenate([judge(lines) for lines in part.values()]))
    above = judge(part["positive"]) > middle
    below = judge(part["negative"]) <= middle
    return float((above.mean() + below.mean()) / 2)
