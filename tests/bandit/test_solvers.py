"""The refit, Option I, the enhancer and the policy class against independent solutions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from jax_klrlhf import bandit
from jax_klrlhf.bandit import history, human, pessimism, policy_class, refit
from jax_klrlhf.core import (
    enhancer,
    estimation,
    fdivergence,
    objectives,
    onesided,
    preferences,
)
from tests.bandit.toolbox import awkward_problem


@pytest.fixture
def learned(x64):
    """An awkward problem and a greedy learner's state after 30 comparisons, in float64."""
    del x64
    problem = awkward_problem()
    setting = problem.setting
    algorithm = bandit.offline_greedy()
    flat = jnp.where(setting.where, -jnp.log(4.0), -jnp.inf)
    data = bandit.compare(jax.random.key(0), problem, flat, flat, batch=30)
    state = algorithm.update(setting, algorithm.init(setting, capacity=30), data)
    return problem, data, state


def test_refit_is_the_core_fit(learned):
    problem, data, state = learned
    x = problem.setting.features
    z = x[data.context, data.first] - x[data.context, data.second]
    fit = estimation.fit(z, data.label, ridge=1.0)
    np.testing.assert_allclose(state.theta, fit.theta, atol=1e-10)
    far = refit.newton(z, data.label, 1 - data.label, jnp.full(3, 50.0), ridge=1.0)
    np.testing.assert_allclose(far.theta, fit.theta, atol=1e-10)
    assert bool(far.converged)
    warm = refit.newton(z, data.label, 1 - data.label, fit.theta, ridge=1.0)
    assert int(warm.iterations) == 1
    separable = refit.newton(z, jnp.ones(30), jnp.zeros(30), jnp.zeros(3), ridge=1e-3)
    assert bool(separable.converged)
    assert np.isfinite(separable.theta).all()


def test_sigma_of_active_learning_is_the_hessian_and_of_a_confidence_set_counts_each_whole(learned):
    """In NumPy, after two batches: the first is weighted anew by the second estimate."""
    problem, data, _ = learned
    setting, x = problem.setting, np.asarray(problem.setting.features)
    z = x[data.context, data.first] - x[data.context, data.second]
    halves = [jax.tree.map(lambda leaf, at=at: leaf[at], data) for at in np.split(np.arange(30), 2)]
    found = {}
    for learner in (bandit.most_uncertain(ridge=0.7), bandit.greedy_against_reference(ridge=0.7)):
        state = learner.init(setting, capacity=30)
        for half in halves:
            state = learner.update(setting, state, half)
        found[len(found)] = np.asarray(state.ellipsoid.precision)
        chance = 1 / (1 + np.exp(-z @ np.asarray(state.theta)))
    hessian, whole = (
        0.7 * np.eye(3) + np.einsum("n,ni,nj->ij", w, z, z)
        for w in (chance * (1 - chance), np.ones(30))
    )
    np.testing.assert_allclose(found[0], hessian, atol=1e-9)
    np.testing.assert_allclose(found[1], whole, atol=1e-9)


def test_bound_is_the_core_bound(learned):
    problem, data, _ = learned
    setting = problem.setting
    algorithm = bandit.offline_greedy(bound=0.4)
    state = algorithm.update(setting, algorithm.init(setting, capacity=30), data)
    x = setting.features
    z = x[data.context, data.first] - x[data.context, data.second]
    fit = estimation.fit(z, data.label, ridge=1.0, bound=0.4)
    np.testing.assert_allclose(state.theta, fit.theta, atol=1e-9)
    np.testing.assert_allclose(jnp.linalg.norm(state.theta), 0.4, rtol=1e-9)


