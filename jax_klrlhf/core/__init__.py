"""The mathematics of KL-regularized preference learning, as pure functions on arrays.

The last axis is what is chosen among (actions or responses); leading axes are free. Arrays are
positional, hyper-parameters keyword-only, keys first. Nothing here is jitted, everything works
under jit, vmap, grad and on a mesh. Only jax is imported.
"""

from jax_klrlhf.core import (
    bradley_terry,
    divergence,
    gibbs,
    numerics,
    objectives,
    sequence,
)

__all__ = [
    "bradley_terry",
    "divergence",
    "gibbs",
    "numerics",
    "objectives",
    "sequence",
]
