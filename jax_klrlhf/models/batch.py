"""A batch, from the loaders to the loss: a prompt once and K responses to it, padded or packed.

NumPy arrays on the host, device arrays in a step. A field that nobody has filled in, or that a task
does not read, is None.

Axes: ``B`` rows (prompts), ``K`` responses to a prompt, ``P`` prompt and ``C`` response positions.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int

from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models import packed as packing
from jax_klrlhf.models.packed import Packed

Values = Array | np.ndarray


class Batch(NamedTuple):
    """Rows of a batch; every array's first axis is ``B``."""

    prompts: Ragged
    """ids ``[B, P]``."""
    responses: Ragged
    """ids ``[B, K, C]``, best first (of a preference, chosen at index 0 and rejected at 1); a row
    with fewer responses has length 0 for the others."""
    weight: Float[Values, " B"]
    """Weight of each row in the loss; 0 for a row that only fills the batch."""
    label: Float[Values, " B"] | None = None
    """Probability that the first response is preferred to the second; None is 1."""
    ref_log_prob: Float[Values, "B K"] | None = None
    """Log-probability of the responses under pi0 (nats), where it was computed before."""
    scores: Float[Values, "B K"] | None = None
    """How good each response was said to be, higher is better; a loaded pair without scores has 1
    and 0."""
    row: Int[Values, " B"] | None = None
    """Row number in the data set, for caches; a fill row has that of another."""


class PackedBatch(NamedTuple):
    """Rows of a batch in streams without padding; fields as in :class:`Batch`.

    Rows are in the order of :func:`models.packed.rows`, absent ones (weight 0) counted. A model
    without ``pack`` cannot score it.
    """

    packed: Packed
    weight: Float[Values, " B"]
    label: Float[Values, " B"] | None = None
    ref_log_prob: Float[Values, "B K"] | None = None
    scores: Float[Values, "B K"] | None = None
    row: Int[Values, " B"] | None = None

    @property
    def prompts(self) -> Ragged:
        """ids ``[B, P]``, P of the largest rectangle."""
        return packing.padded(self.packed, self.packed.prompts)

    @property
    def responses(self) -> Ragged:
        """ids ``[B, K, C]``, C of the largest rectangle."""
        return packing.padded(self.packed, self.packed.responses)
