"""Tokens of a text by its words, each of which the tokenizer is asked for once.

Asked for whole texts, the `tokenizers` library spends most of a preparation's time on words that it
has seen a thousand times. Here a text is cut before its spaces, and the pieces' tokens are kept.

That is exact where no token reaches from one side of a cut to the other. A cut is made before a
space (of several, the first) behind a character that is none, where

- a byte-level BPE cuts texts by an expression whose parts are all known here: each takes such a
  space as its first character or not at all, none looks beyond it from before, and together they
  leave no character out;
- a BPE of SentencePiece's kind, whose "word" is the whole text, has no merge that puts its sign for
  a space, ``▁``, behind another character (one look at its merges says so), or cuts there itself.

What else happens within a piece is the library's own work, so that scripts and versions of Unicode
do not matter. All other tokenizers, and texts with an added token in them, are asked for whole.
"""

import json
import re
import unicodedata
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

# U+180E was a space in early versions of Unicode.
_SPACE = re.compile(r" (?<=[^\s\u180e▁] )")
_EDGE = re.compile(r"[\s\u180e▁]")
_MOST = 200_000  # pieces kept
_LONG = 64  # characters; longer pieces hardly come back

# Parts of expressions, and the kind of characters that each takes wherever it finds one.
_CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
_PARTS = dict.fromkeys((*_CONTRACTIONS, f"(?i:{'|'.join(_CONTRACTIONS)})"), "") | {
    r" ?\p{L}+": "letters",
    r"[^\r\n\p{L}\p{N}]?\p{L}+": "letters",
    r" ?\p{N}+": "numbers",
    r"\p{N}{1,3}": "numbers",
    r"\p{N}": "numbers",
    r" ?[^\s\p{L}\p{N}]+": "others",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*": "others",
    r"\s*[\r\n]+": "",
    r"\s+(?!\S)": "",
    r"\s+": "spaces",
}
_KINDS = {"letters", "numbers", "others", "spaces"}
_PART = "|".join(map(re.escape, sorted(_PARTS, key=len, reverse=True)))


class Words:
    """Tokenizes many texts with one tokenizer, remembering pieces."""

    def __init__(
        self,
        opening: tokenizers.Tokenizer,
        continuation: tokenizers.Tokenizer,
        spec: Mapping[str, Any] | None = None,
    ):
        """A tokenizer, and the same without a space that it invents before a text.

        `spec`: what `opening` is saved as, where it is at hand.
        """
        rules: Mapping[str, Any] = json.loads(opening.to_str()) if spec is None else spec
        self.cuts = _can_be_cut(rules)
        """Whether texts are cut; if not, the library is asked for each as a whole."""
        added = [re.escape(_underlined(token["content"])) for token in rules["added_tokens"]]
        self._whole = opening
        self._added = re.compile("|".join(added) or r"(?!)")
        self._first, self._later = _Known(opening), _Known(continuation, " ")
        # Where no space is invented, a text may also be cut before a space that it begins with.
        self._first.safe_alone = opening is continuation

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """As the library's ``encode_batch_fast`` without special tokens."""
        if not self.cuts:
            return _asked(self._whole, texts)
        if len(self._first) + len(self._later) > _MOST:
            self._first.clear()
            self._later.clear()
        found: list[list[int]] = [[]] * len(texts)
        left: Sequence[int] = range(len(texts))
        for cut in (_quickly, _carefully):
            waiting = ((number, cut(texts[number])) for number in left)
            for _ in range(2):  # the second time with what the first was missing
                unknown = []
                for number, pieces in waiting:
                    packed = self._packed(pieces)
                    if packed is None:
                        unknown.append((number, pieces))
                    else:
                        found[number] = array("i", packed).tolist()
                waiting = unknown
                self._first.learn(self._added)
                self._later.learn(self._added)
            left = [number for number, _ in waiting]
        for number, ids in zip(left, _asked(self._whole, [texts[n] for n in left]), strict=True):
            found[number] = ids  # an added token is in it
        self._first.forget()
        self._later.forget()
        return found

    def _packed(self, pieces: list[str]) -> bytes | None:
        """Tokens of a text, None where a piece is not known, which is noted."""
        first, later = self._first, self._later
        noted = len(first.missing) + len(later.missing)
        head, *tail = pieces
        packed = b"".join([first[head], *map(later.__getitem__, tail)])
        return packed if len(first.missing) + len(later.missing) == noted else None


