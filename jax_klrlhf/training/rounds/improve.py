r"""Policy improvement from comparisons: preference losses, pessimism, reward-weighted likelihood.

Each is ``improve(key, situation) -> Improved``. The fit begins from ``situation.start`` and its
reference is ``situation.policies.reference``: pi0, unless the run is the named ablation.
Rejection sampling is in :mod:`.rejection`.

Axes: ``B`` prompts, ``K`` responses, ``N`` rows of a training set.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jax_klrlhf.core import targets
from jax_klrlhf.core.choices import Choices
from jax_klrlhf.core.preferences import PreferenceModel, bradley_terry
from jax_klrlhf.core.scores import Loss
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.core.targets import Target
from jax_klrlhf.models import scoring
from jax_klrlhf.models.base import LanguageModel
from jax_klrlhf.models.batch import Batch
from jax_klrlhf.results import mean
from jax_klrlhf.training import tasks
from jax_klrlhf.training.rounds import coefficient, pairing
from jax_klrlhf.training.rounds.coefficient import LossAt
from jax_klrlhf.training.rounds.compute import mapped
from jax_klrlhf.training.rounds.fitting import Deal, Fitted, Fitting, comparisons_deal, deal
from jax_klrlhf.training.rounds.parts import (
    Drawn,
    Improve,
    Improved,
    Judge,
    Situation,
    pick,
    ragged,
)
from jax_klrlhf.training.rounds.samplers import Draw
from jax_klrlhf.training.state import cast_floating


def preference_optimization(
    model: LanguageModel,
    loss: Loss,
    *,
    fitting: Fitting,
    report_coef: float = 1.0,
    explores: int | None = None,
    preference: PreferenceModel = bradley_terry,
    rows: int = 64,
) -> Improve:
    """Fit the policy by any preference loss on the round's mixture of comparisons.

    Args:
        model: the policy.
        loss: of :mod:`core.objectives`, on :class:`Scores`, for example
            ``functools.partial(objectives.sigmoid, kl_coef=0.1)``.
        fitting: optimizer and sizes.
        report_coef: of the reported rewards, usually the loss's ``kl_coef``; it trains nothing.
        explores: the number of the response of each pair that explored, for
            ``objectives.exploratory``: 1 is XPO, where the second is drawn from pi0 (the sampler
            ``against_base``).
        preference: what labels mean, as in :func:`tasks.preference`.
        rows: comparisons that the reference scores at one time.
    """
    fit = fitting.compile(
        tasks.preference(
            model, loss, report_coef=report_coef, explores=explores, preference=preference
        )
    )
    reference = reference_log_prob(model, fitting, rows=rows)

    def improve(key: Key[Array, ""], situation: Situation) -> Improved:
        data = comparisons_deal(situation.data)
        return _fitted(fit, key, situation, data, reference(situation, data))

    return improve


def dpo(model: LanguageModel, *, kl_coef: float, fitting: Fitting, rows: int = 64) -> Improve:
    """:func:`preference_optimization` with the DPO loss (arXiv 2305.18290, eq. 7).

    All coefficients of one ``fitting`` are one compiled program.
    """
    fit = fit_at(model, coefficient.sigmoid, fitting=fitting)
    reference = reference_log_prob(model, fitting, rows=rows)

    def improve(key: Key[Array, ""], situation: Situation) -> Improved:
        data = comparisons_deal(situation.data)
        return _fitted(fit, key, situation, data, reference(situation, data), kl_coef=kl_coef)

    return improve


def pessimistic_dpo(
    model: LanguageModel, *, kl_coef: float, fitting: Fitting, rows: int = 64
) -> Improve:
    r"""DPO with a margin by uncertainty: offline GSHF, Option II (arXiv 2312.11456).

    .. math:: -\log \sigma\Big(\eta \log \tfrac{\pi}{\pi_0}(a^w) + \Gamma(a^w)
        - \eta \log \tfrac{\pi}{\pi_0}(a^l) - \Gamma(a^l)\Big)

    with Gamma the belief's uncertainty (:func:`~jax_klrlhf.training.rounds.linear`, an ensemble).
    It is :func:`objectives.pessimistic`, computed as DPO against
    :math:`\log \pi_0 - \Gamma / \eta`: the reference of every log-ratio, so the reported rewards
    are the implicit ones plus the bonus, and the program is :func:`dpo`'s.

    When called, raises ValueError where the belief is certain of everything.
    """
    fit = fit_at(model, coefficient.sigmoid, fitting=fitting)
    reference = reference_log_prob(model, fitting, rows=rows)

    def improve(key: Key[Array, ""], situation: Situation) -> Improved:
        data = comparisons_deal(situation.data)
        bonus = situation.score(data.rows.prompts, data.rows.responses).uncertainty
        if not np.any(bonus):
            raise ValueError(
                "pessimistic_dpo: the belief's uncertainty is 0 everywhere, so this would be "
                "plain DPO; hand in reward=linear(...) with a radius, or an ensemble."
            )
        ref_log_prob = reference(situation, data)
        ref_log_prob = ref_log_prob - (bonus / kl_coef).astype(ref_log_prob.dtype)
        return _fitted(fit, key, situation, data, ref_log_prob, kl_coef=kl_coef)

    return improve


def fit_at(model: LanguageModel, loss: LossAt, *, fitting: Fitting) -> Callable[..., Fitted]:
    """``fit(key, params, deal, *, kl_coef, pi0=None, folder=None)``: one program at every kl_coef.

    The rows must hold ``ref_log_prob``. Shared by all who ask with this loss and fitting.
    """
    step = fitting.shared(
        ("fit_at", model, loss), lambda: fitting.compile(coefficient.task(model, loss))
    )

    def fit(key: Any, params: Any, deal: Deal, *, kl_coef: float, **where: Any) -> Fitted:
        return step(key, params, coefficient.at(deal, kl_coef), **where)

    return fit


def _fitted(
    fit: Callable[..., Fitted],
    key: Any,
    situation: Situation,
    data: Deal,
    ref_log_prob: Any,
    **coefficients: float,
) -> Improved:
    found = fit(
        key,
        situation.start,
        data._replace(rows=data.rows._replace(ref_log_prob=ref_log_prob)),
        pi0=situation.policies.reference,
        folder=situation.folder,
        **coefficients,
    )
    return Improved(found.params, found.metrics)


def reference_log_prob(
    model: LanguageModel, fitting: Fitting, *, rows: int
) -> Callable[[Situation, Deal], Any]:
    """Log-probabilities of a training set's responses under the situation's reference."""

    def score(params: Any, prompts: Ragged, responses: Ragged) -> Array:
        params = cast_floating(params, fitting.compute_dtype)
        return scoring.log_prob(model, params, prompts, responses)

    program = fitting.shared(
        ("reference", model, rows), lambda: mapped(score, rows=rows, mesh=fitting.mesh)
    )
    return lambda situation, found: program(
        situation.policies.reference, found.rows.prompts, found.rows.responses
    )


def weighted_likelihood(
    model: LanguageModel,
    draw: Draw,
    *,
    fitting: Fitting,
    kl_coef: float | None = None,
    target: Target | None = None,
) -> Improve:
    r"""Maximum likelihood on responses of the reference, weighted by a target of improvement.

    ``target`` is any of :mod:`core.targets`, the very object that ``bandit.from_target`` deploys;
    with ``kl_coef`` in its place it is :func:`targets.optimum`, weights :math:`e^{r/\eta}`
    normalized over a prompt's K responses: self-normalized importance sampling from the Gibbs
    policy of what is believed. ``weights/effective_share`` (:func:`targets.effective_share`) is the
    share of the responses that carry the estimate: 1 at equal weights, 1 / K at a single one.

    Raises:
        ValueError: for both or none of ``kl_coef`` and ``target``.
    """
    if (kl_coef is None) == (target is None):
        raise ValueError("weighted_likelihood takes kl_coef= or target=, one of them.")
    aim = target or partial(targets.optimum, kl_coef=kl_coef)  # pyright: ignore[reportArgumentType]
    fit = fitting.shared(("likelihood", model), lambda: fitting.compile(tasks.likelihood(model)))

    @jax.jit
    def weigh(given: Choices) -> tuple[Array, Array]:
        log_weight = aim(given)
        ratio = jnp.exp(log_weight - jnp.where(given.where, given.log_mass, 0))
        return ratio, targets.effective_share(given, log_weight)

    def improve(key: Key[Array, ""], situation: Situation) -> Improved:
        key_draw, key_fit = jax.random.split(key)
        responses = draw(key_draw, situation.policies.reference, situation.prompts)
        scored = situation.score(situation.prompts, responses)
        alone = np.zeros(scored.reward.shape, np.int32)
        given = pairing.choices(Drawn(situation.prompts, responses, alone), scored)
        ratio, share = weigh(given)
        # Of each draw its share of what the target gives to its kind: w / p of the first copy.
        ratio = np.take_along_axis(np.asarray(ratio), np.asarray(given.number), 1)
        rows = single_responses(situation.prompts, responses, ratio)
        fitted = fit(key_fit, situation.start, deal([rows]), folder=situation.folder)
        report = {**fitted.metrics, "weights/effective_share": mean(np.asarray(share))}
        return Improved(fitted.params, report)

    return improve


def single_responses(prompts: Ragged, responses: Ragged, weight: Any) -> Batch:
    """Every response ``[B, K, C]`` a row of its own, ``[B K, 1, C]``; weights are ``[B, K]``."""
    samples, width = np.asarray(responses.ids).shape[1:]
    repeat = lambda x: np.repeat(np.asarray(x), samples, axis=0)  # noqa: E731
    return Batch(
        ragged(repeat(prompts.ids), repeat(prompts.lengths)),
        ragged(
            np.asarray(responses.ids).reshape(-1, 1, width),
            np.asarray(responses.lengths).reshape(-1, 1),
        ),
        weight=np.asarray(weight, np.float32).ravel(),  # pyright: ignore[reportArgumentType]
    )


class Best(NamedTuple):
    """The best of n responses to each prompt."""

    responses: Ragged
    """ids ``[B, 1, C]``."""
    reward: Float[np.ndarray, " B"]
    kl_bound: float
    """log n - (n - 1) / n: at least the KL of this policy to the one that was drawn from."""


def best_of_n(key: Key[Array, ""], draw: Draw, params: Any, judge: Judge, prompts: Ragged) -> Best:
    """Answer each prompt by the best of n = ``draw.samples`` responses, at inference.

    ``judge(prompts, responses) -> [B, K]``, for example ``outcome.judge`` of a run.
    """
    responses = draw(key, params, prompts)
    reward = np.asarray(judge(prompts, responses), np.float32)
    index = np.argmax(reward, 1)[:, None]
    n = reward.shape[1]
    found = np.take_along_axis(reward, index, 1)[:, 0]
    return Best(pick(responses, index), found, math.log(n) - (n - 1) / n)
