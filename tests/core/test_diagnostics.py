"""Displacement of likelihoods: the derivative, and an example where the chosen one falls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_klrlhf.core import diagnostics, diversity

pytestmark = pytest.mark.usefixtures("x64")


def test_displacement_is_the_derivative_along_the_step():
    rng = np.random.default_rng(0)
    features, theta, direction = (jnp.asarray(rng.normal(size=s)) for s in ((2, 5, 3), 3, 3))

    def law(theta):
        return jax.nn.log_softmax(features @ theta)

    log_prob, wanted = jax.jvp(law, (theta,), (direction,))
    along = jnp.broadcast_to(direction, (2, 3))
    np.testing.assert_allclose(
        diagnostics.displacement(features, log_prob, along), wanted, atol=1e-12
    )


def test_the_chosen_falls_where_its_kappa_is_below_the_mean_while_the_margin_rises():
    """Three actions: DPO's direction moves mass to a third, which was compared with nothing."""
    features = jnp.array([[1.0, 0.1], [1.0, -0.1], [3.0, 2.0]])
    direction = features[0] - features[1]
    logits = jnp.log(jnp.array([0.3, 0.65, 0.05]))
    for _ in range(300):
        log_prob = jax.nn.log_softmax(logits)
        moved = diagnostics.displacement(features, log_prob, direction)
        assert float(moved[0] - moved[1]) > 0  # the margin grows all the way
        kappa = features @ direction
        falls = float(kappa[0]) < float(jnp.exp(log_prob) @ kappa)
        assert falls == (float(moved[0]) < 0)
        logits = logits + 0.1 * features @ direction
    after = jnp.exp(jax.nn.log_softmax(logits))
    assert float(after[0]) < 0.01
    assert float(after[2]) > 0.98
    assert float(diversity.top(jnp.log(after), k=3).entropy) < 0.1
