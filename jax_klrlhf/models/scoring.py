r"""Log-probabilities of responses under a language model, a prompt read once for its K responses.

.. math:: \log \pi(y \mid x) = \sum_i \log \pi(y_i \mid x, y_{<i})

The first response token is predicted by the prompt's last hidden state, token ``i`` by the hidden
state after token ``i - 1``. Only these predicting positions are projected on the vocabulary, and
only ``chunk`` tokens at a time: the backward pass computes the logits of a chunk again, so that no
``[tokens, vocabulary]`` array of the whole batch exists in either pass.

Axes: ``B`` prompts, ``K`` responses to a prompt, ``P`` prompt and ``C`` response positions, ``D``
hidden size. Everything returned is float32 (nats) and zero at padding.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_klrlhf.core import divergence, diversity, sequence
from jax_klrlhf.core.numerics import expectation
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models import base
from jax_klrlhf.models.base import LanguageModel

CHUNK = 1024
"""Tokens whose logits exist at one time: 128 MiB of float32 at a vocabulary of 32k."""


class TokenScores(NamedTuple):
    """What a pass over given responses tells of each of their tokens; zero at padding."""

    log_prob: Float[Array, "B K C"]
    entropy: Float[Array, "B K C"]
    """Entropy of the law that the token was drawn from, exact over the vocabulary."""
    kl: Float[Array, "B K C"] | None
    """KL(policy || reference) of that law, exact over the vocabulary; None without a reference."""
    ref_log_prob: Float[Array, "B K C"] | None = None
    """The reference's; None without one."""
    top: diversity.Top | None = None
    """Entropy and mass of the likeliest continuations at each token; None unless asked for."""


def token_log_prob(
    model: LanguageModel,
    params: Any,
    prompts: Ragged,
    responses: Ragged,
    *,
    chunk: int = CHUNK,
) -> Float[Array, "B K C"]:
    """Log-probability of each response token given its prompt and the tokens before it.

    Equal to a forward pass over every prompt-response row by itself, in value and gradient.

    Args:
        model: the six functions of a language model.
        params: its parameters.
        prompts: ids ``[B, P]``, each of at least one token.
        responses: ids ``[B, K, C]``; a length may be 0. Ids at padding are never read.
        chunk: tokens, over all rows and devices, projected on the vocabulary at one time.

    Raises:
        ValueError: where the shapes do not fit each other.
    """

    def measure(hidden, tokens):
        with jax.named_scope("vocabulary"):
            return sequence.token_log_prob(model.unembed(params, hidden), tokens)

    hidden = _predicting_hidden(model, params, prompts, responses)
    return by_chunks(measure, hidden, responses, chunk=chunk)


def log_prob(
    model: LanguageModel,
    params: Any,
    prompts: Ragged,
    responses: Ragged,
    *,
    chunk: int = CHUNK,
) -> Float[Array, "B K"]:
    """Log-probability of each response: the sum of :func:`token_log_prob`, 0 for an empty one."""
    per_token = token_log_prob(model, params, prompts, responses, chunk=chunk)
    return sequence.sum_log_prob(per_token, where=responses.mask)


def score(
    model: LanguageModel,
    params: Any,
    prompts: Ragged,
    responses: Ragged,
    *,
    reference: tuple[LanguageModel, Any] | None = None,
    top: int | None = None,
    chunk: int = CHUNK,
) -> TokenScores:
    r"""Log-probability, exact entropy and exact KL to a reference of each token, in one pass.

    .. math:: \mathrm{KL}_i = \sum_v \pi(v \mid x, y_{<i})
              \log \frac{\pi(v \mid x, y_{<i})}{\pi_0(v \mid x, y_{<i})}

    Averaged over responses drawn from the policy, the sum of ``kl`` over a response estimates
    KL(policy || reference) with less variance than the sampled log-ratio: each token's
    conditional divergence is exact.

    Args:
        model, params, prompts, responses, chunk: as :func:`token_log_prob`.
        reference: model and parameters of pi0, a constant under differentiation.
        top: k, of the warnings of over-optimized likelihood (:func:`core.diversity.top`).
    """

    def measure(hiddens, tokens):
        logits = model.unembed(params, hiddens[0])
        log_law = jax.nn.log_softmax(logits)
        kl = ref_log_prob = None
        if reference is not None:
            ref_logits = reference[0].unembed(frozen, hiddens[1])
            kl = divergence.categorical(log_law, jax.nn.log_softmax(ref_logits))
            ref_log_prob = sequence.token_log_prob(ref_logits, tokens)
        log_prob = sequence.token_log_prob(logits, tokens)
        likeliest = None if top is None else diversity.top(log_law, k=top)
        return TokenScores(log_prob, -expectation(log_law, log_law), kl, ref_log_prob, likeliest)

    hiddens = [_predicting_hidden(model, params, prompts, responses)]
    if reference is not None:
        frozen = jax.lax.stop_gradient(reference[1])
        hiddens.append(_predicting_hidden(reference[0], frozen, prompts, responses))
    return by_chunks(measure, hiddens, responses, chunk=chunk)


