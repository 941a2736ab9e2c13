r"""Log-probabilities of responses without padding: examples of any lengths in one stream of tokens.

A row of the batch is a *stream*: the true tokens of several examples (a prompt and its K
responses), one after the other, no slot between them. Everything that acts on tokens one by one
(embedding, projections, norms, feed-forward, vocabulary) runs on streams, so that a batch of long
and short examples costs what its tokens cost. Attention alone needs to know who sees whom: for it
queries, keys and values are laid out as the rectangles that the library has everywhere, prompts
``[E, P]`` and responses ``[E, K, C]``, and its result goes back into the stream. A response token
therefore sees its own prompt and itself, and nothing of its siblings or of other examples, by the
same code, windows and soft caps as in :mod:`.scoring`; a prompt is read once.

(The other form of packing, one long row under a mask of segments, computes T scores for a token of
a row of T. Rectangles compute the longest length of their group, and groups can be several: long
examples in a long rectangle, short ones in a short one, all in one compiled program.)

Both layouts hold the same tokens, so the way from one to the other is a partial bijection: the
derivative of a gather by it is the gather by its inverse, never a scatter.

Axes: ``R`` streams, ``T`` token slots of a stream, ``A`` response token slots of a stream, ``S``
slots of the rectangles of a stream, ``E`` examples of a group in a stream, ``K`` responses, ``P``
prompt and ``C`` response positions of a group, ``D`` hidden size.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from jax_klrlhf.core import sequence
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models import scoring
from jax_klrlhf.models.base import LanguageModel


class Packed(NamedTuple):
    """Examples of several groups, and the order of their tokens in the streams.

    A group's arrays hold the examples of the first stream, then those of the second, and so on:
    E of each. An example may be absent (all its lengths 0).
    """

    prompts: tuple[Ragged, ...]
    """Of each group, ids ``[R E, P]``."""
    responses: tuple[Ragged, ...]
    """Of each group, ids ``[R E, K, C]``."""
    stream: Int[Array, "R T"]
    """Place in the rectangles ``S`` of each true token, ascending; -1 in the slots left over."""
    answers: Int[Array, "R A"]
    """Place in the response rectangles alone of each true response token, ascending; -1 after."""


class Route(NamedTuple):
    """A partial bijection between two layouts of the same tokens, both ways."""

    forward: Int[Array, "R N"]
    """Of each slot of the second layout, its place in the first."""
    kept: Bool[Array, "R N"]
    """Whether it has one."""
    backward: Int[Array, "R M"]
    backward_kept: Bool[Array, "R M"]

    @property
    def inverse(self) -> "Route":
        """The way back."""
        return Route(self.backward, self.backward_kept, self.forward, self.kept)


def token_log_prob(
    model: LanguageModel, params: Any, packed: Packed, *, chunk: int = scoring.CHUNK
) -> tuple[Float[Array, "_ K _"], ...]:
    """Log-probability of each response token (nats), of each group ``[R E, K, C]``, 0 at padding.

    Equal to :func:`scoring.token_log_prob` of each group, in value and gradient. All are NaN in a
    stream that holds fewer tokens than the lengths say.

    Args:
        model: a language model with :attr:`~.base.LanguageModel.pack`.
        params: its parameters.
        packed: examples and their streams (:func:`data.packing.pack`).
        chunk: response tokens, over all streams and devices, projected on the vocabulary at a time.

    Raises:
        ValueError: for a model that has no packed form.
    """
    if model.pack is None:
        raise ValueError(
            "this language model has no packed form (LanguageModel.pack is None): give it one, or "
            "score rectangles with models.scoring."
        )
    hidden = model.pack(params, packed)
    rows = packed.stream.shape[0]

    def flat(parts: Sequence[Array]) -> Array:
        return jnp.concatenate([part.reshape(rows, -1) for part in parts], axis=1)

    mask = flat([responses.mask for responses in packed.responses])
    kept = packed.answers >= 0
    rank = jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1
    to_answers = Route(packed.answers, kept, rank, mask)
    tokens = _gather(flat([responses.ids for responses in packed.responses]), packed.answers)
    source = _gather(_predictors(packed), packed.answers)
    predicting = jnp.take_along_axis(hidden, jnp.maximum(source, 0)[..., None], axis=1)

    def measure(hidden: Array, tokens: Array) -> Array:
        return sequence.token_log_prob(model.unembed(params, hidden), tokens)

    count = kept.sum(axis=1, dtype=jnp.int32)
    row = Ragged(jnp.where(kept, tokens, 0)[:, None], count[:, None])
    found = scoring.by_chunks(measure, predicting[:, None], row, chunk=chunk)[:, 0]
    found = take(found[..., None], to_answers.inverse)[..., 0]
    whole = _whole(packed, mask)
    parts, begin = [], 0
    for responses in packed.responses:
        size = responses.ids.size // rows
        part = jnp.where(whole[:, None], found[:, begin : begin + size], jnp.nan)
        parts.append(jnp.where(responses.mask, part.reshape(responses.ids.shape), 0))
        begin += size
    return tuple(parts)


def log_prob(
    model: LanguageModel, params: Any, packed: Packed, *, chunk: int = scoring.CHUNK
) -> Float[Array, "B K"]:
    """Log-probability of each response (nats): the sums of :func:`token_log_prob`.

    Rows are those of :func:`rows`: stream by stream, and within a stream group by group.
    """
    per_token = token_log_prob(model, params, packed, chunk=chunk)
    return rows(
        packed,
        [
            sequence.sum_log_prob(part, where=responses.mask)
            for part, responses in zip(per_token, packed.responses, strict=True)
        ],
    )


def rows(packed: Packed, parts: Sequence[Any]) -> Any:
    """Arrays ``[R E, ...]`` of each group as one ``[B, ...]``: all of a stream's examples together.

    So a batch cut over devices by streams is cut by examples too.
    """
    streams = packed.stream.shape[0]
    split = [part.reshape(streams, -1, *part.shape[1:]) for part in parts]
    joined = jnp.concatenate(split, axis=1)
    return joined.reshape(-1, *joined.shape[2:])


def padded(packed: Packed, parts: Sequence[Ragged]) -> Ragged:
    """``packed.prompts`` or ``packed.responses`` as one, in the order of :func:`rows`."""
    widest = max(part.ids.shape[-1] for part in parts)

    def widen(ids: Any) -> Any:
        return jnp.pad(ids, [(0, 0)] * (ids.ndim - 1) + [(0, widest - ids.shape[-1])])

    ids = rows(packed, [widen(part.ids) for part in parts])
    return Ragged(ids, rows(packed, [part.lengths for part in parts]))


def route(packed: Packed) -> Route:
    """From streams to rectangles ``[R, S]``: prompts of a group, its responses, the next group."""
    streams = packed.stream.shape[0]
    masks = []
    for prompts, responses in zip(packed.prompts, packed.responses, strict=True):
        masks += [prompts.mask.reshape(streams, -1), responses.mask.reshape(streams, -1)]
    mask = jnp.concatenate(masks, axis=1)
    slot = jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1
    return Route(slot, mask, packed.stream, packed.stream >= 0)


def tokens(packed: Packed) -> tuple[Int[Array, "R T"], Int[Array, "R T"]]:
    """Ids of the streams and their positions, counted from the start of each example's prompt."""
    streams = packed.stream.shape[0]
    ids, positions = [], []
    for prompts, responses in zip(packed.prompts, packed.responses, strict=True):
        own = jnp.arange(prompts.ids.shape[-1], dtype=jnp.int32)
        after = jnp.arange(responses.ids.shape[-1], dtype=jnp.int32)[None, None]
        after = prompts.lengths[:, None, None] + after
        ids += [prompts.ids.reshape(streams, -1), responses.ids.reshape(streams, -1)]
        positions += [
            jnp.broadcast_to(own, prompts.ids.shape).reshape(streams, -1),
            jnp.broadcast_to(after, responses.ids.shape).reshape(streams, -1),
        ]
    kept = packed.stream >= 0
    flat = [_gather(jnp.concatenate(x, axis=1), packed.stream) for x in (ids, positions)]
    return jnp.where(kept, flat[0], 0), jnp.where(kept, flat[1], 0)