class _Known(dict[str, bytes]):
    """Tokens of pieces, as the bytes of 32-bit integers; what is missing is noted.

    A piece that ends with a space, which must be the last of its text, is known with one space more
    behind it: so only who cuts with care finds it.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, before: str = ""):
        """`before`: what stands before every piece, which is looked up without it."""
        super().__init__()
        self.missing: list[str] = []
        self._tokenizer, self._before = tokenizer, before
        self._long: list[str] = []
        self.safe_alone = False
        """Whether no piece at all is one."""

    def __missing__(self, piece: str) -> bytes:
        self.missing.append(piece)
        return b""

    def learn(self, added: re.Pattern[str]) -> None:
        """Ask for what was missing, but for pieces in which an added token may be found."""
        texts = {}
        for piece in dict.fromkeys(self.missing):
            if piece in self:  # learned for another text
                continue
            text = piece.removesuffix(" ")
            if (text != piece or self.safe(piece)) and not _found(added, text):
                texts[piece] = self._before + text
        self.missing.clear()
        for piece, ids in zip(texts, _asked(self._tokenizer, [*texts.values()]), strict=True):
            self[piece] = array("i", ids).tobytes()
            if len(piece) > _LONG:
                self._long.append(piece)

    def forget(self) -> None:
        """Long pieces."""
        for piece in self._long:
            self.pop(piece, None)
        self._long.clear()

    def safe(self, piece: str) -> bool:
        """Whether it is exact to cut before a space behind a piece."""
        return _EDGE.match(piece[-1]) is None if piece else self.safe_alone


def _quickly(text: str) -> list[str]:
    """Cut before every space, which is found out to be right by what is known."""
    return _carefully(text) if "  " in text else text.split(" ")


def _carefully(text: str) -> list[str]:
    """Cut where it is exact: the last piece alone may end with a space."""
    pieces = _SPACE.split(text)
    if not pieces[-1] or _EDGE.match(pieces[-1][-1]):
        pieces[-1] += " "
    return pieces


def _found(added: re.Pattern[str], piece: str) -> bool:
    """Whether an added token may be found in a piece behind a space."""
    text = "▁" + _underlined(piece)
    return added.search(text) is not None or (
        not text.isascii() and added.search(unicodedata.normalize("NFC", text)) is not None
    )


def _asked(tokenizer: tokenizers.Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    if not texts:
        return []
    found = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [encoding.ids for encoding in found]


def _underlined(text: str) -> str:
    """With ``▁`` for spaces: an added token may be looked for in a text before or after that."""
    return text.replace(" ", "▁")


def _can_be_cut(spec: Mapping[str, Any]) -> bool:
    """Whether the tokens of a saved tokenizer never reach over a cut."""
    model, steps = spec["model"], spec["pre_tokenizer"]
    if model["type"] != "BPE" or model.get("dropout"):
        return False
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return False
    # An added token must lie within a piece, where it is seen.
    if any("▁" in _underlined(added["content"]).lstrip("▁") for added in spec["added_tokens"]):
        return False
    return _is_byte_level(_steps(spec["normalizer"]), _steps(steps)) or _is_sentence_piece(
        _steps(spec["normalizer"]), _steps(steps), model
    )


def _steps(step: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if step is None:
        return []
    inner = step.get("normalizers", step.get("pretokenizers"))
    return [step] if inner is None else [each for one in inner for each in _steps(one)]


def _is_byte_level(
    normalizers: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, Any]]
) -> bool:
    """Cut into words by parts of `_PARTS` that leave nothing out."""
    if any(step["type"] != "NFC" for step in normalizers):
        return False
    if not steps or steps[-1]["type"] != "ByteLevel":
        return False
    *steps, last = steps
    if steps and last["add_prefix_space"]:  # it would begin every word
        return False
    steps = [step for step in steps if step["type"] != "Digits"]
    if last["use_regex"]:  # GPT-2's
        return not steps
    if len(steps) != 1 or steps[0]["type"] != "Split":
        return False
    pattern = steps[0]["pattern"].get("Regex")
    if pattern is None or steps[0]["behavior"] != "Isolated" or steps[0]["invert"]:
        return False
    if re.fullmatch(rf"(?:{_PART})(?:\|(?:{_PART}))*", pattern) is None:
        return False
    return {_PARTS[part] for part in re.findall(_PART, pattern)} >= _KINDS


def _is_sentence_piece(
    normalizers: Sequence[Mapping[str, Any]],
    steps: Sequence[Mapping[str, Any]],
    model: Mapping[str, Any],
) -> bool:
    """Spaces become ``▁``, behind which nothing is merged to what stands before."""
    replaced = False
    for step in normalizers:
        if step["type"] == "Replace":
            if step["pattern"] != {"String": " "} or step["content"] != "▁":
                return False
            replaced = True
        elif step["type"] != "Prepend" or step["prepend"] != "▁":
            return False
    parted = False
    for step in steps:
        if step["type"] == "Metaspace" and step["replacement"] == "▁" and len(steps) == 1:
            replaced, parted = True, step["split"]
        elif step["type"] != "Split" or step["pattern"] != {"String": " "} or not replaced:
            return False  # such a split finds no space any more
    if not replaced or "▁" not in model["vocab"]:
        return False
    if parted:
        return True
    merges = (m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"])
    return not model.get("ignore_merges") and not any(
        "▁" in (left + right).lstrip("▁") for left, right in merges
    )