@pytest.mark.parametrize("shared", [True, False])
def test_refit_of_many_seeds(x64, shared):
    """Easy and hard seeds side by side: each has the optimum of the core fit, and its own count."""
    del x64
    rng = np.random.default_rng(0)
    z = rng.normal(size=(4, 20, 3))
    if shared:
        z[:] = z[0]
    wins, losses = rng.integers(0, 9, size=(2, 4, 20)).astype(float)
    start = np.array([0.0, 0.1, 3.0, 40.0])[:, None] * rng.normal(size=(4, 3))
    ridge = jnp.array([1.0, 0.1, 2.0, 1e-3])
    z, wins, losses, start = (jnp.asarray(v) for v in (z, wins, losses, start))

    def one(z, wins, losses, start, ridge):
        return refit.newton(z, wins, losses, start, ridge=ridge)

    of_all = jax.jit(jax.vmap(one, (None if shared else 0, 0, 0, 0, 0)))
    found = of_all(z[0] if shared else z, wins, losses, start, ridge)
    assert bool(found.converged.all())
    assert len(set(found.iterations.tolist())) > 1
    assert bool((found.hessians < found.iterations).all())
    for k in range(4):
        rows = jnp.concatenate([z[k], z[k]])
        labels = jnp.repeat(jnp.array([1.0, 0.0]), 20)
        weights = jnp.concatenate([wins[k], losses[k]])
        fit = estimation.fit(rows, labels, ridge=ridge[k], weights=weights)
        np.testing.assert_allclose(found.theta[k], fit.theta, atol=1e-10)


@pytest.mark.parametrize("axes", [(None, 0), (0, None), (0, 0)])
def test_gram_under_vmap(axes):
    rng = np.random.default_rng(0)
    z, w = rng.normal(size=(2, 7, 3)), rng.uniform(size=(2, 7))
    z, w = (v if axis == 0 else v[0] for v, axis in zip((z, w), axes, strict=True))
    got = jax.vmap(refit.gram, axes)(jnp.asarray(z, jnp.float32), jnp.asarray(w, jnp.float32))
    z, w = (v if axis == 0 else np.stack([v, v]) for v, axis in zip((z, w), axes, strict=True))
    np.testing.assert_allclose(got, np.einsum("sr,sri,srj->sij", w, z, z), rtol=1e-5)


def pessimistic_value(problem, state, log_prob, radius, nu):
    """Option I's objective, in NumPy."""
    s = jax.tree.map(np.asarray, problem.setting)
    prob = np.where(s.where, np.exp(log_prob), 0)
    ratio = np.where(prob > 0, np.log(np.where(prob > 0, prob, 1)) - s.ref_log_prob, 0)
    kl = np.sum(np.where(s.where, prob * ratio, 0), -1)
    mean = s.context_prob @ np.einsum("xa,xad->xd", prob, s.features)
    away = mean - nu
    norm = np.sqrt(away @ np.linalg.solve(np.asarray(state.ellipsoid.precision), away))
    return mean @ np.asarray(state.theta) - float(s.kl_coef) * s.context_prob @ kl - radius * norm


@pytest.mark.parametrize("radius", [0.0, 0.7, 20.0])
def test_option_one_is_the_maximum(learned, radius):
    """Against SciPy over all policies, with the certificate; radius 0 is greedy."""
    problem, _, state = learned
    s = problem.setting
    nu = np.asarray(pessimism.usual_nu(s))
    saddle = jax.jit(pessimism.option_one)(s, state, radius=radius)
    reached = pessimistic_value(problem, state, saddle.log_prob, radius, nu)
    assert 0 <= float(saddle.duality_gap) + 1e-12 < 1e-9
    assert float(jnp.linalg.norm(saddle.weight)) <= 1 + 1e-9
    where = np.asarray(s.where)

    def loss(logits):
        table = np.where(where, 0.0, -np.inf)
        table[where] = logits
        table -= np.log(np.exp(table).sum(-1, keepdims=True))
        return -pessimistic_value(problem, state, table, radius, nu)

    best = -optimize.minimize(loss, np.asarray(saddle.log_prob)[where], method="Powell").fun
    assert reached >= best - 1e-8
    if radius == 0:
        greedy = bandit.offline_greedy().policy(s, state)
        np.testing.assert_allclose(np.exp(saddle.log_prob), np.exp(greedy), atol=1e-9)


def test_option_two_is_its_formula(learned):
    """With nu of each context, in NumPy; and KL-PCB is that with the context means of pi0."""
    problem, _, state = learned
    s = problem.setting
    nu = np.einsum("xa,xad->xd", np.exp(s.ref_log_prob), s.features)
    sigma = np.asarray(state.ellipsoid.precision)
    away = np.asarray(s.features) - nu[:, None, :]
    bonus = np.sqrt(np.einsum("xad,de,xae->xa", away, np.linalg.inv(sigma), away))
    weight = s.ref_log_prob + (s.features @ state.theta - 0.6 * bonus) / s.kl_coef
    expected = np.exp(weight) / np.exp(weight).sum(-1, keepdims=True)
    got = np.exp(pessimism.option_two(s, state, radius=0.6, nu=jnp.asarray(nu)))
    np.testing.assert_allclose(got, expected, atol=1e-10)
    np.testing.assert_allclose(
        np.exp(bandit.kl_pcb(radius=0.6).policy(s, state)), expected, atol=1e-10
    )


