"""What is asked, and whom: against brute force, and against asking by distance or at random."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_klrlhf.core import estimation, posterior, select
from jax_klrlhf.core.choices import enumerated
from jax_klrlhf.core.ellipsoid import Ellipsoid

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture
def choices():
    rng = np.random.default_rng(0)
    square = rng.normal(size=(3, 3))
    where = np.ones((2, 5), bool)
    where[0, 1] = False
    features = rng.normal(size=(2, 5, 3))
    features[0, 1] = np.nan
    return enumerated(
        jnp.full((2, 5), -np.log(5)),
        where=jnp.array(where),
        reward=jnp.array(3 * rng.normal(size=(2, 5))),
        features=jnp.array(features),
        ellipsoid=Ellipsoid(jnp.array(square @ square.T + np.eye(3)), jnp.array(1.0)),
        # What is masked would beat all others.
        rewards=jnp.array(rng.normal(size=(2, 2, 5))).at[:, 0, 1].set(9.0),
    )


@pytest.mark.parametrize("score", [posterior.information, select.fisher])
def test_the_pair_is_the_best_by_its_score(choices, score):
    covariance = np.linalg.inv(choices.ellipsoid.precision)
    for row in range(2):
        best = (-1.0, None)
        for i in range(5):
            for j in range(i):
                if not (choices.where[row, i] and choices.where[row, j]):
                    continue
                z = np.asarray(choices.features[row, i] - choices.features[row, j])
                margin = choices.reward[row, i] - choices.reward[row, j]
                best = max(best, (float(score(margin, jnp.array(z @ covariance @ z))), (j, i)))
        pair = select.most_informative(jax.random.key(0), choices, score=score)
        assert sorted([int(pair.first[row]), int(pair.second[row])]) == list(best[1])
        assert pair.valid[row]
    orders = {
        int(select.most_informative(jax.random.key(k), choices, score=score).first[1])
        for k in range(8)
    }
    assert len(orders) == 2
    worth = np.asarray(select.value(choices, score=score))
    np.testing.assert_allclose(worth, np.swapaxes(worth, -1, -2), rtol=1e-9)
    assert not worth[0, 1].any()
    assert not worth[0, :, 1].any()
    same = choices._replace(features=jnp.zeros((2, 5, 3)))
    assert not select.most_informative(jax.random.key(0), same, score=score).valid.any()


def test_contexts_annotators_fronts_and_trees(choices):
    worth = jnp.array([0.1, 0.9, 0.5])
    assert select.contexts(worth, count=2).tolist() == [1, 2]
    with pytest.raises(ValueError, match="count"):
        select.contexts(worth, count=4)
    who = select.for_annotator(
        jnp.zeros(3), jnp.array([0.1, 1.0, 4.0]), flip_rate=jnp.array([0.3, 0.05, 0.5])
    )
    assert who.tolist() == [1, 1, 1]
    cheap = select.for_annotator(
        jnp.zeros(1), jnp.ones(1), flip_rate=jnp.array([0.1, 0.05]), cost=jnp.array([1.0, 9.0])
    )
    assert cheap.tolist() == [0]
    front = np.asarray(select.non_dominated(choices))
    for row in range(2):
        kept = np.flatnonzero(choices.where[row])
        points = np.asarray(choices.rewards[:, row]).T
        for i in range(5):
            beaten = any(
                (points[j] >= points[i]).all() and (points[j] > points[i]).any() for j in kept
            )
            assert front[row, i] == (i in kept and not beaten)
    # As long as the prefix is enough.
    ids = jnp.array([[1, 2, 3], [1, 2, 0], [1, 3, 3], [1, 2, 0]])
    pairs = select.shared_prefix(ids, jnp.array([3, 2, 3, 1]), depth=2)
    assert np.argwhere(pairs).tolist() == [[0, 1], [1, 0]]


@pytest.mark.slow
def test_asking_by_distance_is_worse_than_random_at_large_margins_and_by_information_is_not():
    """Error of theta after 40 labels of a pool; at |theta| = 10, paired over 48 worlds."""

    def learn(key, score, n=40, pool=200, dim=4):
        keys = jax.random.split(key, 3)
        theta = jax.random.normal(keys[0], (dim,))
        theta = 10 * theta / jnp.sqrt(theta @ theta)
        z = jax.random.normal(keys[1], (pool, dim)) / jnp.sqrt(dim)

        def step(carry, number):
            asked, y, estimate = carry
            heard = jnp.where(jnp.arange(n) < number, 1.0, 0.0)
            hessian = estimation.hessian(estimate, z[asked], ridge=1.0, weights=heard)
            moments = posterior.margin(posterior.laplace(estimate, hessian), z)
            fresh = jax.random.fold_in(keys[2], number)
            noise = jax.random.uniform(fresh, (pool,))
            pick = jnp.argmax(jnp.stack([noise, moments.variance, select.fisher(*moments)])[score])
            said = jax.random.bernoulli(fresh, jax.nn.sigmoid(z[pick] @ theta))
            asked = asked.at[number].set(pick)
            y = y.at[number].set(jnp.where(said, 1.0, 0.0))
            heard = jnp.where(jnp.arange(n) <= number, 1.0, 0.0)
            fit = estimation.fit(z[asked], y, ridge=1.0, weights=heard, init=estimate, iterations=6)
            return (asked, y, fit.theta), None

        start = (jnp.zeros(n, int), jnp.zeros(n), jnp.zeros(dim))
        (_, _, estimate), _ = jax.lax.scan(step, start, jnp.arange(n))
        return jnp.sqrt(jnp.sum((estimate - theta) ** 2)) / 10

    keys = jax.random.split(jax.random.key(0), 48)
    error = jax.jit(jax.vmap(jax.vmap(learn, in_axes=(None, 0)), in_axes=(0, None)))(
        keys, jnp.arange(3)
    )
    gain = error[:, :1] - error[:, 1:]
    stderr = gain.std(0) / np.sqrt(48)
    # Distance asks for what is known; information is no worse than random, and better than it.
    assert gain[:, 0].mean() < -4 * stderr[0]
    assert gain[:, 1].mean() > -2 * stderr[1]
    apart = gain[:, 1] - gain[:, 0]
    assert apart.mean() > 4 * apart.std() / np.sqrt(48)
