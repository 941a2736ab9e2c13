r"""Preference models: what a label means, given rewards. Values that fits, losses and worlds take.

A model of pairs says how probable each outcome is at a margin m, the first's reward less the
second's; a label is the number of an outcome: 1 where the first is preferred, 0 where the second
is, 1/2 for a tie. A label between two outcomes stands for a mixture of them.

======================= ================================================== ===================
model                   log-probability of an outcome                      source
======================= ================================================== ===================
:data:`bradley_terry`   log sigma(m), log sigma(-m)                        Bradley, Terry 1952
:func:`rao_kupper`      log sigma(m - t), tie, log sigma(-m - t)           Rao, Kupper 1967
:func:`davidson`        log softmax of (m/2, log v, -m/2)                  Davidson 1970
:func:`flipped`         a model's, with its outcomes swapped at a rate     arXiv 2403.00409
:func:`matrix`          Bradley-Terry at the margin logit P(x, a, a')      any law of two
:data:`plackett_luce`   of K responses in an order, not of pairs           Plackett 1975
======================= ================================================== ===================

A new model of pairs is one function of its parameters and a margin (see :func:`davidson`).

Axes: ``batch`` (free axes, one entry per comparison), ``responses``.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Key, Shaped

from jax_klrlhf.core import bradley_terry as _bradley_terry
from jax_klrlhf.core.numerics import Scalar, check_between, check_positive

Outcomes = tuple[Array, ...]
"""One array ``[*batch]`` per outcome."""


def reward_margin(
    parameters: Any,
    reward: Float[Array, "contexts actions"],
    context: Int[Array, "*batch"],
    first: Int[Array, "*batch"],
    second: Int[Array, "*batch"],
) -> Float[Array, "*batch"]:
    """The first's reward less the second's."""
    del parameters
    return reward[context, first] - reward[context, second]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["parameters"],
    meta_fields=["log_prob", "outcomes", "concave", "merges", "margin", "per_context"],
)
@dataclasses.dataclass(frozen=True)
class PreferenceModel:
    """A law of labels of pairs: functions of the model's parameters, and the parameters.

    A pytree whose leaves are the parameters, so that a problem with it goes through ``jit`` and
    ``vmap``; functions are static, so hand in module-level ones.
    """

    log_prob: Callable[[Any, Array], Outcomes]
    """``log_prob(parameters, margin [*batch])``: of each outcome, in nats."""
    outcomes: tuple[float, ...] = (1.0, 0.0)
    """The label of each outcome, from 1 (the first is preferred) down to 0, symmetric about 1/2."""
    parameters: Any = ()
    concave: bool = True
    """Whether log_prob is concave in the margin, with :func:`curvature` that changes by no more
    than a factor exp of the margin's change: then Newton needs no line search."""
    merges: bool = True
    """Whether labels of one pair may be averaged: up to what does not depend on the margin, the
    likelihood is linear in the label. With two outcomes it is. To Davidson a win and a loss say
    what two ties say; to Rao and Kupper they do not."""
    margin: Callable[..., Array] = reward_margin
    """``margin(parameters, reward, context, first, second)`` of a comparison."""
    per_context: bool = False
    """Whether the parameters' first axis is the contexts."""

    @property
    def logistic(self) -> bool:
        """Whether the likelihood is Bradley-Terry's, for which there are shorter formulas."""
        return self.log_prob is _log_bradley_terry

    def of(self, margin: Float[Array, "*batch"]) -> Outcomes:
        """Log-probability of each outcome."""
        return self.log_prob(self.parameters, margin)

    def nll(self, margin: Float[Array, "*batch"], *, label: Scalar = 1.0) -> Float[Array, "*batch"]:
        """Negative log-likelihood of a label (a scalar, or like ``margin``), in nats."""
        terms = [
            weight * each
            for weight, each in zip(_weights(label, self.outcomes), self.of(margin), strict=True)
        ]
        return -functools.reduce(jnp.add, terms)

    def mean(self, margin: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        """Expected label: P(first preferred), plus half the probability of a tie."""
        if self.logistic:
            return jax.nn.sigmoid(margin)  # rounded once
        each = self.of(margin)
        return functools.reduce(
            jnp.add, [o * jnp.exp(x) for o, x in zip(self.outcomes, each, strict=True) if o]
        )

    def sample(
        self, key: Key[Array, ""], margin: Float[Array, "*batch"], *, flip_rate: Scalar = 0.0
    ) -> Float[Array, "*batch"]:
        """Draw labels, independently; then each is taken for its opposite at ``flip_rate``."""
        if len(self.outcomes) == 2:
            won = jax.random.bernoulli(key, flip_rate + (1 - 2 * flip_rate) * self.mean(margin))
            return won.astype(margin.dtype)
        prob = jnp.exp(jnp.stack(self.of(margin), -1))
        prob = prob + flip_rate * (prob[..., ::-1] - prob)
        uniform = jax.random.uniform(key, margin.shape, margin.dtype)
        beyond = jnp.sum(uniform[..., None] >= jnp.cumsum(prob[..., :-1], -1), -1)
        return jnp.asarray(self.outcomes, margin.dtype)[beyond]

    def slope(self, margin: Float[Array, "*batch"], label: Shaped[Array, "..."]) -> Array:
        """First derivative of :meth:`nll` in the margin."""
        return _derivative(lambda m: self.nll(m, label=label), margin)

    def curvature(self, margin: Float[Array, "*batch"], label: Shaped[Array, "..."]) -> Array:
        """Second derivative of :meth:`nll` in the margin."""
        return _derivative(lambda m: self.slope(m, label), margin)

    def information(self, margin: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        """Fisher information of the margin: what curvature is in expectation over labels."""
        each, slopes = jax.jvp(self.of, (margin,), (jnp.ones_like(margin),))
        return functools.reduce(
            jnp.add, [jnp.exp(x) * s**2 for x, s in zip(each, slopes, strict=True)]
        )

    def at_contexts(self, index: Any) -> "PreferenceModel":
        """The model on some of the contexts."""
        if not self.per_context:
            return self
        kept = jax.tree.map(lambda x: x[index], self.parameters)
        return dataclasses.replace(self, parameters=kept)


def _derivative(function: Callable[[Array], Array], at: Array) -> Array:
    return jax.jvp(function, (at,), (jnp.ones_like(at),))[1]


def _weights(label: Scalar, outcomes: tuple[float, ...]) -> list[Scalar]:
    """How much of each outcome a label is: linear between neighbours, of sum 1."""
    if len(outcomes) == 2:
        return [label, 1 - label]
    found = []
    for k, here in enumerate(outcomes):
        weight = jnp.ones_like(label)
        if k > 0:
            weight = jnp.minimum(weight, (outcomes[k - 1] - label) / (outcomes[k - 1] - here))
        if k < len(outcomes) - 1:
            weight = jnp.minimum(weight, (label - outcomes[k + 1]) / (here - outcomes[k + 1]))
        found.append(jnp.maximum(weight, 0))
    return found


def _log_bradley_terry(parameters: Any, margin: Array) -> Outcomes:
    del parameters
    return _bradley_terry.log_likelihood(margin), _bradley_terry.log_likelihood(-margin)


bradley_terry = PreferenceModel(_log_bradley_terry)
"""sigma(margin); its functions alone are in :mod:`core.bradley_terry`."""


def _log_rao_kupper(threshold: Array, margin: Array) -> Outcomes:
    threshold = threshold.astype(margin.dtype)
    won, lost = (_bradley_terry.log_likelihood(s * margin - threshold) for s in (1, -1))
    up, down = (_bradley_terry.log_likelihood(threshold + s * margin) for s in (1, -1))
    return won, jnp.log(-jnp.expm1(-2 * threshold)) + up + down, lost


def rao_kupper(threshold: Scalar) -> PreferenceModel:
    """Ties where two rewards are not told apart: each must win by ``threshold`` > 0 nats.

    P(first) = sigma(m - t), P(second) = sigma(-m - t); the rest are ties, (e^t - 1)/(e^t + 1) of
    all at margin 0. Rao and Kupper (1967), with theirs theta = e^t.
    """
    check_positive("threshold", threshold)
    return PreferenceModel(
        _log_rao_kupper, (1.0, 0.5, 0.0), parameters=jnp.asarray(threshold, float), merges=False
    )


def _log_davidson(tie: Array, margin: Array) -> Outcomes:
    level = jnp.broadcast_to(jnp.log(tie.astype(margin.dtype)), margin.shape)
    logits = jnp.stack([margin / 2, level, -margin / 2])
    won, tied, lost = jax.nn.log_softmax(logits, axis=0)
    return won, tied, lost


def davidson(tie: Scalar) -> PreferenceModel:
    """Ties in proportion to the geometric mean: odds e^(m/2) : tie : e^(-m/2), ``tie`` > 0.

    Of decided comparisons P(first) is Bradley-Terry's, whatever ``tie`` is. Davidson (1970).
    """
    check_positive("tie", tie)
    return PreferenceModel(_log_davidson, (1.0, 0.5, 0.0), parameters=jnp.asarray(tie, float))


def _log_flipped(rate: Array, margin: Array) -> Outcomes:
    rate = rate.astype(margin.dtype)
    right, wrong = _log_bradley_terry((), margin)
    kept, swapped = jnp.log1p(-rate), jnp.log(rate)
    return jnp.logaddexp(kept + right, swapped + wrong), jnp.logaddexp(
        kept + wrong, swapped + right
    )


def flipped(rate: Scalar) -> PreferenceModel:
    """Bradley-Terry whose labels are wrong at a known rate: eps + (1 - 2 eps) sigma(m).

    ``rate`` (eps) is in [0, 1/2): one for all, or one for each comparison, that of who labelled
    it. The likelihood of that law, where ``objectives.robust`` is an unbiased estimate of the
    clean loss. Not concave: a fit finds the minimum that descent from its start reaches.
    """
    check_between("flip rate", rate, 0, 0.5, high_open=True)
    return PreferenceModel(_log_flipped, parameters=jnp.asarray(rate, float), concave=False)


def _matrix_margin(
    prefer: Array, reward: Array, context: Array, first: Array, second: Array
) -> Array:
    del reward
    prob = prefer[context, first, second]
    return jnp.log(prob) - jnp.log1p(-prob)


def matrix(prefer: Float[Array, "contexts actions actions"]) -> PreferenceModel:
    """Any law of pairs: ``prefer[x, a, a']`` is P(a preferred to a'), cycles included.

    It may have no reward at all; a fit with it is a Bradley-Terry fit, its nearest reward.
    ValueError (where concrete) if prefer[x, a, a'] + prefer[x, a', a] is not 1.
    """
    if not isinstance(prefer, Tracer):
        total = prefer + jnp.swapaxes(prefer, 1, 2)
        if not bool(jnp.all((abs(total - 1) < 1e-4) & (prefer >= 0))):
            raise ValueError("prefer[x, a, b] + prefer[x, b, a] must be 1, both in [0, 1]")
    return PreferenceModel(
        _log_bradley_terry, parameters=prefer, margin=_matrix_margin, per_context=True
    )


@dataclasses.dataclass(frozen=True)
class Ranking:
    """A law of orders of K responses, ``plackett_luce``; a label is the rank of each, 0 the best.

    Responses of the largest rank may be several: they are below the others and not compared, so
    that ranks (0, 1, 1, 1) are a choice of one among four (conditional logit).
    """

    merges = False
    concave = True
    logistic = False

    def nll(
        self, score: Float[Array, "*batch responses"], *, label: Shaped[Array, "*batch responses"]
    ) -> Float[Array, "*batch"]:
        r"""Negative log-likelihood of ranks, :math:`\sum_k \log\sum_{j \ge k} e^{r_j} - r_k`."""
        below = label[..., None, :] >= label[..., :, None]
        alone = jnp.sum(label[..., None, :] == label[..., :, None], -1) == 1
        rivals = jnp.broadcast_to(score[..., None, :], below.shape)
        # A constant shift of the largest: it cancels, and masked entries reach no gradient.
        top = jax.lax.stop_gradient(jnp.max(jnp.where(below, rivals, -jnp.inf), -1))
        shifted = jnp.where(below, rivals - top[..., None], 0)
        total = jnp.sum(jnp.where(below, jnp.exp(shifted), 0), -1)
        return jnp.sum(jnp.where(alone, jnp.log(total) + top - score, 0), -1)

    def sample(
        self, key: Key[Array, ""], score: Float[Array, "*batch responses"]
    ) -> Int[Array, "*batch responses"]:
        """Draw ranks of all responses: the order of scores with Gumbel noise."""
        noisy = score + jax.random.gumbel(key, score.shape, score.dtype)
        return jnp.argsort(jnp.argsort(-noisy, -1), -1)


plackett_luce = Ranking()
"""P(order) = prod_k e^(r_k) / sum_{j >= k} e^(r_j); with two responses, Bradley-Terry."""

Link = PreferenceModel | Ranking
"""What :func:`core.estimation.fit` takes."""
