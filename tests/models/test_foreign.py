"""A Flax module of one's own: scored, sampled and trained like the library's own decoder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jax_klrlhf import models
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models import sampling, scoring

V, LONGEST = 7, 12


class Gated(nn.Module):
    """Causal and position-aware: learned positions, a running mean, a gate."""

    @nn.compact
    def __call__(self, ids, *, deterministic: bool):
        x = nn.Embed(V, 6)(ids)
        x = (
            x
            + self.param("positions", nn.initializers.normal(1.0), (LONGEST, 6))[
                None, : ids.shape[1]
            ]
        )
        x = nn.Dropout(0.9, deterministic=deterministic)(x)
        count = jnp.arange(1, ids.shape[1] + 1, dtype=x.dtype)[None, :, None]
        mean = jnp.cumsum(x, axis=1) / count
        return 3.0 * nn.Dense(V)(jnp.tanh(nn.Dense(6)(mean) * x))


MODULE = Gated()
MODEL = models.from_flax(MODULE, max_length=LONGEST, deterministic=True)
PARAMS = MODEL.init(jax.random.key(0))
# As wide as the context by itself: with the responses' width, padding goes beyond it.
PROMPTS = Ragged(
    jnp.asarray(np.random.default_rng(0).integers(0, V, (3, 9)), jnp.int32),
    jnp.array([7, 1, 4], jnp.int32),
)
RESPONSES = Ragged(
    jnp.asarray(np.random.default_rng(1).integers(0, V, (3, 2, 5)), jnp.int32),
    jnp.array([[5, 2], [0, 5], [1, 3]], jnp.int32),
)


LENGTHS = np.asarray(PROMPTS.lengths), np.asarray(RESPONSES.lengths)


def alone(params):
    """Log-probability of each response, from one unpadded row each."""
    found = {}
    for b, k in np.ndindex(3, 2):
        n, c = int(LENGTHS[0][b]), int(LENGTHS[1][b, k])
        row = jnp.concatenate([PROMPTS.ids[b, :n], RESPONSES.ids[b, k, :c]])
        law = jax.nn.log_softmax(MODULE.apply(params, row[None], deterministic=True)[0])
        found[b, k] = law[jnp.arange(n - 1, n - 1 + c), row[n:]].sum()
    return jnp.stack([found[i] for i in np.ndindex(3, 2)]).reshape(3, 2)


def test_scores_are_those_of_each_row_alone_in_value_and_gradient():
    assert (MODEL.vocab_size, MODEL.max_length) == (V, LONGEST)
    weight = jnp.arange(1.0, 7.0).reshape(3, 2)

    def ours(params):
        found = scoring.log_prob(MODEL, params, PROMPTS, RESPONSES, chunk=4)
        return (weight * found).sum(), found

    def theirs(params):
        found = alone(params)
        return (weight * found).sum(), found

    grads, found = jax.jit(jax.grad(ours, has_aux=True))(PARAMS)
    expected_grads, expected = jax.jit(jax.grad(theirs, has_aux=True))(PARAMS)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(expected).max() > 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), grads, expected_grads)


def test_samples_carry_the_log_probabilities_of_scoring():
    drawn = sampling.generate(
        jax.random.key(1), MODEL, PARAMS, PROMPTS, samples=4, max_new_tokens=5, stop=(2,)
    )
    score = jax.jit(scoring.token_log_prob, static_argnums=0)
    scored = score(MODEL, PARAMS, PROMPTS, drawn.responses)
    np.testing.assert_allclose(drawn.token_log_prob, scored, atol=1e-5)
    assert (sampling.mismatch(drawn, scored) < 1e-4).all()
    assert len(np.unique(drawn.responses.lengths)) > 1
    # What a response is off by, in nats, is the mismatch.
    off = scored.at[0, 1, 0].add(0.25)
    np.testing.assert_allclose(sampling.mismatch(drawn, off)[0, 1], 0.25, atol=1e-4)


def test_greedy_decoding_is_reading_the_row_again():
    drawn = sampling.generate(
        jax.random.key(1), MODEL, PARAMS, PROMPTS, samples=1, max_new_tokens=5, temperature=0.0
    )
    read = jax.jit(lambda row: MODULE.apply(PARAMS, row[None], deterministic=True)[0])
    for b, ids in enumerate(np.asarray(drawn.responses.ids)[:, 0]):
        row, length = np.zeros(LONGEST, np.int32), int(PROMPTS.lengths[b])
        row[:length] = PROMPTS.ids[b, :length]
        for token in ids:
            assert token == int(read(row)[length - 1].argmax())
            row[length], length = token, length + 1


def test_other_outputs_are_refused():
    class Pooled(nn.Module):
        @nn.compact
        def __call__(self, ids):
            return nn.Embed(V, 6)(ids).mean(1)

    class Two(nn.Module):
        @nn.compact
        def __call__(self, ids):
            x = nn.Embed(V, 6)(ids)
            return x, x

    for module in (Pooled(), Two()):
        with pytest.raises(ValueError, match=r"is one array of logits, \[rows, T, vocabulary\]"):
            models.from_flax(module, max_length=4)
