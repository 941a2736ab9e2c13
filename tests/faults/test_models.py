"""Model folders damaged on purpose: one line that names what is wrong, or the same model."""

import copy
import dataclasses
import json
import shutil
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jax_klrlhf import folders, models
from jax_klrlhf.data import tokenize
from jax_klrlhf.errors import InputError
from jax_klrlhf.models import pretrained
from jax_klrlhf.models import reward as rewards
from tests.models import tiny

CONFIG = models.ModelConfig(
    vocab_size=13,
    hidden_size=8,
    intermediate_size=12,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=4,
    max_length=16,
)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder of two shards with everything in it but a tokenizer, and its parameters."""
    params = tiny.params(CONFIG)
    folder = tmp_path_factory.mktemp("models") / "whole"
    models.save(folder, CONFIG, params, generation={"eos_token_id": 2}, max_shard_bytes=1500)
    return folder, params, models.load(folder).config


@pytest.fixture
def folder(whole, tmp_path):
    """A copy, as one file."""
    return models.save(
        tmp_path / "model", CONFIG, whole[1], generation={"eos_token_id": 2, "top_k": 5}
    )


def refusal(folder, *, by=models.load):
    """The one line with which a folder is refused."""
    with pytest.raises(InputError) as error:
        by(folder)
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 700
    return text


def retold(folder, change):
    """The weights changed by a function of the dictionary of tensors."""
    tensors = safetensors.numpy.load_file(folder / WEIGHTS)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[1, 2]", "holds a list, not an object"),
        (b"null", "holds null, not an object"),
        (b'"llama"', "holds a string, not an object"),
        (b"12", "holds a number, not an object"),
        (b"\x80\x81\xff\x00", "not text in UTF-8"),
        (b'{"a": ' * 100_000, "cannot be read"),
        (b'{"model_type": ' + b"9" * 5_000 + b"}", "cannot be read"),
        (None, "cannot be read"),  # A folder in its place.
    ],
    ids=lambda x: repr(x)[:20],
)
def test_settings_that_are_none(folder, name, content, words):
    (folder / name).unlink()
    if content is None and name == "config.json":
        (folder / name).mkdir()
    elif content is None:
        return  # Without generation_config.json nothing is amiss.
    else:
        (folder / name).write_bytes(content)
    said = refusal(folder)
    assert words in said
    assert said.startswith(str(folder / name))


def test_tensors_that_are_no_weights(folder, whole):
    def put(name, value):
        def change(tensors):
            tensors[name] = value

        return change

    shape = (12, 8)
    norm = "model.norm.weight"
    cases = [
        (UP, np.ones(shape, np.int64), f"{UP} is of type I64"),
        (UP, np.ones(shape, bool), f"{UP} is of type BOOL"),
        (UP, np.full(shape, np.nan, np.float32), f"{UP} has numbers that are not finite"),
        (norm, np.full(8, np.inf, np.float16), f"{norm} has numbers that are not finite"),
        (norm, np.full(8, 1e300), "not finite in float32"),
        ("model.layers.2.mlp.up_proj.weight", np.ones(shape, np.float32), "is read by nothing"),
        ("model.layers.0.self_attn.q_proj.bias", np.ones(8, np.float32), "is read by nothing"),
        ("lm_head.weight", np.ones((13, 8), np.float32), 'set "tie_word_embeddings": false'),
        ("lm_head.weight", np.ones((12, 8), np.float32), 'set "tie_word_embeddings": false'),
    ]
    good = (folder / WEIGHTS).read_bytes()
    for name, value, words in cases:
        retold(folder, put(name, value))
        assert words in refusal(folder)
        (folder / WEIGHTS).write_bytes(good)
    # What other programs leave beside the weights, and both ends of a tie: the same model.
    table = safetensors.numpy.load_file(folder / WEIGHTS)["model.embed_tokens.weight"]
    retold(folder, put("lm_head.weight", table))
    retold(folder, put("model.layers.0.self_attn.rotary_emb.inv_freq", np.ones(2, np.float32)))
    jax.tree.map(np.testing.assert_array_equal, models.load(folder).params, whole[1])


def test_nothing_is_read_before_every_name_and_shape_was_seen(folder):
    """A tensor too many says so even where an earlier one is not finite."""

    def change(tensors):
        tensors["model.embed_tokens.weight"][:] = np.nan
        tensors["zzz"] = np.ones(3, np.float32)

    retold(folder, change)
    assert "tensor zzz is read by nothing" in refusal(folder)


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({"a": "../secret.safetensors"}, "leads out of the folder"),
        ({"a": "/etc/hosts"}, "leads out of the folder"),
        ({"a": "inner/../../x"}, "leads out of the folder"),
        ({"a": "..\\x"}, "leads out of the folder"),
        ({"a": 3}, "no weight_map"),
        (["a"], "no weight_map"),
        (None, "no weight_map"),
        ({}, "there is no tensor in it"),
        ({"a": WEIGHTS}, f"tensor a is not in {WEIGHTS}"),
        ({"a": "absent.safetensors"}, "which is not there"),
    ],
    ids=str,
)
def test_an_index_that_does_not_hold(folder, weight_map, words):
    shutil.copy(folder / WEIGHTS, folder.parent / "secret.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert words in refusal(folder)


def test_more_layers_than_there_are(folder):
    settings = json.loads((folder / "config.json").read_text())
    for layers, words in ((3, "model.layers.2."), (10**9, "at most 4096")):
        settings["num_hidden_layers"] = layers
        (folder / "config.json").write_text(json.dumps(settings))
        assert words in refusal(folder)


def test_tokenizers_that_are_none(folder, tmp_path):
    tokenize.train_tokenizer(["a b"], vocab_size=260, folder=tmp_path / "tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "tokenizer" / name, folder / name)
    good = (folder / "tokenizer.json").read_bytes()
    for bad in (good[: len(good) // 2], b"", b"[]", b"null", b"\xff\xfe", b'{"model": {}}'):
        (folder / "tokenizer.json").write_bytes(bad)
        assert "its tokenizer cannot be read" in refusal(folder)
    (folder / "tokenizer.json").write_bytes(good)
    (folder / "tokenizer_config.json").write_text("[]")
    assert "tokenizer_config.json: holds a list" in refusal(folder)
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": "a.B"}}')
    assert "auto_map names a tokenizer's own code, which is never run" in refusal(folder)


def test_a_reward_head_that_is_none(whole, tmp_path):
    params = rewards.RewardParams(whole[1], jnp.ones(8))
    folder = rewards.save(tmp_path / "reward", CONFIG, params)
    assert rewards.load(folder).params.head.shape == (8,)
    assert "score.weight is read by nothing" in refusal(folder)  # No policy.
    for head, words in (
        (np.full((1, 8), np.nan, np.float32), "not finite"),
        (np.ones((1, 7), np.float32), "asks for [1, 8]"),
        (np.ones((2, 8), np.float32), "has one label"),
        (np.ones((8,), np.float32), "score.weight has shape [8]"),
        (np.ones((1, 8), np.int32), "is of type I32"),
    ):
        retold(folder, lambda tensors, head=head: tensors.update({"score.weight": head}))
        assert words in refusal(folder, by=rewards.load)


def test_names_with_markup_in_them_are_shown_as_they_are(whole, tmp_path):
    folder = tmp_path / "a [/red] [bold]b"
    shutil.copytree(whole[0], folder)
    jax.tree.map(np.testing.assert_array_equal, models.load(folder).params, whole[1])
    (folder / "config.json").write_text("[]")
    said = refusal(folder)
    assert "holds a list" in said
    assert said.startswith(str(folder))


def test_left_overs_of_killed_saves_go_with_the_next(whole, tmp_path):
    target = tmp_path / "model"
    models.save(target, CONFIG, whole[1])
    for kind in ("new", "old"):
        left = folders.fresh_name(target, kind=kind)
        left.mkdir()
        (left / "half").write_text("x")
    models.save(target, CONFIG, whole[1])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    # A save killed between setting the old folder aside and putting the new one in its place.
    target.rename(folders.fresh_name(target, kind="old"))
    other = jax.tree.map(lambda x: x + 1, whole[1])
    models.save(target, CONFIG, other)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    jax.tree.map(np.testing.assert_array_equal, models.load(target).params, other)


def test_fuzz(whole, tmp_path):
    """300 damages by seed: refused in one line, or the same model.

    Settings get values of every wrong kind. Numbers that are as good as any (a norm's epsilon, a
    rotation's base) are not compared, and the weights' own bits not touched: no file tells those.
    """
    source, params, config = whole
    rng = np.random.default_rng(18)
    target = tmp_path / "damaged"
    found = {"refused": 0, "same": 0}
    for _ in range(300):
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
        done = damage(rng, target)
        loaded, said = None, ""
        try:
            loaded = pretrained.load(target)
        except InputError as error:
            said = str(error)
        except Exception as error:
            raise AssertionError(f"{done}: {type(error).__name__} {error}") from error
        assert "\n" not in said, (done, said)
        found["refused" if loaded is None else "same"] += 1
        if loaded is None:
            continue
        assert alike(loaded.config) == alike(config), done
        jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    assert found["refused"] > 100
    assert found["same"] > 30


def alike(config):
    """What of a config no other number could stand for."""
    return dataclasses.replace(
        config, norm_eps=0.0, init_scale=0.0, max_length=16, ropes=None, windows=None
    )


ODD = (None, [], {}, "x", -1, 0, True, 0.5, 10**9, 2**70, float("nan"), float("inf"), [[1]])


def damage(rng, folder):
    """One damage; what was done, in words."""
    kind = rng.choice(["value", "value", "value", "gone", "cut", "bytes", "header", "map"])
    file = folder / rng.choice(["config.json", "generation_config.json", INDEX])
    if kind == "cut":
        file = folder / rng.choice([path.name for path in folder.iterdir()])
        content = file.read_bytes()
        keep = int(rng.integers(0, len(content)))
        file.write_bytes(content[:keep])
        return kind, file.name, keep
    if kind == "bytes":
        content = bytearray(file.read_bytes())
        at = int(rng.integers(0, len(content)))
        content[at : at + 4] = rng.bytes(4)
        # A digit for a digit is another config, not a damaged one.
        content[at] = 0x80
        file.write_bytes(content)
        return kind, file.name, at
    if kind == "header":
        file = sorted(folder.glob("*.safetensors"))[0]
        content = bytearray(file.read_bytes())
        (size,) = struct.unpack("<Q", content[:8])
        at = int(rng.integers(0, 8 + size))
        content[at] = int(rng.integers(0, 256))
        file.write_bytes(content)
        return kind, file.name, at
    settings = json.loads(file.read_text())
    part = settings["weight_map"] if kind == "map" and "weight_map" in settings else settings
    key = str(rng.choice(sorted(part)))
    value = ODD[int(rng.integers(len(ODD)))]
    if kind == "gone":
        del part[key]
    else:
        part[key] = copy.deepcopy(value)
    file.write_text(json.dumps(settings))
    return kind, file.name, key, value
