"""``klrlhf label --model``: answers' features are a model's hidden states, the ellipsoid's too."""

import json

import jax
import numpy as np
import pytest

from jax_klrlhf import cli, label, models
from jax_klrlhf.data import batch_of_texts, tokenize
from jax_klrlhf.errors import InputError
from jax_klrlhf.label import program
from jax_klrlhf.labelling import pair_of
from jax_klrlhf.models.pretrained import Loaded
from tests.label.asking import post
from tests.models import toy

PROMPTS = ["one two", "three", "four five six"]
ANSWERS = [["seven", "eight nine ten one", "ten"], ["two two", "nine"], ["six one", "two", "four"]]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A recurrent model of eight numbers, which NumPy computes too, and a tokenizer of words."""
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [*PROMPTS, *(text for some in ANSWERS for text in some)] * 4
    tokenizer = tokenize.train_tokenizer(texts, vocab_size=300, folder=folder)
    model = toy.language_model(vocab=len(tokenizer), width=8)
    return Loaded(model, model.init(jax.random.key(0)), tokenizer, None)


@pytest.fixture
def from_model(loaded, monkeypatch):
    monkeypatch.setattr(models, "load", lambda name: loaded)
    return label.pool.model_features("any")


def states(params, prompt, response):
    """The mean state over a response's tokens, token by token in float64."""
    p = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    state, found = np.zeros(8), []
    for number, token in enumerate([*prompt, *response]):
        state = np.tanh(state @ p["mix"] + p["embed"][token])
        if number >= len(prompt):
            found.append(state)
    return np.mean(found, 0)


def flat(prompts=PROMPTS, answers=ANSWERS):
    return [(prompt, text) for prompt, some in zip(prompts, answers, strict=True) for text in some]


def test_features_are_the_mean_hidden_states_over_the_answer(loaded, from_model):
    found = from_model(flat())
    for (prompt, text), row in zip(flat(), found, strict=True):
        batch = batch_of_texts(loaded.tokenizer, [prompt], [[text]])
        ids = batch.prompts.ids[0, : batch.prompts.lengths[0]]
        answer = batch.responses.ids[0, 0, : batch.responses.lengths[0, 0]]
        np.testing.assert_allclose(row, states(loaded.params, ids, answer), rtol=2e-5, atol=2e-6)
    # Whatever else is in the pool.
    np.testing.assert_allclose(from_model(flat()[::-1])[::-1], found, rtol=1e-5, atol=1e-6)


def test_the_page_asks_for_what_is_most_uncertain_under_the_ellipsoid_of_the_models_features(
    loaded, from_model, tmp_path, monkeypatch
):
    path, folder, asked, served = tmp_path / "answers.jsonl", tmp_path / "labels", [], []
    rows = [{"prompt": p, "answers": a} for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    serve, sleep = program.serve, program.time.sleep

    def kept(*arguments, **options):
        served.append(serve(*arguments, **options))
        return served[-1]

    def meanwhile(seconds):
        if seconds < 60:  # of somebody else
            return sleep(seconds)
        for _ in range(3):
            shown = post(served[0].port, "/api/next", {"annotator": "Ana"})
            asked.append(shown)
            said = {"annotator": "Ana", "ask": shown["ask"], "answer": "tie"}
            post(served[0].port, "/api/answer", said)
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "serve", kept)
    monkeypatch.setattr(program.time, "sleep", meanwhile)
    given = ["label", "--answers", str(path), "--output", str(folder), "--port", "0"]
    assert cli.main([*given, "--model", "any", "--ridge", "0.5", "--repeats", "0"]) == 0

    features = np.asarray(from_model(flat()), np.float64)
    features -= features.mean(0)
    features /= np.linalg.norm(features, axis=1).max()
    at = dict(zip(flat(), features, strict=True))
    differences = {
        pair_of(prompt, some[i], some[j])[0].name: at[prompt, some[i]] - at[prompt, some[j]]
        for prompt, some in zip(PROMPTS, ANSWERS, strict=True)
        for i in range(len(some))
        for j in range(i)
    }
    precision, left = 0.5 * np.eye(8), set(differences)
    for shown in asked:
        # All labels are ties: theta is 0, and every curvature a quarter.
        gain = {n: d @ np.linalg.solve(precision, d) for n, d in differences.items() if n in left}
        name = shown["ask"].partition(".")[0]
        assert gain[name] == pytest.approx(max(gain.values()), rel=1e-4)
        precision += np.outer(differences[name], differences[name])
        left.remove(name)


def test_a_model_without_a_tokenizer_is_one_line(loaded, monkeypatch):
    monkeypatch.setattr(models, "load", lambda name: loaded._replace(tokenizer=None))
    with pytest.raises(InputError, match="no tokenizer"):
        label.pool.model_features("any")
