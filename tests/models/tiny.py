"""Random parameters of a tiny decoder, drawn in NumPy: nothing to compile, no norm at one."""

import jax
import jax.numpy as jnp
import numpy as np

from jax_klrlhf.models.config import ModelConfig
from jax_klrlhf.models.transformer import language_model


def params(config: ModelConfig, seed: int = 0):
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        centre = float(path[-1].key == "scale" and config.norm != "rms_offset")
        return jnp.asarray(centre + 0.3 * rng.normal(size=leaf.shape), leaf.dtype)

    shapes = jax.eval_shape(language_model(config).init, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, shapes)
