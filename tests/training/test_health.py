"""Each check fires on what it is for, once, and not on a healthy run."""

import math

import numpy as np
import pytest

from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.results import Metric
from jax_klrlhf.training import health
from jax_klrlhf.training.tasks import Batch

BEGIN, END = 1, 2
LIMITS = health.Limits(patience=20)


def batch(prompts, responses, weight=None):
    def ragged(rows):
        width = max(map(len, rows))
        ids = np.array([row + [0] * (width - len(row)) for row in rows], np.int32)
        return ids, np.array([len(row) for row in rows], np.int32)

    ids, lengths = ragged([row for pair in responses for row in pair])
    count = len(prompts)
    return Batch(
        Ragged(*ragged(prompts)),
        Ragged(ids.reshape(count, 2, -1), lengths.reshape(count, 2)),
        np.ones(count, np.float32) if weight is None else np.array(weight, np.float32),
    )


GOOD = batch([[1, 5, 6], [1, 7]], [[[5, 2], [6, 7, 2]], [[8], [9, 2]]])
CUT = GOOD._replace(responses=Ragged(GOOD.responses.ids, np.ones((2, 2), np.int32)))


def names(findings):
    return [finding.name for finding in findings]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (GOOD, []),
        (batch([[1, 5]], [[[5], [6, 7]]]), ["no_end_token"]),
        # The end stands after the length: it is padding, not in the loss.
        (CUT, ["no_end_token"]),
        (batch([[1, 1, 5], [1, 7]], [[[5, 2], [6, 2]]] * 2), ["doubled_begin_token"]),
        (batch([[1, 5]], [[[1, 5, 2], [6, 2]]]), ["begin_token_in_response"]),
        # What a row without weight holds does not matter.
        (batch([[1, 5], [1, 1]], [[[5, 2], [6, 2]], [[1], [1]]], [1, 0]), []),
    ],
    ids=["good", "no end", "end behind the length", "doubled", "in response", "fill row"],
)  # fmt: skip
def test_batches(given, expected):
    findings = health.check_batch(given, begin=BEGIN, end=END)
    assert names(findings) == expected
    assert not any(finding.stop for finding in findings)


def test_without_begin_and_end_tokens_nothing_is_said():
    assert health.check_batch(batch([[1, 1]], [[[1], [1]]]), begin=None, end=None) == []


def line(loss=0.6, margin=0.2, spread=0.1, chosen=-50.0, norm=1.0):
    return {
        "loss": Metric(loss),
        "grad_norm": Metric(norm),
        "rewards/chosen": Metric(margin / 2),
        "rewards/margins": Metric(margin, spread, 64),
        "logps/chosen": Metric(float(chosen)),
    }


def watch(lines, every=10):
    """What is found over a run of log lines."""
    seen, found = health.Seen(), []
    for number, metrics in enumerate(lines, 1):
        seen, findings = health.observe(seen, every * number, metrics, LIMITS)
        found += findings
    return found


def test_a_healthy_run_is_left_alone():
    lines = [line(math.log(2), 0.0, 0.0)]
    lines += [line(0.69 - 0.05 * k, 0.1 * k, 0.1, -50 - k) for k in range(1, 10)]
    assert watch(lines) == []


def test_stuck_at_ln2_is_told_once_with_the_causes():
    found = watch([line(math.log(2), 1e-9, 1e-9)] * 6)
    assert names(found) == ["stuck_at_ln2"]
    assert not found[0].stop
    assert "step 20" in found[0].message
    assert "learning rate" in found[0].message
    # A mean margin of 0 over pairs that moved apart is not a run that stands still.
    assert watch([line(0.7, 0.0, 0.3)] * 6) == []
    # Nor one that moved once.
    assert watch([line(0.6, 0.5), *[line(math.log(2), 0.0, 0.0)] * 6]) == []


def test_collapsing_log_probabilities_are_told():
    found = watch([line(chosen=-50.0 - 5 * k, margin=k) for k in range(12)])
    assert names(found) == ["chosen_collapsing"]
    assert "-50.0 to -75.0" in found[0].message
    # Ten nats are much for a short response and little for a long one.
    assert watch([line(chosen=-500.0), line(chosen=-515.0)]) == []


@pytest.mark.parametrize("bad", [{"loss": math.nan}, {"norm": math.inf}])
def test_what_is_not_finite_stops(bad):
    (finding,) = watch([line(**bad)])
    assert finding.stop
    assert "not_finite" in finding.name
    assert "learning rate" in finding.message


def test_a_likelihood_run_has_no_margins():
    metrics = {"loss": Metric(3.0), "grad_norm": Metric(1.0), "logps/chosen": Metric(-9.0)}
    assert watch([metrics] * 9) == []
