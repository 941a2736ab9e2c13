"""The record that both worlds share: mass, copies, draws, and what absent fields say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_klrlhf.core import choices, ellipsoid

RNG = np.random.default_rng(3)
LOG_PROB = jax.nn.log_softmax(jnp.array(RNG.normal(size=(4, 5)), "float32")).at[1, 2].set(-jnp.inf)
LOG_PROB = jax.nn.log_softmax(LOG_PROB)
PHI = jnp.array(RNG.normal(size=(4, 5, 3)), "float32")


def every():
    where = jnp.ones((4, 5), bool).at[0, 1].set(False)
    log_prob = jax.nn.log_softmax(jnp.where(where, LOG_PROB, -jnp.inf))
    return choices.enumerated(
        log_prob,
        where=where,
        reward=PHI[..., 0].at[0, 1].set(jnp.nan),
        features=PHI.at[0, 1].set(jnp.nan),
        ellipsoid=ellipsoid.init(3, ridge=1.0),
        rewards=jnp.stack([PHI[..., 1], PHI[..., 2]]),
        context_prob=jnp.array([0.4, 0.3, 0.2, 0.1]),
    )


def test_expectations_of_listed_choices_are_sums_by_probability():
    listed = every()
    prob = np.exp(np.asarray(listed.log_mass, np.float64))
    phi = np.nan_to_num(np.asarray(listed.features))
    found = choices.expectation(listed, listed.features)
    np.testing.assert_allclose(found, np.einsum("xa,xad->xd", prob, phi), rtol=1e-5)
    np.testing.assert_allclose(
        choices.over_contexts(listed, found),
        np.array([0.4, 0.3, 0.2, 0.1]) @ np.einsum("xa,xad->xd", prob, phi),
        rtol=1e-5,
    )
    slope = jax.grad(lambda v: choices.expectation(listed, v).sum())(listed.reward)
    np.testing.assert_allclose(slope, prob, atol=1e-6)


def test_expectations_over_draws_are_means_whatever_the_copies():
    """And the draws follow the policy: chi-squared at a false-alarm rate of 1e-6 for each row."""
    listed, samples = every(), 20_000
    found = jax.jit(choices.sample, static_argnums=2)(jax.random.key(0), listed, 64)
    values = np.take_along_axis(np.asarray(listed.features)[..., 0], np.asarray(found.number), 1)
    np.testing.assert_allclose(
        choices.expectation(found, found.features[..., 0]), values.mean(1), rtol=1e-4, atol=1e-5
    )
    for row in range(4):  # One choice of each kind, with the mass of all its copies.
        kept = np.asarray(found.number)[row][np.asarray(found.where)[row]]
        assert sorted(kept) == sorted(set(np.asarray(found.number)[row].tolist()))
    np.testing.assert_array_equal(
        found.rewards[1], np.take_along_axis(listed.rewards[1], found.number, 1)
    )
    # The law of the draws. 30.7 is the 1 - 1e-6 quantile of chi-squared with 3 degrees of freedom,
    # 33.4 with 4: rows 0 and 1 have four possible choices.
    wide = jax.tree.map(lambda x: jnp.repeat(x, samples // 4, 0), (listed.log_prob, listed.where))
    draws = choices.sample(jax.random.key(1), choices.enumerated(wide[0], where=wide[1]), 4).number
    for row in range(4):
        own = np.asarray(draws)[row * samples // 4 : (row + 1) * samples // 4]
        count = np.bincount(own.ravel(), minlength=5)
        want = samples * np.exp(np.asarray(listed.log_mass[row], np.float64))
        possible = want > 0
        assert count[~possible].sum() == 0
        statistic = ((count - want)[possible] ** 2 / want[possible]).sum()
        assert statistic < (30.7 if row < 2 else 33.4)


def test_copies_are_of_one_agent_and_masked_draws_are_no_ones_copy():
    rows = jnp.array([[1], [1], [2], [1], [2], [2]])
    where = jnp.array([False, True, True, True, True, True])
    agent = jnp.array([0, 0, 0, 0, 1, 1])
    found = choices.drawn(rows, where=where, agent=agent)
    assert found.where.tolist() == [False, True, True, False, True, False]
    np.testing.assert_allclose(jnp.exp(found.log_mass), [0, 2 / 3, 1 / 3, 0, 1, 0], rtol=1e-6)
    np.testing.assert_allclose(found.mass, [0, 2 / 3, 1 / 3, 0, 0, 0], rtol=1e-6)
    nothing = choices.drawn(rows, where=jnp.zeros(6, bool))
    assert not nothing.mass.any()
    assert float(choices.expectation(nothing, jnp.ones(6))) == 0.0


def test_the_law_is_static_and_the_rest_is_a_pytree():
    listed = every()
    seen = []

    @jax.jit
    def look(given):
        seen.append(given.law)
        return given

    drawn = choices.sample(jax.random.key(0), listed, 3)
    assert (look(listed).law, look(drawn).law) == (choices.ENUMERATED, choices.DRAWN)
    assert seen == [choices.ENUMERATED, choices.DRAWN]
    mapped = jax.vmap(lambda row: choices.expectation(row, row.reward))(
        listed._replace(ellipsoid=None, rewards=None)
    )
    np.testing.assert_allclose(mapped, choices.expectation(listed, listed.reward), rtol=1e-6)


def test_an_absent_field_is_named_with_who_needs_and_who_provides_it():
    bare = choices.enumerated(LOG_PROB)
    with pytest.raises(ValueError, match=r"most_uncertain needs `features`.*rounds\.linear"):
        bare.require("log_prob", "features", by="most_uncertain")
    assert set(choices.PROVIDERS) == set(choices.Choices._fields) - {"where", "log_mass", "law"}
    assert bare.require("log_prob", by="a test") is LOG_PROB
    with pytest.raises(ValueError, match="at least 1"):
        choices.sample(jax.random.key(0), bare, 0)
