"""The training step: what it minimizes, whatever the cut, the mesh and the precision."""

import dataclasses
import functools
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_klrlhf.core import objectives
from jax_klrlhf.training import reference, state, step, tasks
from tests.training import toy

MODEL = toy.language_model()
LOSS = functools.partial(objectives.sigmoid, kl_coef=0.3)
SGD = optax.sgd(1.0)
# Compiled once for the tests that look at one plain step.
PLAIN = step.make_train_step(MODEL, SGD, LOSS)
LOG_PROB = reference.make_log_prob(MODEL)


def fresh(optimizer=SGD, **options):
    params = MODEL.init(jax.random.key(0))
    return state.init(jax.random.key(1), params, optimizer, **options)


def traced_once():
    """The loss; a program in which it stands may be compiled once."""
    chex.clear_trace_counter()

    def loss(scores):
        return LOSS(scores)

    counted: Any = chex.assert_max_traces(loss, n=1)
    return counted


def parameters(carried):
    return jax.tree.map(np.asarray, carried.params)


def close(actual, expected, **tolerance):
    jax.tree.map(partial(np.testing.assert_allclose, **tolerance), actual, expected)


def brute_loss(params, batch):
    """Weighted mean of the loss in float64 NumPy, a row and a token at a time."""
    table = np.asarray(params["embed"]["table"], np.float64)
    mix, skip = (np.asarray(params["block"][k], np.float64) for k in ("mix", "skip"))
    out = np.asarray(params["head"]["out"], np.float64)

    def log_prob(row, k):
        prompt = batch.prompts.ids[row, : batch.prompts.lengths[row]]
        response = batch.responses.ids[row, k, : batch.responses.lengths[row, k]]
        read, total = list(prompt), 0.0
        for token in response:
            vectors = table[read]
            logits = np.tanh(vectors.mean(0) @ mix + vectors[-1] @ skip) @ out
            total += logits[token] - np.log(np.exp(logits).sum())
            read.append(token)
        return total

    losses = []
    for row in range(len(batch.weight)):
        ratio = [log_prob(row, k) - float(batch.ref_log_prob[row, k]) for k in (0, 1)]
        losses.append(np.log1p(np.exp(-0.3 * (ratio[0] - ratio[1]))))
    return np.average(losses, weights=batch.weight)


def test_loss_is_the_weighted_mean_and_the_step_its_gradient():
    batch = toy.batch(0)
    before = fresh()
    old = parameters(before)
    after, info = PLAIN(before, batch)
    loss = float(info.loss.total / info.loss.weight)
    np.testing.assert_allclose(loss, brute_loss(old, batch), rtol=1e-5)
    # The step of plain gradient descent is the gradient: a finite difference along it.
    gradient = jax.tree.map(lambda a, b: a - np.asarray(b), old, after.params)
    square = sum(float((g.astype(np.float64) ** 2).sum()) for g in jax.tree.leaves(gradient))
    move = 1e-4
    up, down = (
        brute_loss(
            jax.tree.map(lambda p, g, s=s: p.astype(float) + s * move * g, old, gradient), batch
        )
        for s in (1.0, -1.0)
    )
    np.testing.assert_allclose((up - down) / (2 * move), square, rtol=1e-4)
    np.testing.assert_allclose(float(info.grad_norm), square**0.5, rtol=1e-4)
    assert int(after.step) == 1


def test_accumulation_equals_the_full_batch_however_unequal_the_parts():
    batch = toy.batch(1)
    weights = batch.weight.copy()
    weights[0::4] *= 100.0  # the first micro-batch outweighs the others: a mean of means fails
    batch = batch._replace(weight=weights)
    whole, info = PLAIN(fresh(), batch)
    parts, cut = step.make_train_step(MODEL, SGD, LOSS, micro_batches=4)(fresh(), batch)
    close(parameters(parts), parameters(whole), rtol=1e-5, atol=1e-6)
    close(cut.loss, info.loss, rtol=1e-5)
    close(cut.report, info.report, rtol=1e-5, atol=1e-5)


def test_rows_without_weight_are_as_if_deleted_even_when_degenerate():
    # The row of weight 0 has an empty rejected response: this loss divides by its length, and
    # 0 * (1 / 0) would reach the parameters through the chosen one.
    loss = lambda s: -s.chosen_log_prob / s.length[..., 1].astype(jnp.float32)  # noqa: E731
    batch = toy.batch(2)
    lengths = batch.responses.lengths.copy()
    lengths[-1] = [3, 0]
    batch = batch._replace(responses=batch.responses._replace(lengths=lengths))
    train = step.make_train_step(MODEL, SGD, loss, reference=reference.free)
    kept, info = train(fresh(), batch)
    deleted, _ = train(fresh(), jax.tree.map(lambda x: x[:-1], batch))
    assert bool(info.finite)
    close(parameters(kept), parameters(deleted), rtol=1e-5, atol=1e-6)


