"""A folder in which people label pairs: what is asked, and what was said.

``pairs.jsonl`` holds pairs that wait (written by whoever asks, replaced in one step), and
``labels.jsonl`` what people said, a line each, appended and brought to the disk before it is
confirmed. A line of labels is a record of preferences besides, with ``prompt``, ``chosen``,
``rejected``, ``label`` (one half at a tie) and ``weight`` (0 where the pair was skipped), so that
``klrlhf dpo --data FOLDER/labels.jsonl`` learns from it as it is.

A pair is known by its content: its two answers stand in alphabetical order, whoever asks, and its
name is a hash of prompt and answers. So whoever asks the same again, a run that was killed and
started again say, finds its labels.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from jax_klrlhf.errors import InputError
from jax_klrlhf.results import output_folder

Content: TypeAlias = str | list[Any]
"""A prompt: text, or a chat, a list of messages ``{"role", "content"}``."""
PAIRS, LABELS = "pairs.jsonl", "labels.jsonl"
Answer = Literal["first", "second", "tie", "skip"]
Which = Literal["first", "second"]
ANSWERS: Mapping[Answer, float | None] = {"first": 1.0, "second": 0.0, "tie": 0.5, "skip": None}
"""Probability that the first is preferred; None where nothing was said."""


class Pair(NamedTuple):
    """Two different answers to a prompt, in alphabetical order: see :func:`pair_of`."""

    name: str
    prompt: Content
    first: str
    second: str


class Label(NamedTuple):
    """What somebody said of a pair."""

    pair: Pair
    annotator: str
    repeat: int
    """How often the annotator had said something of this pair before."""
    answer: Answer
    left: Which
    """Which of the two was shown on the left."""
    seconds: float | None = None
    """From showing to answering, as the page measured it."""
    time: float = 0.0
    """When it was written, in seconds since 1970."""


class Vote(NamedTuple):
    """What all together said of a pair."""

    label: float
    """Probability that the first is preferred: the mean over annotators of each one's mean."""
    weight: float
    """How many annotators said something; 0: the pair was skipped by all."""
    people: int
    """How many annotators were shown it, those who skipped it too."""


class Waiting(NamedTuple):
    """Pairs that wait for people."""

    pairs: list[Pair]
    each: int
    """How many people are asked of each pair."""


def pair_of(prompt: Content, one: str, two: str) -> tuple[Pair, bool]:
    """The pair of two answers, and whether ``two`` is the first of it.

    Raises:
        ValueError: where the answers are equal: there is nothing to compare.

    >>> pair, swapped = pair_of("Say hello.", "Hi.", "Hello.")
    >>> pair.first, swapped
    ('Hello.', True)
    """
    if one == two:
        raise ValueError("pair_of: the two answers are equal; there is nothing to compare.")
    first, second = sorted((one, two))
    text = json.dumps([prompt, first, second], ensure_ascii=True, sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:24]
    return Pair(name, prompt, first, second), first == two