def _predicting_hidden(
    model: LanguageModel, params: Any, prompts: Ragged, responses: Ragged
) -> Float[Array, "B K C D"]:
    """The hidden state that predicts each response token."""
    rows = prompts.ids.shape[0]
    if responses.ids.ndim != 3 or responses.ids.shape[0] != rows:
        raise ValueError(
            f"responses must be [prompts, responses, length] with {rows} prompts, got shape "
            f"{responses.ids.shape}; a single response per prompt is ids[:, None]"
        )
    last, after = base.read(model, params, prompts, jnp.where(responses.mask, responses.ids, 0))
    first = jnp.broadcast_to(last[:, None, None], (*after.shape[:2], 1, after.shape[3]))
    return jnp.concatenate([first, after], axis=2)[:, :, :-1]


def by_chunks(measure: Callable[[Any, Array], Any], hidden: Any, responses: Ragged, *, chunk: int):
    """Apply ``measure(hidden, tokens)`` to a few positions of every row at a time.

    Chunks are cut along the position axis, so that a batch sharded over devices stays so. Under
    differentiation each chunk is computed again (measured on CPU at a vocabulary of 32k against a
    hand-written derivative that keeps the normalizers: 1.2 times faster, and as small).
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")
    rows, samples, length = responses.ids.shape
    mask = responses.mask
    if length == 0:
        return jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(measure, hidden, responses.ids),
        )
    # The fewest chunks of at most `chunk` tokens, then the shortest that still make that many.
    count = -(-length // max(1, chunk // (rows * samples)))
    width = -(-length // count)

    def cut(leaf):  # [B, K, C, ...] -> [count, B, K, width, ...]
        pad = [(0, 0), (0, 0), (0, count * width - length)] + [(0, 0)] * (leaf.ndim - 3)
        leaf = jnp.pad(leaf, pad)
        return jnp.moveaxis(leaf.reshape(rows, samples, count, width, *leaf.shape[3:]), 2, 0)

    def join(leaf):  # [count, B, K, width] -> [B, K, C]
        leaf = jnp.moveaxis(leaf, 0, 2).reshape(rows, samples, count * width)[:, :, :length]
        return jnp.where(mask, leaf, 0)

    parts = jax.tree.map(cut, (hidden, responses.ids))
    widened, weights = _widened(measure, jax.tree.map(lambda leaf: leaf[0], parts))
    scores = jax.lax.map(jax.checkpoint(lambda part: widened(*part, weights)), parts)
    return jax.tree.map(join, scores)


def _widened(measure: Callable, example: Any) -> tuple[Callable, list[Array]]:
    """``measure`` with the weights it closes over made an argument, float32 outside its call.

    A loop sums the gradient of what it closes over in that array's dtype. In bfloat16 the sum over
    many chunks stops growing, so the loop is handed float32 weights and casts them inside.
    """
    converted, weights = jax.closure_convert(measure, *example)

    def call(hidden, tokens, wide):
        narrow = [w.astype(weight.dtype) for w, weight in zip(wide, weights, strict=True)]
        return converted(hidden, tokens, *narrow)

    def half(dtype):
        return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32

    return call, [w.astype(jnp.float32) if half(w.dtype) else w for w in weights]
