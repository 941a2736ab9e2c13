r"""Which two of the K responses to a prompt are shown to the one who prefers.

A rule is a value: ``rule(key, reward, *, where=None) -> Pair`` with leading axes free, so that an
experiment is handed one. Whatever else a rule needs is keyword-only and required, and is bound
before the rule is handed on, ``functools.partial(most_uncertain, features=phi, ellipsoid=state)``;
no rule accepts an option that it would ignore. `sampled`, `most_uncertain` and `uncertain_against`
choose without the reward and read its shape only.

The two indices always differ. Ties are broken uniformly at random by the key. With fewer than two
kept responses (True in `where`; where the reward is read, not NaN) `valid` is False and the indices
are 0. Copies of one response are different indices: mask them by :func:`distinct` where a
comparison of a response with itself would be wasted.

Axes: ``batch`` (free: prompts), ``responses``, ``dim`` (features).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from jax_klrlhf.core import bradley_terry
from jax_klrlhf.core import ellipsoid as ellipsoids
from jax_klrlhf.core.ellipsoid import Ellipsoid


class Pair(NamedTuple):
    """Indices into the responses axis; `valid` is False where no pair could be made."""

    first: Int[Array, "..."]
    second: Int[Array, "..."]
    valid: Bool[Array, "..."]


def best_worst(
    key: Key[Array, ""],
    reward: Float[Array, "*batch responses"],
    *,
    where: Bool[Array, "*batch responses"] | None = None,
) -> Pair:
    """Highest against lowest reward (arXiv 2312.11456, section 5; 2405.07863: best and worst of 8).

    >>> pair = best_worst(jax.random.key(0), jnp.array([0.0, 2.0, 1.0]))
    >>> int(pair.first), int(pair.second)
    (1, 0)
    """
    keep = _kept(reward, where) & ~jnp.isnan(reward)
    order = _priority(key, reward)
    first = _pick(reward, keep, order)
    second = _pick(-reward, keep & ~_one_hot(first, reward), order)
    return _pair(first, second, keep)


def best_second(
    key: Key[Array, ""],
    reward: Float[Array, "*batch responses"],
    *,
    where: Bool[Array, "*batch responses"] | None = None,
) -> Pair:
    """Highest against second highest reward: the hardest comparison at the top."""
    keep = _kept(reward, where) & ~jnp.isnan(reward)
    order = _priority(key, reward)
    first = _pick(reward, keep, order)
    second = _pick(reward, keep & ~_one_hot(first, reward), order)
    return _pair(first, second, keep)


def sampled(
    key: Key[Array, ""],
    reward: Float[Array, "*batch responses"],
    *,
    where: Bool[Array, "*batch responses"] | None = None,
) -> Pair:
    """Two responses drawn uniformly without replacement: an on-policy pair. Reads no reward."""
    keep = _kept(reward, where)
    order = _priority(key, reward)
    blank = jnp.zeros_like(reward)
    first = _pick(blank, keep, order)
    second = _pick(blank, keep & ~_one_hot(first, reward), order)
    return _pair(first, second, keep)


def most_uncertain(
    key: Key[Array, ""],
    reward: Float[Array, "*batch responses"],
    *,
    features: Float[Array, "*batch responses dim"],
    ellipsoid: Ellipsoid,
    where: Bool[Array, "*batch responses"] | None = None,
) -> Pair:
    """The pair with the largest ||phi_i - phi_j||_{Sigma^-1}, in random order (arXiv 2402.10500).

    Reads no reward. Where all kept responses have the same features every pair is as good as any,
    namely worthless to a linear reward: `valid` is False.
    """
    keep = _kept(reward, where)
    white = ellipsoids.whiten(ellipsoid, jnp.where(keep[..., None], features, 0.0))
    # Differences, not |a|^2 + |b|^2 - 2ab, which would lose close pairs. Equality is judged before
    # the solve, whose round-off depends on the position of a row.
    shift = white[..., :, None, :] - white[..., None, :, :]
    differ = jnp.any(features[..., :, None, :] != features[..., None, :, :], axis=-1)
    square = jnp.where(differ, jnp.sum(shift**2, axis=-1), 0.0)
    responses = reward.shape[-1]
    upper = jnp.triu(jnp.ones((responses, responses), bool), 1)
    allowed = keep[..., :, None] & keep[..., None, :] & jnp.broadcast_to(upper, square.shape)
    flat = square.reshape(*reward.shape[:-1], -1)
    allowed = allowed.reshape(flat.shape)
    key_tie, key_swap = jax.random.split(key)
    best = _pick(flat, allowed, _priority(key_tie, flat))
    swap = jax.random.bernoulli(key_swap, shape=best.shape)
    row, column = best // responses, best % responses
    valid = jnp.any(allowed & (flat > 0), axis=-1)
    return Pair(
        first=jnp.where(valid, jnp.where(swap, column, row), 0),
        second=jnp.where(valid, jnp.where(swap, row, column), 0),
        valid=valid,
    )


def uncertain_against(
    key: Key[Array, ""],
    reward: Float[Array, "*batch responses"],
    *,
    features: Float[Array, "*batch responses dim"],
    ellipsoid: Ellipsoid,
    main: Float[Array, "*batch dim"],
    where: Bool[Array, "*batch responses"] | None = None,
) -> Pair:
    """The enhancer of Option I on a sample (arXiv 2312.11456): the non-symmetric pair.

    `second` has the largest ||phi_j - main||_{Sigma^-1}, `main` the main agent's mean feature at
    the prompt; `first` is another response, drawn uniformly: the main agent's own draw. Reads no
    reward.
    """
    keep = _kept(reward, where)
    order = _priority(key, reward)
    shift = jnp.where(keep[..., None], features - main[..., None, :], 0.0)
    second = _pick(ellipsoids.norm(ellipsoid, shift), keep, order)
    first = _pick(jnp.zeros_like(reward), keep & ~_one_hot(second, reward), order)
    return _pair(first, second, keep)


def first_round(
    key: Key[Array, ""],
    reward: Float[Array, "*batch responses"],
    *,
    decide: Callable[[Key[Array, ""], Array], Array] = bradley_terry.sample,
    where: Bool[Array, "*batch responses"] | None = None,
) -> Pair:
    """Random disjoint pairs, `first` the winner: "first-round-rank" of RSO (arXiv 2309.06657, 3.4).

    `decide(key, margin)` is True where the first of a match wins: a draw from Bradley-Terry, or
    :func:`higher`. Fields are ``[*batch, responses // 2]``; with n kept
    responses n // 2 matches are valid.
    """
    return _bracket(key, reward, decide, where, rounds=1)


def tournament(
    key: Key[Array, ""],
    reward: Float[Array, "*batch responses"],
    *,
    decide: Callable[[Key[Array, ""], Array], Array] = bradley_terry.sample,
    where: Bool[Array, "*batch responses"] | None = None,
) -> Pair:
    """All matches of a knock-out in random order, `first` the winner: "tournament-rank" of RSO.

    As :func:`first_round`, its matches first, and the winners go on until one is left: fields are
    ``[*batch, responses - 1]``; with n kept responses n - 1 matches are valid.
    """
    return _bracket(key, reward, decide, where, rounds=None)


def higher(key: Key[Array, ""], margin: Float[Array, "*batch"]) -> Bool[Array, "*batch"]:
    """True where the first has the higher reward; a fair coin's throw where they are equal.

    >>> higher(jax.random.key(0), jnp.array([-0.1, 0.1])).tolist()
    [False, True]
    """
    return jnp.where(margin == 0, jax.random.bernoulli(key, shape=margin.shape), margin > 0)


def distinct(
    rows: Shaped[Array, "*batch responses width"],
) -> Bool[Array, "*batch responses"]:
    """True at the first copy of each response: a `where` that removes duplicates.

    `rows` are features, or token ids with one pad id after the end.

    >>> distinct(jnp.array([[1, 2], [3, 4], [1, 2]])).tolist()
    [True, True, False]
    """
    same = jnp.all(rows[..., :, None, :] == rows[..., None, :, :], axis=-1)
    earlier = jnp.tril(jnp.ones(same.shape[-2:], bool), -1)
    return ~jnp.any(same & jnp.broadcast_to(earlier, same.shape), axis=-1)


def _bracket(key, reward, decide, where, *, rounds):
    keep = _kept(reward, where)
    order = jnp.argsort(_priority(key, reward), axis=-1)
    # Kept responses first: as many first-round matches as there can be.
    kept = jnp.take_along_axis(keep, order, axis=-1)
    alive = jnp.take_along_axis(order, jnp.argsort(~kept, axis=-1, stable=True), axis=-1)
    score = jnp.where(keep, reward, 0.0)
    matches = []
    while alive.shape[-1] > 1 and (rounds is None or len(matches) < rounds):
        even = alive.shape[-1] // 2 * 2
        # Neighbours meet, so that kept responses meet kept ones; an odd one out goes on unbeaten.
        one, two, bye = alive[..., :even:2], alive[..., 1:even:2], alive[..., even:]
        margin = jnp.take_along_axis(score, one, -1) - jnp.take_along_axis(score, two, -1)
        ok_one = jnp.take_along_axis(keep, one, axis=-1)
        ok_two = jnp.take_along_axis(keep, two, axis=-1)
        wins = decide(jax.random.fold_in(key, len(matches) + 1), margin)
        wins = jnp.where(ok_one & ok_two, wins, ok_one)
        winner, loser = jnp.where(wins, one, two), jnp.where(wins, two, one)
        valid = ok_one & ok_two
        matches.append(Pair(jnp.where(valid, winner, 0), jnp.where(valid, loser, 0), valid))
        alive = jnp.concatenate([winner, bye], axis=-1)
    if not matches:
        empty = jnp.zeros((*reward.shape[:-1], 0), order.dtype)
        return Pair(empty, empty, empty.astype(bool))
    return Pair(*(jnp.concatenate(field, axis=-1) for field in zip(*matches, strict=True)))


def _kept(reward, where):
    if reward.ndim == 0 or reward.shape[-1] == 0:
        raise ValueError(f"reward needs at least one response on its last axis, got {reward.shape}")
    return jnp.ones(reward.shape, bool) if where is None else where


def _priority(key, score):
    """Random order of the entries; of 31 bits, so that a collision is rare."""
    return (jax.random.bits(key, score.shape, "uint32") >> 1).astype(jnp.int32)


def _pick(score, allowed, priority):
    """Index of the largest allowed score, ties by the largest priority."""
    top = jnp.max(jnp.where(allowed, score, -jnp.inf), axis=-1, keepdims=True)
    tied = allowed & (score == top)
    return jnp.argmax(jnp.where(tied, priority, -1), axis=-1)


def _one_hot(index, like):
    return jax.nn.one_hot(index, like.shape[-1], dtype=jnp.bool_)


def _pair(first, second, keep):
    valid = jnp.sum(keep, axis=-1) >= 2
    return Pair(jnp.where(valid, first, 0), jnp.where(valid, second, 0), valid)
