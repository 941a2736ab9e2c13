r"""K things to choose among in each context: the shared currency of both worlds.

============================ ========================== =============================== ============
world                        choices                    constructor                     expectations
============================ ========================== =============================== ============
bandit, enumerated           all actions                :func:`enumerated`              exact sums
bandit, drawn                n actions of a policy      :func:`sample`                  over draws
language model               K responses of a policy    :func:`drawn`                   over draws
exact language bandit        every response             :func:`enumerated`              exact sums
============================ ========================== =============================== ============

A pair rule, an enhancer, an acceptance, a weighting, a bonus is a function of a :class:`Choices`
(and a key), so one object runs in all four. What makes that exact is the **mass**: the weight of
each choice in an expectation under the policy that chose, its probability where every choice is
listed and 1/K where K were drawn. Nothing else depends on the world.

Only `where`, `log_mass` and `law` are always there; any other field may be absent (None), and who
needs it says so by name (:meth:`Choices.require`). Copies of one drawn response are one choice: the
first stands for all and carries their mass, the others are masked.

Axes: ``batch`` (free: contexts or prompts), ``choices`` (always last), ``dim`` (features),
``members`` (of a belief, leading).
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from jax_klrlhf.core.ellipsoid import Ellipsoid


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Law:
    """How the choices were come by: static, so that a program may depend on it."""

    kind: Literal["enumerated", "drawn"]


ENUMERATED = Law("enumerated")
"""Every choice is listed; its mass is its probability."""

DRAWN = Law("drawn")
"""Independent draws; each has mass 1 / K, and a copy's goes to the first of its kind."""

PROVIDERS = {
    "log_prob": "a policy's log-probabilities of its own choices",
    "ref_log_prob": "log pi0 of the choices: score them under the reference",
    "reward": "a belief's rewards: a fitted reward model, a linear estimate, a known judge",
    "uncertainty": "a belief that knows how sure it is: a linear one with a radius, an ensemble",
    "features": "a belief that is linear in features: bandit.reward_learner, rounds.linear(...)",
    "ellipsoid": "a belief that is linear in features: bandit.reward_learner, rounds.linear(...)",
    "rewards": "a belief with members: an ensemble, draws of a posterior",
    "agent": "a sampler of two agents (against_base, mixture): all choices here are of one policy",
    "context_prob": "a problem whose contexts are listed",
    "number": "choices.enumerated and choices.drawn",
}
"""Who provides each field, for the one who misses it."""


class Choices(NamedTuple):
    """What can be chosen in each context, and what is known of each choice; a pytree."""

    where: Bool[Array, "*batch choices"]
    """True: may be chosen. False at what does not exist and at copies."""
    log_mass: Float[Array, "*batch choices"]
    """Log-weight in an expectation under the policy that chose; -inf where it has none."""
    law: Law = DRAWN
    """:data:`ENUMERATED` or :data:`DRAWN`."""
    log_prob: Float[Array, "*batch choices"] | None = None
    """Under the policy that chose, in nats."""
    ref_log_prob: Float[Array, "*batch choices"] | None = None
    """Under pi0, in nats."""
    reward: Float[Array, "*batch choices"] | None = None
    """What is believed of each choice, in nats of the Bradley-Terry logit."""
    uncertainty: Float[Array, "*batch choices"] | None = None
    """Of the reward, in the same unit."""
    features: Float[Array, "*batch choices dim"] | None = None
    """phi(x, a) of a linear reward."""
    ellipsoid: Ellipsoid | None = None
    """In whose norm ||.||_{Sigma^-1} the features' differences are uncertain."""
    rewards: Float[Array, "members *batch choices"] | None = None
    """Of each member of a belief: of an ensemble, of a posterior, of a group of people."""
    agent: Int[Array, "*batch choices"] | None = None
    """Who chose it, 0 the main agent, where there are several; the mass is each one's own law."""
    number: Int[Array, "*batch choices"] | None = None
    """Which thing each choice is: its place in a listed set, or that of its first copy."""
    context_prob: Float[Array, "*batch"] | None = None
    """Weight of each context in an expectation over contexts; None: all alike."""

    def require(self, *names: str, by: str) -> Any:
        """The named fields: one as itself, several as a tuple.

        Raises:
            ValueError: where one is absent, with its name, who needs it and who provides it.
        """
        for name in names:
            if getattr(self, name) is None:
                raise ValueError(
                    f"{by} needs `{name}`, which this choice set does not have; it comes from "
                    f"{PROVIDERS[name]}."
                )
        found = tuple(getattr(self, name) for name in names)
        return found[0] if len(found) == 1 else found

    @property
    def mass(self) -> Float[Array, "*batch choices"]:
        """Of the main agent's choices, kept ones only, normalized; 0 throughout without any."""
        keep = self.where if self.agent is None else self.where & (self.agent == 0)
        weight = jnp.where(keep, jnp.exp(jnp.where(keep, self.log_mass, 0)), 0)
        total = jnp.sum(weight, axis=-1, keepdims=True)
        return weight / jnp.where(total > 0, total, 1)


