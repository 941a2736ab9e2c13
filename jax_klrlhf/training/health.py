"""Checks that a run is worth going on with: they warn, or stop it, with a reason.

Before the first step the batches are looked at (:func:`check_batch`); during the run every logged
line is (:func:`observe`), and updates that had to be skipped are counted (:mod:`.history`). Each
finding says what was seen, what usually causes it, and what to do.
A reference cache of another model is refused where it is read (:mod:`.reference`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jax_klrlhf.results import Metric


class Stopped(RuntimeError):
    """A run ended before its last step, with the reason; its checkpoints are whole."""


class Finding(NamedTuple):
    """Something wrong with a run."""

    name: str
    message: str
    stop: bool


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When a number counts as wrong."""

    patience: int = 50
    """Steps that margins may stay 0."""
    stuck: float = 1e-4
    """A mean absolute margin (nats) up to which nothing has been learned."""
    collapse: float = 0.5
    """Share of the reference's log-probability of the chosen responses that may be lost..."""
    collapse_nats: float = 10.0
    """...where it is more than this."""
    vanished: float = 1e-6
    """Norm of a gradient that counts as none, as a share of the largest of the run."""
    kl_per_token: float = 1.0
    """KL(policy || reference) per sampled token, in nats; the reference's own entropy is about
    that..."""
    kl_nats: float = 10.0
    """...where it is more than this per response."""
    loss_nats: float = 7.0
    """Loss of a reward model: ten coin tosses, or every pair wrong at odds of a thousand to one."""
    skipped: int = 5
    """Updates in a row whose loss or gradient is not finite: so many stop the run."""


class Seen(NamedTuple):
    """What has been observed so far; carried by the loop, and saved with each checkpoint."""

    still: bool = True
    """Whether nothing has moved yet."""
    gradient: float = 0.0
    """The largest norm."""
    told: frozenset[str] = frozenset()
    """Warnings already given: each is given once."""

    def state(self) -> Any:
        """As JSON has it."""
        return [self.still, self.gradient, sorted(self.told)]

    @classmethod
    def of(cls, state: Any) -> "Seen":
        """From :meth:`state`."""
        still, gradient, told = state
        return cls(still, gradient, frozenset(told))


def check_batch(batch: Any, *, begin: int | None, end: int | None) -> list[Finding]:
    """Look at the token rows of a (host) batch.

    Args:
        batch: with ``prompts``, ``responses`` and ``weight``.
        begin: id of the begin token, None where the tokenizer has none.
        end: id of the end token, likewise.
    """
    findings = []
    rows = np.asarray(batch.weight) > 0
    ids, lengths = (np.asarray(x)[rows] for x in batch.responses)
    if end is not None and ids.size:
        last = np.take_along_axis(ids, np.maximum(lengths - 1, 0)[..., None], -1)[..., 0]
        if not np.any((last == end) & (lengths > 0)):
            findings.append(
                Finding(
                    "no_end_token",
                    f"none of {lengths.size} responses ends with the end token {end}: the model "
                    "would never learn to stop. Append it when tokenizing, or raise the response "
                    "length if every response was cut.",
                    False,
                )
            )
    if begin is not None and begin != end:
        prompt, count = (np.asarray(x)[rows] for x in batch.prompts)
        doubled = (count > 1) & np.all(prompt[:, :2] == begin, -1) if prompt.shape[-1] > 1 else []
        if np.any(doubled):
            findings.append(
                Finding(
                    "doubled_begin_token",
                    f"{int(np.sum(doubled))} of {len(count)} prompts begin with the begin token "
                    f"{begin} twice: the text has it already, or a chat template adds it. Tokenize "
                    "without special tokens.",
                    False,
                )
            )
        if np.any((ids[..., 0] == begin) & (lengths > 0)):
            findings.append(
                Finding(
                    "begin_token_in_response",
                    f"responses begin with the begin token {begin}: it belongs before the prompt "
                    "alone. Tokenize responses without special tokens.",
                    False,
                )
            )
    return findings


def skipped(step: int, fresh: int, total: int, named: Sequence[int]) -> Finding:
    """Updates that were left out since the last log line; told at each such line."""
    at = ", ".join(map(str, named)) + (", ..." if total > len(named) else "")
    return Finding(
        "updates_skipped",
        f"step {step}: {fresh} updates since the last line and {total} in all were skipped, their "
        f"loss or gradient not being finite: {at}.",
        False,
    )


def too_many(step: int, row: int) -> str:
    """Why a run stops that goes on skipping."""
    return (
        f"step {step}: the loss or the gradient was not finite {row} times in a row; the "
        "parameters are as they were before. Lower the learning rate, clip the gradient, or look "
        "at the data of these steps."
    )


_KL = (("eval/kl/ref", "eval/length/sampled"), ("kl/drawn", "length/drawn"))
"""Estimates of KL(policy || reference), of an evaluation and of the policy's own draws, each with
the mean length of what was drawn."""


