"""One exact check for each claim: `check(key) -> Effect`, the claim's effect and its control's.

An effect above 0 speaks for the claim. The control is the same measurement where the idea must not
work, or where the claim is empty; it says what size of effect means nothing. Both are exact numbers
of one random world; intervals are over worlds.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_klrlhf.core import (
    aggregate,
    diversity,
    estimation,
    gibbs,
    groups,
    labels,
    links,
    measure,
    mixture,
    posterior,
    reshape,
    saddle,
    select,
    welfare,
)
from jax_klrlhf.core.numerics import Scalar

ACTIONS, KL_COEF = 6, 0.3


class Effect(NamedTuple):
    """Of one world."""

    effect: Float[Array, ""]
    control: Float[Array, ""]


def _reward(key, *shape):
    return jax.random.normal(key, shape or (1, ACTIONS))


def _law(reward, ref, kl_coef: Scalar = KL_COEF):
    return gibbs.log_prob(reward, ref, kl_coef=kl_coef)


def _uniform(*shape):
    return jnp.full(shape, -jnp.log(shape[-1]))


def _cross(p, margin):
    """Mean log-likelihood of labels of probability p, in nats."""
    return jnp.mean(p * jax.nn.log_sigmoid(margin) + (1 - p) * jax.nn.log_sigmoid(-margin))


# --- groups and constraints


def _groups(key):
    rewards = _reward(key, 2, 1, ACTIONS)
    ref = _uniform(1, ACTIONS)
    return aggregate.centre(rewards, ref), ref


def _values(log_prob, rewards):
    return jnp.einsum("xa,mxa->m", jnp.exp(log_prob), rewards)


def _objective(log_prob, rewards, ref):
    kl = jnp.sum(jnp.exp(log_prob) * (log_prob - ref))
    return jnp.min(_values(log_prob, rewards)) - KL_COEF * kl


def maxmin_helps_the_worst_group(key):
    rewards, ref = _groups(key)
    found = saddle.simplex(rewards, ref, kl_coef=KL_COEF).log_prob
    shared = _law(0.9 * rewards[0] + 0.1 * rewards[1], ref)
    same = jnp.stack([rewards[0], rewards[0]])
    equal = saddle.simplex(same, ref, kl_coef=KL_COEF).log_prob
    worst = lambda p, r: jnp.min(_values(p, r))  # noqa: E731
    return Effect(
        worst(found, rewards) - worst(shared, rewards),
        worst(equal, same) - worst(_law(rewards[0], ref), same),
    )


def maxmin_leaves_the_majority_unharmed(key):
    rewards, ref = _groups(key)
    found = saddle.simplex(rewards, ref, kl_coef=KL_COEF).log_prob
    shared = _law(0.9 * rewards[0] + 0.1 * rewards[1], ref)
    same = jnp.stack([rewards[0], rewards[0]])
    equal = saddle.simplex(same, ref, kl_coef=KL_COEF).log_prob
    change = lambda p, q: (_values(p, rewards) - _values(q, rewards))[0]  # noqa: E731
    return Effect(change(found, shared), change(equal, _law(rewards[0], ref)))


def minimum_inside_is_max_min(key):
    """The effect is minus what the pointwise minimum loses: 0 if the two were one."""
    rewards, ref = _groups(key)
    found = saddle.simplex(rewards, ref, kl_coef=KL_COEF)
    inside = _law(aggregate.minimum(rewards), ref)
    lost = _objective(found.log_prob, rewards, ref) - _objective(inside, rewards, ref)
    return Effect(-lost, -found.duality_gap)


def constrained_means_stop_hacking(key):
    """Two proxies, each with hacks of its own, held at a mean of 1, against a ceiling of 1 on each.

    At equal KL; the control has no hacks.
    """
    gold, ref = _reward(key, 1, 120), _uniform(1, 120)
    place = jnp.arange(120)
    hacks = jnp.stack([place < 6, place >= 114]).reshape(2, 1, 120)

    def gain(hacked):
        bad = hacks & hacked
        proxies = aggregate.centre(gold[None] + jnp.where(bad, 6.0, 0.0), ref)
        truth = gold - jnp.where(bad.any(0), 3.0, 0.0)
        held = saddle.free(proxies, ref, kl_coef=1.0, threshold=jnp.ones(2)).log_prob
        spent = jnp.sum(jnp.exp(held) * (held - ref))
        capped = jnp.minimum(proxies, 1.0).sum(0)
        kl_coef = measure.at_divergence(capped, ref, divergence=spent)
        return jnp.sum((jnp.exp(held) - jnp.exp(_law(capped, ref, kl_coef))) * truth)

    return Effect(gain(True), gain(False))


def multi_task_weights_repair_a_pooled_fit(key):
    """MORE from a warm start: the min-norm direction's length, less 0.01; control: a cold start."""
    keys = jax.random.split(key, 4)
    theta = jax.random.normal(keys[0], (2, 4)) * 2
    z = jax.random.normal(keys[1], (2, 300, 4))
    p = jax.nn.sigmoid(jnp.einsum("gnd,gd->gn", z, theta))
    pooled = estimation.fit(z.reshape(-1, 4), p.reshape(-1), ridge=1e-3).theta

    def shortest(at):
        error = jax.nn.sigmoid(jnp.einsum("gnd,d->gn", z, at)) - p
        gradients = jnp.einsum("gn,gnd->gd", error, z) / 300
        return jnp.sqrt(jnp.sum((groups.min_norm(gradients) @ gradients) ** 2))

    # At the pooled optimum the gradients sum to 0, so that the shortest combination is 0 too.
    return Effect(shortest(pooled) - 0.01, shortest(jnp.zeros(4)))


