"""Averages with their standard errors, files that survive a kill, and the optimizers' schedules."""

import json
import math
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jax_klrlhf import models
from jax_klrlhf.errors import InputError
from jax_klrlhf.results import Metric
from jax_klrlhf.training import history, metrics, optimizers, reference, state, step
from tests.models import tiny


def moments(values, weights):
    return step.moments(jnp.asarray(values, jnp.float32), jnp.asarray(weights, jnp.float32))


def test_mean_and_standard_error_are_the_samples():
    x = np.random.default_rng(0).normal(3.0, 2.0, 50)
    found = metrics.mean(moments(x, np.ones(50)))
    np.testing.assert_allclose(found.value, x.mean(), rtol=1e-5)
    np.testing.assert_allclose(found.stderr, x.std(ddof=1) / 50**0.5, rtol=1e-4)
    assert found.n == 50


def test_rows_of_weight_zero_are_not_there():
    x = np.array([1.0, 2.0, 4.0, np.nan, np.inf])
    found = metrics.mean(moments(x, [1, 1, 1, 0, 0]))
    assert found == metrics.mean(moments(x[:3], [1, 1, 1]))
    assert math.isnan(metrics.mean(moments(x, np.zeros(5))).value)


def test_printed_they_are_a_mean_and_its_error_and_not_four_sums():
    # 7 / 3, and the deviation of 1, 2, 4 over the root of 3.
    assert repr(moments([1.0, 2.0, 4.0], [1, 1, 1])) == "Moments(2.333 ± 0.882)"
    assert "loss=Moments(2.333 ± 0.882)" in repr(info([1.0, 2.0, 4.0], 6, 8))
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), moments([1.0], [1]))
    assert repr(stacked).startswith("Moments(Array([1., 1.]")
    seen = []
    jax.eval_shape(lambda x: seen.append(repr(moments(x, x))), jnp.ones(2))
    assert seen[0].startswith("Moments(")
    assert "±" not in seen[0]


def info(values, tokens, slots):
    loss = moments(values, np.ones(len(values)))
    return step.Info(
        loss=loss,
        report=(loss, None),
        grad_norm=jnp.float32(tokens),
        update_norm=jnp.float32(1.0),
        finite=jnp.bool_(True),
        tokens=jnp.int32(tokens),
        slots=jnp.int32(slots),
    )


def test_summary_of_unequal_steps_is_over_their_rows():
    infos = [info([1.0, 2.0, 3.0], 60, 100), info([10.0], 30, 100)]
    names = {"margin": "rewards/margins", "absent": "rewards/chosen"}
    window = history.Window()
    for i in jax.device_get([i._replace(report=_Report(*i.report)) for i in infos]):
        window = window.add(i, list(names))
    found = window.named(names)
    found |= metrics.rates(infos, seconds=2.0, flops=1.0)
    assert found["loss"].value == 4.0  # not the mean of 2 and 10
    assert found["rewards/margins"].value == 4.0
    assert "rewards/chosen" not in found
    assert found["perf/padding_fraction"].value == pytest.approx(1 - 90 / 200)
    assert found["perf/tokens_per_second"].value == 45
    assert metrics.rates([], seconds=0.0, flops=1.0) == {}
    assert found["grad_norm"].value == 30  # the last step's


class _Report(NamedTuple):
    margin: object
    absent: object


def test_flops_count_what_is_passed_how_often():
    params = {"base": jnp.zeros((4, 4)), "lora": jnp.zeros(2)}
    full = state.init(jax.random.key(0), params, optax.sgd(1.0), ref_params=params)
    assert metrics.flops_per_token(full) == 6 * 18 + 2 * 18
    adapted = state.init(
        jax.random.key(0), params, optax.sgd(1.0), trainable=lambda path: path == "lora"
    )
    assert metrics.flops_per_token(adapted) == 6 * 2 + 4 * 16


def test_mfu_only_where_the_peak_is_known(monkeypatch):
    assert metrics.mfu(1e6, 6e9) is None  # a CPU

    class Device:
        device_kind = "TPU v5 lite"

    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert metrics.mfu(1e5, 6e9) == pytest.approx(6e14 / (4 * 197e12))


