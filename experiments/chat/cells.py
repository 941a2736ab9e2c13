"""Cells: one method at one coefficient and seed, run, judged, and left on disk.

What all cells share is made once: states of the human pairs, the judges, and the learning rate of
each training objective, **the smallest whose loss on pairs that it did not learn from is within one
standard error of the least**, on a pilot seed that is judged by nothing, at the middle coefficient.
A rate never sees gold's rewards, only labels.
"""

import itertools
import json
import math
import time
from collections.abc import Mapping
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

from experiments.chat import human, judges, measure, methods
from experiments.frontier.methods import Cell, Parts, portions
from experiments.hh_harmless import words
from jax_klrlhf import models, results
from jax_klrlhf.core import pairs
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.data import tokenize
from jax_klrlhf.errors import InputError
from jax_klrlhf.models import lora
from jax_klrlhf.results import Metric
from jax_klrlhf.training import optimizers, rounds
from jax_klrlhf.training.rounds.parts import Comparisons, Policies, join, ragged

if TYPE_CHECKING:
    from experiments.chat.run import Config

PI0, BEST_OF = "pi0", "best-of-n"
PLACES = ("held out", "other source")
PILOT = 10**6
"""The seed of the pilot."""
HELD_OUT = 1 / 3
"""Share of a pilot's prompts that its fit does not learn from."""


class Name(NamedTuple):
    """Which cell; ``coefficient`` and learning ``rate`` are 0 where there is none."""

    method: str
    coefficient: float
    rate: float
    seed: int

    @property
    def stem(self) -> str:
        """Of its file."""
        method = self.method.replace(" ", "-").replace(",", "")
        return f"{method}_{self.coefficient:g}_{self.rate:g}_{self.seed}"


