r"""Which two responses are shown to the one who prefers: the core's rules on drawn responses.

A rule here is ``rule(key, drawn, scored) -> Chosen``. Copies of one response are one response: a
pair is always of two different ones, and a prompt whose responses are all alike makes none.

Axes: ``B`` prompts, ``K`` responses, ``D`` features, ``M`` pairs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from jax_klrlhf.core import ellipsoid, pairs
from jax_klrlhf.core.numerics import Scalar
from jax_klrlhf.core.pairs import Pair
from jax_klrlhf.training.rounds.parts import Chosen, Drawn, PairRule, Scored

Pick = Callable[[Array, Array, Array], Array]
"""``pick(key, reward [B, K], where [B, K]) -> index [B]``."""


def by_reward(rule: Callable[..., Pair] = pairs.best_worst) -> PairRule:
    """A rule of :mod:`core.pairs` on the reward: ``best_worst``, ``best_second``, ``sampled``, ...

    ``first_round`` and ``tournament`` make several pairs of a prompt.
    """

    @jax.jit
    def choose(key: Key[Array, ""], reward: Array, ids: Array) -> Pair:
        return rule(key, reward, where=pairs.distinct(ids))

    return lambda key, drawn, scored: _chosen(choose(key, scored.reward, drawn.responses.ids))


def most_uncertain(key: Key[Array, ""], drawn: Drawn, scored: Scored) -> Chosen:
    """The two responses whose reward difference is least known (:func:`pairs.most_uncertain`)."""
    features = _features(scored)
    return _chosen(_most_uncertain(key, scored.reward, features, drawn.responses.ids))


@jax.jit
def _most_uncertain(key: Key[Array, ""], reward: Array, features: Array, ids: Array) -> Pair:
    return pairs.most_uncertain(
        key, reward, features=features, ellipsoid=_euclidean(features), where=pairs.distinct(ids)
    )


class Enhancer(NamedTuple):
    """The enhancer's choice, and both sides of its constraint, in units of reward."""

    pair: Pair
    tried: Array
    """How many of the main agent's responses it chose from."""
    cost: Array
    """kl_coef times a bound of KL(enhancer || main agent)."""
    budget: Array
    """Estimated uncertainty of E[phi(enhancer) - phi(main agent)]."""


def enhancer(*, kl_coef: float) -> PairRule:
    """The main agent's draw against the most uncertain one within the KL budget.

    See :func:`choose_enhancer`. The belief must give features
    (:func:`~jax_klrlhf.training.rounds.linear`).
    """

    @jax.jit
    def choose(key: Key[Array, ""], features: Array, ids: Array) -> Pair:
        return choose_enhancer(key, features, kl_coef=kl_coef, where=pairs.distinct(ids)).pair

    def rule(key: Key[Array, ""], drawn: Drawn, scored: Scored) -> Chosen:
        if np.any(drawn.agent != 0):
            raise ValueError(
                "enhancer: some responses are not the main agent's; it tilts the main agent's own "
                "draws, so sample with main_agent, or pair two agents with between_agents."
            )
        return _chosen(choose(key, _features(scored), drawn.responses.ids))

    return rule


