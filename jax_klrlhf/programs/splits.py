"""The data of a run: prepared in its folder or given so, and refused where it does not suit."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from jax_klrlhf import finished, models
from jax_klrlhf.columns import Columns
from jax_klrlhf.data import check as suits
from jax_klrlhf.data import prepare, statistics, tokenize
from jax_klrlhf.data.prepare import Prepared
from jax_klrlhf.errors import InputError
from jax_klrlhf.programs.config import TrainingConfig
from jax_klrlhf.programs.run import Run


class Splits(NamedTuple):
    """The data of a run."""

    train: Prepared
    held_out: Prepared | None
    encoder: tokenize.Encoder


def open_data(run: Run, loaded: models.Loaded, *, needs: Callable[[Prepared], None]) -> Splits:
    """The prepared data set: the one given, or one made in the run's folder.

    ``needs`` refuses data that the program cannot learn from: :func:`check.pairs` or
    :func:`check.responses`.

    Raises:
        InputError: naming file, line and column of what is wrong with the data.
    """
    config: TrainingConfig = run.config
    model, tokenizer = loaded.model, loaded.tokenizer
    if tokenizer is None:
        raise InputError(f"{config.model}: the folder has no tokenizer, which data need.")
    source = Path(config.data).expanduser()
    given = (source / "prepared.json").is_file()
    if given:
        train = prepare.load(source, "train")
        splits = {"train": train}
        if "test" in train.manifest["splits"]:
            splits["test"] = prepare.load(source, "test")
        recipe = train.manifest["recipe"]
        encoder = tokenize.encoder(tokenizer, control_tokens=recipe["control_tokens"])
        if recipe["tokenizer"] != encoder.fingerprint():
            raise InputError(
                f"{config.data}: prepared with the tokenizer of {train.manifest['tokenizer']}, "
                f"another than {config.model}'s; prepare it again."
            )
        names = (
            "max_prompt_length", "max_response_length", "control_tokens", "test_fraction", "split",
            "columns",
        )  # fmt: skip
        asked, fields = finished.plain(config), {f.name: f for f in dataclasses.fields(config)}
        usual = {name: fields[name].default for name in names}
        usual["columns"] = dataclasses.asdict(Columns())
        suits.options(train, {name: asked[name] for name in names}, usual)
    else:
        encoder = tokenize.encoder(tokenizer, control_tokens=config.control_tokens)
        splits = prepare.build(
            config.data,
            tokenizer,
            run.folder / "data",
            max_prompt_length=config.max_prompt_length,
            max_response_length=config.max_response_length,
            max_length=model.max_length,
            control_tokens=config.control_tokens,
            split=config.split,
            columns=config.columns,
            test_fraction=config.test_fraction,
            split_seed=config.seed,
        )
    for data in splits.values():
        needs(data)
        suits.context(data, max_length=model.max_length, model=config.model)
        suits.vocabulary(data, vocab_size=model.vocab_size, model=config.model)
    _say(run, splits, given=given, context=model.max_length)
    return Splits(splits["train"], splits.get("test"), encoder)


def _say(run: Run, splits: Mapping[str, Prepared], *, given: bool, context: int) -> None:
    """What the preparation cut, and what contradicts itself."""
    manifest = splits["train"].manifest
    cut = manifest["rows_with_cut"]["to the context"]
    lines = (
        [f"{cut} rows cut to the model's context of {context} tokens"] if cut and not given else []
    )
    for name, data in splits.items():
        count = statistics.describe_prepared(data).contradictions
        if count:
            lines.append(
                f"{name}: {count} of {len(data)} rows are contradicted by another row of their "
                "prompt, which prefers the other response"
            )
    for line in lines:
        run.console.print(line, highlight=False, markup=False)
