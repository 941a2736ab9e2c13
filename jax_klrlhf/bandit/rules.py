r"""Any pair rule, and any target of improvement, as a learner of the exact bandit.

The rules are :mod:`core.pairs`'s and the targets :mod:`core.targets`'s, the very objects that train
language models: what runs there on K responses of a network runs here on all actions, or on n
actions drawn from the learner's policy, and is evaluated exactly.

    learner = from_rule(pairs.best_worst, samples=8)
    simulate(key, problem, learner, rounds=10, batch=64)

Axes: ``contexts``, ``actions``, ``dim``, ``batch``, ``samples``.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jax_klrlhf.bandit.learner import Estimate, Learner, Proposal, mle_policy, reward_learner
from jax_klrlhf.bandit.pessimism import nu_of_contexts
from jax_klrlhf.bandit.problem import Setting
from jax_klrlhf.core import choices as choice_sets
from jax_klrlhf.core import ellipsoid, pairs
from jax_klrlhf.core.choices import Choices
from jax_klrlhf.core.numerics import Scalar
from jax_klrlhf.core.pairs import Pair, PairRule
from jax_klrlhf.core.targets import Target

Policy = Callable[[Setting, Estimate], Float[Array, "contexts actions"]]
"""``policy(setting, state) -> log_prob``."""


def reference(setting: Setting, state: Estimate) -> Float[Array, "contexts actions"]:
    """pi0, as a policy of the learner's state."""
    del state
    return setting.ref_log_prob


def choices(
    setting: Setting,
    state: Estimate,
    log_prob: Float[Array, "contexts actions"],
    *,
    nu: Float[Array, "..."] | None = None,
) -> Choices:
    """All actions of every context as a choice set, under a policy, as the estimate sees them.

    ``uncertainty`` is per unit of radius, from ``nu`` (:mod:`.pessimism`; E phi under pi0). Of
    rewards that are not linear the features are their gradients at the estimate.
    """
    local = setting.local(state.theta)
    shift = local.features - nu_of_contexts(local, nu)[:, None, :]
    return choice_sets.enumerated(
        log_prob,
        where=setting.where,
        ref_log_prob=setting.ref_log_prob,
        reward=setting.reward(state.theta),
        uncertainty=ellipsoid.norm(state.ellipsoid, shift),
        features=local.features,
        ellipsoid=state.ellipsoid,
        context_prob=setting.context_prob,
    )


def at_contexts(every: Choices, context: Int[Array, " batch"]) -> Choices:
    """The choice sets of drawn contexts: all of them count alike."""
    fields = {
        name: value[context]
        for name in (
            "where", "log_mass", "log_prob", "ref_log_prob", "reward", "uncertainty", "features",
            "agent", "number",
        )
        if (value := getattr(every, name)) is not None
    }  # fmt: skip
    if every.rewards is not None:
        fields["rewards"] = every.rewards[:, context]
    return every._replace(context_prob=None, **fields)


def from_rule(
    rule: PairRule,
    *,
    samples: int | None = None,
    opponent: Policy | None = None,
    fallback: PairRule | None = pairs.sampled,
    policy: Policy = mle_policy,
    ridge: Scalar = 1.0,
    bound: Scalar | None = None,
    curvature: Callable[[Array], Array] | None = None,
) -> Learner:
    """A learner that asks for the pairs of a rule, ``rule(key, choices) -> Pair``.

    Args:
        rule: of :mod:`core.pairs`, or another.
        samples: actions drawn, with replacement, from ``policy`` at each drawn context, among which
            the rule chooses; None: it chooses among all actions. Of a rule that makes several pairs
            one is taken at random.
        opponent: a second agent whose actions stand beside the main agent's, drawn or listed as
            those (:func:`reference` for pi0): for :func:`pairs.between_agents`.
        fallback: the rule where ``rule`` makes no pair, as a ranking one makes none before any
            data; None: such a comparison is wasted on an action with itself.
        policy: what is deployed, and what the actions are drawn from.
        ridge: of the estimate and of Sigma.
        bound: as in :func:`~jax_klrlhf.bandit.learner.reward_learner`.
        curvature: by which Sigma is weighted, as there.
    """

    def propose(
        key: Key[Array, ""], setting: Setting, state: Estimate, context: Int[Array, " batch"]
    ) -> Proposal:
        key_draw, key_rule, key_match, key_other = jax.random.split(key, 4)
        agents = [policy] if opponent is None else [policy, opponent]
        sets = [
            at_contexts(choices(setting, state, agent(setting, state)), context) for agent in agents
        ]
        if samples is not None:
            sets = [
                choice_sets.sample(jax.random.fold_in(key_draw, number), every, samples)
                for number, every in enumerate(sets)
            ]
        given = sets[0] if opponent is None else choice_sets.together(*sets)
        pair = one_match(key_match, rule(key_rule, given))
        if fallback is not None:
            key_other, key_again = jax.random.split(key_other)
            other = one_match(key_again, fallback(key_other, given))
            pair = jax.tree.map(lambda a, b: jnp.where(pair.valid, a, b), pair, other)
        number = given.require("number", by="from_rule")
        # Without two different actions to compare: one in play, against itself.
        only = jnp.argmax(given.where, -1)[:, None]
        first, second = (
            jnp.take_along_axis(number, jnp.where(pair.valid[:, None], at[:, None], only), -1)[:, 0]
            for at in (pair.first, pair.second)
        )
        return Proposal(first, second)

    return reward_learner(propose, policy, ridge=ridge, bound=bound, curvature=curvature)


def from_target(
    target: Target,
    *,
    rule: PairRule = pairs.sampled,
    samples: int | None = 2,
    ridge: Scalar = 1.0,
    bound: Scalar | None = None,
) -> Learner:
    """A learner that deploys a target over all of pi0's actions: best-of-n, an accepted draw, ...

    ``target`` is of :mod:`core.targets`, ``functools.partial(targets.best_of, n=8)``; the pairs are
    those that ``rule`` makes of ``samples`` draws of what is deployed (:func:`from_rule`).
    """

    def policy(setting: Setting, state: Estimate) -> Float[Array, "contexts actions"]:
        return target(choices(setting, state, setting.ref_log_prob))

    return from_rule(rule, samples=samples, policy=policy, ridge=ridge, bound=bound)


def one_match(key: Key[Array, ""], pair: Pair) -> Pair:
    """One of the valid pairs of each context, where there are several."""
    if pair.first.ndim == 1:
        return pair
    noise = jax.random.uniform(key, pair.valid.shape)
    at = jnp.argmax(jnp.where(pair.valid, noise, -1), axis=-1)[:, None]
    return jax.tree.map(lambda leaf: jnp.take_along_axis(leaf, at, -1)[:, 0], pair)
