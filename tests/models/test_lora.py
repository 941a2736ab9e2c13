"""Adapters: nothing at the start, a merged matrix at the end, PEFT's files in between."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.errors import InputError
from jax_klrlhf.models import lora as lora_lib
from jax_klrlhf.models import partition, pretrained
from jax_klrlhf.models.config import ModelConfig
from jax_klrlhf.models.lora import Lora
from jax_klrlhf.models.transformer import language_model
from tests.models import tiny

CONFIG = ModelConfig(
    vocab_size=31,
    hidden_size=12,
    intermediate_size=20,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=4,
    max_length=32,
    family="qwen2",
    qkv_bias=True,
)
LORA = Lora(rank=3, alpha=12.0)
PROMPTS = Ragged(jnp.arange(10, dtype=jnp.int32).reshape(2, 5), jnp.array([5, 3], jnp.int32))
IDS = (jnp.arange(24, dtype=jnp.int32) % 31).reshape(2, 3, 4)


def logits(model, params):
    prefix = model.prefill(params, PROMPTS)
    return model.unembed(params, model.extend(params, prefix, IDS))


PLAIN, ADAPTED = language_model(CONFIG), lora_lib.language_model(CONFIG, LORA)
plain_logits = jax.jit(lambda params: logits(PLAIN, params))
adapted_logits = jax.jit(lambda params: logits(ADAPTED, params))


@pytest.fixture(scope="module")
def params():
    return {
        "base": tiny.params(CONFIG),
        "lora": lora_lib.init(jax.random.key(0), CONFIG, LORA),
    }


@pytest.fixture(scope="module")
def moved(params):
    """As after some training: no factor is zero."""
    rng = np.random.default_rng(1)

    def noisy(x):
        return jnp.asarray(x + 0.2 * rng.normal(size=x.shape), x.dtype)

    return params | {"lora": jax.tree.map(noisy, params["lora"])}


def test_policy_is_the_base_at_the_start(params):
    shapes = jax.eval_shape(ADAPTED.init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    np.testing.assert_array_equal(adapted_logits(params), plain_logits(params["base"]))


def test_merged_is_the_policy(moved):
    found = adapted_logits(moved)
    assert np.abs(found - plain_logits(moved["base"])).max() > 0.1
    merged = lora_lib.merge(moved, LORA)
    # Other roundings on the way: the tolerance of logits in float32, a thousandth of the change.
    np.testing.assert_allclose(plain_logits(merged), found, atol=1e-4)
    # By hand, for one matrix: W + (alpha / r) A B.
    update = moved["lora"]["layers"]["key"]
    product = np.asarray(update["a"][1], float) @ np.asarray(update["b"][1], float)
    kernel = np.asarray(moved["base"]["layers"]["key"]["kernel"][1], float)
    expected = kernel + 4.0 * product.reshape(kernel.shape)
    np.testing.assert_allclose(merged["layers"]["key"]["kernel"][1], expected, atol=1e-6)


def test_gradient_reaches_b_at_the_start_and_never_the_base(params):
    def loss(params):
        return jnp.square(logits(ADAPTED, params)).mean()

    grads = jax.jit(jax.grad(loss))(params)
    assert all(not np.any(g) for g in jax.tree.leaves(grads["base"]))
    for name, update in grads["lora"]["layers"].items():
        assert np.abs(update["b"]).max() > 0, name
        assert not np.any(update["a"]), name


def test_a_masked_optimizer_moves_the_adapter_only(params):
    mask = lora_lib.mask(params)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    optimizer = optax.masked(optax.sgd(0.1), mask)
    state = optimizer.init(params)
    ones = jax.tree.map(lambda m, p: jnp.full_like(p, float(m)), mask, params)
    updates, _ = optimizer.update(ones, state, params)
    after = optax.apply_updates(params, updates)
    jax.tree.map(np.testing.assert_array_equal, after["base"], params["base"])
    assert np.any(after["lora"]["layers"]["up"]["b"])


def test_only_the_targets_are_adapted():
    adapter = lora_lib.init(jax.random.key(0), CONFIG, Lora(rank=2, targets=("query", "value")))
    assert set(adapter["layers"]) == {"query", "value"}
    assert adapter["layers"]["query"]["a"].shape == (2, 12, 2)
    assert adapter["layers"]["value"]["b"].shape == (2, 2, 8)
    with pytest.raises(ValueError, match="targets are some of query"):
        Lora(targets=("q_proj",))


def test_peft_files(moved, tmp_path):
    """Names and shapes as PEFT documents them: ``lora_A [r, in]``, ``lora_B [out, r]``."""
    folder = lora_lib.save(tmp_path / "adapter", CONFIG, LORA, moved["lora"], base="some/base")
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA"
    assert (settings["r"], settings["lora_alpha"]) == (3, 12.0)
    assert settings["base_model_name_or_path"] == "some/base"
    projections = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert settings["target_modules"] == projections
    tensors = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 2
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_{}.weight"
    a, b = tensors[name.format("A")], tensors[name.format("B")]
    assert (a.shape, b.shape) == ((3, 12), (8, 3))
    # PEFT adds (alpha / r) B A to torch's [out, in] weight.
    merged = lora_lib.merge(moved, LORA)["layers"]["value"]["kernel"][1]
    kernel = moved["base"]["layers"]["value"]["kernel"][1]
    np.testing.assert_allclose(
        np.asarray(merged - kernel).reshape(12, 8).T, 4.0 * (b @ a), atol=1e-6
    )
    lora, adapter = lora_lib.load(folder, CONFIG)
    assert lora == Lora(rank=3, alpha=12.0, targets=lora.targets)
    assert set(lora.targets) == set(LORA.targets)
    jax.tree.map(np.testing.assert_array_equal, adapter, moved["lora"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"target_modules": ["lm_head"]}, "target_modules"),
        ({"r": 5}, "has shape [3, 12], but this model asks for [5, 12]"),
    ],
)
def test_other_adapters_are_refused(moved, tmp_path, change, words):
    folder = lora_lib.save(tmp_path / "adapter", CONFIG, LORA, moved["lora"])
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError) as error:
        lora_lib.load(folder, CONFIG)
    assert words in str(error.value)


def test_adapters_are_sharded_like_what_they_adapt(params):
    mesh = jax.sharding.AbstractMesh((2, 2), ("fsdp", "tensor"))
    specs = jax.tree.map(lambda s: s.spec, partition.shardings(params, mesh))
    assert specs["base"]["layers"]["query"]["kernel"][1:3] == ("fsdp", "tensor")
    assert specs["lora"]["layers"]["query"]["a"][1] == "fsdp"
    assert specs["lora"]["layers"]["query"]["b"][2] == "tensor"


GPT2 = ModelConfig(
    vocab_size=31,
    hidden_size=12,
    intermediate_size=20,
    layers=2,
    heads=3,
    kv_heads=3,
    head_dim=4,
    max_length=32,
    family="gpt2",
    norm="layer",
    gated=False,
    activation="gelu_tanh",
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    learned_positions=True,
    ropes=None,
)


@pytest.mark.parametrize(
    "targets", [("query", "key", "value", "out", "up", "down"), ("query", "value"), ("down",)]
)
def test_gpt2_adapters_in_peft_files(tmp_path, targets):
    """Its query, key and value are one matrix: PEFT's update of that is ours, column by column."""
    lora = Lora(rank=2, alpha=3.0, targets=targets)
    rng = np.random.default_rng(0)
    adapter = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype),
        lora_lib.init(jax.random.key(0), GPT2, lora),
    )
    folder = lora_lib.save(tmp_path / "adapter", GPT2, lora, adapter)
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["fan_in_fan_out"]
    tensors = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    base = tiny.params(GPT2)
    before, after = (
        pretrained.save(tmp_path / name, GPT2, p) / "model.safetensors"
        for name, p in (
            ("base", base),
            ("merged", lora_lib.merge({"base": base, "lora": adapter}, lora)),
        )
    )
    before, after = safetensors.numpy.load_file(before), safetensors.numpy.load_file(after)
    changed = set()
    for name in before:
        update = after[name].astype(float) - before[name]
        module = name.removesuffix(".weight")
        key = f"base_model.model.{module}.lora_{{}}.weight"
        if key.format("A") not in tensors:
            np.testing.assert_array_equal(update, 0)
            continue
        changed.add(module.partition(".h.")[2][2:])
        short = next(t for t in settings["target_modules"] if module.endswith("." + t))
        # What PEFT does: alpha / r of the module's own, times (B A) as [in, out].
        rank = settings["rank_pattern"].get(short, settings["r"])
        alpha = settings["alpha_pattern"].get(short, settings["lora_alpha"])
        a, b = tensors[key.format("A")], tensors[key.format("B")]
        assert a.shape[0] == b.shape[1] == rank
        np.testing.assert_allclose(update, alpha / rank * (b @ a).T, atol=1e-5)
    assert changed == set(settings["target_modules"])
    again, found = lora_lib.load(folder, GPT2)
    assert again == lora
    jax.tree.map(np.testing.assert_array_equal, found, adapter)