def non_dominated_training_beats_the_sum(key):
    """Parrot: mass on the front of the policy trained on non-dominated-of-8, at its own KL."""
    keys = jax.random.split(key, 2)
    rewards, ref = _reward(keys[0], 2, 1, 60), _uniform(1, 60)
    draws = jax.random.randint(keys[1], (2000, 8), 0, 60)
    points = jnp.moveaxis(rewards[:, 0][:, draws], 0, -1)
    kept = ~welfare.dominated(points)
    counts = jnp.zeros(60).at[draws.reshape(-1)].add(kept.reshape(-1).astype(float))
    law = jnp.log(counts / counts.sum())[None]
    front = ~welfare.dominated(jnp.moveaxis(rewards[:, 0], 0, -1))
    kl = jnp.sum(jnp.where(counts > 0, jnp.exp(law[0]) * (law[0] - ref[0]), 0))
    plain = rewards.sum(0)
    same = _law(plain, ref, measure.at_divergence(plain, ref, divergence=kl))
    mass = lambda p: jnp.sum(jnp.exp(p[0]) * front)  # noqa: E731
    return Effect(mass(law) - mass(same), mass(law) - mass(ref))


# --- labels


def _noisy(key, noise, n=300, dim=6):
    keys = jax.random.split(key, 5)
    theta = 2 * jax.random.normal(keys[0], (dim,)) / jnp.sqrt(dim)
    z = 2 * jax.random.normal(keys[1], (n, dim))
    y = jax.random.bernoulli(keys[2], noise + (1 - 2 * noise) * jax.nn.sigmoid(z @ theta))
    test = 2 * jax.random.normal(keys[3], (400, dim))
    return theta, z, y.astype(z.dtype), test, keys[4]


def _flip_gain(key, noise):
    theta, z, y, test, draw = _noisy(key, noise)
    plain = estimation.fit(z, y, ridge=1.0).theta
    state = posterior.laplace(plain, estimation.hessian(plain, z, ridge=1.0))
    vote = labels.strength(posterior.draw(draw, state, 8) @ z.T).mean * (2 * y - 1)
    edited = labels.edit(y, vote, flip=0.1)
    p = jax.nn.sigmoid(test @ theta)
    flipped = estimation.fit(z, edited.label, ridge=1.0).theta
    return _cross(p, test @ flipped) - _cross(p, test @ plain)


def flipping_the_weakest_labels_helps(key):
    return Effect(_flip_gain(key, 0.25), _flip_gain(key, 0.0))


