r"""Reward to reward: origins, bounds, transforms against hacking, nuisances, diversity, potentials.

Every transform but a shift changes the reward's scale, and under a KL coefficient scale is
behaviour: compare at equal divergence (:func:`core.measure.at_divergence`), never at equal kl_coef.
With an exact reward the identity is optimal and every transform loses; a strictly increasing map
keeps the best action, so it delays hacking and does not end it [derived].

``reference [*batch]`` is a reward of each context to compare with: :func:`quantile` or the mean
under pi0. It makes a transform independent of offsets that preferences don't identify.

Axes: ``batch`` (free), ``actions`` (what is chosen among, always last), ``dim`` (features).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jax_klrlhf.core import aggregate, bradley_terry, gibbs, links, numerics
from jax_klrlhf.core.numerics import Scalar


def quantile(
    reward: Float[Array, "*batch actions"],
    ref_log_prob: Float[Array, "*batch actions"],
    *,
    level: Scalar,
    where: Bool[Array, "*batch actions"] | None = None,
) -> Float[Array, "*batch"]:
    """The least reward whose probability of not being exceeded under pi0 is at least ``level``.

    >>> quarter = jnp.log(jnp.full(4, 0.25))
    >>> float(quantile(jnp.array([3.0, 1.0, 2.0, 4.0]), quarter, level=0.5))
    2.0
    """
    keep = numerics.support(ref_log_prob, where)
    prob = jax.nn.softmax(jnp.where(keep, ref_log_prob, -jnp.inf), where=keep)
    order = jnp.argsort(jnp.where(keep, reward, jnp.inf), axis=-1)
    upto = jnp.cumsum(jnp.take_along_axis(jnp.where(keep, prob, 0), order, -1), -1)
    # The sum of probabilities misses 1 by rounding; the level is missed by as little.
    slack = 4 * jnp.finfo(upto.dtype).eps * reward.shape[-1]
    some = jnp.sum(keep, -1, keepdims=True)
    index = jnp.minimum(jnp.sum(upto < level - slack, -1, keepdims=True), jnp.maximum(some - 1, 0))
    return jnp.take_along_axis(reward, jnp.take_along_axis(order, index, -1), -1)[..., 0]


def centre(
    reward: Float[Array, "*batch actions"],
    ref_log_prob: Float[Array, "*batch actions"],
    *,
    where: Bool[Array, "*batch actions"] | None = None,
) -> Float[Array, "*batch actions"]:
    """The reward less its mean under pi0: the canonical form (:func:`core.aggregate.centre`)."""
    return aggregate.centre(reward[None], ref_log_prob, where=where)[0]


def standardize(
    reward: Float[Array, "*batch actions"],
    ref_log_prob: Float[Array, "*batch actions"],
    *,
    where: Bool[Array, "*batch actions"] | None = None,
) -> Float[Array, "*batch actions"]:
    """Mean 0 and deviation 1 under pi0 in each context; 0 where the reward is constant."""
    centred = centre(reward, ref_log_prob, where=where)
    keep = numerics.support(ref_log_prob, where)
    law = jnp.where(keep, ref_log_prob, -jnp.inf)
    law = law - jax.nn.logsumexp(law, axis=-1, keepdims=True, where=keep)
    spread = numerics.safe_sqrt(numerics.expectation(law, centred**2, where=keep))[..., None]
    # A constant reward leaves rounding, which must not become a deviation of 1.
    largest = jnp.max(jnp.where(keep, jnp.abs(reward), 0), -1, keepdims=True)
    flat = spread <= 8 * jnp.finfo(reward.dtype).eps * largest
    return jnp.where(flat, 0, centred / jnp.where(flat, 1, spread))


def ceiling(
    reward: Float[Array, "*batch actions"], *, reference: Float[Array, "*batch"]
) -> Float[Array, "*batch actions"]:
    """``min(r, reference)``: a flat top, the only kind of transform that ends hacking.

    Per sample, unlike a constraint on the mean, which is a linear weight (:mod:`core.saddle`).
    """
    return jnp.minimum(reward, reference[..., None])


def clip(
    reward: Float[Array, "*batch actions"],
    *,
    low: Float[Array, "*batch"],
    high: Float[Array, "*batch"],
) -> Float[Array, "*batch actions"]:
    """The reward cut to ``[low, high]`` of each context."""
    return jnp.clip(reward, low[..., None], high[..., None])


def log_sigmoid(
    reward: Float[Array, "*batch actions"], *, reference: Float[Array, "*batch"]
) -> Float[Array, "*batch actions"]:
    r""":math:`\log \sigma(r - r_{ref})`: saturates above the reference, linear below it.

    The paper's reference is a quantile under pi0, 85 % in its experiments (arXiv 2402.00742,
    section 4). At kl_coef 1 the optimum is pi0 given "good", good being an event of probability
    sigma(r - ref).
    """
    return bradley_terry.log_likelihood(reward - reference[..., None])


def win_rate(
    reward: Float[Array, "*batch actions"],
    ref_log_prob: Float[Array, "*batch actions"],
    *,
    where: Bool[Array, "*batch actions"] | None = None,
) -> Float[Array, "*batch actions"]:
    r"""PAR: :math:`E_{b \sim \pi_0}\, \sigma(r(a) - r(b))`, the chance to beat pi0, in [0, 1].

    Source: arXiv 2502.18770 (M reference draws there, all of pi0 here). Its unit isn't the nat of
    the reward: the KL coefficient must be chosen anew.
    """
    return links.win_rate(links.matrix(reward), ref_log_prob, where=where)


def orthogonal(
    features: Float[Array, "contexts actions dim"],
    nuisance: Float[Array, "contexts actions k"],
    ref_log_prob: Float[Array, "contexts actions"],
    *,
    context_prob: Float[Array, " contexts"],
) -> Float[Array, "contexts actions dim"]:
    r"""Features less their linear regression on nuisances (length), within contexts, under pi0.

    A linear reward on them is uncorrelated with the nuisance: ODIN in exact linear form (arXiv
    2402.07319). It throws away true signal where quality correlates with length; to regress on
    ``[features, nuisance]`` and set the nuisance's coefficient to 0 does not.
    """
    weight = numerics.safe_sqrt(context_prob[:, None] * jnp.exp(ref_log_prob))[..., None]

    def rows(x: Array) -> Array:
        centred = jnp.moveaxis(aggregate.centre(jnp.moveaxis(x, -1, 0), ref_log_prob), 0, -1)
        return (weight * centred).reshape(-1, x.shape[-1])

    slope = jnp.linalg.lstsq(rows(nuisance), rows(features))[0]
    return features - jnp.einsum("xak,kd->xad", nuisance, slope, precision=lax.Precision.HIGHEST)


def class_log_prob(
    log_prob: Float[Array, "*batch actions"], classes: Int[Array, "*batch actions"]
) -> Float[Array, "*batch actions"]:
    """Log-probability of each action's class: responses that say the same are one class."""
    same = classes[..., :, None] == classes[..., None, :]
    spread = jnp.broadcast_to(log_prob[..., None, :], same.shape)
    return numerics.masked_logsumexp(spread, same & (spread > -jnp.inf))


