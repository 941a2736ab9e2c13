"""Posteriors, people who differ, and what to ask them: one function a claim, over its axis."""

import jax
import jax.numpy as jnp

from experiments.atlas.rows import Effect, Row
from experiments.atlas.worlds import cross, uniform, worth
from jax_klrlhf.core import estimation, links, measure, mixture, posterior, select


def laplace_calibrates_off_the_data(key, labels):
    """Brier score saved on inputs three times as long; control: on inputs like the data's."""
    keys = jax.random.split(key, 4)
    theta = jax.random.normal(keys[0], (4,))
    z = jax.random.normal(keys[1], (320, 4))
    y = jax.random.bernoulli(keys[2], jax.nn.sigmoid(z @ theta))
    heard = (jnp.arange(320) < labels).astype(z.dtype)
    fit = estimation.fit(z, y, ridge=1.0, weights=heard).theta
    state = posterior.laplace(fit, estimation.hessian(fit, z, ridge=1.0, weights=heard))
    test = jax.random.normal(keys[3], (400, 4))

    def saved(test):
        p = jax.nn.sigmoid(test @ theta)
        mean, variance = posterior.margin(state, test)
        q = posterior.probability(mean, variance)
        return measure.brier(mean, p) - measure.brier(jnp.log(q) - jnp.log1p(-q), p)

    return Effect(saved(3 * test), saved(test))


