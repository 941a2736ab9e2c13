"""What labels say, and preferences without a reward: one function a claim, over its axis."""

import jax
import jax.numpy as jnp

from experiments.atlas.rows import Effect, Row
from experiments.atlas.worlds import CYCLE, cross, law, reward, uniform
from jax_klrlhf.core import (
    estimation,
    gibbs,
    labels,
    links,
    objectives,
    posterior,
)
from jax_klrlhf.core.scores import Scores


def _noisy(key, noise, n=300, dim=6):
    keys = jax.random.split(key, 5)
    theta = 2 * jax.random.normal(keys[0], (dim,)) / jnp.sqrt(dim)
    z = 2 * jax.random.normal(keys[1], (n, dim))
    y = jax.random.bernoulli(keys[2], noise + (1 - 2 * noise) * jax.nn.sigmoid(z @ theta))
    test = 2 * jax.random.normal(keys[3], (400, dim))
    return theta, z, y.astype(z.dtype), test, keys[4]


def flipping_the_weakest_helps(key, noise):
    """Log-likelihood per clean label gained; control: smoothing the labels by 0.1 instead."""
    theta, z, y, test, draw = _noisy(key, noise)
    fit = lambda y: estimation.fit(z, y, ridge=1.0).theta  # noqa: E731
    plain = fit(y)
    state = posterior.laplace(plain, estimation.hessian(plain, z, ridge=1.0))
    vote = labels.strength(posterior.draw(draw, state, 8) @ z.T).mean * (2 * y - 1)
    p = jax.nn.sigmoid(test @ theta)
    gain = lambda y: cross(p, test @ fit(y)) - cross(p, test @ plain)  # noqa: E731
    return Effect(
        gain(labels.edit(y, vote, flip=0.1).label), gain(labels.edit(y, vote, smooth=0.1).label)
    )


def annotators_are_told_apart(key, spread):
    """Cosine to the true direction gained by EM; control: annotators' names shuffled."""
    theta, z, _, _, draw = _noisy(key, 0.0, n=600)
    rates = 0.22 + spread * jnp.array([-1.0, 0.0, 1.0])
    keys = jax.random.split(draw, 3)
    who = jnp.arange(600) % 3
    clean = jax.random.bernoulli(keys[0], jax.nn.sigmoid(z @ theta))
    y = (clean ^ jax.random.bernoulli(keys[1], rates[who])).astype(z.dtype)
    plain = estimation.fit(z, y, ridge=1.0).theta
    cosine = lambda t: t @ theta / jnp.sqrt((t @ t) * (theta @ theta))  # noqa: E731

    def gain(who):
        found = labels.reliability(z, y, who, annotators=3, ridge=1.0, steps=20)
        return cosine(found.theta) - cosine(plain)

    return Effect(gain(who), gain(jax.random.permutation(keys[2], who)))


def ranked_factors_have_a_reward(key, margin):
    """HERON: minus the share of intransitive triples of two factors; control: one factor."""
    factors = jax.random.normal(key, (300, 3, 2))

    def intransitive(factors):
        shape = factors.shape[-1]
        p = labels.lexicographic(factors, margin=jnp.zeros(shape).at[0].set(margin))
        cycle = (p[:, 0, 1] == p[:, 1, 2]) & (p[:, 1, 2] == p[:, 2, 0]) & (p[:, 0, 1] != 0.5)
        return jnp.mean(cycle.astype(float))

    return Effect(-intransitive(factors), -intransitive(factors[..., :1]))


def margins_move_the_optimum(key, growth):
    """MM-RLHF: minus the gap of its population optimum over six actions, in units of J(pi*).

    Control: growth 0, which is DPO.
    """
    r, ref = reward(key)[0], uniform(6)
    prefer = links.matrix(r)
    i, j = jnp.triu_indices(6, 1)

    def loss(logits, growth):
        log_prob = jax.nn.log_softmax(logits)

        def side(w, k):
            pair = lambda x: jnp.stack([x[w], x[k]], -1)  # noqa: E731
            scores = Scores(pair(log_prob), pair(ref), jnp.ones((15, 2), jnp.int32), pair(r))
            return objectives.mm_dpo(scores, kl_coef=0.5, growth=growth)

        return jnp.mean(prefer[i, j] * side(i, j) + prefer[j, i] * side(j, i))

    def gap(growth):
        def newton(_, logits):
            gradient = jax.grad(loss)(logits, growth)
            curvature = jax.hessian(loss)(logits, growth) + jnp.full((6, 6), 1.0)
            return logits - jnp.linalg.solve(curvature + 1e-5 * jnp.eye(6), gradient)

        start = law(r, ref, 0.5)
        found = jax.nn.log_softmax(jax.lax.fori_loop(0, 30, newton, start))
        best = gibbs.value(start, r, ref, kl_coef=0.5) - jnp.sum(jnp.exp(ref) * r)
        return gibbs.gap(found, r, ref, kl_coef=0.5) / best

    return Effect(-gap(growth), -gap(0.0))


