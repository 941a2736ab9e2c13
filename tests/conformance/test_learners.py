"""What every learner of the bandit asks and deploys, at a fixed theta and Sigma, against NumPy.

Chi-squared of 20,000 pairs in each of two contexts, both agents jointly, at a false-alarm rate of
1e-6 a cell (about 60 cells). The *controls* of a row are laws that its pairs must reject: each is a
fault that went unseen before (a sign, a transposed root, one draw for two agents, swapped stages).
"""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from jax_klrlhf import bandit
from jax_klrlhf.core import fdivergence, pairs, targets
from tests.conformance import laws, worlds

RADIUS = 1.2
OTHER = np.array([-0.5, 2.0])
"""A second parameter: frozen, or accumulated."""
REWARD = worlds.PHI @ worlds.THETA
PI = worlds.gibbs(REWARD)
PI0 = worlds.PI0
INVERSE = np.linalg.inv(worlds.SIGMA)
NU = np.einsum("xa,xad->d", PI0, worlds.PHI) / 2


def bonus(nu):
    away = worlds.PHI - nu
    return np.sqrt(np.einsum("xad,de,xae->xa", away, INVERSE, away))


def of(theta):
    return worlds.gibbs(worlds.PHI @ theta)


def product(first, second):
    """``[contexts, actions, actions]`` of independent agents."""
    return np.einsum("xa,xb->xab", first, second)


def posterior(root, *, shared=False):
    """E over theta ~ N(theta_hat, root root') of both agents' law, by Gauss-Hermite quadrature."""
    nodes, weight = np.polynomial.hermite_e.hermegauss(40)
    weight = weight / weight.sum()
    grid = np.stack(np.meshgrid(nodes, nodes, indexing="ij"), -1).reshape(-1, 2)
    mass = np.outer(weight, weight).ravel()
    each = np.stack([of(worlds.THETA + root @ e) for e in grid])
    if shared:
        return np.einsum("n,nxa,nxb->xab", mass, each, each)
    one = np.einsum("n,nxa->xa", mass, each)
    return product(one, one)


def option_one():
    """max E<theta, phi> - eta KL - radius ||E phi - nu||, through its dual in the plane."""
    white = np.linalg.inv(np.linalg.cholesky(worlds.SIGMA))
    w = (worlds.PHI - NU) @ white.T

    def dual(u):
        score = np.log(PI0) + (REWARD - RADIUS * (w @ u)) / worlds.ETA
        return worlds.ETA * np.log(np.exp(score).sum(1)).mean()

    inside = {"type": "ineq", "fun": lambda u: 1 - u @ u}
    u = optimize.minimize(dual, np.zeros(2), constraints=inside, tol=1e-12).x
    return worlds.gibbs(REWARD - RADIUS * (w @ u))


def tilted():
    found, _, _ = laws.tilt(worlds.bandit_sets(), [0.5, 0.5], kl_coef=worlds.ETA, radius=RADIUS)
    return np.stack(found)


def uniform_pair():
    """The most informative pair of all, in either order; what its ties share."""
    return np.stack([laws.most_uncertain(s) for s in worlds.bandit_sets()])


UNIFORM = np.full((2, 4), 0.25)
UCB, LCB = worlds.gibbs(REWARD + RADIUS * bonus(NU)), worlds.gibbs(REWARD - RADIUS * bonus(NU))
ROOT = np.linalg.inv(np.linalg.cholesky(worlds.SIGMA)).T
MEAN = np.einsum("xa,xad->xd", PI0, worlds.PHI)[:, None]

