"""Fitting parameters to comparisons: batches that hold each source's share, and the training loop.

Batch number t is a function of the key and t alone, so a fit that is killed and started again sees
the same batches.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from rich.console import Console

from jax_klrlhf import placement
from jax_klrlhf.models.batch import Batch
from jax_klrlhf.results import Metric
from jax_klrlhf.training import evaluate, health, loop, step
from jax_klrlhf.training import mesh as meshes
from jax_klrlhf.training import state as states
from jax_klrlhf.training.checkpoint import Checkpoints
from jax_klrlhf.training.metrics import Metrics
from jax_klrlhf.training.rounds.compute import mapped, narrowed
from jax_klrlhf.training.rounds.parts import Comparisons, Mixture, widen
from jax_klrlhf.training.state import TrainState
from jax_klrlhf.training.tasks import Task


class Fitted(NamedTuple):
    """What a fit comes to."""

    params: Any
    metrics: Metrics


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """How parameters are fitted: the optimizer and its steps, on one device or a mesh."""

    optimizer: optax.GradientTransformation
    """Schedules and clipping included; it begins anew with every fit."""
    steps: int
    batch_size: int
    """Comparisons in a step."""
    micro_batches: int = 1
    compute_dtype: Any = None
    trainable: Callable[[str], bool] | None = None
    """Which parameters are trained, by path (:func:`.state.path_name`); all by default."""
    mesh: Mesh | None = None
    shardings: Any = None
    """Of the parameters, where there is a mesh (:func:`models.partition.shardings`)."""
    save_every: int | None = None
    """Steps between checkpoints inside a fit that has a folder; without, one that is killed or
    asked to end begins again."""
    limits: health.Limits | None = None
    """Of the health checks, and of updates that may be skipped in a row."""
    log_every: int = 50
    evaluate_every: int | None = None
    evaluate: Callable[[TrainState], Metrics] | None = None
    """Metrics of the policy along the fit and at its end."""
    held_out: float = 0.0
    """Share of the prompts whose rows are not learned from. A fit then ends with ``loss/held_out``,
    their loss at the fitted parameters, each row once, and its standard error over rows; a source
    counts by its share. To choose a learning rate by: the loss of the rows that are learned from
    falls with the rate, whether anything is learned or only remembered."""
    console: Console = field(default_factory=lambda: Console(quiet=True))
    _shared: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise ValueError(
                f"steps and batch_size must be at least 1, got {self.steps}, {self.batch_size}"
            )
        if (self.mesh is None) != (self.shardings is None):
            raise ValueError("mesh and the parameters' shardings go together: give both or none.")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out is a share of the prompts, in [0, 1): got {self.held_out}")

    def shared(self, key: Any, make: Callable[[], Any]) -> Any:
        """What ``make()`` returned when this fitting was first asked for ``key`` (hashable).

        Improvements that are made of one ``Fitting`` share their compiled programs by it.
        """
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def begin(self, task: Task) -> Callable[..., tuple[step.TrainStep, TrainState]]:
        """``begin(key, params, *, pi0=None) -> (step, state)``: a fresh optimizer on ``params``.

        The step is compiled once for all that begin. ``pi0`` are the parameters of the reference,
        whose fingerprint the state carries.
        """
        compiled: list[step.TrainStep] = []

        def begin(key: Any, params: Any, *, pi0: Any = None) -> tuple[step.TrainStep, TrainState]:
            mark = None if pi0 is None else states.digest(pi0)
            if self.mesh is None:
                carried = states.init(
                    key, params, self.optimizer, trainable=self.trainable, fingerprint=mark
                )
                laid = None
            else:
                carried, laid = meshes.init(
                    key, params, self.optimizer, shardings=self.shardings,
                    trainable=self.trainable, fingerprint=mark,
                )  # fmt: skip
            if not compiled:
                compiled.append(
                    step.make_step(
                        task,
                        self.optimizer,
                        micro_batches=self.micro_batches,
                        compute_dtype=self.compute_dtype,
                        shardings=laid,
                    )
                )
            return compiled[0], carried

        return begin

    def compile(self, task: Task) -> Callable[..., Fitted]:
        """``fit(key, params, mixture, *, pi0=None, folder=None) -> Fitted`` for one task.

        The step is compiled once for all rounds in which the batches have the same shape.
        ``pi0`` are the parameters of the reference, whose fingerprint the state carries.
        """
        begin = self.begin(task)
        measure = self._loss(task) if self.held_out else None

        def fit(
            key: Any,
            params: Any,
            mixture: "Mixture | Deal",
            *,
            pi0: Any = None,
            folder: Path | None = None,
        ) -> Fitted:
            key_state, key_data = jax.random.split(key)
            compiled, carried = begin(key_state, params, pi0=pi0)
            deal = mixture if isinstance(mixture, Deal) else comparisons_deal(mixture)
            learned, kept = deal, None
            if self.held_out:
                learned, kept = deal.split(key_data, self.held_out)
            stream = learned.stream(key_data, batch_size=self.batch_size, mesh=self.mesh)
            store, log = None, None
            if folder is not None and self.save_every is not None:
                store = Checkpoints(folder)
                carried, log = loop.resume(store, carried, stream, console=self.console)
            try:
                outcome = loop.train(
                    compiled,
                    carried,
                    stream,
                    steps=self.steps,
                    names=task.names,
                    log_every=self.log_every,
                    save_every=self.save_every,
                    save_last=False,  # the result is about to be written anyway
                    evaluate_every=self.evaluate_every,
                    evaluate=self.evaluate,
                    checkpoints=store,
                    limits=self.limits,
                    log=log,
                    console=self.console,
                )
            finally:
                if store is not None:
                    store.close()
            params, metrics = outcome.state.policy, outcome.metrics
            if measure is not None and kept is not None:
                metrics = {**metrics, "loss/held_out": measure(params, kept)}
            return Fitted(params, metrics)

        return fit

    def _loss(self, task: Task) -> Callable[[Any, "Deal"], Metric]:
        def score(params: Any, rows: Any) -> Any:
            losses, _, weights = step.per_row(
                task, params, None, rows, compute_dtype=self.compute_dtype
            )
            return losses, weights

        rows = max(1, self.batch_size // self.micro_batches)
        program = mapped(score, rows=rows, mesh=self.mesh)

        def measured(params: Any, deal: Deal) -> Metric:
            losses, weights = program(params, deal.rows)
            return evaluate.weighted(losses, weights * deal.weights())

        return measured


class Deal(NamedTuple):
    """Rows to train on, in groups: every batch gives each group its share."""

    rows: Batch
    """All rows, the groups one after the other; or another record whose arrays have the rows first
    (:mod:`.coefficient`)."""
    sizes: Sequence[int]
    """Rows of each group."""
    shares: Sequence[float] | None
    """None: all rows are one group."""

    def weights(self) -> np.ndarray:
        """How often a row is met, relative to the others; rounding of a batch's parts aside."""
        if self.shares is None:
            return np.ones(sum(self.sizes))
        each = [share / max(size, 1) for share, size in zip(self.shares, self.sizes, strict=True)]
        return np.repeat(each, self.sizes)

    def split(self, key: Any, share: float) -> "tuple[Deal, Deal]":
        """All but ``share`` of the prompts, with their rows, and the others; the same for a key.

        Raises:
            ValueError: where the prompts are too few for either to have one.
        """
        prompts = self.rows.prompts
        lengths = np.asarray(prompts.lengths)
        true = np.where(np.arange(prompts.ids.shape[-1]) < lengths[:, None], prompts.ids, -1)
        _, which = np.unique(np.column_stack([lengths, true]), axis=0, return_inverse=True)
        count = which.max() + 1
        apart = round(share * count)
        if not 0 < apart < count:
            raise ValueError(
                f"held_out={share:g} of {count} prompts leaves none on one side: give more prompts."
            )
        order = np.random.default_rng([*_seed(key), 1]).permutation(count)
        held = np.isin(which.ravel(), order[:apart])
        groups = np.repeat(np.arange(len(self.sizes)), self.sizes)

        def part(at: np.ndarray) -> Deal:
            sizes = np.bincount(groups[at], minlength=len(self.sizes)).tolist()
            return Deal(jax.tree.map(lambda x: x[at], self.rows), sizes, self.shares)

        return part(~held), part(held)

    def stream(self, key: Any, *, batch_size: int, mesh: Mesh | None = None) -> "Stream":
        """Batches without end, of each this process's rows."""
        return Stream(self, key, batch_size=batch_size, mesh=mesh)