def test_a_tasks_own_weight_is_a_constant_to_the_gradient():
    batch, params = jax.tree.map(jnp.asarray, toy.batch(0)), MODEL.init(jax.random.key(0))
    plain = tasks.likelihood(MODEL)
    tilted = dataclasses.replace(plain, weight=lambda s: jnp.exp(s.chosen_log_prob / 9))
    carried = fresh()
    scored = plain.score(params, None, batch)
    weight = batch.weight * jnp.exp(scored.chosen_log_prob / 9)

    def held(params):
        return jnp.sum(weight * plain.loss(plain.score(params, None, batch)))

    def loss(params):
        return step.weighted_sums(tilted, carried, None, params, batch)[0]

    found, expected = jax.jit(lambda p: (jax.grad(loss)(p), jax.grad(held)(p)))(params)
    close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_batch_of_no_weight_moves_nothing():
    batch = toy.batch(3)
    batch = batch._replace(weight=np.zeros_like(batch.weight))
    before = fresh()
    old = parameters(before)
    after, info = PLAIN(before, batch)
    close(parameters(after), old, rtol=0)
    assert bool(info.finite)


def test_live_reference_equals_the_precomputed_one():
    pi0 = MODEL.init(jax.random.key(5))
    batches = [toy.batch(seed) for seed in (4, 5)]
    cached = fresh(fingerprint=state.digest(pi0))
    live = fresh(ref_params=pi0)
    assert state.fingerprint_text(cached.fingerprint) == state.fingerprint(pi0)
    close(cached.fingerprint, live.fingerprint, rtol=0)
    score = LOG_PROB
    one = PLAIN
    two = step.make_train_step(MODEL, SGD, LOSS, reference=reference.live)
    for batch in batches:
        cached, _ = one(cached, batch._replace(ref_log_prob=score(pi0, batch)))
        live, _ = two(live, batch._replace(ref_log_prob=None))
    close(parameters(cached), parameters(live), rtol=1e-5, atol=1e-6)
    close(live.ref_params, pi0, rtol=0)


def test_frozen_parameters_have_no_moments_and_do_not_move():
    adam = optax.adamw(1e-2)
    before = fresh(adam, trainable=lambda path: path.startswith("head"))
    batch = toy.batch(6)
    moments = [x for x in jax.tree.leaves(before.opt_state) if x.ndim]
    assert sum(x.size for x in moments) == 2 * before.params["head"]["out"].size
    policy = jax.tree.map(np.asarray, before.policy)
    train = step.make_train_step(MODEL, adam, LOSS)
    after, _ = train(before, batch)
    assert not np.allclose(after.policy["head"]["out"], policy["head"]["out"])
    close(after.policy["block"], policy["block"], rtol=0)
    # The frozen base is the reference without a second copy: with the adapters' values of the
    # start put back, the policy is pi0.
    base = reference.base(lambda params: params | {"head": policy["head"]})
    score = LOG_PROB
    second, info = step.make_train_step(MODEL, adam, LOSS, reference=base)(after, batch)
    expected = batch._replace(ref_log_prob=score(policy, batch))
    same, _ = train(fresh(adam, trainable=lambda path: path.startswith("head")), batch)
    third, told = train(same, expected)
    close(parameters(second), parameters(third), rtol=1e-5, atol=1e-6)
    close(info.loss, told.loss, rtol=1e-5)


def test_no_gradient_passes_through_the_reference():
    # The reference is the policy itself, held still: the loss is ln 2, and must not stay there.
    itself = reference.base(lambda params: params)
    train = step.make_train_step(MODEL, SGD, LOSS, reference=itself)
    _, info = train(fresh(), toy.batch(0))
    np.testing.assert_allclose(float(info.loss.total / info.loss.weight), np.log(2), rtol=1e-6)
    assert float(info.grad_norm) > 1e-2


def test_bfloat16_compute_keeps_float32_masters():
    batch = toy.batch(7)
    full, info = PLAIN(fresh(), batch)
    half, told = step.make_train_step(MODEL, SGD, LOSS, compute_dtype=jnp.bfloat16)(fresh(), batch)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(half.params))
    # 8 bits of mantissa: each term of a dozen-token log-probability errs by at most 2^-8.
    np.testing.assert_allclose(float(told.loss.total), float(info.loss.total), rtol=2e-2)
    assert float(told.loss.total) != float(info.loss.total)
    close(parameters(half), parameters(full), atol=5e-2)


def test_not_finite_leaves_the_parameters_and_says_so():
    batch = toy.batch(8)
    batch = batch._replace(ref_log_prob=np.full_like(batch.ref_log_prob, np.nan))
    adam = optax.adam(1e-2)
    before = fresh(adam)
    old = parameters(before)
    after, info = step.make_train_step(MODEL, adam, LOSS)(before, batch)
    assert not bool(info.finite)
    close(parameters(after), old, rtol=0)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(after.opt_state))


