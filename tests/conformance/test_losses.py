"""One suite over losses, divergences and preference models: the same value in both worlds.

A row is a loss as a user binds it. It is handed to the bandit's softmax-linear policies and to the
language model's task, on the same comparisons: what both minimize is the same number. A new loss is
one row here; its law is a row of tests/core/test_laws.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_klrlhf import bandit
from jax_klrlhf.bandit import history, policy_class
from jax_klrlhf.core import (
    estimation,
    fdivergence,
    objectives,
    onesided,
    pairwise,
    preferences,
    regularized,
)
from jax_klrlhf.core.scores import Scores
from jax_klrlhf.training import tasks
from tests.bandit.toolbox import awkward_problem
from tests.training import toy

ETA = 0.5


def bind(loss, **settings):
    return functools.partial(loss, kl_coef=ETA, **settings)


def composed(scores, *, kl_coef):
    """A user's own, of the parts: hinge of a clipped margin against a milder reference."""
    each = pairwise.score(scores, reference=0.5)
    return pairwise.hinge(pairwise.margin(each, kl_coef=kl_coef, clip=3.0), target=2.0)


TIES = {"rao_kupper": preferences.rao_kupper(0.7), "davidson": preferences.davidson(0.8)}
LOSSES = {
    "sigmoid": bind(objectives.sigmoid),
    "smoothed": bind(objectives.sigmoid, label_smoothing=0.1),
    "flipped": bind(objectives.sigmoid, preference=preferences.flipped(0.2)),
    **{name: bind(objectives.sigmoid, preference=model) for name, model in TIES.items()},
    "ipo": bind(objectives.ipo),
    "hinge": bind(objectives.hinge),
    "robust": bind(objectives.robust, flip_rate=0.1),
    "rpo": bind(objectives.rpo, sft_coef=0.1),
    "cpo": bind(objectives.cpo, sft_coef=0.1),
    "simpo": bind(objectives.simpo, margin=0.5),
    "length_normalized": bind(objectives.length_normalized),
    "forward_kl": bind(objectives.f_divergence, divergence=fdivergence.forward_kl),
    "alpha": bind(objectives.f_divergence, divergence=fdivergence.alpha(0.3)),
    "chi_po": bind(objectives.chi_po, clip=2.0),
    "pessimistic": bind(objectives.pessimistic),
    "exploratory": bind(objectives.exploratory, optimism=0.1),
    "modpo": bind(objectives.modpo, weight=0.6),
    "odpo": bind(objectives.odpo, margin_coef=0.5),
    "mm_dpo": bind(objectives.mm_dpo),
    "exo": bind(objectives.exo, label_smoothing=0.1),
    "discopop": bind(objectives.discopop),
    "wpo": lambda s: objectives.weighted(bind(objectives.sigmoid)(s), objectives.wpo_weight(s)),
    "orpo": functools.partial(objectives.orpo, odds_coef=0.3),
    "kto": bind(onesided.kto, shift=0.3, desirable=1.2),
    "nca": bind(onesided.nca),
    "bco": bind(onesided.bco, shift=0.1),
    "sppo": bind(onesided.sppo),
    "apo_zero": bind(onesided.apo_zero),
    "apo_down": bind(onesided.apo_down),
    "composed": bind(composed),
}
# Couples the rows of a batch, so that counted comparisons mean nothing to it.
ALONE = {"aot"}


@pytest.fixture(scope="module")
def world():
    """A problem, comparisons with ties among them, a policy, and its scores one by one."""
    problem = awkward_problem()
    s = problem.setting
    data = bandit.compare(jax.random.key(0), problem, s.ref_log_prob, s.ref_log_prob, batch=30)
    label = jnp.where(jnp.arange(30) % 3 == 0, 0.5, data.label)
    data = data._replace(label=label, weight=(data.first != data.second).astype(label.dtype))
    theta = jnp.array([0.6, -0.9, 0.4])
    tables = jax.random.normal(jax.random.key(1), (2, *s.where.shape))
    log_prob = policy_class.policy_log_prob(s, theta)

    def of_pairs(table):
        return jnp.stack([table[data.context, a] for a in (data.first, data.second)], -1)

    scores = Scores(
        of_pairs(log_prob),
        of_pairs(s.ref_log_prob),
        jnp.ones((30, 2), jnp.int32),
        *(of_pairs(table) for table in tables),
        exploration_log_prob=log_prob[data.context, data.second],
    )
    return s, data, theta, dict(zip(("reward", "bonus"), tables, strict=True)), scores