def test_strongest_tilt_meets_its_budget(learned):
    """Along one direction: cost = radius <v, g> / ||v||_Sigma."""
    problem, _, state = learned
    s = problem.setting
    main = bandit.offline_greedy().policy(s, state)
    v = jnp.array([0.3, -1.0, 0.5])
    sigma = state.ellipsoid.precision
    every = bandit.choices(s, state, main)
    for radius in (0.01, 0.3):
        tilted = enhancer._strongest_tilt(
            every, main, v, kl_coef=s.kl_coef, radius=radius, refinements=30
        )
        g = s.context_prob @ (s.mean_features(tilted) - s.mean_features(main))
        budget = radius * (v @ g) / jnp.sqrt(v @ sigma @ v)
        cost = s.kl_coef * bandit.kl(s._replace(ref_log_prob=main), tilted)
        np.testing.assert_allclose(cost, budget, rtol=1e-6)
    nothing = enhancer.option_one(every, kl_coef=s.kl_coef, radius=0.0)
    np.testing.assert_allclose(np.exp(nothing.log_prob), np.exp(main), atol=1e-12)


def test_the_enhancer_does_not_hang_on_rounding(learned):
    """Sigma changed by 1e-14: of 200 problems no law of the opponent moves by more than 1e-6.

    Newton's method may come to the edge of the budget from beyond it: whether its last point
    counts as within is then rounding, and the next one within is a different policy.
    """
    problem, _, state = learned
    every = bandit.choices(problem.setting, state, problem.setting.ref_log_prob)
    _, ellipsoid = every.require("features", "ellipsoid", by="the test")

    def opponent(key, scale):
        shape = jax.random.normal(key, (3, 3))
        logits = 2 * jax.random.normal(jax.random.fold_in(key, 1), every.mass.shape)
        log_mass = jax.nn.log_softmax(jnp.where(every.mass > 0, logits, -jnp.inf))
        sigma = 3 * jnp.eye(3) + 20 * shape @ shape.T
        region = ellipsoid._replace(precision=scale * sigma)
        here = every._replace(log_mass=log_mass, ellipsoid=region)
        return jnp.exp(enhancer.option_one(here, kl_coef=0.3).log_prob)

    keys = jax.random.split(jax.random.key(7), 200)
    run = jax.jit(jax.vmap(opponent, in_axes=(0, None)))
    np.testing.assert_allclose(run(keys, 1 + 1e-14), run(keys, 1.0), rtol=0, atol=1e-6)


def test_dpo_is_the_greedy_learner(learned):
    """L6, solved: the exact DPO policy on the softmax-linear class is the MLE's Gibbs policy."""
    problem, data, state = learned
    s = problem.setting
    algorithm = bandit.dpo()
    policy = algorithm.update(s, algorithm.init(s, capacity=30), data)
    assert bool(policy.converged)
    np.testing.assert_allclose(policy.theta, state.theta, atol=1e-9)


def rows_of(setting, theta, data):
    """The class's log-probabilities and scores, one comparison at a time, the winner first."""
    log_prob = policy_class.policy_log_prob(setting, theta)
    first, second = (log_prob[data.context, a] for a in (data.first, data.second))
    ref = [setting.ref_log_prob[data.context, a] for a in (data.first, data.second)]
    pair, ref = jnp.stack([first, second], -1), jnp.stack(ref, -1)
    scores = objectives.Scores(pair, ref, jnp.ones(pair.shape, int), exploration_log_prob=second)
    lost = data.label == 0
    return jax.tree.map(
        lambda a, b: jnp.where(lost if a.ndim == 1 else lost[:, None], a, b),
        scores.swapped(),
        scores,
    )


