"""Every pair rule in every world against its law: chi-squared of 20,000 pairs.

The false-alarm rate of a cell is 1e-6 (about 80 cells), and a *control*, the law of a rule with one
thing broken, must be rejected by the pairs of the right one.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jax_klrlhf import bandit
from jax_klrlhf.core import choices as choice_sets
from jax_klrlhf.core import enhancer, pairs, rejection, select
from jax_klrlhf.training.rounds import pairing
from tests.conformance import laws, worlds

SAMPLES = 3
RULES = {
    "best_worst": (pairs.best_worst, laws.best_worst),
    "best_second": (pairs.best_second, laws.best_second),
    "best_random": (pairs.best_random, laws.best_random),
    "sampled": (pairs.sampled, laws.sampled),
    "most_uncertain": (pairs.most_uncertain, laws.most_uncertain),
    "widest": (partial(pairs.most_uncertain, curvature=jnp.ones_like), laws.widest),
    "most_informative": (select.most_informative, laws.most_informative),
    "fisher": (partial(select.most_informative, score=select.fisher), laws.most_uncertain),
    "uncertain_against": (pairs.uncertain_against, laws.farthest),
    "first_round": (pairs.first_round, laws.first_round),
    "tournament": (pairs.tournament, laws.tournament),
    "user's own": (
        lambda key, given: pairs.against(lambda c: jnp.where(c.where, 0.0, -jnp.inf))(key, given),
        lambda s: laws.against(s, np.full(len(s.ids), 1 / len(s.ids))),
    ),
}
"""A new rule is a row: the object, and its law on a listed set (by which it is known on draws)."""


def accepted_pair(key, given):
    """Two draws of what rejection sampling leaves: an acceptance, then a rule."""
    key_accept, key_pair = jax.random.split(key)
    left = rejection.accepted_choices(key_accept, given, reward_bound=1.5, kl_coef=1.0)
    return pairs.sampled(key_pair, left)


def accepted_pair_listed(s):
    tilted = laws.normal(s.mass * np.exp(s.reward))
    return laws.sampled(dataclasses.replace(s, mass=tilted))


def accepted_pair_of_draws(s):
    """Every copy is accepted for itself: over the numbers of accepted copies of each choice."""
    count = np.rint(s.mass * SAMPLES).astype(int)
    chance, n = np.exp(s.reward - 1.5), len(s.ids)
    law = np.zeros((n, n))
    for left in np.ndindex(*(count + 1)):
        p = stats.binom.pmf(left, count, chance).prod()
        mass = laws.normal(np.array(left, float))
        if (mass > 0).sum() > 1:
            law += p * laws.sampled(dataclasses.replace(s, mass=mass))
    return law


RULES["accepted"] = (accepted_pair, accepted_pair_listed)
ON_DRAWS = {"accepted": accepted_pair_of_draws}

CONTROLS = {
    "most_uncertain": laws.without_sigma,
    "most_informative": laws.without_sigma,
    "fisher": laws.without_sigma,
    "first_round": laws.unshuffled,
    "best_worst": laws.best_second,
    "best_random": laws.best_worst,
    "sampled": laws.reference,
    "accepted": laws.sampled,
    "uncertain_against": laws.sampled,
}
"""What must be rejected: Sigma left out, the order of a bracket left out, another rule's law."""


@pytest.fixture(scope="module")
def language():
    return worlds.Language()


@pytest.fixture(scope="module")
def responses(language):
    return language.drawn(SAMPLES)


def agree(first, second, valid, sets, rule, *, samples=None):
    """Whether pairs of both contexts are of the rule's law."""
    for x, given in enumerate(sets):
        law = rule(given) if samples is None else laws.over_draws(rule, given, samples)
        here = np.arange(x, len(first), 2)
        if laws.rejected(first[here], second[here], valid[here], law):
            return False
    return True


