"""Groups in training: the losses of a bandit on a policy's own draws, resumed to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_klrlhf.core import gibbs, group_losses
from jax_klrlhf.models import enumerate as enumerated
from jax_klrlhf.models import scoring
from jax_klrlhf.training import rounds
from jax_klrlhf.training.group import GroupBatch, group
from jax_klrlhf.training.rounds import grouped
from tests.training import rounds_world as world

FITTING = rounds.Fitting(optimizer=optax.adam(0.02), steps=2, batch_size=4)


def situation(folder=None):
    def believed(prompts, responses):
        reward = world.gold(prompts, responses)
        return rounds.Scored(reward, np.zeros_like(reward))

    return rounds.Situation(
        policies=world.policies(), start=world.PARAMS, data=rounds.Mixture([], None),
        prompts=world.PROMPTS, score=believed, folder=folder,
    )  # fmt: skip


def batch():
    responses = world.DRAW(jax.random.key(3), world.PARAMS, world.PROMPTS)
    token = scoring.token_log_prob(world.MODEL, world.PARAMS, world.PROMPTS, responses)
    return GroupBatch(
        world.PROMPTS, responses, np.ones(6, np.float32), world.gold(None, responses),
        ref_log_prob=np.asarray(token) - 0.1, old_log_prob=np.asarray(token),
    )  # fmt: skip


def test_rows_that_are_drawn_anew_are_not_held_out():
    fitting = rounds.Fitting(optimizer=FITTING.optimizer, steps=1, batch_size=4, held_out=0.5)
    with pytest.raises(ValueError, match="held_out"):
        rounds.on_policy(
            world.MODEL, world.DRAW, loss=group_losses.grpo(kl_coef=0.2), fitting=fitting,
            iterations=1,
        )  # fmt: skip


def test_the_task_is_the_core_loss_on_the_models_log_probabilities():
    made = jax.tree.map(jnp.asarray, batch())
    loss = group_losses.grpo(kl_coef=0.2)
    task = group(world.MODEL, loss)
    changed = jax.tree.map(lambda x: 1.1 * x, world.PARAMS)
    scored = task.score(changed, None, made)
    token = scoring.token_log_prob(world.MODEL, changed, made.prompts, made.responses)
    by_hand = group_losses.Group(
        token, made.reward, made.responses.mask, made.ref_log_prob, made.old_log_prob,
    )  # fmt: skip
    np.testing.assert_allclose(task.loss(scored), loss(by_hand), rtol=1e-6)
    report = task.report(scored)
    np.testing.assert_allclose(report.reward, made.reward.mean(1), rtol=1e-5)
    np.testing.assert_allclose(report.deviation, made.reward.std(1), rtol=1e-4, atol=1e-6)
    moved = np.asarray(token).sum(-1) - made.old_log_prob.sum(-1)
    np.testing.assert_allclose(report.drift, np.abs(moved).mean(1), rtol=1e-4)
    lengths = np.asarray(made.responses.lengths)
    np.testing.assert_allclose(
        report.log_ratio, (moved + 0.1 * lengths).mean(1), rtol=1e-3, atol=1e-5
    )


@pytest.mark.slow
def test_the_step_after_a_draw_takes_its_own_scores_for_the_drawing_policys():
    """Loss and gradient of what was scored apart; and the weights of a sampler that is off."""
    made = jax.tree.map(jnp.asarray, batch())
    loss, off = group_losses.grpo(kl_coef=0.2), jnp.linspace(-1.0, 1.0, 24).reshape(6, 4)
    assert made.old_log_prob is not None
    apart = made._replace(sampled_log_prob=made.old_log_prob.sum(-1) - off)
    fresh = apart._replace(old_log_prob=None)
    task = group(world.MODEL, loss, importance_limit=1.5)

    def weighed(params):
        """By hand: the group with the weights put in."""
        found = group(world.MODEL, loss).score(params, None, made).group
        return loss(found._replace(importance=jnp.minimum(jnp.exp(off), 1.5))).sum()

    def value(given, task=task):
        return lambda params: task.loss(task.score(params, None, given)).sum()

    want = jax.value_and_grad(weighed)(world.PARAMS)
    for given in (fresh, apart):
        got = jax.value_and_grad(value(given))(world.PARAMS)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)
        report = task.report(task.score(world.PARAMS, None, given))
        np.testing.assert_allclose(report.mismatch, np.abs(off).mean(1), rtol=1e-4)
    unweighed = jax.grad(value(apart, group(world.MODEL, loss)))(world.PARAMS)
    difference = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), want[1], unweighed)
    assert max(jax.tree.leaves(difference)) > 1e-2  # the weights are in it
    # Away from the parameters that drew, the one that was scored then is the one that counts.
    moved = jax.tree.map(lambda x: 1.1 * x, world.PARAMS)
    report = task.report(task.score(moved, None, apart))
    np.testing.assert_allclose(report.mismatch, np.abs(off).mean(1), rtol=1e-4)


def exact(params):
    """E r - eta KL(pi || pi0) at the world's prompts, over every response."""
    every = enumerated.responses(
        vocab_size=world.VOCAB, max_new_tokens=world.LENGTH, stop=(world.STOP,)
    )
    wide = jax.tree.map(lambda x: jnp.broadcast_to(x[None], (6, *x.shape)), every)
    prob, ref = (
        scoring.log_prob(world.MODEL, p, world.PROMPTS, wide) for p in (params, world.PARAMS)
    )
    reward = jnp.broadcast_to(jnp.asarray(world.gold(None, every)), prob.shape)
    found = gibbs.value(prob, reward, ref, kl_coef=world.KL_COEF)
    return float(found.mean()), float(gibbs.value(ref, reward, ref, kl_coef=world.KL_COEF).mean())


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(group_losses.rloo(kl_coef=world.KL_COEF), marks=pytest.mark.slow),
        group_losses.regression(kl_coef=world.KL_COEF, clip=2.0),
        group_losses.dr_grpo(size=world.LENGTH, kl_coef=world.KL_COEF),
    ],
    ids=["rloo", "regression", "dr_grpo"],
)
def test_the_exact_objective_rises(loss):
    improve = grouped.on_policy(
        world.MODEL, world.DRAW, loss, fitting=FITTING, iterations=12, importance_limit=2.0
    )
    found = improve(jax.random.key(0), situation())
    after, before = exact(found.params)
    assert after > before + 0.05
    assert found.metrics["drawn/sampler_scorer_mismatch"].value < 1e-4
    assert found.metrics["reward/drawn"].n == 6


