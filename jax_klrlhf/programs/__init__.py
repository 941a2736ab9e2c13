"""Whole programs: from a configuration to a trained model and its results.

What ``klrlhf dpo --model ... --data ... --output run`` does, from Python::

    from pathlib import Path
    from jax_klrlhf.programs import DpoConfig, dpo

    dpo(DpoConfig(model="path/to/model", data="pairs.jsonl", output=Path("run"), kl_coef=0.1))
"""

from jax_klrlhf.programs.config import DpoConfig, RewardConfig, SftConfig
from jax_klrlhf.programs.train import dpo, reward, sft

__all__ = ["DpoConfig", "RewardConfig", "SftConfig", "dpo", "reward", "sft"]
