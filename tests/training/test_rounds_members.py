"""Heads as one belief, and weights that play against the policy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_klrlhf.core import saddle
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models import heads as many
from jax_klrlhf.models import reward as single
from jax_klrlhf.models.batch import Batch
from jax_klrlhf.training import rounds, tasks
from jax_klrlhf.training.rounds import members, oracle
from jax_klrlhf.training.rounds.parts import Comparisons, pick
from tests.training import rounds_world as world


@pytest.fixture(scope="module")
def comparisons():
    drawn = world.drawn()
    responses = pick(drawn.responses, np.tile([0, 1], (len(drawn.agent), 1)))
    said = oracle.bradley_terry(world.gold)(jax.random.key(0), drawn.prompts, responses)
    return Comparisons(drawn.prompts, responses, *said)


@pytest.fixture(scope="module")
def start():
    blank = Ragged(jnp.ones((1, 1, 1), jnp.int32), jnp.ones((1, 1), jnp.int32))
    one = Ragged(jnp.ones((1, 1), jnp.int32), jnp.ones(1, jnp.int32))
    dim = single.features(world.MODEL, world.PARAMS, one, blank).shape[-1]
    return single.RewardParams(world.PARAMS, many.init(jax.random.key(1), members=3, dim=dim))


def batch(comparisons):
    device = lambda r: Ragged(jnp.asarray(r.ids), jnp.asarray(r.lengths))  # noqa: E731
    return Batch(
        device(comparisons.prompts),
        device(comparisons.responses),
        jnp.asarray(comparisons.weight),
        jnp.asarray(comparisons.label),
    )


def test_the_loss_of_heads_is_the_mean_of_their_own(comparisons, start):
    rows = batch(comparisons)
    together = members.heads_task(partial(many.rewards, world.MODEL), centring=0.1)
    alone = tasks.bradley_terry_reward(partial(single.reward, world.MODEL), centring=0.1)
    each = [alone.loss(alone.score(many.member(start, m), None, rows)) for m in range(3)]
    found = together.score(start, None, rows)
    np.testing.assert_allclose(together.loss(found), np.mean(each, 0), rtol=1e-5)
    weight = jax.random.exponential(jax.random.key(2), found.weight.shape)
    mixed = np.einsum("bm,mb->b", np.asarray(weight), np.stack(each)) / 3
    np.testing.assert_allclose(together.loss(found._replace(weight=weight)), mixed, rtol=1e-5)


def test_bootstrap_weights_belong_to_a_row_and_are_exponential(comparisons):
    rows = batch(comparisons)
    weight = members.bootstrap(rows, 400)
    order = jnp.flip(jnp.arange(weight.shape[0]))
    again = rows._replace(responses=jax.tree.map(lambda x: x[order], rows.responses))
    np.testing.assert_array_equal(members.bootstrap(again, 400), weight[order])
    wider = jax.tree.map(lambda x: x, rows.responses)
    wider = wider._replace(ids=jnp.pad(wider.ids, ((0, 0), (0, 0), (0, 5)), constant_values=7))
    np.testing.assert_array_equal(members.bootstrap(rows._replace(responses=wider), 400), weight)
    keep = np.arange(rows.responses.ids.shape[-1]) < np.asarray(rows.responses.lengths)[..., None]
    ids = np.where(keep, rows.responses.ids, -1).reshape(len(weight), -1)
    different = len(np.unique(ids, axis=0))
    assert len(np.unique(np.asarray(weight), axis=0)) == different
    # Mean and deviation 1, over 400 heads; 4.5 standard errors, of one row's mean: 0.225.
    assert abs(float(weight[0].mean()) - 1) < 0.225
    assert abs(float(weight[0].std()) - 1) < 0.45


@pytest.mark.slow
def test_a_belief_of_heads_is_the_ensemble_of_its_members(comparisons, start):
    """Scores, uncertainty and combination; and what it learns it did not know before."""
    belief = rounds.heads(
        world.MODEL, start, fitting=world.FITTING, combine=rounds.worst, resample=False, rows=4
    )
    drawn = world.drawn()
    policies = world.policies()
    members = [
        rounds.known(partial(_numpy, partial(single.reward, world.MODEL, many.member(start, m))))
        for m in range(3)
    ]
    apart = rounds.ensemble(members, combine=rounds.worst)
    at = (policies, drawn.prompts, drawn.responses)
    one, other = belief.score(start, *at), apart.score(apart.init, *at)
    np.testing.assert_allclose(one.reward, other.reward, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(one.uncertainty, other.uncertainty, rtol=1e-4, atol=1e-5)
    assert (one.uncertainty > 0).any()
    fitted = belief.fit(jax.random.key(3), start, [comparisons], policies)
    task = tasks.bradley_terry_reward(partial(single.reward, world.MODEL))
    loss = lambda p, m: task.loss(task.score(many.member(p, m), None, batch(comparisons))).mean()  # noqa: E731
    for m in range(3):
        assert loss(fitted, m) < loss(start, m)
    assert belief.fit(jax.random.key(3), fitted, [], policies) is start
    with pytest.raises(ValueError, match="two members or more"):
        rounds.heads(world.MODEL, many.member(start, 0), fitting=world.FITTING)


def _numpy(reward, prompts, responses):
    device = lambda r: Ragged(jnp.asarray(r.ids), jnp.asarray(r.lengths))  # noqa: E731
    return np.asarray(reward(device(prompts), device(responses)))


def against(step, **settings):
    """Two members that disagree; the policy is pi0 with one token more likely."""
    opposed = [rounds.known(world.gold), rounds.known(lambda p, r: -world.gold(p, r))]
    return rounds.worst_mixture(
        opposed,
        key=jax.random.key(4),
        prompts=world.PROMPTS,
        draw=world.DRAW,
        step=step,
        **settings,
    )


@pytest.fixture(scope="module")
def tilted():
    """Parameters under which token 1, worth 1, is more likely."""
    moved = jax.tree.map(lambda x: x, world.PARAMS)
    leaves, shape = jax.tree.flatten(moved)
    place = next(k for k, x in enumerate(leaves) if x.shape[-1:] == (world.VOCAB,))
    leaves[place] = leaves[place].at[..., 1].add(3.0)
    return jax.tree.unflatten(shape, leaves)


def test_the_weights_go_where_the_policy_is_worth_least(tilted):
    belief = against(partial(saddle.simplex_step, rate=0.5))
    still = belief.fit(jax.random.key(0), belief.init, [], world.policies())
    # pi0 is worth nothing over itself, so its weights stay.
    np.testing.assert_allclose(still.value, 0, atol=1e-6)
    np.testing.assert_allclose(still.weight, [0.5, 0.5], rtol=1e-6)
    moved = belief.fit(jax.random.key(0), belief.init, [], world.policies(tilted))
    assert moved.value[0] > 0.1
    np.testing.assert_allclose(moved.value[1], -moved.value[0], rtol=1e-5)
    expected = np.exp(-0.5 * moved.value) / np.exp(-0.5 * moved.value).sum()
    np.testing.assert_allclose(moved.weight, expected, rtol=1e-5)
    drawn = world.drawn()
    scored = belief.score(moved, world.policies(), drawn.prompts, drawn.responses)
    gold = world.gold(drawn.prompts, drawn.responses)
    np.testing.assert_allclose(
        scored.reward, (expected[0] - expected[1]) * gold, rtol=1e-4, atol=1e-6
    )


def test_a_missed_threshold_raises_its_multiplier_beside_a_nominal_reward(tilted):
    step = partial(saddle.cone_step, rate=2.0)
    belief = against(
        step, weight=[0.0, 0.0], threshold=[-9.0, 0.0], nominal=rounds.known(world.gold)
    )
    moved = belief.fit(jax.random.key(0), belief.init, [], world.policies(tilted))
    # The first is far above its threshold, the second below 0.
    np.testing.assert_allclose(moved.weight, [0, -2 * moved.value[1]], rtol=1e-5)
    drawn = world.drawn()
    scored = belief.score(moved, world.policies(), drawn.prompts, drawn.responses)
    gold = world.gold(drawn.prompts, drawn.responses)
    np.testing.assert_allclose(scored.reward, (1 - moved.weight[1]) * gold, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="2 members, 1 weights"):
        against(step, weight=[0.0])