def rectangles(packed: Packed, x: Shaped[Array, "R S *rest"]) -> list[tuple[Array, Array]]:
    """Of each group its part of ``x``: ``[R E, P, ...]`` and ``[R E, K, C, ...]``."""
    parts, begin = [], 0
    for prompts, responses in zip(packed.prompts, packed.responses, strict=True):
        both = []
        for ids in (prompts.ids, responses.ids):
            size = ids.size // packed.stream.shape[0]
            both.append(x[:, begin : begin + size].reshape(*ids.shape, *x.shape[2:]))
            begin += size
        parts.append((both[0], both[1]))
    return parts


@jax.custom_vjp
def take(x: Float[Array, "R M *rest"], way: Route) -> Float[Array, "R N *rest"]:
    """``x`` in the other layout, 0 where nothing lies."""
    shape = way.forward.shape + (1,) * (x.ndim - 2)
    place = jnp.maximum(way.forward, 0).reshape(shape)
    found = jnp.take_along_axis(x, place, axis=1, mode="clip")
    return jnp.where(way.kept.reshape(shape), found, 0)


def _take_forward(x: Array, way: Route) -> tuple[Array, Route]:
    return take(x, way), way


def _take_backward(way: Route, gradient: Array) -> tuple[Array, None]:
    return take(gradient, way.inverse), None


take.defvjp(_take_forward, _take_backward)


def _gather(x: Int[Array, "R M"], place: Int[Array, "R N"]) -> Int[Array, "R N"]:
    return jnp.take_along_axis(x, jnp.maximum(place, 0), axis=1, mode="clip")


def _predictors(packed: Packed) -> Int[Array, "R _"]:
    """Slot in the stream of the token before each response token: the prompt's last, or its own."""
    streams = packed.stream.shape[0]
    sources = []
    for prompts, responses in rectangles(packed, route(packed).forward):
        number = len(sources)
        last = jnp.maximum(packed.prompts[number].lengths - 1, 0)
        first = jnp.take_along_axis(prompts, last[:, None], axis=1)[:, :, None]
        first = jnp.broadcast_to(first, (*responses.shape[:2], 1))
        sources.append(jnp.concatenate([first, responses[..., :-1]], axis=-1).reshape(streams, -1))
    return jnp.concatenate(sources, axis=1)


def _whole(packed: Packed, mask: Bool[Array, "R _"]) -> Bool[Array, " R"]:
    """Whether a stream holds all tokens that the lengths say, and all response tokens."""
    there = (packed.stream >= 0).sum(axis=1)
    wanted = route(packed).kept.sum(axis=1)
    return (there == wanted) & ((packed.answers >= 0).sum(axis=1) == mask.sum(axis=1))
