r"""What the learner believes of responses: rewards that are given, fitted, implied or combined.

Each is a :class:`Reward`. Those here that wrap others (an ensemble, a length penalty, a transform)
learn exactly as what they wrap.

Axes: ``B`` prompts, ``K`` responses, ``R`` reference responses, ``M`` members of an ensemble.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from jax_klrlhf.core import aggregate, gibbs, reshape
from jax_klrlhf.core.preferences import PreferenceModel, bradley_terry
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models import reward as rewards
from jax_klrlhf.models import scoring
from jax_klrlhf.models.base import LanguageModel
from jax_klrlhf.models.reward import RewardParams
from jax_klrlhf.training import tasks
from jax_klrlhf.training.rounds import oracle
from jax_klrlhf.training.rounds.compute import mapped
from jax_klrlhf.training.rounds.fitting import Fitting
from jax_klrlhf.training.rounds.parts import Comparisons, Judge, Mixture, Policies, Reward, Scored
from jax_klrlhf.training.rounds.samplers import Draw

Combine = Callable[[Float[Array, "M B K"]], Float[Array, "B K"]]
Transform = Callable[[Float[Array, "B K"], Float[Array, "B R"]], Float[Array, "B K"]]
Origin = Callable[[Policies, Ragged], Ragged]
"""Responses ``[B, R, C]`` to each prompt that a reward is measured from."""


def known(judge: Judge) -> Reward:
    """A reward that is given and not learned: a trained reward model, a rule, another's opinion."""

    def score(belief: Any, policies: Policies, prompts: Ragged, responses: Ragged) -> Scored:
        del belief, policies
        return _certain(judge(prompts, responses))

    return Reward(init=(), fit=_unchanged, score=score)


def known_text(
    reward: Callable[[Sequence[str], Sequence[str]], Any],
    decode: Callable[[list[int]], str],
) -> Reward:
    """:func:`known` of a reward that reads text: ``reward(prompts, texts) -> [n]``.

    See :func:`.oracle.prompted`.
    """
    return known(oracle.prompted(reward, decode))


def implicit(
    model: LanguageModel, *, kl_coef: float, rows: int = 64, mesh: Mesh | None = None
) -> Reward:
    """The reward whose optimum the current policy is: kl_coef times its log-ratio to the reference.

    It ranks the responses of one prompt; a constant per prompt is not identified.
    Source: arXiv 2305.18290, eq. 5.
    """

    def both(params: Any, prompts: Ragged, responses: Ragged) -> Array:
        policy, reference = (
            scoring.log_prob(model, p, prompts, responses) for p in (params[0], params[1])
        )
        return gibbs.implicit_reward(policy, reference, kl_coef=kl_coef)

    program = mapped(both, rows=rows, mesh=mesh)

    def score(belief: Any, policies: Policies, prompts: Ragged, responses: Ragged) -> Scored:
        del belief
        return _certain(program((policies.current, policies.reference), prompts, responses))

    return Reward(init=(), fit=_unchanged, score=score)


def reward_model(
    model: LanguageModel,
    params: RewardParams,
    *,
    fitting: Fitting,
    pooling: Callable[[Array, Array, Array], Array] = rewards.last,
    centring: float = 0.01,
    preference: PreferenceModel = bradley_terry,
    rows: int = 64,
) -> Reward:
    """A reward model, fitted from ``params`` again each round, on all comparisons.

    ``preference`` says what their labels mean, by default Bradley-Terry's. Its rewards are centred
    at 0 by ``centring`` (:func:`tasks.bradley_terry_reward`). All that are made of one ``fitting``,
    as an ensemble's members, share their compiled programs.
    """

    def reward(params: Any, prompts: Ragged, responses: Ragged) -> Array:
        return rewards.reward(model, params, prompts, responses, pooling=pooling)

    step = fitting.shared(
        # What is kept holds the preference model, so that its id is nobody else's.
        ("reward_model", model, pooling, centring, id(preference)),
        lambda: fitting.compile(
            tasks.bradley_terry_reward(reward, centring=centring, preference=preference)
        ),
    )
    program = fitting.shared(
        ("reward_model", model, pooling, "score", rows),
        lambda: mapped(reward, rows=rows, mesh=fitting.mesh),
    )

    def fit(
        key: Any, belief: Any, comparisons: Sequence[Comparisons], policies: Policies
    ) -> RewardParams:
        del belief, policies
        if not comparisons:
            return params
        return step(key, params, Mixture(comparisons, None)).params

    def score(belief: Any, policies: Policies, prompts: Ragged, responses: Ragged) -> Scored:
        del policies
        return _certain(program(belief, prompts, responses))

    return Reward(init=params, fit=fit, score=score)


