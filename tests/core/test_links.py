"""Win rates, equilibria, regret, mixtures: against sums by hand, and what cycles do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_klrlhf.core import gibbs, links

pytestmark = pytest.mark.usefixtures("x64")
with jax.enable_x64(True):
    UNIFORM = jnp.full(3, -np.log(3))
    CYCLE = jnp.array([[0.5, 0.9, 0.2], [0.1, 0.5, 0.9], [0.8, 0.1, 0.5]])


def test_win_rates_are_sums_over_the_opponents_in_play():
    rng = np.random.default_rng(0)
    prefer, log_prob = jnp.array(rng.uniform(size=(2, 4, 4))), jnp.array(rng.normal(size=(2, 4)))
    where = jnp.ones((2, 4), bool).at[1, 0].set(False)
    prefer = prefer.at[1, :, 0].set(jnp.nan)
    found = links.win_rate(prefer, log_prob, where=where)
    weight = np.where(where, np.exp(log_prob), 0)
    weight /= weight.sum(-1, keepdims=True)
    expected = np.einsum("xb,xab->xa", weight, np.where(np.isnan(prefer), 0, prefer))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_nash_is_the_only_policy_without_a_better_answer_on_a_cycle():
    """Bradley-Terry and one PAR step are exploitable on it; with a reward behind P, they aren't."""
    kl_coef = 0.05
    found = links.nash(CYCLE, UNIFORM, kl_coef=kl_coef, steps=1000)
    assert found.exploitability < 1e-10
    answer = gibbs.log_prob(links.win_rate(CYCLE, found.log_prob), UNIFORM, kl_coef=kl_coef)
    np.testing.assert_allclose(found.log_prob, answer, atol=1e-5)
    # The best Bradley-Terry reward of a complete design has the mean win rate's order.
    par = gibbs.log_prob(links.win_rate(CYCLE, UNIFORM), UNIFORM, kl_coef=kl_coef)
    assert links.exploitability(par, CYCLE, UNIFORM, kl_coef=kl_coef) > 0.01
    reward = jnp.array([0.0, 0.3, 0.1])
    bt = links.nash(links.matrix(reward), UNIFORM, kl_coef=kl_coef)
    assert bt.exploitability < 1e-10


def test_iterated_regression_to_the_win_rate_is_monotone_with_a_reward_and_not_on_a_cycle():
    """DNO, its reference moving along: log pi <- log pi + sigma-margins / eta, to convergence."""

    def run(prefer, steps=60, kl_coef=0.3):
        def step(log_prob, _):
            # The population optimum of DNO's regression: eta log pi'/pi = win rate + constant.
            moved = jax.nn.log_softmax(log_prob + links.win_rate(prefer, log_prob) / kl_coef)
            against = jnp.exp(moved) @ prefer @ jnp.exp(log_prob)
            worst = jnp.max(prefer @ jnp.exp(moved)) - 0.5
            return moved, (against, worst)

        return jax.lax.scan(step, UNIFORM + jnp.array([0.1, 0.0, -0.1]), None, length=steps)[1]

    _, worst = run(links.matrix(jnp.array([0.0, 1.0, 0.5])))
    assert (np.diff(worst) <= 1e-9).all()
    assert worst[-1] < 1e-3
    _, worst = run(CYCLE)
    assert (np.diff(worst) > 0.01).any()
    assert worst[-10:].max() > 0.2


def test_regret_is_the_reward_for_whole_responses_and_not_for_prefixes():
    """All responses of two ternary tokens: soft values by hand."""
    rng = np.random.default_rng(1)
    reward, ref = 3 * rng.normal(size=(3, 3)), rng.dirichlet(np.ones(3), size=(4,))
    kl_coef = 0.4
    first_ref, second_ref = np.log(ref[0]), np.log(ref[1:])
    soft = kl_coef * np.log((np.exp(second_ref) * np.exp(reward / kl_coef)).sum(1))
    top = kl_coef * np.log((np.exp(first_ref) * np.exp(soft / kl_coef)).sum())
    first = first_ref + (soft - top) / kl_coef
    second = second_ref + (reward - soft[:, None]) / kl_coef
    ratio = lambda p, q: (jnp.array(p), jnp.array(q))  # noqa: E731
    both = ratio(
        np.stack([np.repeat(first, 3), second.ravel()], 1),
        np.stack([np.repeat(first_ref, 3), second_ref.ravel()], 1),
    )
    whole = links.regret(*both, kl_coef=kl_coef)
    np.testing.assert_allclose(whole, reward.ravel() - top, rtol=1e-10)
    where = jnp.array([[True, False]] * 9)
    prefix = np.asarray(links.regret(*both, kl_coef=kl_coef, where=where))[::3]
    np.testing.assert_allclose(prefix, soft - top, rtol=1e-10)
    # Regret labels of prefixes give their marginal law under pi*; partial return (0 here) can't.
    np.testing.assert_allclose(
        gibbs.log_prob(jnp.array(prefix), jnp.array(first_ref), kl_coef=kl_coef), first, rtol=1e-10
    )
    assert np.abs(np.exp(first_ref) - np.exp(first)).sum() / 2 > 0.1


def test_mixture_likelihood_is_the_marginal_one():
    rng = np.random.default_rng(2)
    margin, logits = rng.normal(size=(3, 5)) * 3, rng.normal(size=(3, 5))
    label = np.array([1.0, 0.0, 1.0, 0.3, 0.0])
    weight = np.exp(logits) / np.exp(logits).sum(0)
    p = (weight / (1 + np.exp(-margin))).sum(0)
    found = links.mixture_nll(jnp.array(margin), jnp.array(logits), label=jnp.array(label))
    np.testing.assert_allclose(found, -label * np.log(p) - (1 - label) * np.log1p(-p), rtol=1e-10)
