r"""Rewards of sets of responses: pass@k, coverage, diversity (family S).

A *set reward* F(A) is a number for a group A of K responses: the best of them, how many different
answers there are. For K independent draws of pi its gradient is a policy gradient in which every
response carries a share of F,

.. math:: \nabla E\,F(A) = E \sum_i w_i \nabla \log \pi(a_i), \qquad
          w_i \in \{F(A),\; F(A) - F(A \setminus i),\; F(A) - F(A_{<i})\}

all three unbiased (:func:`full`, :func:`leave_one_out`, :func:`to_go`) [derived; enumerated in a
test], since what each takes off does not depend on response i. The *greedy marginal*
:math:`F(A_{\le i}) - F(A_{<i})` alone, without what the later responses add, is **not**: on
coverage weighted by reward its direction can be opposite to the gradient. Sources: SubPO (arXiv
2307.13372), pass@k training (2505.15201), DARLING (2509.02534).

A set reward is ``value(where) -> [*batch]``: F of the kept subset, a function of a mask alone,
whose other data are bound: ``functools.partial(maximum, reward)``.

Axes: ``batch`` (free: prompts), ``responses`` (K, last); ``classes`` are equal for equal answers.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

Value = Callable[[Bool[Array, "*batch responses"]], Float[Array, "*batch"]]
"""``value(where [*batch, responses]) -> [*batch]``: the reward of the kept subset."""


def full(value: Value, where: Bool[Array, "*batch responses"]) -> Float[Array, "*batch responses"]:
    """Every response's weight is F(A): unbiased, and of the largest variance of the three."""
    return jnp.where(where, value(where)[..., None], 0)


def leave_one_out(
    value: Value, where: Bool[Array, "*batch responses"]
) -> Float[Array, "*batch responses"]:
    """F(A) - F(A without i): what response i adds to all the others. The default of this family.

    >>> import functools
    >>> best = functools.partial(maximum, jnp.array([1.0, 3.0, 2.0]))
    >>> leave_one_out(best, jnp.ones(3, bool)).tolist()
    [0.0, 1.0, 0.0]
    """
    return _less(value, where, lambda index, at: index != at)


def to_go(value: Value, where: Bool[Array, "*batch responses"]) -> Float[Array, "*batch responses"]:
    """F(A) - F(A before i): what response i and the later ones add, in the order of the axis.

    Submodular policy optimization's return (arXiv 2307.13372, theorem 2): the greedy marginal gains
    from i on, summed.

    >>> import functools
    >>> best = functools.partial(maximum, jnp.array([1.0, 3.0, 2.0]))
    >>> to_go(best, jnp.ones(3, bool)).tolist()
    [3.0, 2.0, 0.0]
    """
    return _less(value, where, lambda index, at: index < at)


def greedy_marginal(
    value: Value, where: Bool[Array, "*batch responses"]
) -> Float[Array, "*batch responses"]:
    """F(A up to i) - F(A before i): what i adds to the earlier ones, and nothing after.

    **Biased as a weight** (see the head of this file): for display, and as the control of the
    tests. Their sum is F(A) - F(empty set).
    """
    later = _less(value, where, lambda index, at: index < at)
    after = _less(value, where, lambda index, at: index <= at)
    return later - after


def maximum(
    reward: Float[Array, "*batch responses"], where: Bool[Array, "*batch responses"]
) -> Float[Array, "*batch"]:
    """The best reward kept: pass@K for a reward of 0 and 1, the best-of-K objective. Empty: 0.

    >>> float(maximum(jnp.array([1.0, 3.0]), jnp.array([True, False])))
    1.0
    """
    best = jnp.max(jnp.where(where, reward, -jnp.inf), -1)
    return jnp.where(jnp.any(where, -1), best, 0)


def coverage(
    classes: Shaped[Array, "*batch responses"], where: Bool[Array, "*batch responses"]
) -> Float[Array, "*batch"]:
    """How many different classes are kept.

    >>> float(coverage(jnp.array([4, 4, 7]), jnp.array([True, True, True])))
    2.0
    """
    return jnp.sum(_first_of_class(classes, where), -1, dtype=jnp.result_type(float))


