"""What training uses where nothing is said: one place for the programs and for the plan of them.

Nothing heavy is imported here: the configurations of the commands take their defaults from it.
"""

from typing import Any

REMAT = "full"
"""What the backward pass computes again: every block, from its input.

The least memory; on a CPU no slower than keeping activations, which are slow to write there.
"""
REMAT_TRIED = ("full", "dots_with_no_batch_dims_saveable")
"""What a search compares: the least memory, and products of matrices kept, which a step then does
not compute again."""
LOGITS = 2**25
"""Float32 logits that exist at one time on each part of the batch, at most: 128 MiB."""


def chunk(vocab_size: int, *, parts: int) -> int:
    """Tokens projected on the vocabulary at one time, over all ``parts`` of a batch.

    A power of two of tokens on each part, as :data:`LOGITS` holds, and no more than
    :data:`scoring.CHUNK`.

    >>> chunk(128_256, parts=64)
    16384
    """
    from jax_klrlhf.models import scoring

    most = max(1, LOGITS // vocab_size)
    return parts * min(scoring.CHUNK, 2 ** (most.bit_length() - 1))


def base_dtype(compute_dtype: Any) -> Any:
    """In which an adapter's frozen base lies in memory: that of the computation.

    A step casts every parameter to it anyway, so float32 would cost memory and change nothing.
    """
    return compute_dtype
