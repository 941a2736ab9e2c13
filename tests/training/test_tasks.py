"""What each task minimizes, against formulas written out by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_klrlhf.core import objectives, preferences
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models import scoring
from jax_klrlhf.models.batch import Batch
from jax_klrlhf.training import reference, state, step, tasks
from tests.training import toy

MODEL = toy.language_model()
LOSS = functools.partial(objectives.sigmoid, kl_coef=0.3)


def nll(margin):
    return np.log1p(np.exp(-margin))


def sigmoid(margin):
    return 1 / (1 + np.exp(-margin))


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0))


def test_soft_labels_are_the_expected_loss(params):
    batch = toy.batch(0)
    label = jnp.linspace(0.0, 1.0, 16)
    task = tasks.preference(MODEL, LOSS)
    batch = jax.tree.map(jnp.asarray, batch)
    given = task.score(params, None, batch._replace(label=label))
    margin = 0.3 * np.asarray(given.scores.log_ratio[:, 0] - given.scores.log_ratio[:, 1])
    expected = label * nll(margin) + (1 - label) * nll(-margin)
    np.testing.assert_allclose(task.loss(given), expected, rtol=1e-5, atol=1e-6)
    hard = task.score(params, None, batch)
    np.testing.assert_allclose(task.loss(hard), nll(margin), rtol=1e-5, atol=1e-6)


def test_tail_weighs_what_lies_beyond_the_shorter_response(params):
    """LD-DPO, policy and reference alike; at 1 it is DPO, and a cached reference cannot."""
    batch = jax.tree.map(jnp.asarray, toy.batch(0))
    other = jax.tree.map(lambda x: 1.1 * x, params)
    token = np.asarray(
        scoring.token_log_prob(MODEL, params, batch.prompts, batch.responses), np.float64
    )
    lengths = np.asarray(batch.responses.lengths)
    wanted = np.zeros(lengths.shape)
    for row, pair in np.ndindex(lengths.shape):
        for place in range(lengths[row, pair]):
            beyond = place >= lengths[row].min()
            wanted[row, pair] += token[row, pair, place] * (0.25 if beyond else 1)

    def score(tail, p):
        task = tasks.preference(MODEL, LOSS, reference=reference.live, tail=tail)
        return task.score(p, params, batch).scores

    np.testing.assert_allclose(score(0.25, other).ref_log_prob, wanted, rtol=1e-5)
    np.testing.assert_allclose(score(0.25, params).log_prob, wanted, rtol=1e-5)
    np.testing.assert_allclose(score(1.0, other).log_ratio, score(None, other).log_ratio, atol=1e-5)
    with pytest.raises(ValueError, match=r"reference=reference\.live"):
        tasks.preference(MODEL, LOSS, tail=0.25)


def test_chosen_in_the_report_is_what_the_label_chose(params):
    batch = jax.tree.map(jnp.asarray, toy.batch(0))
    task = tasks.preference(MODEL, LOSS)
    first = task.score(params, None, batch._replace(label=jnp.ones(16)))
    chosen, rejected = first.scores.log_prob.T
    np.testing.assert_array_equal(task.report(first).chosen_log_prob, chosen)
    np.testing.assert_array_equal(task.report(first).rejected_log_prob, rejected)
    turned = jax.tree.map(lambda x: x[:, ::-1], first.scores)
    second = tasks.Preference(turned, jnp.zeros(16))
    for one, other in zip(task.report(first), task.report(second), strict=True):
        np.testing.assert_array_equal(one, other)
    as_they_lie = task.report(tasks.Preference(turned, jnp.ones(16)))
    np.testing.assert_array_equal(as_they_lie.margin, -task.report(first).margin)


def test_likelihood_is_the_mean_over_all_tokens(params):
    batch = toy.batch(1, responses=1)
    batch = batch._replace(weight=np.where(batch.weight > 0, 1.0, 0.0).astype(np.float32))
    log_prob = np.asarray(reference.make_log_prob(MODEL)(params, batch))[:, 0]
    before = state.init(jax.random.key(1), params, optax.sgd(0.1))
    _, info = step.make_step(tasks.likelihood(MODEL), optax.sgd(0.1))(before, batch)
    tokens = batch.responses.lengths[batch.weight > 0].sum()
    np.testing.assert_allclose(
        info.loss.total / info.loss.weight, -log_prob.sum() / tokens, rtol=1e-5
    )
    assert float(info.loss.weight) == tokens


def test_likelihood_reads_the_first_response_alone(params):
    batch = toy.batch(2)
    task = tasks.likelihood(MODEL)
    other = batch.responses.ids.copy()
    other[:, 1] = 0
    changed = batch._replace(responses=Ragged(other, batch.responses.lengths))
    for first, second in zip(
        task.score(params, None, batch), task.score(params, None, changed), strict=True
    ):
        np.testing.assert_array_equal(first, second)


def reward(params, prompts, responses):
    """Linear in the counts of tokens."""
    keep = jnp.arange(responses.ids.shape[-1])[None, None] < responses.lengths[..., None]
    return jnp.where(keep, params["theta"][responses.ids], 0.0).sum(-1)


def test_reward_model_minimizes_bradley_terry_with_margin_and_centring():
    batch = toy.batch(3)
    theta = np.random.default_rng(0).normal(size=toy.VOCAB).astype(np.float32)
    said = np.random.default_rng(1).normal(size=(16, 2)).astype(np.float32)
    label = jnp.linspace(0.5, 1.0, 16)
    batch = jax.tree.map(jnp.asarray, batch._replace(scores=said, label=label))
    params = {"theta": jnp.asarray(theta)}
    task = tasks.bradley_terry_reward(reward, margin_coef=0.5, centring=0.01)
    given = task.score(params, None, batch)
    rewards = np.zeros((16, 2))
    for row in range(16):
        for k in range(2):
            rewards[row, k] = theta[
                batch.responses.ids[row, k, : batch.responses.lengths[row, k]]
            ].sum()
    margin = rewards[:, 0] - rewards[:, 1] - 0.5 * (said[:, 0] - said[:, 1])
    expected = label * nll(margin) + (1 - label) * nll(-margin) + 0.01 * rewards.sum(1) ** 2
    np.testing.assert_allclose(task.loss(given), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        task.report(given).margin, rewards[:, 0] - rewards[:, 1], rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match="margin_coef needs the batch's scores"):
        task.score(params, None, batch._replace(scores=None))


def test_reward_training_recovers_the_reward_that_labelled():
    """One-parameter-per-token Bradley-Terry on 4096 pairs; the estimate's own standard error."""
    rng = np.random.default_rng(0)
    theta = rng.normal(size=toy.VOCAB)
    rows, length = 4096, 3
    ids = rng.integers(0, toy.VOCAB, (rows, 2, length)).astype(np.int32)
    truth = theta[ids].sum(-1)
    first = rng.uniform(size=rows) < sigmoid(truth[:, 0] - truth[:, 1])
    ids = np.where(first[:, None, None], ids, ids[:, ::-1])
    batch = Batch(
        Ragged(np.zeros((rows, 1), np.int32), np.ones(rows, np.int32)),
        Ragged(ids, np.full((rows, 2), length, np.int32)),
        np.ones(rows, np.float32),
    )
    optimizer = optax.adam(optax.linear_schedule(0.3, 0.0, 150))
    carried = state.init(jax.random.key(0), {"theta": jnp.zeros(toy.VOCAB)}, optimizer)
    train = step.make_step(tasks.bradley_terry_reward(reward), optimizer)
    for _ in range(150):
        carried, info = train(carried, batch)
    found = np.asarray(carried.params["theta"], np.float64)
    assert float(info.grad_norm) < 1e-3  # converged: what is left is sampling error
    # Fisher information in the 15 directions that preferences identify (a shift is free).
    counts = np.stack([(ids == token).sum(-1) for token in range(toy.VOCAB)], -1)
    z = (counts[:, 0] - counts[:, 1]).astype(float)
    curvature = sigmoid(z @ theta) * sigmoid(-z @ theta)
    fisher = (z * curvature[:, None]).T @ z
    error = found - found.mean() - (theta - theta.mean())
    # error' F error is chi-squared with 15 degrees of freedom: above 44.3 once in 10,000 seeds.
    assert error @ fisher @ error < 44.3