def observe(
    seen: Seen, step: int, metrics: Mapping[str, Metric], limits: Limits
) -> tuple[Seen, list[Finding]]:
    """Look at a line of the log, of training or of an evaluation.

    Everything is compared with the reference or within the line, nothing with another batch.
    Returns what to carry on, and what is newly wrong.
    """
    findings = []
    if "grad_norm" in metrics:
        seen, found = _vanished(seen, step, metrics["grad_norm"].value, limits)
        findings += found
    if "rewards/margins" in metrics and "rewards/chosen" in metrics:
        seen, found = _stuck(seen, step, metrics, limits)
        findings += found
        if "logps/chosen" not in metrics:  # A policy is measured by its KL.
            findings += _overconfident(step, metrics["loss"].value, limits)
    if "log_ratio/chosen" in metrics:
        findings += _collapse(step, metrics, limits)
    for kl, length in _KL:
        if kl in metrics:
            tokens = metrics.get(length, Metric(1.0)).value
            findings += _exploded(step, metrics[kl], tokens, limits)
    fresh = [finding for finding in findings if finding.name not in seen.told]
    return seen._replace(told=seen.told | {finding.name for finding in fresh}), fresh


def _vanished(seen: Seen, step: int, norm: float, limits: Limits) -> tuple[Seen, list[Finding]]:
    """A gradient of 0 for a computer: what it is added to does not change."""
    if not math.isfinite(norm):
        return seen, []
    seen = seen._replace(gradient=max(seen.gradient, norm))
    if norm > limits.vanished * seen.gradient:
        return seen, []
    return seen, [
        Finding(
            "vanished_gradient",
            f"step {step}: the gradient's norm is {norm:.1e}, its largest was {seen.gradient:.1e}: "
            "training has ended. Usual causes: a learning rate so large that every probability is "
            "0 or 1, a hinge that every pair has passed, or adapters whose two factors are both "
            "zero.",
            False,
        )
    ]


def _stuck(
    seen: Seen, step: int, metrics: Mapping[str, Metric], limits: Limits
) -> tuple[Seen, list[Finding]]:
    """All margins at 0 is where DPO begins, with a loss of ln 2; there it must not stay."""
    margin = metrics["rewards/margins"]
    spread = (margin.stderr or 0.0) * math.sqrt(max((margin.n or 1) - 1, 1))
    size = math.hypot(margin.value, spread)
    if not math.isfinite(size):
        return seen, []
    moves = size > limits.stuck
    seen = seen._replace(still=seen.still and not moves)
    if moves or step < limits.patience:
        return seen, []
    if "logps/chosen" not in metrics:
        return seen, [
            Finding(
                "constant_reward",
                f"step {step}: every pair's two rewards are equal (the mean absolute difference is "
                f"{size:.1e}): the model scores all responses alike. Usual causes: pairs of "
                "identical responses, responses cut to the same beginning, or a learning rate so "
                "large that the model died, or so small that it never moved.",
                False,
            )
        ]
    if not seen.still:
        return seen, []
    return seen, [
        Finding(
            "stuck_at_ln2",
            f"step {step}: every margin is still 0 and the loss {metrics['loss'].value:.6f} where "
            f"it began (ln 2 = {math.log(2):.6f} for DPO): the policy has not moved from the "
            "reference. Usual causes: a learning rate or warm-up far too small, adapters whose two "
            "factors are both zero, everything frozen, or pairs of identical responses.",
            False,
        )
    ]


def _overconfident(step: int, loss: float, limits: Limits) -> list[Finding]:
    """A reward model that is sure, and wrong; at random it loses ln 2."""
    if not loss > limits.loss_nats:
        return []
    return [
        Finding(
            "exploded_loss",
            f"step {step}: the reward model loses {loss:.3g} nats per pair, where a coin toss "
            f"loses {math.log(2):.2f}: it is sure of what is wrong. Lower the learning rate, or "
            "look for pairs whose labels contradict each other.",
            False,
        )
    ]


def _collapse(step: int, metrics: Mapping[str, Metric], limits: Limits) -> list[Finding]:
    """Margins can grow while both log-probabilities fall: the policy leaves the data.

    The log-ratio to the reference of the same responses, so that no batch is compared with another;
    two standard errors beyond the limit.
    """
    ratio, now = metrics["log_ratio/chosen"], metrics["logps/chosen"].value
    before = now - ratio.value
    limit = max(limits.collapse_nats, limits.collapse * abs(before))
    if not ratio.value + 2 * (ratio.stderr or 0.0) < -limit:
        return []
    return [
        Finding(
            "chosen_collapsing",
            f"step {step}: the chosen responses' mean log-probability is {now:.1f} nats, the "
            f"reference's {before:.1f}: margins grow by unlearning both responses. Raise kl_coef, "
            "lower the learning rate, or use an objective with a likelihood term (rpo).",
            False,
        )
    ]


def _exploded(step: int, kl: Metric, length: float, limits: Limits) -> list[Finding]:
    """The policy says what the reference never would, token after token."""
    limit = max(limits.kl_nats, limits.kl_per_token * length)
    if not kl.value - 2 * (kl.stderr or 0.0) > limit:
        return []
    return [
        Finding(
            "exploded_kl",
            f"step {step}: KL(policy || reference) is {kl.value:.1f} nats per response of "
            f"{length:.0f} tokens: the policy has left the reference. Raise kl_coef, lower the "
            "learning rate, or take an earlier checkpoint.",
            False,
        )
    ]