@pytest.mark.parametrize("merged", [True, False], ids=["tally", "rows"])
def test_policy_class_losses_are_the_core_objectives(learned, merged):
    """On rows, one comparison at a time: XPO is `objectives.exploratory`; optimism shows.

    Its opponent is pi0's draw, which stood second, and no other.
    """
    problem, data, _ = learned
    s = problem.setting
    if not merged:
        s = s._replace(preference=dataclasses.replace(s.preference, merges=False))
    loss = functools.partial(objectives.exploratory, kl_coef=s.kl_coef, optimism=0.3)
    algorithm = bandit.xpo(optimism=0.3)
    if not merged:
        # Labels as they are: the loss of the winner first, by the label that it is given.
        def labelled(scores):
            other = scores.swapped()
            return scores.label * loss(scores) + (1 - scores.label) * loss(other)

        algorithm = policy_class.policy_learner(
            labelled, agents=policy_class.against_reference, explores=True
        )
    fitted = algorithm.update(s, algorithm.init(s, capacity=30), data)
    assert isinstance(fitted.history, history.Ordered if merged else history.Rows)

    def by_rows(theta, optimism):
        each = functools.partial(objectives.exploratory, kl_coef=s.kl_coef, optimism=optimism)
        return jnp.sum(each(rows_of(s, theta, data))) + 0.5 * theta @ theta

    theta = jnp.array([0.2, -0.3, 0.1])
    if merged:
        total = policy_class.total_loss(
            s, theta, history.view(fitted.history), loss=loss, explores=True, ridge=1.0
        )
        np.testing.assert_allclose(total, by_rows(theta, 0.3), rtol=1e-10)
    np.testing.assert_allclose(jax.grad(by_rows)(fitted.theta, 0.3), 0, atol=1e-6)
    assert bool(fitted.converged)
    # Optimism moves probability away from what pi0 drew.
    plain = bandit.dpo().update(s, bandit.dpo().init(s, capacity=30), data) if merged else None
    if plain:
        logs = [policy_class.policy_log_prob(s, t) for t in (fitted.theta, plain.theta)]
        away = [float(jnp.sum(log[data.context, data.second])) for log in logs]
        assert away[0] < away[1]


def test_xpo_plays_its_policy_against_the_reference(learned):
    """Both laws of the proposals, chi-square over 20,000 draws in a context of three actions."""
    problem, data, _ = learned
    s = problem.setting
    algorithm = bandit.xpo(optimism=0.3)
    fitted = algorithm.update(s, algorithm.init(s, capacity=30), data)
    drawn = algorithm.propose(jax.random.key(0), s, fitted, jnp.zeros(20_000, jnp.int32))
    policy = algorithm.policy(s, fitted)
    for actions, law, other in (
        (drawn.first, policy, s.ref_log_prob),
        (drawn.second, s.ref_log_prob, policy),
    ):
        got = np.bincount(np.asarray(actions), minlength=4)
        where = np.asarray(s.where[0])
        want, wrong = (20_000 * np.exp(np.asarray(x[0]))[where] for x in (law, other))
        # Two degrees of freedom: above 13.8 once in a thousand; the control is far beyond.
        assert ((got[where] - want) ** 2 / want).sum() < 13.8
        assert ((got[where] - wrong) ** 2 / wrong).sum() > 100
        assert got[~where].sum() == 0


def test_any_loss_makes_a_learner_and_its_minimum_is_stationary(learned):
    problem, data, _ = learned
    s = problem.setting
    for loss in (
        functools.partial(objectives.ipo, kl_coef=0.5),
        functools.partial(objectives.chi_po, kl_coef=0.5, clip=3.0),
        functools.partial(
            objectives.f_divergence, kl_coef=0.5, divergence=fdivergence.jensen_shannon
        ),
        functools.partial(onesided.nca, kl_coef=0.5),
    ):
        algorithm = bandit.policy_learner(loss)
        fitted = algorithm.update(s, algorithm.init(s, capacity=30), data)

        def by_rows(theta, loss=loss):
            # A comparison of an action with itself isn't counted by a learner of pairs.
            counts = data.first != data.second
            each = loss(rows_of(s, theta, data))
            return jnp.sum(jnp.where(counts, each, 0)) + 0.5 * theta @ theta

        assert bool(fitted.converged)
        # Converged to the square root of the rounding: see `core.descent`.
        slope = jax.jit(jax.grad(by_rows))
        assert abs(slope(fitted.theta)).max() < 1e-6 * (1 + abs(slope(jnp.zeros(3))).max())
        assert float(by_rows(fitted.theta)) < float(by_rows(jnp.zeros(3)))
    chi = bandit.chi_po(reward_bound=1.5)
    same = chi.update(s, chi.init(s, capacity=30), data)
    again = bandit.policy_learner(functools.partial(objectives.chi_po, kl_coef=0.5, clip=3.0))
    np.testing.assert_allclose(
        same.theta, again.update(s, again.init(s, capacity=30), data).theta, rtol=1e-10
    )


