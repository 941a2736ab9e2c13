r"""The exact law of a language model over every response, where there are few enough to list.

A vocabulary of a handful of tokens and a few positions give some thousands of responses. On them
a real network is a bandit whose actions are the responses: its optimum, its objective, its
divergence and the law of everything that samples from it are sums, and the core computes them
(:mod:`core.gibbs`, :mod:`core.divergence`, :mod:`core.targets`) from :func:`choices`.

Axes: ``B`` prompts, ``N`` all responses, ``C`` response positions, ``V`` vocabulary.
"""

import dataclasses
import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jax_klrlhf.core import choices as choice_sets
from jax_klrlhf.core.choices import Choices
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


def choices(
    model: LanguageModel,
    params: Any,
    prompts: Ragged,
    responses: Ragged,
    *,
    reference: Any = None,
    **fields: Any,
) -> Choices:
    """Every response as a choice set ``[B, N]``, under the policy of ``params``.

    ``reference`` are pi0's parameters; ``fields`` are further ones of :class:`core.choices.Choices`
    (rewards, features), of every response.
    """
    law = log_prob(model, params, prompts, responses)
    if reference is not None:
        fields["ref_log_prob"] = log_prob(model, reference, prompts, responses)
    return choice_sets.enumerated(law, **fields)
