"""This library on the job's pairs: ``training.loop.train`` over batches collated as they come.

``without`` names what is switched off, for the breakdown: ``cache`` (the reference is scored in
each step), ``packing`` (the same batches, padded to their rectangle), ``buckets`` (every row padded
to the two lengths), ``sharing`` (each response reads its own copy of the prompt), ``projection``
(that, and the logits of every position at once, prompts included), ``blocks`` (attention as one
masked product), ``remat`` (all activations kept). The middle three need ``packing`` off too.
``devices`` CPU devices divide each layer's matrices, ``tensor`` of the mesh: the same batches.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from experiments.benchmarks.dpo_peers.serve import Contender, serve
from jax_klrlhf import models
from jax_klrlhf.core import objectives, sequence
from jax_klrlhf.core.objectives import Scores
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.data.batch import collate
from jax_klrlhf.data.buckets import Shape
from jax_klrlhf.data.packing import Layout, collate_streams
from jax_klrlhf.data.rows import Row
from jax_klrlhf.models import attention, partition, scoring
from jax_klrlhf.programs.batches import packed as as_packed
from jax_klrlhf.programs.batches import pairs as as_pairs
from jax_klrlhf.training import loop, make_step, optimizers, reference, state, tasks
from jax_klrlhf.training import mesh as meshes

REMAT = "full"
"""The least memory, and on CPU no slower than keeping activations, which are slow to write."""
WHOLE = 2**30
"""A chunk or block that holds everything."""


class Collated:
    """Batches collated when they are asked for, in order, again and again."""

    def __init__(
        self,
        rows: Sequence[Row],
        batches: Sequence[tuple[Layout, list[int]]],
        table: Any,
        pack: bool,
    ):
        self._rows, self._batches, self._table, self._pack = rows, batches, table, pack
        self._next = 0

    def __next__(self) -> Any:
        """The next batch."""
        layout, held = self._batches[self._next % len(self._batches)]
        self._next += 1
        if not self._pack:
            return as_pairs(collated(self._rows, layout, held), self._table)
        absent = [-1] * (layout.groups[0].rows - len(held))
        streams = collate_streams(
            lambda numbers: [self._rows[n] for n in numbers],
            layout,
            np.array([held + absent]),
            responses=2,
            stand_in=held[0],
        )
        return as_packed(streams, self._table)

    def state(self) -> int:
        """Batches given so far."""
        return self._next

    def restore(self, state: int) -> None:
        """Go on after ``state`` batches."""
        self._next = state


def collated(rows: Sequence[Row], layout: Layout, held: list[int]) -> Any:
    """The rows held, and copies of the first of them at weight 0, as one padded data batch."""
    (shape,) = layout.groups
    numbers = np.array(held + [held[0]] * (shape.rows - len(held)), np.int32)
    weight = (np.arange(shape.rows) < len(held)).astype(np.float32)
    return collate([rows[n] for n in numbers], shape, numbers=numbers, weight=weight)


def make(job: dict[str, Any]) -> Contender:
    """The training of a job."""
    without = set(job["without"])
    if "blocks" in without:
        attention.CHUNK = WHOLE
    mesh = meshes.make(tensor=job["devices"]) if job["devices"] > 1 else None
    loaded = models.load(job["model"], mesh=mesh, remat=None if "remat" in without else REMAT)
    score = {"sharing": unshared, "projection": everywhere}
    switched = [score[name] for name in ("projection", "sharing") if name in without]
    pack = "packing" not in without
    kl_coef = job["kl_coef"]

    def log_prob(params: Any, batch: Any) -> jax.Array:
        if switched:
            return switched[0](loaded.model, params, batch.prompts, batch.responses)
        return tasks.log_prob(loaded.model, params, batch)

    def scores(params: Any, ref_params: Any, batch: Any) -> tasks.Preference:
        ours = log_prob(params, batch)
        if "cache" in without:
            theirs = jax.lax.stop_gradient(log_prob(ref_params, batch))
        else:
            theirs = batch.ref_log_prob
        return tasks.Preference(Scores(ours, theirs, batch.responses.lengths), batch.label)

    def sigmoid(given: Scores) -> jax.Array:
        return objectives.sigmoid(given, kl_coef=kl_coef)

    optimizer = optimizers.adamw(job["learning_rate"])
    task = tasks.preference(loaded.model, sigmoid, report_coef=kl_coef)
    live = "cache" in without
    key, ref_params = jax.random.key(0), loaded.params if live else None

    def fresh() -> tuple[state.TrainState, Any]:
        if mesh is None:
            return state.init(key, loaded.params, optimizer, ref_params=ref_params), None
        placed = partition.shardings(loaded.params, mesh)
        return meshes.init(key, loaded.params, optimizer, shardings=placed, ref_params=ref_params)

    step = make_step(dataclasses.replace(task, score=scores), optimizer, shardings=fresh()[1])

    def begin(data: Sequence[Row], batches: Any) -> tuple[Any, Collated]:
        table = None
        if not live:
            table = reference.tabulate(
                loaded.model,
                loaded.params,
                (collated(data, layout, held) for layout, held in batches),
                rows=len(data),
                responses=2,
                mesh=mesh,
            )
        return fresh()[0], Collated(data, batches, table, pack)

    def check() -> list[float]:
        data = rows_of(job["check"])
        batches = fixed(data, job["batch_size"], multiple=8)
        carried, feed = begin(data, batches)
        losses = []
        for _ in batches:
            carried, info = step(carried, next(feed))
            losses.append(float(info.loss.total / info.loss.weight))
        return losses

    data = rows_of(job["pairs"])
    if "buckets" in without:
        batches = fixed(data, job["batch_size"], lengths=job["lengths"])
    else:
        batches = [(read(layout), list(held)) for layout, held in job["batches"]]
    carried: list[Any] = []

    def turn() -> None:
        if not carried:
            carried.extend(begin(data, batches))
        outcome = loop.train(
            step,
            carried[0],
            carried[1],
            steps=int(carried[0].step) + len(batches),
            names=task.names,
            console=Console(quiet=True),
        )
        carried[0] = outcome.state

    copied = bool(without & {"sharing", "projection"})

    def slots(layout: Layout) -> int:
        (shape,) = layout.groups
        padded = shape.rows * (shape.prompt * (2 if copied else 1) + 2 * shape.response)
        return layout.tokens if pack else padded

    return Contender(check, turn, sum(slots(layout) for layout, _ in batches))


def read(layout: Sequence[Any]) -> Layout:
    """A layout of one stream from the job: its rectangle, tokens and response tokens."""
    shape, tokens, answers = layout
    return Layout((Shape(*shape),), tokens, answers, streams=1, epoch=1)


def rows_of(pairs: Sequence[Sequence[list[int]]]) -> list[Row]:
    """Rows of the data half from the job's token ids."""
    return [
        Row(prompt, [chosen, rejected], [1.0, 0.0], 1.0, 1.0, number)
        for number, (prompt, chosen, rejected) in enumerate(pairs)
    ]


