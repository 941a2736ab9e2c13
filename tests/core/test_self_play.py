"""Self-play on small games: one step in three guises, monotone and yet not convergent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_klrlhf.core import bradley_terry, gibbs, group_losses, links, self_play

pytestmark = pytest.mark.usefixtures("x64")

# Equilibrium of the unregularized game (.3, .3, .4), in a cycle.
CYCLE = 0.5 + np.array([[0.0, 0.4, -0.3], [-0.4, 0.0, 0.3], [0.3, -0.3, 0.0]])
NASH = np.array([0.3, 0.3, 0.4])
REF = np.log(np.array([0.5, 0.2, 0.3]))


def _win(log_prob, prefer=CYCLE):
    return links.win_rate(jnp.asarray(prefer), log_prob)


def test_sppo_and_dno_are_the_mirror_step():
    policy = jnp.log(jnp.array([0.2, 0.5, 0.3]))
    win, step = _win(policy), 3.0
    to = self_play.mirror_step(policy, win, jnp.asarray(REF), step=step, kl_coef=0.0)
    by_hand = np.exp(policy) * np.exp(step * np.exp(policy) @ CYCLE.T)
    np.testing.assert_allclose(np.exp(to), by_hand / by_hand.sum(), rtol=1e-12)
    pairs = np.array([(i, j) for i in range(3) for j in range(3)])

    def sppo(logits):
        log_prob = jax.nn.log_softmax(logits)
        made = group_losses.from_actions(log_prob, win, ref_log_prob=policy)
        return group_losses.regression(kl_coef=1 / step)(made)

    def dno(logits):
        log_ratio = (jax.nn.log_softmax(logits) - policy) / step
        margin = log_ratio[pairs[:, 0]] - log_ratio[pairs[:, 1]]
        label = jax.nn.sigmoid(win[pairs[:, 0]] - win[pairs[:, 1]])
        return jnp.mean(bradley_terry.nll(margin, label=label))

    for loss in (sppo, dno):
        np.testing.assert_allclose(jax.grad(loss)(to), 0, atol=1e-12)
        assert float(jnp.abs(jax.grad(loss)(policy)).max()) > 1e-3


def test_each_step_beats_the_one_before_and_the_cycle_goes_on():
    policy, total = jnp.asarray(REF), np.zeros(3)
    for _ in range(600):
        to = self_play.mirror_step(policy, _win(policy), jnp.asarray(REF), step=1.0, kl_coef=0.0)
        beats = float(jnp.exp(to) @ jnp.asarray(CYCLE) @ jnp.exp(policy))
        assert beats >= 0.5 - 1e-12
        policy = to
        total += np.exp(policy)
    last = np.abs(np.exp(policy) - NASH).sum() / 2
    average = np.abs(total / 600 - NASH).sum() / 2
    assert last > 0.3
    assert average < 0.05


def test_with_pi0_held_fixed_the_last_iterate_reaches_the_equilibrium():
    policy = jnp.asarray(REF)
    for _ in range(600):
        policy = self_play.mirror_step(
            policy, _win(policy), jnp.asarray(REF), step=0.2, kl_coef=0.5
        )
    wanted = links.nash(jnp.asarray(CYCLE), jnp.asarray(REF), kl_coef=0.5)
    np.testing.assert_allclose(np.exp(policy), np.exp(wanted.log_prob), atol=1e-6)
    assert float(wanted.exploitability) < 1e-6
    # ... which the step without pi0 does not have as its fixed point.
    off = self_play.mirror_step(policy, _win(policy), jnp.asarray(REF), step=0.2, kl_coef=0.0)
    assert np.abs(np.exp(off) - np.exp(policy)).max() > 1e-3


def test_under_bradley_terry_win_rates_saturate():
    reward = jnp.array([4.0, 2.0, 0.0])
    prefer = links.matrix(reward)
    equilibrium = links.nash(prefer, jnp.asarray(REF), kl_coef=0.5)
    optimum = gibbs.log_prob(reward, jnp.asarray(REF), kl_coef=0.5)
    assert np.abs(np.exp(equilibrium.log_prob) - np.exp(optimum)).max() > 0.1
    # Without pi0 the steps end at the best action.
    policy = jnp.asarray(REF)
    for _ in range(400):
        policy = self_play.mirror_step(
            policy, _win(policy, prefer), jnp.asarray(REF), step=1.0, kl_coef=0.0
        )
    assert float(jnp.exp(policy)[0]) > 0.999


def test_a_reward_at_full_step_is_the_gibbs_policy_at_once():
    rng = np.random.default_rng(0)
    policy = jax.nn.log_softmax(jnp.asarray(rng.normal(size=(4, 5))))
    ref = jax.nn.log_softmax(jnp.asarray(rng.normal(size=(4, 5))))
    reward = jnp.asarray(rng.normal(size=(4, 5)))
    found = self_play.mirror_step(policy, reward, ref, step=2.0, kl_coef=0.5)
    np.testing.assert_allclose(found, gibbs.log_prob(reward, ref, kl_coef=0.5), atol=1e-12)
    with pytest.raises(ValueError, match="step"):
        self_play.mirror_step(policy, reward, ref, step=0.0, kl_coef=0.5)
