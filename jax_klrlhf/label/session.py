"""Who is asked what next, which answer stands on which side, and how far people agree.

Sides are blind and shuffled: which of two answers stands on the left is a hash of the pair, the
annotator and the seed, so that a page cannot choose it and a restart does not change it. A pair
that is shown again, to see whether one agrees with oneself, has its sides exchanged.
"""

import hashlib
import threading
import time
import unicodedata
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_klrlhf import labelling
from jax_klrlhf.core import choices as choice_sets
from jax_klrlhf.core import ellipsoid, pairs
from jax_klrlhf.core.pairs import PairRule
from jax_klrlhf.label.pool import Pool
from jax_klrlhf.label.teaching import Taught, taught
from jax_klrlhf.labelling import Label, Labels, Pair, pair_of
from jax_klrlhf.report.answers import words
from jax_klrlhf.report.serving import Refused
from jax_klrlhf.results import proportion

GAP = 3
"""Answers of an annotator between a pair and its repetition, at least."""
HELD = 900.0
"""Seconds that a pair is kept for the one to whom it was shown."""


class Ask(NamedTuple):
    """A pair on its way to a page."""

    name: str
    """Of the asking: the pair's, and how often this annotator had labelled it before."""
    pair: Pair
    left: str
    """``first`` or ``second``."""

    def shown(self) -> dict[str, Any]:
        """As the page has it: nothing in it says who answered, or which is first."""
        texts = (self.pair.first, self.pair.second)
        left, right = texts if self.left == "first" else texts[::-1]
        return {"ask": self.name, "prompt": words(self.pair.prompt), "left": left, "right": right}


