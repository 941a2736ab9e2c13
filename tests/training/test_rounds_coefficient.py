"""Coefficients as data: the losses are the core's at each row's, and a sweep is one program."""

import functools

import jax
import numpy as np
import optax
import pytest

from jax_klrlhf.core import divergence, gibbs, objectives
from jax_klrlhf.core.objectives import Scores
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models import enumerate as enumerated
from jax_klrlhf.models import scoring
from jax_klrlhf.training import rounds, tasks
from jax_klrlhf.training.rounds import coefficient, improve
from jax_klrlhf.training.rounds.parts import ragged
from tests.training import rounds_world as world


@pytest.fixture(scope="module")
def comparisons():
    draw = np.random.default_rng(0)
    ids = draw.integers(1, world.VOCAB, (16, 2, world.LENGTH))
    prompts = ragged(draw.integers(1, world.VOCAB, (16, 2)), np.full(16, 2))
    label = draw.integers(0, 2, 16).astype(np.float32)
    weight = np.ones(16, np.float32)
    return rounds.Comparisons(prompts, ragged(ids, np.full((16, 2), 3)), label, weight)


def situation(comparisons=None):
    def believed(prompts, responses):
        reward = world.gold(prompts, responses)
        return rounds.Scored(reward, np.abs(reward))

    sources = [] if comparisons is None else [comparisons]
    return rounds.Situation(
        policies=world.policies(), start=world.PARAMS, data=rounds.Mixture(sources, None),
        prompts=world.PROMPTS, score=believed, folder=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    "objective", [objectives.sigmoid, objectives.ipo, objectives.hinge], ids=lambda f: f.__name__
)
def test_every_row_has_the_loss_and_the_rewards_of_its_own_coefficient(objective):
    def loss(kl_coef):
        return functools.partial(objective, kl_coef=kl_coef)

    draw = np.random.default_rng(0)
    policy, ref = draw.normal(size=(2, 6, 2)).astype(np.float32)
    coefs = np.array([0.1, 0.1, 0.5, 0.5, 2.0, 2.0], np.float32)
    label = np.array([1, 0, 1, 0, 1, 0.3], np.float32)
    scores = Scores(*map(jax.numpy.asarray, (policy, ref, np.ones((6, 2), np.int32))))
    task = coefficient.task(world.MODEL, loss)
    given = coefficient.ScoredAt(
        tasks.Preference(scores, jax.numpy.asarray(label)), jax.numpy.asarray(coefs)
    )
    found, report = task.loss(given), task.report(given)
    for row, coef in enumerate(coefs.tolist()):
        alone = tasks.preference(world.MODEL, loss(coef), report_coef=coef)
        np.testing.assert_allclose(found[row], alone.loss(given.preference)[row], rtol=1e-6)
        for one, two in zip(report, alone.report(given.preference), strict=True):
            np.testing.assert_allclose(one[row], two[row], rtol=1e-6)


@pytest.mark.slow
def test_dpo_at_any_coefficient_is_one_program_and_fits_as_a_loss_of_its_own(
    comparisons, monkeypatch
):
    traced = []
    inner = coefficient.sigmoid

    def counted(kl_coef):
        traced.append(kl_coef)
        return inner(kl_coef)

    monkeypatch.setattr(coefficient, "sigmoid", counted)
    fitting = rounds.Fitting(optimizer=world.FITTING.optimizer, steps=3, batch_size=8)
    make = rounds.dpo, rounds.pessimistic_dpo
    key, here = jax.random.key(3), situation(comparisons)
    first = rounds.dpo(world.MODEL, kl_coef=0.1, fitting=fitting)(key, here)
    count = len(traced)
    assert count > 0
    for method in make:
        for coef in (0.5, 2.0):
            found = method(world.MODEL, kl_coef=coef, fitting=fitting)(key, here)
            assert not np.array_equal(*map(_flat, (found.params, first.params)))
    assert len(traced) == count  # nothing was traced again
    alone = rounds.preference_optimization(
        world.MODEL, inner(0.1), report_coef=0.1, fitting=fitting
    )(key, here)  # fmt: skip
    np.testing.assert_allclose(_flat(first.params), _flat(alone.params), rtol=1e-5, atol=1e-7)
    for name in ("loss", "rewards/margins", "rewards/chosen"):
        expected = alone.metrics[name].value
        np.testing.assert_allclose(first.metrics[name].value, expected, rtol=1e-4)


def _flat(params):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])


MANY = rounds.Draw(
    model=world.MODEL, samples=512, max_new_tokens=world.LENGTH, stop=(world.STOP,), rows=6
)


