"""The run on real preferences at a toy size, and the bag of words beside it."""

import json

import numpy as np
import pytest
from rich.console import Console

from experiments.hh_harmless import run, words
from jax_klrlhf.errors import InputError

QUIET = Console(quiet=True)


def _records(count: int) -> list[dict[str, str]]:
    rng = np.random.default_rng(0)
    filler = ["tea", "rain", "moon", "salt", "door", "blue", "seven", "quiet"]

    def text(size: int) -> str:
        return " ".join(rng.choice(filler, size))

    return [
        {
            "prompt": f"{number} {text(3)}?",
            "chosen": f" please {text(4)}",
            "rejected": f" never {text(4)}",
        }
        for number in range(count)
    ]


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_words_find_the_word_that_decides_and_no_other():
    pairs = [(r["chosen"], r["rejected"]) for r in _records(80)]
    fitted = words.fit(pairs[:60])
    assert np.all(fitted.margin(pairs[60:]) > 0)
    # The reward of a word alone is its weight: the deciding words against each other.
    weight = {word: fitted.theta[place] for word, place in fitted.vocabulary.items()}
    assert weight["please"] > 0 > weight["never"]
    assert max(abs(weight[w]) for w in ("tea", "rain", "moon")) < weight["please"]
    # Swapping a pair changes the sign and nothing else.
    swapped = [(b, a) for a, b in pairs[60:]]
    np.testing.assert_allclose(fitted.margin(swapped), -fitted.margin(pairs[60:]), rtol=1e-5)


def test_random_labels_are_not_learned():
    """Labels by coin: the larger ridges win, and held-out margins say nothing."""
    rng = np.random.default_rng(1)
    pairs = [(r["chosen"], r["rejected"]) for r in _records(240)]
    pairs = [pair if rng.random() < 0.5 else pair[::-1] for pair in pairs]
    fitted = words.fit(pairs[:120])
    assert fitted.ridge >= 100.0
    # 120 held-out pairs: standard error 0.046; 4 of them is a false alarm in 16,000 runs.
    accuracy = np.mean(fitted.margin(pairs[120:]) > 0)
    assert abs(accuracy - 0.5) < 4 * 0.046


def test_a_prompt_is_on_one_side_only(tmp_path):
    rows = _records(40)
    path = _write(tmp_path / "twice.jsonl", [*rows, *rows])
    train, test = run._split(path, run.Config(data=(path,)))
    assert len(train) + len(test) == 80
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in test}


@pytest.mark.slow
def test_the_whole_run_leaves_results_and_a_figure(tmp_path):
    path = _write(tmp_path / "polite_words.jsonl", _records(60))
    config = run.Config(data=(path,), output=tmp_path / "out", smoke=True)
    found = json.loads(run.main(config, console=QUIET).read_text())["metrics"]
    for method in ("bag of words", "DPO", "reward model", "pi0's log-probability"):
        accuracy = found[f"polite_words/{method}/accuracy"]
        assert 0 <= accuracy["value"] <= 1
        assert accuracy["n"] >= 5
    assert found["polite_words/bag of words/accuracy"]["value"] == 1.0
    # Exact conditional divergences are never negative.
    assert found["polite_words/DPO/kl/ref"]["value"] >= -1e-6
    assert (tmp_path / "out" / "accuracy.png").stat().st_size > 1000


def test_records_without_text_are_named(tmp_path):
    path = _write(tmp_path / "bad.jsonl", [{"prompt": "a", "chosen": "b"}])
    with pytest.raises(InputError, match=r"bad.jsonl.*line 1.*'rejected'"):
        run.main(run.Config(data=(path,), output=tmp_path / "out"), console=QUIET)
