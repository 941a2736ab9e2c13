"""A bag-of-words Bradley-Terry reward: what the words alone say of a preference.

The features of a response are which words it has, each once, and the logarithm of how many; the
margin is linear in their difference. The likelihood is that of :func:`core.estimation.fit`, but for
thousands of words Newton's matrices are the wrong tool: SciPy's L-BFGS minimizes it. The ridge is
chosen by cross-validation among the training pairs.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.optimize import minimize
from scipy.special import expit

_WORD = re.compile(r"[a-z']+")
RIDGES = (3.0, 10.0, 30.0, 100.0, 300.0)
FOLDS = 5


class Words(NamedTuple):
    """A fitted reward of words."""

    vocabulary: Mapping[str, int]
    theta: Float[np.ndarray, " features"]
    ridge: float

    def margin(self, pairs: Sequence[tuple[str, str]]) -> Float[np.ndarray, " pairs"]:
        """Reward of the first text less that of the second (nats of the logit)."""
        return differences(self.vocabulary, pairs) @ self.theta


def fit(pairs: Sequence[tuple[str, str]], *, least: int = 5) -> Words:
    """Fit on (preferred, other) texts; words in fewer than ``least`` texts have no feature."""
    counts = Counter(word for pair in pairs for text in pair for word in set(words(text)))
    kept = sorted(word for word, count in counts.items() if count >= least)
    vocabulary = {word: number for number, word in enumerate(kept)}
    data = differences(vocabulary, pairs)
    fold = np.random.default_rng(0).permutation(len(pairs)) % FOLDS
    ridge = min(RIDGES, key=lambda ridge: _held_out_loss(data, fold, ridge))
    return Words(vocabulary, _fit(data, ridge), ridge)


def words(text: str) -> list[str]:
    """Lower-case words of a text."""
    return _WORD.findall(text.lower())


def differences(
    vocabulary: Mapping[str, int], pairs: Sequence[tuple[str, str]]
) -> Float[np.ndarray, "pairs features"]:
    """Features of the first text less those of the second, the log of the length last."""
    found = np.zeros((len(pairs), len(vocabulary) + 1))
    for row, pair in zip(found, pairs, strict=True):
        for sign, text in zip((1.0, -1.0), pair, strict=True):
            listed = words(text)
            for word in set(listed):
                if word in vocabulary:
                    row[vocabulary[word]] += sign
            row[-1] += sign * np.log1p(len(listed))
    return found


def _fit(data: np.ndarray, ridge: float) -> np.ndarray:
    """The minimum of the sum of -log sigmoid(margin) and of ridge / 2 times the squared norm."""

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        margin = data @ theta
        pull = data.T @ expit(-margin)
        return float(_nll(margin) + ridge * theta @ theta / 2), ridge * theta - pull

    options = {"maxiter": 2000, "ftol": 1e-14, "gtol": 1e-6}
    return minimize(loss, np.zeros(data.shape[1]), jac=True, method="L-BFGS-B", options=options).x


def _nll(margin: np.ndarray) -> float:
    return float(np.logaddexp(0, -margin).sum())


def _held_out_loss(data: np.ndarray, fold: np.ndarray, ridge: float) -> float:
    return sum(_nll(data[fold == n] @ _fit(data[fold != n], ridge)) for n in range(FOLDS))