def agreement(name, first, second, valid, sets, *, samples=None):
    """Whether pairs agree with the rule's law, and whether with the wrong one beside it."""
    found = [np.asarray(x) for x in (first, second, valid)]
    law = ON_DRAWS.get(name, RULES[name][1]) if samples else RULES[name][1]
    ours, wrong = agree(*found, sets, law, samples=samples), False
    # Draws come in no order to begin with: only what is listed tells whether one was made.
    if name in CONTROLS and not (name == "first_round" and samples):
        wrong = agree(*found, sets, CONTROLS[name], samples=samples)
    return ours, wrong


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("samples", [None, SAMPLES], ids=["all actions", "draws"])
def test_on_the_bandit(name, samples):
    """Through `bandit.from_rule`, as a learner asks for its pairs."""
    learner = bandit.from_rule(RULES[name][0], samples=samples, fallback=None)
    asked = worlds.ask(learner, jax.random.key(1))
    # Where the rule makes no pair an action stands against itself.
    first, second = asked
    pair = first, second, first != second
    assert agreement(name, *pair, worlds.bandit_sets(), samples=samples) == (True, False)


@pytest.mark.parametrize("name", RULES)
def test_on_the_exact_language_bandit(language, name):
    """All responses of a model, listed: the rule alone, on a choice set."""
    pair = jax.jit(RULES[name][0])(jax.random.key(2), worlds.rows_of(language.listed))
    if pair.first.ndim == 2:  # one of several, as the bandit takes it
        pair = bandit.rules.one_match(jax.random.key(3), pair)
    found = agreement(name, pair.first, pair.second, pair.valid, language.sets)
    assert found == (True, False)


@pytest.mark.parametrize("name", RULES)
def test_on_responses_that_a_model_drew(language, responses, name):
    """Through `rounds`, as a run pairs what its sampler drew and its belief scored."""
    drawn, scored, number = responses
    chosen = pairing.choose(jax.random.key(4), RULES[name][0], drawn, scored)
    first, second, valid = chosen
    if first.shape[1] > 1:
        wide = pairs.Pair(*map(jnp.asarray, chosen))
        first, second, valid = bandit.rules.one_match(jax.random.key(5), wide)
    first, second, valid = (np.asarray(x).reshape(len(number)) for x in (first, second, valid))
    rows = np.arange(len(number))
    pair = number[rows, first], number[rows, second], valid
    assert agreement(name, *pair, language.sets, samples=SAMPLES) == (True, False)


# --- the enhancer


@jax.jit
def solve(given, radius):
    return enhancer.option_one(
        given, kl_coef=worlds.ETA, radius=radius, iterations=12, refinements=20
    )


def sequences(world):
    """Every sequence of draws as a context of its own, with its probability."""
    index = np.array(list(np.ndindex(*(len(world.ids),) * SAMPLES)))
    return index, world.mass[index].prod(-1)


@pytest.mark.parametrize("radius", [0.2, 1.5])
def test_option_one_is_the_most_informative_tilt_of_what_is_listed(radius):
    """Against brute force over directions and strengths; control: without the budget."""
    sets, setting = worlds.bandit_sets(), worlds.problem().setting
    main = jnp.log(jnp.array(np.stack([s.mass for s in sets]), "float32"))
    every = bandit.choices(setting, worlds.estimate(), main)
    found = solve(every, radius)
    best, norm, cost = laws.tilt(sets, [0.5, 0.5], kl_coef=worlds.ETA, radius=radius)
    np.testing.assert_allclose(found.uncertainty, norm, rtol=1e-3)
    np.testing.assert_allclose(np.exp(found.log_prob), np.stack(best), atol=5e-3)
    assert float(found.cost) <= float(found.budget) * (1 + 1e-4)
    assert cost <= radius * norm * (1 + 1e-6)