def fixed(
    data: Sequence[Row], size: int, *, lengths: Sequence[int] | None = None, multiple: int = 1
) -> list[tuple[Layout, list[int]]]:
    """Batches of ``size`` rows in order, all of one shape: ``lengths``, or what holds all rows."""
    if lengths is None:
        prompt = max(len(row.prompt) for row in data)
        response = max(len(response) for row in data for response in row.responses)
        lengths = [-(-n // multiple) * multiple for n in (prompt, response)]
    batches = [list(range(at, min(at + size, len(data)))) for at in range(0, len(data), size)]
    answers = [sum(len(r) for n in held for r in data[n].responses) for held in batches]
    prompts = [sum(len(data[n].prompt) for n in held) for held in batches]
    tokens = max(p + a for p, a in zip(prompts, answers, strict=True))
    layout = read([(size, lengths[0], 2, lengths[1]), tokens, max(answers)])
    return [(layout, held) for held in batches]


def unshared(
    model: Any, params: Any, prompts: Ragged, responses: Ragged, *, chunk: int = scoring.CHUNK
) -> jax.Array:
    """Log-probabilities ``[B, 2]`` with each prompt read once for each of its responses."""
    batch, count, length = responses.ids.shape
    found = scoring.log_prob(
        model,
        params,
        Ragged(jnp.repeat(prompts.ids, count, 0), jnp.repeat(prompts.lengths, count)),
        Ragged(
            responses.ids.reshape(batch * count, 1, length),
            responses.lengths.reshape(batch * count, 1),
        ),
        chunk=chunk,
    )
    return found.reshape(batch, count)


def everywhere(model: Any, params: Any, prompts: Ragged, responses: Ragged) -> jax.Array:
    """The same from whole rows, prompt and response one text, and logits at all positions.

    The prompt's first token stands for the prompt, and all that follows for the response.
    """
    batch, count, length = responses.ids.shape
    width = prompts.ids.shape[1]
    prompt = jnp.repeat(prompts.ids, count, 0)
    begin = jnp.repeat(prompts.lengths, count)
    end = begin + responses.lengths.reshape(-1)
    place = jnp.broadcast_to(
        jnp.arange(1, width + length, dtype=jnp.int32), (batch * count, width + length - 1)
    )
    answers = responses.ids.reshape(batch * count, length)
    asked = jnp.take_along_axis(prompt, jnp.minimum(place, width - 1), 1)
    index = jnp.clip(place - begin[:, None], 0, length - 1)
    ids = jnp.where(place < begin[:, None], asked, jnp.take_along_axis(answers, index, 1))
    per_token = scoring.token_log_prob(
        model,
        params,
        Ragged(prompt[:, :1], jnp.ones_like(begin)),
        Ragged(ids[:, None], (end - 1)[:, None]),
        chunk=WHOLE,
    )[:, 0]
    answered = (place >= begin[:, None]) & (place < end[:, None])
    return sequence.sum_log_prob(per_token, where=answered).reshape(batch, count)


if __name__ == "__main__":
    serve(make)
