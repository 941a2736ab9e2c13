"""Tokens of a text by its words, each of which the tokenizer is asked for once.

A byte-level BPE cuts a text into words by a regular expression and merges within each of them, so
that a text's tokens are its words' tokens, one after the other. Asked for whole texts, the
`tokenizers` library spends most of a preparation's time on words it has seen a thousand times.

Only what is certain is taken: Western texts without an added token, cut by a known kind of
expression. Everything else, and every new word, is the library's.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

import tokenizers

# GPT-2's expression, which ByteLevel applies by itself.
_BYTE_LEVEL = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Of other characters those of Western texts, whose kind no version of Unicode changes: letters, and
# signs that are neither letters nor digits nor spaces.
_LETTERS = "A-Za-z\u00aa\u00b5\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u00ff"
_SIGNS = (
    "\u00a1\u00a7\u00ab\u00b0\u00b6\u00b7\u00bb\u00bf\u2013\u2014\u2018-\u201f\u2022\u2026\u20ac"
)
_PLAIN = re.compile(rf"[\t\n\r\x20-\x7e{_LETTERS}{_SIGNS}]*")
_MOST = 1_000_000  # words kept


class Words:
    """Tokenizes many texts with one tokenizer, remembering words."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, spec: dict[str, Any] | None = None):
        """`spec`: what `tokenizer` is saved as, where it is at hand."""
        self._tokenizer = tokenizer
        rules: dict[str, Any] = json.loads(tokenizer.to_str()) if spec is None else spec
        self._expression = _expression(rules)
        added = [re.escape(token["content"]) for token in rules["added_tokens"]]
        self._added = re.compile("|".join(added) or r"(?!)")
        self._known: dict[str, list[int]] = {}
        self._uncertain: set[str] = set()

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """As the library's ``encode_batch_fast`` without special tokens."""
        if self._expression is None:
            return self._asked(texts)
        find, known = self._expression.findall, self._known
        if len(known) > _MOST:
            known.clear()
        cut = [self._cut(text) for text in texts]
        new = list({word: None for words in cut if words for word in words if word not in known})
        # An expression that looks around may cut a word that stands alone in another way.
        odd = {word for word in new if find(word) != [word]}
        if odd:
            self._uncertain |= odd
            new = [word for word in new if word not in odd]
        if self._uncertain:
            cut = [
                None if words is None or not self._uncertain.isdisjoint(words) else words
                for words in cut
            ]
        known.update(zip(new, self._asked(new), strict=True))
        others = iter(
            self._asked([t for t, words in zip(texts, cut, strict=True) if words is None])
        )
        found = []
        for words in cut:
            if words is None:
                found.append(next(others))
            else:
                found.append([token for word in words for token in known[word]])
        return found

    def _cut(self, text: str) -> list[str] | None:
        assert self._expression is not None
        if _PLAIN.fullmatch(text) is None or self._added.search(text) is not None:
            return None
        words = self._expression.findall(text)
        return words if sum(map(len, words)) == len(text) else None

    def _asked(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in found]


def _expression(spec: dict[str, Any]) -> re.Pattern[str] | None:
    """How a saved tokenizer cuts Western text into words; None where that is not certain."""
    model, steps = spec["model"], spec["pre_tokenizer"]
    if model["type"] != "BPE" or model.get("dropout") or spec["normalizer"] is not None:
        return None
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix") or steps is None:
        return None
    steps = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    *splits, last = steps
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    if not splits and last["use_regex"]:
        pattern = _BYTE_LEVEL
    elif len(splits) == 1 and not last["use_regex"] and splits[0]["type"] == "Split":
        split = splits[0]
        pattern = split["pattern"].get("Regex")
        if split["behavior"] != "Isolated" or split["invert"] or pattern is None:
            return None
    else:
        return None
    return _western(pattern)


def _western(pattern: str) -> re.Pattern[str] | None:
    """An expression of letters and digits of any script, for texts of these characters."""
    inside, escaped, found = False, False, ""
    place = 0
    while place < len(pattern):
        token = next((t for t in (r"\p{L}", r"\p{N}") if pattern.startswith(t, place)), None)
        if token is not None and not escaped:
            letters = _LETTERS if token == r"\p{L}" else "0-9"
            found += letters if inside else f"[{letters}]"
            place += len(token)
            continue
        char = pattern[place]
        if not escaped:
            inside = (inside or char == "[") and char != "]"
        escaped = char == "\\" and not escaped
        found += char
        place += 1
    if r"\p" in found or r"\P" in found or "&&" in found or re.search(r"\((?!\?)", found):
        return None  # another script's letters, or groups, by which findall would answer
    try:
        return re.compile(found, re.ASCII)
    except re.error:
        return None
