"""A class of rewards in both worlds: one object, the same fit; and the linear one is no exception.

`own_linear` is the linear class as a user writes it, which goes the general way: every learner must
ask and deploy what it does with the built-in one, from the same keys.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_klrlhf import bandit
from jax_klrlhf.bandit import pessimism
from jax_klrlhf.core import objectives, pairs, targets
from jax_klrlhf.core.reward_class import RewardClass
from jax_klrlhf.training import rounds
from jax_klrlhf.training.rounds.parts import Comparisons, ragged
from tests.bandit.toolbox import awkward_problem
from tests.conformance.test_learners import ROWS
from tests.training import rounds_world as world

own_linear = RewardClass(lambda p, x: x @ p["w"], {"w": jnp.zeros(3)})
RULES = {
    "best_worst": lambda: bandit.from_rule(pairs.best_worst, samples=4),
    "enhancer": lambda: bandit.from_rule(pairs.enhancer(kl_coef=0.5, radius=1.0)),
    "best_of": lambda: bandit.from_target(partial(targets.best_of, n=3)),
    "ipo": lambda: bandit.policy_learner(partial(objectives.ipo, kl_coef=0.5)),
}
LEARNERS = {
    **{name.split(",")[0]: row[0] for name, row in ROWS.items() if name != "moving_reference"},
    **RULES,
}


@pytest.fixture(scope="module")
def duels():
    problem = awkward_problem()
    flat = jnp.where(problem.setting.where, -jnp.log(4.0), -jnp.inf)
    return bandit.compare(jax.random.key(0), problem, flat, flat, batch=24)


FAST = {"kl_ucb", "offline_gshf_two"}
"""The others are checked by `make slow`: compiling each learner twice takes its time."""


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in LEARNERS]
)
def test_every_learner_takes_the_class(name, duels):
    """What it believes, deploys and asks; the policy to the solver's accuracy."""
    problem = awkward_problem()
    found = []
    for setting in (problem.setting, problem.setting._replace(reward_class=own_linear)):
        learner = LEARNERS[name]()

        @jax.jit
        def play(setting, learner=learner):
            state = learner.update(setting, learner.init(setting, capacity=24), duels)
            context = jnp.arange(60, dtype=jnp.int32) % 3
            asked = learner.propose(jax.random.key(1), setting, state, context)
            return learner.policy(setting, state), asked

        found.append(play(setting))
    (policy, asked), (general, also) = found
    np.testing.assert_allclose(np.exp(general), np.exp(policy), atol=2e-3)
    same = np.mean([np.asarray(a) == np.asarray(b) for a, b in zip(asked, also, strict=True)])
    # An action changes where a uniform number falls between two laws that differ by rounding.
    assert same > 0.97


# --- a network: gold is no linear function of the counts


def network(parameters, features):
    return jnp.tanh(3 * features @ parameters["in"]) @ parameters["out"]


def net(seed, scale=1.0):
    one, two = jax.random.split(jax.random.key(seed))
    shapes = {"in": (one, (world.VOCAB, 3)), "out": (two, (3,))}
    init = {name: scale * jax.random.normal(key, shape) for name, (key, shape) in shapes.items()}
    return RewardClass(network, init)


