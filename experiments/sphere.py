"""The bandit that most studies play on: :func:`jax_klrlhf.bandit.sphere` at a study's own sizes."""

from typing import Any

from jaxtyping import Array, Key

from jax_klrlhf import bandit

SIZES = ("contexts", "actions", "dim", "hidden", "coverage", "bound", "kl_coef")


def problem(key: Key[Array, ""], config: Any, **swept: Any) -> bandit.Problem:
    """The problem of this key; ``swept`` stands for what is not the configuration's own."""
    own = {name: getattr(config, name) for name in SIZES if name not in swept}
    return bandit.sphere(key, **own, **swept)