@pytest.mark.slow
def test_a_killed_fit_goes_on_to_the_same_bits(tmp_path):
    fitting = rounds.Fitting(optimizer=optax.adam(0.02), steps=2, batch_size=4, save_every=2)
    loss = group_losses.rloo(kl_coef=world.KL_COEF)
    whole = grouped.on_policy(
        world.MODEL, world.DRAW, loss, fitting=fitting, iterations=4, prompts=4
    )
    straight = whole(jax.random.key(5), situation(tmp_path / "straight"))
    calls = []

    def dies(prompts, responses):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return situation().score(prompts, responses)

    with pytest.raises(KeyboardInterrupt):
        whole(jax.random.key(5), situation(tmp_path / "killed")._replace(score=dies))
    again = []

    def counts(prompts, responses):
        again.append(1)
        return situation().score(prompts, responses)

    found = whole(jax.random.key(5), situation(tmp_path / "killed")._replace(score=counts))
    assert len(again) == 2  # the first two draws were not made again
    jax.tree.map(np.testing.assert_array_equal, found.params, straight.params)
    same = lambda m: {k: v for k, v in m.items() if "per_second" not in k and "mfu" not in k}  # noqa: E731
    assert same(found.metrics) == same(straight.metrics)


def test_quantiles_among_the_references_draws_are_the_rewards_of_qrpo():
    """Rewards that are one another's monotone image give the same policy, to the bit."""
    improve = grouped.on_policy(
        world.MODEL, world.DRAW, group_losses.qrpo(kl_coef=1.0), fitting=FITTING, iterations=1,
        quantiles=16, prompts=4,
    )  # fmt: skip
    plain = situation()

    def mapped(prompts, responses):
        found = plain.score(prompts, responses)
        return found._replace(reward=np.exp(3 * found.reward).astype(np.float32))

    first, second = (
        improve(jax.random.key(1), given) for given in (plain, plain._replace(score=mapped))
    )
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
    assert 0 <= first.metrics["reward/drawn"].value <= 1
    assert first.metrics["reward/drawn"].n == 4


def test_groups_of_equal_rewards_are_left_out_or_refused():
    loss = group_losses.dapo()
    improve = grouped.on_policy(
        world.MODEL, world.DRAW, loss, fitting=FITTING, iterations=1, informative_only=True
    )

    def equal(prompts, responses):
        return rounds.Scored(np.ones((6, 4), np.float32), np.zeros((6, 4), np.float32))

    with pytest.raises(ValueError, match="all rewards are equal"):
        improve(jax.random.key(0), situation()._replace(score=equal))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"iterations": 0}, "iterations"),
        ({"prompts": 0}, "prompts must be at least 1"),
        ({"importance_limit": 0.0}, "importance_limit"),
        ({"draw": rounds.Draw(model=world.MODEL, samples=1, max_new_tokens=2)}, "two responses"),
        (
            {"draw": rounds.Draw(model=world.MODEL, samples=2, max_new_tokens=2, top_k=3)},
            "temperature 1",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(changes, match):
    given = {"draw": world.DRAW, "iterations": 1, "fitting": FITTING} | changes
    with pytest.raises(ValueError, match=match):
        grouped.on_policy(world.MODEL, given.pop("draw"), group_losses.rloo(kl_coef=0.1), **given)
