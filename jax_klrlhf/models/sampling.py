"""Responses drawn from a language model: each prompt read once for its K samples.

:func:`generate` is the edge: it checks lengths, rounds shapes up to a few sizes and calls one
compiled program. :func:`sample` is that program, a pure function.

**Reproducible by key, whatever the batch.** The random numbers of a token depend on its prompt's
key, the index of the sample and the index of the token, and on nothing else. One key is split over
the prompts by their row; hand in one key per prompt and a prompt's samples are the same in any
batch, in any order, beside any neighbours (up to the rounding of matrix products of other shapes).

Axes: ``B`` prompts, ``K`` samples of a prompt, ``P`` prompt and ``C`` response positions, ``V``
vocabulary.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Key

from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models import logits as laws
from jax_klrlhf.models.base import LanguageModel
from jax_klrlhf.models.logits import Warp

SHORTEST = 16
"""Tokens of a cache that it does not pay to read less of."""


class Samples(NamedTuple):
    """K responses to each prompt. A stop token is the last of its response and is counted."""

    responses: Ragged
    """``ids [B, K, C]`` and ``lengths [B, K]``."""
    token_log_prob: Float[Array, "B K C"]
    """Under the model (temperature 1, nothing left out), as scoring gives it; 0 at padding."""
    sampling_token_log_prob: Float[Array, "B K C"]
    """Under the law that was drawn from; 0 at padding, and everywhere if decoding was greedy."""
    finished: Bool[Array, "B K"]
    """A stop token was drawn; otherwise the response was cut at ``max_new_tokens``."""

    @property
    def log_prob(self) -> Float[Array, "B K"]:
        """Log-probability of each response under the model."""
        return self.token_log_prob.sum(-1)

    @property
    def sampling_log_prob(self) -> Float[Array, "B K"]:
        """Log-probability of each response under the law it was drawn from."""
        return self.sampling_token_log_prob.sum(-1)


def generate(
    key: Key[Array, "*prompts"],
    model: LanguageModel,
    params: Any,
    prompts: Ragged,
    *,
    samples: int,
    max_new_tokens: int,
    temperature: ArrayLike = 1.0,
    top_k: int | None = None,
    top_p: ArrayLike | None = None,
    min_p: ArrayLike | None = None,
    stop: tuple[int, ...] = (),
    pad_id: int = 0,
) -> Samples:
    """Draw `samples` responses to each prompt.

    Compiles once per model, number of prompts and samples, `max_new_tokens`, :func:`bucket` of the
    longest prompt and combination of warps; the warps' values are not compiled in. Prompts that lie
    on several devices keep their width: there the caller's batches decide the shapes.

    Args:
        key: one key, or one per prompt ``[B]`` (then samples do not depend on the batch).
        model: the six functions of a language model.
        params: its parameters.
        prompts: ids ``[B, P]``, each of at least one token.
        samples: responses to each prompt, K.
        max_new_tokens: longest response, the stop token included: C.
        temperature: logits are divided by it; 0 is greedy decoding.
        top_k: draw from the `top_k` likeliest tokens.
        top_p: draw from the fewest likeliest tokens that hold `top_p` of the probability.
        min_p: draw from tokens at least `min_p` times as likely as the likeliest.
        stop: ids that end a response.
        pad_id: id written after the end.

    Raises:
        ValueError: an empty prompt; a prompt that with `max_new_tokens` exceeds the model's
            context; a warp out of range, or one that greedy decoding would ignore.
    """
    by, greedy = _warp(temperature, top_k, top_p, min_p)
    if samples < 1 or max_new_tokens < 1:
        raise ValueError(
            f"samples and max_new_tokens must be at least 1, got {samples} and {max_new_tokens}"
        )
    prompts = _fitted(model, prompts, max_new_tokens)
    rows = prompts.ids.shape[0]
    keys = key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))
    if keys.shape != (rows,):
        raise ValueError(f"{rows} prompts need one key or {rows}, got shape {keys.shape}")
    return _compiled(
        keys,
        model,
        params,
        prompts,
        by,
        samples=samples,
        max_new_tokens=max_new_tokens,
        greedy=greedy,
        stop=tuple(stop),
        pad_id=pad_id,
    )


def mismatch(drawn: Samples, log_prob: Float[Array, "B K C"]) -> Float[Array, "B K"]:
    """How far sampler and scorer disagree on each response: ``|log p - log p|``, in nats.

    ``log_prob`` is :func:`~jax_klrlhf.models.scoring.token_log_prob` of ``drawn.responses`` under
    the parameters that they were drawn with, zero at padding. The two are one function, computed in
    two orders: what is left is rounding, about 1e-5 nats in float32. In bfloat16 it is tenths of a
    nat over 40 tokens, which an importance weight or a log-ratio then carries.
    """
    return jnp.abs((drawn.token_log_prob - log_prob).sum(-1))


def sample(
    keys: Key[Array, " B"],
    model: LanguageModel,
    params: Any,
    prompts: Ragged,
    by: Warp,
    *,
    samples: int,
    max_new_tokens: int,
    greedy: bool = False,
    stop: tuple[int, ...] = (),
    pad_id: int = 0,
) -> Samples:
    """The program behind :func:`generate`: pure, for use inside another compiled one.

    The loop ends when every response has; until then finished rows ride along. Gathering the live
    ones every 32 steps would save no work on real stories (64 prompts x 8 samples) at 128 new
    tokens and 9 % at 256, for a compilation at each new shape; where more prompts wait than are
    answered at one time, :mod:`.continuous` gives them the places that become free.
    """
    rows = prompts.ids.shape[0]
    numbers = uniform(keys, samples, max_new_tokens)
    with jax.named_scope("prefill"):
        prefix = model.prefill(params, prompts)

    def record(drawn: _Drawn, logits, step) -> _Drawn:
        """Draw token number `step` of every row that goes on."""
        token = following(
            logits, numbers[step], by, drawn.finished, greedy=greedy, stop=stop, pad_id=pad_id
        )
        return _Drawn(
            ids=drawn.ids.at[step].set(token.ids),
            log_prob=drawn.log_prob.at[step].set(token.log_prob),
            sampling=drawn.sampling.at[step].set(token.sampling),
            lengths=drawn.lengths + token.live.astype(jnp.int32),
            finished=drawn.finished | token.ended,
        )

    def body(carry):
        step, cache, drawn = carry
        with jax.named_scope("decode"):
            hidden, cache = model.decode(params, prefix, cache, drawn.ids[step - 1], step - 1)
            logits = model.unembed(params, hidden)
        with jax.named_scope("draw"):
            return step + 1, cache, record(drawn, logits, step)

    def unfinished(carry, *, until):
        step, _, drawn = carry
        return (step < until) & ~jnp.all(drawn.finished)

    # All samples of a prompt draw their first token from one law.
    logits = model.unembed(params, prefix.hidden)
    logits = jnp.broadcast_to(logits[:, None], (rows, samples, logits.shape[-1]))
    buffer = (max_new_tokens, rows, samples)
    drawn = _Drawn(
        ids=jnp.full(buffer, pad_id, jnp.int32),
        log_prob=jnp.zeros(buffer, logits.dtype),
        sampling=jnp.zeros(buffer, logits.dtype),
        lengths=jnp.zeros((rows, samples), jnp.int32),
        finished=jnp.zeros((rows, samples), bool),
    )
    drawn = record(drawn, logits, jnp.int32(0))
    sizes = [max_new_tokens] if model.grow is None else rooms(max_new_tokens)
    carry = (jnp.int32(1), model.start(params, prefix, samples, sizes[0]), drawn)
    for size in sizes:
        if model.grow is not None and size > sizes[0]:
            step, cache, drawn = carry
            carry = (step, model.grow(cache, size), drawn)
        carry = jax.lax.while_loop(partial(unfinished, until=size), body, carry)
    drawn = carry[-1]
    return Samples(
        responses=Ragged(jnp.moveaxis(drawn.ids, 0, -1), drawn.lengths),
        token_log_prob=jnp.moveaxis(drawn.log_prob, 0, -1),
        sampling_token_log_prob=jnp.moveaxis(drawn.sampling, 0, -1),
        finished=drawn.finished,
    )


class _Drawn(NamedTuple):
    """What has been drawn. The step is the first axis: a step writes one contiguous piece."""

    ids: Int[Array, "C B K"]
    log_prob: Float[Array, "C B K"]
    sampling: Float[Array, "C B K"]
    lengths: Int[Array, "B K"]
    finished: Bool[Array, "B K"]


_compiled = jax.jit(
    sample, static_argnames=("samples", "max_new_tokens", "greedy", "stop", "pad_id")
)


class Token(NamedTuple):
    """The next one of every response: padding, of log-probability 0, where one had ended."""

    ids: Int[Array, "B K"]
    log_prob: Float[Array, "B K"]
    sampling: Float[Array, "B K"]
    live: Bool[Array, "B K"]
    """Whether the response went on."""
    ended: Bool[Array, "B K"]
    """Whether this token ends it."""


def following(
    logits: Float[Array, "B K V"],
    numbers: Float[Array, "B K 2"],
    by: Warp,
    finished: Bool[Array, "B K"],
    *,
    greedy: bool,
    stop: tuple[int, ...],
    pad_id: int,
) -> Token:
    """Draw the next token of every response that is not finished."""
    ids, log_prob, sampling = draw(logits, numbers, by, greedy=greedy)
    live = ~finished
    ids = jnp.where(live, ids, pad_id)
    ended = live & (ids[..., None] == jnp.asarray(stop, jnp.int32)[None, None]).any(-1)
    return Token(ids, jnp.where(live, log_prob, 0), jnp.where(live, sampling, 0), live, ended)


def draw(
    logits: Float[Array, "B K V"], numbers: Float[Array, "B K 2"], by: Warp, *, greedy: bool
) -> tuple[Int[Array, "B K"], Float[Array, "B K"], Float[Array, "B K"]]:
    """A token of every response, its log-probability under the model and under the law drawn from.

    ``numbers`` are those of :func:`uniform` for this token."""
    if greedy:
        token = laws.argmax(logits)
        normalizer = jax.nn.logsumexp(logits, -1)
        return token, _at(logits, token) - normalizer, jnp.zeros(token.shape, logits.dtype)
    if not jax.tree.leaves(by):
        token, normalizer = laws.draw(numbers, logits)
        log_prob = _at(logits, token) - normalizer
        return token, log_prob, log_prob
    warped = laws.warp(logits, by)
    token, normalizer = laws.draw(numbers, warped)
    model_log_prob = _at(logits, token) - jax.nn.logsumexp(logits, -1)
    return token, model_log_prob, _at(warped, token) - normalizer


def uniform(keys: Key[Array, " B"], samples: int, steps: int) -> Float[Array, "C B K 2"]:
    """Two numbers in [0, 1) for each token. Those of a longer run begin with those of a shorter."""

    def of_sample(key, index):
        return jax.random.uniform(jax.random.fold_in(key, index), (steps, 2), jnp.float32)

    of_prompt = jax.vmap(of_sample, (None, 0), out_axes=1)
    return jax.vmap(of_prompt, (0, None), out_axes=1)(keys, jnp.arange(samples))


def _at(logits: Float[Array, "*batch V"], token: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
    return jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]


def _warp(temperature, top_k, top_p, min_p) -> tuple[Warp, bool]:
    """Check the ranges of what the host can see, and drop the warps that change nothing."""

    def check(name, value, low, high):
        if not isinstance(value, Tracer) and not low <= float(value) <= high:
            raise ValueError(f"{name} must lie in [{low}, {high}], got {value}")

    check("temperature", temperature, 0.0, np.inf)
    limits = {"top_k": (top_k, 1, np.inf), "top_p": (top_p, 0.0, 1.0), "min_p": (min_p, 0.0, 1.0)}
    given = {name: limit[0] for name, limit in limits.items() if limit[0] is not None}
    for name, value in given.items():
        check(name, value, *limits[name][1:])
    if isinstance(temperature, Tracer):
        return Warp(temperature=temperature, **given), False
    if float(temperature) == 0.0:
        if given:
            raise ValueError(f"temperature 0 is greedy and would ignore {', '.join(given)}")
        return Warp(), True
    return Warp(temperature=None if float(temperature) == 1.0 else temperature, **given), False


def _fitted(model: LanguageModel, prompts: Ragged, max_new_tokens: int) -> Ragged:
    """Refuse prompts that are empty or leave no room; round the width of the rest to a bucket."""
    ids, lengths = prompts
    seen = not isinstance(lengths, Tracer) and getattr(lengths, "is_fully_addressable", True)
    # Where the lengths cannot be looked at, the width they were padded to has to fit.
    counts = np.asarray(lengths) if seen else np.full(1, ids.shape[-1])
    if counts.min() < 1:
        raise ValueError(f"prompt {counts.argmin()} is empty: a prompt has at least one token")
    longest = int(counts.max())
    if longest + max_new_tokens > model.max_length:
        raise ValueError(
            f"prompt {counts.argmax()} has {longest} tokens, with max_new_tokens={max_new_tokens} "
            f"that makes {longest + max_new_tokens}, but the model's context is "
            f"{model.max_length}: cut the prompt or ask for at most "
            f"{max(0, model.max_length - longest)} new tokens"
        )
    if isinstance(ids, Tracer) or (isinstance(ids, jax.Array) and len(ids.sharding.device_set) > 1):
        return prompts
    width = min(bucket(longest), model.max_length)
    ids = jnp.pad(ids[:, :width], ((0, 0), (0, max(0, width - ids.shape[1]))))
    return Ragged(ids, jnp.asarray(lengths))


def rooms(max_new_tokens: int) -> list[int]:
    """Sizes of the responses' cache, one loop for each: thirds, or all at once if it is short.

    Attending to a third of the cache, then two, then all of it is 2/3 of the reads, for three
    compiled copies of the step in place of one.
    """
    thirds = (-(-max_new_tokens * i // 24) * 8 for i in (1, 2, 3))
    return sorted({min(n, max_new_tokens) for n in thirds if n >= SHORTEST} | {max_new_tokens})


def bucket(length: int) -> int:
    """The least of a few widths that holds `length`: four to each doubling, so 8, 16, ..., 32, 40,
    ..., 64, 80, ..., 128, 160. At most a quarter of padding for a handful of compilations."""
    step = max(8, 2 ** (max(length - 1, 1).bit_length() - 3))
    return -(-length // step) * step