def test_json_lines_go_on_where_the_checkpoint_was(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = metrics.json_lines(path)
    for number in (2, 4, 6):
        sink(number, {"loss": Metric(number / 2, 0.1, 5), "bad": Metric(math.nan)})
    sink(4, {"eval/loss": Metric(3.0)})  # made up for by whoever goes on from step 4
    with path.open("a") as file:
        file.write('{"step": 8, "lo')  # killed while writing
    sink = metrics.json_lines(path, after=4)
    sink(6, {"loss": Metric(9.0)})
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(2, 1.0), (4, 2.0), (6, 9.0)]
    assert rows[0]["bad"] is None
    assert rows[0]["loss/stderr"] == 0.1
    with pytest.raises(InputError, match="cannot be written"):
        metrics.json_lines(tmp_path / "absent" / "metrics.jsonl")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"folder: cannot be written \(Is a directory"):
        metrics.json_lines(tmp_path / "folder")


@pytest.mark.parametrize(
    "damage", [b'{"step": 3, "lo', b"\xff\xfe", b"[]", b"3", b"[" * 10**5, b""]
)
def test_a_bad_line_in_the_middle_costs_only_itself(damage, tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": k, "loss": 1.0}).encode() for k in range(1, 51)]
    lines[2] = damage
    path.write_bytes(b"\n".join(lines) + b"\n")
    metrics.json_lines(path, after=49)
    rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, *range(4, 50)]


