"""People as an oracle: labels in the order of the pairs as asked, whichever side they stood on."""

import jax
import numpy as np
import pytest

from jax_klrlhf import labelling
from jax_klrlhf.errors import InputError
from jax_klrlhf.labelling import Label, Labels
from jax_klrlhf.training.rounds import oracle
from jax_klrlhf.training.rounds.parts import ragged

# Prompts of one token, responses of one: ids are letters. The third pair is one text twice (an id
# that is no text, say an end token), the fourth the second one turned round.
PROMPTS = ragged([[7], [8], [8], [8]], [1, 1, 1, 1])
RESPONSES = ragged(
    [[[1, 0], [2, 0]], [[4, 0], [3, 0]], [[5, 0], [5, 26]], [[3, 0], [4, 0]]],
    [[1, 1], [1, 1], [1, 2], [1, 1]],
)


def decode(ids):
    return "".join(chr(97 + i) for i in ids if i < 26)


def say(folder, said):
    labels = Labels(folder)
    for (prompt, text), people in said.items():
        pair = next(
            p for p in labelling.read_pairs(folder).pairs if (p.prompt, p.first) == (prompt, text)
        )
        for annotator, answer in people.items():
            labels.add(Label(pair, annotator, 0, answer, "first"))
    labels.close()


def asked(folder, monkeypatch, said, **options):
    """What the oracle returns when people answer while it waits; what it told meanwhile."""
    waits, told = iter(said), []
    monkeypatch.setattr(oracle.time, "sleep", lambda seconds: say(folder, next(waits)))
    judge = oracle.human(folder, decode, say=lambda *x: told.append(x), **options)
    return judge(jax.random.key(0), PROMPTS, RESPONSES), told


def test_labels_come_in_the_order_that_was_asked(tmp_path, monkeypatch):
    # h: "b" or "c"; i: "d" or "e".
    found, told = asked(
        tmp_path,
        monkeypatch,
        [{("h", "b"): {"Ana": "first"}}, {}, {("i", "d"): {"Ana": "first"}}],
    )
    assert told == [(0, 2), (1, 2), (2, 2)]
    np.testing.assert_array_equal(found.label, [1, 0, 0.5, 1])
    np.testing.assert_array_equal(found.weight, [1, 1, 0, 1])
    # Asked again, by a run that was killed, it does not wait.
    again, told = asked(tmp_path, monkeypatch, [])
    np.testing.assert_array_equal(again.label, found.label)
    assert told == [(2, 2)]


def test_it_waits_for_as_many_people_as_asked(tmp_path, monkeypatch):
    said = [
        {("h", "b"): {"Ana": "first", "Ben": "tie"}, ("i", "d"): {"Ana": "second"}},
        {("i", "d"): {"Ben": "skip"}},
    ]
    found, told = asked(tmp_path, monkeypatch, said, each=2)
    assert told == [(0, 2), (1, 2), (2, 2)]
    assert labelling.read_pairs(tmp_path).each == 2
    np.testing.assert_array_equal(found.label, [0.75, 1, 0.5, 0])
    np.testing.assert_array_equal(found.weight, [2, 1, 0, 1])


def test_where_all_is_skipped_it_says_so(tmp_path, monkeypatch):
    said = [{("h", "b"): {"Ana": "skip"}, ("i", "d"): {"Ana": "skip"}}]
    with pytest.raises(InputError, match=r"all 4 pairs were skipped.*labels\.jsonl"):
        asked(tmp_path, monkeypatch, said)
    with pytest.raises(ValueError, match="at least 1 person"):
        oracle.human(tmp_path, decode, each=0)
