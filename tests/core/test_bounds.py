"""Each bound against its formula in NumPy; the inequalities between them; L4; T1 on an instance."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import given
from hypothesis import strategies as st

from jax_klrlhf.core import bounds, ellipsoid, gibbs, uncertainty

CONTEXTS, ACTIONS, DIM, RIDGE = 4, 5, 3, 0.5
RNG = np.random.default_rng(23)
PHI = RNG.normal(size=(CONTEXTS, ACTIONS, DIM))
PHI /= np.linalg.norm(PHI, axis=-1, keepdims=True)
LOG_PI = scipy.special.log_softmax(RNG.normal(size=(CONTEXTS, ACTIONS)), axis=-1)
LOG_PI0 = scipy.special.log_softmax(RNG.normal(size=(CONTEXTS, ACTIONS)), axis=-1)
CONTEXT_PROB = np.array([0.7, 0.05, 0.2, 0.05])
NU = np.einsum("x,xa,xad->d", CONTEXT_PROB, np.exp(LOG_PI0), PHI)
Z = RNG.normal(size=(12, DIM)) / 2
SIGMA = RIDGE * np.eye(DIM) + Z.T @ Z


def state():
    return ellipsoid.update(ellipsoid.init(DIM, ridge=RIDGE), jnp.array(Z))


def sigma_norm(v):
    return np.sqrt(np.einsum("...i,ij,...j", v, np.linalg.inv(SIGMA), v))


def test_gamma(x64):
    for margin in (0.0, 0.3, 2.0, 5.0):
        expected = 1 / (2 + math.exp(-margin) + math.exp(margin))
        np.testing.assert_allclose(bounds.gamma(margin), expected, rtol=1e-14)
    assert 0 <= bounds.gamma(1e4) < 1e-300


def test_radius(x64):
    found = bounds.radius(
        dim=4, delta=0.05, ridge=0.3, bound=2.0, curvature=bounds.gamma(4.0), constant=1.5
    )
    gamma = 1 / (2 + math.exp(-4) + math.exp(4))
    expected = 1.5 * math.sqrt((4 + math.log(20)) / gamma**2 + 0.3 * 4)
    np.testing.assert_allclose(found, expected, rtol=1e-13)


@pytest.mark.parametrize("each", [False, True], ids=["one nu", "nu of each context"])
def test_uncertainties_of_a_policy_and_their_bounds(each, x64):
    """Formulas by loops, contexts weighted; the norm of the mean is at most the mean of the norm.

    Jensen's inequality. With equal weights, or without nu, the numbers are others.
    """
    phi, log_pi = jnp.array(PHI), jnp.array(LOG_PI)
    origins = np.array([NU, 2 * NU, -NU, 0 * NU]) if each else np.array([NU] * CONTEXTS)
    mean, pointwise = np.zeros(DIM), 0.0
    for x in range(CONTEXTS):
        for a in range(ACTIONS):
            share = math.exp(LOG_PI[x, a]) * CONTEXT_PROB[x]
            mean += share * PHI[x, a]
            pointwise += share * sigma_norm(PHI[x, a] - origins[x])
    expected = sigma_norm(mean - CONTEXT_PROB @ origins)
    assert expected < pointwise
    given = {"context_prob": jnp.array(CONTEXT_PROB)}
    np.testing.assert_allclose(uncertainty.mean_features(phi, log_pi, **given), mean, rtol=1e-13)
    given["nu"] = jnp.array(origins if each else NU)
    found = uncertainty.expected(state(), phi, log_pi, **given)
    np.testing.assert_allclose(bounds.offline_expected(found, radius=1.7), 3.4 * expected)
    found = uncertainty.pointwise(state(), phi, log_pi, **given)
    np.testing.assert_allclose(bounds.offline_pointwise(found, radius=1.7), 3.4 * pointwise)
    with pytest.raises(ValueError, match=r"nu has shape \(2, 3\), expected \(3,\) or \(4, 3\)"):
        uncertainty.pointwise(state(), phi, log_pi, **(given | {"nu": jnp.zeros((2, 3))}))


def test_masked_actions_are_deleted(x64):
    """Padding every context with an action of NaN features changes neither value nor gradient."""
    where = jnp.arange(ACTIONS + 1) < ACTIONS
    where = jnp.broadcast_to(where[None, :], (CONTEXTS, ACTIONS + 1))
    phi = jnp.pad(jnp.array(PHI), ((0, 0), (0, 1), (0, 0)), constant_values=jnp.nan)
    log_pi = jnp.pad(jnp.array(LOG_PI), ((0, 0), (0, 1)), constant_values=-0.3)

    def both(phi, log_pi, where):
        given = {"context_prob": jnp.array(CONTEXT_PROB), "nu": jnp.array(NU), "where": where}
        return uncertainty.expected(state(), phi, log_pi, **given) + uncertainty.pointwise(
            state(), phi, log_pi, **given
        )

    value, gradient = jax.value_and_grad(both)(phi, log_pi, where)
    plain, plain_gradient = jax.value_and_grad(both)(jnp.array(PHI), jnp.array(LOG_PI), None)
    np.testing.assert_allclose(value, plain, rtol=1e-14)
    np.testing.assert_allclose(gradient[:, :ACTIONS], plain_gradient, rtol=1e-12)
    assert jnp.all(gradient[:, ACTIONS] == 0)


@pytest.mark.slow
def test_offline_bounds_hold_at_the_realized_radius(x64):
    """T1: with beta the realized error, J(pi) - J(pi_hat) + eta KL(pi || pi_hat) is bounded.

    Option II for many comparators; the pessimistic reward is built here, from its definition.
    """
    rng = np.random.default_rng(24)
    phi, log_pi0, nu = jnp.array(PHI), jnp.array(LOG_PI0), jnp.array(NU)
    equal = jnp.full(CONTEXTS, 1 / CONTEXTS)
    worst = 0.0
    for trial in range(40):
        kl_coef = (0.05, 1.0)[trial % 2]
        theta, theta_hat = rng.normal(size=(2, DIM))
        error = theta_hat - theta
        beta = math.sqrt(error @ SIGMA @ error)
        bonus = ellipsoid.norm(state(), phi - nu[None, None, :])
        pessimistic = phi @ jnp.array(theta_hat) - beta * bonus
        log_hat = gibbs.log_prob(pessimistic, log_pi0, kl_coef=kl_coef)
        reward = phi @ jnp.array(theta)
        log_pi = gibbs.log_prob(reward, log_pi0, kl_coef=kl_coef * rng.uniform(0.5, 5))
        gap = jnp.mean(
            gibbs.value(log_pi, reward, log_pi0, kl_coef=kl_coef)
            - gibbs.value(log_hat, reward, log_pi0, kl_coef=kl_coef)
        )
        kl = jnp.mean(jnp.sum(jnp.exp(log_pi) * (log_pi - log_hat), axis=-1))
        away = uncertainty.pointwise(state(), phi, log_pi, context_prob=equal, nu=nu)
        bound = bounds.offline_pointwise(away, radius=beta)
        worst = max(worst, float((gap + kl_coef * kl) / bound))
    # Half the bound is not one: the test would notice a lost factor 2.
    assert 0.5 < worst <= 1


def test_information_gain_is_the_elliptical_potential(x64):
    """L4, by the determinant lemma an equality for single directions, and below its cap."""
    current = ellipsoid.init(DIM, ridge=RIDGE)
    norms = []
    directions = Z / np.maximum(1, np.linalg.norm(Z, axis=-1, keepdims=True) / 2)
    for z in directions:
        norms.append(ellipsoid.norm(current, jnp.array(z)))
        current = ellipsoid.update(current, jnp.array(z)[None])
    gain = bounds.information_gain(current)
    sigma = RIDGE * np.eye(DIM) + directions.T @ directions
    expected = np.linalg.slogdet(sigma)[1] - DIM * math.log(RIDGE)
    np.testing.assert_allclose(gain, expected, rtol=1e-12)
    np.testing.assert_allclose(bounds.elliptical_potential(jnp.array(norms)), gain, rtol=1e-12)
    assert gain < bounds.information_gain_cap(dim=DIM, count=12, ridge=RIDGE)


@given(st.integers(1, 6), st.integers(1, 50), st.floats(0.01, 10.0))
def test_cap_is_reached_by_an_orthogonal_frame(dim, repeats, ridge):
    """`repeats` copies of each axis, of length 2: d log(1 + 4T/(lambda d)) with T = d repeats."""
    cap = bounds.information_gain_cap(dim=dim, count=dim * repeats, ridge=ridge)
    np.testing.assert_allclose(cap, dim * math.log(1 + 4 * repeats / ridge), rtol=1e-5)


def test_online_bound_on_any_run(x64):
    """min_t beta ||v_t||_{Sigma_t^-1} <= the bound, with Sigma built of m v v^T, C = 1."""
    rng = np.random.default_rng(25)
    ratios = []
    for rounds in (1, 4, 16):
        for batch in (1, 8):
            current = ellipsoid.init(DIM, ridge=RIDGE)
            norms = []
            for _ in range(rounds):
                v = jnp.array(rng.normal(size=(1, DIM)))
                norms.append(float(ellipsoid.norm(current, v[0])))
                current = ellipsoid.update(current, v, weights=jnp.array([batch]))
            bound = bounds.online(
                radius=2.0,
                information_gain=bounds.information_gain(current),
                rounds=rounds,
                batch_size=batch,
                constant=1.0,
            )
            ratios.append(2.0 * min(norms) / float(bound))
            if rounds == 1:  # one round: an equality
                np.testing.assert_allclose(ratios[-1], 1.0, rtol=1e-10)
    assert max(ratios) <= 1 + 1e-10


def test_hybrid_adds_the_way_from_the_reference(x64):
    options = {"information_gain": 3.0, "rounds": 4, "batch_size": 5, "constant": 1.2}
    direction = np.array([0.3, -0.2, 0.1])
    found = bounds.hybrid(state(), jnp.array(direction), radius=2.0, **options)
    expected = 2.0 * sigma_norm(direction) + 1.2 * 2.0 * math.sqrt(math.expm1(0.75) / 5)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_allclose(
        bounds.hybrid(state(), jnp.zeros(DIM), radius=2.0, **options),
        bounds.online(radius=2.0, **options),
        rtol=1e-14,
    )


RADIUS = {"dim": 2, "delta": 0.1, "ridge": 1.0, "bound": 1.0, "curvature": 0.1, "constant": 1.0}


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: bounds.gamma(-1.0), "margin_bound"),
        (lambda: bounds.radius(**(RADIUS | {"dim": 0})), "dim"),
        (lambda: bounds.radius(**(RADIUS | {"delta": 0.0})), "delta"),
        (lambda: bounds.radius(**(RADIUS | {"delta": 1.5})), "delta"),
        (lambda: bounds.radius(**(RADIUS | {"ridge": -1.0})), "ridge"),
        (lambda: bounds.radius(**(RADIUS | {"curvature": 0.0})), "curvature"),
        (lambda: bounds.radius(**(RADIUS | {"constant": math.nan})), "constant"),
        (lambda: bounds.information_gain_cap(dim=2, count=5, ridge=0.0), "ridge"),
        (
            lambda: bounds.online(
                radius=1.0, information_gain=1.0, rounds=0, batch_size=1, constant=1.0
            ),
            "rounds",
        ),
    ],
)
def test_wrong_facts(call, name):
    with pytest.raises(ValueError, match=name):
        call()
