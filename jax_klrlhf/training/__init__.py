"""Training: one step for every loss, on one device or a mesh, with checkpoints and metrics."""

from jax_klrlhf.models.batch import Batch, PackedBatch
from jax_klrlhf.training import (
    checkpoint,
    evaluate,
    health,
    loop,
    mesh,
    metrics,
    optimizers,
    reference,
    state,
    tasks,
)
from jax_klrlhf.training.state import TrainState
from jax_klrlhf.training.step import Info, TrainStep, make_step, make_train_step
from jax_klrlhf.training.tasks import Task

__all__ = [
    "Batch",
    "Info",
    "PackedBatch",
    "Task",
    "TrainState",
    "TrainStep",
    "checkpoint",
    "evaluate",
    "health",
    "loop",
    "make_step",
    "make_train_step",
    "mesh",
    "metrics",
    "optimizers",
    "reference",
    "state",
    "tasks",
]
