r"""The proxy: a Bradley-Terry reward fitted on the labels of the method that uses it.

It is linear, with its ellipsoid, on frozen features: how often each of the most frequent tokens
occurs in the response and, if asked for, pi0's mean-pooled hidden states. (The last layer predicts
the next token and keeps little of the present ones; the counts alone agree better with a gold
reward of words than the states alone, and cost no pass through the model.) Features of one
prompt's responses are whitened by how pi0's own responses to a prompt differ:

.. math:: \phi(x, y) = D^{-1/2} \, C^{-1/2} (h(x, y) - \bar h), \qquad
    C = E_x \, \mathrm{Cov}_{y \sim \pi_0}(h(x, y))

so that ||theta||^2 / D is the variance of the reward among pi0's responses to a prompt, and a ridge
means the same in every direction. The fit and the confidence set are the library's
(:func:`rounds.linear`). No label and no reward enters the features.

The other proxy is a reward model: all of pi0 with a linear head, fitted by the same likelihood. It
knows no uncertainty, so the methods that ask for one cannot be run with it.

Axes: ``B`` prompts, ``K`` responses, ``D`` features.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models import reward as rewards
from jax_klrlhf.models.base import LanguageModel
from jax_klrlhf.models.reward import RewardParams
from jax_klrlhf.training import rounds
from jax_klrlhf.training.rounds.compute import mapped
from jax_klrlhf.training.rounds.features import Features
from jax_klrlhf.training.rounds.parts import Reward

SHRINKAGE = 0.1
"""Share of the mean variance that is added to every direction of C, which is estimated."""


def whitened_features(
    model: LanguageModel,
    params: Any,
    prompts: Ragged,
    responses: Ragged,
    *,
    tokens: int,
    hidden: bool,
    rows: int,
) -> tuple[Features, int]:
    """Features and their number D, from pi0's parameters and its ``responses [B, K, C]``.

    ``tokens``: how many of the most frequent tokens are counted; fewer where fewer occur.
    ``hidden``: pi0's hidden states are features too.

    Raises:
        ValueError: with fewer than two responses to a prompt.
    """
    if responses.ids.shape[1] < 2:
        raise ValueError("whitening needs at least two responses to each prompt.")

    def pooled(params: Any, prompts: Ragged, responses: Ragged) -> jax.Array:
        return rewards.features(model, params, prompts, responses, pooling=rewards.mean)

    program = mapped(pooled, rows=rows)
    seen = np.bincount(np.asarray(responses.ids)[np.asarray(responses.mask)])
    frequent = np.argsort(-seen, kind="stable")[: min(tokens, np.count_nonzero(seen))]

    def blocks(prompts: Ragged, responses: Ragged) -> list[np.ndarray]:
        counted = shares(responses, frequent)
        return [program(params, prompts, responses), counted] if hidden else [counted]

    found = [block.astype(np.float64) for block in blocks(prompts, responses)]
    # Blocks of one total variance, so that the shrinkage is fair to both.
    scales = [max(float(_within(block).std()), 1e-12) * block.shape[-1] ** 0.5 for block in found]
    joined = _joined(found, scales)
    centre, within = joined.mean((0, 1)), _within(joined)
    count, dim = within.shape[0] * (within.shape[1] - 1), within.shape[-1]
    covariance = np.einsum("bkd,bke->de", within, within) / count
    covariance += SHRINKAGE * np.trace(covariance) / dim * np.eye(dim)
    values, vectors = np.linalg.eigh(covariance)
    white = (vectors / np.sqrt(values * dim)) @ vectors.T

    def features(prompts: Ragged, responses: Ragged) -> np.ndarray:
        joined = _joined(blocks(prompts, responses), scales)
        return ((joined - centre) @ white).astype(np.float32)

    return features, dim


def reward_model(
    model: LanguageModel, params: Any, sample: Ragged, *, fitting: rounds.Fitting, rows: int
) -> Reward:
    """A Bradley-Terry reward model: pi0's parameters and a head of zeros, on mean hidden states."""
    width = jax.eval_shape(model.prefill, params, sample).hidden.shape[-1]
    start = RewardParams(params, jnp.zeros(width))
    return rounds.reward_model(
        model, start, fitting=fitting, pooling=rewards.mean, centring=0.0, rows=rows
    )


def shares(responses: Ragged, tokens: Int[np.ndarray, " T"]) -> Float[np.ndarray, "B K T"]:
    """Share of a response's tokens that are each of ``tokens``; 0 in an empty response."""
    ids, lengths = np.asarray(responses.ids), np.asarray(responses.lengths)
    column = np.full(max(int(ids.max(initial=0)), int(tokens.max(initial=0))) + 1, len(tokens))
    column[tokens] = np.arange(len(tokens))
    found = np.zeros((*lengths.shape, len(tokens) + 1), np.float32)  # the last: all others
    row, answer, place = np.nonzero(np.asarray(responses.mask))
    np.add.at(found, (row, answer, column[ids[row, answer, place]]), 1.0)
    return found[..., :-1] / np.maximum(lengths, 1)[..., None]


def _within(block: np.ndarray) -> np.ndarray:
    return block - block.mean(1, keepdims=True)


def _joined(blocks: list[np.ndarray], scales: list[float]) -> np.ndarray:
    return np.concatenate([b / s for b, s in zip(blocks, scales, strict=True)], -1)