@pytest.mark.slow
def test_weighted_likelihood_approaches_the_gibbs_law():
    """On all 85 responses: the divergence from the target falls to less than half of pi0's."""
    fitting = rounds.Fitting(optimizer=world.FITTING.optimizer, steps=60, batch_size=64)
    method = rounds.weighted_likelihood(world.MODEL, MANY, kl_coef=1.0, fitting=fitting)
    found = method(jax.random.key(0), situation())
    every = enumerated.responses(
        vocab_size=world.VOCAB, max_new_tokens=world.LENGTH, stop=(world.STOP,)
    )
    reward = jax.numpy.asarray(world.gold(None, every))
    prompts = Ragged(*map(jax.numpy.asarray, world.PROMPTS))
    base, after = (
        enumerated.log_prob(world.MODEL, params, prompts, every)
        for params in (world.PARAMS, found.params)
    )
    target = gibbs.log_prob(jax.numpy.broadcast_to(reward, base.shape), base, kl_coef=1.0)
    before = divergence.categorical(target, base).mean()
    assert divergence.categorical(target, after).mean() < before / 2
    # 1 / E[w^2] of the normalized weight w = e^r / E e^r under pi0, exactly; over 512 draws a
    # prompt its estimate is off by a few percent.
    share = 1 / np.exp(2 * target - base).sum(-1)
    metric = found.metrics["weights/effective_share"]
    np.testing.assert_allclose(metric.value, share.mean(), rtol=0.15)


def test_weights_are_those_of_the_tilted_law(monkeypatch):
    seen = []
    rows = improve.single_responses
    monkeypatch.setattr(
        improve, "single_responses", lambda *given: seen.append(given) or rows(*given)
    )
    fitting = rounds.Fitting(optimizer=world.FITTING.optimizer, steps=1, batch_size=4)
    method = rounds.weighted_likelihood(world.MODEL, world.DRAW, kl_coef=0.25, fitting=fitting)
    method(jax.random.key(0), situation())
    prompts, responses, weight = seen[0]
    raw = np.exp(world.gold(prompts, responses).astype(np.float64) / 0.25)
    np.testing.assert_allclose(weight, 4 * raw / raw.sum(1, keepdims=True), rtol=1e-5)


def test_all_targets_of_a_fitting_are_one_program(monkeypatch):
    made = []
    whole = rounds.Fitting.compile
    monkeypatch.setattr(
        rounds.Fitting, "compile", lambda self, task: made.append(task) or whole(self, task)
    )
    fitting = rounds.Fitting(optimizer=world.FITTING.optimizer, steps=1, batch_size=4)
    for given in ({"kl_coef": 0.25}, {"target": lambda choices: choices.log_mass}):
        rounds.weighted_likelihood(world.MODEL, world.DRAW, fitting=fitting, **given)
    assert len(made) == 1


def test_an_improvement_may_explore(comparisons):
    """XPO in the loop of rounds: a step of SGD is one on DPO plus the bonus of the second."""
    one_step = rounds.Fitting(optimizer=optax.sgd(0.1), steps=1, batch_size=16)
    key, here = jax.random.key(3), situation(comparisons)
    loss = functools.partial(objectives.exploratory, kl_coef=0.5, optimism=0.2)
    found = rounds.preference_optimization(
        world.MODEL, loss, explores=1, report_coef=0.5, fitting=one_step
    )(key, here).params  # fmt: skip
    plain = rounds.dpo(world.MODEL, kl_coef=0.5, fitting=one_step)(key, here).params
    prompts, responses = (
        Ragged(*map(jax.numpy.asarray, rows))
        for rows in (comparisons.prompts, comparisons.responses)
    )

    def bonus(params):
        return scoring.log_prob(world.MODEL, params, prompts, responses)[:, 1].mean()

    step = jax.tree.map(lambda g: -0.1 * 0.2 * g, jax.jit(jax.grad(bonus))(world.PARAMS))
    got = _flat(found) - _flat(plain)
    np.testing.assert_allclose(got, _flat(step), rtol=1e-3, atol=1e-7)


def test_weights_are_a_targets_and_no_option_is_ignored():
    fitting = rounds.Fitting(optimizer=world.FITTING.optimizer, steps=1, batch_size=8)
    for wrong in ({}, {"kl_coef": 1.0, "target": lambda given: given.log_mass}):
        with pytest.raises(ValueError, match="one of them"):
            rounds.weighted_likelihood(world.MODEL, world.DRAW, fitting=fitting, **wrong)