def enumerated(
    log_prob: Float[Array, "*batch choices"],
    *,
    where: Bool[Array, "*batch choices"] | None = None,
    **fields: Any,
) -> Choices:
    """Every choice of each context, under a policy: all actions, or every response.

    `fields` are further fields of :class:`Choices`. Masked choices have no mass.

    >>> every = enumerated(jnp.log(jnp.array([0.25, 0.75])))
    >>> float(expectation(every, jnp.array([4.0, 8.0])))
    7.0
    """
    where = jnp.ones(log_prob.shape, bool) if where is None else where
    mass = jnp.where(where, log_prob, -jnp.inf)
    fields.setdefault("number", _numbered(where))
    return Choices(where, mass, ENUMERATED, log_prob=log_prob, **fields)


def drawn(
    rows: Shaped[Array, "*batch choices width"],
    *,
    where: Bool[Array, "*batch choices"] | None = None,
    agent: Int[Array, "*batch choices"] | None = None,
    **fields: Any,
) -> Choices:
    """K independent draws of a policy, or some of each of several agents.

    Equal `rows` (token ids with one pad id after the end, or an index) are copies of one choice:
    the first one kept has the mass of all and the others are masked. With several agents copies
    are told apart by who drew them, and each agent's mass sums to 1. `where` masks draws that do
    not count at all.

    >>> two = drawn(jnp.array([[1], [2], [1]]))
    >>> two.where.tolist(), [round(float(m), 4) for m in two.mass]
    ([True, True, False], [0.6667, 0.3333, 0.0])
    """
    same = jnp.all(rows[..., :, None, :] == rows[..., None, :, :], axis=-1)
    fields.setdefault("number", jnp.argmax(same, axis=-1).astype(jnp.int32))
    keep = jnp.ones(rows.shape[:-1], bool) if where is None else where
    peers = jnp.broadcast_to(keep[..., None, :], same.shape)
    if agent is not None:
        own = agent[..., :, None] == agent[..., None, :]
        same, peers = same & own, peers & own
    same = same & peers
    first = keep & ~jnp.any(same & _earlier(same), axis=-1)
    dtype = next(
        (x.dtype for x in (fields.get("log_prob"), fields.get("reward")) if x is not None),
        jnp.result_type(float),
    )
    copies, total = (jnp.sum(x, axis=-1, dtype=dtype) for x in (same, peers))
    mass = jnp.where(first, jnp.log(jnp.where(first, copies, 1)) - jnp.log(total), -jnp.inf)
    return Choices(first, mass, DRAWN, agent=agent, **fields)


