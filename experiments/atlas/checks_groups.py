"""Groups, constraints and several objectives: one function a claim, over its axis."""

import jax
import jax.numpy as jnp

from experiments.atlas.rows import Effect, Row
from experiments.atlas.worlds import ACTIONS, at_kl, cross, law, reward, uniform
from jax_klrlhf.core import aggregate, estimation, gibbs, groups, saddle, welfare

KL_COEFS = (0.03, 0.1, 0.3, 1.0, 3.0)


def _two(key):
    ref = uniform(1, ACTIONS)
    return aggregate.centre(reward(key, 2, 1, ACTIONS), ref), ref


def _values(log_prob, rewards):
    return jnp.einsum("xa,mxa->m", jnp.exp(log_prob), rewards)


def helps_the_worst_group(key, kl_coef):
    """Worst group's value, max-min less the 90/10 average; control: two equal groups."""
    rewards, ref = _two(key)

    def gain(rewards):
        found = saddle.simplex(rewards, ref, kl_coef=kl_coef).log_prob
        shared = law(0.9 * rewards[0] + 0.1 * rewards[1], ref, kl_coef)
        return jnp.min(_values(found, rewards)) - jnp.min(_values(shared, rewards))

    return Effect(gain(rewards), gain(jnp.stack([rewards[0], rewards[0]])))


def _majority(key, share):
    rewards, ref = _two(key)

    def change(rewards):
        found = saddle.simplex(rewards, ref, kl_coef=0.3).log_prob
        shared = law(share * rewards[0] + (1 - share) * rewards[1], ref)
        return (_values(found, rewards) - _values(shared, rewards))[0]

    return change(rewards), change(jnp.stack([rewards[0], rewards[0]]))


def leaves_the_majority_unharmed(key, share):
    """The majority's value, max-min less averaging by size; control: two equal groups."""
    return Effect(*_majority(key, share))


def harms_the_majority_more_often_than_not(key, share):
    """1/2 where the majority loses, -1/2 where it gains."""
    change, same = _majority(key, share)
    return Effect(-jnp.sign(change) / 2, -jnp.sign(jnp.round(same, 5)) / 2)


def minimum_inside_is_max_min(key, kl_coef):
    """Minus what the pointwise minimum loses of the objective; control: the saddle's own gap."""
    rewards, ref = _two(key)
    found = saddle.simplex(rewards, ref, kl_coef=kl_coef)

    def objective(log_prob):
        kl = jnp.sum(jnp.exp(log_prob) * (log_prob - ref))
        return jnp.min(_values(log_prob, rewards)) - kl_coef * kl

    inside = law(aggregate.minimum(rewards), ref, kl_coef)
    return Effect(objective(inside) - objective(found.log_prob), -found.duality_gap)


def constraints_stop_hacks(key, setting):
    """Two proxies, each with hacks of its own, held at a mean, less a ceiling there on each sample.

    Gold at equal KL; the control has no hacks.
    """
    threshold, excess = setting
    gold, ref = reward(key, 1, 120), uniform(1, 120)
    place = jnp.arange(120)
    hacks = jnp.stack([place < 6, place >= 114]).reshape(2, 1, 120)

    def gain(excess):
        bad = hacks & (excess > 0)
        proxies = aggregate.centre(gold[None] + jnp.where(bad, excess, 0.0), ref)
        truth = gold - jnp.where(bad.any(0), 3.0, 0.0)
        held = saddle.free(proxies, ref, kl_coef=1.0, threshold=jnp.full(2, threshold)).log_prob
        spent = jnp.sum(jnp.exp(held) * (held - ref))
        capped = at_kl(jnp.minimum(proxies, threshold).sum(0), ref, spent)
        return jnp.sum((jnp.exp(held) - jnp.exp(capped)) * truth)

    return Effect(gain(excess), gain(0.0))


def min_norm_serves_the_worst_task(key, start):
    """Loss of the worse-off task: an even fit's less that of 200 min-norm steps.

    They begin at ``start`` of the pooled fit, in which the other task has eight times the labels.
    Control: tasks that are one.
    """
    keys = jax.random.split(key, 2)
    theta = 2 * jax.random.normal(keys[0], (2, 4))
    z = jax.random.normal(keys[1], (2, 200, 4))

    def saved(theta):
        p = jax.nn.sigmoid(jnp.einsum("gnd,gd->gn", z, theta))

        def fit(sizes):
            weight = jnp.repeat(jnp.array(sizes), 200)
            return estimation.fit(z.reshape(-1, 4), p.reshape(-1), ridge=1e-3, weights=weight).theta

        losses = lambda t: -jax.vmap(cross)(p, jnp.einsum("gnd,d->gn", z, t))  # noqa: E731

        def step(_, at):
            gradients = jax.jacobian(losses)(at)
            return at - 2.0 * groups.min_norm(gradients) @ gradients

        found = jax.lax.fori_loop(0, 200, step, start * fit((8.0, 1.0)))
        return jnp.max(losses(fit((1.0, 1.0)))) - jnp.max(losses(found))

    return Effect(saved(theta), saved(jnp.stack([theta[0], theta[0]])))