# name: learner, changes of its state, law of the pair, policy, laws that must be rejected.
ROWS = {
    "greedy": (bandit.greedy, {}, lambda: product(PI, PI), PI, [product(PI, PI0)]),
    "greedy_against_reference": (
        bandit.greedy_against_reference, {}, lambda: product(PI, PI0), PI,
        [product(PI0, PI), product(PI, PI)],
    ),
    "uniform": (bandit.uniform, {}, lambda: product(UNIFORM, UNIFORM), PI, [product(PI0, PI0)]),
    "gshf": (
        partial(bandit.gshf, radius=RADIUS, iterations=12, refinements=20), {},
        lambda: product(PI, tilted()), PI, [product(PI, PI)],
    ),
    "kl_ucb": (
        partial(bandit.kl_ucb, radius=RADIUS), {}, lambda: product(UCB, PI0), UCB,
        [product(LCB, PI0), product(UCB, UCB)],
    ),
    "thompson": (
        partial(bandit.thompson, scale=3.0), {}, lambda: posterior(3 * ROOT), PI,
        [posterior(3 * ROOT, shared=True), posterior(3 * ROOT.T)],
    ),
    "most_uncertain": (
        bandit.most_uncertain, {}, uniform_pair, PI,
        [np.stack([laws.without_sigma(s) for s in worlds.bandit_sets()])],
    ),
    "moving_reference": (
        bandit.moving_reference, {"accumulated": OTHER}, lambda: product(of(OTHER), of(OTHER)),
        of(OTHER), [product(PI, PI)],
    ),
    "two_stage, first": (
        partial(bandit.two_stage, first_stage=10), {"frozen": OTHER, "seen": 9.0},
        lambda: product(PI0, PI0), PI, [product(of(OTHER), of(OTHER))],
    ),
    "two_stage, second": (
        partial(bandit.two_stage, first_stage=10), {"frozen": OTHER, "seen": 10.0},
        lambda: product(of(OTHER), of(OTHER)), PI, [product(PI0, PI0), product(PI, PI)],
    ),
    "dpo": (bandit.dpo, {}, lambda: product(PI, PI), PI, [product(PI, PI0)]),
    "xpo": (
        partial(bandit.xpo, optimism=0.1), {}, lambda: product(PI, PI0), PI, [product(PI, PI)],
    ),
    "chi_po": (
        partial(bandit.chi_po, reward_bound=1.0), {}, lambda: product(PI0, PI0), PI,
        [product(PI, PI0)],
    ),
    "offline_greedy": (bandit.offline_greedy, {}, lambda: product(PI0, PI0), PI, []),
    "offline_gshf_one": (
        partial(bandit.offline_gshf_one, radius=RADIUS), {}, lambda: product(PI0, PI0),
        option_one(), [product(PI, PI)],
    ),
    "offline_gshf_two": (
        partial(bandit.offline_gshf_two, radius=RADIUS), {}, lambda: product(PI0, PI0), LCB, [],
    ),
    "kl_pcb": (
        partial(bandit.kl_pcb, radius=RADIUS), {}, lambda: product(PI0, PI0),
        worlds.gibbs(REWARD - RADIUS * bonus(MEAN)), [],
    ),
    "pessimistic_mle": (
        partial(bandit.pessimistic_mle, radius=RADIUS), {}, lambda: product(PI0, PI0),
        np.eye(4)[(REWARD - RADIUS * bonus(NU)).argmax(1)], [],
    ),
}  # fmt: skip


def prepared(learner, changes):
    """The learner's state before data, with theta, Sigma and what else is said put in."""
    state = learner.init(worlds.problem().setting, capacity=4)
    theta = jnp.array(worlds.THETA, "float32")
    changes = {name: jnp.asarray(value, "float32") for name, value in changes.items()}
    if hasattr(state, "estimate"):
        inner = state.estimate._replace(theta=theta, ellipsoid=worlds.ball())
        return state._replace(estimate=inner, **changes)
    if hasattr(state, "ellipsoid"):
        changes["ellipsoid"] = worlds.ball()
    return state._replace(theta=theta, **changes)