def test_a_language_model_trains_xpo_and_selm(params):
    """The exploring response is named by its number, whoever won; as a third one it is no rival."""
    batch = jax.tree.map(jnp.asarray, toy.batch(0))._replace(label=jnp.linspace(0.0, 1.0, 16))
    loss = functools.partial(objectives.exploratory, kl_coef=0.3, optimism=0.1)
    ours = tasks.preference(MODEL, loss, explores=1)
    given = ours.score(params, None, batch)
    plain = tasks.preference(MODEL, LOSS).loss(given)
    np.testing.assert_allclose(
        ours.loss(given), plain + 0.1 * given.scores.log_prob[:, 1], rtol=1e-5, atol=1e-5
    )
    third = jax.tree.map(lambda x: jnp.concatenate([x, x[:, :1]], 1), batch.responses)
    ref = jnp.concatenate([batch.ref_log_prob, batch.ref_log_prob[:, :1]], 1)
    wider = batch._replace(responses=third, ref_log_prob=ref)
    selm = tasks.preference(MODEL, loss, explores=2)
    found = selm.loss(selm.score(params, None, wider))
    np.testing.assert_allclose(
        found, plain + 0.1 * given.scores.log_prob[:, 0], rtol=1e-4, atol=1e-4
    )
    with pytest.raises(ValueError, match="explores=2, and a row has 2 responses"):
        selm.score(params, None, batch)
    with pytest.raises(ValueError, match=r"Scores\.exploration_log_prob, which is None"):
        tasks.preference(MODEL, loss).loss(tasks.preference(MODEL, LOSS).score(params, None, batch))