def sample(key: Key[Array, ""], every: Choices, samples: int) -> Choices:
    """`samples` independent draws, with replacement, from the main agent of a listed set.

    Every field is looked up at the draws, `number` says which they are, and copies are one choice.

    Raises:
        ValueError: for fewer than one sample.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    cumulative = jnp.cumsum(every.mass, axis=-1)
    shape = (*cumulative.shape[:-1], samples)
    # Scaled to stay below the total, so that rounding never selects what has no mass.
    total = cumulative[..., -1:] * (1 - jnp.finfo(cumulative.dtype).eps)
    below = jax.random.uniform(key, shape, cumulative.dtype) * total
    index = jnp.sum(cumulative[..., None, :] <= below[..., :, None], axis=-1, dtype=jnp.int32)
    return take(every, index)


def take(every: Choices, index: Int[Array, "*batch samples"]) -> Choices:
    """The choices at `index` of a listed set, as draws: copies are one choice."""

    def at(field: Array | None) -> Array | None:
        return None if field is None else jnp.take_along_axis(field, index, axis=-1)

    features, rewards = every.features, every.rewards
    if features is not None:
        features = jnp.take_along_axis(features, index[..., None], axis=-2)
    if rewards is not None:
        rewards = jnp.take_along_axis(
            rewards, jnp.broadcast_to(index[None], (len(rewards), *index.shape)), axis=-1
        )
    return drawn(
        index[..., None],
        where=at(every.where),
        log_prob=at(every.log_prob),
        ref_log_prob=at(every.ref_log_prob),
        reward=at(every.reward),
        uncertainty=at(every.uncertainty),
        features=features,
        ellipsoid=every.ellipsoid,
        rewards=rewards,
        number=index,
        context_prob=every.context_prob,
    )


def together(*agents: Choices) -> Choices:
    """The choices of several agents side by side, the first the main agent's.

    A field is there where every agent has it; of what holds for all (ellipsoid, contexts) the
    first one's.

    Raises:
        ValueError: without an agent, or where some list their choices and others draw them.
    """
    if not agents or len({given.law for given in agents}) > 1:
        raise ValueError("together needs agents that all list or all draw their choices.")

    def side_by_side(name: str, axis: int) -> Array | None:
        parts = [getattr(given, name) for given in agents]
        return None if any(x is None for x in parts) else jnp.concatenate(parts, axis=axis)

    names = ("where", "log_mass", "log_prob", "ref_log_prob", "reward", "uncertainty", "rewards")
    fields = {name: side_by_side(name, -1) for name in (*names, "number")}
    fields["features"] = side_by_side("features", -2)
    fields["agent"] = jnp.concatenate(
        [jnp.full(given.where.shape, number, jnp.int32) for number, given in enumerate(agents)], -1
    )
    return agents[0]._replace(**fields)


def expectation(choices: Choices, value: Float[Array, "..."]) -> Float[Array, "..."]:
    """Mean of `value` under the policy that chose (the main agent), in each context.

    An exact sum over listed choices, the mean over draws otherwise. `value` is
    ``[*batch, choices]``, possibly with further axes behind (features). What stands at a choice
    without mass is not read.
    """
    mass = choices.mass
    mass = mass.reshape(*mass.shape, *(1 for _ in range(value.ndim - mass.ndim)))
    return jnp.sum(
        jnp.where(mass > 0, mass * jnp.where(mass > 0, value, 0), 0), axis=choices.where.ndim - 1
    )


def over_contexts(choices: Choices, value: Float[Array, "..."]) -> Float[Array, "..."]:
    """Mean of `value` ``[*batch, ...]`` over contexts: by `context_prob`, or of all alike."""
    batch = choices.where.ndim - 1
    flat = value.reshape(-1, *value.shape[batch:])
    if choices.context_prob is None:
        return jnp.mean(flat, axis=0)
    return jnp.tensordot(choices.context_prob.reshape(-1), flat, axes=1)


def distinct(
    rows: Shaped[Array, "*batch choices width"],
) -> Bool[Array, "*batch choices"]:
    """True at the first copy of each row: a `where` that removes duplicates.

    `rows` are features, or token ids with one pad id after the end.

    >>> distinct(jnp.array([[1, 2], [3, 4], [1, 2]])).tolist()
    [True, True, False]
    """
    same = jnp.all(rows[..., :, None, :] == rows[..., None, :, :], axis=-1)
    return ~jnp.any(same & _earlier(same), axis=-1)


def _numbered(where: Bool[Array, "*batch choices"]) -> Int[Array, "*batch choices"]:
    return jax.lax.broadcasted_iota(jnp.int32, where.shape, where.ndim - 1)


def _earlier(same: Bool[Array, "*batch choices choices"]) -> Bool[Array, "*batch choices choices"]:
    lower = jnp.tril(jnp.ones(same.shape[-2:], bool), -1)
    return jnp.broadcast_to(lower, same.shape)
