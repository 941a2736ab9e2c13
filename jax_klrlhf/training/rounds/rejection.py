r"""Rejection sampling towards the Gibbs policy of what is believed, in one step or several.

.. math:: \pi_0 \to \pi_0 e^{r/\eta_1} \to \dots \to \pi_0 e^{r/\eta_N}, \qquad
          \eta_1 > \dots > \eta_N = \eta

Step i proposes from the policy fitted in step i - 1 and accepts with probability
:math:`\exp((1/\eta_i - 1/\eta_{i-1})(r - r_{\max}))`; what is accepted is fitted. One step on pairs
of accepted responses is RSO (arXiv 2309.06657); several steps are arXiv 2312.11456, section 5.

The acceptance is exact for a bound r_max of every reward. Without one the largest reward at the
prompt stands in, and the law of what is accepted is another: ``rejection/bound_error`` estimates
how far it is from the target.

Axes: ``B`` prompts, ``K`` responses.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from jax_klrlhf.core import bradley_terry, choices, gibbs, pairs, rejection
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models.base import LanguageModel
from jax_klrlhf.results import Metric, mean
from jax_klrlhf.training import tasks
from jax_klrlhf.training.metrics import Metrics
from jax_klrlhf.training.rounds import coefficient
from jax_klrlhf.training.rounds.coefficient import LossAt
from jax_klrlhf.training.rounds.fitting import Fitted, Fitting, comparisons_deal, deal
from jax_klrlhf.training.rounds.improve import fit_at, reference_log_prob, single_responses
from jax_klrlhf.training.rounds.parts import (
    Comparisons,
    Improve,
    Improved,
    Mixture,
    Situation,
    pick,
    ragged,
)
from jax_klrlhf.training.rounds.samplers import Draw


class Accepted(NamedTuple):
    """What a step accepted of its proposals."""

    responses: Ragged
    """All proposals, ids ``[B, K, C]``."""
    accepted: Bool[np.ndarray, "B K"]
    reward: Float[np.ndarray, "B K"]
    kl_coef: float
    """eta of the step's target."""


Learn = Callable[[Any, Any, Situation, Accepted], Fitted]
"""``learn(key, params, situation, accepted) -> Fitted``: a policy from what was accepted."""


class Labelling(NamedTuple):
    """How a pair of accepted responses is labelled by what is believed of them."""

    decide: Callable[[Key[Array, ""], Array], Array]
    """``decide(key, margin)``: True where the first wins its match, and goes on in a tournament."""
    label: Callable[[Array], Array]
    """``label(margin)``: probability that the winner is preferred, from its margin over the loser.
    """


expected = Labelling(bradley_terry.sample, jax.nn.sigmoid)
r"""The soft label :math:`\sigma(r^1 - r^2)`: the expectation of :data:`drawn` without its noise.

The DPO loss under either is least, in expectation, at :math:`\pi_0 e^{r/\eta}` (arXiv 2305.18290,
eq. 4 and 7), the law that the steps accept towards. Who goes on in a tournament is drawn.
"""

drawn = Labelling(bradley_terry.sample, jnp.ones_like)
"""A Bradley-Terry draw (arXiv 2309.06657, eq. 6): hardly more than a coin's at a small margin."""

order = Labelling(pairs.higher, lambda margin: jnp.where(margin == 0, 0.5, jnp.ones_like(margin)))
"""The higher reward is preferred; equal rewards are a tie, of label one half.

The reward-ranking label of arXiv 2309.06657, whose ranking model names the preferred one (section
2). It forgets by how much one is higher, so no policy has the least loss: the longer the fit, the
farther from pi0. The paper's loss has a coefficient of its own, a tenth of eta.
"""

LABELLINGS = {"expected": expected, "drawn": drawn, "order": order}
"""By the names that programs call them."""


