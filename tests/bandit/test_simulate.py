"""The simulation loop: exactness, keys, devices, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_klrlhf import bandit
from jax_klrlhf.bandit import evaluate, human, offline_greedy


def test_gap_shrinks_and_the_set_holds():
    """Six lines for a user: the gap after 512 comparisons is far below that of pi0."""
    problem = bandit.sphere(jax.random.key(0), contexts=8, actions=4, dim=4, kl_coef=0.3)
    learner = bandit.gshf(radius=1.0)
    run = jax.jit(
        jax.vmap(
            lambda key: bandit.simulate(
                key, problem, learner, rounds=16, batch=32, record=bandit.record_gap
            )
        )
    )(jax.random.split(jax.random.key(1), 16))
    assert run.record.shape == (16, 16)
    np.testing.assert_allclose(
        run.record[:, 0], evaluate.gap(problem, problem.setting.ref_log_prob)
    )
    assert float(jnp.mean(run.gap)) < 0.2 * float(jnp.mean(run.record[:, 0]))
    assert bool(jnp.all(run.state.converged))


@pytest.mark.parametrize("name", ["train_tickets"])
def test_human_choices(data_dir, name):
    choices = human.train_tickets(data_dir / "choices" / f"{name}.npz")
    problem = human.environment(choices, kl_coef=0.1)
    known, held_out = human.split_people(choices, fraction=0.5, seed=0)
    assert not set(choices.person[known]) & set(choices.person[held_out])
    seen = human.restrict(problem, known)
    learner = offline_greedy()
    data = human.comparisons(human.take(choices, known))
    state = learner.init(seen.setting, capacity=len(known))
    state = jax.jit(learner.update)(seen.setting, state, data)
    test = human.restrict(problem, held_out)
    gap = evaluate.gap(test, learner.policy(test.setting, state))
    assert float(gap) < 0.2 * float(evaluate.gap(test, test.setting.ref_log_prob))
