"""People who differ: what groups are found from, and what a new person needs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_klrlhf.core import estimation, labels, mixture, posterior

pytestmark = pytest.mark.usefixtures("x64")
DIM, USERS, EACH, GROUPS = 3, 40, 12, 2


def population(key, user_share=0.5, each=EACH, users=USERS):
    keys = jax.random.split(key, 4)
    theta = 2 * jax.random.normal(keys[0], (GROUPS, DIM))
    group = (jnp.arange(users) >= round(user_share * users)).astype(jnp.int32)
    user = jnp.repeat(jnp.arange(users), each)
    z = jax.random.normal(keys[1], (users * each, DIM))
    margin = jnp.sum(theta[group[user]] * z, -1)
    y = jax.random.bernoulli(keys[2], jax.nn.sigmoid(margin)).astype(z.dtype)
    return theta, group, user, z, y, keys[3]


def found_error(theta, found):
    """Relative error of the thetas, in the better of the two orders."""
    shift = [jnp.sum((found[jnp.array(o)] - theta) ** 2) for o in ((0, 1), (1, 0))]
    return jnp.sqrt(jnp.minimum(*shift) / jnp.sum(theta**2))


@pytest.fixture(scope="module")
def fits():
    """16 populations in one program; with user ids, without, and one reward for all."""
    with jax.enable_x64(True):

        def one(key):
            theta, group, user, z, y, fresh = population(key)
            known = mixture.fit(fresh, z, y, user, groups=2, users=USERS, ridge=1.0, starts=3)
            alone = jnp.arange(len(y))
            anonymous = mixture.fit(fresh, z, y, alone, groups=2, users=len(y), ridge=1.0, starts=3)
            single = estimation.fit(z, y, ridge=1.0).theta
            errors = jnp.stack(
                [
                    found_error(theta, known.theta),
                    found_error(theta, anonymous.theta),
                    found_error(theta, jnp.stack([single, single])),
                ]
            )
            hard = jnp.argmax(known.log_responsibility, -1).astype(group.dtype) == group
            right = jnp.maximum(hard.mean(), 1 - hard.mean())
            return errors, right, known

        return jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 16))


def test_groups_are_found_by_who_said_what(fits):
    """Controls: without user ids it is hard, with one reward for all impossible."""
    errors, right, known = fits
    with_ids, anonymous, single = np.asarray(errors).mean(0)
    assert with_ids < 0.35
    assert anonymous > 1.3 * with_ids
    assert single > 2 * with_ids
    assert right.mean() > 0.9
    assert known.converged.mean() > 0.8
    np.testing.assert_allclose(jnp.exp(known.log_weight).sum(-1), 1, rtol=1e-9)
    np.testing.assert_allclose(jnp.exp(known.log_responsibility).sum(-1), 1, rtol=1e-9)


@pytest.mark.slow
def test_a_step_of_em_is_bayes_rule_and_a_weighted_fit_and_its_likelihood_rises():
    _, _, user, z, y, key = population(jax.random.key(1))
    args = {"groups": 2, "users": USERS, "ridge": 1.0, "starts": 1}
    short, long = (mixture.fit(key, z, y, user, steps=s, **args) for s in (2, 25))
    assert long.log_likelihood > short.log_likelihood
    log_p = np.asarray(jax.nn.log_sigmoid(jnp.where(y[:, None] > 0, 1, -1) * (z @ long.theta.T)))
    joint = np.asarray(long.log_weight) + np.array(
        [log_p[np.asarray(user) == u].sum(0) for u in range(USERS)]
    )
    total = np.log(np.exp(joint).sum(1))
    np.testing.assert_allclose(long.log_likelihood, total.sum(), rtol=1e-9)
    np.testing.assert_allclose(long.log_responsibility, joint - total[:, None], atol=1e-8)
    # At the fixed point each theta is the weighted fit of its people.
    for g in range(2):
        share = jnp.exp(long.log_responsibility[:, g])[user]
        refit = estimation.fit(z, y, ridge=1.0, weights=share).theta
        np.testing.assert_allclose(refit, long.theta[g], atol=1e-3)


def test_labels_of_weight_0_are_not_read_and_one_group_is_a_plain_fit():
    _, _, user, z, y, key = population(jax.random.key(2))
    heard = jnp.arange(len(y)) % 3 > 0
    spoiled = jnp.where(heard[:, None], z, jnp.nan)
    args = {"groups": 1, "users": USERS, "ridge": 1.0, "starts": 1, "steps": 3}
    found = mixture.fit(key, spoiled, y, user, weights=heard, **args)
    plain = estimation.fit(z[heard], y[heard], ridge=1.0).theta
    np.testing.assert_allclose(found.theta[0], plain, atol=1e-8)


def test_one_reward_errs_on_a_mixture_of_many_actions_and_not_of_two():
    """The irreducible error, in nats per pair; equal groups have none (control)."""

    def error(rewards):
        margin = jnp.asarray(rewards)[:, :, None] - jnp.asarray(rewards)[:, None, :]
        prefer = jax.nn.sigmoid(margin).mean(0)
        actions = prefer.shape[0]
        i, j = np.triu_indices(actions, 1)
        z = jnp.eye(actions)[i] - jnp.eye(actions)[j]
        fit = estimation.fit(z, prefer[i, j], ridge=1e-9)
        p, q = prefer[i, j], jax.nn.sigmoid(z @ fit.theta)
        return float((p * jnp.log(p / q) + (1 - p) * jnp.log((1 - p) / (1 - q))).mean())

    rng = np.random.default_rng(0)
    both = 2 * rng.normal(size=(2, 5))
    assert error(both) > 1e-3
    assert error(both[:, :2]) < 1e-9
    assert error(np.stack([both[0], both[0]])) < 1e-9


def test_routing_is_bayes_rule_and_informative_questions_find_a_person_sooner():
    """Four kinds of people; the control is four equal kinds, which nobody can tell apart."""
    rng = np.random.default_rng(3)
    margins = jnp.array(2.5 * rng.normal(size=(4, 40)))
    prior = jnp.full(4, -np.log(4.0))
    label = jnp.array([1.0, 0.0, 1.0])
    found = mixture.route(prior, margins[:, :3], label)
    likelihood = np.prod(
        np.where(np.asarray(label) > 0, 1, 0) * 1.0
        * (1 / (1 + np.exp(-np.asarray(margins[:, :3]))))
        + np.where(np.asarray(label) > 0, 0, 1.0) / (1 + np.exp(np.asarray(margins[:, :3]))),
        axis=1,
    )  # fmt: skip
    np.testing.assert_allclose(np.exp(found), likelihood / likelihood.sum(), rtol=1e-9)

    def ask(margins, active):
        """Exact expected posterior of the truth after two questions, over people and answers."""

        def after(log_weight, depth, asked):
            if depth == 0:
                return jnp.exp(log_weight)
            p = jax.nn.sigmoid(margins)
            mean = jnp.exp(log_weight) @ p
            entropy = lambda q: -(q * jnp.log(q) + (1 - q) * jnp.log1p(-q))  # noqa: E731
            gain = entropy(mean) - jnp.exp(log_weight) @ entropy(p)
            gain = gain.at[jnp.array(asked, int)].set(-1) if asked else gain
            question = int(jnp.argmax(gain)) if active else depth
            total = 0
            for answer in (1.0, 0.0):
                chance = p[:, question] if answer else 1 - p[:, question]
                post = mixture.route(
                    log_weight, margins[:, question : question + 1], jnp.array([answer])
                )
                total = total + chance * after(post, depth - 1, [*asked, question])
            return total

        return float((jnp.exp(prior) * after(prior, 2, [])).sum())

    assert ask(margins, True) > ask(margins, False) + 0.1
    same = jnp.tile(margins[:1], (4, 1))
    np.testing.assert_allclose([ask(same, True), ask(same, False)], 0.25, rtol=1e-9)


def test_a_person_in_the_hull_is_found_from_few_labels_and_one_outside_is_not():
    """PAL: expected (soft) labels stand for many; draws of ten labels for few."""
    rng = np.random.default_rng(4)
    theta = jnp.array(2 * rng.normal(size=(3, 8)))
    z = jnp.array(rng.normal(size=(300, 8)))
    inside = jnp.array([0.6, 0.3, 0.1])
    own = inside @ theta
    found = mixture.simplex(theta, z, jax.nn.sigmoid(z @ own), concentration=1.0)
    np.testing.assert_allclose(found, inside, atol=1e-3)
    outside = jnp.array(2 * rng.normal(size=8))
    found = mixture.simplex(theta, z, jax.nn.sigmoid(z @ outside), concentration=1.0)
    p, q = (jax.nn.sigmoid(z @ t) for t in (outside, found @ theta))
    floor = float((p * jnp.log(p / q) + (1 - p) * jnp.log((1 - p) / (1 - q))).mean())
    assert floor > 0.05

    def error(key):
        few = jax.random.randint(key, (10,), 0, 300)
        y = jax.random.bernoulli(key, jax.nn.sigmoid(z[few] @ own)).astype(z.dtype)
        fits = [
            mixture.simplex(theta, z[few], y, concentration=1.5) @ theta,
            estimation.fit(z[few], y, ridge=1.0).theta,
        ]
        p = jax.nn.sigmoid(z @ own)[None]
        q = jnp.stack([jax.nn.sigmoid(z @ t) for t in fits])
        return jnp.mean(p * jnp.log(p / q) + (1 - p) * jnp.log((1 - p) / (1 - q)), -1)

    hull, alone = jax.jit(jax.vmap(error))(jax.random.split(jax.random.key(0), 64)).T
    assert (alone - hull).mean() > 5 * (alone - hull).std() / 8


@pytest.mark.slow
def test_prototypes_are_recovered_from_people_between_them():
    rng = np.random.default_rng(5)
    truth = 3 * rng.normal(size=(2, 3))
    place = rng.dirichlet(np.ones(2), 20)
    user = np.repeat(np.arange(20), 30)
    z = rng.normal(size=(600, 3))
    y = 1 / (1 + np.exp(-(z * (place @ truth)[user]).sum(-1)))
    start = jnp.array(truth + rng.normal(size=truth.shape))
    found = mixture.prototypes(
        jnp.array(z), jnp.array(y), jnp.array(user), start=start, users=20, ridge=1e-3,
        concentration=1.0, steps=12,
    )  # fmt: skip
    reward = lambda p: p.weight @ p.theta if hasattr(p, "weight") else p  # noqa: E731
    error = np.abs(np.asarray(reward(found)) - place @ truth).mean()
    before = np.abs(place @ np.asarray(start) - place @ truth).mean()
    assert error < 0.25 * before


def test_annotators_are_told_apart_and_the_scale_is_mended():
    """Flip rates .02, .2, .45; the control is annotators who are equal."""

    def one(key, rates):
        keys = jax.random.split(key, 4)
        theta = 2 * jax.random.normal(keys[0], (4,))
        z = jax.random.normal(keys[1], (600, 4))
        who = jnp.arange(600) % 3
        clean = jax.random.bernoulli(keys[2], jax.nn.sigmoid(z @ theta))
        y = clean ^ jax.random.bernoulli(keys[3], rates[who])
        found = labels.reliability(z, y, who, annotators=3, ridge=1.0)
        plain = estimation.fit(z, y, ridge=1.0).theta
        cosine = lambda t: t @ theta / jnp.sqrt((t @ t) * (theta @ theta))  # noqa: E731
        return found.flip_rate, cosine(found.theta), cosine(plain)

    both = jax.jit(jax.vmap(jax.vmap(one, in_axes=(0, None)), in_axes=(None, 0)))
    rates = jnp.array([[0.02, 0.2, 0.45], [0.22, 0.22, 0.22]])
    rate, ours, plain = both(jax.random.split(jax.random.key(0), 24), rates)
    np.testing.assert_allclose(rate[0].mean(0), rates[0], atol=0.08)
    gain = ours - plain
    error = gain.std(1) / np.sqrt(24)
    assert gain[0].mean() > 4 * error[0]
    assert gain[1].mean() < gain[0].mean() / 3


def test_strength_edits_and_ranked_factors():
    margins = np.array([[1.0, -2.0, 0.5, 3.0], [2.0, -1.0, -0.5, 1.0]])
    found = labels.strength(jnp.array(margins))
    np.testing.assert_allclose(found.mean, margins.mean(0))
    np.testing.assert_allclose(found.deviation, margins.std(0))
    edited = labels.edit(jnp.array([1, 0, 1, 1]), found.mean, flip=0.25, drop=0.25, smooth=0.2)
    np.testing.assert_allclose(edited.weight, [1, 0, 1, 1])
    np.testing.assert_allclose(edited.label, [0.9, 0.1, 0.0, 0.9])
    with pytest.raises(ValueError, match="shares"):
        labels.edit(jnp.ones(2), jnp.ones(2), flip=0.6, drop=0.6)
    rng = np.random.default_rng(0)
    factors, margin = rng.normal(size=(5, 2)), np.array([0.5, 0.0])

    def by_hand(a, b):
        for k in range(2):
            if abs(a[k] - b[k]) > margin[k]:
                return float(a[k] > b[k])
        return 0.5

    expected = [[by_hand(a, b) for b in factors] for a in factors]
    found = labels.lexicographic(jnp.array(factors), margin=jnp.array(margin))
    np.testing.assert_array_equal(found, expected)

    def intransitive(margin):
        many = jax.random.normal(jax.random.key(0), (200, 3, 2))
        p = labels.lexicographic(many, margin=jnp.array(margin))
        return float(((p[:, 0, 1] == p[:, 1, 2]) & (p[:, 1, 2] == p[:, 2, 0])).mean())

    assert intransitive([0.5, 0.0]) > 0
    assert intransitive([0.0, 0.0]) == 0


def test_flipping_weak_labels_mends_noise_and_harms_clean_labels():
    """KL to the true preference; 25 % noise against none."""

    def one(key, noise):
        keys = jax.random.split(key, 5)
        theta = 2 * jax.random.normal(keys[0], (6,)) / np.sqrt(6)
        z = 2 * jax.random.normal(keys[1], (300, 6))
        y = jax.random.bernoulli(keys[2], noise + (1 - 2 * noise) * jax.nn.sigmoid(z @ theta))
        y = y.astype(z.dtype)
        draws = posterior.draw(
            keys[3],
            posterior.laplace(
                estimation.fit(z, y, ridge=1.0).theta, estimation.hessian(theta, z, ridge=1.0)
            ),
            8,
        )
        vote = labels.strength(draws @ z.T).mean * (2 * y - 1)
        edited = labels.edit(y, vote, flip=0.1)
        test = 2 * jax.random.normal(keys[4], (500, 6))
        p = jax.nn.sigmoid(test @ theta)

        def error(fitted):
            return jnp.mean(
                p * jax.nn.log_sigmoid(test @ fitted)
                + (1 - p) * jax.nn.log_sigmoid(-(test @ fitted))
            )

        return error(estimation.fit(z, edited.label, ridge=1.0).theta) - error(
            estimation.fit(z, y, ridge=1.0).theta
        )

    gain = jax.jit(jax.vmap(jax.vmap(one, in_axes=(0, None)), in_axes=(None, 0)))(
        jax.random.split(jax.random.key(1), 40), jnp.array([0.25, 0.0])
    )
    error = gain.std(1) / np.sqrt(40)
    assert gain[0].mean() > 4 * error[0]
    assert gain[1].mean() < -4 * error[1]
