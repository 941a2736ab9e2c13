"""Rules that make one reward of several: formulas, limits, and what offsets do to them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_klrlhf.core import aggregate, gibbs

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture
def world():
    rng = np.random.default_rng(0)
    return jnp.array(rng.normal(size=(5, 3, 4))), jax.nn.log_softmax(rng.normal(size=(3, 4)))


def test_centring_takes_pi0s_mean_of_what_is_in_play(world):
    rewards, ref = world
    where = jnp.ones((3, 4), bool).at[1, 2].set(False)
    rewards = rewards.at[:, 1, 2].set(jnp.nan)
    found = np.asarray(aggregate.centre(rewards, ref, where=where))
    law = np.where(where, np.exp(ref), 0)
    law /= law.sum(-1, keepdims=True)
    np.testing.assert_allclose((law * found).sum(-1), 0, atol=1e-12)
    kept = np.delete(found[:, 1], 2, -1) - np.delete(rewards[:, 1], 2, -1)
    np.testing.assert_allclose(kept, kept[:, :1] * np.ones(3), rtol=1e-12)
    assert (found[:, 1, 2] == 0).all()
    shifted = aggregate.centre(rewards + 7 * jnp.arange(5.0)[:, None, None], ref, where=where)
    np.testing.assert_allclose(shifted, found, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.03, 0.7, 5.0, 1e5, -0.7])
def test_the_entropic_rule_is_its_formula(world, temperature):
    rewards, _ = world
    weight = np.array([0.1, 0.2, 0.3, 0.15, 0.25])
    found = aggregate.entropic(rewards, temperature=temperature, log_weight=jnp.log(weight))
    expected = np.tensordot(weight, np.exp(-np.asarray(rewards) / temperature), 1)
    np.testing.assert_allclose(found, -temperature * np.log(expected), rtol=1e-6, atol=1e-9)


def test_the_entropic_family_holds_mean_minimum_maximum_and_variance(world):
    rewards, _ = world
    at = lambda t: np.asarray(aggregate.entropic(rewards, temperature=t))  # noqa: E731
    np.testing.assert_allclose(at(jnp.inf), rewards.mean(0), atol=1e-12)
    np.testing.assert_allclose(at(0.0), rewards.min(0), atol=0)
    np.testing.assert_allclose(at(1e-4), rewards.min(0), atol=1e-3)
    np.testing.assert_allclose(at(-1e-4), rewards.max(0), atol=1e-3)
    # Second order: the error is cubic in 1/tau, so ten times the temperature divides it by 100.
    error = [
        np.abs(at(t) - aggregate.penalized(rewards, variance=1 / (2 * t))).max() for t in (50, 500)
    ]
    assert error[1] < error[0] / 50
    ordered = [at(t) for t in (0.0, 0.1, 1.0, jnp.inf)]
    assert (np.diff(ordered, axis=0) > 0).all()
    gradient = jax.grad(lambda r: aggregate.entropic(r, temperature=0.5).sum())(rewards)
    np.testing.assert_allclose(gradient.sum(0), 1, rtol=1e-10)


def test_penalized_linear_product_conjunction(world):
    rewards, _ = world
    raw = np.asarray(rewards)
    found = aggregate.penalized(rewards, variance=0.3, deviation=0.2, ddof=1)
    expected = raw.mean(0) - 0.3 * raw.var(0, ddof=1) - 0.2 * raw.std(0, ddof=1)
    np.testing.assert_allclose(found, expected)
    weight = np.random.default_rng(1).dirichlet(np.ones(5), size=3).T
    by_context = aggregate.linear(rewards, jnp.array(weight))
    np.testing.assert_allclose(by_context, np.einsum("mx,mxa->xa", weight, raw))
    same = aggregate.linear(rewards, jnp.array(weight[:, 0]))
    np.testing.assert_allclose(same, np.tensordot(weight[:, 0], raw, 1))
    with pytest.raises(ValueError, match="weight has shape"):
        aggregate.linear(rewards, jnp.ones(4))
    found = aggregate.product(jnp.exp(rewards), jnp.array(weight[:, 0]))
    np.testing.assert_allclose(found, np.exp(np.tensordot(weight[:, 0], raw, 1)))
    np.testing.assert_allclose(aggregate.product(jnp.exp(rewards)), np.exp(raw.sum(0)))
    with pytest.raises(ValueError, match="<= 0"):
        aggregate.product(rewards)
    reference = raw[..., 0]
    found = aggregate.conjunction(rewards, jnp.array(reference))
    expected = np.log(1 / (1 + np.exp(-(raw - reference[..., None])))).sum(0)
    np.testing.assert_allclose(found, expected)
    with pytest.raises(ValueError, match="ddof=5"):
        aggregate.penalized(rewards, ddof=5)


def test_offsets_leave_the_policy_of_centred_members_alone_and_move_the_minimums(world):
    """The mean needs no centring; the control, an uncentred minimum, must move."""
    rewards, ref = world
    offset = 2 * jax.random.normal(jax.random.key(0), (5, 3, 1))

    def policy(rule, members):
        return jnp.exp(gibbs.log_prob(rule(members), ref, kl_coef=0.5))

    for rule in (aggregate.mean, aggregate.minimum, lambda r: aggregate.penalized(r, variance=0.5)):
        plain, moved = (policy(rule, aggregate.centre(r, ref)) for r in (rewards, rewards + offset))
        np.testing.assert_allclose(moved, plain, atol=1e-12)
    distance = lambda rule: jnp.abs(  # noqa: E731
        policy(rule, rewards + offset) - policy(rule, rewards)
    ).max()
    assert distance(aggregate.mean) < 1e-12
    assert distance(aggregate.minimum) > 0.05
