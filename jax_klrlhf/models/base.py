"""What the rest of the library asks of a language model: six pure functions.

A model is a :class:`LanguageModel`: functions of ``(params, arrays)`` and nothing else. Scoring,
sampling and training are written on these six, so a Flax module, an Equinox module or a plain
pytree serve alike. Parameters are any pytree. Three more are optional: ``grow``, for a quicker
sampler, ``together``, for a step that gathers each weight once, and ``pack``, without which there
are no batches without padding (:mod:`.packed`).

The layout is *a prompt once and K responses to it*: ``prefill`` reads each prompt a single time
and returns a :class:`Prefix`; ``extend`` (teacher forcing) and ``decode`` (one token at a time)
let K responses attend to it. Positions count from the true start of the prompt: the response's
first token stands at position ``prompts.lengths``, whatever the padding.

What a caller may count on, of every model:

- Right padding is harmless, of prompts and of responses: no true position sees it.
- Nothing outside the model looks into ``cache``, which is an ordinary pytree (jit, scan, donate).
- Gradients flow through ``prefill``, ``extend`` and ``unembed``. Parameters that a model means to
  be constant (the base under an adapter) are stopped inside it.

Axes: ``B`` prompts, ``K`` responses to a prompt, ``P`` prompt positions, ``C`` response
positions, ``D`` hidden size, ``V`` vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int

from jax_klrlhf.core.sequence import Ragged


class Prefix(NamedTuple):
    """A prompt, read once: what all K responses to it share."""

    hidden: Float[Array, "B D"]
    """Final hidden state at each prompt's last true token: it predicts the first response token."""
    cache: Any
    """The model's own pytree (keys and values of the prompt, per layer)."""
    lengths: Int[Array, " B"]


@jax.tree_util.register_static
@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """A causal language model as pure functions. Static under jit: equal functions, one trace."""

    vocab_size: int
    max_length: int
    """Longest prompt plus response, in tokens."""
    init: Callable[[Array], Any]
    """``init(key) -> params``"""
    prefill: Callable[[Any, Ragged], Prefix]
    """``prefill(params, prompts [B, P]) -> Prefix``"""
    extend: Callable[[Any, Prefix, Array], Array]
    """``extend(params, prefix, ids [B, K, C]) -> hidden [B, K, C, D]``: the hidden state *after*
    reading each response token. Right padding is harmless: attention is causal."""
    start: Callable[[Any, Prefix, int, int], Any]
    """``start(params, prefix, K, C) -> cache``: empty, for K responses of at most C tokens."""
    decode: Callable[[Any, Prefix, Any, Array, Array], tuple[Array, Any]]
    """``decode(params, prefix, cache, ids [B, K], step) -> (hidden [B, K, D], cache)``: reads
    response token number ``step`` of every row; ``step`` is a scalar, or ``[B]`` where prompts are
    at different tokens (:mod:`~jax_klrlhf.models.continuous`)."""
    grow: Callable[[Any, int], Any] | None = None
    """``grow(cache, C) -> cache`` with room for C tokens of each response, which a sampler calls
    as responses lengthen so that a step reads little more than what is filled. None: ``start``
    makes all the room there will be."""
    unembed: Callable[[Any, Array], Array]
    """``unembed(params, hidden [..., D]) -> logits [..., V]``, float32 (or float64)."""
    together: Callable[[Any, Ragged, Array], tuple[Array, Array]] | None = None
    """``together(params, prompts [B, P], ids [B, K, C]) -> (hidden [B, D], hidden [B, K, C, D])``:
    what ``prefill(...).hidden`` and ``extend`` are, in one pass through the layers, so that weights
    cut over devices are gathered once for prompts and responses. None: two passes."""
    pack: Callable[[Any, Any], Array] | None = None
    """``pack(params, packed) -> hidden [R, T, D]``: the hidden state after reading each token of
    the streams of a :class:`.packed.Packed`. None: the model scores rectangles alone."""


def read(
    model: LanguageModel, params: Any, prompts: Ragged, ids: Int[Array, "B K C"]
) -> tuple[Float[Array, "B D"], Float[Array, "B K C D"]]:
    """Hidden states at each prompt's last token, and after each response token."""
    if model.together is not None:
        return model.together(params, prompts, ids)
    prefix = model.prefill(params, prompts)
    return prefix.hidden, model.extend(params, prefix, ids)
