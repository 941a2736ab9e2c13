r"""From logits to a token: warping the law and drawing from it.

A warp is a temperature and a threshold. Top-k, top-p (nucleus, arXiv 1904.09751, section 3.1) and
min-p (arXiv 2407.01082, eq. 2) all keep the tokens at or above some logit, so each is found by
bisection on that threshold: passes of elementwise work in place of a sort of the vocabulary, which
is what both a CPU and a TPU do badly. Tokens tied at the threshold are all kept.

Drawing inverts the cumulative law in two levels, a block of the vocabulary and a token within it:
two uniform numbers per row in place of a Gumbel variable for each entry of the vocabulary.

Axes: ``batch`` (free leading axes), ``vocab``.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, UInt32


class Warp(NamedTuple):
    """How the sampling law departs from the model's. None is no departure.

    Applied in the order of the fields, which is that of transformers: each acts on what the
    previous left.
    """

    temperature: ArrayLike | None = None
    """Logits are divided by it; positive (greedy decoding is no warp: see :func:`argmax`)."""
    top_k: ArrayLike | None = None
    """Keep the `top_k` likeliest tokens."""
    top_p: ArrayLike | None = None
    """Keep the fewest likeliest tokens whose probabilities sum to at least `top_p`."""
    min_p: ArrayLike | None = None
    """Keep tokens at least `min_p` times as likely as the likeliest."""


def warp(logits: Float[Array, "*batch vocab"], by: Warp) -> Float[Array, "*batch vocab"]:
    """Warped logits, unnormalized, ``-inf`` at the tokens left out."""
    if by.temperature is not None:
        logits = logits / jnp.asarray(by.temperature, logits.dtype)
    if by.top_k is not None:
        wanted = jnp.asarray(by.top_k, jnp.int32)
        logits = _keep(logits, lambda kept: kept.sum(-1, dtype=jnp.int32) >= wanted)
    if by.top_p is not None:
        law = jax.nn.softmax(logits)
        wanted = jnp.asarray(by.top_p, logits.dtype)
        logits = _keep(logits, lambda kept: jnp.where(kept, law, 0).sum(-1) >= wanted)
    if by.min_p is not None:
        least = jnp.max(logits, -1, keepdims=True) + jnp.log(jnp.asarray(by.min_p, logits.dtype))
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return logits


def argmax(logits: Float[Array, "*batch vocab"]) -> Int[Array, "*batch"]:
    """The likeliest token, the first of equals.

    Two plain reductions: XLA's own argmax carries value and index through one reduction, which its
    CPU compiler does not vectorize.
    """
    best = jnp.max(logits, -1, keepdims=True)
    entry = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    return jnp.min(jnp.where(logits == best, entry, logits.shape[-1] - 1), -1)


def draw(
    uniform: Float[Array, "*batch 2"], logits: Float[Array, "*batch vocab"]
) -> tuple[Int[Array, "*batch"], Float[Array, "*batch"]]:
    """A token by inversion of the cumulative law, and the law's log-normalizer.

    Args:
        uniform: two independent numbers in [0, 1) per row: one picks the block, one the token in
            it. A single float32 would resolve a flat law over 128k tokens to 1 % only.
        logits: unnormalized; ``-inf`` is never drawn.
    """
    uniform = uniform.astype(logits.dtype)
    vocab = logits.shape[-1]
    width = _block_width(vocab)
    blocks = -(-vocab // width)
    pad = [(0, 0)] * (logits.ndim - 1) + [(0, blocks * width - vocab)]
    logits = jnp.pad(logits, pad, constant_values=-jnp.inf)
    best = jnp.max(logits, -1)
    shape = (*logits.shape[:-1], blocks, width)
    # Exponentials of whole rows: taken block by block they cost XLA's CPU compiler twice as much.
    mass = jnp.exp(logits - best[..., None]).reshape(shape).sum(-1)
    block = _invert(uniform[..., 0], mass)
    chosen = jnp.take_along_axis(logits.reshape(shape), block[..., None, None], axis=-2)[..., 0, :]
    within = _invert(uniform[..., 1], jnp.exp(chosen - best[..., None]))
    return block * width + within, jnp.log(mass.sum(-1)) + best


def _invert(uniform: Float[Array, "*batch"], weight: Float[Array, "*batch n"]):
    """The first index whose cumulative weight exceeds ``uniform`` of the whole.

    A weight of zero is never the first to exceed anything. ``uniform * total`` stays below the
    total because the largest float32 below 1 that is drawn is ``1 - 2**-23``.
    """
    cumulative = jnp.cumsum(weight, axis=-1)
    passed = cumulative <= (uniform * cumulative[..., -1])[..., None]
    return passed.sum(-1, dtype=jnp.int32)


def _block_width(vocab: int) -> int:
    """The divisor of `vocab` nearest its square root; any width near it where none is close."""
    root = max(1, round(vocab**0.5))
    widths = [width for width in range(1, vocab + 1) if vocab % width == 0]
    best = min(widths, key=lambda width: max(width / root, root / width))
    return best if max(best / root, root / best) <= 8 else root


def _keep(logits: Float[Array, "*batch vocab"], enough) -> Float[Array, "*batch vocab"]:
    """Keep the logits at or above the highest threshold at which ``enough(kept)`` holds.

    Bisection on the bits of the float: exact after as many steps as a float32 has bits.
    """
    bits = _ordered_bits(logits)

    def halve(_, bounds):
        low, high = bounds  # enough at low, not enough above high
        middle = low + (high - low) // 2 + (high - low) % 2
        there = enough(bits >= middle[..., None])
        return jnp.where(there, middle, low), jnp.where(there, high, middle - 1)

    low = jnp.min(bits, -1)
    low, _ = jax.lax.fori_loop(0, 33, halve, (low, jnp.max(bits, -1)))
    return jnp.where(bits >= low[..., None], logits, -jnp.inf)


def _ordered_bits(value: Float[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Unsigned integers in the order of the float32 values."""
    value = jnp.where(value == 0, 0, value)  # -0.0 equals 0.0 but has other bits
    bits = jax.lax.bitcast_convert_type(value.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    # Negative floats order backwards among themselves and below the positive ones.
    return jnp.where(bits >= sign, ~bits, bits | sign)
