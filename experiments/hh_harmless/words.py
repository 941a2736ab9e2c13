"""A bag-of-words Bradley-Terry reward: what the words alone say of a preference.

The features of a response are which words it has, each once, and the logarithm of how many; the
margin is linear in their difference, fitted by :func:`core.estimation.fit`, the same likelihood as
everywhere. The ridge is chosen by cross-validation among the training pairs.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jax_klrlhf.core import bradley_terry, estimation

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
    # With a ridge the optimum lies in the span of the data, so Newton's matrices need be no larger
    # than the pairs are many.
    basis = np.linalg.qr(data.T)[0]
    inside = jnp.asarray(data @ basis)
    fold = np.random.default_rng(0).permutation(len(pairs)) % FOLDS
    ridge = min(RIDGES, key=lambda ridge: _held_out_loss(inside, fold, ridge))
    theta = np.asarray(_fit(inside, ridge, jnp.ones(len(pairs))))
    return Words(vocabulary, basis @ theta, ridge)


def words(text: str) -> list[str]:
    """Lower-case words of a text."""
    return _WORD.findall(text.lower())


def differences(
    vocabulary: Mapping[str, int], pairs: Sequence[tuple[str, str]]
) -> Float[np.ndarray, "pairs features"]:
    """Features of the first text less those of the second, the log of the length last."""
    found = np.zeros((len(pairs), len(vocabulary) + 1), np.float32)
    for row, pair in zip(found, pairs, strict=True):
        for sign, text in zip((1.0, -1.0), pair, strict=True):
            listed = words(text)
            for word in set(listed):
                if word in vocabulary:
                    row[vocabulary[word]] += sign
            row[-1] += sign * np.log1p(len(listed))
    return found


@jax.jit
def _fit(data: jax.Array, ridge: float, weights: jax.Array) -> jax.Array:
    labels = jnp.ones(data.shape[0], data.dtype)
    return estimation.fit(data, labels, ridge=ridge, weights=weights).theta


def _held_out_loss(data: jax.Array, fold: np.ndarray, ridge: float) -> float:
    total = 0.0
    for number in range(FOLDS):
        theta = _fit(data, ridge, jnp.asarray(fold != number, data.dtype))
        margin = np.asarray(data)[fold == number] @ np.asarray(theta)
        total += float(bradley_terry.nll(jnp.asarray(margin)).sum())
    return total