def test_option_one_on_draws_is_the_same_function_and_its_budget_holds_in_truth():
    """All 64 sequences of 3 draws as contexts: their weights, and the KL of the policy they make.

    The policy that draws, tilts and takes one has a law over actions; its KL to the main agent is
    at most the cost that the draws showed (data processing). Control: the main agent itself has 0.
    """
    world, radius = worlds.bandit_sets()[0], 1.5
    index, weight = sequences(world)
    every = choice_sets.take(
        choice_sets.enumerated(
            jnp.log(jnp.broadcast_to(jnp.array(world.mass, "float32"), (len(index), 4))),
            features=jnp.broadcast_to(jnp.array(world.phi, "float32"), (len(index), 4, 2)),
            ellipsoid=worlds.estimate().ellipsoid,
            context_prob=jnp.array(weight, "float32"),
        ),
        jnp.array(index, "int32"),
    )
    found = solve(every, radius)
    sets = [laws.merged(tuple(row), world) for row in index]
    best, norm, _ = laws.tilt(sets, weight, kl_coef=worlds.ETA, radius=radius)
    np.testing.assert_allclose(found.uncertainty, norm, rtol=2e-3)
    policy = np.zeros(4)
    for p, row, log_prob in zip(weight, index, np.asarray(found.log_prob, np.float64), strict=True):
        np.add.at(policy, row, p * np.exp(log_prob))
    np.testing.assert_allclose(policy.sum(), 1, rtol=1e-5)
    true = worlds.ETA * (policy @ np.log(policy / world.mass))
    assert 0.01 < true < float(found.cost) <= float(found.budget) * (1 + 1e-4)
    brute = np.zeros(4)
    for p, s, law in zip(weight, sets, best, strict=True):
        brute[s.ids] += p * law
    np.testing.assert_allclose(policy, brute, atol=5e-3)


def test_the_enhancers_pairs_are_the_main_agent_against_its_tilt():
    sets, radius = worlds.bandit_sets(), 1.5
    rule = pairs.enhancer(kl_coef=worlds.ETA, radius=radius)
    learner = bandit.from_rule(rule, fallback=None)
    first, second = worlds.ask(learner, jax.random.key(7))
    opponent, _, _ = laws.tilt(sets, [0.5, 0.5], kl_coef=worlds.ETA, radius=radius)
    for x, (given, law) in enumerate(zip(sets, opponent, strict=True)):
        one, two = np.asarray(first)[x::2], np.asarray(second)[x::2]
        assert not laws.rejected(one, two, one != two, laws.against(given, law))
        assert laws.rejected(one, two, one != two, laws.sampled(given))  # control


@pytest.mark.parametrize("samples", [None, SAMPLES], ids=["listed", "draws"])
def test_against_pi0(samples):
    """Option II: by its law where listed; by importance on the main agent's draws."""
    learner = bandit.from_rule(pairs.against_reference, samples=samples, fallback=None)
    first, second = worlds.ask(learner, jax.random.key(8))
    for x, given in enumerate(worlds.bandit_sets()):
        log_pi = np.log(given.mass)
        rule = laws.reference
        if samples is not None:
            rule = lambda s, log_pi=log_pi: laws.reweighted(s, log_pi[s.ids])  # noqa: E731
        law = rule(given) if samples is None else laws.over_draws(rule, given, samples)
        one, two = np.asarray(first)[x::2], np.asarray(second)[x::2]
        assert not laws.rejected(one, two, one != two, law)
        wrong = laws.sampled(given)
        if samples is not None:
            wrong = laws.over_draws(laws.sampled, given, samples)
        assert laws.rejected(one, two, one != two, wrong)  # control


def test_two_agents_listed():
    """The main agent against pi0 as an agent of its own; control: against itself."""
    learner = bandit.from_rule(pairs.between_agents(), opponent=bandit.reference, fallback=None)
    first, second = worlds.ask(learner, jax.random.key(9))
    for x, given in enumerate(worlds.bandit_sets()):
        pi0 = np.exp(given.ref)
        law = laws.two_step(given.mass, lambda i, pi0=pi0: laws.normal(pi0 * laws.others(4, i)))
        one, two = np.asarray(first)[x::2], np.asarray(second)[x::2]
        assert not laws.rejected(one, two, one != two, law)
        assert laws.rejected(one, two, one != two, laws.sampled(given))
