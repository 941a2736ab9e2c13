r"""Which two of the choices in a context are shown to the one who prefers.

A rule is a value, ``rule(key, choices) -> Pair``, on a choice set (:mod:`core.choices`) with
leading axes free. The same object is handed to ``bandit.from_rule(rule, samples=8)`` and to
``rounds.iterate(pair_rule=rule)``. What a rule reads it requires by name; a rule that reads no
reward needs none. A rule's own settings are keyword-only with a default, so that
``functools.partial(tournament, decide=higher)`` is a rule again.

The two indices always differ. Ties are broken uniformly at random by the key; a pair whose two
rewards are equal is no pair to a rule that ranks (as in the code of arXiv 2405.07863), so a belief
that knows nothing makes none: :func:`otherwise` says what then. Where no pair can be made, `valid`
is False and the indices are 0. A reward that is NaN counts as masked.

Axes: ``batch`` (free: contexts or prompts), ``choices``, ``dim`` (features), ``pairs``.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jax_klrlhf.core import bradley_terry
from jax_klrlhf.core import ellipsoid as ellipsoids
from jax_klrlhf.core import enhancer as enhancers
from jax_klrlhf.core.choices import Choices
from jax_klrlhf.core.numerics import Scalar


class Pair(NamedTuple):
    """Two choices in each context, or ``[..., pairs]`` of them."""

    first: Int[Array, "..."]
    """Index into the choices axis."""
    second: Int[Array, "..."]
    """Index into the choices axis."""
    valid: Bool[Array, "..."]
    """False where no pair could be made."""


PairRule = Callable[[Key[Array, ""], Choices], Pair]
"""``rule(key, choices) -> Pair``."""

Pick = Callable[[Key[Array, ""], Choices, Bool[Array, "*batch choices"]], Int[Array, "*batch"]]
"""``pick(key, choices, allowed) -> index``: one of the allowed choices in each context."""


def best_worst(key: Key[Array, ""], choices: Choices) -> Pair:
    """Highest against lowest reward (arXiv 2312.11456, section 5; 2405.07863: best and worst of 8).

    >>> from jax_klrlhf.core.choices import enumerated
    >>> three = enumerated(jnp.log(jnp.ones(3) / 3), reward=jnp.array([0.0, 2.0, 1.0]))
    >>> pair = best_worst(jax.random.key(0), three)
    >>> int(pair.first), int(pair.second)
    (1, 0)
    """
    reward = choices.require("reward", by="best_worst")
    key_first, key_second = jax.random.split(key)
    keep = _ranked(choices, reward)
    first = _pick(key_first, reward, keep)
    second = _pick(key_second, -reward, keep & ~_one_hot(first, reward))
    return _ranked_pair(first, second, keep, reward)


def best_second(key: Key[Array, ""], choices: Choices) -> Pair:
    """Highest against second highest reward: the hardest comparison at the top."""
    reward = choices.require("reward", by="best_second")
    key_first, key_second = jax.random.split(key)
    keep = _ranked(choices, reward)
    first = _pick(key_first, reward, keep)
    second = _pick(key_second, reward, keep & ~_one_hot(first, reward))
    return _ranked_pair(first, second, keep, reward)


def best_random(key: Key[Array, ""], choices: Choices) -> Pair:
    """Highest reward against another choice of the policy ("max_random" of arXiv 2405.07863).

    The other one is drawn by its mass, whatever its reward.
    """
    reward = choices.require("reward", by="best_random")
    key_first, key_second = jax.random.split(key)
    keep = _ranked(choices, reward) & (choices.log_mass > -jnp.inf)
    first = _pick(key_first, reward, keep)
    second = _draw(key_second, choices.log_mass, keep & ~_one_hot(first, reward))
    return _ranked_pair(first, second, keep, reward)


def sampled(key: Key[Array, ""], choices: Choices) -> Pair:
    """Two different draws of the policy that chose: an on-policy pair. Reads no reward.

    The first by its mass, the second by its mass among the others.
    """
    key_first, key_second = jax.random.split(key)
    keep = _possible(choices)
    first = _draw(key_first, choices.log_mass, keep)
    second = _draw(key_second, choices.log_mass, keep & ~_one_hot(first, keep))
    return _pair(first, second, jnp.sum(keep, axis=-1) >= 2)


def most_uncertain(
    key: Key[Array, ""],
    choices: Choices,
    *,
    curvature: Callable[[Array], Array] = bradley_terry.curvature,
) -> Pair:
    r"""The pair whose label says most of theta, in random order (arXiv 2402.10500).

    .. math:: \arg\max_{i, j}\; \sigma'(r_i - r_j)\, \|\phi_i - \phi_j\|^2_{\Sigma^{-1}}

    the Fisher information of the label against what Sigma holds already; Sigma itself should be
    weighted by the curvature too (``bandit.reward_learner(curvature=)``).
    The norm alone, ``curvature=jnp.ones_like``, asks for answers that are known: at large margins
    it is no better than random. Where all choices have the same features every pair is worthless
    to a linear reward: `valid` is False.
    """
    features, ellipsoid, reward = choices.require(
        "features", "ellipsoid", "reward", by="most_uncertain"
    )
    keep = _ranked(choices, reward)
    reward = jnp.where(keep, reward, 0)
    white = ellipsoids.whiten(ellipsoid, jnp.where(keep[..., None], features, 0))
    # Differences, not |a|^2 + |b|^2 - 2ab, which would lose close pairs. Equality is judged before
    # the solve, whose round-off depends on the position of a row.
    shift = white[..., :, None, :] - white[..., None, :, :]
    differ = jnp.any(features[..., :, None, :] != features[..., None, :, :], axis=-1)
    margin = reward[..., :, None] - reward[..., None, :]
    gain = jnp.where(differ, curvature(margin) * jnp.sum(shift**2, axis=-1), 0)
    count = keep.shape[-1]
    upper = jnp.triu(jnp.ones((count, count), bool), 1)
    allowed = keep[..., :, None] & keep[..., None, :] & jnp.broadcast_to(upper, gain.shape)
    flat = gain.reshape(*keep.shape[:-1], -1)
    allowed = allowed.reshape(flat.shape)
    key_tie, key_swap = jax.random.split(key)
    best = _pick(key_tie, flat, allowed)
    swap = jax.random.bernoulli(key_swap, shape=best.shape)
    row, column = best // count, best % count
    valid = jnp.any(allowed & (flat > 0), axis=-1)
    return _pair(jnp.where(swap, column, row), jnp.where(swap, row, column), valid)


def against(opponent: Callable[[Choices], Float[Array, "*batch choices"]]) -> PairRule:
    """The main agent's draw against an opponent's: non-symmetric exploration (arXiv 2312.11456).

    ``opponent(choices)`` gives the log-weights of another policy over the same choices
    (:mod:`core.enhancer`). `second` is drawn by them, `first` by its mass among the others: the
    main agent's draw, given that it is another one.
    """

    def rule(key: Key[Array, ""], choices: Choices) -> Pair:
        key_first, key_second = jax.random.split(key)
        weight = opponent(choices)
        keep = _possible(choices)
        able = choices.where & (weight > -jnp.inf)
        second = _draw(key_second, weight, able)
        others = keep & ~_one_hot(second, keep)
        first = _draw(key_first, choices.log_mass, others)
        return _pair(first, second, jnp.any(able, axis=-1) & jnp.any(others, axis=-1))

    return rule


def enhancer(
    *,
    kl_coef: Scalar,
    radius: Scalar = 1.0,
    option: Callable[..., enhancers.Enhancer] = enhancers.option_one,
) -> PairRule:
    """The main agent against the enhancer of online GSHF, Option I (arXiv 2312.11456, Alg. 2).

    ``option`` is :func:`core.enhancer.option_one` or :func:`core.enhancer.best_of_n`, or another
    of that signature. The choices are the main agent's own, all listed or drawn.
    """
    return against(lambda given: option(given, kl_coef=kl_coef, radius=radius).log_prob)


def against_reference(key: Key[Array, ""], choices: Choices) -> Pair:
    """The main agent against pi0: Option II, by :func:`core.enhancer.option_two`."""
    return against(enhancers.option_two)(key, choices)


def uncertain_against(key: Key[Array, ""], choices: Choices) -> Pair:
    """The main agent against the choice farthest from its mean: an enhancer without a budget."""
    return against(enhancers.farthest)(key, choices)


def between_agents(*, first: Pick | None = None, second: Pick | None = None) -> PairRule:
    """One choice of the main agent, one of another agent.

    ``first`` picks among the main agent's, ``second`` among the others': :func:`any_one` by
    default, :func:`best`, :func:`worst`, or another. Against pi0's draws this is Option II of
    online GSHF (arXiv 2312.11456, Algorithm 2). A copy of what the main agent plays is no opponent
    where ``features`` or ``number`` tell that it is one (token rows do, in ``rounds``).
    """
    pick_first, pick_second = first or any_one, second or any_one

    def rule(key: Key[Array, ""], choices: Choices) -> Pair:
        agent, number = choices.require("agent", "number", by="between_agents")
        key_first, key_second = jax.random.split(key)
        main = choices.where & (agent == 0)
        one = pick_first(key_first, choices, main)
        played = jnp.take_along_axis(number, one[..., None], axis=-1)
        others = choices.where & (agent != 0) & (number != played)
        two = pick_second(key_second, choices, others)
        return _pair(one, two, jnp.any(main, axis=-1) & jnp.any(others, axis=-1))

    return rule


def any_one(
    key: Key[Array, ""], choices: Choices, allowed: Bool[Array, "*batch choices"]
) -> Int[Array, "*batch"]:
    """One of the allowed choices, by its mass."""
    return _draw(key, choices.log_mass, allowed)


def best(
    key: Key[Array, ""], choices: Choices, allowed: Bool[Array, "*batch choices"]
) -> Int[Array, "*batch"]:
    """The allowed choice of the highest reward."""
    return _pick(key, choices.require("reward", by="best"), allowed)


def worst(
    key: Key[Array, ""], choices: Choices, allowed: Bool[Array, "*batch choices"]
) -> Int[Array, "*batch"]:
    """The allowed choice of the lowest reward."""
    return _pick(key, -choices.require("reward", by="worst"), allowed)


def otherwise(rule: PairRule, fallback: PairRule) -> PairRule:
    """`rule`, and in the contexts where it makes no pair, `fallback`: both of one pair a context.

    ``otherwise(best_worst, sampled)`` begins with on-policy pairs while the belief ranks nothing.
    """

    def both(key: Key[Array, ""], choices: Choices) -> Pair:
        key_rule, key_fallback = jax.random.split(key)
        one, two = rule(key_rule, choices), fallback(key_fallback, choices)
        return jax.tree.map(lambda a, b: jnp.where(one.valid, a, b), one, two)

    return both


def first_round(
    key: Key[Array, ""],
    choices: Choices,
    *,
    decide: Callable[[Key[Array, ""], Array], Array] = bradley_terry.sample,
) -> Pair:
    """Random disjoint pairs, `first` the winner: "first-round-rank" of RSO (arXiv 2309.06657, 3.4).

    `decide(key, margin)` is True where the first of a match wins: a draw from Bradley-Terry, or
    :func:`higher`. Fields are ``[*batch, choices // 2]``; with n kept choices n // 2 matches are
    valid.
    """
    return _bracket(key, choices, decide, rounds=1, by="first_round")


def tournament(
    key: Key[Array, ""],
    choices: Choices,
    *,
    decide: Callable[[Key[Array, ""], Array], Array] = bradley_terry.sample,
) -> Pair:
    """All matches of a knock-out in random order, `first` the winner: "tournament-rank" of RSO.

    As :func:`first_round`, its matches first, and the winners go on until one is left: fields are
    ``[*batch, choices - 1]``; with n kept choices n - 1 matches are valid.
    """
    return _bracket(key, choices, decide, rounds=None, by="tournament")


def higher(key: Key[Array, ""], margin: Float[Array, "*batch"]) -> Bool[Array, "*batch"]:
    """True where the first has the higher reward; a fair coin's throw where they are equal.

    >>> higher(jax.random.key(0), jnp.array([-0.1, 0.1])).tolist()
    [False, True]
    """
    return jnp.where(margin == 0, jax.random.bernoulli(key, shape=margin.shape), margin > 0)


def _bracket(key, choices, decide, *, rounds, by):
    reward = choices.require("reward", by=by)
    keep = choices.where
    key_order, key_matches = jax.random.split(key)
    order = jnp.argsort(_priority(key_order, keep.shape), axis=-1)
    # Kept choices first: as many first-round matches as there can be.
    kept = jnp.take_along_axis(keep, order, axis=-1)
    alive = jnp.take_along_axis(order, jnp.argsort(~kept, axis=-1, stable=True), axis=-1)
    score = jnp.where(keep, reward, 0)
    matches = []
    while alive.shape[-1] > 1 and (rounds is None or len(matches) < rounds):
        even = alive.shape[-1] // 2 * 2
        # Neighbours meet, so that kept choices meet kept ones; an odd one out goes on unbeaten.
        one, two, bye = alive[..., :even:2], alive[..., 1:even:2], alive[..., even:]
        margin = jnp.take_along_axis(score, one, -1) - jnp.take_along_axis(score, two, -1)
        ok_one = jnp.take_along_axis(keep, one, axis=-1)
        ok_two = jnp.take_along_axis(keep, two, axis=-1)
        wins = decide(jax.random.fold_in(key_matches, len(matches)), margin)
        wins = jnp.where(ok_one & ok_two, wins, ok_one)
        winner, loser = jnp.where(wins, one, two), jnp.where(wins, two, one)
        valid = ok_one & ok_two
        matches.append(Pair(jnp.where(valid, winner, 0), jnp.where(valid, loser, 0), valid))
        alive = jnp.concatenate([winner, bye], axis=-1)
    if not matches:
        empty = jnp.zeros((*keep.shape[:-1], 0), order.dtype)
        return Pair(empty, empty, empty.astype(bool))
    return Pair(*(jnp.concatenate(field, axis=-1) for field in zip(*matches, strict=True)))


def _possible(choices: Choices) -> Bool[Array, "*batch choices"]:
    """What the main agent may play."""
    keep = choices.where & (choices.log_mass > -jnp.inf)
    return keep if choices.agent is None else keep & (choices.agent == 0)


def _ranked(choices: Choices, reward: Array) -> Bool[Array, "*batch choices"]:
    return choices.where & ~jnp.isnan(reward)


def _priority(key, shape):
    """Random order of the entries; of 31 bits, so that a collision is rare."""
    return (jax.random.bits(key, shape, "uint32") >> 1).astype(jnp.int32)


def _pick(key, score, allowed):
    """Index of the largest allowed score, ties at random."""
    top = jnp.max(jnp.where(allowed, score, -jnp.inf), axis=-1, keepdims=True)
    tied = allowed & (score == top)
    return jnp.argmax(jnp.where(tied, _priority(key, score.shape), -1), axis=-1)


def _draw(key, log_weight, allowed):
    """Index of an allowed choice, drawn by its weight."""
    noise = jax.random.gumbel(key, log_weight.shape, log_weight.dtype)
    score = jnp.where(allowed, jnp.where(allowed, log_weight, 0) + noise, -jnp.inf)
    return jnp.argmax(score, axis=-1)


def _one_hot(index, like):
    return jax.nn.one_hot(index, like.shape[-1], dtype=jnp.bool_)


def _ranked_pair(first, second, keep, reward):
    won, lost = (jnp.take_along_axis(reward, at[..., None], -1)[..., 0] for at in (first, second))
    return _pair(first, second, (jnp.sum(keep, axis=-1) >= 2) & (won != lost))


def _pair(first, second, valid):
    return Pair(jnp.where(valid, first, 0), jnp.where(valid, second, 0), valid)
