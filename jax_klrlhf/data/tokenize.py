"""Text to token ids: one set of rules, so that training, scoring and sampling see the same tokens.

A preference row is *a prompt once and K responses to it*. Prompt and response are tokenized
separately, and the two rows of ids are what every other module handles.

1. The **begin token** stands once, first in the prompt, where the tokenizer itself puts one; never
   before a response, never doubled. (Chat: the template alone decides, as in transformers.)
2. The **end token** is appended to every response and counted in the loss, never doubled. (Chat:
   the special token with which the template closes the turn, if it writes one.)
3. A response *continues* a text: the space that SentencePiece tokenizers invent before a text's
   first word is not put before a response.
4. A long **prompt** loses its beginning: the words next to the response are kept, and the begin
   token before them, because no model has seen a text without it.
5. A long **response** loses its end, and with it the end token: to train it there would teach the
   model to stop where we ran out of room.
6. A row whose response is **gone** (no token of its own) is dropped, with the reason. So is one
   whose responses all equal each other, before or after the cut: it says nothing.
7. Token **ids** are accepted as they are: nothing is added, only the cuts apply.
8. An **implicit prompt** is the longest common prefix of the responses *in tokens*: prompt plus
   response is the tokenization of the whole text, whatever token spans the boundary of the
   characters. Shared first words of the responses fall to the prompt; they cancel in any margin.
9. What a **user wrote** is text: ``<|im_end|>`` or ``</s>`` within it are words, not the tokens
   that end a turn, in plain text and in chat messages alike; see :mod:`control`. (The option
   ``control_tokens`` reads them as tokens, for data that were put in a chat template before.)

Everyone who encodes text does so by an :class:`Encoder`.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from jax_klrlhf.data.control import Control
from jax_klrlhf.data.examples import Message
from jax_klrlhf.data.words import Words
from jax_klrlhf.errors import InputError


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoder:
    """A tokenizer with the rules of this module: text in, ids out."""

    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    begin: int | None
    """The begin token, where the tokenizer itself begins a text with one."""
    end: int
    opening: tokenizers.Tokenizer
    """Tokenizes the first words of a text."""
    continuation: tokenizers.Tokenizer
    """The same without the space invented before a first word."""
    control: Control | None
    """None: control tokens in a user's text are read as such."""
    digest: str
    """SHA-256 of the tokenizer that `opening` and `continuation` were made of."""
    words: tuple[Words, Words]
    """Of `opening` and of `continuation`: the same tokens, sooner."""

    def ids(self, texts: Sequence[str], *, continuing: bool = False) -> list[list[int]]:
        """Ids of many texts, nothing added, by `opening` or `continuation`."""
        try:
            return self.words[continuing].ids(texts)
        except (TypeError, UnicodeEncodeError) as error:
            raise InputError(
                f"not text that can be tokenized ({error}): half of a surrogate pair?"
            ) from error

    def prompt(self, text: str) -> list[int]:
        """Ids of a prompt, begin token first where the tokenizer has one."""
        return begun(self.ids([text])[0], self.begin)

    def response(self, text: str) -> list[int]:
        """Ids of a response, end token last."""
        return ended(self.ids([text], continuing=True)[0], self.end)

    def chat_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation up to where the assistant is to speak."""
        return self.ids([self.framed(messages, add_generation_prompt=True)])[0]

    def framed(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """A conversation as `opening` and `continuation` are to read it.

        Unlike :meth:`render` it tells the template's control tokens from the same words in a
        message, which is not for people to read.
        """

        def write(given: Sequence[Message]) -> str:
            return self.render(given, add_generation_prompt=add_generation_prompt)

        if self.control is None:
            return write(messages)
        return self.control.render([dict(message) for message in messages], write)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text if isinstance(text, str) else "".join(text)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """A conversation as text, by the tokenizer's chat template.

        Raises :class:`InputError` where the tokenizer has none, or the template refuses.
        """
        if not self.tokenizer.chat_template:
            raise InputError(
                f"tokenizer {self.tokenizer.name_or_path!r} has no chat template, and the data "
                "holds chat messages: set `chat_template` in its tokenizer_config.json, or give "
                "prompts and responses as text"
            )
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except Exception as error:  # jinja2 and the template's own raise_exception
            raise InputError(
                f"chat template of {self.tokenizer.name_or_path!r} refused roles "
                f"{[message.get('role') for message in messages]}: {error}"
            ) from error
        assert isinstance(text, str)
        return text

    def fingerprint(self) -> str:
        """SHA-256 of what decides the ids: vocabulary, rules, template, begin and end."""
        parts = [
            self.digest,
            self.tokenizer.chat_template,
            self.begin,
            self.end,
            self.control is None,
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def load(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a local folder, or of a hub id; never runs code that comes with it.

    Raises :class:`InputError` naming the path where there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"no tokenizer at {str(path)!r} ({reason}): give a folder that holds tokenizer.json "
            "and tokenizer_config.json, or a hub id"
        ) from error


def encoder(tokenizer: PreTrainedTokenizerBase, *, control_tokens: bool = False) -> Encoder:
    """The rules of this module for a transformers tokenizer.

    `control_tokens`: read ``<|im_end|>``, ``</s>`` and the like in a text as tokens (rule 9).

    Raises :class:`InputError` where it has no end token, or is not backed by `tokenizers`.
    """
    name = tokenizer.name_or_path
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise InputError(
            f"tokenizer {name!r} is not backed by the `tokenizers` library: convert it to a "
            "tokenizer.json"
        )
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise InputError(
            f"tokenizer {name!r} has no end token, so responses would never end: set `eos_token` "
            "in its tokenizer_config.json"
        )
    added = tokenizer("")["input_ids"]
    assert isinstance(added, list)
    begins = bool(added) and added[0] == tokenizer.bos_token_id
    spec = json.loads(backend.to_str())
    spec["truncation"] = spec["padding"] = spec["post_processor"] = None
    control = None
    if not control_tokens:
        special = tokenizer.all_special_tokens
        control = Control(spec, special=special, frame=_frame(tokenizer))
    named = spec if control is None else control.renamed(spec)
    opening = tokenizers.Tokenizer.from_str(json.dumps(named))
    continuation, rules = opening, _continuing(named)
    if rules != named:  # many tokenizers invent no space
        continuation = tokenizers.Tokenizer.from_str(json.dumps(rules))
    words = continued = Words(opening, continuation, named)
    if continuation is not opening:
        continued = Words(continuation, continuation, rules)
    return Encoder(
        tokenizer=tokenizer,
        vocab_size=len(tokenizer),
        begin=added[0] if begins else None,
        end=end,
        opening=opening,
        continuation=continuation,
        control=control,
        digest=hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest(),
        words=(words, continued),
    )


def train_tokenizer(
    texts: Iterable[str],
    *,
    vocab_size: int,
    folder: str | Path,
    begin: str = "<s>",
    end: str = "</s>",
    pad: str = "<pad>",
    chat_template: str | None = None,
) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE on texts and save it as a folder that transformers loads.

    Any text round-trips, byte for byte. Ids 0, 1, 2 are pad, begin and end, three different
    tokens; a text begins with the begin token. Fewer than `vocab_size` tokens result where the
    texts hold fewer repeated pieces. The same texts give the same tokenizer.
    """
    if vocab_size < 259:
        raise InputError(
            f"vocab_size {vocab_size} is below 259, the 256 bytes and 3 special tokens"
        )
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[pad, begin, end],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A $B", special_tokens=[(begin, 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model,
        bos_token=begin,
        eos_token=end,
        pad_token=pad,
        clean_up_tokenization_spaces=False,
    )
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(str(folder))
    return load(folder)


