"""Rejection sampling as policy improvement: rates, the error of an unknown bound, and the fits."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_klrlhf.core import divergence, gibbs, pairs
from jax_klrlhf.core import rejection as core
from jax_klrlhf.core.objectives import Scores
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models import enumerate as enumerated
from jax_klrlhf.training import rounds
from jax_klrlhf.training.rounds import rejection
from jax_klrlhf.training.rounds.parts import ragged
from tests.training import rounds_world as world


def situation(score=None, start=None):
    def believed(prompts, responses):
        reward = world.gold(prompts, responses)
        return rounds.Scored(reward, np.zeros_like(reward))

    return rounds.Situation(
        policies=world.policies(), start=start or world.PARAMS, data=rounds.Mixture([], None),
        prompts=world.PROMPTS, score=score or believed, folder=None,
    )  # fmt: skip


def remember(seen):
    """Learns nothing and keeps what it was given."""

    def learn(key, params, situation, accepted):
        seen.append((params, accepted))
        return rejection.Fitted(jax.tree.map(lambda x: 0.9 * x, params), {})

    return learn


def test_each_step_proposes_from_the_policy_fitted_before_and_reports_its_rate():
    seen = []
    improve = rounds.rejection_sampling(
        world.DRAW, remember(seen), kl_coef=0.5, steps=3, reward_bound=3.0, keep=2
    )
    found = improve(jax.random.key(0), situation())
    etas = [accepted.kl_coef for _, accepted in seen]
    np.testing.assert_allclose(etas, core.schedule(0.5, 3), rtol=1e-6)
    policy = world.PARAMS
    for number, (start, accepted) in enumerate(seen, 1):
        jax.tree.map(np.testing.assert_array_equal, start, policy)
        key = jax.random.split(jax.random.fold_in(jax.random.key(0), number), 3)[0]
        proposals = world.DRAW(key, policy, world.PROMPTS)
        np.testing.assert_array_equal(accepted.responses.ids, proposals.ids)
        inverse = 1 / etas[number - 1] - (1 / etas[number - 2] if number > 1 else 0)
        rate = np.exp(inverse * (world.gold(None, proposals) - 3.0)).mean()
        metric = found.metrics[f"rejection/acceptance/{number}"]
        np.testing.assert_allclose(metric.value, rate, rtol=1e-5)
        assert found.metrics[f"rejection/bound_violated/{number}"].value == 0
        assert accepted.accepted.sum(1).max() <= 2
        policy = jax.tree.map(lambda x: 0.9 * x, start)
    jax.tree.map(np.testing.assert_array_equal, found.params, policy)


def test_the_error_of_an_unknown_bound_is_the_enumerated_one():
    """Every ordered list of 4 draws from the 4 at hand: the law of what each accepts, averaged."""
    reward, inverse = np.array([0.3, -0.2, 1.4, 0.5]), 1 / 0.5 - 1 / 2.0
    mass = np.zeros(4)
    for draws in itertools.product(range(4), repeat=4):
        r = reward[list(draws)]
        np.add.at(mass, list(draws), np.exp(inverse * (r - r.max())) / 4**4)
    found = mass / mass.sum()
    target = np.exp(inverse * reward) / np.exp(inverse * reward).sum()
    expected = np.abs(found - target).sum() / 2
    assert expected > 0.02  # There is an error to be seen.
    error = rejection.bound_error(
        jnp.asarray(reward[None], jnp.float32), kl_coef=0.5, kl_coef_prev=2.0
    )
    np.testing.assert_allclose(error, [expected], rtol=1e-4)
    flat = rejection.bound_error(jnp.ones((1, 4)), kl_coef=0.5, kl_coef_prev=float("inf"))
    np.testing.assert_allclose(flat, [0.0], atol=1e-6)


def test_one_step_without_a_bound_accepts_each_prompts_best_and_reports_the_error():
    seen = []
    found = rounds.rejection_sampling(world.DRAW, remember(seen), kl_coef=0.5)(
        jax.random.key(1), situation()
    )
    accepted = seen[0][1]
    best = accepted.reward.argmax(1)
    assert np.all(accepted.accepted[np.arange(len(best)), best])
    assert 0 < found.metrics["rejection/bound_error/1"].value < 1


def test_nothing_accepted_is_an_error_with_the_remedy():
    improve = rounds.rejection_sampling(world.DRAW, remember([]), kl_coef=0.01, reward_bound=1000.0)
    with pytest.raises(ValueError, match="none of 24 proposals was accepted; take more steps"):
        improve(jax.random.key(0), situation())


FEW = rounds.Draw(
    model=world.MODEL, samples=64, max_new_tokens=world.LENGTH, stop=(world.STOP,), rows=6
)
MANY = rounds.Draw(
    model=world.MODEL, samples=1024, max_new_tokens=world.LENGTH, stop=(world.STOP,), rows=6
)


@pytest.mark.slow
def test_likelihood_of_what_is_accepted_approaches_the_gibbs_law():
    """On all 85 responses: the divergence from the target falls to less than half of pi0's."""
    fitting = rounds.Fitting(optimizer=world.FITTING.optimizer, steps=60, batch_size=64)
    learn = rejection.likelihood(world.MODEL, fitting=fitting)
    improve = rounds.rejection_sampling(MANY, learn, kl_coef=1.0, steps=2, reward_bound=3.0)
    found = improve(jax.random.key(0), situation()).params
    every = enumerated.responses(
        vocab_size=world.VOCAB, max_new_tokens=world.LENGTH, stop=(world.STOP,)
    )
    reward = jnp.asarray(world.gold(None, every))
    prompts = Ragged(*map(jnp.asarray, world.PROMPTS))
    base, after = (
        enumerated.log_prob(world.MODEL, params, prompts, every) for params in (world.PARAMS, found)
    )
    target = gibbs.log_prob(jnp.broadcast_to(reward, base.shape), base, kl_coef=1.0)
    before = divergence.categorical(target, base).mean()
    assert divergence.categorical(target, after).mean() < before / 2


