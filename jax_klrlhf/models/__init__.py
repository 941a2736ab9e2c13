"""Language models as pure functions: loading, scoring, sampling."""

from jax_klrlhf.models.base import LanguageModel, Prefix
from jax_klrlhf.models.config import ModelConfig, Rope
from jax_klrlhf.models.foreign import from_flax
from jax_klrlhf.models.pretrained import Loaded, load, save
from jax_klrlhf.models.stopping import stop_tokens
from jax_klrlhf.models.transformer import language_model

__all__ = [
    "LanguageModel",
    "Loaded",
    "ModelConfig",
    "Prefix",
    "Rope",
    "from_flax",
    "language_model",
    "load",
    "save",
    "stop_tokens",
]
