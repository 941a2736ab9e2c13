"""Exact divergences, and the table of what each sample estimator estimates, proved."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jax_klrlhf.core import divergence


def brute_force(p, q):
    return sum(a * (np.log(a) - np.log(b)) for a, b in zip(p, q, strict=True) if a > 0)


def simplex(seed, *shape):
    weight = np.random.default_rng(seed).exponential(size=shape)
    return weight / weight.sum(axis=-1, keepdims=True)


def test_categorical_equals_brute_force_and_is_zero_only_at_equality(x64):
    p, q = simplex(0, 2, 3, 5), simplex(1, 2, 3, 5)
    got = divergence.categorical(jnp.log(p), jnp.log(q))
    want = [
        [brute_force(a, b) for a, b in zip(*rows, strict=True)] for rows in zip(p, q, strict=True)
    ]
    np.testing.assert_allclose(got, want, rtol=1e-12)
    assert (got > 0).all()
    np.testing.assert_array_equal(divergence.categorical(jnp.log(p), jnp.log(p)), 0)


def test_zero_probability_and_masks_leave_no_trace_in_value_or_gradient(x64):
    p, q = simplex(2, 6), simplex(3, 6)
    log_p = jnp.log(p).at[1].set(-jnp.inf)  # not in p
    log_q = jnp.log(q).at[2].set(-jnp.inf)  # not in q, and masked
    log_p, log_q = log_p.at[2].set(jnp.nan), log_q.at[4].set(jnp.nan)
    where = jnp.array([True, True, False, True, False, True])
    kept = np.array([0, 3, 5])

    got = jax.jit(jax.value_and_grad(divergence.categorical, (0, 1)))(log_p, log_q, where=where)
    want = jax.jit(jax.value_and_grad(lambda a, b: jnp.exp(a) @ (a - b), (0, 1)))(
        jnp.log(p[kept]), jnp.log(q[kept])
    )
    np.testing.assert_allclose(got[0], want[0], rtol=1e-13)
    for slope, expected in zip(got[1], want[1], strict=True):
        np.testing.assert_allclose(slope[kept], expected, rtol=1e-12)
        np.testing.assert_array_equal(np.delete(slope, kept), 0)


def test_leaving_the_support_costs_infinity_with_a_finite_gradient():
    log_p, log_q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([1.0, 0.0]))
    cost, slopes = jax.value_and_grad(divergence.categorical, (0, 1))(log_p, log_q)
    assert cost == jnp.inf
    assert jnp.isfinite(jnp.stack(slopes)).all()
    np.testing.assert_allclose(divergence.categorical(log_q, log_p), np.log(2), rtol=1e-6)
    nobody = jnp.zeros(2, bool)
    assert divergence.categorical(log_p, log_q, where=nobody) == 0


def test_gradient_through_a_softmax(x64):
    logits, log_q = jnp.log(simplex(4, 5)), jnp.log(simplex(5, 5))

    @jax.jit
    def cost(logits):
        return divergence.categorical(jax.nn.log_softmax(logits), log_q)

    check_grads(cost, (logits,), order=2, modes=["rev"])


@pytest.fixture
def enumerated(x64):
    """Logits of a 4-action policy and a reference: expectations over it are exact sums."""
    return jnp.array([0.3, -1.0, 0.8, 0.1]), jnp.log(simplex(7, 4))


def expected_sample_loss(estimator):
    """Mean of the estimator over a ~ pi, the sample held fixed under differentiation."""

    def loss(logits, ref_log_prob):
        log_prob = jax.nn.log_softmax(logits)
        weight = jax.lax.stop_gradient(jnp.exp(log_prob))
        return jnp.sum(weight * estimator(log_prob - ref_log_prob))

    return loss


def kl(logits, ref_log_prob):
    return divergence.categorical(jax.nn.log_softmax(logits), ref_log_prob)


def kl_to_policy(logits, ref_log_prob):
    return divergence.categorical(ref_log_prob, jax.nn.log_softmax(logits))


def test_table_values_k1_and_k3_are_unbiased_and_k2_to_second_order(enumerated):
    logits, ref_log_prob = enumerated
    for unbiased in (divergence.k1, divergence.k3):
        np.testing.assert_allclose(
            expected_sample_loss(unbiased)(logits, ref_log_prob),
            kl(logits, ref_log_prob),
            rtol=1e-12,
        )
    # The error of k2 is of third order: a step ten times smaller divides it by a thousand.
    step = jnp.array([1.0, -2.0, 0.5, 0.0])
    errors = [
        expected_sample_loss(divergence.k2)(z, jax.nn.log_softmax(logits))
        - kl(z, jax.nn.log_softmax(logits))
        for z in (logits + 1e-2 * step, logits + 1e-3 * step)
    ]
    assert 900 < errors[0] / errors[1] < 1100


@pytest.mark.parametrize(
    ("estimator", "objective"),
    [
        (divergence.k1, lambda logits, ref_log_prob: 0.0 * jnp.sum(logits)),
        (divergence.k2, kl),
        (divergence.k3, kl_to_policy),
    ],
    ids=["k1-zero", "k2-reverse", "k3-forward"],
)
def test_table_gradients_as_a_sample_loss(enumerated, estimator, objective):
    got = jax.grad(expected_sample_loss(estimator))(*enumerated)
    want = jax.grad(objective)(*enumerated)
    np.testing.assert_allclose(got, want, atol=1e-14)
    # The three gradients differ, or the table would say nothing.
    assert abs(jax.grad(kl)(*enumerated) - jax.grad(kl_to_policy)(*enumerated)).max() > 0.1


def test_k3_is_never_negative_where_k1_is():
    log_ratio = jnp.linspace(-20.0, 20.0, 101)
    assert (divergence.k3(log_ratio) >= 0).all()
    small = jnp.array([1e-3, -1e-3])  # expm1: without it float32 leaves no digit of 5e-7
    np.testing.assert_allclose(divergence.k3(small), [5e-7, 5e-7], rtol=1e-3)