@pytest.mark.parametrize("name", ROWS)
def test_pairs_and_policy(name):
    make, changes, law, policy, controls = ROWS[name]
    learner, setting = make(), worlds.problem().setting
    state = prepared(learner, changes)

    @jax.jit
    def ask(key):
        if name != "thompson":
            return learner.propose(key, setting, state, worlds.CONTEXT)
        # Each agent's parameter is drawn once a round: a round of two contexts for every key.
        keys = jax.random.split(key, worlds.DRAWS // 2)
        both = jnp.arange(2, dtype=jnp.int32)
        found = jax.vmap(lambda k: learner.propose(k, setting, state, both))(keys)
        return jax.tree.map(lambda x: x.ravel(), found)

    first, second = map(np.asarray, ask(jax.random.key(1)))
    want = law()

    def contradicts(joint):
        return any(
            laws.rejected(first[x::2], second[x::2], np.ones(len(first[x::2]), bool), joint[x])
            for x in range(2)
        )

    assert not contradicts(want)
    for control in controls:
        assert contradicts(control)
    found = np.exp(np.asarray(jax.jit(learner.policy)(setting, state), np.float64))
    np.testing.assert_allclose(found, policy, atol=2e-4)


def test_two_stage_freezes_what_the_first_stage_ended_with():
    """Frozen until the stage is full, then for good; a stage ends with the round that fills it."""
    problem = worlds.problem()
    learner = bandit.two_stage(first_stage=8)
    state = learner.init(problem.setting, capacity=24)
    thetas = []
    update = jax.jit(partial(learner.update, problem.setting))
    for number in range(3):
        data = bandit.compare(
            jax.random.key(number), problem, *[problem.setting.ref_log_prob] * 2, batch=6
        )
        state = update(state, data)
        thetas.append(np.asarray(state.estimate.theta))
        frozen = np.asarray(state.frozen)
        np.testing.assert_array_equal(frozen, thetas[min(number, 1)])
    assert np.abs(thetas[2] - thetas[1]).max() > 1e-3


# --- targets: what is aimed at, listed, on draws, and as a learner deploys it


def best_of_three(s):
    law = np.zeros(len(s.ids))
    for draws in np.ndindex(*(len(s.ids),) * 3):
        best = [a for a in draws if np.isclose(s.reward[a], s.reward[list(draws)].max())]
        for action in best:
            law[action] += s.mass[list(draws)].prod() / len(best)
    return law


def forward_optimum(s, law):
    """eta p / (lambda - r) with sum 1, by a root in lambda: where f' = 1 - 1/z meets r / eta."""
    law = laws.normal(law)
    most = s.reward.max()
    ends = most + worlds.ETA * law.min() / 10, most + worlds.ETA
    level = optimize.brentq(lambda x: (worlds.ETA * law / (x - s.reward)).sum() - 1, *ends)
    return worlds.ETA * law / (level - s.reward)


BOUND = 1.5
TARGETS = {
    "optimum": (
        partial(targets.optimum, kl_coef=worlds.ETA),
        lambda s: laws.normal(np.exp(s.ref + s.reward / worlds.ETA)),
        lambda s: laws.normal(s.mass * np.exp(s.reward / worlds.ETA)),
    ),
    "forward_kl": (
        partial(targets.optimum, kl_coef=worlds.ETA, divergence=fdivergence.forward_kl),
        lambda s: forward_optimum(s, np.exp(s.ref)),
        lambda s: forward_optimum(s, s.mass),
    ),
    "best_of": (partial(targets.best_of, n=3), best_of_three, best_of_three),
    "accepted": (
        partial(targets.accepted, kl_coef=0.5, kl_coef_prev=2.0, reward_bound=BOUND),
        lambda s: laws.normal(s.mass * np.exp(1.5 * s.reward)),
        lambda s: laws.normal(s.mass * np.exp(1.5 * s.reward)),
    ),
}


@pytest.mark.parametrize("name", TARGETS)
def test_targets(name):
    """The same function listed, on three draws of pi0, on a model's responses, and deployed."""
    target, listed, weights = TARGETS[name]
    setting, state = worlds.problem().setting, worlds.estimate()
    every = bandit.choices(setting, state, setting.ref_log_prob)
    of_pi0 = [
        laws.Set(s.ids, np.exp(s.ref), s.reward, s.phi, s.inverse, s.ref)
        for s in worlds.bandit_sets()
    ]
    found = np.exp(np.asarray(target(every)))
    np.testing.assert_allclose(found, np.stack([listed(s) for s in of_pi0]), atol=1e-5)
    deployed = bandit.from_target(target).policy(setting, state)
    np.testing.assert_allclose(np.exp(deployed), found, atol=1e-6)
    index = jnp.array([[0, 2, 0], [1, 1, 3]], "int32")
    drawn = bandit.rules.choice_sets.take(every._replace(log_prob=None), index)
    weight = np.exp(np.asarray(target(drawn)))
    for x, row in enumerate(np.asarray(index)):
        s = laws.merged(tuple(row), of_pi0[x])
        kept = np.asarray(drawn.where)[x]
        np.testing.assert_allclose(weight[x][kept], weights(s), atol=1e-5)
        assert not weight[x][~kept].any()
    language = worlds.Language()
    found = np.exp(np.asarray(target(language.listed)))
    np.testing.assert_allclose(found, np.stack([listed(s) for s in language.sets]), atol=1e-5)


def test_a_bonus_is_a_choice_set_with_another_reward():
    setting, state = worlds.problem().setting, worlds.estimate()
    every = bandit.choices(setting, state, setting.ref_log_prob)
    for bent, want in ((targets.pessimistic, LCB), (targets.optimistic, UCB)):
        found = targets.optimum(bent(every, radius=RADIUS), kl_coef=worlds.ETA)
        np.testing.assert_allclose(np.exp(found), want, atol=1e-5)
    share = targets.effective_share(every, targets.optimum(every, kl_coef=worlds.ETA))
    want = 1 / (worlds.gibbs(REWARD) ** 2 / PI0).sum(1)
    np.testing.assert_allclose(share, want, rtol=1e-4)
    with pytest.raises(ValueError, match="needs `uncertainty`"):
        targets.pessimistic(every._replace(uncertainty=None))


def test_what_is_no_learner_is_refused_by_name():
    problem = worlds.problem()
    # As a user has it: without the types that the session checks.
    simulate = inspect.unwrap(bandit.simulate)
    with pytest.raises(ValueError, match=r"got the function greedy; call it: greedy\(\.\.\.\)"):
        simulate(jax.random.key(0), problem, bandit.greedy, rounds=1, batch=1)
    with pytest.raises(ValueError, match=r"got the function best_worst"):
        simulate(jax.random.key(0), problem, pairs.best_worst, rounds=1, batch=1)
