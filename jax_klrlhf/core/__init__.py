"""The mathematics of KL-regularized preference learning, as pure functions on arrays.

The last axis is what is chosen among (actions or responses); leading axes are free. Arrays are
positional, hyper-parameters keyword-only, keys first. Nothing here is jitted, everything works
under jit, vmap, grad and on a mesh. Only jax is imported.
"""

from jax_klrlhf.core import (
    aggregate,
    bounds,
    bradley_terry,
    choices,
    divergence,
    diversity,
    ellipsoid,
    enhancer,
    estimation,
    gibbs,
    groups,
    labels,
    linalg,
    links,
    measure,
    mixture,
    numerics,
    objectives,
    pairs,
    posterior,
    records,
    rejection,
    reshape,
    saddle,
    select,
    sequence,
    simplex,
    targets,
    uncertainty,
    welfare,
)

__all__ = [
    "aggregate",
    "bounds",
    "bradley_terry",
    "choices",
    "divergence",
    "diversity",
    "ellipsoid",
    "enhancer",
    "estimation",
    "gibbs",
    "groups",
    "labels",
    "linalg",
    "links",
    "measure",
    "mixture",
    "numerics",
    "objectives",
    "pairs",
    "posterior",
    "rejection",
    "reshape",
    "saddle",
    "select",
    "sequence",
    "simplex",
    "targets",
    "uncertainty",
    "welfare",
]

records.document(__name__)
