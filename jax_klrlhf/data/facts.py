"""What is in rows, counted as they stream by: 48 bytes are kept of each.

>>> print(length_summary([1, 2, 3, 4]))
LengthSummary(mean=2.5, median=2, p90=4, p99=4, max=4)
"""

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jax_klrlhf.data.rows import Row

PLACES = 5  # named of each kind of row


class LengthSummary(NamedTuple):
    """Lengths in tokens."""

    mean: float
    median: int
    p90: int
    p99: int
    max: int


class Description(NamedTuple):
    """Facts about rows. Shares are in [0, 1]; None where there is nothing to count."""

    rows: int
    prompts: int
    """Different prompts."""
    responses: Mapping[int, int]
    """Number of responses -> rows that have it."""
    duplicates: int
    """Rows whose prompt and responses all repeat an earlier row's."""
    contradictions: int
    """Rows whose first two responses stand the other way round in another row of the prompt."""
    ties: int
    """Rows whose first two responses have equal scores."""
    prompt_length: LengthSummary | None
    first_length: LengthSummary | None
    """Of the first (chosen) response."""
    other_length: LengthSummary | None
    """Of all other responses."""
    first_longer: float | None
    """Share of rows whose first response is longer than the second."""
    first_shorter: float | None


def length_summary(lengths: Sequence[int] | np.ndarray) -> LengthSummary | None:
    """Mean and quantiles; None of no lengths."""
    values = np.asarray(lengths)
    if not values.size:
        return None
    median, p90, p99 = np.quantile(values, [0.5, 0.9, 0.99], method="inverted_cdf").tolist()
    return LengthSummary(float(values.mean()), int(median), int(p90), int(p99), int(values.max()))


def describe(rows: Iterable[Row]) -> Description:
    """Count, measure and compare rows, each of which is read once."""
    facts = Facts()
    for row in rows:
        facts.add(row)
    return facts.description()


class Facts:
    """Counts that grow row by row. Contents are compared by Python's own 64-bit hashes of bytes.

    (Of 10 million different rows, two are taken for one with a probability of 3e-6.)
    """

    def __init__(self) -> None:
        self.largest = -1, ""
        """Largest token id, and the place of its row."""
        self.places: dict[str, dict[str, Any]] = {}
        """Kind -> count and first places: ``one response``, ``no response``, ``tied`` (the best
        and the worst)."""
        self._prompts, self._contents = array("q"), array("q")
        self._pairs, self._reversed = array("q"), array("q")
        self._prompt_lengths, self._first = array("i"), array("i")
        self._other, self._longer = array("i"), array("i")
        self._responses: Counter[int] = Counter()
        self._ties = 0

    def add(self, row: Row) -> None:
        """One more row."""
        responses = row.responses
        prompt = array("i", row.prompt).tobytes()
        each = [array("i", response).tobytes() for response in responses]
        self._prompts.append(hash(prompt))
        self._contents.append(hash((prompt, *each)))
        self._responses[len(each)] += 1
        self._prompt_lengths.append(len(row.prompt))
        largest = max(map(max, filter(None, (row.prompt, *responses))), default=-1)
        if largest > self.largest[0]:
            self.largest = largest, row.where
        if len(each) < 2:
            self._place("one response" if each else "no response", row)
        if each:
            self._first.append(len(responses[0]))
            self._other.extend(map(len, responses[1:]))
        if len(each) > 1:
            self._pairs.append(hash((prompt, each[0], each[1])))
            self._reversed.append(hash((prompt, each[1], each[0])))
            self._longer.append(len(responses[0]) - len(responses[1]))
            # As the records hold them: scores that float32 cannot tell apart are equal.
            scores = array("f", row.scores)
            self._ties += scores[0] == scores[1]
            if scores[0] == scores[-1]:
                self._place("tied", row)

    def description(self) -> Description:
        """Of all rows so far."""
        pairs = np.frombuffer(self._pairs, np.int64)
        longer = np.frombuffer(self._longer, np.int32)
        count = len(self._prompts)
        return Description(
            rows=count,
            prompts=_different(self._prompts),
            responses=dict(sorted(self._responses.items())),
            duplicates=count - _different(self._contents),
            contradictions=_count_in(pairs, np.frombuffer(self._reversed, np.int64)),
            ties=int(self._ties),
            prompt_length=length_summary(self._prompt_lengths),
            first_length=length_summary(self._first),
            other_length=length_summary(self._other),
            first_longer=float(np.mean(longer > 0)) if longer.size else None,
            first_shorter=float(np.mean(longer < 0)) if longer.size else None,
        )

    def to_json(self) -> dict[str, Any]:
        """For a manifest; :func:`from_json` reads the description of it."""
        token, where = self.largest
        found = self.description()._asdict()
        found["responses"] = {str(k): n for k, n in found["responses"].items()}
        return {
            "description": found,
            "largest_token": {"id": token, "where": where},
            "rows": self.places,
        }

    def _place(self, kind: str, row: Row) -> None:
        entry = self.places.setdefault(kind, {"count": 0, "first": []})
        entry["count"] += 1
        if len(entry["first"]) < PLACES:
            entry["first"].append(row.where or f"example {row.number}")


def from_json(found: Mapping[str, Any]) -> Description:
    """The description in what :meth:`Facts.to_json` gave."""
    values = dict(found["description"])
    values["responses"] = {int(k): n for k, n in values["responses"].items()}
    for name in ("prompt_length", "first_length", "other_length"):
        values[name] = None if values[name] is None else LengthSummary(*values[name])
    return Description(**values)


def _different(hashes: array) -> int:
    ordered = np.sort(np.frombuffer(hashes, np.int64))
    return int(ordered.size and 1 + np.count_nonzero(ordered[1:] != ordered[:-1]))


def _count_in(values: np.ndarray, others: np.ndarray) -> int:
    """How many of `values` are among `others`; np.isin would copy both several times."""
    if not values.size:
        return 0
    ordered = np.sort(others)
    places = np.searchsorted(ordered, values)
    places[places == ordered.size] = 0
    return int(np.count_nonzero(ordered[places] == values))