def _worst_step(prefer, start, kl_coef):
    """The least improvement of unregularized exploitability over 40 steps of a moving reference."""

    def step(log_prob, _):
        moved = jax.nn.log_softmax(log_prob + links.win_rate(prefer, log_prob) / kl_coef)
        return moved, jnp.max(prefer @ jnp.exp(moved)) - 0.5

    _, path = jax.lax.scan(step, start, None, length=40)
    return jnp.min(path[:-1] - path[1:])


def win_rate_regression_is_monotone(key, kl_coef):
    """DNO on a cycle: its worst step; the control has a reward behind it."""
    start = jax.nn.log_softmax(0.3 * jax.random.normal(key, (3,)))
    with_reward = links.matrix(jax.random.normal(key, (3,)))
    return Effect(
        _worst_step(jnp.array(CYCLE), start, kl_coef), _worst_step(with_reward, start, kl_coef)
    )


def equilibrium_is_less_exploitable(key, kl_coef):
    """Unregularized exploitability saved against the Bradley-Terry fit of the same preferences.

    Control: preferences that have a reward.
    """

    def gain(prefer):
        ref = uniform(3)
        i, j = jnp.array([0, 0, 1]), jnp.array([1, 2, 2])
        z = jnp.eye(3)[i] - jnp.eye(3)[j]
        fitted = law(estimation.fit(z, prefer[i, j], ridge=1e-3).theta, ref, kl_coef)
        game = links.nash(prefer, ref, kl_coef=kl_coef, steps=2000).log_prob
        beaten = lambda p: jnp.max(prefer @ jnp.exp(p)) - 0.5  # noqa: E731
        return beaten(fitted) - beaten(game)

    tilt = 0.1 * jax.random.normal(key, (3, 3))
    prefer = jnp.clip(jnp.array(CYCLE) + tilt - tilt.T, 0.01, 0.99)
    return Effect(gain(prefer), gain(links.matrix(jax.random.normal(key, (3,)))))


def regret_identifies_prefixes(key, kl_coef):
    """Total variation saved on the first token's law under pi*, against partial return.

    Return before the end of a response is 0, so it leaves pi0. Control: whole responses, where the
    two are one.
    """
    keys = jax.random.split(key, 2)
    rewards = reward(keys[0], 3, 3)
    ref = jax.nn.log_softmax(reward(keys[1], 4, 3))
    soft = gibbs.free_energy(rewards, ref[1:], kl_coef=kl_coef)
    first = law(soft, ref[0], kl_coef)
    told = links.regret(first[:, None], ref[0][:, None], kl_coef=kl_coef)
    distance = lambda p, q: jnp.sum(jnp.abs(jnp.exp(p) - jnp.exp(q))) / 2  # noqa: E731
    both = distance(ref[0], first) - distance(law(told, ref[0], kl_coef), first)
    joint = (first[:, None] + law(rewards, ref[1:], kl_coef)).reshape(-1)
    base = (ref[0][:, None] + ref[1:]).reshape(-1)
    whole = law(rewards.reshape(-1), base, kl_coef)
    return Effect(both, jnp.round(distance(whole, joint), 4))


ROWS = (
    Row(system="Secrets of RLHF II (2401.06080)",
        claim="flipping the weakest tenth of labels helps",
        function="labels.edit", check=flipping_the_weakest_helps, axis="share of flipped labels",
        settings=(0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.35), control="smoothing by 0.1"),
    Row(system="Crowd-BT", claim="annotators' flip rates by EM mend the direction of the reward",
        function="labels.reliability", check=annotators_are_told_apart,
        axis="spread of flip rates about 0.22", settings=(0.0, 0.05, 0.1, 0.15, 0.2),
        control="annotators' names shuffled"),
    Row(system="HERON (2309.02633)",
        claim="ranked factors with margins are the preferences of some reward",
        function="labels.lexicographic", check=ranked_factors_have_a_reward,
        axis="first factor's margin", settings=(0.0, 0.1, 0.25, 0.5, 1.0, 2.0),
        control="one factor"),
    Row(system="MM-RLHF (2502.10391)", claim="a coefficient grown by the margin keeps the optimum",
        function="objectives.mm_dpo", check=margins_move_the_optimum, axis="growth",
        settings=(0.25, 0.5, 1.0, 2.0), control="growth 0"),
    Row(system="DNO (2404.03715)",
        claim="regression to the win rate improves monotonically (on a cycle)",
        function="links.win_rate", check=win_rate_regression_is_monotone, axis="kl_coef",
        settings=(0.1, 0.25, 0.5, 1.0, 2.0), control="preferences with a reward"),
    Row(system="general preferences (2402.07314)",
        claim="the equilibrium is less exploitable than the Bradley-Terry optimum (on a cycle)",
        function="links.nash", check=equilibrium_is_less_exploitable, axis="kl_coef",
        settings=(0.03, 0.05, 0.1, 0.2, 0.5), control="preferences with a reward"),
    Row(system="regret preferences (2206.02231)",
        claim="regret identifies the optimum's prefixes, partial return does not",
        function="links.regret", check=regret_identifies_prefixes, axis="kl_coef",
        settings=(0.05, 0.1, 0.3, 1.0, 3.0), control="whole responses"),
)  # fmt: skip