def annotators_are_told_apart(key):
    def gain(rates):
        theta, z, _, _, draw = _noisy(key, 0.0, n=600)
        key_clean, key_flip = jax.random.split(draw)
        who = jnp.arange(600) % 3
        clean = jax.random.bernoulli(key_clean, jax.nn.sigmoid(z @ theta))
        y = (clean ^ jax.random.bernoulli(key_flip, rates[who])).astype(z.dtype)
        ours = labels.reliability(z, y, who, annotators=3, ridge=1.0, steps=20).theta
        plain = estimation.fit(z, y, ridge=1.0).theta
        cosine = lambda t: t @ theta / jnp.sqrt((t @ t) * (theta @ theta))  # noqa: E731
        return cosine(ours) - cosine(plain)

    return Effect(gain(jnp.array([0.02, 0.2, 0.45])), gain(jnp.array([0.22, 0.22, 0.22])))


def ranked_factors_have_a_reward(key):
    """HERON: minus the share of intransitive triples; the control has no margins."""
    factors = jax.random.normal(key, (300, 3, 2))

    def intransitive(margin):
        p = labels.lexicographic(factors, margin=margin)
        cycle = (p[:, 0, 1] == p[:, 1, 2]) & (p[:, 1, 2] == p[:, 2, 0]) & (p[:, 0, 1] != 0.5)
        return jnp.mean(cycle.astype(float))

    return Effect(-intransitive(jnp.array([0.5, 0.0])), -intransitive(jnp.zeros(2)))


# --- preferences without a reward


CYCLE = ((0.5, 0.9, 0.2), (0.1, 0.5, 0.9), (0.8, 0.1, 0.5))


def _worst_step(prefer, start):
    """The least improvement of unregularized exploitability over 40 steps of a moving reference."""

    def step(log_prob, _):
        moved = jax.nn.log_softmax(log_prob + links.win_rate(prefer, log_prob) / 0.5)
        return moved, jnp.max(prefer @ jnp.exp(moved)) - 0.5

    _, path = jax.lax.scan(step, start, None, length=40)
    return jnp.min(path[:-1] - path[1:])


def win_rate_regression_improves_monotonically(key):
    """DNO on a cycle; the control has a reward behind it."""
    start = jax.nn.log_softmax(0.3 * jax.random.normal(key, (3,)))
    reward = jax.random.normal(key, (3,))
    return Effect(
        _worst_step(jnp.array(CYCLE), start), _worst_step(links.matrix(reward), start) + 1e-6
    )


def equilibrium_is_less_exploitable_than_a_reward(key):
    """Nash against the Bradley-Terry fit of the same preferences; control: preferences of one."""

    def gain(prefer):
        ref = _uniform(3)
        i, j = jnp.array([0, 0, 1]), jnp.array([1, 2, 2])
        z = jnp.eye(3)[i] - jnp.eye(3)[j]
        reward = estimation.fit(z, prefer[i, j], ridge=1e-3).theta
        fitted = _law(reward, ref, 0.1)
        game = links.nash(prefer, ref, kl_coef=0.1, steps=400)
        return links.exploitability(fitted, prefer, ref, kl_coef=0.1) - game.exploitability

    tilt = 0.1 * jax.random.normal(key, (3, 3))
    prefer = jnp.clip(jnp.array(CYCLE) + tilt - tilt.T, 0.01, 0.99)
    return Effect(gain(prefer), gain(jnp.full((3, 3), 0.5)))


def regret_identifies_prefix_preferences(key):
    """Total variation saved on the first token's law under pi*, against partial return."""
    keys = jax.random.split(key, 2)
    reward = _reward(keys[0], 3, 3)
    ref = jax.nn.log_softmax(_reward(keys[1], 4, 3))
    soft = gibbs.free_energy(reward, ref[1:], kl_coef=KL_COEF)
    first = _law(soft, ref[0])
    told = links.regret(first[:, None], ref[0][:, None], kl_coef=KL_COEF)
    distance = lambda p: jnp.sum(jnp.abs(jnp.exp(p) - jnp.exp(first))) / 2  # noqa: E731
    both = distance(ref[0]) - distance(_law(told, ref[0]))
    # Whole responses: the reward itself does as well.
    joint = (first[:, None] + _law(reward, ref[1:])).reshape(-1)
    base = (ref[0][:, None] + ref[1:]).reshape(-1)
    whole = _law(reward.reshape(-1), base)
    return Effect(both, jnp.sum(jnp.abs(jnp.exp(whole) - jnp.exp(joint))) / 2)


# --- transforms