@pytest.mark.slow
def test_rso_ranks_accepted_responses_by_what_is_believed(monkeypatch):
    seen = []
    compared = rejection._compared

    def spy(prompts, responses, first, second, label, valid):
        seen.append((responses, first, second, valid))
        return compared(prompts, responses, first, second, label, valid)

    monkeypatch.setattr(rejection, "_compared", spy)
    fitting = rounds.Fitting(optimizer=world.FITTING.optimizer, steps=30, batch_size=32)
    improve = rounds.rso(world.MODEL, FEW, kl_coef=1.0, fitting=fitting, rule=pairs.tournament)
    found = improve(jax.random.key(0), situation())
    responses, first, second, valid = seen[0]
    reward = world.gold(None, responses)
    ids = np.asarray(responses.ids)
    winners, losers = set(), set()
    for row, match in np.argwhere(valid):
        one, two = first[row, match], second[row, match]
        assert np.any(ids[row, one] != ids[row, two])
        winners.add((row, one))
        losers.add((row, two))
    # Everyone who was accepted plays, once for all copies; n players play n - 1 matches.
    key = jax.random.split(jax.random.fold_in(jax.random.key(0), 1), 3)[1]
    accepted = core.accept(key, jnp.asarray(reward), reward_bound=None, kl_coef=1.0).accepted
    players = winners | losers
    for row in range(len(ids)):
        texts = {tuple(ids[row, at]) for at in np.flatnonzero(accepted[row])}
        played = [tuple(ids[row, at]) for number, at in players if number == row]
        assert sorted(played) == sorted(texts if len(texts) > 1 else ())
    assert len(players) == valid.sum() + valid.any(1).sum()
    assert found.metrics["rewards/margins"].value > 4 * found.metrics["rewards/margins"].stderr


def labelled(monkeypatch, labelling, rule=pairs.first_round):
    """What ``ranked`` fits on 2 000 prompts of 5 accepted responses, whose rewards often tie.

    Returns rewards ``[N, 2]`` of the first and the second, labels ``[N]``, and what is reported.
    """
    reward = np.random.default_rng(0).integers(-3, 4, (2000, 5)).astype(np.float32) / 2
    seen = []

    def fit_at(model, loss, *, fitting):
        def fit(key, params, data, **given):
            seen.append(data.rows)
            return rejection.Fitted(params, {})

        return fit

    monkeypatch.setattr(rejection, "fit_at", fit_at)
    monkeypatch.setattr(
        rejection, "reference_log_prob",
        lambda *_, rows: lambda _, data: np.zeros((len(data.rows.weight), 2), np.float32),
    )  # fmt: skip
    # A response is its own number.
    responses = ragged(np.arange(reward.size).reshape(*reward.shape, 1), np.ones(reward.shape))
    accepted = rejection.Accepted(responses, np.ones(reward.shape, bool), reward, 1.0)
    learn = rejection.ranked(
        world.MODEL, rejection.coefficient.sigmoid,
        fitting=world.FITTING, rule=rule, labelling=labelling,
    )  # fmt: skip
    prompts = ragged(np.ones((len(reward), 1)), np.ones(len(reward)))
    here = situation()._replace(prompts=prompts)
    found = learn(jax.random.key(5), world.PARAMS, here, accepted).metrics
    (rows,) = seen
    return reward.ravel()[rows.responses.ids[..., 0]], rows.label, found


@pytest.mark.parametrize("rule", [pairs.first_round, pairs.tournament])
def test_by_order_the_higher_reward_wins_and_equal_ones_tie(monkeypatch, rule):
    reward, label, found = labelled(monkeypatch, rejection.order, rule)
    assert len(label) == (2 if rule is pairs.first_round else 4) * 2000
    tied = reward[:, 0] == reward[:, 1]
    assert np.all(reward[:, 0] >= reward[:, 1])
    assert 100 < tied.sum() < len(tied) / 2
    np.testing.assert_array_equal(label, np.where(tied, 0.5, 1.0))
    np.testing.assert_allclose(found["rejection/order"].value, label.mean(), rtol=1e-6)


