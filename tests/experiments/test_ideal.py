"""The posterior mean on a sphere, against quadrature and against what symmetry says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import ideal


@pytest.fixture(scope="module")
def sampled():
    """Compiled once for data of two dimensions: five rows of counts, zeros included."""

    @jax.jit
    def many(keys, differences, wins, losses):
        one = lambda key: ideal.posterior_mean(  # noqa: E731
            key, differences, wins, losses, bound=2.0, chains=2, steps=200, warm=50
        )
        return jax.vmap(one)(keys)

    return many


DIFFERENCES = jnp.array([[1.0, 0.2], [-0.3, 0.8], [0.5, -0.5], [0.1, 1.1], [1.2, 0.9]])


@pytest.mark.parametrize("scale", [0.0, 1.0, 40.0])
def test_the_mean_is_that_of_quadrature_on_the_circle(sampled, scale):
    """64 runs of their own keys: |z| > 5 for a right sampler in one of 1.7 million.

    Without data, with a few, and with so many that the posterior is narrow: there the chains must
    have come from their random starts.
    """
    wins, losses = np.array([3.0, 1, 0, 2, 2]) * scale, np.array([1.0, 2, 1, 0, 1]) * scale
    found = np.asarray(
        sampled(
            jax.random.split(jax.random.key(0), 64), DIFFERENCES,
            jnp.asarray(wins, jnp.float32), jnp.asarray(losses, jnp.float32),
        ),
        np.float64,
    )  # fmt: skip
    angle = np.linspace(0, 2 * np.pi, 20_000, endpoint=False)
    circle = 2 * np.stack([np.cos(angle), np.sin(angle)], 1)
    margin = circle @ np.asarray(DIFFERENCES, np.float64).T
    log = -(np.logaddexp(0, -margin) @ wins + np.logaddexp(0, margin) @ losses)
    weight = np.exp(log - log.max())
    exact = weight @ circle / weight.sum()
    stderr = found.std(0, ddof=1) / 8
    assert (np.abs(found.mean(0) - exact) < 5 * stderr + 1e-4).all()
    assert (stderr < 0.05).all()
