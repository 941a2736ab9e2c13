"""Run a learner against a problem: one `lax.scan`, made to be mapped over seeds.

    run = jax.jit(jax.vmap(lambda key: simulate(key, problem, learner, rounds=100, batch=32)))
    run(jax.random.split(jax.random.key(0), 256)).gap      # [256], exact, in units of reward

Nothing here is jitted; do it at the edge, as above. Memory doesn't grow with ``rounds`` unless a
``record`` is asked for (or the problem is so large that the comparisons themselves are fewer than
its pairs of actions: see ``history``).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jax_klrlhf.bandit import evaluate
from jax_klrlhf.bandit.evaluate import Round
from jax_klrlhf.bandit.learner import Learner
from jax_klrlhf.bandit.problem import Duels, Problem, draw_contexts, label
from jax_klrlhf.core.numerics import Scalar


class Run(NamedTuple):
    """The end of a run, and whatever was asked to be recorded."""

    state: Any
    """The learner's, after all data."""
    log_prob: Float[Array, "contexts actions"]
    """Of the final policy."""
    gap: Float[Array, ""]
    """Of the final policy, in units of reward."""
    record: Any
    """Leaves [rounds, ...]; None without ``record``."""
    total: Any
    """Sums over rounds; None without ``total``."""


def simulate(
    key: Key[Array, ""],
    problem: Problem,
    learner: Learner,
    *,
    rounds: int,
    batch: int,
    offline: Duels | None = None,
    used: Scalar | None = None,
    record: Callable[[Problem, Round], Any] | None = None,
    total: Callable[[Problem, Round], Any] | None = None,
) -> Run:
    """Let a learner collect ``rounds`` batches of comparisons, and evaluate it exactly.

    Each round draws contexts from d0, asks the learner for pairs, labels them by the problem's
    Bradley-Terry law, and updates the learner once. ``rounds=1`` with an offline learner is the
    offline problem with ``batch`` comparisons. ``offline`` comparisons are given to the learner
    before the first round (hybrid learning).

    ``used`` (at most ``batch``, may be traced) is the number of comparisons made per round, to
    sweep the batch size by ``vmap`` with static shapes; by default all of ``batch``.
    ``record(problem, round)`` is stacked over rounds, ``total(problem, round)`` summed; both see
    the round's state and policy before its update, so index t has seen ``t * batch`` comparisons.

    ValueError where rounds or batch are negative or zero.
    """
    if rounds < 1 or batch < 1:
        raise ValueError(f"rounds and batch must be positive, got {rounds} and {batch}")
    if not isinstance(learner, Learner):
        name = getattr(learner, "__name__", repr(learner))
        hint = f"; call it: {name}(...)" if callable(learner) else ""
        raise ValueError(
            f"learner must be a bandit.Learner, got the {type(learner).__name__} {name}{hint}."
        )
    setting = problem.setting
    warm = 0 if offline is None else offline.context.shape[0]
    state = learner.init(setting, capacity=warm + rounds * batch)
    if offline is not None:
        state = learner.update(setting, state, offline)
    dtype = problem.reward.dtype
    in_use = jnp.arange(batch) < (batch if used is None else used)

    def play(carry: tuple[Any, Any, Array], _: None) -> tuple[tuple[Any, Any, Array], Any]:
        state, sums, index = carry
        key_context, key_propose, key_label = jax.random.split(jax.random.fold_in(key, index), 3)
        context = draw_contexts(key_context, setting, batch=batch)
        pair = learner.propose(key_propose, setting, state, context)
        labels = label(key_label, problem, context, pair.first, pair.second)
        data = Duels(context, pair.first, pair.second, labels, in_use.astype(dtype))
        # Traced but not computed unless a record uses it: the compiler drops what has no reader.
        this = Round(index, state, learner.policy(setting, state), data)
        recorded = None if record is None else record(problem, this)
        if total is not None:
            sums = jax.tree.map(jnp.add, sums, total(problem, this))
        return (learner.update(setting, state, data), sums, index + 1), recorded

    sums = None
    if total is not None:
        start = Round(
            jnp.zeros((), jnp.int32), state, learner.policy(setting, state), _blank(batch, dtype)
        )
        sums = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(total, problem, start)
        )
    begin = (state, sums, jnp.zeros((), jnp.int32))
    (state, sums, _), records = jax.lax.scan(play, begin, length=rounds)
    log_prob = learner.policy(setting, state)
    return Run(state, log_prob, evaluate.gap(problem, log_prob), records, sums)


def _blank(batch: int, dtype: Any) -> Duels:
    index, number = jnp.zeros(batch, jnp.int32), jnp.zeros(batch, dtype)
    return Duels(index, index, index, number, number)
