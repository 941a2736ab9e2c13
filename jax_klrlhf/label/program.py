"""``klrlhf label``: people compare answers on a local page; their labels are kept in a folder."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rich.console import Console

from jax_klrlhf import folders
from jax_klrlhf.core import pairs
from jax_klrlhf.core.pairs import PairRule
from jax_klrlhf.data.examples import Columns
from jax_klrlhf.data.labelling import LABELS
from jax_klrlhf.errors import InputError
from jax_klrlhf.label.pool import Pool, model_features
from jax_klrlhf.label.server import serve
from jax_klrlhf.label.session import Session, agreement
from jax_klrlhf.programs.config import check_seed, load_function, positive
from jax_klrlhf.results import output_folder

LOCK = ".label.lock"


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
    count: int | None = None
    """The first so many prompts of --answers."""
    rule: str = "most-uncertain"
    """Which pairs of --answers are shown: most-uncertain under the ellipsoid of what was labelled,
    best-worst, best-second or best-random by what labels have taught, sampled (at random); or
    module:function of your own, a pair rule of jax_klrlhf.core.pairs."""
    model: str | None = None
    """Folder or hub id of a model whose hidden states are the features of answers; by default their
    words are, and no model is needed."""
    ridge: float = 0.1
    """Of the fit and of the ellipsoid, as in `klrlhf iterate` (lambda)."""
    each: int | None = None
    """People asked of each pair of --answers, 1 by default; a run says it itself."""
    repeats: float = 0.1
    """Share of a person's answers that are to pairs shown a second time, sides exchanged, to see
    whether one agrees with oneself."""
    host: str = "127.0.0.1"
    """Address to listen on. Another than the loopback address is served with a token alone."""
    port: int = 8765
    """0: any that is free."""
    token: Literal["auto", "always"] = "auto"
    """always: a token on the loopback address too, for a machine that others use."""
    seed: int = 0
    """Of sides and order."""


RULES = {
    "most-uncertain": pairs.most_uncertain,
    "best-worst": pairs.otherwise(pairs.best_worst, pairs.sampled),
    "best-second": pairs.otherwise(pairs.best_second, pairs.sampled),
    "best-random": pairs.otherwise(pairs.best_random, pairs.sampled),
    "sampled": pairs.sampled,
}


def make_rule(name: str) -> PairRule:
    """The pair rule of a name. Raises ``InputError`` where there is none."""
    if ":" in name:
        return load_function(name, option="--rule")
    if name not in RULES:
        raise InputError(f"--rule {name!r}: there are {', '.join(RULES)}, and module:function.")
    return RULES[name]


def label(config: LabelConfig, *, console: Console | None = None) -> None:
    """Serve the page until Ctrl-C or SIGTERM.

    Raises:
        InputError: naming what is wrong with options, answers or folder.
    """
    for name in ("count", "ridge", "each"):
        positive(name, getattr(config, name))
    if not 0 <= config.repeats < 1:
        raise InputError(f"--repeats is {config.repeats}; it is a share in [0, 1).")
    if not 0 <= config.port < 2**16:
        raise InputError(f"--port is {config.port}; it is a number from 0 to 65535.")
    check_seed(config.seed)
    rule = make_rule(config.rule)
    if config.answers is None:
        for name in ("rule", "split", "columns", "count", "each"):
            if getattr(config, name) != getattr(LabelConfig(output=config.output), name):
                raise InputError(
                    f"--{name}: the pairs that wait in {config.output} are chosen already; it goes "
                    "with --answers."
                )
    console = console or Console()
    folder = output_folder(config.output)
    with folders.locked(folder, name=LOCK):
        features = None if config.model is None else model_features(config.model)
        pool = None
        if config.answers is not None:
            pool = Pool.read(
                config.answers,
                columns=config.columns,
                split=config.split,
                count=config.count,
                features=features,
            )
            said = f"{sum(map(len, pool.answers))} answers to {len(pool.prompts)} prompts"
            console.print(said, highlight=False)
        session = Session(
            folder,
            pool=pool,
            rule=rule,
            each=config.each or 1,
            repeats=config.repeats,
            ridge=config.ridge,
            features=features,
            seed=config.seed,
        )
        begun = len(session.labels.all)
        session.prepare()
        served = serve(session, host=config.host, port=config.port, token=config.token == "always")
        tell = lambda text: console.print(  # noqa: E731
            text, markup=False, highlight=False, soft_wrap=True
        )
        tell(f"label here: {served.url}")
        tell(f"{begun} labels in {folder / LABELS}; Ctrl-C ends, nothing is lost")
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            pass
        finally:
            served.close()
            session.close()
        tell(f"{len(session.labels.all) - begun} new labels, {len(session.labels.all)} in all")
        own = agreement(session.labels.all)["itself"]
        if own is not None:
            tell(
                f"agreement with oneself: {own['share']:.2f} [{own['low']:.2f}, {own['high']:.2f}] "
                f"of {own['count']} pairs shown again"
            )


__all__ = ["LabelConfig", "label"]
