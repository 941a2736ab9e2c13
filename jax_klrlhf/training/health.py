"""Checks that a run is worth going on with: they warn, or stop it, with a reason.

Before the first step the batches are looked at (:func:`check_batch`); during the run every logged
line is (:func:`observe`). Each finding says what was seen, what usually causes it, and what to do.
A reference cache of another model is refused where it is read (:mod:`.reference`).
"""

import math
from collections.abc import Mapping
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
    """Steps that the loss may stay where it began."""
    stuck: float = 1e-4
    """A mean absolute margin (nats) up to which nothing has been learned."""
    collapse: float = 0.5
    """Share of the chosen responses' log-probability that may be lost (with `collapse_nats`)."""
    collapse_nats: float = 10.0


class Seen(NamedTuple):
    """What has been observed so far; carried by the loop."""

    first_chosen: float | None = None
    """Mean log-probability of chosen responses when the run began."""
    still: int | None = 0
    """First step of the stretch in which nothing moved; None when it has."""
    told: frozenset[str] = frozenset()
    """Warnings already given: each is given once."""


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


def observe(
    seen: Seen, step: int, metrics: Mapping[str, Metric], limits: Limits
) -> tuple[Seen, list[Finding]]:
    """Look at one logged line; returns what to carry on and what is newly wrong."""
    findings = []
    loss = metrics["loss"].value
    if not math.isfinite(loss) or not math.isfinite(metrics["grad_norm"].value):
        findings.append(
            Finding(
                "not_finite",
                f"step {step}: the loss is {loss} and the gradient's norm "
                f"{metrics['grad_norm'].value}; the parameters were left as they were before. "
                "Lower the learning rate, clip the gradient, or look at the data of this step.",
                True,
            )
        )
    if "rewards/margins" in metrics and "rewards/chosen" in metrics:
        seen, found = _stuck(seen, step, metrics, limits)
        findings += found
    if "logps/chosen" in metrics:
        seen, found = _collapse(seen, step, metrics["logps/chosen"].value, limits)
        findings += found
    fresh = [finding for finding in findings if finding.stop or finding.name not in seen.told]
    return seen._replace(told=seen.told | {finding.name for finding in fresh}), fresh


def _stuck(
    seen: Seen, step: int, metrics: Mapping[str, Metric], limits: Limits
) -> tuple[Seen, list[Finding]]:
    """All margins at 0 is where DPO begins, with a loss of ln 2; there it must not stay."""
    margin = metrics["rewards/margins"]
    spread = (margin.stderr or 0.0) * math.sqrt(max((margin.n or 1) - 1, 1))
    if seen.still is None or math.hypot(margin.value, spread) > limits.stuck:
        return seen._replace(still=None), []
    if step < limits.patience:
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


def _collapse(seen: Seen, step: int, chosen: float, limits: Limits) -> tuple[Seen, list[Finding]]:
    """Margins can grow while both log-probabilities fall: the policy leaves the data."""
    if seen.first_chosen is None:
        return seen._replace(first_chosen=chosen), []
    lost = seen.first_chosen - chosen
    if lost < limits.collapse_nats or lost < limits.collapse * abs(seen.first_chosen):
        return seen, []
    return seen, [
        Finding(
            "chosen_collapsing",
            f"step {step}: the chosen responses' mean log-probability fell from "
            f"{seen.first_chosen:.1f} to {chosen:.1f} nats: margins grow by unlearning both "
            "responses. Raise kl_coef, lower the learning rate, or use an objective with a "
            "likelihood term (rpo).",
            False,
        )
    ]