@pytest.mark.slow
def test_ties_are_ties_to_a_learner_that_is_told_of_them(x64):
    """Rao and Kupper's law: theta by the tie model, shrunk where halves are labels.

    The setting says what labels are taken to mean. A tally would merge a win and a loss into two
    ties: there are rows instead, and the estimate is the fit of the comparisons one by one.
    """
    problem = bandit.from_arrays(
        jax.nn.standardize(jax.random.normal(jax.random.key(0), (2, 4, 3))) / 3,
        jnp.array([3.0, -2.0, 1.0]),
        kl_coef=0.5,
        preference=preferences.rao_kupper(1.0),
    )
    s = problem.setting
    data = bandit.compare(jax.random.key(1), problem, s.ref_log_prob, s.ref_log_prob, batch=16_000)
    assert set(np.unique(data.label)) == {0.0, 0.5, 1.0}
    fits = {}
    for name, model in {"told": s.preference, "not": preferences.bradley_terry}.items():
        setting = s._replace(preference=model)
        learner = bandit.offline_greedy(ridge=1e-3)
        state = learner.update(setting, learner.init(setting, capacity=16_000), data)
        assert isinstance(state.history, history.Rows if name == "told" else history.Tally)
        assert bool(state.converged)
        fits[name] = state
    x = s.features
    z = x[data.context, data.first] - x[data.context, data.second]
    pairs = data.first != data.second
    by_rows = estimation.fit(z, data.label, ridge=1e-3, weights=pairs, link=s.preference)
    np.testing.assert_allclose(fits["told"].theta, by_rows.theta, atol=1e-8)
    size = {name: float(jnp.linalg.norm(fit.theta)) for name, fit in fits.items()}
    spread = jnp.linalg.inv(
        estimation.hessian(
            problem.theta, z, ridge=1e-3, weights=pairs, labels=data.label, link=s.preference
        )
    )
    errors = {name: fit.theta - problem.theta for name, fit in fits.items()}
    off = {name: float(e @ jnp.linalg.solve(spread, e)) for name, e in errors.items()}
    # Chi-square of three degrees of freedom: beyond 16.3 once in a thousand.
    assert off["told"] < 16.3 < 50 < off["not"]
    assert size["not"] < size["told"]


def test_a_cyclic_preference_labels_as_it_says(x64):
    """Rock, paper, scissors, one context after another: no reward has these labels."""
    cycle = jnp.array([[0.5, 0.9, 0.1], [0.1, 0.5, 0.9], [0.9, 0.1, 0.5]])
    prefer = jnp.stack([cycle, cycle.T])
    problem = bandit.from_arrays(
        jnp.zeros((2, 3, 1)),
        jnp.zeros((2, 3)),
        kl_coef=0.5,
        preference=preferences.matrix(prefer),
    )
    s = problem.setting
    data = bandit.compare(jax.random.key(1), problem, s.ref_log_prob, s.ref_log_prob, batch=20_000)
    got, seen = np.zeros((2, 3, 3)), np.zeros((2, 3, 3))
    at = tuple(np.asarray(v) for v in (data.context, data.first, data.second))
    np.add.at(got, at, np.asarray(data.label))
    np.add.at(seen, at, 1)
    want = np.asarray(prefer)
    # 18 independent counts: a chi-square beyond 42.3 once in a thousand.
    assert ((got - seen * want) ** 2 / (seen * want * (1 - want))).sum() < 42.3
    kept = human.restrict(problem, np.array([1]))
    np.testing.assert_array_equal(kept.preference.parameters[0], cycle.T)


