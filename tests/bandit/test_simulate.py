"""The simulation loop: what it is given, what it keeps, and where it runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_klrlhf import bandit
from jax_klrlhf.bandit import human
from jax_klrlhf.core import preferences
from jax_klrlhf.errors import InputError


@pytest.fixture(scope="module")
def problem():
    return bandit.sphere(jax.random.key(0), contexts=4, actions=4, dim=3, kl_coef=0.3)


@pytest.mark.slow
def test_gap_shrinks_the_same_on_eight_devices(problem):
    """Six lines for a user; the gap falls; sharded over devices the seeds come out the same."""
    learner = bandit.gshf(radius=1.0)
    run = jax.jit(
        jax.vmap(
            lambda key: bandit.simulate(
                key, problem, learner, rounds=8, batch=32, record=bandit.record_gap
            )
        )
    )
    keys = jax.random.split(jax.random.key(1), 16)
    one = run(keys)
    assert one.record.shape == (16, 8)
    start = bandit.gap(problem, problem.setting.ref_log_prob)
    np.testing.assert_allclose(one.record[:, 0], start, rtol=1e-5)
    assert float(jnp.mean(one.gap)) < 0.2 * float(start)
    assert bool(jnp.all(one.state.converged))

    mesh = jax.make_mesh((8,), ("seeds",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("seeds"))
    eight = run(jax.device_put(keys, sharding))
    assert len(eight.gap.sharding.device_set) == 8
    np.testing.assert_allclose(eight.gap, one.gap, rtol=1e-3, atol=1e-5)


def test_used_and_offline(problem):
    """`used` sweeps the batch size in one program; offline data count before the first round."""
    learner = bandit.offline_greedy()
    ref = problem.setting.ref_log_prob

    def count(state):
        return jnp.sum(state.history.wins + state.history.losses)

    @jax.jit
    def sizes(used):
        def record(_, this):
            return jnp.sum(jnp.where(this.data.first != this.data.second, this.data.weight, 0))

        run = bandit.simulate(
            jax.random.key(2), problem, learner, rounds=3, batch=8, used=used, total=record
        )
        return count(run.state), run.total

    got, expected = jax.vmap(sizes)(jnp.array([1, 5, 8]))
    np.testing.assert_array_equal(got, expected)
    assert (np.diff(got) > 0).all()

    data = bandit.compare(jax.random.key(3), problem, ref, ref, batch=200)
    apart = int(jnp.sum(data.first != data.second))

    @jax.jit
    def hybrid():
        return bandit.simulate(
            jax.random.key(2),
            problem,
            learner,
            rounds=1,
            batch=8,
            used=0,
            offline=data,
            record=lambda p, this: (count(this.state), bandit.gap(p, this.log_prob)),
        )

    run = hybrid()
    assert int(run.record[0][0]) == apart
    np.testing.assert_allclose(run.record[1][0], run.gap, rtol=1e-4)


def test_memory_does_not_grow_with_rounds(problem):
    """The compiled program of 100 times the rounds needs the same memory."""

    def temporary(rounds):
        def run(key):
            return bandit.simulate(key, problem, bandit.greedy(), rounds=rounds, batch=4).gap

        return jax.jit(run).lower(jax.random.key(0)).compile().memory_analysis().temp_size_in_bytes

    assert temporary(500) <= temporary(5)


def test_moving_the_reference_loses_the_regularization(problem):
    """The ablation: its KL to pi0 keeps growing beyond the optimum's; from pi0 it doesn't."""

    @jax.jit
    def end(key):
        runs = [
            bandit.simulate(key, problem, learner, rounds=12, batch=32)
            for learner in (bandit.moving_reference(), bandit.greedy())
        ]
        return [(bandit.kl(problem.setting, run.log_prob), run.gap) for run in runs]

    (moving_kl, moving_gap), (kl, gap) = end(jax.random.key(4))
    optimal = bandit.kl(problem.setting, bandit.optimum(problem))
    assert float(moving_kl) > 1.5 * float(optimal)
    assert float(moving_gap) > 10 * float(gap)
    assert abs(float(kl) / float(optimal) - 1) < 0.5


@pytest.mark.slow
def test_train_tickets(data_dir):
    """Real people: learned from half of them, evaluated on the situations of the others."""
    choices = human.train_tickets(data_dir / "choices" / "train_tickets.npz")
    problem = human.environment(choices, kl_coef=0.1)
    # To a model with ties, people who never tie are surer than Bradley-Terry takes them to be.
    surer = human.environment(choices, kl_coef=0.1, preference=preferences.davidson(1.0))
    assert (jnp.abs(surer.theta) > jnp.abs(problem.theta)).all()
    assert surer.setting.preference.outcomes == (1.0, 0.5, 0.0)
    # Cheaper, faster, fewer changes and better comfort (0 is best) are preferred: all known signs.
    assert (np.asarray(problem.theta) < 0).all()
    known, held_out = human.split_people(choices, fraction=0.5, seed=0)
    assert not set(choices.person[known]) & set(choices.person[held_out])
    seen, test = human.restrict(problem, known), human.restrict(problem, held_out)
    np.testing.assert_allclose(jnp.sum(test.setting.context_prob), 1, rtol=1e-5)
    data = human.comparisons(human.take(choices, known))
    for learner in (bandit.offline_greedy(), bandit.offline_gshf_two(radius=1.0)):
        state = learner.init(seen.setting, capacity=len(known))
        state = jax.jit(learner.update)(seen.setting, state, data)
        assert bool(state.converged)
        gap = bandit.gap(test, learner.policy(test.setting, state))
        assert float(gap) < 0.2 * float(bandit.gap(test, test.setting.ref_log_prob))


@pytest.mark.slow
def test_cars(data_dir):
    """Six alternatives, and rewards that differ between people through their traits."""
    choices = human.cars(data_dir / "choices" / "cars.npz")
    few = human.take(choices, np.arange(300))
    data = human.comparisons(few)
    assert data.context.shape == (1500,)
    np.testing.assert_allclose(jnp.sum(data.weight), 300, rtol=1e-5)
    assert (np.asarray(data.first) == np.repeat(few.choice, 5)).all()
    assert (np.asarray(data.first) != np.asarray(data.second)).all()
    both = human.interact(few)
    assert both.features.shape == (300, 6, 19 * 4)
    assert len(both.names) == 19 * 4
    ratio = both.features[:, :, 19:38] - both.features[:, :, :19] * few.person_features[:, :1, None]
    np.testing.assert_allclose(ratio, 0, atol=1e-6)
    problem = human.environment(both, kl_coef=0.1)
    better = bandit.gap(problem, problem.setting.ref_log_prob)
    assert float(better) > 0


def test_bad_choice_files(tmp_path):
    missing = tmp_path / "none.npz"
    with pytest.raises(InputError, match=r"none\.npz: no such file"):
        human.train_tickets(missing)
    text = tmp_path / "text.npz"
    text.write_text("hello")
    with pytest.raises(InputError, match=r"not an \.npz archive"):
        human.train_tickets(text)
    other = tmp_path / "other.npz"
    np.savez(other, xa=np.zeros((2, 4)))
    with pytest.raises(InputError, match="no array 'xb'"):
        human.train_tickets(other)
    short = {
        "xb": np.zeros((3, 4)),
        "y": np.ones(2),
        "user": np.ones(2),
        "features": np.array(["a"]),
    }
    np.savez(other, xa=np.zeros((2, 4)), **short)
    with pytest.raises(InputError, match=r"'xb' has shape \(3, 4\), expected \(2, 4\)"):
        human.train_tickets(other)
