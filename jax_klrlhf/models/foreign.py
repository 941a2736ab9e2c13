"""Language models of one's own, written in Flax for plain logits, as a `LanguageModel`."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Int

from jax_klrlhf.core.numerics import at_least_float32
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models.base import LanguageModel, Prefix


def from_flax(module: nn.Module, *, max_length: int, **call: Any) -> LanguageModel:
    """A causal Flax (Linen) module ``ids [rows, T] -> logits [rows, T, V]`` as a language model.

    Whatever takes a :class:`~jax_klrlhf.models.base.LanguageModel` then takes it: scoring,
    sampling, training, rounds. Parameters are what ``module.init`` gives, all collections.

    It is naive: nothing is cached, so the prompt is read again with each of its responses, and a
    step of sampling reads the whole row again; ``hidden`` is the logits themselves, so scoring
    holds them all. For a model that is trained for long write the six functions.

    Args:
        module: causal (a logit may depend on no later token); positions are counted from 0 at the
            row's first token, and rows are padded on the right.
        max_length: longest prompt plus response, in tokens. No longer row is ever handed in.
        call: keyword arguments of the module's call, such as ``deterministic=True``.

    Raises:
        ValueError: where the module's output has another shape.

    >>> class Bigram(nn.Module):
    ...     vocab: int
    ...     @nn.compact
    ...     def __call__(self, ids):
    ...         return nn.Embed(self.vocab, self.vocab)(ids)
    >>> model = from_flax(Bigram(5), max_length=32)
    >>> model.vocab_size
    5
    >>> prompts = Ragged(jnp.array([[3, 1]]), jnp.array([2]))
    >>> params = model.init(jax.random.key(0))
    >>> model.unembed(params, model.prefill(params, prompts).hidden).shape
    (1, 5)
    """

    def logits(params: Any, rows: Int[Array, "*batch T"]) -> Array:
        flat = module.apply(params, rows.reshape(-1, rows.shape[-1]), **call)
        assert isinstance(flat, jax.Array)  # Checked below, once.
        return at_least_float32(flat).reshape(*rows.shape, -1)

    def init(key: Array) -> Any:
        return module.init(key, jnp.zeros((1, 1), jnp.int32), **call)

    def prefill(params: Any, prompts: Ragged) -> Prefix:
        last = jnp.maximum(prompts.lengths - 1, 0)[:, None, None]
        hidden = jnp.take_along_axis(logits(params, prompts.ids[:, :max_length]), last, axis=1)
        return Prefix(hidden[:, 0], prompts.ids, prompts.lengths.astype(jnp.int32))

    def after(params: Any, prefix: Prefix, ids: Array, places: Int[Array, "#B n"]) -> Array:
        """Logits after response tokens number ``places`` of every row, ``[B, K, n, V]``."""
        rows = _rows(Ragged(prefix.cache, prefix.lengths), ids)[..., :max_length]
        at = jnp.minimum(prefix.lengths[:, None] + places, rows.shape[-1] - 1)
        return jnp.take_along_axis(logits(params, rows), at[:, None, :, None], axis=2)

    def extend(params: Any, prefix: Prefix, ids: Int[Array, "B K C"]) -> Array:
        return after(params, prefix, ids, jnp.arange(ids.shape[-1], dtype=jnp.int32)[None])

    def start(params: Any, prefix: Prefix, samples: int, max_new_tokens: int) -> Array:
        del params
        return jnp.zeros((prefix.lengths.shape[0], samples, max_new_tokens), jnp.int32)

    def decode(
        params: Any, prefix: Prefix, cache: Array, ids: Int[Array, "B K"], step: Array
    ) -> tuple[Array, Array]:
        step = jnp.broadcast_to(step, cache.shape[:1])
        write = jax.vmap(lambda row, ids, at: row.at[:, at].set(ids))
        cache = write(cache, ids.astype(cache.dtype), step)
        return after(params, prefix, cache, step[:, None])[:, :, 0], cache

    shape = jax.eval_shape(
        lambda key: module.apply(init(key), jnp.zeros((1, 1), jnp.int32), **call),
        jax.random.key(0),
    )
    if not isinstance(shape, jax.ShapeDtypeStruct) or shape.shape[:-1] != (1, 1):
        raise ValueError(
            f"the module's output for ids [1, 1] is {jax.tree.map(jnp.shape, shape)}; a language "
            "model's is one array of logits, [rows, T, vocabulary]"
        )
    return LanguageModel(
        vocab_size=shape.shape[-1],
        max_length=max_length,
        init=init,
        prefill=prefill,
        extend=extend,
        start=start,
        decode=decode,
        unembed=lambda params, hidden: hidden,
    )


def _rows(prompts: Ragged, responses: Int[Array, "B K C"]) -> Int[Array, "B K T"]:
    """Each response right after its prompt's true end: ``[B, K, P + C]``, 0 beyond."""
    batch, samples, room = responses.shape
    width = prompts.ids.shape[1] + room
    place = jnp.arange(width, dtype=jnp.int32)[None] - prompts.lengths[:, None]  # In the response.
    shape = (batch, samples, width)
    index = jnp.broadcast_to(jnp.clip(place, 0, room - 1)[:, None], shape)
    mine = jnp.take_along_axis(responses, index, axis=2)
    first = jnp.pad(prompts.ids, ((0, 0), (0, room)))[:, None]
    place = jnp.broadcast_to(place[:, None], shape)
    return jnp.where(place < 0, first, jnp.where(place < room, mine, 0))