@pytest.mark.parametrize("name", LOSSES)
def test_both_worlds_minimize_the_same_number(world, name):
    setting, data, theta, beside, scores = world
    model = TIES.get(name, preferences.bradley_terry)
    setting = setting._replace(preference=model)
    loss, explores = LOSSES[name], name == "exploratory"
    seen = history.init(setting, capacity=30, ordered=explores)
    seen = history.append(seen, data, ordered=explores)
    of_bandit = policy_class.total_loss(
        setting,
        theta,
        history.view(seen),
        loss=loss,
        explores=explores,
        beside=beside,
        ridge=0.0,
    )
    task = tasks.preference(toy.language_model(), loss, preference=model)
    given = tasks.Preference(scores, data.label)
    each = task.loss(given)
    assert each.shape == (30,)
    got = data.weight @ each
    np.testing.assert_allclose(got, of_bandit, rtol=2e-5)
    # The control: another loss is another number.
    other = tasks.preference(toy.language_model(), LOSSES["ipo" if name != "ipo" else "sigmoid"])
    assert abs(data.weight @ other.loss(given) - got) > 1e-2


def test_every_loss_is_a_row():
    public = {
        name
        for module in (objectives, onesided)
        for name in vars(module)
        if getattr(vars(module)[name], "__module__", "") == module.__name__
        and not name.startswith("_")
    }
    helpers = {"weighted", "wpo_weight", "f_divergence"}
    assert public - helpers - ALONE <= set(LOSSES)


def test_preference_models_are_one_law_for_nature_the_learner_and_the_reward_model(world):
    """A tie model labels a problem, is fitted by a learner, and is a reward model's likelihood."""
    setting, data, theta, _, _ = world
    x = setting.features
    z = x[data.context, data.first] - x[data.context, data.second]
    for model in TIES.values():
        by_fit = estimation.nll(theta, z, data.label, ridge=0.0, weights=data.weight, link=model)
        task = tasks.bradley_terry_reward(lambda *_: 0.0, preference=model)
        reward = jnp.stack([z @ theta, jnp.zeros(30)], -1)
        given = tasks.Rewarded(reward, data.label, None, jnp.ones((30, 2), jnp.int32))
        np.testing.assert_allclose(data.weight @ task.loss(given), by_fit, rtol=1e-5)


def test_an_optimum_of_any_divergence_is_a_policy_of_both_worlds(world):
    """regularized.* on the bandit's table and on drawn choices: values, gaps, implicit rewards."""
    setting, *_ = world
    reward, ref = setting.reward(jnp.array([1.0, -0.5, 0.5])), setting.ref_log_prob
    where = setting.where
    for member in (fdivergence.jensen_shannon, fdivergence.chi_po):
        given = {"kl_coef": ETA, "divergence": member}
        log_prob = regularized.log_prob(reward, ref, where=where, **given)
        best = regularized.value(log_prob, reward, ref, where=where, **given)
        gap = regularized.gap(ref, reward, ref, where=where, **given)
        plain = jnp.sum(jnp.where(where, jnp.exp(ref) * reward, 0), -1)
        np.testing.assert_allclose(best - plain, gap, atol=1e-5)
        implicit = regularized.implicit_reward(log_prob, ref, **given)
        off = jnp.where(where, implicit - reward, jnp.nan)
        np.testing.assert_allclose(np.nanmax(off, -1), np.nanmin(off, -1), atol=1e-4)