class Session:
    """The labelling of a folder, by one process: everything a page can ask for.

    Args:
        folder: where labels are kept (:mod:`jax_klrlhf.labelling`); hold it
            (:func:`folders.locked`).
        pool: answers among which ``rule`` chooses pairs; None: the pairs that wait in the folder
            (of a run with :func:`.oracle.human`), in a shuffled order.
        rule: ``rule(key, choices) -> Pair`` of :mod:`core.pairs`, given what labels have taught.
        each: how many people are asked of each pair; waiting pairs say it themselves.
        repeats: share of an annotator's answers that are to pairs shown a second time.
        ridge: lambda of :func:`.teaching.taught`.
        features: of the answers of waiting pairs; words by default.
        seed: of sides and order.

    Raises:
        ValueError: for shares and numbers out of range.
        InputError: where the folder cannot be written, or holds damaged lines.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        pool: Pool | None = None,
        rule: PairRule = pairs.most_uncertain,
        each: int = 1,
        repeats: float = 0.1,
        ridge: float = 0.1,
        features: Any = None,
        seed: int = 0,
    ):
        if not 0 <= repeats < 1 or each < 1 or not ridge > 0:
            raise ValueError(
                f"Session: each is at least 1, repeats in [0, 1), ridge positive: got {each}, "
                f"{repeats}, {ridge}"
            )
        self.folder = Path(folder)
        self._given, self._pool, self._rule, self._each = pool is not None, pool, rule, each
        self._repeats, self._ridge, self._seed = repeats, ridge, seed
        self._features = features
        self.labels = Labels(folder)
        self._lock = threading.RLock()
        self._out: dict[str, tuple[Ask, float]] = {}
        self._waiting: labelling.Waiting = labelling.Waiting([], each)
        self._stamp: Any = None
        self._pairs: dict[str, Pair] = {x.pair.name: x.pair for x in self.labels.all}
        self._rows: dict[tuple[str, str], int] = {}
        self._known_to: tuple[int, Taught] | None = None
        self._sets: Any = None
        self._look()

    def prepare(self) -> None:
        """Compile what the first person would otherwise wait for."""
        with self._lock:
            if self._answers() is not None:
                self._taught()
            if self._given:
                self._chosen(jax.random.key(0))

    # What a page asks for.

    def next(self, annotator: str) -> Ask | None:
        """The pair for an annotator; the same one until it is answered. None: nothing to ask."""
        with self._lock:
            annotator = named(annotator)
            self._look()
            out = self._out.get(annotator)
            if out is not None and self._open(out[0], annotator):
                self._out[annotator] = (out[0], time.monotonic())
                return out[0]
            self._out.pop(annotator, None)
            found = self._propose(annotator)
            if found is not None:
                pair, repeat = found
                self._pairs[pair.name] = pair
                ask = Ask(f"{pair.name}.{repeat}", pair, self.side(pair.name, annotator, repeat))
                self._out[annotator] = (ask, time.monotonic())
                return ask
            return None

    def answer(
        self, annotator: str, ask: str, said: str, *, seconds: float | None = None
    ) -> tuple[Label, bool]:
        """Keep what an annotator said; when this returns it is on the disk.

        Args:
            annotator: who.
            ask: name of the asking.
            said: ``left``, ``right``, ``tie`` or ``skip``.
            seconds: since it was shown, as the page measured it.

        Returns:
            The label, and whether it is new: the same answer sent twice is one label.

        Raises:
            Refused: where the pair is not known, something else was said of it already, or there is
                no such answer.
            InputError: where it cannot be written.
        """
        with self._lock:
            annotator = named(annotator)
            name, _, number = ask.partition(".")
            if said not in ("left", "right", "tie", "skip"):
                raise Refused(f"an answer is left, right, tie or skip, not {said[:20]!r}")
            if not number.isdigit() or len(number) > 3 or (pair := self._find(name)) is None:
                raise Refused("this pair is not asked here (any more)")
            repeat = int(number)
            left = self.side(name, annotator, repeat)
            right: labelling.Which = "second" if left == "first" else "first"
            meant: Any = {"left": left, "right": right}.get(said, said)
            there = self.labels.find(name, annotator, repeat)
            if there is not None:
                if there.answer != meant:
                    raise Refused("this pair has your label already; a label is not changed")
                return there, False
            if repeat > self._times(name, annotator) or repeat > 1:
                raise Refused("this pair was not shown to you so often")
            label = Label(pair, annotator, repeat, meant, left, seconds)
            label = self.labels.add(label)
            self._out.pop(annotator, None)
            return label, True

    def progress(self, annotator: str) -> dict[str, Any]:
        """Counts for the page: the annotator's own answers, and pairs that wait."""
        with self._lock:
            own = sum(x.annotator == annotator for x in self.labels.all)
            found: dict[str, Any] = {"own": own, "all": len(self.labels.all), "left": None}
            if not self._given:
                done = labelling.votes(self.labels.all)
                people = [done[p.name].people if p.name in done else 0 for p in self._waiting.pairs]
                found["left"] = sum(count < self._waiting.each for count in people)
                found["asked"] = len(people)
            return found

    def teaching(self) -> dict[str, Any]:
        """What the labels have taught, as JSON has it: for the page's second tab."""
        with self._lock:
            self._look()
            said = self.labels.all
            found: dict[str, Any] = {"labels": len(said), "annotators": self._annotators()}
            found |= agreement(said)
            if (pool := self._answers()) is None:
                return found
            now = self._taught()
            flat = [
                (words(prompt), text)
                for prompt, some in zip(pool.prompts, pool.answers, strict=True)
                for text in some
            ]
            order = np.argsort(-now.reward, kind="stable")
            shown = order if len(order) <= 40 else np.concatenate([order[:20], order[-20:]])
            found["answers"] = [
                {
                    "prompt": flat[row][0],
                    "text": flat[row][1],
                    "reward": float(now.reward[row]),
                    "stderr": float(now.stderr[row]),
                }
                for row in shown.tolist()
            ]
            found["pool"] = len(flat)
            found["agrees"] = now.agrees
            found["curve"] = {
                "count": now.labelled.tolist(),
                "information": now.information.tolist(),
                "width": now.width.tolist(),
            }
            return found

    def close(self) -> None:
        """Let go of the file."""
        self.labels.close()

    def side(self, pair: str, annotator: str, repeat: int) -> labelling.Which:
        """Which answer stands on the left: a fair coin, turned over when the pair is repeated."""
        text = f"{self._seed}\0{pair}\0{annotator}"
        coin = hashlib.sha256(text.encode()).digest()[0] + repeat
        return "first" if coin % 2 == 0 else "second"

    # What is asked.

    def _look(self) -> None:
        """See whether whoever asks has put other pairs in the folder."""
        if self._given:
            return
        path = self.folder / labelling.PAIRS
        try:
            stat = path.stat()
            stamp = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
        except OSError:
            stamp = None
        if stamp == self._stamp:
            return
        self._waiting = labelling.read_pairs(self.folder)
        self._stamp = stamp
        self._pairs |= {pair.name: pair for pair in self._waiting.pairs}
        self._pool, self._rows, self._known_to = None, {}, None

    def _answers(self) -> Pool | None:
        """The answers; those of waiting pairs are read when somebody wants to know of them."""
        if self._pool is None and self._pairs:
            self._pool = Pool.of_pairs(self._pairs.values(), features=self._features)
        return self._pool

    def _find(self, name: str) -> Pair | None:
        if name not in self._pairs and self._given and self._pool is not None:
            # Shown before a restart: look at every pair that there could be.
            for prompt, some in zip(self._pool.prompts, self._pool.answers, strict=True):
                for i in range(len(some)):
                    for j in range(i):
                        pair, _ = pair_of(prompt, some[i], some[j])
                        if pair.name == name:
                            self._pairs[name] = pair
        return self._pairs.get(name)

    def _times(self, name: str, annotator: str) -> int:
        return sum(self.labels.find(name, annotator, n) is not None for n in (0, 1))

    def _open(self, ask: Ask, annotator: str) -> bool:
        """Whether what was shown is still to be answered by this annotator."""
        name, _, number = ask.name.partition(".")
        if self.labels.find(name, annotator, int(number)) is not None:
            return False
        waits = self._given or any(pair.name == name for pair in self._waiting.pairs)
        return waits and (int(number) > 0 or self._wanted(name, annotator))

    def _wanted(self, name: str, annotator: str) -> bool:
        """Whether fewer people than asked have, or are about to give, their label of a pair."""
        if self.labels.find(name, annotator, 0) is not None:
            return False
        now = time.monotonic()
        people = {x.annotator for x in self._of(name)}
        people |= {
            other
            for other, (ask, when) in self._out.items()
            if other != annotator and ask.pair.name == name and now - when < HELD
        }
        return len(people) < (self._each if self._given else self._waiting.each)

    def _of(self, name: str) -> list[Label]:
        return [x for x in self.labels.all if x.pair.name == name]

    def _propose(self, annotator: str) -> tuple[Pair, int] | None:
        fresh = self._fresh(annotator)
        if fresh is None:
            return None
        again = self._again(annotator)
        return (fresh, 0) if again is None else (again, 1)

    def _again(self, annotator: str) -> Pair | None:
        """A pair to be repeated, when it is time for one: the oldest that was decided."""
        own = [x for x in self.labels.all if x.annotator == annotator]
        due = int(self._repeats * (len(own) + 1)) - sum(x.repeat > 0 for x in own)
        if due < 1:
            return None
        for label in own[:-GAP]:
            decided = label.answer != "skip" and label.repeat == 0
            if decided and self.labels.find(label.pair.name, annotator, 1) is None:
                return label.pair
        return None

    def _fresh(self, annotator: str) -> Pair | None:
        if not self._given:
            key = lambda pair: self._number(pair.name, annotator)  # noqa: E731
            for pair in sorted(self._waiting.pairs, key=key):
                if self._wanted(pair.name, annotator):
                    return pair
            return None
        return self._by_rule(annotator)

    def _by_rule(self, annotator: str) -> Pair | None:
        """Of the pairs that the rule makes, the one whose label tells most; then any others."""
        assert self._pool is not None
        key = jax.random.fold_in(jax.random.key(self._seed), len(self.labels.all))
        first, second, valid, gain = self._chosen(key)
        asked = Counter(repr(x.pair.prompt) for x in self.labels.all)
        found = []
        for row, match in np.argwhere(valid).tolist():
            prompt, some = self._pool.prompts[row], self._pool.answers[row]
            one, two = some[int(first[row, match])], some[int(second[row, match])]
            pair, _ = pair_of(prompt, one, two)
            found.append((asked[repr(prompt)], -float(gain[row, match]), len(found), pair))
        # The most uncertain of all prompts; other rules go round the prompts.
        if self._rule is pairs.most_uncertain:
            found.sort(key=lambda item: item[1:3])
        else:
            found.sort(key=lambda item: (item[0], self._number(item[3].name, "")))
        for *_, pair in found:
            if self._wanted(pair.name, annotator):
                return pair
        return self._any(annotator, asked)

    def _any(self, annotator: str, asked: Mapping[str, int]) -> Pair | None:
        """A pair that the rule does not make (any more), of the prompt that was asked least."""
        assert self._pool is not None
        both = list(zip(self._pool.prompts, self._pool.answers, strict=True))
        for prompt, some in sorted(both, key=lambda item: asked.get(repr(item[0]), 0)):
            made = [
                pair_of(prompt, some[i], some[j])[0] for i in range(len(some)) for j in range(i)
            ]
            for pair in sorted(made, key=lambda pair: self._number(pair.name, "")):
                if self._wanted(pair.name, annotator):
                    return pair
        return None

    def _chosen(self, key: Any) -> list[np.ndarray]:
        """Pairs of the rule ``[B, M]`` (first, second, valid), and what each one's label tells."""
        assert self._pool is not None
        now = self._taught()
        if self._sets is None:
            sizes = [len(some) for some in self._pool.answers]
            where = np.arange(max(sizes)) < np.array(sizes)[:, None]
            row = np.where(where, np.cumsum([0, *sizes])[:-1, None] + np.arange(max(sizes)), 0)
            self._sets = (row, where)
        row, where = self._sets
        made = _apply(
            self._rule,
            key,
            jnp.asarray(self._pool.features[row]),
            jnp.asarray(np.where(where, now.reward[row], 0)),
            jnp.asarray(where),
            jnp.asarray(now.precision),
            jnp.float32(self._ridge),
        )
        return [np.asarray(x).reshape(len(where), -1) for x in made]

    def _taught(self) -> Taught:
        assert self._pool is not None
        if not self._rows:
            self._rows = self._pool.rows()
        if self._known_to is None or self._known_to[0] != len(self.labels.all):
            found = taught(self._pool, self.labels.all, ridge=self._ridge, rows=self._rows)
            self._known_to = (len(self.labels.all), found)
        return self._known_to[1]

    def _number(self, pair: str, annotator: str) -> bytes:
        """A place in a shuffled order, of which a restart knows too."""
        return hashlib.sha256(f"{self._seed}\0order\0{pair}\0{annotator}".encode()).digest()

    def _annotators(self) -> dict[str, dict[str, int]]:
        found: dict[str, Counter[str]] = {}
        for label in self.labels.all:
            found.setdefault(label.annotator, Counter())[
                label.answer if label.answer in ("tie", "skip") else "decided"
            ] += 1
        return {name: dict(counts) for name, counts in found.items()}