def groups_are_found(key, each):
    """Relative error of theta saved against one reward; 480 labels, ``each`` of a person.

    Control: groups that are one.
    """
    keys = jax.random.split(key, 4)
    theta = 2 * jax.random.normal(keys[0], (2, 3))
    user = (jnp.arange(480) // each).astype(jnp.int32)
    z = jax.random.normal(keys[1], (480, 3))

    def saved(theta):
        margin = jnp.sum(theta[user % 2] * z, -1)
        y = jax.random.bernoulli(keys[2], jax.nn.sigmoid(margin)).astype(z.dtype)
        size = {"groups": 2, "users": 480, "ridge": 1.0, "starts": 2, "steps": 30}
        found = mixture.fit(keys[3], z, y, user, **size).theta
        single = estimation.fit(z, y, ridge=1.0).theta

        def error(found):
            both = [jnp.sum((found[jnp.array(o)] - theta) ** 2) for o in ((0, 1), (1, 0))]
            return jnp.sqrt(jnp.minimum(*both) / jnp.sum(theta**2))

        return error(jnp.stack([single, single])) - error(found)

    return Effect(saved(theta), saved(jnp.stack([theta[0], theta[0]])))


def one_reward_errs_on_a_mixture(key, actions):
    """KL per pair of the best single reward for two groups; control: two actions."""
    i, j = jnp.triu_indices(8, 1)
    z = jnp.eye(8)[i] - jnp.eye(8)[j]
    prefer = jax.vmap(links.matrix)(2 * jax.random.normal(key, (2, 8))).mean(0)[i, j]

    def error(actions):
        among = (j < actions).astype(z.dtype)
        fit = estimation.fit(z, prefer, ridge=1e-6, weights=among).theta
        log_p = lambda m: prefer * jax.nn.log_sigmoid(m) + (1 - prefer) * jax.nn.log_sigmoid(-m)  # noqa: E731
        lost = log_p(jnp.log(prefer) - jnp.log1p(-prefer)) - log_p(z @ fit)
        return jnp.sum(among * lost) / jnp.sum(among)

    return Effect(error(actions), jnp.round(error(2), 5))


def prototypes_learn_a_person(key, labels):
    """PAL against an own fit, log-likelihood: a person in the hull; control: one outside."""
    keys = jax.random.split(key, 5)
    theta = 1.5 * jax.random.normal(keys[0], (3, 8))
    z = jax.random.normal(keys[1], (80, 8))
    test = jax.random.normal(keys[3], (300, 8))
    heard = (jnp.arange(80) < labels).astype(z.dtype)

    def gain(own):
        y = jax.random.bernoulli(keys[2], jax.nn.sigmoid(z @ own)).astype(z.dtype)
        p = jax.nn.sigmoid(test @ own)
        hull = mixture.simplex(theta, z, y, weights=heard) @ theta
        alone = estimation.fit(z, y, ridge=1.0, weights=heard).theta
        return cross(p, test @ hull) - cross(p, test @ alone)

    inside = jnp.array([0.6, 0.3, 0.1]) @ theta
    return Effect(gain(inside), gain(1.5 * jax.random.normal(keys[4], (8,))))


def informative_questions_find_a_person(key, scale):
    """Posterior of the right one of four people after two questions, less random ones'.

    Control: questions of least margin.
    """
    margins = scale * jax.random.normal(key, (4, 30))
    p = jax.nn.sigmoid(margins)
    entropy = lambda q: -(q * jnp.log(q) + (1 - q) * jnp.log1p(-q))  # noqa: E731

    def informative(log_weight):
        chance = jnp.exp(log_weight)
        return jnp.argmax(entropy(chance @ p) - chance @ entropy(p))

    def least(log_weight):
        return jnp.argmin(jnp.abs(jnp.exp(log_weight) @ margins))

    def ask(log_weight, depth, choose):
        if depth == 2:
            return jnp.exp(log_weight)
        question = choose(log_weight) if choose else depth
        total = jnp.zeros(4)
        for answer in (1.0, 0.0):
            chance = p[:, question] if answer else 1 - p[:, question]
            heard = jax.lax.dynamic_slice_in_dim(margins, question, 1, 1)
            post = mixture.route(log_weight, heard, jnp.full(1, answer))
            total = total + chance * ask(post, depth + 1, choose)
        return total

    prior = jnp.full(4, -jnp.log(4.0))
    random, ours, other = (jnp.mean(ask(prior, 0, c)) for c in (None, informative, least))
    return Effect(ours - random, other - random)


def deferring_is_worthwhile(key, deviation):
    """Off-switch: value of asking one who knows; control: one who errs."""
    mean = jax.random.normal(key)
    erring = posterior.overseen(mean, deviation**2) - jnp.maximum(mean, 0)
    return Effect(posterior.deferral(mean, deviation**2), erring)


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


SCORES = {
    "random": lambda mean, variance, noise: noise,
    "distance": lambda mean, variance, noise: variance,
    "information": lambda mean, variance, noise: posterior.information(mean, variance),
    "fisher": lambda mean, variance, noise: select.fisher(mean, variance),
}


def _asking(name, control):
    def check(key, scale):
        random, ours, other = (_learn(key, SCORES[n], scale) for n in ("random", name, control))
        return Effect(random - ours, random - other)

    return check


def trees_beat_independent_pairs(key, scale):
    """Gold at KL 1 from 200 labels: half of the pairs share a prefix, less independent pairs.

    36 responses of two tokens; control: pairs that never share one.
    """
    keys = jax.random.split(key, 4)
    ids = jnp.stack([jnp.arange(36) // 6, jnp.arange(36) % 6], -1)
    prefix, leaf = jax.random.normal(keys[0], (6,)), jax.random.normal(keys[1], (36,))
    gold, ref = scale * (prefix[ids[:, 0]] + leaf) / jnp.sqrt(2.0), uniform(1, 36)
    shared = select.shared_prefix(ids, jnp.full(36, 2), depth=1)
    different = ~shared & ~jnp.eye(36, dtype=bool)

    def value(first_half, second_half):
        law = jnp.stack([m / m.sum() for m in (first_half, second_half)]).reshape(2, -1)
        drawn = jax.random.categorical(keys[2], jnp.log(law)[:, None], shape=(2, 100)).reshape(-1)
        z = jnp.eye(36)[drawn // 36] - jnp.eye(36)[drawn % 36]
        y = jax.random.bernoulli(keys[3], jax.nn.sigmoid(z @ gold)).astype(z.dtype)
        fit = estimation.fit(z, y, ridge=0.3).theta
        return worth(fit[None], gold[None] / scale, ref, 1.0)

    every = (~jnp.eye(36, dtype=bool)).astype(gold.dtype)
    within, between = shared.astype(gold.dtype), different.astype(gold.dtype)
    plain = value(every, every)
    return Effect(value(within, every) - plain, value(between, between) - plain)


NORMS = (1.0, 2.0, 5.0, 10.0, 20.0)
ROWS = (
    Row(system="Laplace-LoRA reward models",
        claim="the posterior calibrates predictions off the data",
        function="posterior.probability", check=laplace_calibrates_off_the_data, axis="labels",
        settings=(10, 20, 40, 80, 160, 320), control="on the data"),
    Row(system="VPL (2408.10075), MaxMin-RLHF", claim="groups are found by EM with user ids",
        function="mixture.fit", check=groups_are_found, axis="labels of a person",
        settings=(1, 2, 4, 8, 16), control="groups that are one"),
    Row(system="MiCRo (2505.24846)", claim="one reward has an irreducible error on a mixture",
        function="links.matrix", check=one_reward_errs_on_a_mixture, axis="actions",
        settings=(2, 3, 4, 5, 8), control="two actions"),
    Row(system="PAL (2406.08469)",
        claim="prototypes learn a person of their hull better than an own fit",
        function="mixture.simplex", check=prototypes_learn_a_person, axis="labels",
        settings=(5, 10, 20, 40, 80), control="a person outside"),
    Row(system="VPL (2408.10075)", claim="informative questions find a person sooner",
        function="mixture.route", check=informative_questions_find_a_person, axis="margins' scale",
        settings=(0.5, 1.0, 2.5, 5.0), control="least margin"),
    Row(system="off-switch game (1611.08219)", claim="uncertainty makes deferring worthwhile",
        function="posterior.deferral", check=deferring_is_worthwhile, axis="deviation of utility",
        settings=(0.3, 1.0, 3.0), control="an overseer who errs"),
    Row(system="APO (2402.10500)", claim="asking by feature distance beats random",
        function="pairs.most_uncertain", check=_asking("distance", "fisher"), axis="norm of theta",
        settings=NORMS, control="Fisher score"),
    Row(system="BALD (1112.5745)", claim="asking by information beats random",
        function="select.most_informative", check=_asking("information", "fisher"),
        axis="norm of theta", settings=NORMS, control="Fisher score"),
    Row(system="reward topology (2402.10184)",
        claim="pairs that share a prefix teach more than independent pairs",
        function="select.shared_prefix", check=trees_beat_independent_pairs, axis="reward's scale",
        settings=(1.0, 4.0, 15.0, 40.0), control="pairs that never share one"),
)  # fmt: skip
