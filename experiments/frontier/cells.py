"""Cells: one method at one coefficient and seed, run, judged, and left on disk.

A cell's file names what it was made of; one made of something else is refused, never used. While a
cell runs, its rounds leave their phases in a folder beside it (:mod:`rounds.journal`), so a killed
run goes on in the middle of a cell.
"""

import itertools
import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.frontier import evaluate, methods
from experiments.frontier import world as worlds
from experiments.frontier.evaluate import Judged, Measure
from experiments.frontier.methods import METHODS, Cell, Parts
from jax_klrlhf.core import pairs
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.errors import InputError
from jax_klrlhf.results import Metric, write_json
from jax_klrlhf.training import rounds
from jax_klrlhf.training.rounds.parts import Comparisons, Policies, join

PI0, BEST_OF = "pi0", "best-of-n"
PILOT = 10**6
"""The seed that learning rates are chosen on, and no policy is judged by."""


class Name(NamedTuple):
    """Which cell: ``coefficient`` is kl_coef, or n of best-of-n, or 0 of pi0."""

    method: str
    coefficient: float
    seed: int

    @property
    def stem(self) -> str:
        """Of its file."""
        return f"{self.method.replace(' ', '-').replace(',', '')}_{self.coefficient:g}_{self.seed}"


class Found(NamedTuple):
    """What a cell came to."""

    held_out: Judged
    ood: Judged
    rounds: list[dict[str, Metric]]
    """What each round reported."""
    agreement: float
    """Of proxy and gold among pi0's responses to held-out prompts."""
    seconds: float
    rate: float | None
    """Learning rate; None where nothing was fitted."""


class Seed:
    """What all methods of a seed share, made when it is first asked for."""

    def __init__(
        self,
        place: worlds.Place,
        parts: Parts,
        draw: rounds.Draw,
        pair_draw: rounds.Draw,
        *,
        train: int,
        held_out: int,
        labels: int,
        seed: int,
    ):
        self.split = worlds.split(place, train=train, held_out=held_out, seed=seed)
        self.key = jax.random.fold_in(jax.random.key(20), seed)
        self._place, self._parts, self._labels = place, parts, labels
        self._draw, self._pair_draw = draw, pair_draw

    @cached_property
    def offline(self) -> Comparisons:
        """The label budget spent on random pairs of pi0's responses, labelled by gold."""
        key, found, count, number = jax.random.fold_in(self.key, 1), [], 0, 0
        train = len(self.split.train.lengths)
        prompts = methods.portions(self.split.train, min(self._labels, train))(1)
        while count < self._labels:
            found.append(
                rounds.collect(
                    jax.random.fold_in(key, number),
                    self._parts.pi0,
                    prompts=prompts,
                    sampler=rounds.main_agent(self._pair_draw),
                    reward=rounds.known(_nothing),
                    pair_rule=pairs.sampled,
                    oracle=self._parts.oracle,
                )
            )
            count, number = count + len(found[-1].weight), number + 1
        return jax.tree.map(lambda x: x[: self._labels], join(found))

    @cached_property
    def base(self) -> tuple[Ragged, Ragged]:
        """pi0's responses to held-out and to out-of-distribution prompts."""
        draw, params = self._draw, self._parts.pi0
        key = jax.random.fold_in(self.key, 2)
        held_out = draw(jax.random.fold_in(key, 0), params, self.split.held_out)
        return held_out, draw(jax.random.fold_in(key, 1), params, self.split.ood)

    @cached_property
    def offline_score(self) -> evaluate.Score:
        """The proxy of the offline labels."""
        pi0, reward = self._parts.pi0, self._parts.reward
        hand = Policies(pi0, pi0, pi0, (pi0,))
        belief = reward.fit(jax.random.fold_in(self.key, 3), reward.init, [self.offline], hand)
        return lambda prompts, responses: reward.score(belief, hand, prompts, responses)


