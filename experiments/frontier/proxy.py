r"""The proxy: a linear Bradley-Terry reward on pi0's frozen hidden states, with its ellipsoid.

Mean-pooled hidden states of one prompt's responses differ little and in few directions, so features
are whitened by how pi0's own responses to a prompt differ:

.. math:: \phi(x, y) = D^{-1/2} \, C^{-1/2} (h(x, y) - \bar h), \qquad
    C = E_x \, \mathrm{Cov}_{y \sim \pi_0}(h(x, y))

so that ||theta||^2 / D is the variance of the reward among pi0's responses to a prompt, and a ridge
means the same in every direction. The fit and the confidence set are the library's
(:func:`rounds.linear`). No label and no reward enters the features.

Axes: ``B`` prompts, ``K`` responses, ``D`` features.
"""

from typing import Any

import jax
import numpy as np

from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models import reward as rewards
from jax_klrlhf.models.base import LanguageModel
from jax_klrlhf.training.rounds.compute import mapped
from jax_klrlhf.training.rounds.features import Features

SHRINKAGE = 0.1
"""Share of the mean variance that is added to every direction of C, which is estimated."""


def whitened_features(
    model: LanguageModel, params: Any, prompts: Ragged, responses: Ragged, *, rows: int
) -> tuple[Features, int]:
    """Features and their number D, from pi0's parameters and its ``responses [B, K, C]``.

    Raises:
        ValueError: with fewer than two responses to a prompt.
    """
    if responses.ids.shape[1] < 2:
        raise ValueError("whitening needs at least two responses to each prompt.")

    def pooled(params: Any, prompts: Ragged, responses: Ragged) -> jax.Array:
        return rewards.features(model, params, prompts, responses, pooling=rewards.mean)

    program = mapped(pooled, rows=rows)
    hidden = np.asarray(program(params, prompts, responses), np.float64)
    centre = hidden.mean((0, 1))
    within = hidden - hidden.mean(1, keepdims=True)
    count, dim = within.shape[0] * (within.shape[1] - 1), within.shape[-1]
    covariance = np.einsum("bkd,bke->de", within, within) / count
    covariance += SHRINKAGE * np.trace(covariance) / dim * np.eye(dim)
    values, vectors = np.linalg.eigh(covariance)
    white = (vectors / np.sqrt(values * dim)) @ vectors.T

    def features(prompts: Ragged, responses: Ragged) -> np.ndarray:
        found = program(params, prompts, responses)
        return ((found - centre) @ white).astype(np.float32)

    return features, dim
