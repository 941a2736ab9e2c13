"""A linear belief is factorized once for what it scores; beliefs are told what labels mean."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_klrlhf.core import ellipsoid, estimation, preferences, reward_class
from jax_klrlhf.models import reward
from jax_klrlhf.training import rounds, tasks
from jax_klrlhf.training.rounds import features, members
from jax_klrlhf.training.rounds import reward_class as parametric
from jax_klrlhf.training.rounds.parts import Comparisons, ragged
from tests.training import rounds_world as world

MADE = {
    "linear": (features, features.linear),
    "in a class": (
        parametric,
        lambda counts, **given: rounds.parametric(counts, reward_class.linear, **given),
    ),
}


@pytest.mark.parametrize("kind", MADE)
def test_a_belief_is_factorized_once_and_scores_as_the_ellipsoid_does(kind, monkeypatch):
    module, make = MADE[kind]
    calls = []

    def counted(state):
        calls.append(1)
        return ellipsoid.factor(state)

    monkeypatch.setattr(module, "factor", counted)
    belief = make(world.counts, dim=world.VOCAB, ridge=0.5, radius=2.0)
    directions = jax.random.normal(jax.random.key(0), (7, world.VOCAB))
    state = ellipsoid.update(belief.init.ellipsoid, directions)
    other = ellipsoid.update(state, directions)
    rng = np.random.default_rng(0)
    responses = ragged(rng.integers(1, 5, (6, 4, 3)), np.full((6, 4), 3))
    for number, one in enumerate((state, other), start=1):
        held = belief.init._replace(ellipsoid=one)
        for _ in range(3):
            scored = belief.score(held, world.policies(), world.PROMPTS, responses)
        phi = world.counts(world.PROMPTS, responses)
        inverse = np.linalg.inv(np.asarray(one.precision, np.float64))
        wanted = 2.0 * np.sqrt(np.einsum("bkd,de,bke->bk", phi, inverse, phi))
        np.testing.assert_allclose(scored.uncertainty, wanted, rtol=1e-4)
        assert len(calls) == number


TIES = preferences.rao_kupper(1.0)


def test_a_linear_belief_that_is_told_of_ties_is_the_core_fit_with_ties():
    rng = np.random.default_rng(1)
    pairs = ragged(rng.integers(1, 5, (30, 2, 3)), np.full((30, 2), 3))
    label = rng.choice([0.0, 0.5, 1.0], 30).astype(np.float32)
    prompts = ragged(np.ones((30, 1)), np.ones(30))
    data = [Comparisons(prompts, pairs, label, np.ones(30, np.float32))]
    phi = jnp.asarray(world.counts(prompts, pairs))
    found = {}
    for name, given in {"ties": {"preference": TIES}, "plain": {}}.items():
        belief = rounds.linear(world.counts, dim=world.VOCAB, ridge=0.5, radius=1.0, **given)
        found[name] = belief.fit(jax.random.key(0), belief.init, data, world.policies()).theta
    want = estimation.fit(phi[:, 0] - phi[:, 1], jnp.asarray(label), ridge=0.5, link=TIES)
    np.testing.assert_allclose(found["ties"], want.theta, atol=1e-5)
    assert np.abs(found["ties"] - found["plain"]).max() > 0.05


def test_a_reward_model_and_heads_are_fitted_by_the_likelihood_with_ties(monkeypatch):
    """-log of the tie's probability at a margin, in NumPy; a half label alone is another number."""
    asked, margin = [], 0.8
    monkeypatch.setattr(rounds.Fitting, "compile", lambda self, task: asked.append(task))
    fitting = rounds.Fitting(optimizer=optax.sgd(1.0), steps=1, batch_size=1)
    one = reward.RewardParams({}, jnp.zeros(3))
    rounds.reward_model(world.MODEL, one, fitting=fitting, centring=0.0, preference=TIES)
    rounds.reward_model(world.MODEL, one, fitting=fitting, centring=0.0)
    two = reward.RewardParams({}, jnp.zeros((2, 3)))
    rounds.heads(world.MODEL, two, fitting=fitting, centring=0.0, preference=TIES)
    label, length = jnp.array([0.5]), jnp.ones((1, 2), jnp.int32)
    given = tasks.Rewarded(jnp.array([[margin, 0.0]]), label, None, length)
    won, lost = (1 / (1 + np.exp(1.0 - s * margin)) for s in (1, -1))
    want = -np.log(1 - won - lost)
    ties, plain, of_heads = asked  # not one program for two meanings
    np.testing.assert_allclose(ties.loss(given), want, rtol=1e-5)
    assert abs(float(plain.loss(given)[0]) - want) > 0.1
    both = members.Heads(
        jnp.array([[[margin, 0.0], [-margin, 0.0]]]), jnp.array([[1.0, 2.0]]), label, length
    )
    np.testing.assert_allclose(of_heads.loss(both), 1.5 * want, rtol=1e-5)
