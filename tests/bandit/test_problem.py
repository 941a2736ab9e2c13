"""Problems: what they promise, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_klrlhf import bandit
from jax_klrlhf.bandit import evaluate
from jax_klrlhf.bandit import problem as problems


def make(**kwargs):
    features = jnp.array([[[1.0, 0.0], [0.0, 1.0]], [[0.6, 0.8], [0.8, 0.6]]])
    return bandit.from_arrays(features, **{"reward_or_theta": jnp.array([1.0, 0.0]), **kwargs})


def log(*rows):
    return jnp.log(jnp.array(rows))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kl_coef": 0.0}, "kl_coef must be positive"),
        ({"kl_coef": jnp.ones(2)}, r"kl_coef must be a scalar, got shape \(2,\)"),
        ({"label_noise": 0.5}, "label_noise must lie in"),
        ({"ref_log_prob": log([0.5, 0.4], [0.5, 0.5])}, "row 0 sums to 0.9"),
        ({"ref_log_prob": log([0.5, 0.5], [1.0, 0.0])}, r"ref_log_prob\[1, 1\] is -inf"),
        ({"context_prob": jnp.array([0.5, 0.6])}, "sum is 1.1"),
        ({"context_prob": jnp.array([1.5, -0.5])}, "context_prob must be >= 0"),
        ({"context_prob": jnp.ones(3) / 3}, r"context_prob has shape \(3,\), expected \(2,\)"),
        ({"reward_or_theta": jnp.ones(3)}, r"theta has shape \(3,\), expected \(2,\)"),
        ({"reward_or_theta": jnp.ones((1, 2))}, r"reward has shape \(1, 2\), expected \(2, 2\)"),
        ({"reward_or_theta": jnp.full((2, 2), jnp.nan)}, "reward must be finite"),
        ({"where": jnp.array([[True, True], [False, False]])}, "context 1 has no action"),
    ],
)
def test_refused(change, message):
    with pytest.raises(ValueError, match=message):
        make(**{"kl_coef": 0.5, **change})


def test_long_features_are_refused_and_shapes_also_under_jit():
    with pytest.raises(ValueError, match="largest feature norm is 2"):
        bandit.from_arrays(jnp.array([[[2.0], [0.0]]]), jnp.ones(1), kl_coef=1.0)
    with pytest.raises(ValueError, match="theta has shape"):
        jax.eval_shape(
            lambda x: bandit.from_arrays(x, jnp.ones(3), kl_coef=1.0), jnp.ones((1, 2, 2))
        )
    with pytest.raises(ValueError, match="hidden must be"):
        bandit.sphere(jax.random.key(0), contexts=1, actions=2, dim=2, kl_coef=1.0, hidden=2)
    with pytest.raises(ValueError, match="rounds and batch"):
        bandit.simulate(jax.random.key(0), make(kl_coef=1.0), bandit.greedy(), rounds=0, batch=1)
    wrong = bandit.offline_greedy(behaviour=jnp.zeros((2, 1)))
    with pytest.raises(ValueError, match="behaviour has shape"):
        bandit.simulate(jax.random.key(0), make(kl_coef=1.0), wrong, rounds=1, batch=1)
    wrong = bandit.offline_gshf_two(radius=1.0, nu=jnp.zeros(3))
    with pytest.raises(ValueError, match="nu has shape"):
        bandit.simulate(jax.random.key(0), make(kl_coef=1.0), wrong, rounds=1, batch=1)
    with pytest.raises(ValueError, match="starts must be even"):
        bandit.simulate(
            jax.random.key(0),
            make(kl_coef=1.0),
            bandit.gshf(radius=1.0, starts=3),
            rounds=1,
            batch=1,
        )


def test_misspecified_reward_has_its_linear_part():
    """theta of a reward table is the least-squares fit up to a shift per context."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(3, 5, 2))
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    theta = np.array([0.7, -0.4])
    shifts = rng.normal(size=(3, 1))
    linear = bandit.from_arrays(
        jnp.asarray(features, jnp.float32),
        jnp.asarray(features @ theta + shifts, jnp.float32),
        kl_coef=1.0,
    )
    np.testing.assert_allclose(linear.theta, theta, atol=1e-5)


