"""``klrlhf label``: people compare answers on a local page; their labels are kept in a folder."""

import time

from rich.console import Console

from jax_klrlhf import folders
from jax_klrlhf.core import pairs
from jax_klrlhf.core.pairs import PairRule
from jax_klrlhf.errors import InputError
from jax_klrlhf.label.pool import Pool, model_features
from jax_klrlhf.label.server import serve
from jax_klrlhf.label.session import Session, agreement
from jax_klrlhf.labelling import LABELS
from jax_klrlhf.programs import options
from jax_klrlhf.programs.label_config import LabelConfig
from jax_klrlhf.programs.losses import load_function
from jax_klrlhf.results import output_folder

LOCK = ".label.lock"


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
    options.check(config)
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