def _apply(rule: PairRule, *arrays: Any) -> Any:
    return _applied(rule)(*arrays)


def _applied(rule: PairRule) -> Any:
    if rule not in _PROGRAMS:

        def program(key, features, reward, where, precision, ridge):
            state = ellipsoid.Ellipsoid(precision, ridge)
            rows = jnp.broadcast_to(
                jnp.arange(where.shape[-1], dtype=jnp.int32)[None, :, None], (*where.shape, 1)
            )
            # Pages compare what is in the pool: every answer is a choice of its own.
            given = choice_sets.drawn(
                rows, where=where, reward=reward, features=features, ellipsoid=state
            )
            pair = rule(key, given)
            flat = [x.reshape(where.shape[0], -1) for x in pair]
            at = lambda index: jnp.take_along_axis(features, index[..., None], axis=1)  # noqa: E731
            margin = jnp.take_along_axis(reward, flat[0], -1) - jnp.take_along_axis(
                reward, flat[1], -1
            )
            curvature = jax.nn.sigmoid(margin) * jax.nn.sigmoid(-margin)
            gain = curvature * ellipsoid.norm(state, at(flat[0]) - at(flat[1])) ** 2
            return (*flat, gain)

        _PROGRAMS[rule] = jax.jit(program)
    return _PROGRAMS[rule]


