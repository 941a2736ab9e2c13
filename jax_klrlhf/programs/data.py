"""``klrlhf data``: prepare a preference data set, and say what is in it."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from jax_klrlhf.data import arrange, prepare, statistics, tokenize
from jax_klrlhf.data.prepare import Prepared
from jax_klrlhf.programs.data_config import DataConfig


def data(config: DataConfig, *, console: Console | None = None) -> dict[str, Prepared] | None:
    """Prepare, and print the table. Returns the splits where they were kept."""
    tokenizer = tokenize.load(config.tokenizer)
    with TemporaryDirectory() as temporary:
        splits = prepare.build(
            config.data,
            tokenizer,
            config.output or Path(temporary) / "prepared",
            max_prompt_length=config.max_prompt_length,
            max_response_length=config.max_response_length,
            max_length=config.max_length or _context(config.tokenizer),
            control_tokens=config.control_tokens,
            split=config.split,
            columns=config.columns,
            arrange=getattr(arrange, config.arrange),
            test_fraction=config.test_fraction,
            split_seed=config.split_seed,
        )
        (console or Console()).print(statistics.table(splits))
    return None if config.output is None else splits


def _context(model: str) -> int | None:
    """Context of the model in a folder, None where the folder does not say."""
    path = Path(model).expanduser() / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        lengths = [found.get(name) for name in ("max_position_embeddings", "n_positions")]
    except (OSError, ValueError, AttributeError):
        return None
    return next((length for length in lengths if isinstance(length, int) and length > 1), None)


__all__ = ["DataConfig", "data"]
