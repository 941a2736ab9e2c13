"""Human preferences as a chat model reads them: dialogues, their tokens, who may learn of which.

Pairs are divided by prompt, once for all seeds: one half teaches the gold reward, the other the
proxy, and a third part judges both. Prompts of policies are the proxy's half's to learn on and the
third part's to be judged on, so nobody is judged on a prompt that anybody learned from.
"""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jax_klrlhf.core import sequence
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.data.sources import open_source
from jax_klrlhf.data.tokenize import Encoder
from jax_klrlhf.errors import InputError
from jax_klrlhf.training.rounds.parts import ragged

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}
PARTS = ("gold", "proxy", "judge")
_SHARES = (0.4, 0.4, 0.2)


class Pair(NamedTuple):
    """What one person preferred to what."""

    prompt: tuple[tuple[str, str], ...]
    """Turns: (role, content)."""
    chosen: str
    rejected: str


class Tokens(NamedTuple):
    """Pairs as rows of one width; the preferred response is the first."""

    prompts: Ragged
    """ids ``[N, P]``."""
    responses: Ragged
    """ids ``[N, 2, C]``."""


def turns(text: str) -> tuple[tuple[str, str], ...]:
    r"""A prompt as turns of a chat; one without ``\n\nHuman:`` is one message of the user.

    >>> turns("\n\nHuman: Hello\n\nAssistant: Hi.\n\nHuman: A joke?\n\nAssistant:")
    (('user', 'Hello'), ('assistant', 'Hi.'), ('user', 'A joke?'))
    """
    parts = _TURN.split(text)
    if len(parts) == 1:
        return (("user", text.strip().removesuffix("Answer:").strip()),)
    both = zip(parts[1::2], parts[2::2], strict=True)
    return tuple((_ROLES[who], said.strip()) for who, said in both if said.strip())


def read(path: Path) -> list[Pair]:
    """Every pair of a file with text columns prompt, chosen and rejected.

    Raises:
        InputError: naming the line where a column is missing or is no text.
    """
    found = []
    for where, record in open_source(str(path)).records():
        for key in ("prompt", "chosen", "rejected"):
            if not isinstance(record.get(key), str):
                raise InputError(f"{where}, column {key!r}: expected text, not {record.get(key)!r}")
        pair = Pair(turns(record["prompt"]), record["chosen"].strip(), record["rejected"].strip())
        if pair.chosen and pair.rejected and pair.chosen != pair.rejected and pair.prompt:
            found.append(pair)
    return found


def prompt_ids(encoder: Encoder, prompt: tuple[tuple[str, str], ...]) -> list[int]:
    """By the chat template, where there is one; else the turns one after the other."""
    if encoder.tokenizer.chat_template:
        return encoder.chat_prompt([{"role": role, "content": text} for role, text in prompt])
    return encoder.prompt("\n".join(text for _, text in prompt) + "\n")


def words(prompt: tuple[tuple[str, str], ...]) -> str:
    """A prompt for people to read."""
    return prompt[0][1] if len(prompt) == 1 else "\n".join(f"{r}: {t}" for r, t in prompt)


def short(encoder: Encoder, pairs: Sequence[Pair], *, prompt: int, response: int) -> list[Pair]:
    """Those whose prompt and both responses have so many tokens at most."""
    kept = []
    for pair in pairs:
        texts = (pair.chosen, pair.rejected)
        if len(prompt_ids(encoder, pair.prompt)) <= prompt and all(
            len(encoder.response(text)) <= response for text in texts
        ):
            kept.append(pair)
    return kept


def divide(pairs: Sequence[Pair]) -> dict[str, list[Pair]]:
    """By a hash of the prompt: each prompt is in one part, wherever the file has it."""
    found: dict[str, list[Pair]] = {part: [] for part in PARTS}
    for pair in pairs:
        digest = hashlib.sha256(repr(pair.prompt).encode()).digest()[:8]
        draw = int.from_bytes(digest, "big") / 2**64
        part = int(np.searchsorted(np.cumsum(_SHARES), draw, side="right"))
        found[PARTS[min(part, len(PARTS) - 1)]].append(pair)
    return found


def tokens(encoder: Encoder, pairs: Sequence[Pair], *, prompt: int, response: int) -> Tokens:
    """Pairs as rows of the widths given."""
    answers = [encoder.response(text) for p in pairs for text in (p.chosen, p.rejected)]
    ids, lengths = sequence.pad(answers, length=response, pad_id=0)
    responses = ragged(np.asarray(ids).reshape(-1, 2, response), np.asarray(lengths).reshape(-1, 2))
    return Tokens(asked(encoder, [p.prompt for p in pairs], width=prompt), responses)


def asked(
    encoder: Encoder, prompts: Sequence[tuple[tuple[str, str], ...]], *, width: int
) -> Ragged:
    """Prompts ``[N, width]``."""
    return ragged(*sequence.pad([prompt_ids(encoder, p) for p in prompts], length=width, pad_id=0))