def test_a_finite_loss_with_a_gradient_that_is_not_leaves_the_parameters_too():
    # The root of 0 is 0, and its slope there is infinite.
    loss = lambda s: LOSS(s) + jnp.sqrt(s.chosen_log_prob - s.chosen_log_prob)  # noqa: E731
    before = fresh()
    old = parameters(before)
    after, info = step.make_train_step(MODEL, SGD, loss)(before, toy.batch(8))
    assert np.isfinite(float(info.loss.total))
    assert not np.isfinite(float(info.grad_norm))
    assert not bool(info.finite)
    close(parameters(after), old, rtol=0)
    assert int(after.step) == 1


def test_the_state_is_given_away_and_the_callers_parameters_are_not():
    params = MODEL.init(jax.random.key(0))
    before = state.init(jax.random.key(1), params, SGD, ref_params=params)
    train = step.make_train_step(MODEL, SGD, traced_once(), reference=reference.live)
    after, _ = train(before, toy.batch(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    train(after, toy.batch(1))  # one trace for equal shapes
    with pytest.raises(AssertionError, match="traced > 1 times"):
        train(fresh(ref_params=params), toy.batch(1, rows=8))


@pytest.mark.parametrize("trainable", [None, lambda path: path.startswith("head")])
def test_loaded_parameters_compile_one_program(trainable):
    """Parameters bound to a device, as loaded ones are: the second step has the first's type."""
    params = jax.device_put(MODEL.init(jax.random.key(0)), jax.devices()[0])
    optimizer = optax.adam(1e-2)
    take = step.make_train_step(MODEL, optimizer, traced_once())
    carried = state.init(jax.random.key(1), params, optimizer, trainable=trainable)
    batch = reference.precompute(MODEL, params, [toy.batch(0)])[0]
    for _ in range(3):
        carried, _ = take(carried, batch)
    assert int(carried.step) == 3


def test_reported_names_mean_what_they_say():
    batch = toy.batch(9)
    score = LOG_PROB
    log_prob = np.asarray(score(MODEL.init(jax.random.key(0)), batch))
    _, info = step.make_train_step(MODEL, SGD, LOSS, report_coef=0.3)(fresh(), batch)
    reward = 0.3 * (log_prob - batch.ref_log_prob)
    mean = jax.tree.map(lambda m: m.total / m.weight, info.report, is_leaf=is_moments)
    average = partial(np.average, weights=batch.weight)
    close(mean.chosen_reward, average(reward[:, 0]), rtol=1e-5)
    close(mean.rejected_reward, average(reward[:, 1]), rtol=1e-5)
    close(mean.accuracy, average(reward[:, 0] > reward[:, 1]), rtol=1e-6)
    close(mean.chosen_log_prob, average(log_prob[:, 0]), rtol=1e-5)
    lengths = batch.prompts.lengths.sum() + batch.responses.lengths.sum()
    assert int(info.tokens) == lengths
    assert int(info.slots) == 16 * (6 + 2 * 5)


def is_moments(x):
    return isinstance(x, step.Moments)


def test_wrong_static_facts_are_refused_with_the_remedy():
    batch = toy.batch(0)
    none = batch._replace(ref_log_prob=None)
    with pytest.raises(ValueError, match=r"precompute.*ref_params"):
        PLAIN(fresh(), none)
    with pytest.raises(ValueError, match="init"):
        step.make_train_step(MODEL, SGD, LOSS, reference=reference.live)(fresh(), none)
    with pytest.raises(ValueError, match="multiple of 3"):
        step.make_train_step(MODEL, SGD, LOSS, micro_batches=3)(fresh(), batch)
    with pytest.raises(ValueError, match="one number per row"):
        step.make_train_step(MODEL, SGD, lambda s: LOSS(s).sum())(fresh(), batch)
    with pytest.raises(ValueError, match="no parameter is trainable"):
        fresh(trainable=lambda path: False)


def test_fingerprint_names_every_bit_and_not_the_layout():
    params = MODEL.init(jax.random.key(0))
    name = state.fingerprint(params)
    assert len(name) == 64
    assert int(name, 16) >= 0
    changed = jax.tree.map(jnp.copy, params)
    table = changed["embed"]["table"]
    changed["embed"]["table"] = table.at[3, 2].set(jnp.nextafter(table[3, 2], jnp.inf))
    swapped = params | {"head": params["block"], "block": params["head"]}
    swap_rows = params | {"embed": {"table": params["embed"]["table"][::-1]}}
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    others = [state.fingerprint(p) for p in (changed, swapped, swap_rows, half)]
    assert len({name, *others}) == 5
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(params, jax.NamedSharding(mesh, jax.P("x")))
    assert state.fingerprint(spread) == name