def ensemble(
    members: Sequence[Reward], *, combine: Combine | None = None, origin: Origin | None = None
) -> Reward:
    """Several beliefs, each fitted with a key of its own, combined to one.

    ``combine`` makes one reward of the members' ``[M, B, K]``: :func:`mean` by default,
    :func:`worst`, :func:`uncertainty_weighted` of a number, or another rule of
    :mod:`core.aggregate`. **It is handed members that are centred at each prompt**, since a
    constant per prompt is not identified and must not decide who is least; what was taken off is
    given back as one constant of the prompt, the members' mean, so that :func:`mean` is exactly
    theirs. The origin is the mean over the prompt's own responses or, with ``origin``
    (:func:`pi0_draws`), over draws from pi0, which makes it the same for all responses to a prompt.
    The uncertainty is the standard deviation of the centred members.

    Members differ by their initial parameters, their data's order, or :func:`resampled` data. They
    are fitted one after the other, so that one alone is in memory with its optimizer; reward models
    made of one ``Fitting`` compile once. Sources: arXiv 2310.02743, 2312.09244.

    Raises:
        ValueError: for fewer than two members.
    """
    members = tuple(members)
    if len(members) < 2:
        raise ValueError(f"an ensemble has at least two members, got {len(members)}")
    combine = combine or mean

    def fit(key: Any, belief: Any, comparisons: Any, policies: Policies) -> Any:
        return tuple(
            member.fit(jax.random.fold_in(key, number), state, comparisons, policies)
            for number, (member, state) in enumerate(zip(members, belief, strict=True))
        )

    def score(belief: Any, policies: Policies, prompts: Ragged, responses: Ragged) -> Scored:
        def ask(responses: Ragged) -> np.ndarray:
            pairs = zip(members, belief, strict=True)
            rewards = [m.score(b, policies, prompts, responses).reward for m, b in pairs]
            return np.stack(rewards)

        found = ask(responses)
        beside = found if origin is None else ask(origin(policies, prompts))
        return combined(found, beside, combine)

    return Reward(init=tuple(member.init for member in members), fit=fit, score=score)


def combined(
    found: Float[np.ndarray, "M B K"], beside: Float[np.ndarray, "M B R"], combine: Combine
) -> Scored:
    """One reward of members centred at ``beside``'s mean, as :func:`ensemble` says."""
    offset = beside.mean(-1, keepdims=True)
    one = np.asarray(combine(jnp.asarray(found - offset)))
    return Scored(one + offset.mean(0), (found - offset).std(0, ddof=1))


def pi0_draws(key: Key[Array, ""], draw: Draw) -> Origin:
    """Draws from pi0 to measure rewards from, the same ones each time a prompt is seen in its row.

    They cost what sampling ``draw.samples`` responses and scoring them does.
    """
    return lambda policies, prompts: draw(key, policies.base, prompts)


def mean(rewards: Float[Array, "M B K"]) -> Float[Array, "B K"]:
    """The members' mean."""
    return aggregate.mean(rewards)


def worst(rewards: Float[Array, "M B K"]) -> Float[Array, "B K"]:
    """The least of the members' rewards (worst-case optimization, arXiv 2310.02743, eq. 3)."""
    return aggregate.minimum(rewards)