class Lab:
    """Runs cells; everything else is made when first asked for."""

    def __init__(self, config: "Config", *, console: Console):
        self.config, self.sizes, self.console = config, config.sizes, console
        self.output = results.output_folder(config.output / "cells")
        kept = ("model", "data", "ood", "rates", "sizes", "coefficients")
        plain = results.plain(config)
        self.made_of = json.loads(json.dumps({k: plain[k] for k in kept}, default=str))
        self._offline: dict[int, Comparisons] = {}

    def _json(self, stem: str, make: Any) -> dict[str, Any]:
        """A file of results: read where it is there, else made and written."""
        path = self.output / f"{stem}.json"
        if path.exists():
            there = results.read_json(path, remedy="delete it to have it made again")
            if there.get("made_of") != self.made_of:
                raise InputError(f"{path}: made with other options; name another --output.")
            return there
        began = time.perf_counter()
        found = {"made_of": self.made_of, **make()}
        found["seconds"] = time.perf_counter() - began
        results.write_json(path, found)
        self.console.print(f"{stem}: {found['seconds']:.0f} s", highlight=False)
        return found

    @cached_property
    def loaded(self) -> models.Loaded:
        """The chat model, in float32."""
        return models.load(self.config.model, dtype=jnp.float32, param_dtype=jnp.float32)

    @cached_property
    def encoder(self) -> tokenize.Encoder:
        """Of its tokenizer."""
        return tokenize.encoder(self.loaded.tokenizer)

    @cached_property
    def adapter(self) -> lora.Lora:
        """Its static facts."""
        return lora.Lora(rank=self.sizes.rank, alpha=2.0 * self.sizes.rank)

    @cached_property
    def model(self) -> Any:
        """The chat model, with an adapter if it has one."""
        if not self.sizes.rank:
            return self.loaded.model
        return lora.language_model(self.loaded.config, self.adapter)

    @cached_property
    def pi0(self) -> Any:
        """Parameters; an adapter changes nothing yet."""
        if not self.sizes.rank:
            return self.loaded.params
        fresh = lora.init(jax.random.key(5), self.loaded.config, self.adapter)
        return {"base": self.loaded.params, "lora": fresh}

    @cached_property
    def people(self) -> tuple[dict[str, list[human.Pair]], dict[str, list[human.Pair]]]:
        """The parts of both sources, cut to size."""
        sizes, found = self.sizes, []
        most = {"gold": sizes.human, "proxy": sizes.human, "judge": sizes.judged}
        for path in (self.config.data, self.config.ood):
            kept = human.short(
                self.encoder, human.read(path),
                prompt=sizes.human_prompt_tokens, response=sizes.human_tokens,
            )  # fmt: skip
            parts = human.divide(kept)
            rng = np.random.default_rng(0)
            cut = {}
            for part, listed in parts.items():
                order = rng.permutation(len(listed))[: most[part]]
                cut[part] = [listed[i] for i in order]
                if len(cut[part]) < judges.FOLDS:
                    raise InputError(
                        f"{path}: {len(cut[part])} short pairs for {part}; raise "
                        "--sizes.human-prompt-tokens or --sizes.human-tokens."
                    )
            wanted = {"judge": sizes.held_out}
            if not found:  # Policies learn on prompts of the first source alone.
                wanted["proxy"] = sizes.train_prompts
            for part, count in wanted.items():
                there = len(self._askable(cut[part]))
                if there < count:
                    raise InputError(
                        f"{path}: {there} prompts of at most {sizes.prompt_tokens} tokens for "
                        f"{part}, {count} wanted; raise --sizes.prompt-tokens or ask for fewer."
                    )
            found.append(cut)
        return found[0], found[1]

    def _askable(self, listed: list[human.Pair]) -> list[Any]:
        """The different prompts that are short enough for policies."""
        return [
            prompt
            for prompt in dict.fromkeys(pair.prompt for pair in listed)
            if len(human.prompt_ids(self.encoder, prompt)) <= self.sizes.prompt_tokens
        ]

    def _prompts(self, source: int, part: str, count: int, seed: int) -> list[Any]:
        listed = self._askable(self.people[source][part])
        order = np.random.default_rng([seed, source]).permutation(len(listed))[:count]
        return [listed[i] for i in order]

    def _tokens(self, listed: list[human.Pair]) -> human.Tokens:
        sizes = self.sizes
        return human.tokens(
            self.encoder, listed, prompt=sizes.human_prompt_tokens, response=sizes.human_tokens
        )

    def asked(self, prompts: list[Any]) -> Ragged:
        """Prompts of one width, so that every program is compiled once."""
        return human.asked(self.encoder, prompts, width=self.sizes.prompt_tokens)

    @cached_property
    def places(self) -> tuple[list[Any], list[Any]]:
        """The prompts that policies are judged on, the same for all seeds."""
        count = self.sizes.held_out
        return self._prompts(0, "judge", count, 0), self._prompts(1, "judge", count, 0)

    @cached_property
    def draw(self) -> Any:
        """``draw(samples)``: one sampler to a number of samples."""
        made: dict[int, rounds.Draw] = {}

        def draw(samples: int) -> rounds.Draw:
            if samples not in made:
                made[samples] = rounds.Draw(
                    model=self.model, samples=samples, max_new_tokens=self.sizes.new_tokens,
                    stop=models.stop_tokens(self.loaded.tokenizer, self.loaded.generation),
                    rows=max(1, 64 // samples),
                )  # fmt: skip
            return made[samples]

        return draw

    @cached_property
    def base(self) -> tuple[Ragged, Ragged]:
        """pi0's answers to the judged prompts of both sources, ``draws`` of each."""
        path = self.output / "pi0.npz"
        samples, key = self.sizes.draws, jax.random.key(11)
        if not path.exists():
            drawn = [
                self.draw(samples)(jax.random.fold_in(key, n), self.pi0, self.asked(prompts))
                for n, prompts in enumerate(self.places)
            ]
            with open(path.with_suffix(".part"), "wb") as file:
                np.savez(
                    file,
                    **{
                        f"{n}{k}": v
                        for n, d in enumerate(drawn)
                        for k, v in zip("il", d, strict=True)
                    },
                )
            path.with_suffix(".part").rename(path)
        there = np.load(path)
        one, two = (ragged(there[f"{n}i"], there[f"{n}l"]) for n in (0, 1))
        return one, two

    @cached_property
    def hidden(self) -> judges.Hidden:
        """States of the chat model itself, kept on disk."""
        return judges.Hidden(
            self.loaded.model, self.loaded.params, rows=16, folder=self.output / "states"
        )

    @cached_property
    def judges(self) -> judges.Judges:
        """Gold and the proxies."""
        sizes = self.sizes
        return judges.build(
            self.hidden,
            gold=[self._tokens(source["gold"]) for source in self.people],
            proxy=self._tokens(self.people[0]["proxy"]),
            pi0=(self.asked(self.places[0]), self.base[0]),
            dims=(sizes.gold_components, sizes.proxy_components),
            members=sizes.members, spread=sizes.spread, pessimism=sizes.pessimism,
        )  # fmt: skip

    def accuracy(self) -> dict[str, Any]:
        """Of gold, of the proxy and of a bag of words, on pairs that no one learned from."""

        def make() -> dict[str, Any]:
            found = {}
            bags = {
                "gold": words.fit([t for s in self.people for t in _texts(s["gold"])]),
                "proxy": words.fit(_texts(self.people[0]["proxy"])),
            }
            for place, source in zip(PLACES, self.people, strict=True):
                told = self._tokens(source["judge"])
                for which, fit in self.judges.fits.items():
                    phi = self.judges.features[which](*told)
                    found[f"{place}/{which}"] = _hits(judges.margins(fit.members.mean(0), phi))
                    bag = bags[which].margin(_texts(source["judge"]))
                    found[f"{place}/{which}, bag of words"] = _hits(bag)
            return found

        return self._json("accuracy", make)

    def _fitting(self, rate: float, *, held_out: float = 0.0) -> rounds.Fitting:
        sizes = self.sizes
        warmup = max(1, sizes.steps // 10)
        # The rate is a number in the optimizer's state: one program serves all.
        shape = optimizers.schedule(1.0, warmup=warmup, steps=sizes.steps, decay=optimizers.cosine)
        optimizer = optax.chain(
            optimizers.adamw(shape), optax.inject_hyperparams(optax.scale)(step_size=rate)
        )
        return rounds.Fitting(
            optimizer=optimizer, steps=sizes.steps, batch_size=sizes.batch,
            trainable=(lambda path: path.startswith("lora/")) if sizes.rank else None,
            log_every=max(1, sizes.steps // 2),
            held_out=held_out,
        )  # fmt: skip

    @cached_property
    def fittings(self) -> dict[float, rounds.Fitting]:
        """By learning rate."""
        return {rate: self._fitting(rate) for rate in self.config.rates}

    @property
    def _objectives(self) -> list[str]:
        return list(dict.fromkeys(methods.METHODS[m].objective for m in self.config.methods))

    @property
    def pilots(self) -> list[tuple[str, float]]:
        """(Training objective, learning rate) to be tried: none where there is a single rate."""
        rates = self.config.rates
        return list(itertools.product(self._objectives, rates)) if len(rates) > 1 else []

    def pilot(self, objective: str, rate: float) -> Metric:
        """Training loss of a fit on the prompts held out of it, nats; infinite where it is no
        number."""

        def make() -> dict[str, Any]:
            middle = self.config.coefficients[len(self.config.coefficients) // 2]
            name = Name(methods.pilot(objective), middle, rate, PILOT)
            outcome = self._outcome(name, self._fitting(rate, held_out=HELD_OUT))
            return methods.loss(outcome, "loss/held_out")._asdict()

        there = self._json(f"pilot_{objective.replace(' ', '-')}_{rate:g}", make)
        found = Metric(*(there[field] for field in Metric._fields))
        finite = found.value is not None and math.isfinite(found.value)
        return found if finite else Metric(math.inf)

    @cached_property
    def rates(self) -> dict[str, float]:
        """The learning rate of each training objective.

        Raises:
            InputError: where every rate diverged.
        """
        rates, found = self.config.rates, {}
        if len(rates) == 1:
            return dict.fromkeys(self._objectives, rates[0])
        for objective in self._objectives:
            losses = {rate: self.pilot(objective, rate) for rate in rates}
            if all(math.isinf(loss.value) for loss in losses.values()):
                raise InputError(f"--rates: {objective} diverges at all of them; add smaller ones.")
            found[objective] = smallest(losses)
        return found

    def _parts(self, fitting: rounds.Fitting) -> Parts:
        explore = self.draw(self.sizes.explore)
        return Parts(
            model=self.model, pi0=self.pi0, reward=self.judges.proxies["mean"],
            oracle=rounds.oracle.bradley_terry(self.judges.gold),
            fitting=fitting, short_fitting=fitting, rows=self.sizes.batch, explore=explore,
            propose=explore, propose_step=explore, chain=1, labelling=rounds.rejection.expected,
            rounds=self.sizes.rounds,
        )  # fmt: skip

    def offline(self, seed: int) -> Comparisons:
        """The label budget spent on pairs of pi0's answers."""
        if seed not in self._offline:
            train = self.asked(self._prompts(0, "proxy", self.sizes.train_prompts, seed))
            parts = self._parts(next(iter(self.fittings.values())))
            key, found, count = jax.random.fold_in(jax.random.key(12), seed), [], 0
            while count < self.sizes.labels:
                left = min(self.sizes.labels - count, len(train.lengths))
                made = rounds.collect(
                    jax.random.fold_in(key, len(found)), self.pi0,
                    prompts=portions(train, left)(1 + len(found)),
                    sampler=rounds.main_agent(parts.explore), reward=parts.reward,
                    pair_rule=pairs.sampled, oracle=parts.oracle,
                )  # fmt: skip
                found.append(made)
                count += len(made.weight)
            self._offline[seed] = jax.tree.map(lambda x: x[: self.sizes.labels], join(found))
        return self._offline[seed]

    def _outcome(self, name: Name, fitting: rounds.Fitting) -> Any:
        key = jax.random.fold_in(jax.random.key(13), name.seed)
        train = self.asked(self._prompts(0, "proxy", self.sizes.train_prompts, name.seed))
        cell = Cell(key, name.coefficient, train, self.offline(name.seed), None, list(name))
        return methods.run(name.method, self._parts(fitting), cell, proxies=self.judges.proxies)

    @cached_property
    def _measure(self) -> measure.Measure:
        return measure.measure(self.model, rows=8)

    def run(self, name: Name) -> dict[str, Any]:
        """Compute a cell and write it, or read it."""
        return self._json(name.stem, partial(self._cell, name))

    def _cell(self, name: Name) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if name.method == PI0:
            params = self.pi0
            found["curves"] = self._curves()
        else:
            outcome = self._outcome(name, self.fittings[name.rate])
            params = outcome.policy
            found["loss"] = methods.loss(outcome).value
        key = jax.random.fold_in(jax.random.key(14), name.seed)
        for number, (place, prompts) in enumerate(zip(PLACES, self.places, strict=True)):
            asked = self.asked(prompts)
            samples = self.sizes.eval_samples
            drawn = self.draw(samples)(jax.random.fold_in(key, number), params, asked)
            kl = self._measure((params, self.pi0), asked, drawn)
            judged, answers = measure.judge(
                asked, drawn, self.base[number], kl, gold=self.judges.gold,
                proxy=partial(self._believed, "mean"), decode=self.encoder.decode,
            )  # fmt: skip
            found[place] = {k: v.tolist() for k, v in judged._asdict().items()}
            found[f"{place}, answers"] = [answer._asdict() for answer in answers]
        return found

    def _believed(self, proxy: str, prompts: Ragged, responses: Ragged) -> np.ndarray:
        hand = Policies(self.pi0, self.pi0, self.pi0, (self.pi0,))
        reward = self.judges.proxies[proxy]
        return np.asarray(reward.score(reward.init, hand, prompts, responses).reward)

    def _curves(self) -> dict[str, Any]:
        """Gold, and what is believed, of best-of-n by each proxy and by gold itself, per prompt."""
        found: dict[str, Any] = {}
        for place, prompts, base in zip(PLACES, self.places, self.base, strict=True):
            asked = self.asked(prompts)
            gold = self.judges.gold(asked, base)
            believed = {p: self._believed(p, asked, base) for p in judges.PROXIES} | {"gold": gold}
            n = 2
            while n <= self.sizes.draws // 2:
                for by, reward in believed.items():
                    gain = measure.best_of(reward, gold, n) - gold.mean(1)
                    own = measure.best_of(reward, reward, n) - reward.mean(1)
                    at = {"gold_gain": gain.tolist(), "own_gain": own.tolist()}
                    found[f"{place}/{by}/{n}"] = {**at, "kl": measure.best_of_kl(n)}
                n *= 2
        return found


def smallest(losses: Mapping[float, Metric]) -> float:
    """The smallest rate whose loss is within one standard error of the least.

    Breiman et al. (1984), section 3.4.3: among rates that the loss does not tell apart, the one
    that moves the policy least.
    """
    least = min(losses.values(), key=lambda loss: loss.value)
    limit = least.value + (least.stderr or 0.0)
    return min(rate for rate, loss in losses.items() if loss.value <= limit)


def _texts(listed: list[human.Pair]) -> list[tuple[str, str]]:
    return [(pair.chosen, pair.rejected) for pair in listed]


def _hits(margin: np.ndarray) -> list[float]:
    return (0.5 + 0.5 * np.sign(margin)).tolist()