def test_sphere():
    problem = bandit.sphere(
        jax.random.key(0),
        contexts=3,
        actions=4,
        dim=5,
        kl_coef=0.3,
        bound=2.0,
        coverage=0.1,
        hidden=2,
        misspecification=0.25,
    )
    s = problem.setting
    np.testing.assert_allclose(jnp.linalg.norm(s.features, axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(problem.theta), 2, rtol=1e-5)
    assert (np.asarray(s.features)[:, :2, 3:] == 0).all()
    assert (np.asarray(s.features)[:, 2:, 3:] != 0).all()
    np.testing.assert_allclose(jnp.exp(s.ref_log_prob[:, 2:]), 0.1 / 4, rtol=1e-5)
    np.testing.assert_allclose(abs(problem.reward - s.reward(problem.theta)), 0.25, rtol=1e-4)


def test_the_knob_turns_the_coverage_coefficient():
    """Less pi0 on rare actions: the optimum is covered worse; isotropic problems hardly care."""

    def coefficient(coverage, hidden):
        problem = bandit.sphere(
            jax.random.key(1),
            contexts=8,
            actions=6,
            dim=4,
            kl_coef=0.05,
            coverage=coverage,
            hidden=hidden,
        )
        s = problem.setting
        return float(bandit.coverage(s, bandit.optimum(problem), s.ref_log_prob, ridge=1e-6))

    full, poor = coefficient(1.0, 2), coefficient(0.01, 2)
    assert poor > 2 * full, (poor, full)
    full, poor = coefficient(1.0, 0), coefficient(0.01, 0)
    assert poor < 2 * full, (poor, full)


def test_draws_have_their_laws():
    """Actions, contexts and noisy labels: chi-square against the exact probabilities."""
    problem = make(
        kl_coef=0.5,
        ref_log_prob=log([0.9, 0.1], [0.3, 0.7]),
        context_prob=jnp.array([0.25, 0.75]),
        label_noise=0.2,
    )
    n = 20_000
    ref = problem.setting.ref_log_prob
    data = bandit.compare(jax.random.key(2), problem, ref, ref[:, ::-1], batch=n)
    x, a, b, y = (np.asarray(v).astype(int) for v in data[:4])
    got = np.zeros((2, 2, 2, 2))
    np.add.at(got, (x, a, b, y), 1)
    p = np.exp(np.asarray(ref, np.float64))
    reward = np.asarray(problem.reward, np.float64)
    win = 1 / (1 + np.exp(-(reward[:, :, None] - reward[:, None, :])))
    win = 0.2 + 0.6 * win
    pairs = np.array([0.25, 0.75])[:, None, None] * p[:, :, None] * p[:, None, ::-1]
    expected = n * np.stack([pairs * (1 - win), pairs * win], -1)
    chi_square = ((got - expected) ** 2 / expected).sum()
    # 15 degrees of freedom: above 40 with probability 4e-4.
    assert chi_square < 40


def test_draw_never_selects_probability_zero():
    """The largest float below 1 and a first action of probability 0."""
    prob = jnp.array([[0.0, 0.3, 0.7 - 1e-7, 0.0]])
    for u in (0.0, 0.29999, 1 - 2.0**-24):
        assert int(problems._invert(jnp.array([u]), jnp.cumsum(prob, -1))[0]) in (1, 2)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (lambda p: jnp.exp(p), "these are probabilities: give jnp.log of them"),
        (lambda p: p + 1.0, "subtract its logsumexp"),
        (lambda p: p * jnp.nan, "sums to nan"),
    ],
    ids=["probabilities", "unnormalized", "nan"],
)
def test_what_is_no_policy_in_logarithms_is_refused(given, says):
    problem = make(kl_coef=0.5, ref_log_prob=log([0.9, 0.1], [0.3, 0.7]))
    log_prob = problem.setting.ref_log_prob
    for call in (
        lambda x: bandit.gap(problem, x),
        lambda x: bandit.value(problem, x),
        lambda x: bandit.reward_gap(problem, x),
        lambda x: bandit.kl(problem.setting, x),
        lambda x: bandit.coverage(problem.setting, x, log_prob, ridge=1.0),
    ):
        call(log_prob)
        with pytest.raises(ValueError, match=says):
            call(given(log_prob))
    with pytest.raises(ValueError, match=r"got an array of shape \(2,\)"):
        evaluate.check_log_prob(problem.setting, log_prob[0])


@pytest.mark.parametrize("radius", [-1.0, float("nan")])
def test_a_radius_that_is_no_radius_is_refused(radius):
    problem = make(kl_coef=0.5)
    s = problem.setting
    one, two = bandit.offline_gshf_one(radius=radius), bandit.offline_gshf_two(radius=radius)
    state = one.init(s, capacity=1)
    with pytest.raises(ValueError, match="radius must be >= 0"):
        one.policy(s, state)
    if radius != radius:
        with pytest.raises(ValueError, match="radius must be"):
            two.policy(s, state)
