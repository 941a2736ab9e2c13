"""Statements L0, L1, L2 and L6: exact identities between functions of the core, in float64.

L0  J(pi_r*) = eta E log Z; J(pi*) - J(pi) = eta E KL(pi || pi*).
L1  J(pi) - J(pi_hat) = E_pi[r* - r_hat] + E_pi_hat[r_hat - r*] - eta E KL(pi || pi_hat).
L2  J(pi*) - J(pi_hat) = (1/eta) int_0^1 g E Var_{pi_{r* + g D}}(D) dg, with D = r_hat - r*.
L6  DPO on a softmax-linear policy is the Bradley-Terry likelihood of the linear bandit.

L1 is in arXiv 2409.02392; the others follow in one line from the definitions.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_klrlhf.core import bradley_terry, divergence, gibbs, objectives
from jax_klrlhf.core.numerics import expectation

CONTEXTS, ACTIONS, DIM = 4, 6, 3


@pytest.fixture(params=[0.05, 1.0, 20.0], ids=lambda kl_coef: f"kl_coef={kl_coef}")
def world(request, x64):
    """True and estimated reward, a reference with a missing action, a policy, and kl_coef."""
    rng = np.random.default_rng(int(100 * request.param))
    reward, estimate = rng.normal(size=(2, CONTEXTS, ACTIONS))
    ref, policy = rng.exponential(size=(2, CONTEXTS, ACTIONS))
    ref[0, 1] = policy[0, 1] = 0.0
    ref, policy = (x / x.sum(axis=-1, keepdims=True) for x in (ref, policy))
    arrays = reward, estimate, np.log(ref, where=ref > 0, out=np.full_like(ref, -np.inf))
    log_policy = np.log(policy, where=policy > 0, out=np.full_like(policy, -np.inf))
    return (*map(jnp.array, arrays), jnp.array(log_policy), request.param)


def test_l0_the_optimal_value_is_the_free_energy_and_every_gap_a_divergence(world):
    reward, _, ref_log_prob, policy, kl_coef = world
    optimum = gibbs.log_prob(reward, ref_log_prob, kl_coef=kl_coef)
    best = gibbs.value(optimum, reward, ref_log_prob, kl_coef=kl_coef)
    energy = gibbs.free_energy(reward, ref_log_prob, kl_coef=kl_coef)
    np.testing.assert_allclose(best, energy, atol=1e-10)

    gap = best - gibbs.value(policy, reward, ref_log_prob, kl_coef=kl_coef)
    np.testing.assert_allclose(gap, kl_coef * divergence.categorical(policy, optimum), atol=1e-10)
    np.testing.assert_allclose(
        gap, gibbs.gap(policy, reward, ref_log_prob, kl_coef=kl_coef), atol=1e-10
    )
    assert (gap > 1e-3).all()


def test_l1_the_gap_to_any_policy_splits_into_reward_errors_and_a_divergence(world):
    reward, estimate, ref_log_prob, policy, kl_coef = world
    fitted = gibbs.log_prob(estimate, ref_log_prob, kl_coef=kl_coef)
    left = gibbs.value(policy, reward, ref_log_prob, kl_coef=kl_coef) - gibbs.value(
        fitted, reward, ref_log_prob, kl_coef=kl_coef
    )
    right = (
        expectation(policy, reward - estimate)
        + expectation(fitted, estimate - reward)
        - kl_coef * divergence.categorical(policy, fitted)
    )
    np.testing.assert_allclose(left, right, atol=1e-10)


def test_l2_the_gap_of_a_fitted_reward_is_a_variance_along_the_path_to_it(world):
    reward, estimate, ref_log_prob, _, kl_coef = world
    error = estimate - reward
    fitted = gibbs.log_prob(estimate, ref_log_prob, kl_coef=kl_coef)
    gap = gibbs.gap(fitted, reward, ref_log_prob, kl_coef=kl_coef)

    def integrand(g):
        on_path = gibbs.log_prob(reward + g * error, ref_log_prob, kl_coef=kl_coef)
        mean = expectation(on_path, error)
        return g * (expectation(on_path, error**2) - mean**2)

    # Composite Gauss-Legendre: the integrand is analytic, but steep where kl_coef is small.
    nodes, weights = np.polynomial.legendre.leggauss(20)
    panels = 20
    points = ((np.arange(panels)[:, None] + (nodes + 1) / 2) / panels).ravel()
    weights = np.tile(weights / (2 * panels), panels)
    integral = jnp.tensordot(jnp.array(weights), jax.vmap(integrand)(jnp.array(points)), 1)
    np.testing.assert_allclose(gap, integral / kl_coef, rtol=1e-10)


def linear_world(seed: int, pairs: int = 7):
    """Features, a reference, and labelled comparisons of a linear bandit."""
    rng = np.random.default_rng(seed)
    features = jnp.array(rng.normal(size=(CONTEXTS, ACTIONS, DIM)))
    ref_log_prob = jax.nn.log_softmax(jnp.array(rng.normal(size=(CONTEXTS, ACTIONS))))
    context = rng.integers(CONTEXTS, size=pairs)
    chosen = rng.integers(ACTIONS, size=pairs)
    rejected = (chosen + rng.integers(1, ACTIONS, size=pairs)) % ACTIONS
    rejected[0] = chosen[0]  # identical responses
    theta = jnp.array(rng.normal(size=DIM))
    return features, ref_log_prob, (context, chosen, rejected), theta


def pairs_of(log_ratio, context, chosen, rejected):
    """Scores of pairs of actions, with a reference of log-probability 0."""
    pair = jnp.stack([log_ratio[context, chosen], log_ratio[context, rejected]], -1)
    return objectives.Scores(pair, jnp.zeros_like(pair), jnp.ones(pair.shape, int))


@pytest.mark.parametrize(("kl_coef", "label_smoothing"), [(0.05, 0.0), (1.0, 0.2), (20.0, 0.0)])
def test_l6_dpo_on_a_softmax_linear_policy_is_the_bandit_likelihood(kl_coef, label_smoothing, x64):
    features, ref_log_prob, (context, chosen, rejected), theta = linear_world(0)

    def dpo(theta):
        log_prob = gibbs.log_prob(features @ theta, ref_log_prob, kl_coef=kl_coef)
        log_ratio = log_prob - ref_log_prob
        losses = objectives.sigmoid(
            pairs_of(log_ratio, context, chosen, rejected),
            kl_coef=kl_coef,
            label_smoothing=label_smoothing,
        )
        return jnp.sum(losses)

    def likelihood(theta):
        differences = features[context, chosen] - features[context, rejected]
        return jnp.sum(bradley_terry.nll(differences @ theta, label=1 - label_smoothing))

    got, want = (jax.jit(jax.value_and_grad(loss))(theta) for loss in (dpo, likelihood))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-12)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-10)


def test_l6_pessimistic_dpo_is_the_likelihood_of_the_reward_that_its_policy_discounts(x64):
    features, ref_log_prob, (context, chosen, rejected), theta = linear_world(1)
    kl_coef = 0.5
    bonus = jnp.linalg.norm(features, axis=-1)

    def pessimistic_dpo(theta):
        log_prob = gibbs.log_prob(features @ theta - bonus, ref_log_prob, kl_coef=kl_coef)
        log_ratio = log_prob - ref_log_prob
        pair = pairs_of(log_ratio, context, chosen, rejected)
        pair = pair._replace(bonus=pairs_of(bonus, context, chosen, rejected).log_prob)
        losses = objectives.pessimistic(pair, kl_coef=kl_coef)
        return jnp.sum(losses)

    def likelihood(theta):
        differences = features[context, chosen] - features[context, rejected]
        return jnp.sum(bradley_terry.nll(differences @ theta))

    got, want = (jax.jit(jax.value_and_grad(loss))(theta) for loss in (pessimistic_dpo, likelihood))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-12)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-10)