def transforms_are_harmless_with_an_exact_reward(key):
    """PAR, at equal KL 1; the control is the reward at seven times its scale."""
    reward, ref = _reward(key, 1, 40), _uniform(1, 40)

    def worth(proxy):
        return measure.frontier(proxy, reward, ref, divergences=jnp.ones(1)).gold[0]

    par = reshape.win_rate(reward, ref)
    return Effect(worth(par) - worth(reward), worth(7 * reward) - worth(reward))


def log_sigmoids_sum_to_and(key):
    """P(both in the best 30 %) against the plain sum, at KL 1; control: the raw sum."""
    rewards, ref = _reward(key, 2, 1, 200), _uniform(1, 200)
    bars = jnp.stack([reshape.quantile(r, ref, level=0.7) for r in rewards])
    good = jnp.all(rewards >= bars[..., None], 0)

    def at_one(proxy):
        kl_coef = measure.at_divergence(proxy, ref, divergence=1.0)
        return jnp.exp(_law(proxy, ref, kl_coef))

    both = at_one(aggregate.conjunction(rewards, bars))
    plain = at_one(rewards.sum(0))
    return Effect(jnp.sum((both - plain) * good), jnp.sum((both - plain) * rewards.sum(0)))


def rarity_makes_policies_diverse(key):
    """DARLING's product, class entropy at equal KL: rewards above 0, and (control) below."""
    classes, ref = jnp.array([[0, 0, 1, 1, 2, 2]]), _uniform(1, ACTIONS)
    reward = _reward(key)

    def gain(shift):
        r = reward + shift
        many = reshape.fixed_point(
            lambda p: r * reshape.rarity(p, classes), ref, kl_coef=0.5, damping=0.1, steps=300
        ).log_prob
        kl = jnp.sum(jnp.exp(many) * (many - ref))
        plain = _law(r, ref, measure.at_divergence(r, ref, divergence=kl))
        return (diversity.class_entropy(many, classes) - diversity.class_entropy(plain, classes))[0]

    return Effect(gain(4.0), gain(-4.0))


def step_rewards_keep_the_optimum(key):
    """Minus the gap that shaping leaves: free ends, and (control) a potential that ends at 0."""
    keys = jax.random.split(key, 2)
    reward, ref = _reward(keys[0], 8, 3), _uniform(8)
    potential = jnp.concatenate([jnp.zeros((8, 1)), _reward(keys[1], 8, 3)], -1)

    def gap(potential):
        shaped = reshape.shaped(reward, potential).sum(-1)
        return gibbs.gap(_law(shaped, ref), reward.sum(-1), ref, kl_coef=KL_COEF)

    return Effect(-gap(potential), -gap(potential.at[:, -1].set(0.0)))


# --- posteriors and people


def laplace_calibrates_off_the_data(key):
    """Brier score saved on inputs three times as long; control: on inputs like the data's."""
    keys = jax.random.split(key, 4)
    theta = jax.random.normal(keys[0], (4,))
    z = jax.random.normal(keys[1], (20, 4))
    y = jax.random.bernoulli(keys[2], jax.nn.sigmoid(z @ theta))
    fit = estimation.fit(z, y, ridge=1.0).theta
    state = posterior.laplace(fit, estimation.hessian(fit, z, ridge=1.0))
    test = jax.random.normal(keys[3], (400, 4))

    def saved(test):
        p = jax.nn.sigmoid(test @ theta)
        mean, variance = posterior.margin(state, test)
        q = posterior.probability(mean, variance)
        return measure.brier(mean, p) - measure.brier(jnp.log(q) - jnp.log1p(-q), p)

    return Effect(saved(3 * test), saved(test))


def _mixture_world(key, each=12, users=40):
    keys = jax.random.split(key, 4)
    theta = 2 * jax.random.normal(keys[0], (2, 3))
    group = jnp.arange(users) % 2
    user = jnp.repeat(jnp.arange(users), each)
    z = jax.random.normal(keys[1], (users * each, 3))
    margin = jnp.sum(theta[group[user]] * z, -1)
    y = jax.random.bernoulli(keys[2], jax.nn.sigmoid(margin)).astype(z.dtype)
    return theta, user, z, y, keys[3]


def _theta_error(theta, found):
    shift = [jnp.sum((found[jnp.array(o)] - theta) ** 2) for o in ((0, 1), (1, 0))]
    return jnp.sqrt(jnp.minimum(*shift) / jnp.sum(theta**2))


