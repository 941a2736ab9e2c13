"""Transforms of a reward, against what they are for: their optima."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_klrlhf.core import divergence, diversity, gibbs, measure, reshape

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture
def world():
    rng = np.random.default_rng(0)
    return jnp.array(rng.normal(size=(3, 6))), jax.nn.log_softmax(rng.normal(size=(3, 6)))


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x)))


def test_quantiles_are_those_of_the_distribution_function(world):
    reward, ref = world
    where = jnp.ones((3, 6), bool).at[0, 0].set(False)
    for level in (0.0, 0.3, 0.85, 1.0):
        found = np.asarray(reshape.quantile(reward, ref, level=level, where=where))
        for row in range(3):
            keep = np.asarray(where[row])
            values, prob = np.asarray(reward[row])[keep], np.exp(ref[row])[keep]
            prob = prob / prob.sum()
            upto = np.array([prob[values <= v].sum() for v in values])
            assert found[row] == values[upto >= level - 1e-12].min()


def test_standardizing_clipping_and_a_ceiling(world):
    reward, ref = world
    found = np.asarray(reshape.standardize(7 + 3 * reward, ref))
    np.testing.assert_allclose((np.exp(ref) * found).sum(-1), 0, atol=1e-12)
    np.testing.assert_allclose((np.exp(ref) * found**2).sum(-1), 1, rtol=1e-12)
    np.testing.assert_array_equal(reshape.standardize(jnp.full((3, 6), 0.1), ref), 0)
    low, high = jnp.array([-0.5, 0.0, 0.1]), jnp.array([0.5, 0.2, 0.9])
    clipped = reshape.clip(reward, low=low, high=high)
    np.testing.assert_allclose(clipped, np.clip(reward, low[:, None], high[:, None]))
    capped = reshape.ceiling(reward, reference=high)
    np.testing.assert_allclose(capped, np.minimum(reward, high[:, None]))


def test_masked_actions_are_deleted(world):
    reward, ref = world
    reward = reward.at[:, 2].set(-jnp.inf)
    keep = np.array([True, True, False, True, True, True])
    where = jnp.broadcast_to(jnp.asarray(keep), reward.shape)
    few = jax.nn.log_softmax(ref[:, keep])
    for transform in (reshape.centre, reshape.standardize, reshape.win_rate):
        found = transform(reward, ref, where=where)[:, keep]
        np.testing.assert_allclose(found, transform(reward[:, keep], few), rtol=1e-10)
    for level in (0.0, 0.4, 1.0):
        found = reshape.quantile(reward, ref, level=level, where=where)
        np.testing.assert_array_equal(found, reshape.quantile(reward[:, keep], few, level=level))
    # An action that pi0 does not take stays out of a fixed point, undamped too.
    never = jax.nn.log_softmax(jnp.where(where, ref, -jnp.inf))
    found = reshape.fixed_point(lambda _: reward, never, kl_coef=0.5, damping=1.0, steps=2)
    expected = gibbs.log_prob(reward, never, kl_coef=0.5)
    np.testing.assert_allclose(np.exp(found.log_prob), np.exp(expected), rtol=1e-12)


def test_log_sigmoid_at_coefficient_one_is_pi0_given_good_and_a_sum_is_and(world):
    reward, ref = world
    other = jnp.flip(reward, -1)
    bars = [reshape.quantile(r, ref, level=0.85) for r in (reward, other)]
    one, two = (
        reshape.log_sigmoid(r, reference=bar) for r, bar in zip((reward, other), bars, strict=True)
    )
    good = np.exp(ref) * sigmoid(reward - bars[0][:, None])
    found = np.exp(gibbs.log_prob(one, ref, kl_coef=1.0))
    np.testing.assert_allclose(found, good / good.sum(-1, keepdims=True), rtol=1e-12)
    both = good * sigmoid(other - bars[1][:, None])
    found = np.exp(gibbs.log_prob(one + two, ref, kl_coef=1.0))
    np.testing.assert_allclose(found, both / both.sum(-1, keepdims=True), rtol=1e-12)


def test_par_is_the_win_rate_against_pi0_and_forgets_offsets(world):
    reward, ref = world
    found = reshape.win_rate(reward, ref)
    raw = np.asarray(reward)
    expected = np.einsum("xb,xab->xa", np.exp(ref), sigmoid(raw[:, :, None] - raw[:, None]))
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_allclose(reshape.win_rate(reward + 5, ref), found, rtol=1e-10)


def test_orthogonal_features_are_uncorrelated_with_the_nuisance():
    rng = np.random.default_rng(2)
    length = jnp.array(rng.normal(size=(4, 8, 1)))
    quality = jnp.array(rng.normal(size=(4, 8, 3))) + 0.7 * length
    ref = jax.nn.log_softmax(rng.normal(size=(4, 8)))
    weight = np.asarray(jnp.array([0.4, 0.3, 0.2, 0.1])[:, None] * jnp.exp(ref))

    def correlation(x):
        centre = lambda v: v - (np.exp(ref)[..., None] * v).sum(1, keepdims=True)  # noqa: E731
        return np.einsum("xa,xad,xak->dk", weight, centre(np.asarray(x)), centre(length))

    found = reshape.orthogonal(quality, length, ref, context_prob=jnp.array([0.4, 0.3, 0.2, 0.1]))
    np.testing.assert_allclose(correlation(found), 0, atol=1e-12)
    assert np.abs(correlation(quality)).max() > 0.1


CLASSES = jnp.array([[0, 0, 1, 1, 2, 2]] * 3)


def test_class_probabilities_surprise_and_rarity(world):
    _, ref = world
    prob = np.exp(ref)
    mass = np.stack([prob[:, np.asarray(CLASSES[0]) == c].sum(1) for c in CLASSES[0]], 1)
    np.testing.assert_allclose(np.exp(reshape.class_log_prob(ref, CLASSES)), mass, rtol=1e-12)
    np.testing.assert_allclose(reshape.rarity(ref, CLASSES), 1 - mass, rtol=1e-10)
    np.testing.assert_allclose(reshape.surprise(ref, CLASSES), -np.log(mass), rtol=1e-10)


def test_the_fixed_point_of_a_class_entropy_bonus_is_its_optimum_in_closed_form(world):
    r"""max E r + coef H(class) - eta KL: Gibbs within a class, P(c) ~ Z_c^{eta/(eta+coef)}."""
    reward, ref = world
    coef, kl_coef = 0.4, 0.5
    found = reshape.fixed_point(
        lambda p: reward + coef * reshape.surprise(p, CLASSES), ref, kl_coef=kl_coef, steps=100
    )
    assert found.residual.max() < 1e-9
    weight = np.exp(np.asarray(ref) + np.asarray(reward) / kl_coef)
    part = np.stack([weight[:, 2 * c : 2 * c + 2].sum(1) for c in range(3)], 1)
    law = part ** (kl_coef / (kl_coef + coef))
    law /= law.sum(1, keepdims=True)
    expected = weight * np.repeat(law / part, 2, 1)
    np.testing.assert_allclose(np.exp(found.log_prob), expected, rtol=1e-6)
    plain = gibbs.log_prob(reward, ref, kl_coef=kl_coef)
    assert (
        diversity.class_entropy(found.log_prob, CLASSES) > diversity.class_entropy(plain, CLASSES)
    ).all()


def test_a_product_with_rarity_diversifies_only_a_positive_reward(world):
    """DARLING: with rewards below 0 it *reduces* the entropy of the classes."""
    reward, ref = world

    def entropy(shift):
        r = reward + shift
        many = reshape.fixed_point(
            lambda p: r * reshape.rarity(p, CLASSES), ref, kl_coef=0.5, damping=0.1, steps=400
        )
        assert many.residual.max() < 1e-6
        spent = divergence.categorical(many.log_prob, ref).mean()
        kl_coef = measure.at_divergence(r, ref, divergence=spent)
        plain = gibbs.log_prob(r, ref, kl_coef=kl_coef)
        return [diversity.class_entropy(p, CLASSES).mean() for p in (many.log_prob, plain)]

    above, below = entropy(4.0), entropy(-4.0)
    assert above[0] > above[1]
    assert below[0] < below[1]


def test_potential_shaping_keeps_the_optimum_iff_the_potential_ends_constant():
    """On every response of three binary tokens; step rewards that are no potential must fail."""
    rng = np.random.default_rng(3)
    bits = np.array([[int(b) for b in f"{i:03b}"] for i in range(8)])
    reward = jnp.array(rng.normal(size=(8, 3)))
    ref = jnp.full(8, -np.log(8))
    prefix = [[int("1" + "".join(map(str, row[:t])), 2) for t in range(4)] for row in bits]
    potential = rng.normal(size=16)[np.array(prefix)]  # a function of the prefix
    ended = potential.copy()
    ended[:, -1] = 0.7

    def optimum(tokens):
        return np.exp(gibbs.log_prob(tokens.sum(-1), ref, kl_coef=1.0))

    same = optimum(reshape.shaped(reward, jnp.array(ended)))
    np.testing.assert_allclose(same, optimum(reward), rtol=1e-10)
    assert np.abs(optimum(reshape.shaped(reward, jnp.array(potential))) - same).max() > 0.05
    steps = reward + 3 * jnp.array(rng.normal(size=(8, 3)))
    assert np.abs(optimum(steps) - same).max() > 0.05
    with pytest.raises(ValueError, match="one more than the 3 tokens"):
        reshape.shaped(reward, jnp.zeros((8, 3)))