def test_a_kill_while_a_history_is_cut_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    content = "".join(json.dumps({"step": k}) + "\n" for k in range(100))
    path.write_text(content)
    monkeypatch.setattr(os, "replace", lambda *names: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        metrics.json_lines(path, after=50)
    assert path.read_text() == content


def test_tensorboard_reads_what_was_written(tmp_path):
    sink = metrics.tensorboard(tmp_path)
    sink(3, {"rewards/margins": Metric(0.5)})
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (event,) = events.Scalars("rewards/margins")
    assert (event.step, event.value) == (3, 0.5)


def test_wandb_writes_what_it_was_given(tmp_path, monkeypatch):
    """Without a network: the names and values stand in the run's file, as text."""
    client = pytest.importorskip("wandb", reason="wandb is not installed (the extra `logging`)")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    sink = metrics.wandb(tmp_path, project="a_project", config={"a_setting": "a_value"})
    sink(3, {"rewards/margins": Metric(0.4375, 0.1, 8)})
    client.finish()
    client.teardown()  # Its own process writes the file: only when that has ended is it whole.
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    written = file.read_bytes()
    for text in (b"a_project", b"a_setting", b"a_value", b"rewards/margins", b"0.4375"):
        assert text in written


def test_schedules():
    rate = optimizers.schedule(1.0, warmup=4, steps=14, decay=optimizers.linear)
    found = [float(rate(step)) for step in range(15)]
    np.testing.assert_allclose(found[:5], [0.25, 0.5, 0.75, 1.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(found[4:], np.linspace(1, 0, 11), atol=1e-6)
    cosine = optimizers.schedule(2.0, warmup=0, steps=10, decay=optimizers.cosine)
    assert float(cosine(0)) == 2.0
    np.testing.assert_allclose(float(cosine(10)), 0.2, rtol=1e-5)
    assert float(optimizers.schedule(0.3, warmup=0, steps=9)(8)) == pytest.approx(0.3)
    with pytest.raises(ValueError, match="shorter"):
        optimizers.schedule(1.0, warmup=5, steps=5)


@pytest.mark.parametrize("make", [optimizers.adamw, optimizers.adafactor])
def test_optimizers_clip_the_gradient_not_the_step(make):
    """Adam's and Adafactor's steps do not depend on a gradient's scale; clipping shows in it."""
    params, gradient = {"w": jnp.ones(4)}, {"w": jnp.full(4, 100.0)}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for clip in (None, 1.0):
            optimizer = make(0.1, clip=clip)
            updates, moved = optimizer.update(gradient, optimizer.init(params), params)
            np.testing.assert_allclose(updates["w"], -0.1, rtol=1e-3)
            second = [x for x in jax.tree.leaves(moved) if x.shape == (4,)]
            largest = max(float(jnp.abs(x).max()) for x in second)
            assert (largest > 1.0) == (clip is None)


def test_a_cache_of_another_model_is_refused_by_name(tmp_path):
    path = tmp_path / "reference.safetensors"
    ours = reference.Identity(model="a" * 64, data="b", tokenizer="c", lengths="8+8")
    table = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
    reference.save_cache(path, table, ours)
    np.testing.assert_array_equal(reference.load_cache(path, ours), table)
    for part in ours._fields:
        theirs = ours._replace(**{part: "other"})
        with pytest.raises(InputError, match=f"another {part}: "):
            reference.load_cache(path, theirs)
    whole = path.read_bytes()
    for place in range(len(whole) - table.nbytes, len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(InputError, match="damaged, its content is not what was written"):
            reference.load_cache(path, ours)
    for damage in (b"", whole[:10], whole[:-1], b"not a cache"):
        path.write_bytes(damage)
        with pytest.raises(InputError, match="not a reference cache"):
            reference.load_cache(path, ours)
    with pytest.raises(InputError, match="could not be written"):
        reference.save_cache(tmp_path / "reference.safetensors" / "x", table, ours)


NORMS = {"attention_norm/scale", "mlp_norm/scale", "final_norm/scale"}
POST = {"attention_post_norm/scale", "mlp_post_norm/scale"}
QK = {"query_norm/scale", "key_norm/scale"}
QKV_BIAS = {"query/bias", "key/bias", "value/bias"}
MATRICES = {f"{n}/kernel" for n in ("query", "key", "value", "out", "up", "gate", "down")} | {
    "embedding"
}
LAYER_NORMS = {name.replace("scale", "bias") for name in NORMS}
FAMILIES = {
    # The facts of a family; what must not decay; what must, besides the usual matrices.
    "llama": ({"tied": False}, NORMS, {"unembedding"}),
    "qwen2": ({"qkv_bias": True}, NORMS | QKV_BIAS, set()),
    "qwen3": ({"qk_norm": True}, NORMS | QK, set()),
    "gemma2": ({"norm": "rms_offset", "post_norms": True}, NORMS | POST, set()),
    "gemma3_text": (
        {"norm": "rms_offset", "post_norms": True, "qk_norm": True}, NORMS | POST | QK, set()
    ),
    "gpt2": (
        {"norm": "layer", "qkv_bias": True, "out_bias": True, "mlp_bias": True, "gated": False,
         "learned_positions": True, "ropes": None},
        NORMS | LAYER_NORMS | QKV_BIAS | {"out/bias", "up/bias", "down/bias"},
        {"positions"},
    ),
}  # fmt: skip


def moved_by_decay(params):
    """Of each parameter whether decay alone moves it: the gradient is zero."""
    optimizer = optimizers.adamw(0.1, weight_decay=0.5)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        zero = jax.tree.map(jnp.zeros_like, params)
        updates, _ = optimizer.update(zero, optimizer.init(params), params)
    found = {}
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        name = state.path_name(path).removeprefix("layers/")
        found[name] = bool(np.any(np.asarray(update) != 0))
        value = params
        for key in path:
            value = value[key.key]
        if found[name]:  # by the rate times the strength, no more
            np.testing.assert_allclose(update, -0.05 * value, rtol=1e-5)
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_decay_leaves_norms_and_biases_alone_leaf_by_leaf(name):
    facts, still, more = FAMILIES[name]
    config = models.ModelConfig(
        vocab_size=8, hidden_size=4, intermediate_size=6, layers=2, heads=2, kv_heads=1,
        head_dim=2, max_length=8, family=name, **facts,
    )  # fmt: skip
    found = moved_by_decay(jax.tree.map(lambda x: x + 0.3, tiny.params(config)))
    matrices = MATRICES - (set() if config.gated else {"gate/kernel"})
    assert found == dict.fromkeys(still, False) | dict.fromkeys(matrices | more, True)


def test_decay_acts_on_adapters_and_a_rule_of_ones_own_replaces_it():
    adapter = {"lora": {"layers": {"query": {"a": jnp.ones((2, 4)), "b": jnp.ones((4, 2))}}}}
    assert all(moved_by_decay(adapter).values())
    everything = optimizers.adamw(0.1, weight_decay=0.5, decay=lambda path: path == "bias")
    params = {"bias": jnp.ones(2), "kernel": jnp.ones(2)}
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = everything.update(
            jax.tree.map(jnp.zeros_like, params), everything.init(params), params
        )
    assert float(updates["bias"][0]) != 0
    assert float(updates["kernel"][0]) == 0