def test_a_gpt2_adapter_by_peft_shares_its_low_rank(tmp_path):
    """PEFT's own ``c_attn`` has one A for query, key and value: three adapters with equal A."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 12)), rng.normal(size=(36, 2))
    key = "base_model.model.transformer.h.{}.attn.c_attn.lora_{}.weight"
    tensors = {
        key.format(i, x): m.astype(np.float32) for i in (0, 1) for x, m in (("A", a), ("B", b))
    }
    (tmp_path / "a").mkdir()
    safetensors.numpy.save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["c_attn"]}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(settings))
    lora, adapter = lora_lib.load(tmp_path / "a", GPT2)
    assert lora == Lora(rank=2, alpha=8.0, targets=("query", "key", "value"))
    for i, name in enumerate(lora.targets):
        part = adapter["layers"][name]
        np.testing.assert_allclose(
            np.asarray(part["a"][1] @ part["b"][1]), (b[12 * i : 12 * (i + 1)] @ a).T, atol=1e-5
        )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"r": "2"}, "r='2'"),
        ({"r": 0}, "r=0"),
        ({"target_modules": []}, "target_modules=[]"),
        ({"target_modules": [["q_proj"]]}, "target_modules"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    ],
    ids=str,
)
def test_damaged_adapters_are_one_line(moved, tmp_path, change, words):
    folder = lora_lib.save(tmp_path / "adapter", CONFIG, LORA, moved["lora"])
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError) as error:
        lora_lib.load(folder, CONFIG)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