def groups_are_found_with_user_ids(key):
    """Relative error of theta saved against one reward; control: every label is a stranger's."""
    theta, user, z, y, draw = _mixture_world(key)
    size = {"groups": 2, "ridge": 1.0, "starts": 2, "steps": 30}
    known = mixture.fit(draw, z, y, user, users=40, **size).theta
    anonymous = mixture.fit(draw, z, y, jnp.arange(480), users=480, **size).theta
    single = estimation.fit(z, y, ridge=1.0).theta
    alone = _theta_error(theta, jnp.stack([single, single]))
    return Effect(alone - _theta_error(theta, known), alone - _theta_error(theta, anonymous))


def one_reward_errs_on_a_mixture(key):
    """KL per pair of the best single reward: three actions, and (control) two."""

    def error(rewards):
        prefer = jax.vmap(links.matrix)(rewards).mean(0)
        i, j = jnp.triu_indices(rewards.shape[1], 1)
        z = jnp.eye(rewards.shape[1])[i] - jnp.eye(rewards.shape[1])[j]
        fit = estimation.fit(z, prefer[i, j], ridge=1e-6).theta
        p, m = prefer[i, j], z @ fit
        return _cross(p, jnp.log(p) - jnp.log1p(-p)) - _cross(p, m)

    rewards = 2 * jax.random.normal(key, (2, 5))
    return Effect(error(rewards) - 1e-6, error(rewards[:, :2]))


def _hull(key, weight, m):
    keys = jax.random.split(key, 4)
    theta = 1.5 * jax.random.normal(keys[0], (3, 8))
    own = weight @ theta if weight is not None else 1.5 * jax.random.normal(keys[3], (8,))
    z = jax.random.normal(keys[1], (m, 8))
    y = jax.random.bernoulli(keys[2], jax.nn.sigmoid(z @ own)).astype(z.dtype)
    test = jax.random.normal(keys[3], (300, 8))
    p = jax.nn.sigmoid(test @ own)
    hull = mixture.simplex(theta, z, y) @ theta
    alone = estimation.fit(z, y, ridge=1.0).theta
    return _cross(p, test @ hull) - _cross(p, test @ alone)


def prototypes_learn_a_person_from_few_labels(key):
    """PAL with 20 labels, against an own fit: a person in the hull, and (control) outside, 80."""
    return Effect(_hull(key, jnp.array([0.6, 0.3, 0.1]), 20), _hull(key, None, 80))


def informative_questions_find_a_person(key):
    """Posterior of the right one of four people after two questions, against random ones."""

    def gain(margins):
        prior = jnp.full(4, -jnp.log(4.0))
        p = jax.nn.sigmoid(margins)
        entropy = lambda q: -(q * jnp.log(q) + (1 - q) * jnp.log1p(-q))  # noqa: E731

        def ask(log_weight, depth, active):
            if depth == 2:
                return jnp.exp(log_weight)
            worth = entropy(jnp.exp(log_weight) @ p) - jnp.exp(log_weight) @ entropy(p)
            question = jnp.argmax(worth) if active else depth
            total = jnp.zeros(4)
            for answer in (1.0, 0.0):
                chance = p[:, question] if answer else 1 - p[:, question]
                heard = jax.lax.dynamic_slice_in_dim(margins, question, 1, 1)
                post = mixture.route(log_weight, heard, jnp.full(1, answer))
                total = total + chance * ask(post, depth + 1, active)
            return total

        return jnp.mean(ask(prior, 0, True) - ask(prior, 0, False))

    margins = 2.5 * jax.random.normal(key, (4, 30))
    return Effect(gain(margins), gain(jnp.tile(margins[:1], (4, 1))))


def deferring_is_worthwhile_under_uncertainty(key):
    """Off-switch: value of asking; control: without uncertainty."""
    mean = jax.random.normal(key)
    return Effect(
        posterior.deferral(mean, jnp.ones(())) - 1e-6, posterior.deferral(mean, jnp.zeros(()))
    )


# --- selection


