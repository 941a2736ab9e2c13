"""What the bandit tests share: an awkward small problem."""

import jax
import jax.numpy as jnp

from jax_klrlhf import bandit


def awkward_problem() -> bandit.Problem:
    """Unequal contexts, one action masked in the first, all but one in the last; NaN features."""
    key_features, key_ref = jax.random.split(jax.random.key(3))
    features = jax.random.normal(key_features, (3, 4, 3))
    features = features / jnp.linalg.norm(features, axis=-1, keepdims=True)
    where = jnp.ones((3, 4), bool).at[0, 1].set(False).at[2, :3].set(False)
    features = features.at[0, 1].set(jnp.nan)
    logits = jnp.where(where, jax.random.normal(key_ref, where.shape), -jnp.inf)
    return bandit.from_arrays(
        features,
        jnp.array([1.0, -0.5, 0.5]),
        kl_coef=0.5,
        ref_log_prob=jax.nn.log_softmax(logits),
        context_prob=jnp.array([0.5, 0.3, 0.2]),
        where=where,
    )
