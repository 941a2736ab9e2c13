r"""How uncertain data leave the reward of a policy: norms of its features, from nu.

Preferences identify only differences of rewards, so uncertainty is measured from a reference
vector ``nu``: of all contexts ``[dim]``, or of each ``[contexts, dim]``. Usually it is
:func:`mean_features` of pi0. Source: Xiong et al. (arXiv 2312.11456), section 3.

Axes: ``contexts``, ``actions``, ``dim``.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jax_klrlhf.core import ellipsoid, numerics
from jax_klrlhf.core.ellipsoid import Ellipsoid


def mean_features(
    features: Float[Array, "contexts actions dim"],
    log_prob: Float[Array, "contexts actions"],
    *,
    context_prob: Float[Array, " contexts"],
    where: Bool[Array, "contexts actions"] | None = None,
) -> Float[Array, " dim"]:
    """E_{x, a ~ pi} phi(x, a)."""
    keep = numerics.support(log_prob, where)
    prob = jnp.where(keep, jnp.exp(jnp.where(keep, log_prob, 0)), 0)
    kept = jnp.where(keep[..., None], features, 0)
    return jnp.einsum("x,xa,xad->d", context_prob, prob, kept, precision=lax.Precision.HIGHEST)


def expected(
    state: Ellipsoid,
    features: Float[Array, "contexts actions dim"],
    log_prob: Float[Array, "contexts actions"],
    *,
    context_prob: Float[Array, " contexts"],
    nu: Float[Array, "..."],
    where: Bool[Array, "contexts actions"] | None = None,
) -> Float[Array, ""]:
    """||E_{x, a ~ pi} phi(x, a) - E_x nu||_{Sigma^-1}: the norm of the mean."""
    mean = mean_features(features, log_prob, context_prob=context_prob, where=where)
    return ellipsoid.norm(state, mean - context_prob @ of_contexts(nu, features))


def pointwise(
    state: Ellipsoid,
    features: Float[Array, "contexts actions dim"],
    log_prob: Float[Array, "contexts actions"],
    *,
    context_prob: Float[Array, " contexts"],
    nu: Float[Array, "..."],
    where: Bool[Array, "contexts actions"] | None = None,
) -> Float[Array, ""]:
    """E_{x, a ~ pi} ||phi(x, a) - nu||_{Sigma^-1}: the mean of the norm, at least :func:`expected`.

    Times sqrt(n), n the comparisons in Sigma, it is the coverage of pi by the data
    (arXiv 2312.11456, section 4; 2301.11270, theorem 3.2): it tends to a constant where they cover
    pi, and grows like sqrt(n) where they do not.
    """
    keep = numerics.support(log_prob, where)
    shift = features - of_contexts(nu, features)[:, None, :]
    norms = ellipsoid.norm(state, jnp.where(keep[..., None], shift, 0))
    return context_prob @ numerics.expectation(log_prob, norms, where=where)


def of_contexts(
    nu: Float[Array, "..."], features: Float[Array, "contexts actions dim"]
) -> Float[Array, "contexts dim"]:
    """The reference vector of each context.

    ValueError where its shape is neither ``[dim]`` nor ``[contexts, dim]``.
    """
    contexts, _, dim = features.shape
    if nu.shape not in ((dim,), (contexts, dim)):
        raise ValueError(f"nu has shape {nu.shape}, expected {(dim,)} or {(contexts, dim)}")
    return jnp.broadcast_to(nu if nu.ndim == 2 else nu[None], (contexts, dim))