def comparisons_deal(mixture: Mixture) -> Deal:
    """The rows of a mixture of comparisons, widened to the longest."""
    return deal([batch_of(source) for source in mixture.sources], mixture.shares)


def batch_of(data: Comparisons) -> Batch:
    """Comparisons as rows to train on, on the host."""
    return Batch(
        data.prompts,
        data.responses,
        weight=data.weight,  # pyright: ignore[reportArgumentType]  # NumPy: on the host
        label=data.label,  # pyright: ignore[reportArgumentType]
    )


def deal(groups: Sequence[Batch], shares: Sequence[float] | None = None) -> Deal:
    """Groups of rows, those without weight left out.

    Raises:
        ValueError: where no row is left, or shares are not one number for each group.
    """
    if shares is not None and (len(shares) != len(groups) or min(shares, default=0) < 0):
        raise ValueError(f"{len(groups)} sources need as many shares, at least 0: got {shares}")
    kept = [jax.tree.map(lambda x, at=g.weight > 0: np.asarray(x)[at], g) for g in groups]
    sizes = [len(group.weight) for group in kept]
    if sum(sizes) == 0:
        raise ValueError(
            "no comparison to learn from: every pair was invalid or without a label; draw more "
            "samples, or prompts whose responses differ."
        )
    prompt, response = (
        max(getattr(group, name).ids.shape[-1] for group in kept)
        for name in ("prompts", "responses")
    )
    wide = [
        g._replace(prompts=widen(g.prompts, prompt), responses=widen(g.responses, response))
        for g in kept
    ]
    rows = jax.tree.map(lambda *x: np.concatenate(x), *wide)
    return Deal(rows, sizes, shares)


