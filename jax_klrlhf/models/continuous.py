"""Continuous batching: a slot whose prompt is answered takes the next prompt.

:func:`.sampling.sample` draws for a batch until its longest response ends, and everyone else waits.
Here ``slots`` prompts are answered at one time; when ``admit`` of them are done, as many of those
that wait take their places: read in one pass, put into the slots' caches. One long response then
holds one slot, not all.

Every slot counts its own tokens, so ``model.decode`` is called with a step *for each prompt*, and
the whole room of the cache is read (a batch's cache grows with its common step). So this can pay
where lengths differ much, many prompts wait, and a step costs what its weights do; on a CPU it did
not (``experiments/benchmarks`` has numbers). A prompt's responses are those of
:func:`.sampling.generate` with its key, whatever the slots, up to the rounding of matrix products
of other shapes.

On a mesh the rows of each device, a *part*, have a queue and slots of their own: nothing travels.

Axes: those of :mod:`.sampling`, with ``R`` slots (``S`` parts of ``r``) and ``n`` prompts of a
part.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models import sampling
from jax_klrlhf.models.base import LanguageModel, Prefix
from jax_klrlhf.models.logits import Warp
from jax_klrlhf.models.sampling import Samples


class _Slots(NamedTuple):
    """What is being answered."""

    number: Int[Array, "S r"]
    """Which of its part's prompts a slot answers."""
    age: Int[Array, "S r"]
    """Tokens that it has drawn."""
    last: Int[Array, "R K"]
    finished: Bool[Array, "R K"]
    uniform: Float[Array, "R C K 2"]
    prefix: Prefix
    cache: Any


class _State(NamedTuple):
    queue: Int[Array, " S"]
    """The next prompt of each part that has no slot yet."""
    slots: _Slots
    out: Samples
    """Of all prompts, those of a part together: ``[S, n, ...]``."""


