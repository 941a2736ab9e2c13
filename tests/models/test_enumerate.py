"""Enumerated laws: they sum to 1, agree with brute force, and with what is sampled."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_klrlhf.core import choices, divergence, targets
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models import enumerate as enumerated
from tests.models import toy

MODEL = toy.language_model(vocab=3)
PROMPTS = Ragged(jnp.array([[1, 2], [2, 0]]), jnp.array([2, 1]))


@pytest.mark.slow
def test_every_response_once_and_the_law_is_the_brute_force_one():
    every = enumerated.responses(vocab_size=3, max_new_tokens=3, stop=(0,))
    params = MODEL.init(jax.random.key(0))
    found = np.asarray(enumerated.log_prob(MODEL, params, PROMPTS, every), np.float64)
    np.testing.assert_allclose(np.exp(found).sum(1), 1, rtol=1e-5)
    for row, prompt in enumerate(([1, 2], [2])):
        law = toy.enumerate_law(params, prompt, max_new_tokens=3, stop=(0,))
        ids = [
            tuple(r[:n].tolist())
            for r, n in zip(np.asarray(every.ids), np.asarray(every.lengths), strict=True)
        ]
        assert len(ids) == len(set(ids))
        assert set(ids) == set(law)
        np.testing.assert_allclose(np.exp(found[row]), [law[i] for i in ids], rtol=1e-5)
        cold = enumerated.log_prob(enumerated.tempered(MODEL, 0.5), params, PROMPTS, every)
        warped = toy.enumerate_law(
            params, prompt, max_new_tokens=3, stop=(0,), warp=lambda logits: logits / 0.5
        )
        np.testing.assert_allclose(np.exp(cold[row]), [warped[i] for i in ids], rtol=1e-5)


@pytest.mark.parametrize("reward", [[0.3, -1.0, 2.0, 0.1], [1.0, 0.0, 1.0, 0.0], [1.0] * 4])
def test_best_of_n_is_the_enumerated_one(reward, x64):
    """All 4^3 triples of draws, each weighted; among equal best draws every one is as likely."""
    prob, reward = np.array([0.1, 0.4, 0.2, 0.3]), np.array(reward)
    expected = np.zeros(4)
    for triple in itertools.product(range(4), repeat=3):
        best = [a for a in triple if reward[a] == reward[list(triple)].max()]
        for action in best:
            expected[action] += prob[list(triple)].prod() / len(best)
    every = choices.enumerated(jnp.log(jnp.array(prob)), reward=jnp.array(reward))
    found = targets.best_of(every, n=3)
    np.testing.assert_allclose(np.exp(found), expected, rtol=1e-12)
    bound = np.log(3) - 2 / 3
    assert divergence.categorical(found, jnp.log(jnp.array(prob))) <= bound + 1e-12
