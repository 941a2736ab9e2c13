"""Whole programs: from a configuration to a trained model and its results.

What ``klrlhf dpo --model ... --data ... --output run`` does, from Python::

    from pathlib import Path
    from jax_klrlhf.programs import DpoConfig, dpo

    dpo(DpoConfig(model="path/to/model", data="pairs.jsonl", output=Path("run"), kl_coef=0.1))

Modules named ``..._config``, ``config`` and ``options`` import nothing heavy: ``--help`` reads them
alone.
"""

from typing import TYPE_CHECKING, Any

from jax_klrlhf.programs.config import DpoConfig, RewardConfig, SftConfig

if TYPE_CHECKING:
    from jax_klrlhf.programs.train import dpo, reward, sft

__all__ = ["DpoConfig", "RewardConfig", "SftConfig", "dpo", "reward", "sft"]


def __getattr__(name: str) -> Any:
    """The programs, with all that they import, when they are asked for."""
    if name in ("dpo", "reward", "sft"):
        from jax_klrlhf.programs import train

        return getattr(train, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