def test_ties_reach_the_model_of_ties_and_scores_reach_the_loss(params):
    """Rao and Kupper's law by hand, of a policy and of a reward model; halves of each otherwise."""
    batch = jax.tree.map(jnp.asarray, toy.batch(0))
    label = jnp.asarray([0.0, 0.5, 1.0, 0.5] * 4)
    batch = batch._replace(label=label, scores=jnp.ones((16, 2)).at[:, 0].set(3.0))
    ties = preferences.rao_kupper(0.7)

    def law(margin):
        won, lost = sigmoid(margin - 0.7), sigmoid(-margin - 0.7)
        return -np.log(np.select([label == 1, label == 0], [won, lost], 1 - won - lost))

    loss = functools.partial(objectives.sigmoid, kl_coef=0.3, preference=ties)
    task = tasks.preference(MODEL, loss, preference=ties)
    given = task.score(params, None, batch)
    margin = 0.3 * np.asarray(given.scores.log_ratio[:, 0] - given.scores.log_ratio[:, 1])
    np.testing.assert_allclose(task.loss(given), law(margin), rtol=1e-4)
    half = tasks.preference(MODEL, LOSS).loss(given)
    assert abs(half - task.loss(given)).max() > 0.1
    rewarding = tasks.bradley_terry_reward(reward, preference=ties)
    theta = {"theta": jnp.linspace(-1, 1, toy.VOCAB)}
    scored = rewarding.score(theta, None, batch)
    margin = np.asarray(scored.reward[:, 0] - scored.reward[:, 1])
    np.testing.assert_allclose(rewarding.loss(scored), law(margin), rtol=1e-4)
    modpo = tasks.preference(MODEL, functools.partial(objectives.modpo, kl_coef=0.3, weight=1.0))
    margin = 0.3 * np.asarray(given.scores.log_ratio[:, 0] - given.scores.log_ratio[:, 1]) - 2
    np.testing.assert_allclose(
        modpo.loss(given), label * nll(margin) + (1 - label) * nll(-margin), rtol=1e-4
    )


@pytest.mark.parametrize("report_coef", [0.0, -0.1, float("nan")])
def test_a_coefficient_that_is_not_positive_is_refused(report_coef):
    with pytest.raises(ValueError, match="report_coef must be > 0"):
        tasks.preference(MODEL, LOSS, report_coef=report_coef)
