"""Each check fires on what it is for, once, and not on a healthy run."""

import json
import math

import numpy as np
import pytest

from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models.batch import Batch
from jax_klrlhf.results import Metric
from jax_klrlhf.training import health

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


def line(loss=0.6, margin=0.2, spread=0.1, ratio=-1.0, chosen=-50.0, norm=1.0):
    """A log line of DPO; margins of 64 pairs, `ratio` the chosen responses' log-ratio."""
    return {
        "loss": Metric(loss),
        "grad_norm": Metric(norm),
        "rewards/chosen": Metric(margin / 2),
        "rewards/margins": Metric(margin, spread, 64),
        "logps/chosen": Metric(float(chosen)),
        "log_ratio/chosen": Metric(float(ratio), 0.5, 64),
    }


def reward_line(margin=0.5, spread=0.1, norm=1.0):
    """Of a reward model, which has no log-probabilities."""
    given = line(margin=margin, spread=spread, norm=norm)
    return {name: m for name, m in given.items() if name[:4] not in ("logp", "log_")}


def evaluation(kl, stderr=0.1, length=10.0):
    return {"eval/kl/ref": Metric(kl, stderr, 64), "eval/length/sampled": Metric(length)}


def watch(lines, every=10):
    """What is found over a run of log lines, carried through JSON as a checkpoint carries it."""
    seen, found = health.Seen(), []
    for number, metrics in enumerate(lines, 1):
        seen, findings = health.observe(seen, every * number, metrics, LIMITS)
        seen = health.Seen.of(json.loads(json.dumps(seen.state())))
        found += findings
    return found


def test_a_healthy_run_is_left_alone():
    lines = [line(math.log(2), 0.0, 0.0)]
    lines += [line(0.69 - 0.05 * k, 0.1 * k, 0.1, -k, -50 - k) for k in range(1, 10)]
    assert watch(lines) == []
    assert watch([evaluation(kl) for kl in (0.0, 1.0, 5.0, 9.0)]) == []


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


def test_collapse_is_measured_from_the_reference_with_its_standard_error():
    # The reference gives the chosen responses -50 nats: half of that is the limit.
    found = watch([line(ratio=-5 * k, chosen=-50 - 5 * k, margin=k) for k in range(12)])
    assert names(found) == ["chosen_collapsing"]
    assert "step 70" in found[0].message  # at 60 the log-ratio is -25, not beyond it
    assert "is -80.0 nats, the reference's -50.0" in found[0].message
    # Two standard errors (of 0.5) beyond the limit, no less.
    assert watch([line(ratio=-25.9, chosen=-75.9)]) == []
    assert names(watch([line(ratio=-26.1, chosen=-76.1)])) == ["chosen_collapsing"]
    # A batch of longer responses is no collapse: each is compared with itself.
    assert watch([line(chosen=-50.0), line(chosen=-400.0)]) == []
    # Nor is a run that goes on from a checkpoint where the policy had fallen far already safe.
    assert names(watch([line(ratio=-60, chosen=-100)])) == ["chosen_collapsing"]
    # Ten nats are much for a short response and little for a long one.
    assert watch([line(ratio=-15, chosen=-515.0)]) == []
    assert names(watch([line(ratio=-15, chosen=-35.0)])) == ["chosen_collapsing"]


def test_a_vanished_gradient_is_told():
    assert names(watch([line(norm=2.0), line(norm=1e-3), line(norm=1e-6)])) == ["vanished_gradient"]
    assert watch([line(norm=2.0), line(norm=1e-3)]) == []
    assert names(watch([line(norm=0.0)])) == ["vanished_gradient"]  # from the beginning
    assert watch([line(norm=math.nan), line(norm=1.0)]) == []  # a skipped update is counted


def test_an_exploded_kl_is_told():
    found = watch([evaluation(2.0), evaluation(347.0)])
    assert names(found) == ["exploded_kl"]
    assert "347.0 nats per response of 10 tokens" in found[0].message
    assert watch([evaluation(150.0, length=200.0)]) == []  # less than a nat per token
    assert watch([evaluation(30.0, stderr=12.0)]) == []
    assert names(watch([evaluation(11.0, length=4.0)])) == ["exploded_kl"]


def test_a_constant_reward_is_told_also_of_a_model_that_was_alive():
    lines = [reward_line(), *[reward_line(0.0, 0.0)] * 6]
    assert names(watch(lines)) == ["constant_reward"]
    assert watch([reward_line(0.0, 0.0)]) == []  # the beginning
    assert watch([reward_line(0.0, 0.1)] * 6) == []  # pairs differ, as often one way


def test_a_reward_model_that_is_sure_and_wrong_is_told():
    found = watch([reward_line(), reward_line() | {"loss": Metric(7.5)}])
    assert names(found) == ["exploded_loss"]
    assert "step 20" in found[0].message
    assert watch([reward_line() | {"loss": Metric(6.5)}]) == []
    assert watch([line(7.5)]) == []  # a policy's loss has its own scale


def test_a_likelihood_run_has_no_margins():
    metrics = {"loss": Metric(3.0), "grad_norm": Metric(1.0), "logps/chosen": Metric(-9.0)}
    assert watch([metrics] * 9) == []
