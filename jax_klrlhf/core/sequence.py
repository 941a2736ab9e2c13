"""Padded sequences and the log-probability of a response.

Rows are padded on the right and carry their lengths. A mask comes from lengths, never from
``ids != pad``: where the pad token equals the end token, the latter drops the end from the loss.

Axes: ``batch`` (free leading axes), ``length`` (token positions).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class Ragged(NamedTuple):
    """Token rows of unequal length, padded on the right.

    Prompts are ``ids [prompts, P]``; the K responses to each prompt are ``ids [prompts, K, C]``.
    """

    ids: Int[Array, "*batch length"]
    lengths: Int[Array, "*batch"]

    @property
    def mask(self) -> Bool[Array, "*batch length"]:
        """True at the true tokens of each row."""
        return jnp.arange(self.ids.shape[-1]) < self.lengths[..., None]