def sample(
    keys: Key[Array, " B"],
    model: LanguageModel,
    params: Any,
    prompts: Ragged,
    by: Warp,
    *,
    samples: int,
    max_new_tokens: int,
    slots: int,
    admit: int | None = None,
    parts: int = 1,
    greedy: bool = False,
    stop: tuple[int, ...] = (),
    pad_id: int = 0,
) -> Samples:
    """:func:`.sampling.sample` for many prompts through few slots: pure, for use inside jit.

    Args:
        keys: one for each prompt.
        model: its ``decode`` takes a step for each prompt, ``[B]``, as the library's do.
        params: its parameters.
        prompts: all of them.
        by: warps of the law.
        samples: responses to each prompt, K.
        max_new_tokens: longest response, C.
        slots: prompts that are answered at one time; a multiple of ``parts``.
        admit: of a part's slots, how many are free before new prompts are read; by default an
            eighth. Fewer idle less, and read prompts in more and smaller passes.
        parts: over how many devices rows lie; prompts of a part stand together.
        greedy: the likeliest token, always.
        stop: ids that end a response.
        pad_id: id written after the end.

    Raises:
        ValueError: where prompts or slots do not divide into parts, or ``admit`` is out of range.
    """
    count = prompts.ids.shape[0]
    slots = min(slots, count)
    if count % parts or slots % parts or slots < 1:
        raise ValueError(
            f"{count} prompts and {slots} slots must both be multiples of the {parts} parts"
        )
    of_part, waiting = slots // parts, count // parts
    admit = max(1, of_part // 8) if admit is None else admit
    if not 1 <= admit <= of_part:
        raise ValueError(f"admit must be in 1..{of_part}, the slots of a part, got {admit}")
    prompts = jax.tree.map(lambda x: x.reshape(parts, waiting, *x.shape[1:]), prompts)
    keys = keys.reshape(parts, waiting)
    take = jax.vmap(lambda x, at: x[at])

    def read(which: Int[Array, "S a"]) -> tuple[_Slots, Float[Array, "b V"]]:
        """Slots for prompts ``which``, and the law of their first tokens."""
        asked = jax.tree.map(lambda x: take(x, which).reshape(-1, *x.shape[2:]), prompts)
        uniform = sampling.uniform(take(keys, which).reshape(-1), samples, max_new_tokens)
        with jax.named_scope("prefill"):
            prefix = model.prefill(params, asked)
            cache = model.start(params, prefix, samples, max_new_tokens)
        rows = (which.size, samples)
        uniform = jnp.moveaxis(uniform, 0, 1)
        zero, none = (jnp.zeros(shape, jnp.int32) for shape in (which.shape, rows))
        law = model.unembed(params, prefix.hidden)
        done = jnp.zeros(rows, bool)
        return _Slots(which, zero, none, done, uniform, prefix, cache), law

    def for_all(law: Float[Array, "b V"]) -> Float[Array, "b K V"]:
        return jnp.broadcast_to(law[:, None], (law.shape[0], samples, law.shape[-1]))

    def record(
        slots: _Slots, out: Samples, logits: Float[Array, "b K V"]
    ) -> tuple[_Slots, Samples]:
        """Draw the next token of every response that goes on."""
        age = jnp.minimum(slots.age.reshape(-1), max_new_tokens - 1)
        numbers = jax.vmap(lambda x, at: x[at])(slots.uniform, age)
        with jax.named_scope("draw"):
            token = sampling.following(
                logits, numbers, by, slots.finished, greedy=greedy, stop=stop, pad_id=pad_id
            )

        def at_token(to: Array, value: Array) -> Array:
            put = lambda x, new, at, age: x.at[at, :, age].set(new, mode="drop")  # noqa: E731
            return jax.vmap(put)(to, _parted(value, parts), slots.number, slots.age)

        def at_prompt(to: Array, value: Array) -> Array:
            put = lambda x, new, at: x.at[at].max(new, mode="drop")  # noqa: E731
            return jax.vmap(put)(to, _parted(value, parts), slots.number)

        # A slot that is done stands beyond its last token, and writes padding on padding.
        ids, lengths = out.responses
        length = jnp.where(token.live, slots.age.reshape(-1, 1) + 1, 0)
        out = Samples(
            Ragged(at_token(ids, token.ids), at_prompt(lengths, length)),
            at_token(out.token_log_prob, token.log_prob),
            at_token(out.sampling_token_log_prob, token.sampling),
            at_prompt(out.finished, token.ended),
        )
        age = slots.age + _parted(token.live.any(-1), parts).astype(jnp.int32)
        full = (age == max_new_tokens).reshape(-1, 1)
        done = slots.finished | token.ended | jnp.broadcast_to(full, token.ended.shape)
        return slots._replace(age=age, last=token.ids, finished=done), out

    def step(state: _State) -> _State:
        slots = state.slots
        with jax.named_scope("decode"):
            at = jnp.maximum(slots.age.reshape(-1) - 1, 0)
            hidden, cache = model.decode(params, slots.prefix, slots.cache, slots.last, at)
            logits = model.unembed(params, hidden)
        slots, out = record(slots._replace(cache=cache), state.out, logits)
        return _State(state.queue, slots, out)

    def free(state: _State) -> Bool[Array, "S r"]:
        return _parted(state.slots.finished.all(-1), parts)

    def goes_on(state: _State) -> Bool[Array, ""]:
        enough = (free(state).sum(-1) >= admit) & (state.queue < waiting)
        return ~state.slots.finished.all() & ~enough.any()

    def take_in(state: _State) -> _State:
        """The next prompts of each part into its free slots, as many as there are, up to admit."""
        idle = free(state)
        at = jnp.argsort(~idle, axis=-1, stable=True)[:, :admit]
        which = state.queue[:, None] + jnp.arange(admit, dtype=jnp.int32)[None]
        fits = jnp.take_along_axis(idle, at, -1) & (which < waiting)
        new, law = read(jnp.minimum(which, waiting - 1))
        new = new._replace(number=jnp.where(fits, new.number, waiting))
        new, out = record(new, state.out, for_all(law))
        place = jnp.where(fits, at, of_part)
        old = state.slots
        merged = _Slots(
            *(
                jax.vmap(lambda x, y, i: x.at[i].set(y, mode="drop"))(x, y, place)
                for x, y in zip(old[:2], new[:2], strict=True)
            ),
            *(
                jax.tree.map(lambda x, y, axis: _put(x, y, place, axis), x, y, axes)
                for x, y, axes in zip(old[2:], new[2:], row_axes, strict=True)
            ),
        )
        return _State(state.queue + fits.sum(-1), merged, out)

    first = jnp.broadcast_to(jnp.arange(of_part, dtype=jnp.int32)[None], (parts, of_part))
    begun, law = read(first)
    row_axes = _row_axes(lambda which: read(which)[0][2:], parts)
    shape = (parts, waiting, samples, max_new_tokens)
    out = Samples(
        Ragged(jnp.full(shape, pad_id, jnp.int32), jnp.zeros(shape[:3], jnp.int32)),
        jnp.zeros(shape, law.dtype),
        jnp.zeros(shape, law.dtype),
        jnp.zeros(shape[:3], bool),
    )
    begun, out = record(begun, out, for_all(law))
    state = _State(jnp.full(parts, of_part, jnp.int32), begun, out)

    def body(state: _State) -> _State:
        state = jax.lax.while_loop(goes_on, step, state)
        return jax.lax.cond((state.queue < waiting).any(), take_in, lambda state: state, state)

    def left(state: _State) -> Bool[Array, ""]:
        return ~state.slots.finished.all() | (state.queue < waiting).any()

    out = jax.lax.while_loop(left, body, state).out
    return jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), out)


def _parted(x: Array, parts: int) -> Array:
    """``[R, ...]`` as ``[S, r, ...]``."""
    return x.reshape(parts, -1, *x.shape[1:])


def _put(whole: Array, new: Array, place: Int[Array, "S a"], axis: int) -> Array:
    """Rows ``place`` of each part of ``whole``, along ``axis``, replaced; beyond it: dropped."""
    parts = place.shape[0]

    def split(x: Array) -> Array:
        return x.reshape(*x.shape[:axis], parts, -1, *x.shape[axis + 1 :])

    def put(x: Array, y: Array, at: Array) -> Array:
        return x.at[(slice(None),) * axis + (at,)].set(y, mode="drop")

    done = jax.vmap(put, in_axes=(axis, axis, 0), out_axes=axis)(split(whole), split(new), place)
    return done.reshape(whole.shape)


def _row_axes(function: Callable[[Array], Any], parts: int) -> Any:
    """Of each array that ``function(which [S, a])`` returns, the axis that has its rows."""
    one, two = (
        jax.eval_shape(function, jax.ShapeDtypeStruct((parts, size), jnp.int32)) for size in (1, 2)
    )

    def axis(x: Any, y: Any) -> int:
        (found,) = (i for i, (a, b) in enumerate(zip(x.shape, y.shape, strict=True)) if a != b)
        return found

    return jax.tree.map(axis, one, two)
