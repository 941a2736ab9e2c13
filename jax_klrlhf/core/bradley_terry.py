r"""Bradley-Terry: preferences from reward differences.

.. math:: P(a^1 \succ a^2 \mid x) = \sigma\big(r(x, a^1) - r(x, a^2)\big)

``margin`` is that difference of rewards, in nats of the logit. Bradley and Terry (1952);
Xiong et al. (arXiv 2312.11456), Definition 1.

Axes: ``batch`` (free axes, one entry per comparison).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from jax_klrlhf.core.numerics import Scalar


def log_likelihood(margin: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    r"""Log-probability that the first is preferred, :math:`\log \sigma(m)`, in nats.

    Finite with a finite gradient at any finite margin, where ``log(sigmoid(m))`` is not.

    >>> log_likelihood(jnp.array([0.0, -200.0])).tolist()  # log(1/2), and about the margin itself
    [-0.693..., -200.0]
    """
    return -jnp.logaddexp(-margin, 0.0)


def nll(margin: Float[Array, "*batch"], *, label: Scalar = 1.0) -> Float[Array, "*batch"]:
    r"""Negative log-likelihood of a label, hard or soft, in nats.

    .. math:: -y \log \sigma(m) - (1 - y) \log \sigma(-m)

    ``label`` is P(first preferred), in [0, 1]: a scalar or an array like ``margin``. Label
    smoothing by eps is ``label = 1 - eps``. The minimum over the margin is at ``logit(label)``.

    >>> float(nll(jnp.array(0.0)))  # log 2: an undecided model
    0.693...
    >>> float(nll(jnp.log(3.0), label=0.75))  # the entropy of (3/4, 1/4): log 4 - (3/4) log 3
    0.562...
    """
    # Both terms in full: softplus(-m) + (1 - y) m is shorter and cancels at large margins.
    return -(label * log_likelihood(margin) + (1 - label) * log_likelihood(-margin))


def curvature(margin: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    r"""Second derivative of :func:`nll`, :math:`\sigma'(m) = \sigma(m)\,\sigma(-m)`.

    Even, decreasing in ``|m|``; at the largest margin B that occurs it is the constant
    :math:`\gamma = 1/(2 + e^{-B} + e^{B})` of arXiv 2312.11456. With ``||phi|| <= 1`` and
    ``||theta|| <= B'`` that largest margin is ``2 B'``.

    >>> float(curvature(jnp.array(0.0)))
    0.25
    """
    return jax.nn.sigmoid(margin) * jax.nn.sigmoid(-margin)


def sample(key: Key[Array, ""], margin: Float[Array, "*batch"]) -> Bool[Array, "*batch"]:
    """Draw preferences, independently for each margin. True: the first is preferred.

    >>> sample(jax.random.key(0), jnp.array([-200.0, 200.0])).tolist()
    [False, True]
    """
    return jax.random.bernoulli(key, jax.nn.sigmoid(margin))