@pytest.mark.parametrize("rule", [pairs.first_round, pairs.tournament])
def test_the_expected_label_is_the_bradley_terry_probability(monkeypatch, rule):
    reward, label, found = labelled(monkeypatch, rejection.expected, rule)
    margin = (reward[:, 0] - reward[:, 1]).astype(np.float64)
    assert margin.min() < 0 < margin.max()  # Who is first was drawn.
    np.testing.assert_allclose(label, 1 / (1 + np.exp(-margin)), rtol=1e-6)
    higher = np.where(margin < 0, 1 - label, label)
    np.testing.assert_allclose(found["rejection/order"].value, higher.mean(), rtol=1e-6)


def test_drawn_labels_are_the_expected_ones_on_average(monkeypatch):
    """4 000 pairs, 5 standard errors: false-alarm rate 6e-7 for each of the margins."""
    reward, label, found = labelled(monkeypatch, rejection.drawn)
    assert np.all(label == 1)
    margin = reward[:, 0] - reward[:, 1]
    for size in np.unique(np.abs(margin))[1:]:  # at 0 either is the first
        here = np.abs(margin) == size
        share, count = (margin[here] > 0).mean(), here.sum()
        expected = 1 / (1 + np.exp(-float(size)))
        assert abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / count)
    won = 0.5 + 0.5 * np.sign(margin)
    np.testing.assert_allclose(found["rejection/order"].value, won.mean(), rtol=1e-6)


def test_only_labels_that_keep_the_margin_leave_the_gibbs_policy_where_it_is():
    """The gradient of the DPO loss at pi0 exp(r / eta): 0 under ``expected``, not under ``order``.

    Under ``drawn`` it is 0 on average over who wins, sigma(margin) of the times.
    """
    eta, draw = 0.5, np.random.default_rng(1)
    reward = draw.normal(size=(50, 2)).astype(np.float32)
    base = draw.normal(size=(50, 2)).astype(np.float32) - 5
    task = rejection.tasks.preference(world.MODEL, rejection.coefficient.sigmoid(eta))

    def slope(labelling, at):
        def total(log_prob):
            scores = Scores(log_prob, jnp.asarray(base[:, at]), jnp.ones((50, 2), int))
            label = labelling.label(jnp.asarray(reward[:, at[0]] - reward[:, at[1]]))
            return task.loss(rejection.tasks.Preference(scores, label)).sum()

        found = jax.grad(total)(jnp.asarray((base + reward / eta)[:, at]))
        return np.asarray(found)[:, at]  # by response, whoever won

    np.testing.assert_allclose(slope(rejection.expected, [0, 1]), 0, atol=1e-6)
    wins = 1 / (1 + np.exp(reward[:, 1:] - reward[:, :1]))
    drawn = wins * slope(rejection.drawn, [0, 1]) + (1 - wins) * slope(rejection.drawn, [1, 0])
    np.testing.assert_allclose(drawn, 0, atol=1e-6)
    assert np.all(slope(rejection.order, [0, 1])[:, 0] < 0)


def test_a_copy_is_ranked_where_only_a_later_one_was_accepted():
    ids = np.array([[[1], [2], [1], [3]]])
    responses = ragged(ids, np.ones((1, 4)))
    accepted = rejection.Accepted(
        responses, np.array([[False, True, True, False]]), np.zeros((1, 4), np.float32), 1.0
    )
    prompts = ragged([[1, 2]], [2])
    fitting = rounds.Fitting(optimizer=world.FITTING.optimizer, steps=1, batch_size=1)
    learn = rejection.ranked(world.MODEL, lambda eta: lambda s: s.log_prob[:, 0], fitting=fitting)
    here = situation()._replace(prompts=prompts)
    learn(jax.random.key(0), world.PARAMS, here, accepted)  # There is a pair to learn from.
    none = accepted._replace(accepted=np.array([[True, False, True, False]]))
    with pytest.raises(ValueError, match="no comparison"):
        learn(jax.random.key(0), world.PARAMS, here, none)


def test_passes_until_a_count_leave_no_prompt_without_a_pair():
    """One pass at a small coefficient accepts little more than the best; RSO's code goes on."""
    seen, once = [], []
    few = {"kl_coef": 0.1, "keep": 3}
    rounds.rejection_sampling(world.DRAW, remember(once), **few)(jax.random.key(0), situation())
    until = rounds.rejection_sampling(world.DRAW, remember(seen), passes="until", **few)
    until(jax.random.key(0), situation())
    ids, accepted = seen[0][1].responses.ids, seen[0][1].accepted
    for row in range(len(ids)):
        different = {tuple(r) for r in ids[row]}
        kept = [tuple(r) for r in ids[row][accepted[row]]]
        assert len(kept) == len(set(kept)) == min(3, len(different))
    assert once[0][1].accepted.sum() < accepted.sum()
    with pytest.raises(ValueError, match="needs keep="):
        rounds.rejection_sampling(world.DRAW, remember(seen), kl_coef=1.0, passes="until")
