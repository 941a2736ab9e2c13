"""Configuration of ``klrlhf data``."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jax_klrlhf.columns import Columns


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Prepare a preference data set and say what is in it, before any training."""

    data: str
    """File, folder, hub id, or tfds:name."""
    tokenizer: str
    """Folder or hub id of the model whose tokens count."""
    output: Path | None = None
    """Folder that keeps the prepared data; none: it is only described."""
    split: str | None = None
    """Split of the source, where it has several."""
    max_prompt_length: int = 512
    """Tokens; a longer prompt loses its beginning."""
    max_response_length: int = 512
    """Tokens; a longer response loses its end."""
    max_length: int | None = None
    """Tokens of prompt and response together; by default the context of the model, where
    --tokenizer is the folder of one."""
    control_tokens: bool = False
    """Read control tokens such as ``<|im_end|>`` in the data's text as such, not as words: for data
    that were put in a chat template before."""
    test_fraction: float = 0.0
    """Share of the prompts to hold out as the split `test`."""
    split_seed: int = 0
    """Another seed holds out other prompts."""
    columns: Columns = field(default_factory=Columns)
    """What the columns are called."""
    arrange: Literal["as_is", "best_worst", "all_pairs", "grouped"] = "as_is"
    """Ranked responses to pairs (best_worst, all_pairs), or pairs of one prompt to one row."""