def uncertainty_weighted(coef: float) -> Combine:
    """The mean less ``coef`` times the members' variance (arXiv 2310.02743, eq. 4)."""
    return partial(aggregate.penalized, variance=coef)


def resampled(reward: Reward) -> Reward:
    """``reward`` fitted on a bootstrap sample of the comparisons: a member of an ensemble."""

    def fit(key: Any, belief: Any, comparisons: Any, policies: Policies) -> Any:
        key_fit, key_draw = jax.random.split(key)
        drawn = []
        for number, data in enumerate(comparisons):
            rows = len(data.weight)
            draw = jax.random.randint(jax.random.fold_in(key_draw, number), (rows,), 0, rows)
            times = np.bincount(np.asarray(draw), minlength=rows)
            drawn.append(data._replace(weight=(data.weight * times).astype(np.float32)))
        return reward.fit(key_fit, belief, drawn, policies)

    return dataclasses.replace(reward, fit=fit)


def length_penalty(reward: Reward, coef: float) -> Reward:
    """``reward`` less ``coef`` times the response's number of tokens (arXiv 2405.07863, eq. 5)."""

    def score(belief: Any, policies: Policies, prompts: Ragged, responses: Ragged) -> Scored:
        scored = reward.score(belief, policies, prompts, responses)
        tokens = np.asarray(responses.lengths, np.float32)
        return scored._replace(reward=scored.reward - np.float32(coef) * tokens)

    return dataclasses.replace(reward, score=score)


def transformed(reward: Reward, function: Transform, *, origin: Origin | None = None) -> Reward:
    """``reward`` through ``function(reward [B, K], reference [B, R])``, prompt by prompt.

    :func:`centred`, :func:`log_sigmoid` of a quantile, :func:`win_rate`, or another. ``reference``
    are the rewards of draws from pi0 (``origin``, :func:`pi0_draws`); without it the prompt's own
    responses stand in for them, which is pi0 only where they were drawn from it. The uncertainty
    stays that of the reward before.
    """

    def score(belief: Any, policies: Policies, prompts: Ragged, responses: Ragged) -> Scored:
        scored = reward.score(belief, policies, prompts, responses)
        beside = scored.reward
        if origin is not None:
            drawn = origin(policies, prompts)
            beside = reward.score(belief, policies, prompts, drawn).reward
        found = function(jnp.asarray(scored.reward), jnp.asarray(beside))
        return scored._replace(reward=np.asarray(found, np.float32))

    return dataclasses.replace(reward, score=score)


def centred(reward: Float[Array, "B K"], reference: Float[Array, "B R"]) -> Float[Array, "B K"]:
    """Rewards less the reference's mean at the prompt, which preferences do not identify."""
    return reward - jnp.mean(reference, -1, keepdims=True)


def log_sigmoid(level: float = 0.85) -> Transform:
    """:func:`core.reshape.log_sigmoid` against the reference's quantile (arXiv 2402.00742)."""
    if not 0 <= level <= 1:
        raise ValueError(f"level must be in [0, 1], a quantile, got {level}")

    def transform(reward: Array, reference: Array) -> Array:
        bar = reshape.quantile(reference, jnp.zeros_like(reference), level=level)
        return reshape.log_sigmoid(reward, reference=bar)

    return transform


def win_rate(reward: Float[Array, "B K"], reference: Float[Array, "B R"]) -> Float[Array, "B K"]:
    """The chance to beat a reference response: PAR (arXiv 2502.18770), in [0, 1]."""
    return jax.nn.sigmoid(reward[..., :, None] - reference[..., None, :]).mean(-1)


def _certain(reward: Any) -> Scored:
    reward = np.asarray(reward, np.float32)
    return Scored(reward, np.zeros_like(reward))


def _unchanged(key: Any, belief: Any, comparisons: Any, policies: Any) -> Any:
    del key, comparisons, policies
    return belief
