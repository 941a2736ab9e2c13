"""Training: one step for every loss, on one device or a mesh, with checkpoints and metrics."""

from jax_klrlhf.training import mesh, reference, state
from jax_klrlhf.training.state import TrainState
from jax_klrlhf.training.step import Batch, Info, make_step, make_train_step

__all__ = [
    "Batch",
    "Info",
    "TrainState",
    "make_step",
    "make_train_step",
    "mesh",
    "reference",
    "state",
]
