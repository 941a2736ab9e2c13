"""Token log-probabilities and their sums: float32 always, masks from lengths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_klrlhf.core import sequence


def reference(logits, tokens):
    """Log-softmax and gather in float64."""
    logits = np.asarray(logits, np.float64)
    log_prob = logits - np.log(
        np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)
    )
    log_prob = log_prob - logits.max(-1, keepdims=True)
    return np.take_along_axis(log_prob, np.asarray(tokens)[..., None], axis=-1)[..., 0]


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    logits = jnp.array(5 * rng.normal(size=(2, 3, 4, 7)), jnp.float32)
    tokens = jnp.array(rng.integers(7, size=(2, 3, 4)))
    return logits, tokens


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (1.0, 1e4), (1e3, 0.0)])
def test_token_log_prob_equals_float64(batch, scale, shift):
    logits, tokens = batch
    logits = logits * scale + shift
    got = sequence.token_log_prob(logits, tokens)
    assert got.dtype == jnp.float32
    # Relative to the shifted logits, which is what log-probabilities are made of. A version that
    # adds the shift back before subtracting is off by 1e-3 at a shift of 1e4.
    np.testing.assert_allclose(got, reference(logits, tokens), rtol=2e-6, atol=2e-6)


def test_gradient_is_one_hot_less_softmax(batch):
    logits, tokens = batch
    got = jax.grad(lambda z: jnp.sum(sequence.token_log_prob(z, tokens)))(logits)
    want = jax.nn.one_hot(tokens, 7) - jax.nn.softmax(logits)
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert jnp.isfinite(
        jax.grad(lambda z: sequence.token_log_prob(z, jnp.array(0)))(
            jnp.array([0.0, -jnp.inf, 1e4])
        )
    ).all()


def test_bfloat16_logits_are_widened_before_the_vocabulary_sum():
    # A vocabulary of 4096 equal logits: in bfloat16 the partition sum of ones sticks at 256.
    logits = jnp.zeros((1, 4096), jnp.bfloat16)
    got = sequence.token_log_prob(logits, jnp.array([5]))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, -np.log(4096), rtol=1e-6)
    slope = jax.grad(lambda z: sequence.token_log_prob(z, jnp.array([5]))[0])(logits)
    assert slope.dtype == jnp.bfloat16


def sequential_bfloat16(token_log_prob):
    total, _ = jax.lax.scan(
        lambda carry, x: (carry + x, None), jnp.zeros((), jnp.bfloat16), token_log_prob
    )
    return float(total)


def test_sums_avoid_the_bfloat16_trap():
    token = jnp.array(-0.08 * np.random.default_rng(0).random(2048), jnp.bfloat16)
    exact = np.asarray(token, np.float64).sum()
    # The trap itself, so that the test cannot pass on numbers that are too easy.
    assert sequential_bfloat16(token) > exact / 2
    everything = jnp.ones(2048, bool)
    total = sequence.sum_log_prob(token, where=everything)
    assert total.dtype == jnp.float32
    np.testing.assert_allclose(total, exact, rtol=1e-6)
    # And a log-ratio of 0.0065 between two sums of 4096 tokens survives.
    policy = jnp.full((4096,), -0.5).at[17].add(0.0065)
    where = jnp.ones(4096, bool)
    sums = [sequence.sum_log_prob(x, where=where) for x in (policy, jnp.full((4096,), -0.5))]
    np.testing.assert_allclose(sums[0] - sums[1], 0.0065, atol=5e-4)
    assert sums[0].astype(jnp.bfloat16) == sums[1].astype(jnp.bfloat16)


def test_padding_leaves_no_trace_in_value_or_gradient():
    rows = sequence.Ragged(jnp.zeros((2, 3), int), jnp.array([2, 0]))
    np.testing.assert_array_equal(rows.mask, [[True, True, False], [False] * 3])
    token = jnp.array([[-1.0, -2.0, jnp.nan], [jnp.inf, jnp.nan, -3.0]])
    total = sequence.sum_log_prob(token, where=rows.mask)
    np.testing.assert_array_equal(total, [-3.0, 0.0])
    slope = jax.grad(lambda x: jnp.sum(sequence.sum_log_prob(x, where=rows.mask)))(token)
    np.testing.assert_array_equal(slope, rows.mask)


def test_mask_counts_an_end_token_that_equals_the_pad_token():
    rows = sequence.Ragged(jnp.array([[[5, 7, 0, 0], [5, 0, 0, 0]]]), jnp.array([[3, 2]]))
    np.testing.assert_array_equal(rows.mask.sum(axis=-1), rows.lengths)


def test_pad_keeps_every_row_and_refuses_one_too_long():
    rows = [[3, 1], [], [2, 2, 2]]
    padded = sequence.pad(rows, length=4, pad_id=9)
    assert padded.ids.shape == (3, 4)
    kept = [ids[:n].tolist() for ids, n in zip(padded.ids, padded.lengths, strict=True)]
    assert kept == rows
    assert np.asarray(padded.ids)[~np.asarray(padded.mask)].tolist() == [9] * 7
    with pytest.raises(ValueError, match="a row has 3 tokens, more than length=2"):
        sequence.pad(rows, length=2)