class Stream:
    """Batches of a :class:`Deal`, each a function of its number (:class:`.loop.Batches`)."""

    def __init__(self, deal: Deal, key: Any, *, batch_size: int, mesh: Mesh | None = None):
        sizes, shares = list(deal.sizes), deal.shares
        if shares is None:
            sizes, shares = [sum(sizes)], [1.0]
        shares = np.where(np.array(sizes) > 0, np.asarray(shares, np.float64), 0.0)
        if not shares.sum() > 0:
            raise ValueError("every source that has rows was given the share 0.")
        self._rows, self._sizes, self._mesh = deal.rows, sizes, mesh
        self._starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(int)
        self._counts = _apportion(shares / shares.sum(), batch_size)
        self._seed = _seed(key)
        self._next = 0
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def __next__(self) -> Any:
        """This process's part of the next batch: what the deal's rows are, fewer of them."""
        picked = np.concatenate(
            [self._rows_of(group, count) for group, count in enumerate(self._counts)]
        )
        self._next += 1
        own = placement.own_rows(self._mesh, len(picked))
        # As wide as the longest of the whole batch, which every process knows.
        batch = narrowed(jax.tree.map(lambda x: x[picked], self._rows))
        return jax.tree.map(lambda x: x[own], batch)

    def state(self) -> int:
        """Batches given so far."""
        return self._next

    def restore(self, state: int) -> None:
        """Go on after ``state`` batches."""
        self._next = state

    def _rows_of(self, group: int, count: int) -> np.ndarray:
        """``count`` rows of a group: its permutations one after the other, cut into batches."""
        if not count:
            return np.zeros(0, int)
        place = self._next * count + np.arange(count)
        epoch, within = np.divmod(place, self._sizes[group])
        return self._starts[group] + np.array(
            [self._order(group, int(e))[w] for e, w in zip(epoch, within, strict=True)]
        )

    def _order(self, group: int, epoch: int) -> np.ndarray:
        if (group, epoch) not in self._orders:
            # Old epochs are not asked for again.
            self._orders = {at: o for at, o in self._orders.items() if at[1] >= epoch - 1}
            order = np.random.default_rng([*self._seed, group, epoch])
            self._orders[group, epoch] = order.permutation(self._sizes[group])
        return self._orders[group, epoch]


def _seed(key: Any) -> list[int]:
    return np.asarray(jax.random.key_data(key)).ravel().tolist()


def _apportion(shares: np.ndarray, total: int) -> list[int]:
    """Whole numbers that sum to ``total``, nearest the shares (largest remainders)."""
    exact = shares * total
    counts = np.floor(exact).astype(int)
    left = total - counts.sum()
    counts[np.argsort(counts - exact, kind="stable")[:left]] += 1
    return counts.tolist()