def test_one_object_is_fitted_alike_in_both_worlds():
    """On the same comparisons of the same features: theta, Sigma, rewards and uncertainties."""
    mine, rng = net(0), np.random.default_rng(0)
    every = ragged(rng.integers(1, world.VOCAB, (2, 4, 3)), np.full((2, 4), 3))
    prompts = ragged(world.PROMPTS.ids[:2], world.PROMPTS.lengths[:2])
    phi = jnp.asarray(world.counts(prompts, every))
    context, first, second = (rng.integers(0, n, 40) for n in (2, 4, 4))
    first = np.where(first == second, (first + 1) % 4, first)
    label = rng.integers(0, 2, 40).astype(np.float32)
    # The bandit: contexts are the prompts, actions the four responses of each.
    setting = bandit.from_arrays(
        phi, jnp.zeros((2, 4)), kl_coef=0.5, reward_class=mine
    ).setting  # fmt: skip
    learner = bandit.greedy()
    index = (jnp.asarray(x, jnp.int32) for x in (context, first, second))
    duels = bandit.Duels(*index, jnp.asarray(label), jnp.ones(40))
    state = jax.jit(learner.update)(setting, learner.init(setting, capacity=40), duels)
    # The language model's belief.
    rows = np.stack([first, second], 1)
    data = Comparisons(
        ragged(prompts.ids[context], prompts.lengths[context]),
        ragged(every.ids[context[:, None], rows], every.lengths[context[:, None], rows]),
        label,
        np.ones(40, np.float32),
    )
    belief = rounds.parametric(world.counts, mine, dim=world.VOCAB, ridge=1.0, radius=2.0)
    held = belief.fit(jax.random.key(0), belief.init, [data], world.policies())
    assert bool(state.converged)
    assert bool(held.converged)
    assert np.abs(held.theta - belief.init.theta).max() > 0.1
    np.testing.assert_allclose(held.theta, state.theta, atol=2e-3)
    # Sums of squared gradients at parameters that are equal to the solver's accuracy alone.
    np.testing.assert_allclose(
        held.ellipsoid.precision, state.ellipsoid.precision, rtol=2e-2, atol=2e-2
    )
    # And what it says: uncertainty from the mean gradient of what was compared.
    scored = belief.score(held, world.policies(), prompts, every)
    np.testing.assert_allclose(scored.reward, setting.reward(state.theta), atol=2e-3)
    slope = np.asarray(setting.local(state.theta).features)
    nu = slope[context[:, None], rows].mean((0, 1))
    given = 2 * pessimism.bonus(setting, state, nu=jnp.asarray(nu))
    np.testing.assert_allclose(scored.uncertainty, given, rtol=2e-2)
    # Whitened features: distances are uncertainties of differences, for rules and enhancers.
    local = bandit.choices(setting, state, setting.ref_log_prob)
    away = np.linalg.norm(scored.features[:, 0] - scored.features[:, 1], axis=-1)
    shift = np.asarray(local.features[:, 0] - local.features[:, 1], np.float64)
    sigma = np.asarray(state.ellipsoid.precision, np.float64)
    want = 2 * np.sqrt(np.einsum("xd,de,xe->x", shift, np.linalg.inv(sigma), shift))
    np.testing.assert_allclose(away, want, rtol=2e-2)


@pytest.mark.slow
def test_a_linear_learner_is_left_behind_where_gold_is_no_linear_function():
    """Exact gaps where gold is even in the features: of each seed the network's is the smaller."""
    phi = jax.random.normal(jax.random.key(2), (6, 8, world.VOCAB))
    phi = phi / jnp.linalg.norm(phi, axis=-1, keepdims=True)
    gaps = {}
    for name, given in {"linear": {}, "network": {"reward_class": net(3)}}.items():
        problem = bandit.from_arrays(phi, 4 * jnp.abs(phi[..., 0]), kl_coef=0.3, **given)

        def gap(key, problem=problem):
            learner = bandit.uniform(ridge=0.3)
            return bandit.simulate(key, problem, learner, rounds=2, batch=512).gap

        keys = jax.random.split(jax.random.key(4), 4)
        gaps[name] = np.asarray(jax.jit(jax.vmap(gap))(keys))
    less = gaps["linear"] - gaps["network"]
    # Paired over four seeds; beyond three standard errors by chance in 3 of 100.
    assert less.mean() > 3 * less.std(ddof=1) / 2
    assert (less > 0).all()


def test_what_a_class_cannot_be_used_for_is_refused():
    setting = awkward_problem().setting._replace(reward_class=own_linear)
    bounded = bandit.greedy(bound=1.0)
    data = bandit.Duels(*(jnp.zeros(1, jnp.int32),) * 3, jnp.ones(1), jnp.ones(1))
    with pytest.raises(ValueError, match="bound= is a ball of linear rewards"):
        bounded.update(setting, bounded.init(setting, capacity=1), data)
    with pytest.raises(ValueError, match="it takes linear rewards alone"):
        bandit.moving_reference().init(setting, capacity=1)
    with pytest.raises(ValueError, match=r"nu has shape \(2,\), and the class has 18 parameters"):
        rounds.parametric(
            world.counts, net(0), dim=world.VOCAB, ridge=1.0, radius=1.0, nu=np.zeros(2)
        )
