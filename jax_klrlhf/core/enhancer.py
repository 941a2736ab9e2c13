r"""The enhancer of online GSHF: who plays against the main agent, as a value over choice sets.

Option I is the most informative opponent near the main agent,

.. math::
    \max_{\pi'} \|g(\pi')\|_{\Sigma^{-1}} \quad \text{over} \quad
    \eta\, E\,\mathrm{KL}(\pi' \| \pi_1) \le \beta \|g(\pi')\|_{\Sigma^{-1}}, \qquad
    g(\pi') = E[\phi(x, \pi') - \phi(x, \pi_1)],

Option II is pi0. Source: Xiong et al., arXiv 2312.11456, Algorithm 2. How Option I is solved
[derived]:

* ``||g||`` is the largest ``<v, g> / ||v||_Sigma`` over directions v. So the constraint set is the
  union over v of the convex sets ``eta KL <= beta <v, g> / ||v||_Sigma``.
* In one such set the best policy is a Gibbs tilt of pi_1, ``pi_1 exp(s <v, phi>)``. Along the tilt
  ``d<v, g> = Var ds`` and ``d KL = s Var ds``, so KL / <v, g> is a weighted mean of s and
  increases: the largest strength s is a root in one variable.
* Taking ``v = Sigma^{-1} g`` at that policy makes the inequality tight, so the policy lies in the
  next set as well and the next norm isn't smaller. Repeat: a monotone ascent.

The problem maximizes a convex function, so there are several starts (up and down the least known
coordinates) and the best is returned, with its constraint as data. Every iterate satisfies the
constraint.

**On draws it is the same function.** The tilt then weights the K draws, each of mass 1/K, and one
is taken by its weight. Of that policy the KL to pi_1 is *at most* the mean over draws of the KL of
the weights to 1/K: taking one of K draws uniformly is a draw from pi_1, and forgetting which draws
it was taken from cannot increase a divergence [derived: data processing on draws and index]. So a
policy that fits the budget on the draws fits it in truth, up to the noise of few prompts.

Axes: ``batch`` (free: contexts or prompts), ``choices``, ``dim``, ``starts``.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_klrlhf.core import choices as choice_sets
from jax_klrlhf.core import divergence, gibbs, linalg, numerics
from jax_klrlhf.core import ellipsoid as ellipsoids
from jax_klrlhf.core.choices import Choices
from jax_klrlhf.core.ellipsoid import Ellipsoid
from jax_klrlhf.core.numerics import Scalar


class Enhancer(NamedTuple):
    """The enhancer's policy; how informative it is; both sides of its constraint, in reward."""

    log_prob: Float[Array, "*batch choices"]
    """Of each choice: its law where all are listed, the weights of the draws otherwise."""
    uncertainty: Float[Array, ""]
    """||g||_{Sigma^-1}"""
    cost: Float[Array, ""]
    """eta E KL(pi' || pi_1); on draws an upper bound of it."""
    budget: Float[Array, ""]
    """radius * uncertainty; cost <= budget up to rounding."""