class Lab:
    """Runs cells."""

    def __init__(
        self,
        place: worlds.Place,
        parts: Mapping[float, Parts],
        measure: Measure,
        draw: rounds.Draw,
        seed: Callable[[int], Seed],
        *,
        sweeps: Mapping[str, Sequence[float]],
        output: Path,
        identity: Any,
    ):
        self._place, self._measure, self._draw = place, measure, draw
        self._at_rate, self._sweeps = parts, sweeps
        self._parts = next(iter(parts.values()))
        self._make_seed, self._seeds = seed, {}
        self._folder, self._identity = output / "cells", json.loads(json.dumps(identity))
        self._folder.mkdir(parents=True, exist_ok=True)

    def read(self, name: Name) -> Found | None:
        """The cell on disk, or None.

        Raises:
            InputError: where it was made of something else, or is no cell.
        """
        return self._read(self._folder / f"{name.stem}.json", _restored)

    def _read(self, path: Path, restore: Callable[[dict[str, Any]], Any]) -> Any:
        if not path.exists():
            return None
        try:
            there = json.loads(path.read_text())
            made_of, found = there["made_of"], restore(there)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(f"{path}: damaged ({error!r}); delete it to run it again.") from None
        for part in sorted(self._identity.keys() | made_of.keys()):
            if made_of.get(part) != self._identity.get(part):
                raise InputError(
                    f"{path}: made with another {part} ({str(made_of.get(part))[:60]} there, "
                    f"{str(self._identity.get(part))[:60]} now); name another --output, or delete "
                    "the folder."
                )
        return found

    def rate(self, method: str) -> float:
        """The learning rate of the least training loss, from disk or by its pilot."""
        offered = list(self._at_rate)
        if len(offered) == 1:
            return offered[0]
        losses = {rate: self._pilot(method, rate) for rate in offered}
        finite = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
        if not finite:
            raise InputError(f"{method}: no finite loss at --rates {offered}; give smaller ones.")
        return min(finite, key=lambda rate: finite[rate])

    def _pilot(self, method: str, rate: float) -> float:
        sweep = self._sweeps[method]
        name = Name(method, sweep[len(sweep) // 2], PILOT)
        path = self._folder / f"rate_{name.stem}_{rate:g}.json"
        loss = self._read(path, lambda there: there["loss"])
        if loss is None:
            loss = float(self._outcome(name, rate, None).metrics[-1]["loss"].value)
            write_json(path, {"made_of": self._identity, "loss": loss})
        return loss

    def _seed(self, number: int) -> Seed:
        if number not in self._seeds:
            self._seeds[number] = self._make_seed(number)
        return self._seeds[number]

    def _outcome(self, name: Name, rate: float, folder: Path | None) -> Any:
        seed = self._seed(name.seed)
        cell = Cell(
            jax.random.fold_in(seed.key, 4),
            name.coefficient,
            seed.split.train,
            seed.offline,
            folder,
            {**self._identity, "cell": list(name), "rate": rate},
        )
        return METHODS[name.method].run(self._at_rate[rate], cell)

    def run(self, name: Name) -> Found:
        """Compute a cell and write it."""
        rate = self.rate(name.method) if name.method in METHODS else None
        began = time.perf_counter()
        seed, pi0 = self._seed(name.seed), self._parts.pi0
        reports, params, score = [], pi0, seed.offline_score
        folder = self._folder / f"{name.stem}.rounds"
        if rate is not None:
            outcome = self._outcome(name, rate, folder)
            params, score = outcome.policy, outcome.score
            reports = [dict(metrics) for metrics in outcome.metrics]
        answer = evaluate.best_of(
            self._draw, params, score, n=int(name.coefficient) if name.method == BEST_OF else 1
        )
        judged = []
        for number, prompts in enumerate((seed.split.held_out, seed.split.ood)):
            judged.append(
                evaluate.judge(
                    jax.random.fold_in(jax.random.fold_in(seed.key, 5), number),
                    self._place,
                    prompts,
                    answer=answer,
                    law=self._law(name, params, prompts),
                    score=score,
                    base=seed.base[number],
                )
            )
        base, asked = seed.base[0], seed.split.held_out
        held_out, ood = judged
        found = Found(
            held_out,
            ood,
            reports,
            evaluate.agreement(self._place.judge(asked, base), score(asked, base).reward),
            time.perf_counter() - began,
            rate,
        )
        write_json(
            self._folder / f"{name.stem}.json",
            {"name": list(name), "made_of": self._identity, **_written(found)},
        )
        shutil.rmtree(folder, ignore_errors=True)
        return found

    def _law(self, name: Name, params: Any, prompts: Ragged) -> Callable[[Ragged], Any]:
        if name.method != BEST_OF:
            return lambda drawn: self._measure((params, self._parts.pi0), prompts, drawn)
        n = name.coefficient
        bound = math.log(n) - (n - 1) / n

        def law(drawn: Ragged) -> tuple[np.ndarray, np.ndarray]:
            shape = np.asarray(drawn.lengths).shape
            return np.full(shape, bound), np.full(shape, np.nan)

        return law


def names(
    *, sweeps: Mapping[str, Sequence[float]], best_of: Sequence[int], seeds: Iterable[int]
) -> list[Name]:
    """Every cell, by seed and in it by the place in the ``sweeps``: a part of a run is balanced.

    ``sweeps``: each method's coefficients.
    """
    found = []
    for seed in seeds:
        found.append(Name(PI0, 0.0, seed))
        found += [Name(BEST_OF, float(n), seed) for n in best_of]
        places = itertools.zip_longest(*([(m, c) for c in sweep] for m, sweep in sweeps.items()))
        found += [Name(at[0], float(at[1]), seed) for place in places for at in place if at]
    return found


def cost(name: Name) -> int:
    """About how long a cell takes, in fits."""
    return METHODS[name.method].fits if name.method in METHODS else 1


def _nothing(prompts: Ragged, responses: Ragged) -> np.ndarray:
    del prompts
    return np.zeros(np.asarray(responses.lengths).shape, np.float32)


def _written(found: Found) -> dict[str, Any]:
    return {
        "held_out": found.held_out._asdict(),
        "ood": found.ood._asdict(),
        "rounds": [{k: m._asdict() for k, m in report.items()} for report in found.rounds],
        "agreement": found.agreement,
        "seconds": found.seconds,
        "rate": found.rate,
    }


def _restored(there: dict[str, Any]) -> Found:
    held_out, ood = (
        # None is how JSON holds a NaN.
        Judged(**{k: np.array(v, np.float64) for k, v in there[at].items()})
        for at in ("held_out", "ood")
    )
    reports = [{k: Metric(**m) for k, m in report.items()} for report in there["rounds"]]
    return Found(held_out, ood, reports, there["agreement"], there["seconds"], there["rate"])
