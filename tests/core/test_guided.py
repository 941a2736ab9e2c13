"""Guidance by values of prefixes: exact on a tree of every response of length 3 over 3 tokens."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_klrlhf.core import divergence, gibbs, guided

V, LENGTH, ETA = 3, 3, 0.4
RNG = np.random.default_rng(0)
# log pi0 of the next token at every prefix, by length of the prefix.
NEXT = [
    np.log(RNG.dirichlet(np.ones(V), size=(V,) * depth))
    if depth
    else np.log(RNG.dirichlet(np.ones(V)))
    for depth in range(LENGTH)
]
REWARD = RNG.normal(size=(V,) * LENGTH)

pytestmark = pytest.mark.usefixtures("x64")


def _whole(tables):
    """Log-probability of every response, from the laws of the next token."""
    total = np.zeros((V,) * LENGTH)
    for path in itertools.product(range(V), repeat=LENGTH):
        total[path] = sum(float(tables[d][path[: d + 1]]) for d in range(LENGTH))
    return total


def _values(up):
    """Values of all prefixes, by depth: V at depth d is ``[V] * d``."""
    found = [jnp.asarray(REWARD)]
    for depth in reversed(range(LENGTH)):
        found.insert(0, up(jnp.asarray(NEXT[depth]), found[0]))
    return found


def _guided(values):
    return [
        guided.log_prob(jnp.asarray(NEXT[d]), values[d + 1], kl_coef=ETA) for d in range(LENGTH)
    ]


def _gibbs():
    flat = gibbs.log_prob(
        jnp.asarray(REWARD.ravel()), jnp.asarray(_whole(NEXT).ravel()), kl_coef=ETA
    )
    return np.asarray(flat).reshape((V,) * LENGTH)


def test_soft_values_give_the_gibbs_law_of_whole_responses():
    soft = _values(lambda p, v: guided.soft_value(p, v, kl_coef=ETA))
    np.testing.assert_allclose(_whole(_guided(soft)), _gibbs(), atol=1e-12)
    # Log-ratios of a path sum to (r - V(root)) / eta.
    ratio = _whole(_guided(soft)) - _whole(NEXT)
    np.testing.assert_allclose(ratio, (REWARD - float(soft[0])) / ETA, atol=1e-12)


def test_mean_values_give_another_law_below_the_frontier():
    mean = _values(guided.mean_value)
    law = _whole(_guided(mean)).ravel()
    assert np.abs(np.exp(law) - np.exp(_gibbs().ravel())).sum() / 2 > 0.02
    ref, reward = jnp.asarray(_whole(NEXT).ravel()), jnp.asarray(REWARD.ravel())
    np.testing.assert_allclose(float(mean[0]), float(jnp.exp(ref) @ reward), rtol=1e-12)
    spent = float(divergence.categorical(jnp.asarray(law), ref))
    # The Gibbs law of equal KL earns more.
    low, high = 1e-3, 1e3
    for _ in range(100):
        middle = np.sqrt(low * high)
        kl = float(divergence.categorical(gibbs.log_prob(reward, ref, kl_coef=middle), ref))
        low, high = (middle, high) if kl > spent else (low, middle)
    best = jnp.exp(gibbs.log_prob(reward, ref, kl_coef=high)) @ reward
    assert float(best) > float(np.exp(law) @ REWARD.ravel()) + 1e-3


def test_resampling_gives_each_particle_its_share_of_children():
    log_weight = jnp.log(jnp.array([0.1, 2.0, 0.0, 1.3, 0.6]))
    keys = jax.random.split(jax.random.key(1), 4000)
    at, log_mean = jax.vmap(lambda key: guided.resample(key, log_weight))(keys)
    np.testing.assert_allclose(log_mean, np.log(4.0 / 5), rtol=1e-12)
    children = (np.asarray(at)[:, :, None] == np.arange(5)).sum(1)
    share = 5 * np.array([0.1, 2.0, 0.0, 1.3, 0.6]) / 4
    assert (children >= np.floor(share)).all()
    assert (children <= np.ceil(share)).all()
    # Each count is floor or floor + 1, so its variance is at most 1/4: standard error 0.008 at
    # most; 5 of them are a false alarm in fewer than 3 of a million runs (the seed is fixed).
    assert np.abs(children.mean(0) - share).max() < 5 * 0.5 / np.sqrt(4000)


@pytest.mark.slow
def test_particles_estimate_z_without_bias_and_one_particle_is_pi0():
    """Particles on the tree with a poor twist (half the mean value): E Z-hat = Z."""
    twist = [0.5 * v for v in _values(guided.mean_value)[:-1]]
    twist[0] = jnp.zeros(())
    values = [*twist, jnp.asarray(REWARD)]
    log_z = float(jax.scipy.special.logsumexp(jnp.asarray(_whole(NEXT) + REWARD / ETA)))

    def run(key, particles):
        paths = jnp.zeros((particles, 0), jnp.int32)
        log_total = jnp.zeros(())
        for depth in range(LENGTH):
            key, key_next, key_resample = jax.random.split(key, 3)
            at = tuple(paths.T)
            law = jnp.broadcast_to(jnp.asarray(NEXT[depth])[at], (particles, V))
            token = jax.random.categorical(key_next, law)
            before = jnp.broadcast_to(values[depth][at], (particles,))
            paths = jnp.concatenate([paths, token[:, None].astype(jnp.int32)], 1)
            grown = (values[depth + 1][tuple(paths.T)] - before) / ETA
            ancestors, log_mean = guided.resample(key_resample, grown)
            paths, log_total = paths[ancestors], log_total + log_mean
        return log_total, paths

    keys = jax.random.split(jax.random.key(2), 20_000)
    log_hat, _ = jax.vmap(lambda key: run(key, 4))(keys)
    ratio = np.exp(np.asarray(log_hat) - log_z)
    error = ratio.std() / np.sqrt(len(ratio))
    assert error < 0.02
    # Two-sided at 4.5 standard errors: a false alarm in 7 of a million (the seed is fixed).
    assert abs(ratio.mean() - 1) < 4.5 * error
    _, alone = jax.vmap(lambda key: run(key, 1))(keys)
    number = np.ravel_multi_index(np.asarray(alone)[:, 0].T, (V,) * LENGTH)
    seen = np.bincount(number, minlength=V**LENGTH)
    expected = len(keys) * np.exp(_whole(NEXT).ravel())
    chi_squared = ((seen - expected) ** 2 / expected).sum()
    # 26 degrees of freedom: above 66.0 in 2 of 100,000 runs.
    assert chi_squared < 66.0