def option_one(
    choices: Choices,
    *,
    kl_coef: Scalar,
    radius: Scalar = 1.0,
    starts: int = 4,
    iterations: int = 6,
    refinements: int = 8,
) -> Enhancer:
    """Option I: the best of several monotone ascents over tilts of the main agent's choices.

    ``starts`` directions are used, both signs of each of the ``starts / 2`` least known
    coordinates. ``radius`` 0 returns the main agent itself; it is 1 where the ellipsoid's norm is
    the uncertainty itself, as it is in what a language model's belief leaves.

    How near the best of 128 random starts the norm comes depends on the dimension: on 128 problems
    each of 8 contexts and 8 actions (the realized error as radius) its 10 % quantile is 0.99, 0.97
    and 0.93 of it at dim 4, 8 and 16 by default, and 1.00, 1.00, 0.99 with ``starts = 2 dim,
    iterations = 10``.

    ValueError if ``starts`` is odd or exceeds twice the dimension, a budget is below 1, features or
    ellipsoid are absent, or some choices are another agent's.
    """
    features, ellipsoid = choices.require("features", "ellipsoid", by="the enhancer")
    if choices.agent is not None:
        raise ValueError(
            "the enhancer tilts the main agent's own choices, and some here are another agent's; "
            "sample with main_agent, or pair two agents with between_agents."
        )
    dim = features.shape[-1]
    if starts % 2 or not 2 <= starts <= 2 * dim:
        raise ValueError(f"starts must be even and in 2..{2 * dim} (both signs), got {starts}")
    if iterations < 1 or refinements < 1:
        raise ValueError(f"need iterations, refinements >= 1, got {iterations}, {refinements}")
    where = choices.mass > 0
    features = jnp.where(where[..., None], features, 0)
    choices = choices._replace(features=features)
    main = jnp.where(where, jnp.log(jnp.where(where, choices.mass, 1)), -jnp.inf)
    precision = ellipsoid.precision
    inverse = linalg.inverse(precision)
    # One step of the power method from the least known coordinates: no eigenvectors are needed.
    _, least_known = jax.lax.top_k(jnp.diagonal(inverse), starts // 2)
    axes = inverse[least_known]
    mean = _mean_features(choices, main)

    def ascend(direction: Float[Array, " dim"]) -> Enhancer:
        for _ in range(iterations - 1):
            tilted = _strongest_tilt(
                choices, main, direction, kl_coef=kl_coef, radius=radius, refinements=refinements
            )
            g = _mean_features(choices, tilted) - mean
            # Where the tilt does nothing (radius 0) the direction stays.
            direction = jnp.where(jnp.any(g != 0), inverse @ g, direction)
        tilted = _strongest_tilt(
            choices, main, direction, kl_coef=kl_coef, radius=radius, refinements=refinements
        )
        g = _mean_features(choices, tilted) - mean
        uncertainty = numerics.safe_sqrt(g @ inverse @ g)
        cost = kl_coef * choice_sets.over_contexts(
            choices, divergence.categorical(tilted, main, where=where)
        )
        return Enhancer(tilted, uncertainty, cost, radius * uncertainty)

    found = jax.vmap(ascend)(jnp.concatenate([axes, -axes]))
    best = jnp.argmax(found.uncertainty)
    return jax.tree.map(lambda leaf: leaf[best], found)


def option_two(choices: Choices) -> Float[Array, "*batch choices"]:
    """Option II: pi0, as log-weights over the main agent's choices.

    Its law where all choices are listed; on draws the importance weights pi0 / pi, normalized over
    them. Where pi0 has draws of its own, :func:`~jax_klrlhf.core.pairs.between_agents` uses those.
    """
    if choices.law == choice_sets.ENUMERATED:
        return choices.require("ref_log_prob", by="the enhancer of Option II")
    log_prob, ref = choices.require("log_prob", "ref_log_prob", by="the enhancer of Option II")
    where = choices.mass > 0
    weight = jnp.where(where, choices.log_mass + ref - log_prob, 0)
    return jnp.where(where, weight, -jnp.inf) - numerics.masked_logsumexp(weight, where)[..., None]


def best_of_n(choices: Choices, *, kl_coef: Scalar, radius: Scalar = 1.0) -> Enhancer:
    r"""The farthest of n draws from the main agent's mean feature, for the largest n that fits.

    The form that the practice of best-of-n suggests. The policy "farthest of n draws" has
    KL <= log n - (n - 1) / n to the main agent whatever the rule of choice, so the budget of
    Option I is searched over n; at n = 1 the enhancer *is* the main agent. It maximizes E||.||, not
    ||E .||: draws that are far in opposite directions cancel in g, which :func:`option_one` avoids.

    ValueError where the choices are listed, not drawn.
    """
    if choices.law == choice_sets.ENUMERATED:
        raise ValueError("best_of_n chooses among draws and these choices are listed: sample first")
    ellipsoid, shift, far = _away(choices, by="best_of_n")
    samples = far.shape[-1]
    place = jnp.broadcast_to(jnp.arange(samples), far.shape)

    def choice(n: Array) -> Array:
        return jnp.argmax(jnp.where(place < n, far, -jnp.inf), axis=-1)

    def sides(n: Array) -> tuple[Array, Array]:
        at = choice(n)[..., None, None]
        g = choice_sets.over_contexts(choices, jnp.take_along_axis(shift, at, -2)[..., 0, :])
        number = n.astype(far.dtype)
        cost = kl_coef * (jnp.log(number) - (number - 1) / number)
        return cost, ellipsoids.norm(ellipsoid, g)

    tries = jnp.arange(1, samples + 1)
    cost, uncertainty = jax.vmap(sides)(tries)
    fits = (cost <= radius * uncertainty) | (tries == 1)
    best = jnp.max(jnp.where(fits, tries, 1)) - 1
    hit = jax.nn.one_hot(choice(tries[best]), samples, dtype=jnp.bool_)
    log_prob = jnp.where(hit, jnp.zeros((), far.dtype), -jnp.inf)
    return Enhancer(log_prob, uncertainty[best], cost[best], radius * uncertainty[best])


def farthest(choices: Choices) -> Float[Array, "*batch choices"]:
    """The main agent's choice farthest from its mean feature, whatever it costs; ties are shared.

    Of K draws it is :func:`best_of_n` at n = K.
    """
    _, _, far = _away(choices, by="uncertain_against")
    top = (far == jnp.max(far, axis=-1, keepdims=True)) & (far > -jnp.inf)
    return jnp.where(top, jnp.zeros((), far.dtype), -jnp.inf)


def _away(choices: Choices, *, by: str) -> tuple[Ellipsoid, Array, Array]:
    """Features less the main agent's mean, and their norms; -inf where it has no choice."""
    features, ellipsoid = choices.require("features", "ellipsoid", by=by)
    where = choices.mass > 0
    centre = choice_sets.expectation(choices, features)[..., None, :]
    shift = jnp.where(where[..., None], features - centre, 0)
    return ellipsoid, shift, jnp.where(where, ellipsoids.norm(ellipsoid, shift), -jnp.inf)


def _mean_features(
    choices: Choices, log_prob: Float[Array, "*batch choices"]
) -> Float[Array, " dim"]:
    per_context = jnp.einsum("...a,...ad->...d", jnp.exp(log_prob), choices.features)
    return choice_sets.over_contexts(choices, per_context)


def _strongest_tilt(
    choices: Choices,
    main: Float[Array, "*batch choices"],
    direction: Float[Array, " dim"],
    *,
    kl_coef: Scalar,
    radius: Scalar,
    refinements: int,
) -> Float[Array, "*batch choices"]:
    r"""``pi_1 exp(s u)`` with ``u = <v, phi> / ||v||_Sigma``, for the largest s within the budget.

    Sought is the s at which R(s) = KL / E[u(pi') - u(pi_1)] reaches ``radius / eta``. R(s) <= s, so
    that is a start within the budget. Newton's method, with R'(s) = Var (s - R) / E[...], where it
    falls between the last points within and beyond the budget, and their geometric mean
    otherwise. The strongest s that was seen within the budget is used.
    """
    features, ellipsoid = choices.require("features", "ellipsoid", by="the enhancer")
    length = numerics.safe_sqrt(direction @ ellipsoid.precision @ direction)
    u = features @ (direction / length)
    prob = jnp.exp(main)
    where = prob > 0
    centred = jnp.where(where, u - jnp.sum(prob * u, -1, keepdims=True), 0)
    unit = jnp.asarray(radius, u.dtype) / kl_coef
    largest = jnp.maximum(jnp.max(jnp.abs(centred)), jnp.finfo(u.dtype).tiny)
    # Beyond this tilt a policy of ordinary probabilities is deterministic, and exp overflows.
    high = jnp.minimum(LARGEST_TILT * unit, 80 / largest)
    low = jnp.minimum(unit, high)

    square = centred**2
    variance = jnp.sum(prob * square, -1)

    def average(value: Float[Array, "*batch"]) -> Float[Array, ""]:
        return choice_sets.over_contexts(choices, value)

    def ratio(strength: Float[Array, ""]) -> tuple[Float[Array, ""], Float[Array, ""]]:
        # With u centred under pi_1 all terms are of the size of the result: no cancellation.
        extra = prob * jnp.expm1(strength * centred)
        log_z = jnp.log1p(jnp.sum(extra, -1))
        moved = jnp.sum(extra * centred, -1) * jnp.exp(-log_z)
        spread = (variance + jnp.sum(extra * square, -1)) * jnp.exp(-log_z) - moved**2
        gained = average(moved)
        per_gain = jnp.where(gained > 0, 1 / jnp.where(gained > 0, gained, 1), 0)
        here = average(strength * moved - log_z) * per_gain
        slope = average(spread) * per_gain * (strength - here)
        return here, slope

    def refine(_: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        low, high, strength = state
        here, slope = ratio(strength)
        # Newton's last point may be the edge itself, and rounding must not decide on it.
        within = here <= unit * (1 + 8 * jnp.finfo(u.dtype).eps)
        low, high = jnp.where(within, strength, low), jnp.where(within, high, strength)
        guess = strength + (unit - here) / jnp.where(slope > 0, slope, 1)
        inside = (slope > 0) & (guess > low) & (guess < high)
        return low, high, jnp.where(inside, guess, jnp.sqrt(low * high))

    # The end of the range first: where even that is within the budget there is nothing to seek.
    start = (low, high, high)
    low, _, _ = jax.lax.fori_loop(0, refinements, refine, start)
    return gibbs.log_prob(low * centred, main, kl_coef=jnp.ones((), u.dtype), where=where)


LARGEST_TILT = 16.0
"""Search range of the tilt, in units of radius / kl_coef."""
