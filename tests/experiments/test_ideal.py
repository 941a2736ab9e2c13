"""The posterior mean on a sphere, against quadrature, and where half of it is hardly seen."""

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


@pytest.mark.slow
def test_directions_that_are_never_seen_have_no_mean_and_the_chains_know_it():
    """Of eight coordinates four are seen, well: the posterior is symmetric in the others. 32 runs'
    means there have at most the deviation of 100 independent draws of a coordinate: a sampler that
    mixes as a random walk does, 1 draw in 100, has 3 times that, in 1,200 steps."""
    rng = np.random.default_rng(1)
    differences = np.zeros((512, 8), np.float32)
    differences[:, :4] = rng.normal(size=(512, 4)) / 2
    theta = np.array([1.2, -0.9, 0.6, 0.3])
    wins = (rng.uniform(size=512) < 1 / (1 + np.exp(-differences[:, :4] @ theta))).astype(float)
    rows = jnp.asarray(differences), jnp.asarray(wins, jnp.float32)
    one = lambda key: ideal.posterior_mean(  # noqa: E731
        key, *rows, 1 - rows[1], bound=3.0
    )
    found = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 32)), np.float64)
    # What norm is left for the four, each with the same share.
    deviation = np.sqrt((9 - (found[:, :4].mean(0) ** 2).sum()) / 4)
    assert np.sqrt((found[:, 4:] ** 2).mean()) < deviation / 10