_PROGRAMS: dict[Any, Any] = {}


def named(annotator: str) -> str:
    """An annotator's name, without spaces around it.

    Raises:
        Refused: where it is none: empty, longer than 60 characters, or of characters that do not
            print.
    """
    found = unicodedata.normalize("NFC", annotator).strip()
    if not 0 < len(found) <= 60 or not found.isprintable():
        raise Refused("a name has 1 to 60 characters that print")
    return found


def agreement(labels: list[Label]) -> dict[str, Any]:
    """How far annotators agree with themselves and each other, and which side they prefer.

    Shares with their 95 % Wilson interval and count: ``itself``, repeated pairs answered alike;
    ``others``, pairs of two annotators' first answers to one pair that are alike; ``left``, decided
    answers for the left side. None where there is none. Skipped pairs do not count.
    """
    first: dict[str, dict[str, str]] = {}
    again: list[bool] = []
    left: list[bool] = []
    for label in labels:
        if label.answer == "skip":
            continue
        if label.answer != "tie":
            left.append(label.answer == label.left)
        said = first.setdefault(label.pair.name, {})
        if label.repeat == 0:
            said[label.annotator] = label.answer
        elif label.annotator in said:
            again.append(said[label.annotator] == label.answer)
    between = [
        one == two
        for said in first.values()
        for number, one in enumerate(said.values())
        for two in list(said.values())[:number]
    ]
    found = {}
    for name, hits in {"itself": again, "others": between, "left": left}.items():
        if not hits:
            found[name] = None
            continue
        share, (low, high) = proportion(hits)
        found[name] = {"share": share.value, "low": low, "high": high, "count": len(hits)}
    return found
