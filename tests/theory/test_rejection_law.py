"""L7: exact rejection sampling gives the Gibbs law; several steps give the same law.

Statistical tests. With N accepted draws over A actions, the total variation of the counts from the
true law q has mean at most (1/2) sum sqrt(q (1 - q) / N) and changes by at most 1/N when one draw
does, so by McDiarmid P(TV > mean + t) <= exp(-2 N t^2). A false-alarm rate of 1e-6 gives
t = sqrt(log(1e6) / (2 N)); it does not depend on our output.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from jax_klrlhf.core import gibbs, rejection

ACTIONS, DRAWS, KL_COEF, BOUND = 6, 200_000, 0.4, 1.0
RNG = np.random.default_rng(27)
REWARD = np.append(RNG.uniform(-1, 0.9, size=ACTIONS - 1), 1.0)
LOG_PI0 = scipy.special.log_softmax(np.append(RNG.normal(size=ACTIONS - 1), -1.0))


def law(reward, kl_coef):
    """The Gibbs law in NumPy."""
    return scipy.special.softmax(LOG_PI0 + reward / kl_coef)


def allowance(q, accepted):
    """Largest total variation of honest counts, false-alarm rate 1e-6."""
    mean = 0.5 * np.sqrt(q * (1 - q) / accepted).sum()
    return mean + math.sqrt(math.log(1e6) / (2 * accepted))


def distance(actions, q):
    counts = np.bincount(np.asarray(actions), minlength=ACTIONS)
    return 0.5 * np.abs(counts / counts.sum() - q).sum()


@jax.jit
def draw_and_accept(key, log_prob, kl_coef, kl_coef_prev):
    key_draw, key_accept = jax.random.split(key)
    actions = jax.random.categorical(key_draw, log_prob, shape=(DRAWS,))
    rewards = jnp.array(REWARD, "float32")[actions]
    out = rejection.accept(
        key_accept, rewards, reward_bound=BOUND, kl_coef=kl_coef, kl_coef_prev=kl_coef_prev
    )
    return actions, out


def test_one_step_gives_the_gibbs_law():
    target = law(REWARD, KL_COEF)
    actions, out = draw_and_accept(
        jax.random.key(70), jnp.array(LOG_PI0, "float32"), KL_COEF, jnp.inf
    )
    kept = np.asarray(actions)[np.asarray(out.accepted)]
    assert out.exact
    assert distance(kept, target) < allowance(target, len(kept))
    # The test has power: neither the proposal nor a law with a 10% wrong kl_coef would pass.
    assert distance(kept, np.exp(LOG_PI0)) > 3 * allowance(target, len(kept))
    assert distance(kept, law(REWARD, 1.1 * KL_COEF)) > allowance(target, len(kept))
    # The share of accepted draws is the exact rate: 5 standard errors, false alarm 6e-7.
    rate = float(
        rejection.acceptance_rate(
            jnp.array(REWARD), jnp.array(LOG_PI0), reward_bound=BOUND, kl_coef=KL_COEF
        )
    )
    stderr = math.sqrt(rate * (1 - rate) / DRAWS)
    assert abs(len(kept) / DRAWS - rate) < 5 * stderr


def test_several_steps_give_the_same_law():
    """Each step proposes from the law that the step before aimed at, and accepts the rest."""
    key, previous = jax.random.key(71), jnp.inf
    for step, kl_coef in enumerate(rejection.schedule(KL_COEF, 3)):
        proposal = jnp.array(np.log(law(REWARD, float(previous))), "float32")
        actions, out = draw_and_accept(
            jax.random.fold_in(key, step), proposal, kl_coef, jnp.float32(previous)
        )
        kept = np.asarray(actions)[np.asarray(out.accepted)]
        target = law(REWARD, float(kl_coef))
        assert distance(kept, target) < allowance(target, len(kept))
        assert distance(kept, np.exp(proposal)) > allowance(target, len(kept))
        previous = kl_coef
    assert float(previous) == np.float32(KL_COEF)


def test_several_steps_compose_exactly(x64):
    """The law of step i, in closed form, is the proposal of step i + 1; the last is Gibbs'."""
    reward, log_prob = jnp.array(REWARD), jnp.array(LOG_PI0)
    for steps in (1, 2, 5):
        current, previous, rates = log_prob, jnp.inf, []
        for kl_coef in rejection.schedule(KL_COEF, steps):
            options = {"reward_bound": BOUND, "kl_coef": kl_coef, "kl_coef_prev": previous}
            rates.append(float(rejection.acceptance_rate(reward, current, **options)))
            current, previous = rejection.accepted_log_prob(reward, current, **options), kl_coef
        np.testing.assert_allclose(
            current, gibbs.log_prob(reward, log_prob, kl_coef=KL_COEF), atol=1e-12
        )
        # The rates multiply up to the rate of the single step: Z telescopes.
        single = rejection.acceptance_rate(reward, log_prob, reward_bound=BOUND, kl_coef=KL_COEF)
        np.testing.assert_allclose(np.prod(rates), single, rtol=1e-12)


def test_batch_maximum_is_biased_as_computed():
    """Without a bound: the draws follow `batch_maximum_log_prob`, and not the Gibbs law.

    Draws of one batch share its maximum, so batches are the independent units. With C_a accepted
    draws of action a in a batch and N in all, E[C_a - q_a N] = 0 for every a if and only if q is
    the law. Over 50 000 batches the mean is normal; 5.5 standard errors for each of 6 actions is a
    false-alarm rate of 6 x 3.8e-8.
    """
    samples = 4
    key_draw, key_accept = jax.random.split(jax.random.key(72))
    shape = (DRAWS // samples, samples)
    actions = jax.random.categorical(key_draw, jnp.array(LOG_PI0, "float32"), shape=shape)
    rewards = jnp.array(REWARD, "float32")[actions]
    out = rejection.accept(key_accept, rewards, reward_bound=None, kl_coef=KL_COEF)
    assert not out.exact.any()
    kept = np.asarray(actions)[..., None] == np.arange(ACTIONS)
    counts = (kept & np.asarray(out.accepted)[..., None]).sum(axis=1)

    def worst(q):
        """Largest deviation from q, in standard errors."""
        residual = counts - q * counts.sum(axis=1, keepdims=True)
        stderr = residual.std(axis=0) / math.sqrt(len(residual))
        return np.abs(residual.mean(axis=0) / stderr).max()

    biased = rejection.batch_maximum_log_prob(
        jnp.array(REWARD, "float32"),
        jnp.array(LOG_PI0, "float32"),
        samples=samples,
        kl_coef=KL_COEF,
    )
    assert worst(np.exp(biased)) < 5.5
    assert worst(law(REWARD, KL_COEF)) > 50
    # The bias itself, measured: total variation of the accepted draws from the target.
    measured = 0.5 * np.abs(counts.sum(axis=0) / counts.sum() - law(REWARD, KL_COEF)).sum()
    assert measured > 10 * allowance(law(REWARD, KL_COEF), counts.sum())
