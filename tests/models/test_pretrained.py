"""Folders in and out: the real small model, tied weights under either name, refusals."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.errors import InputError
from jax_klrlhf.models import pretrained, sampling
from jax_klrlhf.models.config import ModelConfig
from jax_klrlhf.models.stopping import stop_tokens
from jax_klrlhf.models.transformer import language_model
from tests.models import tiny

CONFIG = ModelConfig(
    vocab_size=13,
    hidden_size=8,
    intermediate_size=12,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=4,
    max_length=16,
)


@pytest.fixture(scope="module")
def params():
    return tiny.params(CONFIG)


@pytest.fixture
def folder(params, tmp_path):
    return pretrained.save(tmp_path / "model", CONFIG, params)


def same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_round_trip_of_one_file_and_of_shards(params, folder, tmp_path):
    loaded = pretrained.load(folder)
    same(loaded.params, params)
    assert loaded.config == CONFIG.from_hf(CONFIG.to_hf())
    assert loaded.model is language_model(loaded.config)
    assert loaded.tokenizer is None
    shards = pretrained.save(tmp_path / "shards", CONFIG, params, max_shard_bytes=1000)
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2
    assert files == {p.name for p in shards.glob("*.safetensors")}
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(params))
    same(pretrained.load(shards).params, params)
    next(shards.glob("*00002*")).unlink()
    with pytest.raises(InputError, match="which is not there"):
        pretrained.load(shards)


@pytest.mark.parametrize("name", ["lm_head.weight", "embed_tokens.weight"])
def test_tied_weights_under_another_name(params, folder, name):
    """Only as the output end (as tinystories656k has it), or in a file without the head."""
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    if name.startswith("lm_head"):
        tensors[name] = tensors.pop("model.embed_tokens.weight")
    else:
        tensors = {key.removeprefix("model."): value for key, value in tensors.items()}
    assert name in tensors
    safetensors.numpy.save_file(tensors, file)
    same(pretrained.load(folder).params, params)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_part_of_gemma_3_with_vision(tmp_path, prefix):
    """Published that way at 4 billion parameters and over, under prefixes old and new."""
    config = dataclasses.replace(
        CONFIG,
        family="gemma3_text",
        norm="rms_offset",
        qk_norm=True,
        post_norms=True,
        embedding_scale=8**0.5,
        query_scale=0.5,
        activation="gelu_tanh",
        windows=(4, None),
    )
    params = tiny.params(config)
    folder = pretrained.save(tmp_path / "text", config, params)
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    renamed = {prefix + name.removeprefix("model."): x for name, x in tensors.items()}
    renamed["vision_tower.patch.weight"] = np.zeros((2, 2), np.float32)
    safetensors.numpy.save_file(renamed, file)
    settings = json.loads((folder / "config.json").read_text())
    whole = {"model_type": "gemma3", "text_config": settings, "vision_config": {}}
    (folder / "config.json").write_text(json.dumps(whole))
    loaded = pretrained.load(folder)
    same(loaded.params, params)
    assert loaded.config.layer_windows == (4, None)


def test_dtypes(params, folder, tmp_path):
    mixed = pretrained.load(folder, dtype=jnp.bfloat16, param_dtype=jnp.float32)
    same(mixed.params, params)
    assert mixed.config.dtype == jnp.bfloat16
    narrow = pretrained.load(folder, dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(narrow.params)} == {jnp.dtype(jnp.bfloat16)}
    saved = pretrained.save(tmp_path / "narrow", narrow.config, narrow.params)
    again = pretrained.load(saved, dtype=jnp.bfloat16)
    assert again.config.dtype == again.config.param_dtype == jnp.bfloat16
    same(again.params, narrow.params)
    prompts = Ragged(jnp.ones((1, 3), jnp.int32), jnp.array([3], jnp.int32))
    for loaded in (mixed, narrow):
        prefix = loaded.model.prefill(loaded.params, prompts)
        assert prefix.hidden.dtype == jnp.bfloat16
        assert loaded.model.unembed(loaded.params, prefix.hidden).dtype == jnp.float32


def test_the_device_chooses_what_is_computed_in_and_the_file_what_is_kept(
    params, folder, tmp_path, monkeypatch, caplog
):
    """float32 on CPU, bfloat16 on accelerators; no bit of the file is lost unless asked."""
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    config = dataclasses.replace(CONFIG, param_dtype=jnp.bfloat16)
    narrow = pretrained.save(tmp_path / "narrow", config, half)
    with caplog.at_level("INFO", logger="jax_klrlhf"):
        loaded = pretrained.load(narrow)
    assert loaded.config.dtype == loaded.config.param_dtype == jnp.float32
    assert "computed in float32; the file is bfloat16" in caplog.text
    same(loaded.params, jax.tree.map(lambda x: x.astype(jnp.float32), half))
    half_dtypes = pretrained.dtypes(np.float16)
    assert half_dtypes == {"dtype": jnp.float32, "param_dtype": jnp.float32}
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    for stored, kept in ((np.float32, jnp.float32), (jnp.bfloat16, jnp.bfloat16)):
        chosen = pretrained.dtypes(stored)
        assert (chosen["dtype"], chosen["param_dtype"]) == (jnp.bfloat16, kept)
    assert pretrained.dtypes(np.float16)["param_dtype"] == jnp.float32
    # What is said is done.
    assert pretrained.dtypes(np.float32, dtype=jnp.float16)["param_dtype"] == jnp.float16
    chosen = pretrained.dtypes(np.float32, param_dtype=jnp.float16)
    assert (chosen["dtype"], chosen["param_dtype"]) == (jnp.bfloat16, jnp.float16)


def test_saving_is_whole_or_not_at_all(params, folder, monkeypatch):
    before = sorted(p.name for p in folder.parent.iterdir())
    other = jax.tree.map(lambda x: x + 1, params)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "write_tensors", fail)
        with pytest.raises(OSError, match="disk full"):
            pretrained.save(folder, CONFIG, other)
    assert sorted(p.name for p in folder.parent.iterdir()) == before
    same(pretrained.load(folder).params, params)
    pretrained.save(folder, CONFIG, other)
    assert sorted(p.name for p in folder.parent.iterdir()) == before
    same(pretrained.load(folder).params, other)


def test_pickled_weights_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin is pickled .* save_pretrained"):
        pretrained.load(folder)


def test_code_in_a_folder_is_never_run(folder, tmp_path):
    witness = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(witness)!r}, 'w')\nclass T: pass\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": [None, "evil.T"]}, "tokenizer_class": "T"})
    )
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever transformers says
        pretrained.load(folder)
    assert not witness.exists()


def test_bad_input_is_named(folder, tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        pretrained.load(tmp_path / "absent")
    with pytest.raises(InputError, match=r"someone/absent: neither a folder nor .* give its path"):
        pretrained.load("someone/absent")  # The session is offline.
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    wrong = tensors | {name: tensors[name][:-1]}
    safetensors.numpy.save_file(wrong, folder / "model.safetensors")
    with pytest.raises(InputError, match=rf"{name} has shape \[11, 8\], .* \[12, 8\]"):
        pretrained.load(folder)
    del wrong[name]
    safetensors.numpy.save_file(wrong, folder / "model.safetensors")
    with pytest.raises(InputError, match=f"tensor {name} is missing"):
        pretrained.load(folder)
    (folder / "model.safetensors").write_text("not a tensor in sight")
    with pytest.raises(InputError, match="not a safetensors file"):
        pretrained.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json:1: not JSON"):
        pretrained.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json: no such file"):
        pretrained.load(folder)


@pytest.mark.parity
def test_a_real_model(stories_model):
    """Logits of tinystories656k, and the file written back, against transformers."""
    torch = pytest.importorskip("torch", reason="parity needs torch (the `parity` extra)")
    transformers = pytest.importorskip("transformers")
    loaded = pretrained.load(stories_model)
    ids = loaded.tokenizer("Once upon a time, there was a little girl named Lily. ")["input_ids"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(stories_model).eval()
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0].numpy()
    row = jnp.asarray(ids, jnp.int32)[None]
    model, params = loaded.model, loaded.params
    prefix = model.prefill(params, Ragged(row[:, :1], jnp.array([1], jnp.int32)))
    hidden = model.extend(params, prefix, row[:, None, 1:])
    np.testing.assert_allclose(model.unembed(params, hidden)[0, 0], expected[1:], atol=1e-4)
    np.testing.assert_allclose(model.unembed(params, prefix.hidden)[0], expected[0], atol=1e-4)


@pytest.mark.parity
def test_a_saved_folder_opens_in_a_pipeline_and_says_what_ours_says(stories_model, tmp_path):
    pytest.importorskip("torch", reason="parity needs torch (the `parity` extra)")
    transformers = pytest.importorskip("transformers")
    loaded = pretrained.load(stories_model)
    # Other weights than the file's, so that it is this folder's that are read.
    params = jax.tree.map(lambda x: 1.02 * x, loaded.params)
    folder = pretrained.save(
        tmp_path / "ours", loaded.config, params, loaded.tokenizer, generation=loaded.generation
    )
    text = "Once upon a time there was a dog. "
    pipe = transformers.pipeline("text-generation", model=str(folder), device="cpu")
    given = {"max_new_tokens": 24, "do_sample": False, "return_full_text": False}
    (theirs,) = pipe(text, **given)
    ids = loaded.tokenizer(text)["input_ids"]
    drawn = sampling.generate(
        jax.random.key(0), loaded.model, params, Ragged(jnp.array([ids]), jnp.array([len(ids)])),
        samples=1, max_new_tokens=24, temperature=0.0,
        stop=stop_tokens(loaded.tokenizer, loaded.generation),
    ).responses  # fmt: skip
    said = np.asarray(drawn.ids)[0, 0, : int(drawn.lengths[0, 0])]
    assert loaded.tokenizer.decode(said, skip_special_tokens=True).strip() == (
        theirs["generated_text"].strip()
    )


def test_a_real_model_round_trips_with_its_tokenizer(stories_model, tmp_path):
    loaded = pretrained.load(stories_model)
    folder = pretrained.save(tmp_path / "copy", loaded.config, loaded.params, loaded.tokenizer)
    again = pretrained.load(folder)
    same(again.params, loaded.params)
    assert again.config == loaded.config
    text = "Lily and the dog were happy. "
    assert again.tokenizer(text)["input_ids"] == loaded.tokenizer(text)["input_ids"]
