r"""Losses that look at each response of a pair by itself: ``Scores -> [batch]``.

With x = eta log(pi/pi0), each is a loss of x as a winner plus one of x as a loser, so that the
population sees of an action only how often it wins: its win rate W against those it meets. Their
laws are laws of *win rates*, not of rewards, and they pin the level of x, which a margin leaves
free: where the numbers named don't normalize, the policy is as near as it can be.

================ =========================================== ==========================
loss             of a winner, of a loser                     x at the minimum
================ =========================================== ==========================
:func:`nca`      -log s(x) - log s(-x)/2, -log s(-x)/2       log 2W
:func:`bco`      -log s(x - d), -log s(d - x)                d + log W/(1 - W)
:func:`sppo`     (x - 1/2)^2, (x + 1/2)^2, over eta^2        W - 1/2
:func:`apo_zero` :func:`apo_down` likewise                   none: at the edge
:func:`kto`      s(d - x), s(x - d)                          none: at the edge
================ =========================================== ==========================

Axes: ``batch`` (free axes, one entry per pair), ``responses`` (chosen at 0, rejected at 1).
"""

import jax
from jaxtyping import Array, Float

from jax_klrlhf.core import bradley_terry
from jax_klrlhf.core.numerics import Scalar, check_positive
from jax_klrlhf.core.pairwise import margin, score
from jax_klrlhf.core.scores import Scores, second


def _implicit(scores: Scores, kl_coef: Scalar) -> tuple[Array, Array]:
    check_positive("kl_coef", kl_coef)
    each = score(scores)
    return kl_coef * each[..., 0], kl_coef * second(each)


def nca(scores: Scores, *, kl_coef: Scalar) -> Float[Array, "*batch"]:
    r"""NCA on pairs: noise contrast, so that the chosen response's likelihood is kept up.

    .. math:: -\log\sigma(x^w) - \tfrac12 \log\sigma(-x^w) - \tfrac12 \log\sigma(-x^l)

    Law: :math:`x = \log 2W`. Source: arXiv 2402.05369, eq. 11, for K = 2.
    """
    chosen, rejected = _implicit(scores, kl_coef)
    both = bradley_terry.nll(-chosen) + bradley_terry.nll(-rejected)
    return bradley_terry.nll(chosen) + both / 2


def bco(scores: Scores, *, kl_coef: Scalar, shift: Scalar) -> Float[Array, "*batch"]:
    r"""BCO: a classifier of winners and losers with the implicit reward as its logit.

    .. math:: -\log\sigma(x^w - \delta) - \log\sigma(\delta - x^l)

    ``shift`` is delta, the mean implicit reward of the batches so far. Law:
    :math:`x = \delta + \log\frac{W}{1 - W}`. Source: arXiv 2404.04656, without its density ratio of
    the prompts.
    """
    chosen, rejected = _implicit(scores, kl_coef)
    return bradley_terry.nll(chosen - shift) + bradley_terry.nll(shift - rejected)


def sppo(scores: Scores, *, kl_coef: Scalar) -> Float[Array, "*batch"]:
    r"""SPPO with hard labels: the log-ratio regressed on the win rate against the reference.

    .. math:: \Big(u^w - \frac{1}{2\eta}\Big)^2 + \Big(u^l + \frac{1}{2\eta}\Big)^2, \qquad
        u = \log\frac{\pi}{\pi_0}

    eta is the inverse of theirs. Law: :math:`\pi_0 e^{(W - 1/2)/\eta}`: a step of self-play where
    pi0 is the policy that drew. Source: arXiv 2405.00675, eq. 4.7.
    """
    check_positive("kl_coef", kl_coef)
    each = score(scores)
    half = 1 / (2 * kl_coef)
    return (each[..., 0] - half) ** 2 + (second(each) + half) ** 2


def kto(
    scores: Scores,
    *,
    kl_coef: Scalar,
    shift: Scalar,
    desirable: Scalar = 1.0,
    undesirable: Scalar = 1.0,
) -> Float[Array, "*batch"]:
    r"""KTO on both responses of a pair: each valued against a point of reference.

    .. math:: \lambda_w (1 - \sigma(x^w - \eta z)) + \lambda_l (1 - \sigma(\eta z - x^l))

    ``shift`` is z, the KL to pi0 in nats, which the paper estimates from mismatched pairs of the
    batch and floors at 0: a number to this loss, as its gradient is stopped there. At 0 and equal
    weights it is :func:`apo_zero`. Law: none; linear in sigma(x), so that at the population every x
    goes to an edge. Source: arXiv 2402.01306, compared with TRL's code, which calls it eq. 7.
    """
    chosen, rejected = _implicit(scores, kl_coef)
    at = kl_coef * shift
    return desirable * jax.nn.sigmoid(at - chosen) + undesirable * jax.nn.sigmoid(rejected - at)


def apo_zero(scores: Scores, *, kl_coef: Scalar) -> Float[Array, "*batch"]:
    r"""APO-zero: the winner up and the loser down, each from where it is. Law: none.

    .. math:: 1 - \sigma(x^w) + \sigma(x^l)

    Linear in sigma(x), so that at the population every x goes to an edge. Source: arXiv 2408.06266.
    """
    chosen, rejected = _implicit(scores, kl_coef)
    return jax.nn.sigmoid(-chosen) + jax.nn.sigmoid(rejected)


def apo_down(scores: Scores, *, kl_coef: Scalar) -> Float[Array, "*batch"]:
    r"""APO-down: both down, the loser further, for data worse than the policy. Law: none.

    .. math:: \sigma(x^w) + 1 - \sigma(x^w - x^l)

    Source: arXiv 2408.06266.
    """
    chosen, _ = _implicit(scores, kl_coef)
    return jax.nn.sigmoid(chosen) + jax.nn.sigmoid(-margin(score(scores), kl_coef=kl_coef))