def choose_enhancer(
    key: Key[Array, ""],
    features: Float[Array, "B K D"],
    *,
    kl_coef: Scalar,
    where: Bool[Array, "B K"],
) -> Enhancer:
    r"""Option I of online GSHF on samples of the main agent.

    .. math:: \max \|g\|_{\Sigma^{-1}} \quad \text{over}\quad
        \eta\, E\,\mathrm{KL}(\pi' \| \pi_1) \le \beta \|g(\pi')\|_{\Sigma^{-1}}, \quad
        g = E[\phi(x, \pi') - \phi(x, \pi_1)]

    (arXiv 2312.11456, Algorithm 2), where the enhancer picks, of the main agent's first n draws,
    the one farthest from its mean feature at the prompt. That policy has
    KL <= log n - (n - 1) / n whatever the rule of choice, and g is estimated on the prompts at
    hand, so the set is searched over n: the largest that fits. At n = 1 the enhancer *is* the
    main agent. The estimate of g carries the noise of the sample: with few prompts the budget is
    too large by about the norm of one prompt's spread over the root of their number.

    Args:
        key: chooses the main agent's draw, one of the others, uniformly.
        features: in coordinates in which the Euclidean norm is beta ||.||_{Sigma^-1}.
        kl_coef: eta.
        where: True at the responses that count (:func:`pairs.distinct`).
    """
    samples = features.shape[1]
    centre = features.mean(1)
    shift = features - centre[:, None, :]
    far = jnp.where(where, jnp.sum(shift**2, -1), -jnp.inf)

    def choice(n: Array) -> Array:
        return jnp.argmax(jnp.where(jnp.arange(samples)[None] < n, far, -jnp.inf), -1)

    def sides(n: Array) -> tuple[Array, Array]:
        at = choice(n)[:, None, None]
        g = jnp.take_along_axis(shift, at, 1)[:, 0].mean(0)
        number = n.astype(features.dtype)
        return kl_coef * (jnp.log(number) - (number - 1) / number), jnp.sqrt(g @ g)

    tries = jnp.arange(1, samples + 1)
    cost, budget = jax.vmap(sides)(tries)
    fits = (cost <= budget) | (tries == 1)
    best = jnp.max(jnp.where(fits, tries, 1)) - 1
    second = choice(tries[best])
    others = where & (jnp.arange(samples)[None] != second[:, None])
    first = any_one(key, far, others)
    valid = jnp.any(others, -1)
    pair = Pair(jnp.where(valid, first, 0), jnp.where(valid, second, 0), valid)
    return Enhancer(pair, tries[best], cost[best], budget[best])


def between_agents(*, first: Pick | None = None, second: Pick | None = None) -> PairRule:
    """One response of the main agent, one of another: non-symmetric exploration.

    ``first`` picks among the main agent's, ``second`` among the others': :func:`any_one` by
    default, :func:`best`, :func:`worst`, or another. Against pi0's draws this is Option II of
    online GSHF.
    """
    pick_first, pick_second = first or any_one, second or any_one

    @jax.jit
    def choose(key: Key[Array, ""], reward: Array, ids: Array, agent: Array) -> Pair:
        key_first, key_second = jax.random.split(key)
        one = pick_first(key_first, reward, agent == 0)
        chosen = jnp.take_along_axis(ids, one[:, None, None], 1)
        others = (agent != 0) & jnp.any(ids != chosen, -1)
        two = pick_second(key_second, reward, others)
        valid = jnp.any(agent == 0, -1) & jnp.any(others, -1)
        return Pair(jnp.where(valid, one, 0), jnp.where(valid, two, 0), valid)

    def rule(key: Key[Array, ""], drawn: Drawn, scored: Scored) -> Chosen:
        if not np.any(drawn.agent != 0):
            raise ValueError(
                "between_agents: all responses are the main agent's; sample with against_base or "
                "a mixture."
            )
        return _chosen(choose(key, scored.reward, drawn.responses.ids, drawn.agent))

    return rule


def any_one(key: Key[Array, ""], reward: Array, where: Array) -> Array:
    """One of the kept responses, uniformly."""
    noise = jax.random.uniform(key, reward.shape)
    return jnp.argmax(jnp.where(where, noise, -1.0), -1)


def best(key: Key[Array, ""], reward: Array, where: Array) -> Array:
    """The kept response of the highest reward."""
    del key
    return jnp.argmax(jnp.where(where, reward, -jnp.inf), -1)


def worst(key: Key[Array, ""], reward: Array, where: Array) -> Array:
    """The kept response of the lowest reward."""
    return best(key, -reward, where)


def _features(scored: Scored) -> Any:
    if scored.features is None:
        raise ValueError(
            "this pair rule measures uncertainty in feature space and the belief has no features; "
            "hand in reward=linear(...)."
        )
    return scored.features


def _euclidean(features: Array) -> ellipsoid.Ellipsoid:
    return ellipsoid.init(features.shape[-1], ridge=1.0, dtype=features.dtype)


def _chosen(pair: Pair) -> Chosen:
    flat = (np.asarray(field).reshape(field.shape[0], -1) for field in pair)
    first, second, valid = flat
    return Chosen(first.astype(np.int32), second.astype(np.int32), valid)
