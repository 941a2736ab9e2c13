r"""What a step of policy improvement aims at, as log-weights over a choice set.

A target is ``target(choices) -> [*batch, choices]``: the aimed-at policy's law where every choice
is listed, and the weights of the draws otherwise, normalized either way. So a bandit deploys it
(``bandit.from_target``) and a language model learns it by weighted likelihood
(``rounds.weighted_likelihood``), from one function.

A bonus is another: :func:`pessimistic` and :func:`optimistic` return the choice set with another
reward, and any target goes on from there.

Axes: ``batch`` (free: contexts or prompts), ``choices``.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jax_klrlhf.core import choices as choice_sets
from jax_klrlhf.core import gibbs, numerics, regularized, rejection
from jax_klrlhf.core.choices import Choices
from jax_klrlhf.core.fdivergence import FDivergence, reverse_kl
from jax_klrlhf.core.numerics import Scalar

Target = Callable[[Choices], Float[Array, "*batch choices"]]
"""``target(choices) -> log_weight``."""


def optimum(
    choices: Choices, *, kl_coef: Scalar, divergence: FDivergence = reverse_kl
) -> Float[Array, "*batch choices"]:
    r"""The Gibbs policy of the reward, :math:`\pi_0 e^{r/\eta}` (arXiv 2312.11456, section 2).

    Exact where all choices are listed. On draws it is self-normalized importance sampling: weights
    in proportion to :math:`e^{r/\eta} \pi_0 / \pi`; where the set holds no log-probabilities its
    draws are pi0's. With another ``divergence`` it is that one's optimum
    (:func:`core.regularized.log_prob`): on draws the optimum against pi0 as the draws show it.
    """
    reward, reference = choices.require("reward", by="the optimum"), _reference(choices)
    if divergence is reverse_kl:
        return gibbs.log_prob(reward, reference, kl_coef=kl_coef, where=choices.where)
    keep = numerics.support(reference, choices.where)
    total = numerics.masked_logsumexp(jnp.where(keep, reference, 0), keep)
    shown = jnp.where(keep, reference - jnp.where(jnp.any(keep, -1), total, 0)[..., None], -jnp.inf)
    return regularized.log_prob(
        reward, shown, kl_coef=kl_coef, divergence=divergence, where=choices.where
    )


def best_of(choices: Choices, *, n: int) -> Float[Array, "*batch choices"]:
    r"""The best of ``n`` draws by reward, ties shared.

    .. math:: P(a) = p(a)\, \frac{F(r(a))^n - F(r(a)^-)^n}{F(r(a)) - F(r(a)^-)}

    F the distribution function of the reward under the mass p. Its KL to the law drawn from is at
    most log n - (n - 1) / n. On K draws the mass is 1/K each: the expectation over which n of the K
    are looked at, with replacement.

    >>> two = choice_sets.enumerated(jnp.log(jnp.array([0.5, 0.5])), reward=jnp.array([1.0, 0.0]))
    >>> jnp.exp(best_of(two, n=2)).tolist()
    [0.75, 0.25]
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    reward = choices.require("reward", by="the best of n")
    order = jnp.argsort(jnp.where(choices.mass > 0, reward, 0), axis=-1)
    back = jnp.argsort(order, axis=-1)
    prob = jnp.take_along_axis(choices.mass, order, axis=-1)
    value = jnp.take_along_axis(jnp.where(choices.mass > 0, reward, 0), order, axis=-1)
    upto = jnp.minimum(jnp.cumsum(prob, axis=-1), 1)
    below = jnp.concatenate([jnp.zeros_like(upto[..., :1]), upto[..., :-1]], axis=-1)
    # Equal rewards share one jump of F: its two ends, carried over the run of equals.
    starts = jnp.concatenate(
        [jnp.ones_like(value[..., :1], bool), value[..., 1:] != value[..., :-1]], axis=-1
    )
    ends = jnp.concatenate([starts[..., 1:], jnp.ones_like(starts[..., :1])], axis=-1)
    last = prob.ndim - 1
    low = lax.cummax(jnp.where(starts, below, 0), axis=last)
    high = lax.cummin(jnp.where(ends, upto, 2), axis=last, reverse=True)
    # (h^n - l^n) / (h - l) as the sum of h^i l^(n-1-i): no cancellation where the jump is small.

    def horner(_: int | Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        total, power = state
        return total * low + power, power * high

    total, _ = lax.fori_loop(0, n, horner, (jnp.zeros_like(high), jnp.ones_like(high)))
    law = jnp.log(prob) + jnp.log(total)
    return jnp.take_along_axis(law, back, axis=-1)


def top(choices: Choices, *, share: float) -> Float[Array, "*batch choices"]:
    r"""The best ``share`` of the mass by reward, in its own proportions: RAFT, filtered SFT.

    A choice is kept where the mass of strictly better ones is below ``share``, so at least one is,
    and ties are kept together. Learned by weighted likelihood on pi0's draws it is the upper tail
    of pi0; on the policy's own draws, again and again, it ends deterministic (arXiv 2304.06767).

    ValueError for a share outside (0, 1].

    >>> four = choice_sets.enumerated(
    ...     jnp.log(jnp.array([0.4, 0.1, 0.2, 0.3])), reward=jnp.array([0.0, 3.0, 2.0, 1.0])
    ... )
    >>> jnp.exp(top(four, share=0.3)).tolist()
    [0.0, 0.333..., 0.666..., 0.0]
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1], got {share}")
    reward = choices.require("reward", by="the top share")
    mass = choices.mass
    value = jnp.where(mass > 0, reward, 0)
    better = (value[..., None, :] > value[..., :, None]) & (mass > 0)[..., None, :]
    above = jnp.sum(jnp.where(better, mass[..., None, :], 0), axis=-1)
    # Rounding of a sum of masses must not let one more in.
    kept = (mass > 0) & (above < share - 4 * jnp.finfo(mass.dtype).eps)
    total = jnp.sum(jnp.where(kept, mass, 0), axis=-1, keepdims=True)
    some = kept & (total > 0)
    return jnp.where(
        some, jnp.log(jnp.where(some, mass, 1)) - jnp.log(jnp.where(total > 0, total, 1)), -jnp.inf
    )


def accepted(
    choices: Choices,
    *,
    reward_bound: Scalar,
    kl_coef: Scalar,
    kl_coef_prev: Scalar = jnp.inf,
) -> Float[Array, "*batch choices"]:
    """An accepted draw of rejection sampling (:mod:`core.rejection`), given which were proposed."""
    reward = choices.require("reward", by="rejection sampling")
    return rejection.accepted_log_prob(
        reward,
        choices.log_mass,
        reward_bound=reward_bound,
        kl_coef=kl_coef,
        kl_coef_prev=kl_coef_prev,
        where=choices.where,
    )


def pessimistic(choices: Choices, *, radius: Scalar = 1.0) -> Choices:
    """The choices with ``radius`` times their uncertainty taken from the reward.

    Option II of offline GSHF (arXiv 2312.11456, Algorithm 1) where the uncertainty is
    ``||phi - nu||_{Sigma^-1}``.
    """
    reward, uncertainty = choices.require("reward", "uncertainty", by="pessimism")
    return choices._replace(reward=reward - radius * uncertainty)


def optimistic(choices: Choices, *, radius: Scalar = 1.0) -> Choices:
    """The choices with ``radius`` times their uncertainty added to the reward (KL-UCB's bonus)."""
    reward, uncertainty = choices.require("reward", "uncertainty", by="optimism")
    return choices._replace(reward=reward + radius * uncertainty)


def effective_share(
    choices: Choices, log_weight: Float[Array, "*batch choices"]
) -> Float[Array, "*batch"]:
    r"""How much of the sampling mass carries a target: :math:`1 / E_p[(w/p)^2]`, in (0, 1].

    1 where the weights are the mass itself, 1/K where one of K draws has all.
    """
    mass = choices.mass
    keep = mass > 0
    ratio = jnp.exp(2 * jnp.where(keep, log_weight, 0)) / jnp.where(keep, mass, 1)
    return 1 / jnp.sum(jnp.where(keep, ratio, 0), axis=-1)


def _reference(choices: Choices) -> Float[Array, "*batch choices"]:
    if choices.law == choice_sets.ENUMERATED:
        return choices.require("ref_log_prob", by="the optimum")
    if choices.ref_log_prob is None or choices.log_prob is None:
        return choices.log_mass
    keep = numerics.support(choices.log_mass, choices.where)
    ratio = jnp.where(keep, choices.ref_log_prob - choices.log_prob, 0)
    return jnp.where(keep, choices.log_mass + ratio, -jnp.inf)
