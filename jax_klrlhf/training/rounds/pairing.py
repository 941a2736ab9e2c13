"""Responses that were drawn and scored, as a choice set; and the pairs that a rule makes of it.

The rules are the core's (:mod:`core.pairs`), the very objects that the bandit takes. Copies of one
response are one choice: a pair is always of two different ones, and a prompt whose responses are
all alike makes none.

Axes: ``B`` prompts, ``K`` responses, ``D`` features, ``M`` pairs.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from jax_klrlhf.core import choices as choice_sets
from jax_klrlhf.core import ellipsoid
from jax_klrlhf.core.choices import Choices
from jax_klrlhf.core.pairs import Pair, PairRule
from jax_klrlhf.training.rounds.parts import Chosen, Drawn, Scored


def choices(drawn: Drawn, scored: Scored) -> Choices:
    """The choice set of a round: draws of one agent or several, with what is believed of them.

    Features come whitened by their belief, so that the ellipsoid is the unit ball and its norm the
    uncertainty, in units of reward. An uncertainty that is 0 everywhere counts as absent.
    """
    several = np.any(drawn.agent != 0)
    certain = not np.any(scored.uncertainty)
    return _choices(
        jnp.asarray(drawn.responses.ids),
        jnp.asarray(scored.reward),
        jnp.asarray(drawn.agent) if several else None,
        None if certain else jnp.asarray(scored.uncertainty),
        None if scored.features is None else jnp.asarray(scored.features),
    )


def choose(key: Key[Array, ""], rule: PairRule, drawn: Drawn, scored: Scored) -> Chosen:
    """The pairs that `rule` makes of a round's responses, ``[B, M]``."""
    pair = _apply(rule, key, choices(drawn, scored))
    flat = (np.asarray(field).reshape(field.shape[0], -1) for field in pair)
    first, second, valid = flat
    return Chosen(first.astype(np.int32), second.astype(np.int32), valid)


@partial(jax.jit, static_argnums=0)
def _apply(rule: PairRule, key: Key[Array, ""], given: Choices) -> Pair:
    return rule(key, given)


@jax.jit
def _choices(
    ids: Array,
    reward: Array,
    agent: Array | None,
    uncertainty: Array | None,
    features: Array | None,
) -> Choices:
    ball = None
    if features is not None:
        ball = ellipsoid.init(features.shape[-1], ridge=1.0, dtype=features.dtype)
    return choice_sets.drawn(
        ids, agent=agent, reward=reward, uncertainty=uncertainty, features=features, ellipsoid=ball
    )
