"""One suite over every learner: a new algorithm is one row here."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_klrlhf import bandit
from jax_klrlhf.bandit import history
from jax_klrlhf.core import pairs, targets
from tests.bandit.toolbox import awkward_problem

LEARNERS = {
    "chi_po": lambda: bandit.chi_po(reward_bound=1.0),
    "dpo": lambda: bandit.dpo(),
    "from_rule": lambda: bandit.from_rule(pairs.best_worst, samples=4),
    "from_target": lambda: bandit.from_target(partial(targets.best_of, n=3)),
    "greedy": lambda: bandit.greedy(),
    "greedy_against_reference": lambda: bandit.greedy_against_reference(),
    "gshf": lambda: bandit.gshf(radius=1.0, bound=2.0),
    "kl_pcb": lambda: bandit.kl_pcb(radius=0.5),
    "kl_ucb": lambda: bandit.kl_ucb(radius=0.5),
    "most_uncertain": lambda: bandit.most_uncertain(),
    "moving_reference": lambda: bandit.moving_reference(),
    "offline_greedy": lambda: bandit.offline_greedy(),
    "offline_gshf_one": lambda: bandit.offline_gshf_one(radius=0.5),
    "offline_gshf_two": lambda: bandit.offline_gshf_two(radius=0.5),
    "pessimistic_mle": lambda: bandit.pessimistic_mle(radius=0.5),
    "thompson": lambda: bandit.thompson(scale=1.0),
    "two_stage": lambda: bandit.two_stage(first_stage=12),
    "uniform": lambda: bandit.uniform(),
    "xpo": lambda: bandit.xpo(optimism=0.1),
}
# Without data these deploy something else than pi0, by design.
OWN_START = {"kl_pcb", "kl_ucb", "offline_gshf_one", "offline_gshf_two", "pessimistic_mle"}
CONTEXTS, ACTIONS, ROUNDS, BATCH = 3, 4, 2, 12
HALVES = slice(5), slice(5, None)


@pytest.fixture(scope="module")
def problem() -> bandit.Problem:
    return awkward_problem()


def test_every_learner_is_listed():
    made = {
        name for name in bandit.__all__ if isinstance(getattr(bandit, name), type(bandit.simulate))
    }
    plain = {
        "at_contexts", "choices", "compare", "coverage", "draw", "error", "four_arms",
        "four_arms_data", "from_arrays", "gap", "in_confidence_set", "information", "kl",
        "mle_policy", "optimum", "policy_learner", "record_gap", "reference", "reward_gap",
        "reward_learner", "simulate", "sphere", "value",
    }  # fmt: skip
    assert made - plain == set(LEARNERS)


@pytest.mark.parametrize("name", LEARNERS)
def test_learner(problem, name):
    setting = problem.setting
    learner = LEARNERS[name]()
    traces = []

    def program(key, kl_coef):
        traces.append(name)
        here = problem._replace(setting=setting._replace(kl_coef=kl_coef))
        return bandit.simulate(
            key, here, learner, rounds=ROUNDS, batch=BATCH, record=lambda _, this: this
        )

    keys = jax.random.split(jax.random.key(0), 2)[jnp.array([0, 1, 0])]
    run = jax.jit(jax.vmap(program))(keys, jnp.array([0.5, 0.5, 0.5]))

    # Shapes, and a state whose structure survives the scan (or scan would have raised).
    assert run.log_prob.shape == (3, CONTEXTS, ACTIONS)
    data = run.record.data
    assert data.first.shape == data.second.shape == (3, ROUNDS, BATCH)

    # The policy is a distribution on the actions in play, in every round and at the end.
    policies = jnp.concatenate([run.record.log_prob, run.log_prob[:, None]], 1)
    where = np.broadcast_to(setting.where, policies.shape)
    assert not np.isnan(policies).any()
    assert (np.asarray(policies)[~where] == -np.inf).all()
    np.testing.assert_allclose(np.exp(policies).sum(-1), 1, rtol=1e-5)
    assert bool(jnp.all(run.gap >= -1e-6))
    assert np.isfinite(run.gap).all()

    # pi0's support is respected by what is asked.
    for chosen in (data.first, data.second):
        assert np.asarray(setting.where)[np.asarray(data.context), np.asarray(chosen)].all()

    # Before any data: pi0.
    if name not in OWN_START:
        start = np.exp(np.asarray(run.record.log_prob)[:, 0])
        np.testing.assert_allclose(
            start, np.broadcast_to(np.exp(setting.ref_log_prob), start.shape), atol=1e-6
        )

    # The key decides everything, and the data decide the policy.
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf[0], leaf[2]), run)
    assert (np.asarray(data.label)[0] != np.asarray(data.label)[1]).any()

    # One trace serves all seeds and all values of a coefficient.
    assert traces == [name]


@pytest.mark.parametrize("name", ["dpo", "greedy", "moving_reference", "two_stage"])
@pytest.mark.parametrize("advantage", [0, 8], ids=["rows", "tally"])
def test_what_the_state_is_made_of(x64, monkeypatch, name, advantage):
    """One of each kind of state: order, batching and rows of weight 0 don't matter."""
    del x64
    monkeypatch.setattr(history, "TALLY_ADVANTAGE", advantage)
    problem = awkward_problem()
    setting = problem.setting
    learner = LEARNERS[name]()
    uniform = jnp.where(setting.where, 0.0, -jnp.inf) - jnp.log(4.0)
    data = bandit.compare(jax.random.key(1), problem, uniform, uniform, batch=12)
    junk = data._replace(weight=jnp.zeros(12), label=1 - data.label)

    @jax.jit
    def learn(batches):
        state = learner.init(setting, capacity=24)
        for batch in batches:
            state = learner.update(setting, state, batch)
        return learner.policy(setting, state), state

    def check(batches, *, atol=1e-7):
        policy, state = learn(batches)
        np.testing.assert_allclose(np.exp(policy), np.exp(expected), atol=atol)
        converged = state.converged if hasattr(state, "converged") else state.estimate.converged
        assert bool(converged)

    expected, _ = learn([data])
    backwards = jax.tree.map(lambda leaf: leaf[::-1], data)
    swapped = data._replace(first=data.second, second=data.first, label=1 - data.label)
    check([backwards])
    check([swapped])
    check([data, junk])
    if name not in ("moving_reference", "two_stage"):  # these count rounds
        check(
            [jax.tree.map(lambda leaf: leaf[:5], data), jax.tree.map(lambda leaf: leaf[5:], data)]
        )
