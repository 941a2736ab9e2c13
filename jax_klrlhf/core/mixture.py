r"""People who differ: groups by expectation maximization, prototypes, and finding a new person.

.. math:: P(y_{ui} = 1) = \sum_g q_u(g)\, \sigma(\langle\theta_g, z_{ui}\rangle)

One Bradley-Terry reward has an error on a mixture that no amount of data takes away (with three
actions or more; with one pair per context there is none). What identifies the groups is *who* said
what: several labels of a person.

* :func:`fit`: groups with user ids (MaxMin-RLHF, arXiv 2402.08925; variational preference learning,
  arXiv 2408.10075, with a discrete latent).
* :func:`prototypes`: a person is a point of the hull of prototypes (PAL, arXiv 2406.08469).
* :func:`route` (MiCRo's second stage, arXiv 2505.24846) and :func:`simplex`: a new person.

Axes: ``n`` (comparisons), ``dim``, ``groups``, ``users``.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from jax_klrlhf.core import bradley_terry, estimation
from jax_klrlhf.core import simplex as simplices
from jax_klrlhf.core.numerics import Scalar


class Mixture(NamedTuple):
    """Groups of people; their order means nothing."""

    theta: Float[Array, "groups dim"]
    log_weight: Float[Array, " groups"]
    log_responsibility: Float[Array, "users groups"]
    log_likelihood: Float[Array, ""]  # of all labels, in nats
    converged: Bool[Array, ""]


def _label_log_prob(margin: Array, labels: Array) -> Array:
    return -bradley_terry.nll(margin, label=labels)


def fit(
    key: Key[Array, ""],
    differences: Float[Array, "n dim"],
    labels: Shaped[Array, " n"],
    user: Int[Array, " n"],
    *,
    groups: int,
    users: int,
    ridge: Scalar,
    starts: int = 4,
    steps: int = 40,
    weights: Shaped[Array, " n"] | None = None,
) -> Mixture:
    r"""Groups by expectation maximization over people, the best of several random starts.

    q_u(g) is proportional to :math:`\pi_g \prod_{i \in u} P_g(y_i)`; then every theta_g is a
    weighted Bradley-Terry fit. Without user ids give every label a user of its own: small groups
    are then not found. ``ridge`` is of each group's fit. ``converged`` says that the last step of
    the best start changed the penalized likelihood per label by less than 1e-5 nats. Labels of
    weight 0 are not read.
    """
    if groups < 1 or users < 1 or starts < 1:
        raise ValueError(f"groups, users, starts must be >= 1, got {groups}, {users}, {starts}")
    labels = labels.astype(differences.dtype)
    weights = jnp.ones_like(labels) if weights is None else weights.astype(labels.dtype)
    heard = weights > 0
    differences = jnp.where(heard[:, None], differences, 0)

    def by_user(theta: Array) -> Array:
        each = weights[:, None] * _label_log_prob(differences @ theta.T, labels[:, None])
        return jnp.zeros((users, groups), each.dtype).at[user].add(each)

    def expect(theta: Array, log_weight: Array) -> tuple[Array, Array]:
        joint = by_user(theta) + log_weight[None]
        total = jax.nn.logsumexp(joint, axis=-1, keepdims=True)
        return joint - total, jnp.sum(total)

    def improve(theta: Array, log_responsibility: Array) -> tuple[Array, Array]:
        share = jnp.exp(log_responsibility)

        def refit(q: Array, old: Array) -> Array:
            own = weights * q[user]
            return estimation.fit(differences, labels, ridge=ridge, weights=own, init=old).theta

        # One person more, spread evenly, keeps a group from dying out.
        counted = jnp.log(jnp.sum(share, 0) + 1 / groups) - jnp.log(users + 1.0)
        return jax.vmap(refit, in_axes=(1, 0))(share, theta), counted

    def penalized(theta: Array, log_likelihood: Array) -> Array:
        return log_likelihood - ridge * jnp.sum(theta**2) / 2

    def run(key: Array) -> Mixture:
        noise = jax.random.normal(key, (users, groups), differences.dtype)
        first = jax.nn.log_softmax(3 * noise, axis=-1)
        zero = jnp.zeros((groups, differences.shape[1]), differences.dtype)

        def step(state: tuple[Array, ...], _: None) -> tuple[tuple[Array, ...], Array]:
            theta, log_responsibility = state
            theta, log_weight = improve(theta, log_responsibility)
            log_responsibility, log_likelihood = expect(theta, log_weight)
            return (theta, log_responsibility), penalized(theta, log_likelihood)

        (theta, log_responsibility), path = lax.scan(step, (zero, first), None, length=steps)
        theta, log_weight = improve(theta, log_responsibility)
        log_responsibility, log_likelihood = expect(theta, log_weight)
        last = penalized(theta, log_likelihood) - path[-1]
        still = jnp.abs(last) <= 1e-5 * jnp.maximum(jnp.sum(weights), 1)
        return Mixture(theta, log_weight, log_responsibility, log_likelihood, still)

    found = jax.vmap(run)(jax.random.split(key, starts))
    score = jax.vmap(penalized)(found.theta, found.log_likelihood)
    best = jnp.argmax(jnp.where(jnp.isnan(score), -jnp.inf, score))
    return jax.tree.map(lambda x: x[best], found)


def route(
    log_weight: Float[Array, " groups"],
    margins: Float[Array, "groups n"],
    labels: Shaped[Array, " n"],
    *,
    rate: Scalar = 1.0,
) -> Float[Array, " groups"]:
    r"""A new person's group, from a few labels: Hedge with losses -log P_g(label).

    At ``rate`` 1 it is Bayes' rule, and ``log_weight`` the prior. Predictions mix the groups'
    probabilities (:func:`core.links.mixture_nll`), not their rewards.
    """
    labels = labels.astype(margins.dtype)
    return jax.nn.log_softmax(log_weight + rate * _label_log_prob(margins, labels[None]).sum(-1))


def simplex(
    theta: Float[Array, "groups dim"],
    differences: Float[Array, "n dim"],
    labels: Shaped[Array, " n"],
    *,
    concentration: Scalar = 1.5,
    weights: Shaped[Array, " n"] | None = None,
) -> Float[Array, " groups"]:
    r"""A person's weights on prototypes, their reward :math:`\sum_g w_g \langle\theta_g, z\rangle`.

    The most probable point under a Dirichlet prior of ``concentration`` > 1: with few labels an
    unpenalized fit runs into a corner. A person outside the hull has a floor of error that no
    label lowers. Source: PAL, arXiv 2406.08469.
    """
    labels = labels.astype(differences.dtype)
    weights = jnp.ones_like(labels) if weights is None else weights.astype(labels.dtype)
    margins = jnp.where(weights[:, None] > 0, differences @ theta.T, 0)

    def model(point: Array, mu: Array) -> simplices.Model:
        del mu
        margin = margins @ point
        error = weights * (jax.nn.sigmoid(margin) - labels)
        curvature = weights * bradley_terry.curvature(margin)
        return simplices.Model(
            weights @ bradley_terry.nll(margin, label=labels),
            error @ margins,
            (margins * curvature[:, None]).T @ margins,
            lambda step: jnp.max(jnp.abs(margins @ step), initial=0.0),
        )

    groups = theta.shape[0]
    prior = jnp.maximum(jnp.asarray(concentration, margins.dtype) - 1, 1e-5)
    start = jnp.full(groups, 1 / groups, margins.dtype)
    found = simplices.minimize(
        model, start, barrier=jnp.maximum(prior, 1.0), last_barrier=prior, tolerance=1e-3,
        max_iterations=60,
    )  # fmt: skip
    return found.weight


class Prototypes(NamedTuple):
    """A person's reward is a point of the hull: ``weight @ theta``."""

    theta: Float[Array, "groups dim"]
    weight: Float[Array, "users groups"]


