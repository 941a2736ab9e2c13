"""The preference model against float64 NumPy, at extremes, and its sampler against its law."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jax_klrlhf.core import bradley_terry


def reference_nll(margin, label):
    """-y log s(m) - (1 - y) log s(-m), with log s(m) = -log(1 + e^-m) by logaddexp in float64."""
    margin, label = np.float64(margin), np.float64(label)
    return label * np.logaddexp(0, -margin) + (1 - label) * np.logaddexp(0, margin)


def test_nll_equals_the_formula_for_hard_and_soft_labels():
    margin, label = jnp.meshgrid(jnp.linspace(-30, 30, 41), jnp.array([0.0, 0.1, 0.5, 0.9, 1.0]))
    np.testing.assert_allclose(
        bradley_terry.nll(margin, label=label), reference_nll(margin, label), rtol=2e-6
    )
    np.testing.assert_allclose(
        bradley_terry.log_likelihood(margin), -reference_nll(margin, 1.0), rtol=2e-6
    )


@pytest.mark.parametrize(
    ("margin", "label", "loss", "slope"),
    [
        (1e4, 1.0, 0.0, 0.0),
        (-1e4, 1.0, 1e4, -1.0),
        (1e4, 0.0, 1e4, 1.0),
        (-1e4, 0.0, 0.0, 0.0),
        (1e4, 0.9, 1e3, 0.1),
        (0.0, 1.0, np.log(2), -0.5),
        (-200.0, 1.0, 200.0, -1.0),  # where -log(sigmoid) is infinite with a NaN gradient
    ],
)
def test_extreme_margins_have_finite_and_right_values_and_gradients(margin, label, loss, slope):
    got = jax.value_and_grad(lambda m: bradley_terry.nll(m, label=label))(jnp.array(margin))
    np.testing.assert_allclose(got, (loss, slope), rtol=1e-5)


def test_nll_is_symmetric_and_least_at_the_logit_of_the_label(x64):
    margin, label = jnp.linspace(-5, 5, 11), 0.3
    np.testing.assert_allclose(
        bradley_terry.nll(margin, label=label),
        bradley_terry.nll(-margin, label=1 - label),
        rtol=1e-14,
    )
    slope = jax.grad(lambda m: bradley_terry.nll(m, label=label))(jnp.log(label / (1 - label)))
    assert abs(slope) < 1e-15
    check_grads(
        jax.jit(lambda m: bradley_terry.nll(m, label=label)), (margin,), order=2, modes=["rev"]
    )


def test_curvature_is_the_second_derivative_and_the_gamma_of_the_theory(x64):
    margin = jnp.array([0.0, 0.3, -2.0, 8.0, -40.0])
    second = jax.vmap(jax.grad(jax.grad(bradley_terry.nll)))(margin)
    np.testing.assert_allclose(bradley_terry.curvature(margin), second, atol=1e-16)
    gamma = 1 / (2 + np.exp(-margin) + np.exp(margin))
    np.testing.assert_allclose(bradley_terry.curvature(margin), gamma, rtol=1e-12)
    assert bradley_terry.curvature(jnp.array(1e4)) == 0


def test_samples_follow_the_law():
    draws, probability = 100_000, np.array([0.5, 0.9, 0.02])
    margin = jnp.log(jnp.array(probability / (1 - probability), jnp.float32))
    sample = bradley_terry.sample(jax.random.key(0), jnp.broadcast_to(margin[:, None], (3, draws)))
    assert sample.shape == (3, draws)
    assert sample.dtype == bool
    # 4.5 standard errors on each of 3 + 1 numbers: a false alarm in 1 of 37,000 seeds.
    error = np.sqrt(probability * (1 - probability) / draws)
    frequency = np.asarray(sample.mean(axis=1, dtype=jnp.float32))
    assert (abs(frequency - probability) < 4.5 * error).all()
    # Rows are independent: the chance that the first two both say True is the product.
    both = float(jnp.mean(sample[0] & sample[1], dtype=jnp.float32))
    assert abs(both - 0.45) < 4.5 * np.sqrt(0.45 * 0.55 / draws)