def rejection_sampling(
    draw: Draw,
    learn: Learn,
    *,
    kl_coef: float,
    steps: int = 1,
    keep: int | None = None,
    reward_bound: float | None = None,
    passes: Literal["one", "until"] = "one",
) -> Improve:
    """Improve the policy by rejection sampling from the reference.

    Args:
        draw: proposals at each prompt; each step draws anew, from its own policy.
        learn: :func:`likelihood` or :func:`ranked` of what was accepted.
        kl_coef: eta of the last step's target.
        steps: N; the coefficients are equally spaced in 1/eta (:func:`rejection.schedule`).
        keep: at most this many accepted responses of a prompt are learned from, the first ones.
        reward_bound: r_max, a bound of every reward; None: the largest at each prompt.
        passes: ``one`` (:func:`rejection.accept`), or ``until`` every prompt has ``keep`` different
            ones or no more are left (:func:`rejection.until`, the code of RSO's appendix), whose
            law is not the target's: it has the reports of one pass.

    Reports for step i ``rejection/acceptance/i``; without a bound ``rejection/bound_error/i``,
    the total variation between the target and the law of what is accepted when K proposals' own
    maximum stands for the bound, both on the K proposals at hand (a plug-in estimate, averaged
    over prompts); with one ``rejection/bound_violated/i``, the share of prompts with a larger
    reward.

    Raises:
        ValueError: where the numbers are out of range, or nothing was accepted.
    """
    if steps < 1 or (keep is not None and not 1 <= keep <= draw.samples):
        raise ValueError(
            f"steps must be at least 1 and keep between 1 and the {draw.samples} samples, got "
            f"{steps} and {keep}"
        )
    if passes == "until" and (keep is None or reward_bound is not None):
        raise ValueError(
            "passes='until' needs keep=, how many to go on until, and takes no reward_bound: the "
            "largest reward left stands for it."
        )
    coefs = [float(eta) for eta in rejection.schedule(float(kl_coef), steps)]

    def improve(key: Key[Array, ""], situation: Situation) -> Improved:
        proposal, start, metrics = situation.policies.reference, situation.start, {}
        for number, (eta, previous) in enumerate(
            zip(coefs, [float("inf"), *coefs[:-1]], strict=True), 1
        ):
            key_draw, key_accept, key_fit = jax.random.split(jax.random.fold_in(key, number), 3)
            responses = draw(key_draw, proposal, situation.prompts)
            reward = situation.score(situation.prompts, responses).reward
            acceptance = _accept(key_accept, reward, reward_bound, eta, previous)
            metrics |= _report(acceptance, reward, reward_bound, eta, previous, number)
            accepted = np.asarray(acceptance.accepted)
            if passes == "until":
                different = choices.distinct(jnp.asarray(responses.ids))
                again = rejection.until(
                    key_accept,
                    jnp.asarray(reward),
                    count=keep or draw.samples,
                    kl_coef=eta,
                    kl_coef_prev=previous,
                    where=different,
                )
                accepted = np.asarray(again)
            elif keep is not None:
                accepted = accepted & (np.cumsum(accepted, 1) <= keep)
            if not accepted.any():
                raise ValueError(
                    f"rejection sampling, step {number} of {steps}: none of {accepted.size} "
                    "proposals was accepted; take more steps, more samples, or a smaller bound."
                )
            inner = situation
            if situation.folder is not None:
                inner = situation._replace(folder=situation.folder / f"step-{number}")
            fitted = learn(key_fit, start, inner, Accepted(responses, accepted, reward, eta))
            proposal = start = fitted.params
            metrics |= fitted.metrics
        return Improved(proposal, metrics)

    return improve


def rso(
    model: LanguageModel,
    draw: Draw,
    *,
    kl_coef: float,
    fitting: Fitting,
    steps: int = 1,
    keep: int | None = None,
    reward_bound: float | None = None,
    passes: Literal["one", "until"] = "one",
    rule: Callable[..., pairs.Pair] = pairs.first_round,
    labelling: Labelling = expected,
    rows: int = 64,
) -> Improve:
    """RSO (arXiv 2309.06657): DPO on pairs of accepted responses, labelled by what is believed.

    ``rule`` and ``labelling`` are :func:`ranked`'s. With ``steps`` beyond 1 it is multi-step RSO,
    each step's fit with that step's eta. One pass may leave prompts without a pair;
    ``passes="until"`` with ``keep`` is the paper's code, which leaves none.
    """

    return rejection_sampling(
        draw,
        ranked(
            model,
            coefficient.sigmoid,
            fitting=fitting,
            rule=rule,
            labelling=labelling,
            rows=rows,
        ),
        kl_coef=kl_coef,
        steps=steps,
        keep=keep,
        reward_bound=reward_bound,
        passes=passes,
    )


def likelihood(model: LanguageModel, *, fitting: Fitting) -> Learn:
    """Maximum likelihood on the accepted responses: the projection of their law on the model."""
    fit = fitting.compile(tasks.likelihood(model))

    def learn(key: Any, params: Any, situation: Situation, accepted: Accepted) -> Fitted:
        rows = single_responses(
            situation.prompts, accepted.responses, accepted.accepted.astype(np.float32)
        )
        return fit(key, params, deal([rows]), folder=situation.folder)

    return learn


