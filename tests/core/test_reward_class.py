"""Classes of rewards: the linear one is the core's fit; a network against NumPy, at its optimum."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jax_klrlhf.core import ellipsoid, estimation, preferences, reward_class

ROWS, DIM, HIDDEN = 24, 3, 2
RNG = np.random.default_rng(40)
BOTH = RNG.normal(size=(ROWS, 2, DIM))
LABELS = RNG.integers(0, 2, ROWS).astype(float)
WEIGHTS = RNG.integers(0, 3, ROWS).astype(float)


def network(parameters, features):
    return jnp.tanh(features @ parameters["in"]) @ parameters["out"]


def net():
    rng = np.random.default_rng(41)
    shapes = {"in": (DIM, HIDDEN), "out": (HIDDEN,)}
    init = {name: jnp.array(rng.normal(size=shape)) for name, shape in shapes.items()}
    return reward_class.RewardClass(network, init)


def by_hand(theta):
    """Reward and gradient of each row in NumPy; ``in`` comes first in the flat order."""
    into, out = theta[: DIM * HIDDEN].reshape(DIM, HIDDEN), theta[DIM * HIDDEN :]
    active = np.tanh(BOTH @ into)
    of_in = BOTH[..., :, None] * ((1 - active**2) * out)[..., None, :]
    return active @ out, np.concatenate([of_in.reshape(ROWS, 2, -1), active], -1)


def test_the_linear_class_is_the_core_fit(x64):
    """As a special case and as a user's own function, with weights and every kind of label."""
    own = reward_class.RewardClass(lambda p, x: x @ p["w"], {"w": jnp.zeros(DIM)})
    z = jnp.array(BOTH[:, 0] - BOTH[:, 1])
    given = {"ridge": 0.7, "weights": jnp.array(WEIGHTS)}
    labels = jnp.array(LABELS).at[:5].set(0.5)
    general = jax.jit(partial(reward_class.fit, **given))
    for link in (preferences.bradley_terry, preferences.rao_kupper(0.5)):
        want = jax.jit(partial(estimation.fit, **given))(z, labels, link=link)
        for one in (reward_class.linear, own):
            found = general(one, jnp.array(BOTH), labels, link=link)
            assert bool(found.converged)
            np.testing.assert_allclose(found.theta, want.theta, atol=1e-7)
            sigma = reward_class.confidence(one, found.theta, jnp.array(BOTH), **given)
            start = ellipsoid.init(DIM, ridge=0.7)
            state = ellipsoid.update(start, z, weights=given["weights"])
            np.testing.assert_allclose(sigma.precision, state.precision, rtol=1e-12)


def test_a_network_is_fitted_to_a_stationary_point_below_where_it_began(x64):
    """The gradient of F from the definition in NumPy; the ridge pulls to where it began, not 0."""
    one, ridge = net(), 0.5
    start = np.asarray(one.start(DIM))
    found = reward_class.fit(
        one, jnp.array(BOTH), jnp.array(LABELS), ridge=ridge, weights=jnp.array(WEIGHTS)
    )
    assert bool(found.converged)
    assert 1 < int(found.iterations) < 100

    def objective(theta):
        reward, slope = by_hand(theta)
        margin, z = reward[:, 0] - reward[:, 1], slope[:, 0] - slope[:, 1]
        nll = LABELS * np.logaddexp(0, -margin) + (1 - LABELS) * np.logaddexp(0, margin)
        error = WEIGHTS * (1 / (1 + np.exp(-margin)) - LABELS)
        away = theta - start
        return WEIGHTS @ nll + ridge / 2 * away @ away, z.T @ error + ridge * away

    value, slope = objective(np.asarray(found.theta))
    before, steep = objective(start)
    assert value < before
    assert np.abs(slope).max() < 1e-6 * np.abs(steep).max()
    sigma = reward_class.confidence(
        one, found.theta, jnp.array(BOTH), ridge=ridge, weights=jnp.array(WEIGHTS)
    )
    z = np.diff(by_hand(np.asarray(found.theta))[1], axis=1)[:, 0]
    want = ridge * np.eye(len(start)) + z.T @ (WEIGHTS[:, None] * z)
    np.testing.assert_allclose(sigma.precision, want, rtol=1e-10, atol=1e-12)


def test_weight_zero_is_deletion_and_a_worse_start_is_not_taken(x64):
    one, keep = net(), WEIGHTS > 0
    wide, labels = np.where(keep[:, None, None], BOTH, np.nan), np.where(keep, LABELS, np.nan)
    given = {"ridge": 0.5, "weights": jnp.array(WEIGHTS)}
    all_rows = reward_class.fit(one, jnp.array(wide), jnp.array(labels), **given)
    given["weights"] = jnp.array(WEIGHTS[keep])
    some = (jnp.array(BOTH[keep]), jnp.array(LABELS[keep]))
    fewer = reward_class.fit(one, *some, **given)
    # Descent ends at a decrement of the square root of the rounding.
    np.testing.assert_allclose(all_rows.theta, fewer.theta, atol=1e-6)
    far = reward_class.fit(one, *some, init=jnp.full_like(fewer.theta, 40.0), **given)
    np.testing.assert_allclose(far.theta, fewer.theta, atol=1e-12)
    near = reward_class.fit(one, *some, init=fewer.theta, **given)
    assert int(near.iterations) == 1


def test_gradients_stand_for_features_and_keep_their_axes():
    one = net()
    theta = one.start(DIM)
    features = jnp.array(RNG.normal(size=(2, 4, DIM)), "float32")
    slope = one.gradient(theta, features)
    assert slope.shape == (2, 4, len(theta))
    step = 1e-2 * jnp.ones_like(theta)
    moved = one.reward(theta + step, features) - one.reward(theta - step, features)
    np.testing.assert_allclose(moved / 2, slope @ step, atol=1e-5)
    assert one.reward(theta, features).shape == (2, 4)
    np.testing.assert_array_equal(ravel_pytree(one.init)[0], theta)
    linear = reward_class.linear
    np.testing.assert_array_equal(linear.gradient(jnp.ones(DIM), features), features)
    assert linear.start(DIM).tolist() == [0.0] * DIM
    jax.jit(lambda c, x: c.reward(c.start(DIM), x))(one, features)  # a pytree, its function static


def test_a_ridge_is_asked_for():
    with pytest.raises(ValueError, match="ridge must be > 0"):
        reward_class.fit(net(), jnp.array(BOTH), jnp.array(LABELS), ridge=0.0)
