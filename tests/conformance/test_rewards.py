"""Rewards made of rewards, and what is counted of a policy: the same functions in both worlds.

A row is a function of a choice set and its definition in float64 NumPy. It is run on all actions of
the bandit, where a learner deploys its optimum, and on every response of a language model.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_klrlhf import bandit
from jax_klrlhf.core import aggregate, diversity, reshape, select, targets
from tests.conformance import laws, worlds

OTHERS = np.array([[1.5, -0.5], [0.5, 1.0], [-1.0, 0.3]])
"""Theta of each member of a belief."""
WEIGHT = np.array([0.5, 0.2, 0.3])


class World(NamedTuple):
    """A choice set under pi0, and the same numbers in NumPy."""

    given: object
    reward: np.ndarray
    members: np.ndarray
    """``[members, contexts, choices]``, centred at pi0."""
    pi0: np.ndarray
    phi: np.ndarray


@pytest.fixture(scope="module", params=["bandit", "language model"])
def world(request):
    if request.param == "bandit":
        phi, pi0 = worlds.PHI, worlds.PI0
        setting = worlds.problem().setting
        given = bandit.choices(setting, worlds.estimate(), setting.ref_log_prob)
    else:
        language = worlds.Language()
        phi, given = language.phi, language.listed
        pi0 = np.exp(np.asarray(given.ref_log_prob, np.float64))
    members = np.einsum("xad,md->mxa", phi, OTHERS)
    members = members - np.sum(pi0 * members, -1, keepdims=True)
    given = given._replace(rewards=jnp.asarray(members, "float32"))
    return World(given, phi @ worlds.THETA, members, pi0, phi)


def over(pi0, x):
    return np.sum(pi0 * x, -1, keepdims=True)


def quantile(w, level=0.6):
    found = []
    for reward, law in zip(w.reward, w.pi0, strict=True):
        order = np.argsort(reward)
        found.append(reward[order][np.searchsorted(np.cumsum(law[order]), level)])
    return np.array(found)[:, None]


def utilities(members):
    return laws.sigmoid(members)


def by_pi0(function):
    return lambda c: function(c.reward, c.ref_log_prob)


def at_quantile(function):
    def shaped(c):
        bar = reshape.quantile(c.reward, c.ref_log_prob, level=0.6)
        return function(c.reward, bar)

    return shaped


REWARDS = {
    "centre": (by_pi0(reshape.centre), lambda w: w.reward - over(w.pi0, w.reward)),
    "standardize": (
        by_pi0(reshape.standardize),
        lambda w: (
            (w.reward - over(w.pi0, w.reward))
            / np.sqrt(over(w.pi0, w.reward**2) - over(w.pi0, w.reward) ** 2)
        ),
    ),
    "win_rate": (
        by_pi0(reshape.win_rate),
        lambda w: np.einsum(
            "xab,xb->xa", laws.sigmoid(w.reward[:, :, None] - w.reward[:, None]), w.pi0
        ),
    ),
    "ceiling": (
        at_quantile(lambda r, bar: reshape.ceiling(r, reference=bar)),
        lambda w: np.minimum(w.reward, quantile(w)),
    ),
    "clip": (
        at_quantile(lambda r, bar: reshape.clip(r, low=bar - 0.2, high=bar)),
        lambda w: np.clip(w.reward, quantile(w) - 0.2, quantile(w)),
    ),
    "log_sigmoid": (
        at_quantile(lambda r, bar: reshape.log_sigmoid(r, reference=bar)),
        lambda w: -np.logaddexp(0, quantile(w) - w.reward),
    ),
    "mean": (lambda c: aggregate.mean(c.rewards), lambda w: w.members.mean(0)),
    "minimum": (lambda c: aggregate.minimum(c.rewards), lambda w: w.members.min(0)),
    "entropic": (
        lambda c: aggregate.entropic(c.rewards, temperature=0.3),
        lambda w: -0.3 * np.log(np.exp(-w.members / 0.3).mean(0)),
    ),
    "penalized": (
        lambda c: aggregate.penalized(c.rewards, variance=0.5, deviation=0.2),
        lambda w: w.members.mean(0) - 0.5 * w.members.var(0) - 0.2 * w.members.std(0),
    ),
    "linear": (
        lambda c: aggregate.linear(c.rewards, jnp.asarray(WEIGHT, "float32")),
        lambda w: np.einsum("m,mxa->xa", WEIGHT, w.members),
    ),
    "product": (
        lambda c: aggregate.product(jax.nn.sigmoid(c.rewards), jnp.asarray(WEIGHT, "float32")),
        lambda w: np.prod(utilities(w.members) ** WEIGHT[:, None, None], 0),
    ),
    "conjunction": (
        lambda c: aggregate.conjunction(c.rewards, jnp.zeros(c.rewards.shape[:-1])),
        lambda w: np.log(utilities(w.members)).sum(0),
    ),
}


@pytest.mark.parametrize("name", REWARDS)
def test_a_reward_of_rewards_and_its_optimum(world, name):
    function, by_hand = REWARDS[name]
    want = by_hand(world)
    np.testing.assert_allclose(jax.jit(function)(world.given), want, atol=2e-5)
    law = world.pi0 * np.exp(want / worlds.ETA)
    law = law / law.sum(-1, keepdims=True)

    def target(given):
        given = given._replace(rewards=world.given.rewards)
        return targets.optimum(given._replace(reward=function(given)), kl_coef=worlds.ETA)

    np.testing.assert_allclose(np.exp(jax.jit(target)(world.given)), law, atol=1e-5)
    if world.phi is worlds.PHI:  # as a learner of the bandit deploys it
        learner = bandit.from_target(target)
        deployed = jax.jit(learner.policy)(worlds.problem().setting, worlds.estimate())
        np.testing.assert_allclose(np.exp(deployed), law, atol=1e-5)
    # The control: the reward it was made of has another optimum, unless it was only shifted.
    plain = world.pi0 * np.exp(world.reward / worlds.ETA)
    plain = plain / plain.sum(-1, keepdims=True)
    assert (np.abs(plain - law).max() > 1e-3) == (name != "centre")


EQUAL = np.array([0.5, 0.5])


def entropy(law):
    return -np.sum(law * np.log(law), -1)


def top_two(law):
    best = np.sort(law, -1)[..., -2:]
    return entropy(best / best.sum(-1, keepdims=True)), best.sum(-1)


def kernel(phi):
    return np.exp(-np.sum((phi[:, :, None] - phi[:, None]) ** 2, -1))


def vendi(w):
    found = []
    for law, k in zip(w.pi0, kernel(w.phi), strict=True):
        share = np.linalg.eigvalsh(np.sqrt(law)[:, None] * k * np.sqrt(law))
        share = share[share > 1e-12]
        found.append(np.exp(-np.sum(share * np.log(share))))
    return found


COUNTS = {
    "entropy": (lambda c: diversity.entropy(c.ref_log_prob), lambda w: entropy(w.pi0)),
    "per_input": (
        lambda c: diversity.per_input(c.ref_log_prob, jnp.asarray(EQUAL, "float32")),
        lambda w: EQUAL @ entropy(w.pi0),
    ),
    "across_inputs": (
        lambda c: diversity.across_inputs(c.ref_log_prob, jnp.asarray(EQUAL, "float32")),
        lambda w: entropy(EQUAL @ w.pi0),
    ),
    "top": (lambda c: tuple(diversity.top(c.ref_log_prob, k=2)), lambda w: top_two(w.pi0)),
    "vendi": (
        lambda c: diversity.vendi(
            jnp.asarray(kernel(np.asarray(c.features)), "float32"), jnp.exp(c.ref_log_prob)
        ),
        vendi,
    ),
}


@pytest.mark.parametrize("name", COUNTS)
def test_what_is_counted_of_a_policy(world, name):
    function, by_hand = COUNTS[name]
    np.testing.assert_allclose(function(world.given), by_hand(world), rtol=1e-4)


def test_who_is_beaten_in_everything(world):
    found = np.asarray(select.non_dominated(world.given))
    for x, a in np.ndindex(found.shape):
        mine, rest = world.members[:, x, a], world.members[:, x].T
        beaten = any((r >= mine).all() and (r > mine).any() for r in rest)
        assert found[x, a] == (not beaten)
    assert found.any(-1).all()


def test_the_best_share_in_both_worlds(world):
    """RAFT's filter as a target: the upper tail of pi0, in its own proportions."""
    given = world.given._replace(log_mass=world.given.ref_log_prob)
    found = np.exp(partial(targets.top, share=0.5)(given))
    for x, reward in enumerate(world.reward):
        better = reward[None, :] > reward[:, None] + 1e-9
        kept = world.pi0[x] * ((better * world.pi0[x]).sum(-1) < 0.5 - 1e-6)
        np.testing.assert_allclose(found[x], kept / kept.sum(), atol=1e-5)