def weighted_coverage(
    reward: Float[Array, "*batch responses"],
    classes: Shaped[Array, "*batch responses"],
    where: Bool[Array, "*batch responses"],
) -> Float[Array, "*batch"]:
    """The best reward of each class kept, summed: many good answers that differ. For reward >= 0.

    >>> reward, classes = jnp.array([1.0, 3.0, 2.0]), jnp.array([0, 0, 1])
    >>> float(weighted_coverage(reward, classes, jnp.ones(3, bool)))
    5.0
    """
    same = classes[..., :, None] == classes[..., None, :]
    both = same & where[..., None, :]
    best = jnp.max(jnp.where(both, reward[..., None, :], -jnp.inf), -1)
    return jnp.sum(jnp.where(_first_of_class(classes, where), best, 0), -1)


def mmd(
    kernel: Float[Array, "*batch responses responses"],
    to_exemplars: Float[Array, "*batch responses"],
    where: Bool[Array, "*batch responses"],
) -> Float[Array, "*batch"]:
    r"""Minus the squared maximum mean discrepancy to exemplars, up to the exemplars' own term.

    .. math:: 2\, \mathrm{mean}_i\, k(a_i, E) - \mathrm{mean}_{i \ne j}\, k(a_i, a_j)

    A U-statistic of the policy's law (DRAGON's kind of reward, arXiv 2504.15217), so that
    :func:`leave_one_out` weights are unbiased for its influence function. ``to_exemplars`` is each
    response's mean kernel to the exemplars. Of one response the second term is 0.

    >>> float(mmd(jnp.eye(2), jnp.array([0.5, 0.5]), jnp.ones(2, bool)))
    1.0
    """
    count = jnp.sum(where, -1).astype(kernel.dtype)
    near = jnp.sum(jnp.where(where, to_exemplars, 0), -1) / jnp.maximum(count, 1)
    off = ~jnp.eye(kernel.shape[-1], dtype=bool)
    both = where[..., :, None] & where[..., None, :] & jnp.broadcast_to(off, kernel.shape)
    pairs = jnp.maximum(count * (count - 1), 1)
    return 2 * near - jnp.sum(jnp.where(both, kernel, 0), (-2, -1)) / pairs


def different_share(
    classes: Shaped[Array, "*batch responses"],
    *,
    where: Bool[Array, "*batch responses"] | None = None,
) -> Float[Array, "*batch responses"]:
    r"""Share of the *other* kept responses that are of another class: DARLING's diversity.

    DARLING multiplies the reward by it (arXiv 2509.02534). In expectation over the others the
    product is :math:`r(a)(1 - \pi(\text{class of } a))`, so with a KL term the fixed point solves
    :math:`\pi = \pi_0 e^{r (1 - \pi_C)/\eta}/Z`: a game between responses, *not* the gradient of an
    expected set reward (that is :func:`weighted_coverage` with :func:`leave_one_out`). Its reward
    must not be negative: below 0 it pays for sameness. Entropy is bought with reward.

    >>> different_share(jnp.array([0, 0, 1])).tolist()
    [0.5, 0.5, 1.0]
    """
    keep = jnp.ones(classes.shape, bool) if where is None else where
    other = (classes[..., :, None] != classes[..., None, :]) & keep[..., None, :]
    count = jnp.sum(keep, -1, keepdims=True) - 1
    share = jnp.sum(other, -1) / jnp.maximum(count, 1)
    return jnp.where(keep & (count > 0), share, 0).astype(jnp.result_type(float))


def _less(
    value: Value,
    where: Bool[Array, "*batch responses"],
    kept: Callable[[Array, Array], Array],
) -> Float[Array, "*batch responses"]:
    """F(A) less F of the subset that ``kept(index, i)`` leaves of A, for each i."""
    index = jnp.arange(where.shape[-1])

    def without(at: Array) -> Array:
        rest = jnp.broadcast_to(kept(index, at), where.shape)
        return value(where & rest)

    left = jax.vmap(without, out_axes=-1)(index)
    return jnp.where(where, value(where)[..., None] - left, 0)


def _first_of_class(classes: Array, where: Array) -> Array:
    """True at the first kept response of each class."""
    same = (classes[..., :, None] == classes[..., None, :]) & where[..., None, :]
    earlier = jnp.tril(jnp.ones(same.shape[-2:], bool), -1)
    return where & ~jnp.any(same & jnp.broadcast_to(earlier, same.shape), -1)