def prototypes(
    differences: Float[Array, "n dim"],
    labels: Shaped[Array, " n"],
    user: Int[Array, " n"],
    *,
    start: Float[Array, "groups dim"],
    users: int,
    ridge: Scalar,
    concentration: Scalar = 1.5,
    steps: int = 10,
    weights: Shaped[Array, " n"] | None = None,
    most: int | None = None,
) -> Prototypes:
    r"""Prototypes and everybody's place among them, in turns, from ``start`` (a mixture's thetas).

    Given the places the reward is linear in all prototypes together, so they are one Bradley-Terry
    fit of features ``w_u`` times z; given the prototypes every person is :func:`simplex`. Squared
    distances to an ideal point, PAL's other form, are the same with features ``[f, vec f f^T]``.

    ``most`` is the largest number of comparisons of one person (n by default): with it each place
    is found from that many rows instead of all n. Who has more loses the rest.
    """
    groups, dim = start.shape
    labels = labels.astype(differences.dtype)
    heard = jnp.ones_like(labels) if weights is None else weights.astype(labels.dtype)
    n = labels.shape[0]
    most = n if most is None else min(most, n)
    order = jnp.argsort(user)
    near = jnp.arange(most, dtype=user.dtype)
    people = jnp.arange(users, dtype=user.dtype)
    first = jnp.searchsorted(user[order], people).astype(user.dtype)

    def place(theta: Array, number: Array) -> Array:
        own = order[jnp.minimum(first[number] + near, n - 1)]
        counted = jnp.where((user[own] == number) & (first[number] + near < n), heard[own], 0)
        return simplex(
            theta, differences[own], labels[own], concentration=concentration, weights=counted
        )

    def places(theta: Array) -> Array:
        return lax.map(lambda u: place(theta, u), people, batch_size=32)

    def step(_: int | Array, theta: Array) -> Array:
        weight = places(theta)[user]
        rows = (weight[:, :, None] * differences[:, None, :]).reshape(-1, groups * dim)
        found = estimation.fit(rows, labels, ridge=ridge, weights=heard, init=theta.reshape(-1))
        return found.theta.reshape(groups, dim)

    theta = lax.fori_loop(0, steps, step, start)
    return Prototypes(theta, places(theta))
