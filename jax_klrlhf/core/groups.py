r"""Weights of groups or tasks in a training loss: the least common gradient.

The worst group's (group DRO, arXiv 1911.08731) are :func:`core.saddle.simplex_step`'s.

Axes: ``groups`` (or tasks), ``dim`` (of the shared parameters, or of the head alone).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_klrlhf.core import simplex as simplices


def min_norm(gradients: Float[Array, "groups dim"]) -> Float[Array, " groups"]:
    r"""Weights of the shortest convex combination of the tasks' gradients.

    Its direction improves every task, and it is 0 exactly at a Pareto-stationary point, *any* of
    them: started at a pooled fit it may not move. Source: MGDA (Désidéri, 2012), as MORE uses it on
    a reward model's head (arXiv 2312.07401).

    >>> [round(float(w), 3) for w in min_norm(jnp.array([[2.0, 0.0], [0.0, 1.0]]))]
    [0.2, 0.8]
    """
    gram = jnp.matmul(gradients, gradients.T, precision=jax.lax.Precision.HIGHEST)
    return simplices.least_square(gram)