def ranked(
    model: LanguageModel,
    loss: LossAt,
    *,
    fitting: Fitting,
    rule: Callable[..., pairs.Pair] = pairs.first_round,
    labelling: Labelling = expected,
    rows: int = 64,
) -> Learn:
    """A preference loss on pairs of accepted responses, labelled by what is believed of them.

    Args:
        model: the policy.
        loss: ``loss(kl_coef)`` is the loss at a step's eta, which is traced: a chain is one
            program. The reference is the situation's.
        fitting: optimizer and sizes.
        rule: who meets whom, ``rule(key, choices, *, decide)``: :func:`pairs.first_round` or
            :func:`pairs.tournament`.
        labelling: :data:`expected`, :data:`drawn` or :data:`order`.
        rows: comparisons that the reference scores at one time.

    Reports ``rejection/pairs``, how many there were, and ``rejection/order``, the mean probability
    that their labels give to the higher reward: 1/2 is a coin's.
    """
    fit = fit_at(model, loss, fitting=fitting)
    reference = reference_log_prob(model, fitting, rows=rows)

    @jax.jit
    def choose(
        key: Key[Array, ""], reward: Array, ids: Array, accepted: Array
    ) -> tuple[pairs.Pair, Array, Array]:
        # Copies count once among the accepted.
        left = choices.drawn(ids, where=accepted, reward=reward)
        pair = rule(key, left, decide=labelling.decide)
        won, lost = (jnp.take_along_axis(reward, at, -1) for at in (pair.first, pair.second))
        return pair, won - lost, labelling.label(won - lost)

    def learn(key: Any, params: Any, situation: Situation, accepted: Accepted) -> Fitted:
        key_pair, key_fit = jax.random.split(key)
        pair, margin, label = choose(
            key_pair, accepted.reward, accepted.responses.ids, accepted.accepted
        )
        first, second, valid = map(np.asarray, pair)
        label = np.asarray(label, np.float32)
        found = _compared(situation.prompts, accepted.responses, first, second, label, valid)
        data = comparisons_deal(Mixture([found], None))
        sign = np.sign(np.asarray(margin))
        higher = (sign * (label - 0.5) + 0.5)[valid]
        ref = reference(situation, data)
        fitted = fit(
            key_fit,
            params,
            data._replace(rows=data.rows._replace(ref_log_prob=ref)),
            kl_coef=accepted.kl_coef,
            pi0=situation.policies.reference,
            folder=situation.folder,
        )
        report = {
            "rejection/pairs": Metric(float(len(data.rows.weight))),
            "rejection/order": mean(higher),
        }
        return fitted._replace(metrics={**fitted.metrics, **report})

    return learn


def _compared(
    prompts: Ragged, responses: Ragged, first: Any, second: Any, label: Any, valid: Any
) -> Comparisons:
    """Pairs ``[B, M]`` and their labels as comparisons ``[B M]``."""
    matches = first.shape[1]
    one, two = pick(responses, first), pick(responses, second)
    return Comparisons(
        ragged(np.repeat(prompts.ids, matches, 0), np.repeat(prompts.lengths, matches, 0)),
        ragged(
            np.stack([one.ids, two.ids], 2).reshape(-1, 2, one.ids.shape[-1]),
            np.stack([one.lengths, two.lengths], 2).reshape(-1, 2),
        ),
        label.ravel(),
        valid.ravel().astype(np.float32),
    )


def _accept(
    key: Any, reward: Any, bound: float | None, kl_coef: float, previous: float
) -> rejection.Acceptance:
    return rejection.accept(
        key, jnp.asarray(reward), reward_bound=bound, kl_coef=kl_coef, kl_coef_prev=previous
    )


def _report(
    acceptance: rejection.Acceptance,
    reward: Any,
    bound: float | None,
    kl_coef: float,
    previous: float,
    number: int,
) -> Metrics:
    rate = jnp.exp(acceptance.log_prob).mean(-1)
    found: dict[str, Metric] = {f"rejection/acceptance/{number}": mean(np.asarray(rate))}
    if bound is None:
        error = bound_error(jnp.asarray(reward), kl_coef=kl_coef, kl_coef_prev=previous)
        found[f"rejection/bound_error/{number}"] = mean(np.asarray(error))
    else:
        violated = np.asarray(acceptance.bound_violated, np.float64)
        found[f"rejection/bound_violated/{number}"] = mean(violated)
    return found


def bound_error(
    reward: Float[Array, "B K"], *, kl_coef: float, kl_coef_prev: float
) -> Float[Array, " B"]:
    """Total variation between target and accepted law when K draws' maximum stands for the bound.

    Both laws are on the K draws themselves, each of mass 1 / K in the proposal.
    """
    samples = reward.shape[-1]
    proposal = jnp.full(reward.shape, -np.log(samples), reward.dtype)
    found = rejection.batch_maximum_log_prob(
        reward, proposal, samples=samples, kl_coef=kl_coef, kl_coef_prev=kl_coef_prev
    )
    tilt = 1 / (1 / kl_coef - 1 / kl_coef_prev)
    target = gibbs.log_prob(reward, proposal, kl_coef=tilt)
    return jnp.abs(jnp.exp(found) - jnp.exp(target)).sum(-1) / 2
