"""A language model that is no neural library's: a linear-recurrent one on a plain dict of arrays.

Every token changes the state that all later ones see, so a wrong position, a leaked padding token
or a response read with another prompt's state changes its numbers. With a vocabulary of five or so
its law over responses can be written out by brute force, which :func:`enumerate_law` does in NumPy.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models.base import LanguageModel, Prefix


def language_model(
    *, vocab: int = 5, width: int = 8, max_length: int = 64, scale: float = 1.0, dtype=jnp.float32
) -> LanguageModel:
    def init(key):
        embed, mix, read, bias = jax.random.split(key, 4)
        params = {
            "embed": scale * jax.random.normal(embed, (vocab, width)),
            "mix": jax.random.normal(mix, (width, width)) / jnp.sqrt(jnp.float32(width)),
            "read": scale * jax.random.normal(read, (width, vocab)),
            "bias": jax.random.normal(bias, (vocab,)),
        }
        return jax.tree.map(lambda leaf: leaf.astype(dtype), params)

    def advance(params, state, token):
        return jnp.tanh(state @ params["mix"] + jnp.take(params["embed"], token, axis=0))

    def prefill(params, prompts: Ragged) -> Prefix:
        def read(state, column):
            token, true = column
            return jnp.where(true[:, None], advance(params, state, token), state), None

        empty = jnp.zeros((prompts.ids.shape[0], width), params["mix"].dtype)
        state, _ = jax.lax.scan(read, empty, (prompts.ids.T, prompts.mask.T))
        return Prefix(hidden=state, cache=state, lengths=prompts.lengths)

    def extend(params, prefix, ids):
        def read(state, token):
            state = advance(params, state, token)
            return state, state

        state = jnp.broadcast_to(prefix.cache[:, None], (*ids.shape[:2], width))
        _, hidden = jax.lax.scan(read, state, jnp.moveaxis(ids, -1, 0))
        return jnp.moveaxis(hidden, 0, 2)

    def start(params, prefix, samples, max_new_tokens):
        return jnp.broadcast_to(prefix.cache[:, None], (prefix.cache.shape[0], samples, width))

    def decode(params, prefix, cache, ids, step):
        state = advance(params, cache, ids)
        return state, state

    def unembed(params, hidden):
        bias = jnp.expand_dims(params["bias"], range(hidden.ndim - 1))
        return (hidden @ params["read"]).astype(jnp.float32) + bias.astype(jnp.float32)

    return LanguageModel(
        vocab_size=vocab,
        max_length=max_length,
        init=init,
        prefill=prefill,
        extend=extend,
        start=start,
        decode=decode,
        unembed=unembed,
    )


def naive_logits(params, tokens) -> np.ndarray:
    """Logits after every token of one row, in float64 NumPy: ``[length, vocab]``."""
    p = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    state, out = np.zeros(p["mix"].shape[0]), []
    for token in tokens:
        state = np.tanh(state @ p["mix"] + p["embed"][token])
        out.append(state @ p["read"] + p["bias"])
    return np.stack(out)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def enumerate_law(params, prompt, *, max_new_tokens, stop, warp=lambda logits: logits) -> dict:
    """``{response: probability}`` over every response that ends in `stop` or at the limit.

    ``warp`` maps one row of logits to the warped row (-inf where excluded).
    """
    vocab = np.asarray(params["bias"]).shape[0]
    law = {}
    for length in range(1, max_new_tokens + 1):
        for response in itertools.product(range(vocab), repeat=length):
            early = any(token in stop for token in response[:-1])
            ends = response[-1] in stop or length == max_new_tokens
            if early or not ends:
                continue
            logits = naive_logits(params, [*prompt, *response])[len(prompt) - 1 : -1]
            rows = np.stack([log_softmax(warp(row)) for row in logits])
            law[response] = float(np.exp(rows[np.arange(length), list(response)].sum()))
    return law
