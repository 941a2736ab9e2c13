r"""From rewards and policies to win rates and back: general preferences, mixtures, regret.

A preference is a matrix ``P[i, j]``, the probability that i is preferred to j; a Bradley-Terry
reward makes one (:func:`matrix`), people may have any. The **win rate** of i against a policy,
:math:`\sum_j \pi(j) P[i, j]`, is a reward, and four systems are this function: PAR (against pi0,
arXiv 2502.18770), variational preference learning's scaled reward, direct Nash optimization's and
Think-RM's pairwise reward (against the present policy). DNO's soft labels are
``matrix(win_rate(...))`` (arXiv 2404.03715): sigma of a difference of win *rates*, not P.

The laws of a label given a margin (ties, flips, K-wise) are preference models of their own; here is
what has no margin, or more than one.

Axes: ``batch`` (free), ``actions``, ``members`` (leading), ``length`` (tokens).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Shaped

from jax_klrlhf.core import divergence, gibbs, numerics
from jax_klrlhf.core.numerics import Scalar


def matrix(reward: Float[Array, "*batch actions"]) -> Float[Array, "*batch actions actions"]:
    """The Bradley-Terry preferences ``sigma(r_i - r_j)``.

    >>> matrix(jnp.log(jnp.array([3.0, 1.0]))).tolist()
    [[0.5, 0.75...], [0.25, 0.5]]
    """
    return jax.nn.sigmoid(reward[..., :, None] - reward[..., None, :])


def win_rate(
    prefer: Float[Array, "*batch actions actions"],
    log_prob: Float[Array, "*batch actions"],
    *,
    where: Bool[Array, "*batch actions"] | None = None,
) -> Float[Array, "*batch actions"]:
    r""":math:`\sum_j \pi(j) P[i, j]`, the probability that i beats a draw from the policy.

    ``log_prob`` is normalized here over the actions in play, so ``jnp.zeros`` is "the other draws";
    where a draw should not meet itself, leave it out by hand: its 1/2 shrinks every difference.

    >>> win_rate(matrix(jnp.log(jnp.array([3.0, 1.0]))), jnp.log(jnp.array([0.5, 0.5]))).tolist()
    [0.625, 0.375]
    """
    keep = numerics.support(log_prob, where)
    law = jnp.where(keep, log_prob, -jnp.inf)
    law = law - numerics.masked_logsumexp(law, keep)[..., None]
    opponents = jnp.broadcast_to(law[..., None, :], prefer.shape)
    return numerics.expectation(
        opponents, prefer, where=jnp.broadcast_to(keep[..., None, :], prefer.shape)
    )


class Equilibrium(NamedTuple):
    """A policy and how much its best opponent gains: 0 exactly at equilibrium."""

    log_prob: Float[Array, "*batch actions"]
    exploitability: Float[Array, "*batch"]


def exploitability(
    log_prob: Float[Array, "*batch actions"],
    prefer: Float[Array, "*batch actions actions"],
    ref_log_prob: Float[Array, "*batch actions"],
    *,
    kl_coef: Scalar,
) -> Float[Array, "*batch"]:
    r"""What the best KL-regularized answer gains: :math:`\eta\,\mathrm{KL}(\pi \| \pi_{win})`.

    The payoff of p against q is P(p > q) - eta KL(p||pi0) + eta KL(q||pi0), so two equal players
    have 1/2 each and the best answer is the Gibbs policy of the win rate [derived].
    """
    answer = gibbs.log_prob(win_rate(prefer, log_prob), ref_log_prob, kl_coef=kl_coef)
    return kl_coef * divergence.categorical(log_prob, answer)


def nash(
    prefer: Float[Array, "*batch actions actions"],
    ref_log_prob: Float[Array, "*batch actions"],
    *,
    kl_coef: Scalar,
    steps: int = 400,
) -> Equilibrium:
    r"""The equilibrium of the KL-regularized preference game (arXiv 2402.07314, 2312.00886).

    Damped best answers :math:`\pi \leftarrow \pi^{1-h} (\pi_0 e^{win/\eta})^h`, h = min(1/5,
    eta/2): undamped answers, or a reference that moves along, cycle where P does.
    ``exploitability`` certifies the result.
    """
    damping = jnp.minimum(0.2, jnp.asarray(kl_coef, ref_log_prob.dtype) / 2)
    keep = ref_log_prob > -jnp.inf

    def step(_: int | Array, log_prob: Array) -> Array:
        answer = jnp.where(keep, ref_log_prob, 0) + win_rate(prefer, log_prob) / kl_coef
        mixed = (1 - damping) * jnp.where(keep, log_prob, 0) + damping * answer
        return jax.nn.log_softmax(jnp.where(keep, mixed, -jnp.inf))

    found = lax.fori_loop(0, steps, step, jax.nn.log_softmax(ref_log_prob))
    return Equilibrium(found, exploitability(found, prefer, ref_log_prob, kl_coef=kl_coef))


def regret(
    log_prob: Float[Array, "*batch length"],
    ref_log_prob: Float[Array, "*batch length"],
    *,
    kl_coef: Scalar,
    where: Bool[Array, "*batch length"] | None = None,
) -> Float[Array, "*batch"]:
    r"""Cumulative soft advantage of a prefix, :math:`\eta \sum_t \log \pi^*(t) / \pi_0(t)`.

    People who compare *segments* are predicted better by it than by the segments' partial return
    (arXiv 2206.02231): P(first) = sigma of the difference of two. With a KL penalty the advantage
    of a token is eta times its log-ratio [derived]. Over whole responses to one prompt it is the
    reward less a constant: there the two models are one, and the claim is about prefixes only.
    """
    ratio = kl_coef * (log_prob - ref_log_prob)
    return jnp.sum(ratio if where is None else jnp.where(where, ratio, 0), -1)


def mixture_nll(
    margin: Float[Array, "members *n"],
    log_weight: Float[Array, "members *n"],
    *,
    label: Shaped[Array, "*n"],
) -> Float[Array, "*n"]:
    r"""``-log sum_k w_k P_k(label)``: nobody says which member a label came from, in nats.

    ``log_weight`` may differ between comparisons (a router's, arXiv 2505.24846) and is normalized
    over members. Labels in [0, 1] mix the two outcomes' *probabilities*, so a half is "unknown".
    """
    weight = jax.nn.log_softmax(log_weight, axis=0)
    ahead = jax.nn.logsumexp(weight + jax.nn.log_sigmoid(margin), axis=0)
    behind = jax.nn.logsumexp(weight + jax.nn.log_sigmoid(-margin), axis=0)
    label = label.astype(margin.dtype)
    return -(label * ahead + (1 - label) * behind)
