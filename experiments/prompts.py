"""Prompts of real stories: the first sentence of each, ready for a model to go on from."""

import re
from pathlib import Path

import numpy as np

from jax_klrlhf.errors import InputError

SEPARATOR = "<|endoftext|>"
_FIRST_SENTENCE = re.compile(r"^(.{20,200}?[.!?][\"”’']?)\s", re.DOTALL)


def first_sentences(path: str | Path) -> list[str]:
    """The distinct first sentences of the stories in a text file, in the order of the file.

    Stories are separated by ``<|endoftext|>``, or by blank lines in a file without separators. A
    sentence keeps one trailing space, because tokens of many tokenizers carry theirs.

    Raises:
        InputError: when the file is missing, is not text, or holds no sentence.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; --prompts takes a text file of stories.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); convert it.") from None
    stories = text.split(SEPARATOR) if SEPARATOR in text else re.split(r"\n\s*\n", text)
    found = (_FIRST_SENTENCE.match(" ".join(story.split()) + " ") for story in stories)
    prompts = list(dict.fromkeys(match[1] + " " for match in found if match))
    if not prompts:
        raise InputError(
            f"{path}: no sentence in it; put stories there, split by {SEPARATOR} or blank lines."
        )
    return prompts


def split(prompts: list[str], *, train: int, held_out: int, seed: int) -> tuple[list[str], ...]:
    """Two disjoint random lists of ``train`` and ``held_out`` prompts.

    Raises:
        InputError: when there are too few prompts.
    """
    if len(prompts) < train + held_out:
        raise InputError(
            f"{len(prompts)} prompts, but {train} + {held_out} are asked for: give more prompts or "
            "lower --train-prompts or --held-out-prompts."
        )
    order = np.random.default_rng(seed).permutation(len(prompts))
    chosen = [prompts[i] for i in order[: train + held_out]]
    return chosen[:train], chosen[train:]