def begun(ids: list[int], begin: int | None) -> list[int]:
    """The begin token once in front (rule 1)."""
    return ids if begin is None or ids[:1] == [begin] else [begin, *ids]


def ended(ids: list[int], end: int) -> list[int]:
    """The end token once at the end (rule 2)."""
    return ids if ids[-1:] == [end] else [*ids, end]


def _frame(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template writes around a user's message, if it has it to say."""
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "x"}], add_generation_prompt=True, tokenize=False
        )
    except Exception:  # no template, or one that wants other messages
        return ""
    return text if isinstance(text, str) else ""


def _continuing(spec: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer without the space that it invents before a text."""
    return {
        **spec,
        "normalizer": _continue_normalizer(spec["normalizer"]),
        "pre_tokenizer": _continue_pre_tokenizer(spec["pre_tokenizer"]),
    }


def _continue_normalizer(step: dict[str, Any] | None) -> dict[str, Any] | None:
    if step is None or step["type"] == "Prepend":
        return None
    if step["type"] == "Sequence":
        steps = [_continue_normalizer(s) for s in step["normalizers"]]
        return {**step, "normalizers": [s for s in steps if s is not None]}
    return step


def _continue_pre_tokenizer(step: dict[str, Any] | None) -> dict[str, Any] | None:
    if step is None:
        return None
    if step["type"] == "Metaspace":
        return {**step, "prepend_scheme": "never"}
    if step["type"] == "ByteLevel":
        return {**step, "add_prefix_space": False}
    if step["type"] == "Sequence":
        return {
            **step,
            "pretokenizers": [_continue_pre_tokenizer(s) for s in step["pretokenizers"]],
        }
    return step