def non_dominated_beats_the_sum(key, draws):
    """Mass on the front: trained on non-dominated of n, less the sum's optimum at its KL.

    Control: over pi0.
    """
    keys = jax.random.split(key, 2)
    rewards, ref = reward(keys[0], 2, 1, 60), uniform(1, 60)
    drawn = jax.random.randint(keys[1], (2000, 16), 0, 60)
    points = jnp.moveaxis(rewards[:, 0][:, drawn], 0, -1)
    among = jnp.arange(16) < draws
    kept = ~welfare.dominated(jnp.where(among[None, :, None], points, -jnp.inf)) & among[None]
    counts = jnp.zeros(60).at[drawn.reshape(-1)].add(kept.reshape(-1).astype(float))
    trained = jnp.log(counts / counts.sum())[None]
    front = ~welfare.dominated(jnp.moveaxis(rewards[:, 0], 0, -1))
    kl = jnp.sum(jnp.where(counts > 0, jnp.exp(trained[0]) * (trained[0] - ref[0]), 0))
    same = at_kl(rewards.sum(0), ref, kl)
    mass = lambda p: jnp.sum(jnp.exp(p[0]) * front)  # noqa: E731
    return Effect(mass(trained) - mass(same), mass(trained) - mass(ref))


def soups_are_the_optimum(key, weight):
    """Minus the gap of averaged log-probabilities; control: of averaged probabilities."""
    rewards, ref = _two(key)
    w = jnp.stack([weight, 1 - weight])
    laws = jax.vmap(lambda r: law(r, ref))(rewards)
    mixed = aggregate.linear(rewards, w)
    gap = lambda p: gibbs.gap(jax.nn.log_softmax(p), mixed, ref, kl_coef=0.3)[0]  # noqa: E731
    blend = jnp.log(aggregate.linear(jnp.exp(laws), w))
    apart = gap(blend)
    return Effect(apart - gap(aggregate.linear(laws, w)), -apart)


def unit_directions_spend_the_same(key, angle):
    """DPA: minus the spread of KL between a direction and the diagonal, at one coefficient.

    Control: the same two directions at equal KL.
    """
    rewards, ref = _two(key)
    direction = jnp.stack([jnp.cos(angle), jnp.sin(angle)])
    diagonal = jnp.full(2, jnp.sqrt(0.5))
    kl = lambda p: jnp.sum(jnp.exp(p) * (p - ref))  # noqa: E731
    one, two = (law(aggregate.linear(rewards, w), ref) for w in (direction, diagonal))
    again = at_kl(aggregate.linear(rewards, direction), ref, kl(two))
    return Effect(-jnp.abs(kl(one) - kl(two)), -jnp.abs(jnp.round(kl(again) - kl(two), 4)))


MAXMIN = "MaxMin-RLHF (2402.08925)"
SHARES = (0.5, 0.6, 0.7, 0.8, 0.9)
ROWS = (
    Row(system=MAXMIN, claim="max-min over groups raises the worst group",
        function="saddle.simplex", check=helps_the_worst_group, axis="kl_coef",
        settings=KL_COEFS, control="equal groups"),
    Row(system=MAXMIN, claim="the majority is not harmed on average",
        function="saddle.simplex", check=leaves_the_majority_unharmed, axis="majority's share",
        settings=SHARES, control="equal groups"),
    Row(system=MAXMIN, claim="the majority loses in more worlds than it gains (share less 1/2)",
        function="saddle.simplex", check=harms_the_majority_more_often_than_not,
        axis="majority's share", settings=SHARES, control="equal groups"),
    Row(system="public max-min trainers",
        claim="the minimum over groups may be taken response by response",
        function="aggregate.minimum", check=minimum_inside_is_max_min, axis="kl_coef",
        settings=KL_COEFS, control="the saddle's own gap"),
    Row(system="constrained RLHF (2310.04373)",
        claim="constraints on mean proxies stop hacks better than a ceiling on each sample",
        function="saddle.free", check=constraints_stop_hacks, axis="threshold, hacks' excess",
        settings=tuple((t, e) for t in (0.5, 1.0, 2.0) for e in (2.0, 4.0, 6.0)),
        control="no hacks"),
    Row(system="MORE (2312.07401)",
        claim="min-norm weights serve the worst task better than an even fit",
        function="groups.min_norm", check=min_norm_serves_the_worst_task,
        axis="start, as a share of the pooled fit", settings=(0.0, 0.25, 0.5, 0.75, 1.0),
        control="tasks that are one"),
    Row(system="Parrot",
        claim="training on non-dominated samples puts more mass on the front than the sum",
        function="select.non_dominated", check=non_dominated_beats_the_sum, axis="draws",
        settings=(2, 4, 8, 16), control="over pi0"),
    Row(system="rewarded soups (2306.04488)",
        claim="averaged log-linear policies are the weighted reward's optimum; mixtures are not",
        function="aggregate.linear", check=soups_are_the_optimum, axis="weight",
        settings=(0.1, 0.25, 0.5, 0.75, 0.9), control="minus the mixture's gap"),
    Row(system="DPA (2402.18571)", claim="unit directions are equal optimization",
        function="aggregate.linear", check=unit_directions_spend_the_same, axis="angle",
        settings=(0.0, 0.2, 0.4, 0.6), control="at equal KL"),
)  # fmt: skip
