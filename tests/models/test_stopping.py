"""Where responses end: tokenizer, generation_config.json, chat template, and transformers."""

import dataclasses
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_klrlhf import models
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.data import tokenize
from jax_klrlhf.errors import InputError
from jax_klrlhf.models import pretrained, sampling, stopping
from tests.models import tiny

CONFIG = models.ModelConfig(
    vocab_size=300,
    hidden_size=8,
    intermediate_size=12,
    layers=1,
    heads=2,
    kv_heads=1,
    head_dim=4,
    max_length=64,
)
TURNS = (
    "{% for m in messages %}{{ '<turn>' + m['role'] + ' ' + m['content'] + '<done>' }}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A chat tokenizer whose turns end with another token than its end token, as Llama 3's do."""
    folder = tmp_path_factory.mktemp("tokenizer")
    made = tokenize.train_tokenizer(
        ["once upon a time", "user assistant"], vocab_size=290, folder=folder
    )
    made.add_special_tokens({"additional_special_tokens": ["<turn>", "<done>", "<done>!"]})
    made.chat_template = TURNS
    return made


def id_of(tokenizer, word):
    return tokenizer.convert_tokens_to_ids(word)


def test_three_places_say_where_a_response_ends(tokenizer):
    end, done = tokenizer.eos_token_id, id_of(tokenizer, "<done>")
    assert end != done
    assert models.stop_tokens(tokenizer) == (end, done)
    assert models.stop_tokens(tokenizer, chat=False) == (end,)
    assert models.stop_tokens(tokenizer, {"eos_token_id": 7}, chat=False) == (end, 7)
    assert models.stop_tokens(tokenizer, {"eos_token_id": [7, end, 7]}) == (end, 7, done)
    assert models.stop_tokens(tokenizer, {"eos_token_id": None}) == (end, done)
    assert models.stop_tokens(None, {"eos_token_id": [3, 4]}) == (3, 4)
    for bad in ("2", -1, 1.0, True, [2, None, "x"]):
        with pytest.raises(InputError, match=r"eos_token_id has .*, which is no id"):
            models.stop_tokens(tokenizer, {"eos_token_id": bad})


@pytest.mark.parametrize(
    ("template", "closing"),
    [
        (TURNS, "<done>"),
        (TURNS.replace("<done>", "<done>!"), "<done>!"),  # The longer of two that fit.
        (TURNS.replace("<done>", "\n"), None),  # Closed with plain text.
        ("{% for m in messages %}{{ m['role'] }}{% endfor %}", None),  # Replies are not shown.
        ("{{ raise_exception('no') }}", None),
        (None, None),
    ],
)
def test_the_token_that_closes_a_turn(tokenizer, template, closing, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    expected = None if closing is None else id_of(tokenizer, closing)
    assert stopping.closing_token(tokenizer) == expected


def test_words_that_a_user_names(tokenizer):
    done = id_of(tokenizer, "<done>")
    assert stopping.read_stop(tokenizer, ["<done>", "5", str(done)]) == (done, 5)
    for word in ("<never>", "100000", "-1", ""):
        with pytest.raises(InputError, match=f"stop: '{word}' is neither a token"):
            stopping.read_stop(tokenizer, [word])


def test_sampling_stops_where_the_folder_says_and_a_saved_one_says_the_same(tokenizer, tmp_path):
    """A policy that says the closing token, then anything: every response has one token."""
    done = id_of(tokenizer, "<done>")
    params = tiny.params(CONFIG)
    generation = {"eos_token_id": [17, 18], "temperature": 0.5}
    folder = models.save(tmp_path / "a", CONFIG, params, tokenizer, generation=generation)
    loaded = models.load(folder)
    assert loaded.generation == generation
    config = json.loads((folder / "config.json").read_text())
    assert config["eos_token_id"] == [17, 18]
    assert config["bos_token_id"] == tokenizer.bos_token_id
    again = models.save(
        tmp_path / "b", loaded.config, params, loaded.tokenizer, generation=loaded.generation
    )
    assert json.loads((again / "generation_config.json").read_text()) == generation

    stop = models.stop_tokens(loaded.tokenizer, loaded.generation)
    assert set(stop) == {tokenizer.eos_token_id, 17, 18, done}

    def loud(params, hidden):
        logits = loaded.model.unembed(params, hidden)
        return logits.at[..., done].add(1e3)

    model = dataclasses.replace(loaded.model, unembed=loud)
    prompts = Ragged(jnp.ones((1, 2), jnp.int32), jnp.array([2], jnp.int32))
    drawn = sampling.generate(
        jax.random.key(0), model, params, prompts, samples=2, max_new_tokens=8, stop=stop
    )
    np.testing.assert_array_equal(drawn.responses.lengths, 1)
    assert drawn.finished.all()
    # Without generation_config.json, transformers goes by config.json.
    (folder / "generation_config.json").unlink()
    assert (models.load(folder).generation or {})["eos_token_id"] == [17, 18]
    (folder / "generation_config.json").write_text("[1]")
    with pytest.raises(InputError, match=r"generation_config\.json: holds a list"):
        models.load(folder)


def test_without_a_generation_config_the_saved_folder_has_the_tokenizers_ids(tokenizer, tmp_path):
    """Not those that the family's class has by default, which are of some other tokenizer."""
    folder = models.save(tmp_path / "m", CONFIG, tiny.params(CONFIG), tokenizer)
    config = json.loads((folder / "config.json").read_text())
    assert config["eos_token_id"] == tokenizer.eos_token_id
    assert config["pad_token_id"] == tokenizer.pad_token_id
    assert not (folder / "generation_config.json").exists()


CHAT = Path(os.environ.get("KLRLHF_SMOLLM2", Path(__file__).parents[3] / "smollm2_135m"))


def test_a_real_chat_model_stops_where_transformers_does():
    if not (CHAT / "config.json").is_file():
        pytest.skip(f"real chat model absent: no folder {CHAT} (set KLRLHF_SMOLLM2 to it)")
    transformers = pytest.importorskip("transformers")
    tokenizer = pretrained.load_tokenizer(CHAT)
    settings = pretrained.read_json(CHAT / "config.json")
    stop = models.stop_tokens(tokenizer, pretrained.generation_settings(CHAT, settings))
    theirs = transformers.GenerationConfig.from_pretrained(CHAT).eos_token_id
    assert set(np.atleast_1d(theirs)) <= set(stop)
    assert stopping.closing_token(tokenizer) == id_of(tokenizer, "<|im_end|>")
    assert id_of(tokenizer, "<|im_end|>") in stop
    # Of the three places, and no other. (Folders made of a GGUF file may have another eos_token.)
    assert set(stop) == {
        *np.atleast_1d(theirs),
        tokenizer.eos_token_id,
        stopping.closing_token(tokenizer),
    }