def surprise(
    log_prob: Float[Array, "*batch actions"], classes: Int[Array, "*batch actions"]
) -> Float[Array, "*batch actions"]:
    """``-log P(class)``, in nats: its expectation is the entropy of the classes."""
    return -class_log_prob(log_prob, classes)


def rarity(
    log_prob: Float[Array, "*batch actions"], classes: Int[Array, "*batch actions"]
) -> Float[Array, "*batch actions"]:
    """``1 - P(class)``: the expected share of other draws of another class.

    DARLING multiplies the reward by it (arXiv 2509.02534); a product needs a reward >= 0, or it
    *reduces* diversity.
    """
    return -jnp.expm1(class_log_prob(log_prob, classes))


class FixedPoint(NamedTuple):
    """A policy that is optimal for the reward that it makes."""

    log_prob: Float[Array, "*batch actions"]
    residual: Float[Array, "*batch"]  # total variation between the policy and its own optimum


def fixed_point(
    reward_of: Callable[[Array], Array],
    ref_log_prob: Float[Array, "*batch actions"],
    *,
    kl_coef: Scalar,
    damping: Scalar = 0.3,
    steps: int = 200,
) -> FixedPoint:
    r"""The policy with :math:`\pi = \mathrm{Gibbs}(r_\pi)`, ``reward_of(log_prob)`` being r_pi.

    For rewards that depend on the policy, as a diversity bonus does: ``lambda p: r + coef *
    surprise(p, classes)``. Damped in log-space; ``residual`` says how far it is from one.
    """

    def answer(log_prob: Array) -> Array:
        return gibbs.log_prob(reward_of(log_prob), ref_log_prob, kl_coef=kl_coef)

    def step(_: int | Array, log_prob: Array) -> Array:
        mixed = (1 - damping) * log_prob + damping * answer(log_prob)
        mixed = jnp.where(ref_log_prob > -jnp.inf, mixed, -jnp.inf)
        return jax.nn.log_softmax(mixed)

    found = lax.fori_loop(0, steps, step, jax.nn.log_softmax(ref_log_prob))
    distance = jnp.sum(jnp.abs(jnp.exp(found) - jnp.exp(answer(found))), -1) / 2
    return FixedPoint(found, distance)


def shaped(
    token_reward: Float[Array, "*batch length"],
    potential: Float[Array, "*batch length_plus_one"],
) -> Float[Array, "*batch length"]:
    r"""``r_t + phi(s_{t+1}) - phi(s_t)``: potential-based shaping on the prefixes of a response.

    Over a whole response it adds ``phi(end) - phi(start)``, so the KL-regularized optimum stays iff
    phi(end) is one constant for each prompt [derived; Ng et al., 1999]. ``potential`` has one entry
    more than there are tokens.

    >>> shaped(jnp.zeros(2), jnp.array([0.0, 5.0, 0.0])).tolist()
    [5.0, -5.0]
    """
    if potential.shape[-1] != token_reward.shape[-1] + 1:
        raise ValueError(
            f"potential has {potential.shape[-1]} positions, expected one more than the "
            f"{token_reward.shape[-1]} tokens: each prefix has one, the empty one included"
        )
    return token_reward + potential[..., 1:] - potential[..., :-1]
