"""Configuration of ``klrlhf label``."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jax_klrlhf.columns import Columns
from jax_klrlhf.programs.options import Count, Number, Port, Seed, Share


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """A page on which people say which of two answers is better; every label is kept at once.

    klrlhf generate --models MODEL --prompts PROMPTS.txt --samples 8 --output answers.jsonl
    klrlhf label --answers answers.jsonl --output labels
    klrlhf dpo --model MODEL --data labels/labels.jsonl --output run

    or, for a run that asks people (klrlhf iterate --reward human --output run):

    klrlhf label --output run/labels
    """

    output: Path
    """Folder of the labels: labels.jsonl, a line each, which `klrlhf dpo --data` reads. Where it
    has labels already, they are gone on with."""
    answers: str | None = None
    """Prompts with several answers each: what `klrlhf generate` or `klrlhf eval` wrote, or
    preferences in the forms of `klrlhf dpo`, whose labels are not looked at. Without, people are
    asked of the pairs that a run has put in --output."""
    split: str | None = None
    """Split of --answers, where it has several."""
    columns: Columns = field(default_factory=Columns)
    """What its columns are called."""
    count: Count | None = None
    """The first so many prompts of --answers."""
    rule: str = "most-uncertain"
    """Which pairs of --answers are shown: most-uncertain under the ellipsoid of what was labelled,
    best-worst, best-second or best-random by what labels have taught, sampled (at random); or
    module:function of your own, a pair rule of jax_klrlhf.core.pairs."""
    model: str | None = None
    """Folder or hub id of a model whose hidden states are the features of answers; by default their
    words are, and no model is needed."""
    ridge: Number = 0.1
    """Of the fit and of the ellipsoid, as in `klrlhf iterate` (lambda)."""
    each: Count | None = None
    """People asked of each pair of --answers, 1 by default; a run says it itself."""
    repeats: Share = 0.1
    """Share of a person's answers that are to pairs shown a second time, sides exchanged, to see
    whether one agrees with oneself."""
    host: str = "127.0.0.1"
    """Address to listen on. Another than the loopback address is served with a token alone."""
    port: Port = 8765
    """0: any that is free."""
    token: Literal["auto", "always"] = "auto"
    """always: a token on the loopback address too, for a machine that others use."""
    seed: Seed = 0
    """Of sides and order."""
