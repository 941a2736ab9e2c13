"""Words of a user that look like control tokens stay words.

A tokenizer finds ``<|im_end|>`` or ``</s>`` in any text and makes of it the token that ends a turn,
whoever wrote it: a prompt could so end its own turn and speak for the assistant. Here the control
tokens (the special ones among a tokenizer's added tokens, and role markers) go by other names,
drawn at random for each process, which no text holds. What the chat template writes is put in these
names; what came in a message is not, and is tokenized like any other text, by all of the
tokenizer's own rules.

A marker that is no token, such as ``[INST]`` of some templates, is text for the model too, and
nothing tells the template's from the user's.
"""

import re
import secrets
from collections.abc import Callable, Collection, Mapping
from typing import Any

from jax_klrlhf.errors import InputError

_NONCE = secrets.token_hex(12)


class Control:
    """The control tokens of a tokenizer, by the JSON it is saved as."""

    def __init__(self, spec: Mapping[str, Any], *, special: Collection[str] = (), frame: str = ""):
        """Of the added tokens those marked special, those named `special`, and role markers.

        A role marker is a token that is no word and stands in `frame`, the template's own text
        around a user's message.
        """
        self._names = {
            token["content"]: f"<{_NONCE}:{token['id']}>"
            for token in spec["added_tokens"]
            if token["content"].strip()
            and (
                token["special"]
                or token["content"] in special
                or (token["content"] in frame and re.search(r"[^\w\s]", token["content"]))
            )
        }
        self._words = {name: word for word, name in self._names.items()}
        # The longest first: a tokenizer takes the longest that begins at a place.
        words = sorted(self._names, key=len, reverse=True)
        self._word = re.compile("|".join(map(re.escape, words)) or r"(?!)")
        self._name = re.compile(rf"<{_NONCE}:\d+>")
        self._hidden = re.compile(rf"{_NONCE}x(\d+)y")
        self._order = words

    def renamed(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        """A saved tokenizer whose control tokens no text holds; ids are the same."""
        added = [
            {**token, "content": self._names.get(token["content"], token["content"])}
            for token in spec["added_tokens"]
        ]
        model = dict(spec["model"])
        vocab = model["vocab"]
        if isinstance(vocab, Mapping):
            model["vocab"] = {self._names.get(word, word): id for word, id in vocab.items()}
        else:  # Unigram: pieces with scores
            model["vocab"] = [[self._names.get(word, word), score] for word, score in vocab]
        if model.get("merges"):
            model["merges"] = [merge for merge in model["merges"] if not self._makes(merge)]
        if model.get("unk_token") is not None:
            model["unk_token"] = self._names.get(model["unk_token"], model["unk_token"])
        return {**spec, "added_tokens": added, "model": model}

    def render(self, messages: Any, write: Callable[[Any], str]) -> str:
        """What `write` makes of chat messages, its control tokens alone under their other names.

        Raises :class:`InputError` where `write` looks into the words of a message that are hidden
        from it, or cuts them.
        """
        hidden = self._map(messages, self._hide)
        text = self._word.sub(lambda found: self._names[found[0]], write(hidden))
        if hidden == messages:
            return text
        text = self._hidden.sub(lambda found: self._order[int(found[1])], text)
        if self._name.sub(lambda found: self._words[found[0]], text) != write(messages):
            raise InputError(
                "the chat template takes apart the words of a message that look like control "
                "tokens: remove them from the data, or read them as tokens (control_tokens)"
            )
        return text

    def _hide(self, text: str) -> str:
        return self._word.sub(lambda found: f"{_NONCE}x{self._order.index(found[0])}y", text)

    def _map(self, value: Any, change: Callable[[str], str]) -> Any:
        if isinstance(value, str):
            return change(value)
        if isinstance(value, Mapping):
            return {key: self._map(item, change) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._map(item, change) for item in value]
        return value

    def _makes(self, merge: Any) -> bool:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        return not self._names.keys().isdisjoint((left, right, left + right))
