"""One response, token by token, as it is drawn: for a person who reads along.

:func:`stream` draws what :func:`.sampling.generate` draws with the same key (one prompt, one
sample): the same laws, the same random numbers. It asks the device once for every token, so it is
for one reader, not for data.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Key

from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models import sampling
from jax_klrlhf.models.base import LanguageModel, Prefix
from jax_klrlhf.models.logits import Warp


def stream(
    key: Key[Array, ""],
    model: LanguageModel,
    params: Any,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: ArrayLike = 1.0,
    top_k: int | None = None,
    top_p: ArrayLike | None = None,
    stop: tuple[int, ...] = (),
) -> Iterator[int]:
    """The tokens of a response to ``prompt``, a stop token the last of them.

    Compiles once per model, :func:`.sampling.bucket` of the prompt, ``max_new_tokens`` and
    combination of warps.

    Raises:
        ValueError: as :func:`.sampling.generate`.
    """
    by, greedy = sampling._warp(temperature, top_k, top_p, None)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    ids = np.asarray(prompt, np.int32)[None]
    given = Ragged(jnp.asarray(ids), jnp.asarray([ids.shape[1]]))
    prompts = sampling._fitted(model, given, max_new_tokens)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(1))
    uniform = sampling.uniform(keys, 1, max_new_tokens)
    token, prefix, cache = _first(model, params, prompts, uniform, by, max_new_tokens, greedy)
    for step in range(max_new_tokens):
        drawn = int(token[0, 0])
        yield drawn
        if drawn in stop or step + 1 == max_new_tokens:
            return
        token, cache = _next(model, params, prefix, cache, token, step, uniform, by, greedy)


@partial(jax.jit, static_argnums=(0, 5, 6))
def _first(
    model: LanguageModel,
    params: Any,
    prompts: Ragged,
    uniform: Array,
    by: Warp,
    room: int,
    greedy: bool,
) -> tuple[Array, Prefix, Any]:
    prefix = model.prefill(params, prompts)
    logits = model.unembed(params, prefix.hidden)[:, None]
    token, *_ = sampling.draw(logits, uniform[0], by, greedy=greedy)
    return token, prefix, model.start(params, prefix, 1, room)


@partial(jax.jit, static_argnums=(0, 8), donate_argnums=3)
def _next(
    model: LanguageModel,
    params: Any,
    prefix: Prefix,
    cache: Any,
    token: Array,
    step: Array,
    uniform: Array,
    by: Warp,
    greedy: bool,
) -> tuple[Array, Any]:
    hidden, cache = model.decode(params, prefix, cache, token, step)
    logits = model.unembed(params, hidden)
    token, *_ = sampling.draw(logits, uniform[step + 1], by, greedy=greedy)
    return token, cache
