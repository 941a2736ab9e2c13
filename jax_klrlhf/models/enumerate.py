r"""The exact law of a language model over every response, where there are few enough to list.

A vocabulary of a handful of tokens and a few positions give some thousands of responses. On them
a real network is a bandit whose actions are the responses: its optimum, its objective, its
divergence and the law of everything that samples from it are sums, and the core computes them
(:mod:`core.gibbs`, :mod:`core.divergence`, :mod:`core.rejection`).

Axes: ``B`` prompts, ``N`` all responses, ``C`` response positions, ``V`` vocabulary; ``batch``
(free leading axes), ``actions``.
"""

import dataclasses
import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models import scoring
from jax_klrlhf.models.base import LanguageModel


def responses(*, vocab_size: int, max_new_tokens: int, stop: tuple[int, ...] = ()) -> Ragged:
    """Every response that sampling can return, ids ``[N, C]``: those that end in a stop token, and
    those of ``max_new_tokens`` tokens that do not hold one before the end.

    >>> responses(vocab_size=2, max_new_tokens=2, stop=(0,)).ids.tolist()
    [[0, 0], [1, 0], [1, 1]]
    >>> responses(vocab_size=2, max_new_tokens=2, stop=(0,)).lengths.tolist()
    [1, 2, 2]
    """
    if vocab_size < 1 or max_new_tokens < 1:
        raise ValueError(
            f"vocab_size and max_new_tokens must be at least 1: got {vocab_size}, {max_new_tokens}"
        )
    going = [token for token in range(vocab_size) if token not in stop]
    rows = [
        (*head, end)
        for length in range(1, max_new_tokens + 1)
        for head in itertools.product(going, repeat=length - 1)
        for end in (range(vocab_size) if length == max_new_tokens else sorted(set(stop)))
    ]
    ids = np.zeros((len(rows), max_new_tokens), np.int32)
    for target, row in zip(ids, rows, strict=True):
        target[: len(row)] = row
    return Ragged(jnp.asarray(ids), jnp.array([len(row) for row in rows], jnp.int32))


def log_prob(
    model: LanguageModel, params: Any, prompts: Ragged, responses: Ragged
) -> Float[Array, "B N"]:
    """Log-probability of each of the responses ``[N, C]`` after each prompt ``[B, P]``, nats."""
    count = prompts.ids.shape[0]
    every = Ragged(
        jnp.broadcast_to(jnp.asarray(responses.ids)[None], (count, *responses.ids.shape)),
        jnp.broadcast_to(jnp.asarray(responses.lengths)[None], (count, *responses.lengths.shape)),
    )
    return scoring.log_prob(model, params, prompts, every, chunk=every.ids.size)


def tempered(model: LanguageModel, temperature: float) -> LanguageModel:
    """The model whose law is that of sampling from ``model`` at a temperature."""
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")

    def unembed(params: Any, hidden: Array) -> Array:
        return model.unembed(params, hidden) / temperature

    return dataclasses.replace(model, unembed=unembed)


def best_of(
    log_prob: Float[Array, "*batch actions"], reward: Float[Array, "*batch actions"], *, n: int
) -> Float[Array, "*batch actions"]:
    r"""Log-law of the best of ``n`` draws by reward, ties broken uniformly among the draws.

    .. math:: P(a) = p(a)\, \frac{F(r(a))^n - F(r(a)^-)^n}{F(r(a)) - F(r(a)^-)}

    F the distribution function of the reward. Its KL to the law drawn from is at most
    log n - (n - 1) / n.

    >>> uniform = jnp.log(jnp.array([0.5, 0.5]))
    >>> jnp.exp(best_of(uniform, jnp.array([1.0, 0.0]), n=2)).tolist()
    [0.75, 0.25]
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    order = jnp.argsort(reward, axis=-1)
    back = jnp.argsort(order, axis=-1)
    prob = jnp.take_along_axis(jnp.exp(log_prob), order, axis=-1)
    value = jnp.take_along_axis(reward, order, axis=-1)
    upto = jnp.minimum(jnp.cumsum(prob, axis=-1), 1)
    below = jnp.concatenate([jnp.zeros_like(upto[..., :1]), upto[..., :-1]], axis=-1)
    # Equal rewards share one jump of F: its two ends, carried over the run of equals.
    starts = jnp.concatenate(
        [jnp.ones_like(value[..., :1], bool), value[..., 1:] != value[..., :-1]], axis=-1
    )
    ends = jnp.concatenate([starts[..., 1:], jnp.ones_like(starts[..., :1])], axis=-1)
    low = _running(jnp.maximum, jnp.where(starts, below, 0.0))
    high = jnp.flip(_running(jnp.minimum, jnp.flip(jnp.where(ends, upto, 2.0), axis=-1)), axis=-1)
    # (h^n - l^n) / (h - l) as the sum of h^i l^(n-1-i): no cancellation where the jump is small.
    mean_power = sum(high**i * low ** (n - 1 - i) for i in range(n))
    law = jnp.log(prob) + jnp.log(mean_power)
    return jnp.take_along_axis(law, back, axis=-1)


def _running(ufunc: Any, x: Array) -> Array:
    """Running maximum or minimum along the last axis."""
    return ufunc.accumulate(x, axis=-1)
