"""Held-out numbers, calibration, and a KL that is compared with exact enumeration."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_klrlhf.core import objectives
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models import scoring
from jax_klrlhf.training import evaluate, reference, state, tasks
from jax_klrlhf.training import mesh as meshes
from tests.training import toy

MODEL = toy.language_model()
END = 3


@pytest.fixture(scope="module")
def laws():
    """The policy, the reference, and the exact KL of their laws of two-token responses."""
    policy, pi0 = (MODEL.init(jax.random.key(k)) for k in (0, 1))
    prompts = Ragged(jnp.array([[4, 5, 6], [7, 8, 0]]), jnp.array([3, 2]))
    # A response is END, or a token and any second one (cut there).
    rows = [[END]] + [
        [first, second]
        for first, second in itertools.product(range(toy.VOCAB), repeat=2)
        if first != END
    ]
    ids = np.zeros((2, len(rows), 2), np.int32)
    for k, row in enumerate(rows):
        ids[:, k, : len(row)] = row
    lengths = np.tile([len(row) for row in rows], (2, 1))
    responses = Ragged(jnp.asarray(ids), jnp.asarray(lengths.astype(np.int32)))
    score = jax.jit(lambda params: scoring.log_prob(MODEL, params, prompts, responses))
    log_p, log_q = (np.asarray(score(params), np.float64) for params in (policy, pi0))
    np.testing.assert_allclose(np.exp(log_p).sum(1), 1, rtol=1e-5)  # every response is there
    kl = (np.exp(log_p) * (log_p - log_q)).sum(1)
    entropy = -(np.exp(log_p) * log_p).sum(1)
    return policy, pi0, prompts, kl, entropy, (responses, np.exp(log_p))


def test_sampled_kl_is_the_exact_one(laws):
    """Two prompts with 4000 draws each, as 200 prompts of 40 draws: 400 independent units.

    |z| > 5 for a right estimator in one of 1.7 million seeds, for each of three.
    """
    policy, pi0, prompts, kl, entropy, _ = laws
    many = Ragged(jnp.tile(prompts.ids, (100, 1)), jnp.tile(prompts.lengths, 100))
    measure = evaluate.make_divergence(MODEL, samples=40, max_new_tokens=2, stop=(END,))
    found = measure(jax.random.key(2), policy, pi0, [many, many])
    # Between the two prompts the exact values differ; that is no sampling error, so the standard
    # error reported (which includes it) is only used as an upper bound.
    for name, exact in (("kl/ref", kl), ("kl/k1", kl), ("entropy", entropy)):
        metric = found[f"eval/{name}"]
        assert metric.n == 400
        assert abs(metric.value - exact.mean()) < 5 * metric.stderr, name
        assert metric.stderr < 0.1 * exact.mean()
    # Rows that fill a batch do not count: of the first prompt alone it is that prompt's.
    first = np.arange(200) % 2 == 0
    half = measure(jax.random.key(2), policy, pi0, [many, many], [first, first])["eval/kl/ref"]
    assert half.n == 200
    assert abs(half.value - kl[0]) < 5 * half.stderr
    assert abs(kl[0] - kl.mean()) > 10 * half.stderr
    # Sampler and scorer are one function; only rounding is between them.
    assert 0 <= found["eval/sampler_scorer_mismatch"].value < 1e-5
    # The Rao-Blackwell form is the one with less variance.
    assert found["eval/kl/ref"].stderr < found["eval/kl/k1"].stderr
    # On the offline pairs of a batch the mean log-ratio is another number altogether.
    batch = toy.batch(0)
    score = reference.make_log_prob(MODEL)
    offline = float(np.mean(np.asarray(score(policy, batch)) - np.asarray(score(pi0, batch))))
    assert abs(offline - kl.mean()) > 10 * found["eval/kl/ref"].stderr


def test_the_kl_along_all_responses_is_the_kl(laws):
    """The chain rule, exactly: each response weighted by its probability under the policy."""
    policy, pi0, prompts, kl, entropy, (responses, prob) = laws
    along = jax.jit(
        lambda ours, theirs: evaluate.kl_along(
            MODEL, ours, prompts, responses, reference=(MODEL, theirs)
        )
    )(policy, pi0)
    found = {name: np.asarray(x, np.float64).sum(-1) for name, x in along._asdict().items()}
    np.testing.assert_allclose((prob * found["kl"]).sum(1), kl, rtol=1e-4)
    np.testing.assert_allclose((prob * found["entropy"]).sum(1), entropy, rtol=1e-4)
    ratio = found["log_prob"] - found["ref_log_prob"]
    np.testing.assert_allclose((prob * ratio).sum(1), kl, rtol=1e-4)
    # END alone is followed by nothing: its second place spends nothing.
    assert np.abs(np.asarray(along.kl)[:, 0, 1]).max() == 0


def test_kl_of_a_policy_to_itself_is_zero(laws):
    policy, _, prompts, *_ = laws
    measure = evaluate.make_divergence(MODEL, samples=40, max_new_tokens=2, stop=(END,))
    many = Ragged(jnp.tile(prompts.ids, (100, 1)), jnp.tile(prompts.lengths, 100))
    found = measure(jax.random.key(2), policy, policy, [many])
    assert abs(found["eval/kl/ref"].value) < 1e-6
    assert abs(found["eval/kl/k1"].value) < 1e-6


def test_held_out_numbers_are_averages_over_rows_on_any_mesh():
    params = MODEL.init(jax.random.key(0))
    task = tasks.preference(
        MODEL,
        functools.partial(objectives.sigmoid, kl_coef=0.3),
        report_coef=0.3,
    )
    batches = [toy.batch(seed) for seed in (0, 1)]
    weights = [np.where(b.weight > 0, 1, 0).astype(np.float32) for b in batches]
    batches = [b._replace(weight=w) for b, w in zip(batches, weights, strict=True)]
    carried = state.init(jax.random.key(1), params, optax.sgd(1.0))
    found = evaluate.make_evaluate(task)(carried, batches)

    score = reference.make_log_prob(MODEL)
    ratio = np.concatenate([np.asarray(score(params, b)) - b.ref_log_prob for b in batches])
    margin = (0.3 * (ratio[:, 0] - ratio[:, 1]))[np.concatenate(weights) > 0]
    assert found["eval/rewards/margins"].n == 30
    np.testing.assert_allclose(found["eval/rewards/margins"].value, margin.mean(), rtol=1e-5)
    stderr = margin.std(ddof=1) / 30**0.5
    np.testing.assert_allclose(found["eval/rewards/margins"].stderr, stderr, rtol=1e-4)
    np.testing.assert_allclose(found["eval/rewards/accuracies"].value, (margin > 0).mean())
    loss = np.log1p(np.exp(-margin)).mean()
    np.testing.assert_allclose(found["eval/loss"].value, loss, rtol=1e-5)

    mesh = meshes.make(data=8, fsdp=1)
    whole = jax.tree.map(lambda _: jax.NamedSharding(mesh, jax.P()), params)
    spread, laid = meshes.init(jax.random.key(1), params, optax.sgd(1.0), shardings=whole)
    many = evaluate.make_evaluate(task, shardings=laid)(spread, batches)
    for name, metric in found.items():
        np.testing.assert_allclose(many[name].value, metric.value, rtol=1e-5)


def test_calibration_error_of_labels_drawn_from_the_model():
    rng = np.random.default_rng(0)
    margin = rng.normal(0, 2, 200_000)
    sign = np.where(rng.uniform(size=margin.size) < 1 / (1 + np.exp(-margin)), 1, -1)
    # Labels are sorted into (chosen, rejected): the margin is of the one that won. Ten bins of
    # about 20,000: each gap has deviation 0.0035 at most, so their mean exceeds 0.01 never.
    assert evaluate.calibration_error(margin * sign) < 0.01
    # Twice too sure: where the truth is sigma(m), sigma(2m) is claimed.
    claimed, true = (1 / (1 + np.exp(-k * np.abs(margin))) for k in (2, 1))
    expected = float((claimed - true).mean())
    assert evaluate.calibration_error(2 * margin * sign) == pytest.approx(expected, abs=0.01)
    assert evaluate.calibration_error(np.zeros(4)) == 0.0
    assert evaluate.calibration_error(np.full(4, 40.0)) == pytest.approx(0.0)
    assert evaluate.calibration_error(np.full(4, -40.0)) == pytest.approx(1.0)
