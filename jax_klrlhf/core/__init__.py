"""The mathematics of KL-regularized preference learning, as pure functions on arrays.

The last axis is what is chosen among (actions or responses); leading axes are free. Arrays are
positional, hyper-parameters keyword-only, keys first. Nothing here is jitted, everything works
under jit, vmap, grad and on a mesh. Only jax is imported.
"""

from jax_klrlhf.core import (
    bounds,
    bradley_terry,
    choices,
    divergence,
    ellipsoid,
    enhancer,
    estimation,
    gibbs,
    linalg,
    numerics,
    objectives,
    pairs,
    records,
    rejection,
    sequence,
    targets,
    uncertainty,
)

__all__ = [
    "bounds",
    "bradley_terry",
    "choices",
    "divergence",
    "ellipsoid",
    "enhancer",
    "estimation",
    "gibbs",
    "linalg",
    "numerics",
    "objectives",
    "pairs",
    "rejection",
    "sequence",
    "targets",
    "uncertainty",
]

records.document(__name__)
