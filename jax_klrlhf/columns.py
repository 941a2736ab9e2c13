"""What the columns of a data source are called. Nothing heavy is imported here."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Columns:
    """What the columns of a source are called."""

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    response: str = "response"
    responses: str = "responses"
    scores: str = "scores"
    ranks: str = "ranks"
    label: str = "label"
    weight: str = "weight"
