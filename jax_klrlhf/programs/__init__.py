"""Whole programs: from a configuration to a trained model and its results."""

from jax_klrlhf.programs.config import DpoConfig, RewardConfig, SftConfig
from jax_klrlhf.programs.train import dpo, reward, sft

__all__ = ["DpoConfig", "RewardConfig", "SftConfig", "dpo", "reward", "sft"]