def write_pairs(folder: str | Path, pairs: Iterable[Pair], *, each: int = 1) -> Path:
    """Let pairs wait in a folder, in the place of those that waited there; each pair once.

    ``each`` is how many people are to be asked of each pair.

    Raises:
        InputError: where the folder cannot be made or written.
    """
    path = output_folder(folder) / PAIRS
    found = {pair.name: pair for pair in pairs}
    rows = [
        {"pair": p.name, "prompt": p.prompt, "first": p.first, "second": p.second, "each": each}
        for p in found.values()
    ]
    _replace(path, "".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_pairs(folder: str | Path) -> Waiting:
    """The pairs that wait in a folder; none where nobody asked yet.

    Raises:
        InputError: naming the line that is no pair.
    """
    path = Path(folder) / PAIRS
    found, each = [], 1
    for number, line in enumerate(_content(path).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            pair, _ = pair_of(row["prompt"], row["first"], row["second"])
            each = max(each, int(row.get("each", 1)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path}, line {number}: no pair ({_short(error)}); give prompt, first and second, "
                "two different answers."
            ) from None
        found.append(pair)
    return Waiting(found, each)


def read_labels(folder: str | Path) -> list[Label]:
    """What was said, in order. A last line that a kill cut off was never confirmed: it is left out.

    Raises:
        InputError: naming another line that is damaged.
    """
    path = Path(folder) / LABELS
    *whole, _ = _content(path).split(b"\n")
    found = []
    for number, line in enumerate(whole, 1):
        try:
            found.append(_parsed(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}, line {number}: damaged ({_short(error)}); mend or remove this line."
            ) from None
    return found


def votes(labels: Iterable[Label]) -> dict[str, Vote]:
    """What all said of each pair that somebody was shown, by its name.

    >>> pair, _ = pair_of("x", "a", "b")
    >>> votes([Label(pair, "Ana", 0, "first", "first"), Label(pair, "Ben", 0, "tie", "first")])
    {'...': Vote(label=0.75, weight=2.0, people=2)}
    """
    said: dict[str, dict[str, list[float]]] = {}
    for label in labels:
        worth = ANSWERS[label.answer]
        own = said.setdefault(label.pair.name, {}).setdefault(label.annotator, [])
        if worth is not None:
            own.append(worth)
    found = {}
    for name, people in said.items():
        means = [float(np.mean(own)) for own in people.values() if own]
        found[name] = Vote(float(np.mean(means)) if means else 0.5, float(len(means)), len(people))
    return found


class Labels:
    """The labels of a folder, to be added to: one process at a time (:func:`folders.locked`).

    Raises:
        InputError: where the folder cannot be written, or a line of it is damaged.
    """

    def __init__(self, folder: str | Path):
        self.path = output_folder(folder) / LABELS
        self.all = read_labels(folder)
        self._known = {(x.pair.name, x.annotator, x.repeat): x for x in self.all}
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            # What a kill cut off was never confirmed.
            content = _content(self.path)
            os.ftruncate(self._file, content.rfind(b"\n") + 1)
            os.fsync(self._file)
            _sync_folder(self.path.parent)
        except OSError as error:
            raise self._unwritable(error) from None

    def find(self, pair: str, annotator: str, repeat: int) -> Label | None:
        """What an annotator said of a pair, that time."""
        return self._known.get((pair, annotator, repeat))

    def add(self, label: Label) -> Label:
        """Write a label; when this returns it is on the disk. Returns it with its time.

        Raises:
            ValueError: where this annotator has said something of this pair and repeat already.
            InputError: where it cannot be written; then it is not there.
        """
        key = (label.pair.name, label.annotator, label.repeat)
        if key in self._known:
            raise ValueError(f"{label.annotator} has labelled pair {label.pair.name} already.")
        label = label._replace(time=round(time.time(), 3))
        line = (json.dumps(_record(label)) + "\n").encode()
        before = os.fstat(self._file).st_size
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(self._file, rest) :]
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, before)
            raise self._unwritable(error) from None
        self.all.append(label)
        self._known[key] = label
        return label

    def close(self) -> None:
        """Nothing more is added."""
        os.close(self._file)

    def _unwritable(self, error: OSError) -> InputError:
        return InputError(
            f"{self.path}: cannot be written ({error.strerror}); make room, or change its "
            "permissions. What was confirmed is kept."
        )


def _record(label: Label) -> dict[str, Any]:
    pair = label.pair
    worth = ANSWERS[label.answer]
    better = pair.second if label.answer == "second" else pair.first
    return {
        "prompt": pair.prompt,
        "chosen": better,
        "rejected": pair.first if better is pair.second else pair.second,
        "label": 0.5 if worth in (None, 0.5) else 1.0,
        "weight": 0.0 if worth is None else 1.0,
        "pair": pair.name,
        "annotator": label.annotator,
        "repeat": label.repeat,
        "answer": label.answer,
        "left": label.left,
        "seconds": label.seconds,
        "time": label.time,
    }


def _parsed(row: Any) -> Label:
    pair, _ = pair_of(row["prompt"], row["chosen"], row["rejected"])
    if pair.name != row["pair"]:
        raise ValueError("its content is not what was compared")
    if row["answer"] not in ANSWERS or row["left"] not in ("first", "second"):
        raise ValueError(f"answer {row['answer']!r}, left {row['left']!r}")
    return Label(
        pair,
        str(row["annotator"]),
        int(row["repeat"]),
        row["answer"],
        row["left"],
        row.get("seconds"),
        float(row.get("time", 0.0)),
    )


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from None


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".tmp")
    try:
        with partial.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); make room.") from None


def _sync_folder(folder: Path) -> None:
    """A new file's name is on the disk too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:100] or type(error).__name__