@pytest.mark.parametrize("each", [False, True], ids=["one nu", "nu of each context"])
def test_nu_is_used_where_it_is_given(learned, each):
    """`coverage` by its definition in NumPy, and Option I's learner; not the default's numbers."""
    problem, _, state = learned
    s = problem.setting
    nu = jnp.array([[0.3, -1.0, 0.5], [0.0, 0.2, 2.0], [1.0, 1.0, -1.0]])
    nu = nu if each else nu[0]
    target = bandit.optimum(problem)
    prob, ref = (np.where(s.where, np.exp(x), 0) for x in (target, s.ref_log_prob))
    x, origin = np.asarray(s.features), np.broadcast_to(nu, (3, 3))
    design, away = 0.1 * np.eye(3), 0.0
    for c, weight in enumerate(np.asarray(s.context_prob)):
        for a in range(4):
            for b in range(4):
                z = x[c, a] - x[c, b]
                design += weight * ref[c, a] * ref[c, b] * np.outer(z, z)
    for c, weight in enumerate(np.asarray(s.context_prob)):
        for a in range(4):
            v = x[c, a] - origin[c]
            away += weight * prob[c, a] * np.sqrt(v @ np.linalg.solve(design, v))
    found = bandit.coverage(s, target, s.ref_log_prob, ridge=0.1, nu=nu)
    np.testing.assert_allclose(found, away, rtol=1e-10)
    assert abs(bandit.coverage(s, target, s.ref_log_prob, ridge=0.1) - away) > 1e-2
    policy = bandit.offline_gshf_one(radius=1.0, nu=nu).policy(s, state)
    center = np.asarray(s.context_prob) @ origin
    best = pessimistic_value(problem, state, policy, 1.0, center)
    for rival in (None, jnp.zeros(3)):
        other = bandit.offline_gshf_one(radius=1.0, nu=rival).policy(s, state)
        assert pessimistic_value(problem, state, other, 1.0, center) < best - 1e-4
    # The pointwise bonus, and who takes it.
    inverse, shift = np.linalg.inv(state.ellipsoid.precision), x - origin[:, None]
    bonus = np.sqrt(np.einsum("xad,de,xae->xa", shift, inverse, shift))
    reward, where = x @ np.asarray(state.theta), np.asarray(s.where)

    def gibbs(bent):
        weight = np.where(where, np.exp(s.ref_log_prob + bent / s.kl_coef), 0)
        return weight / weight.sum(-1, keepdims=True)

    best = np.where(where, reward - 30 * bonus, -np.inf).argmax(-1)
    wanted = {
        bandit.offline_gshf_two: (1.0, gibbs(reward - bonus)),
        bandit.kl_ucb: (1.0, gibbs(reward + bonus)),
        bandit.pessimistic_mle: (30.0, np.eye(4)[best]),
    }
    for make, (radius, law) in wanted.items():
        found, usual = (
            np.exp(np.asarray(make(radius=radius, nu=given).policy(s, state)))
            for given in (nu, None)
        )
        np.testing.assert_allclose(found, law, atol=1e-10)
        assert abs(usual - law).max() > 1e-3
    every = bandit.choices(s, state, s.ref_log_prob, nu=nu)
    np.testing.assert_allclose(np.where(where, every.uncertainty - bonus, 0), 0, atol=1e-10)


def test_a_behaviour_is_who_is_compared_and_kl_pcbs_nu(learned):
    """Of a policy that is not pi0: its draws (chi-squared, 20,000), its mean features."""
    problem, _, state = learned
    s = problem.setting
    behaviour = jnp.where(s.where, jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4])), -jnp.inf)
    behaviour = behaviour - jax.nn.logsumexp(behaviour, -1, keepdims=True)
    learner = bandit.kl_pcb(radius=0.6, behaviour=behaviour)
    drawn = learner.propose(jax.random.key(0), s, state, jnp.ones(20_000, jnp.int32))
    for actions in drawn:
        got = np.bincount(np.asarray(actions), minlength=4)
        want, wrong = (20_000 * np.exp(np.asarray(p[1])) for p in (behaviour, s.ref_log_prob))
        # Three degrees of freedom: above 16.3 once in a thousand; the control is far beyond.
        assert ((got - want) ** 2 / want).sum() < 16.3
        assert ((got - wrong) ** 2 / wrong).sum() > 100
    nu = s.mean_features(behaviour)
    policy = learner.policy(s, state)
    want = pessimism.option_two(s, state, radius=0.6, nu=nu)
    np.testing.assert_allclose(np.exp(policy), np.exp(want), atol=1e-12)
    of_pi0 = np.exp(bandit.kl_pcb(radius=0.6).policy(s, state))
    assert abs(np.exp(policy) - of_pi0).max() > 1e-3
