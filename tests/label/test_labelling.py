"""The folder of labels: a pair is its content, a label is on the disk, a torn line costs itself."""

import errno
import itertools
import json
import os

import pytest

from jax_klrlhf import labelling
from jax_klrlhf.data.examples import Columns
from jax_klrlhf.data.sources import open_source
from jax_klrlhf.errors import InputError
from jax_klrlhf.labelling import Label, Labels, pair_of, read_labels, votes

PAIR, _ = pair_of("p", "one", "two")
OTHER, _ = pair_of([{"role": "user", "content": "p"}], "one", "two \ud800 \u2028")


def label(pair=PAIR, annotator="Ana", repeat=0, answer="first", left="first"):
    return Label(pair, annotator, repeat, answer, left, 1.5)


def test_a_pair_is_its_content_whoever_asks():
    pair, swapped = pair_of("p", "two", "one")
    assert pair == PAIR
    assert swapped
    assert not pair_of("p", "one", "two")[1]
    names = {
        pair_of(*asked)[0].name for asked in itertools.product(("p", "q"), ("a", "b"), ("c", "d"))
    }
    assert len(names) == 8
    assert pair_of("p", "a, b", "c")[0].name != pair_of("p", "a", "b, c")[0].name
    with pytest.raises(ValueError, match="equal"):
        pair_of("p", "a", "a")


def test_labels_are_read_back_and_are_preferences_that_training_reads(tmp_path):
    given = [
        label(),
        label(OTHER, answer="second"),
        label(annotator="Bén", answer="tie"),
        label(OTHER, "Bén", answer="skip", left="second"),
    ]
    labels = Labels(tmp_path)
    kept = [labels.add(x) for x in given]
    labels.close()
    assert read_labels(tmp_path) == kept
    assert [x._replace(time=0.0) for x in kept] == given
    rows = [json.loads(line) for line in (tmp_path / "labels.jsonl").read_text().splitlines()]
    # Half of a character is refused by the tokenizers' reader, as everywhere.
    readable = [row for row in rows if "\ud800" not in row["chosen"] + row["rejected"]]
    found = list(open_source(readable).examples(columns=Columns()))
    # What is preferred stands first; a tie is one half.
    assert [(x.responses, x.label, x.weight) for x in found] == [
        (["one", "two"], 1.0, 1.0),
        (["one", "two"], 0.5, 1.0),
    ]
    assert (rows[1]["chosen"], rows[1]["rejected"]) == (OTHER.second, OTHER.first)
    assert [row["weight"] for row in rows] == [1, 1, 1, 0]


def test_a_label_is_brought_to_the_disk_before_it_is_confirmed(tmp_path, monkeypatch):
    labels = Labels(tmp_path)
    done = []
    write, sync = os.write, os.fsync
    monkeypatch.setattr(os, "write", lambda f, x: done.append(("write", f)) or write(f, x[:40]))
    monkeypatch.setattr(os, "fsync", lambda f: done.append(("sync", f)) or sync(f))
    labels.add(label())
    # Short writes are gone on with; the last thing is the disk's.
    assert [what for what, _ in done[:-1]] == ["write"] * (len(done) - 1)
    assert len(done) > 3
    assert done[-1] == ("sync", done[0][1])
    assert len(read_labels(tmp_path)) == 1
    labels.close()


def test_what_a_kill_cut_off_is_left_out_and_the_rest_is_kept(tmp_path):
    labels = Labels(tmp_path)
    labels.add(label())
    labels.close()
    path = tmp_path / "labels.jsonl"
    whole = path.read_bytes()
    for cut in (1, 7, len(whole) - 1):
        path.write_bytes(whole + whole[:cut])
        assert len(read_labels(tmp_path)) == 1
        again = Labels(tmp_path)
        again.add(label(annotator="Ben"))
        again.close()
        assert [x.annotator for x in read_labels(tmp_path)] == ["Ana", "Ben"]


def test_no_label_twice(tmp_path):
    labels = Labels(tmp_path)
    labels.add(label())
    with pytest.raises(ValueError, match="already"):
        labels.add(label(answer="second"))
    labels.add(label(repeat=1, answer="second"))
    labels.close()
    again = Labels(tmp_path)
    with pytest.raises(ValueError, match="already"):
        again.add(label(repeat=1))
    again.close()
    assert len(read_labels(tmp_path)) == 2


def test_a_full_disk_leaves_no_half_of_a_label(tmp_path, monkeypatch):
    labels = Labels(tmp_path)
    labels.add(label())
    write = os.write

    def full(descriptor, data):
        if len(data) < 300:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[: len(data) - 100])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(InputError, match=r"labels\.jsonl: cannot be written .*make room"):
        labels.add(label(annotator="Ben"))
    monkeypatch.undo()
    labels.add(label(annotator="Ben", answer="tie"))
    labels.close()
    assert [x.answer for x in read_labels(tmp_path)] == ["first", "tie"]


@pytest.mark.parametrize(
    "change",
    [
        lambda line: b"{" + line,
        lambda line: line.replace(b'"one"', b'"won"'),
        lambda line: line.replace(b'"answer": "first"', b'"answer": "left"'),
        lambda line: b"[]\n",
    ],
)
def test_a_damaged_line_is_named(tmp_path, change):
    labels = Labels(tmp_path)
    labels.add(label())
    labels.close()
    path = tmp_path / "labels.jsonl"
    path.write_bytes(path.read_bytes() + change(path.read_bytes()))
    with pytest.raises(InputError, match=r"labels\.jsonl, line 2: damaged"):
        read_labels(tmp_path)


def test_votes_count_people_not_answers():
    said = [
        label(),
        label(repeat=1, answer="second"),  # Ana is of two minds
        label(annotator="Ben"),
        label(annotator="Cleo", answer="skip"),
        label(OTHER, answer="skip"),
    ]
    found = votes(said)
    assert found[PAIR.name] == (0.75, 2.0, 3)
    assert found[OTHER.name] == (0.5, 0.0, 1)


def test_pairs_wait_each_once_and_a_damaged_one_is_named(tmp_path):
    assert labelling.read_pairs(tmp_path) == ([], 1)
    labelling.write_pairs(tmp_path, [PAIR, OTHER, PAIR], each=3)
    assert labelling.read_pairs(tmp_path) == ([PAIR, OTHER], 3)
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "p", "first": "a", "second": "a"}\n')
    with pytest.raises(InputError, match=r"pairs\.jsonl, line 1: no pair"):
        labelling.read_pairs(tmp_path)