def _learn(key, score, scale, n=60, pairs=400, dim=5):
    """Error of a direction after n labels, each the best of a pool of pairs by `score`."""
    keys = jax.random.split(key, 3)
    theta = jax.random.normal(keys[0], (dim,))
    theta = scale * theta / jnp.sqrt(theta @ theta)
    pool = jax.random.normal(keys[1], (pairs, dim)) / jnp.sqrt(dim)

    def step(carry, number):
        chosen, y, estimate = carry
        heard = (jnp.arange(n) < number).astype(theta.dtype)
        z = pool[chosen]
        hessian = estimation.hessian(estimate, z, ridge=1.0, weights=heard)
        moments = posterior.margin(posterior.laplace(estimate, hessian), pool)
        fresh = jax.random.fold_in(keys[2], number)
        pick = jnp.argmax(score(*moments, jax.random.uniform(fresh, (pairs,))))
        said = jax.random.bernoulli(fresh, jax.nn.sigmoid(pool[pick] @ theta))
        chosen, y = chosen.at[number].set(pick), y.at[number].set(said.astype(y.dtype))
        heard = (jnp.arange(n) <= number).astype(theta.dtype)
        estimate = estimation.fit(
            pool[chosen], y, ridge=1.0, weights=heard, init=estimate, iterations=8
        ).theta
        return (chosen, y, estimate), None

    start = (jnp.zeros(n, jnp.int32), jnp.zeros(n), jnp.zeros(dim))
    (_, _, estimate), _ = jax.lax.scan(step, start, jnp.arange(n))
    return jnp.sqrt(jnp.sum((estimate - theta) ** 2)) / scale


def _random(mean, variance, noise):
    return noise


def asking_by_feature_distance_beats_random(key):
    """The unweighted norm at a theta of norm 10 (large margins); control: at norm 2."""
    norm = lambda mean, variance, noise: variance  # noqa: E731
    gain = lambda scale: _learn(key, _random, scale) - _learn(key, norm, scale)  # noqa: E731
    return Effect(gain(10.0), gain(2.0))


def asking_by_information_beats_random(key):
    """Mutual information at a theta of norm 10; control: the Fisher score, its first order."""
    by_information = lambda mean, variance, noise: posterior.information(mean, variance)  # noqa: E731
    by_fisher = lambda mean, variance, noise: select.fisher(mean, variance)  # noqa: E731
    random = _learn(key, _random, 10.0)
    return Effect(random - _learn(key, by_information, 10.0), random - _learn(key, by_fisher, 10.0))


# --- distances


def starc_bounds_our_gap(key):
    """Minus the gap of 5 r, whose STARC distance to r is 0; control: that distance."""
    reward, ref = _reward(key), _uniform(1, ACTIONS)
    gap = gibbs.gap(_law(5 * reward, ref, 0.5), reward, ref, kl_coef=0.5)[0]
    return Effect(-gap, -measure.starc(reward, 5 * reward, ref))


def entropy_makes_the_reward_to_policy_map_smooth(key):
    """Policy cliff: room left under the tanh bound, for a tie that is perturbed by 0.01."""
    reward, ref = jnp.zeros((1, ACTIONS)), _uniform(1, ACTIONS)
    other = 0.01 * _reward(key)
    span = measure.span(other, reward)[0]

    def room(kl_coef):
        moved = jnp.abs(jnp.exp(_law(other, ref, kl_coef)) - jnp.exp(ref)).sum() / 2
        return measure.variation_bound(span, kl_coef=kl_coef) - moved

    return Effect(room(0.1) + 1e-6, room(0.001) + 1e-6)


def strong_to_weak_ratios_beat_the_strong_policy(key):
    """CDR: correlation with the reward of log strong/weak, weak unrelated, less log strong's."""
    keys = jax.random.split(key, 3)
    reward, base = _reward(keys[0], 1, 60), jax.nn.log_softmax(_reward(keys[1], 1, 60))
    foreign = jax.nn.log_softmax(_reward(keys[2], 1, 60))
    strong = _law(reward, base, 1.0)
    flat = lambda x: (x - x.mean()) / x.std()  # noqa: E731
    correlation = lambda x: jnp.mean(flat(x) * flat(reward))  # noqa: E731
    ratio = lambda weak: gibbs.implicit_reward(strong, weak, kl_coef=1.0)  # noqa: E731
    alone = correlation(strong)
    return Effect(correlation(ratio(foreign)) - alone, correlation(ratio(base)) - alone)
