"""``klrlhf iterate``: rounds of preference learning from the command line.

A run's folder holds ``config.json``, ``rounds/`` (every phase's result), ``metrics.jsonl`` (a line
for each round), ``results.json`` and ``model/``, the last policy as Hugging Face would have it.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key
from rich.console import Console

from jax_klrlhf import finished, models, placement
from jax_klrlhf.core import pairs
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.data import check as suits
from jax_klrlhf.data import tokenize
from jax_klrlhf.data.rows import Row
from jax_klrlhf.errors import InputError
from jax_klrlhf.models import pretrained
from jax_klrlhf.programs import adapters
from jax_klrlhf.programs import iterate_parts as parts
from jax_klrlhf.programs import rows as sources
from jax_klrlhf.programs import run as runs
from jax_klrlhf.programs.belief_config import Fitted
from jax_klrlhf.programs.iterate_config import FREE, IterateConfig, check
from jax_klrlhf.programs.iterate_parts import Place
from jax_klrlhf.programs.policies import context_of, folder_of, stop_of, within_context
from jax_klrlhf.results import mean, output_folder, print_table, write_results
from jax_klrlhf.training import metrics as sinks
from jax_klrlhf.training import rounds
from jax_klrlhf.training import state as states
from jax_klrlhf.training.evaluate import kl_along
from jax_klrlhf.training.metrics import Metrics
from jax_klrlhf.training.rounds.compute import mapped
from jax_klrlhf.training.rounds.journal import ANY, Journal, digest
from jax_klrlhf.training.rounds.parts import Comparisons, Improve, Improved, Judge, ragged
from jax_klrlhf.training.rounds.run import Outcome
from jax_klrlhf.training.state import cast_floating

_ROWS = Ragged(ANY, ANY)  # pyright: ignore[reportArgumentType]  # A template, no arrays.
_COMPARISONS = Comparisons(_ROWS, _ROWS, ANY, ANY)  # pyright: ignore[reportArgumentType]
COLUMNS = {
    "labels/count": "labels",
    "rewards/accuracies": "acc.",
    "eval/reward": "reward",
    "eval/wins": "wins over pi0",
    "eval/kl/ref": "KL(pi||pi0)",
    "eval/length": "tokens",
}
"""Of the table, by metric."""


class Data(NamedTuple):
    """What a run asks, and what it is given."""

    prompts: list[tuple[int, ...]]
    """To learn on."""
    held_out: list[tuple[int, ...]]
    rows: list[Any] | None
    """Of --data."""


@runs.alone
def iterate(config: IterateConfig, *, console: Console | None = None) -> Outcome:
    """Run rounds of preference learning and leave the policy in ``output/model``.

    Raises:
        InputError: naming what is wrong with options, model or data.
        loop.Stopped: where a fit was stopped, with the reason.
    """
    began, original = time.perf_counter(), config
    check(config)
    mesh = runs.devices(config)
    console = console or Console(quiet=not placement.leader())
    folder = output_folder(config.output)
    runs.hold(folder)
    _claim(config, folder)
    name = config.model
    found = folder_of(name)
    tokenizer = pretrained.load_tokenizer(found)
    if tokenizer is None:
        raise InputError(f"{name}: the folder has no tokenizer, which prompts need.")
    encoder = tokenize.encoder(tokenizer, control_tokens=config.control_tokens)
    stop = stop_of(config.stop, tokenizer, found)
    config = within_context(config, {name: context_of(found)}, console)
    data = _read(config, encoder)
    options: dict[str, Any] = {} if config.remat is None else {"remat": config.remat}
    # A base that nothing trains needs no float32 masters.
    frozen = config.lora.rank > 0 and not isinstance(config.belief, Fitted)
    masters = jnp.dtype(config.dtype) if frozen else jnp.float32
    loaded = models.load(
        found, mesh=mesh, param_dtype=masters, dtype=jnp.dtype(config.dtype),
        kv=config.sampling_kv, prefill_chunk=config.sampling_prefill_chunk, **options,
    )  # fmt: skip
    key = jax.random.key(config.seed)
    # Keys by what they are for: none changes with the number of rounds.
    purpose = {
        word: jax.random.fold_in(key, number)
        for number, word in enumerate(("belief", "offline", "judge", "best of", "run", "adapter"))
    }
    model, params, adapter = adapters.attach(purpose["adapter"], loaded, config.lora, mesh=mesh)
    policy = loaded._replace(model=model, params=params)
    place = Place(
        config=config, loaded=loaded, policy=policy, adapter=adapter, encoder=encoder, stop=stop,
        mesh=mesh, console=console,
    )  # fmt: skip
    asked = [Row(list(ids), [], [], 1.0, 1.0, 0) for ids in (*data.prompts, *data.held_out, stop)]
    suits.vocabulary([*(data.rows or ()), *asked], vocab_size=loaded.model.vocab_size, model=name)
    parts.check_batches(place)
    judge = parts.make_judge(place)

    whole = sources.padded(data.prompts)
    identity = {key: value for key, value in finished.plain(config).items() if key not in FREE}
    before = Journal(
        folder / "before",
        {
            "config": json.dumps(identity, sort_keys=True),
            "prompts": digest(whole),
            "pi0": states.fingerprint_text(states.digest(params)),
        },
    )
    belief = config.belief.make(place, purpose["belief"], judge, whole)
    comparisons = None
    if data.rows is not None and (not config.recorded or config.setting == "offline"):
        comparisons = sources.as_comparisons(data.rows, str(config.data))
    elif config.setting in ("offline", "hybrid"):
        comparisons = _offline(place, purpose["offline"], before, whole, judge)
    known = None if data.rows is None else sources.as_comparisons(data.rows, str(config.data))
    sampler = (
        sources.recorded_pool(data.rows, data.prompts)
        if config.recorded and data.rows is not None
        else parts.make_sampler(place)
    )

    base: Metrics = {}
    measure = None
    if data.held_out:
        measure = _Evaluation(place, judge, sources.padded(data.held_out), purpose["judge"], before)
        base = measure.base
        console.print(f"pi0  {_line(base)}", highlight=False)
    improve = config.improve.make(place)
    if adapter is not None:
        improve = adapters.alone(improve)
    write = sinks.json_lines(folder / "metrics.jsonl") if placement.leader() else None
    reports: dict[int, Metrics] = {}

    def report(number: int, found: Metrics) -> None:
        reports[number] = dict(found)
        if write is not None:
            write(number, found)

    count = config.prompts_per_round or len(data.prompts)
    outcome = rounds.iterate(
        purpose["run"],
        params,
        prompts=lambda number: _portion(whole, number, len(data.prompts) if number == 0 else count),
        sampler=sampler,
        reward=belief,
        pair_rule=config.pairs.make(place),
        oracle=parts.make_oracle(place, judge, known),
        improve=improve if measure is None else _measured(improve, measure),
        rounds=0 if config.setting == "offline" else config.rounds,
        reference=getattr(rounds, config.reference),
        start=None if config.start == "reference" else getattr(rounds, config.start),
        setting=parts.make_setting(config),
        offline=comparisons,
        output=folder / "rounds",
        config=identity,
        console=console,
        report=report,
    )
    left = adapters.save(
        folder, loaded.config, outcome.policy, tokenizer, adapter,
        base=config.model, merged=config.lora.merged, generation=loaded.generation,
    )  # fmt: skip
    best: Metrics = {}
    if config.best_of is not None and measure is not None:
        best = measure.best(purpose["best of"], outcome, config.best_of)
    _finish(config, folder, console, base, reports, best, time.perf_counter() - began)
    placement.lead(lambda: finished.mark(folder, "iterate", original, left=left))
    said = finished.next_step("iterate", folder, left)
    console.print(said, markup=False, highlight=False, soft_wrap=True)
    return outcome


class _Evaluation:
    """Policies on held-out prompts; pi0's responses are the yardstick of wins.

    Every policy answers with the same keys, so that differences between policies carry less noise.
    """

    def __init__(
        self,
        place: Place,
        judge: Judge | None,
        prompts: Ragged,
        key: Key[Array, ""],
        before: Journal,
    ):
        config, model = place.config, place.policy.model
        self._place, self._judge, self._prompts, self._key = place, judge, prompts, key
        self._draw = place.draw(config.eval_samples, plain=True)

        def divergence(params: Any, prompts: Ragged, responses: Ragged) -> tuple[Array, Array]:
            policy, base = cast_floating(params, place.compute_dtype)
            found = kl_along(model, policy, prompts, responses, reference=(model, base))
            return found.kl.sum(-1), found.log_prob.sum(-1)

        self._kl = mapped(divergence, rows=config.rows, mesh=place.mesh)
        template: Any = (ANY, ANY)

        def judged() -> tuple[Any, Metrics]:
            pi0 = place.policy.params
            reward, length = self._answers(jax.random.fold_in(key, 1), pi0)
            return (reward, length), self._named(reward, length, reward)

        # Its own draw, so that pi0 against itself is not a tie throughout.
        (self._base, _), self.base = before.phase(0, "judge", judged, like=template)

    def __call__(self, params: Any) -> Metrics:
        """Metrics ``eval/...`` of a policy."""
        key = jax.random.fold_in(self._key, 0)
        responses, drawn = self._draw.with_log_prob(key, params, self._prompts)
        reward = self._reward(responses)
        found = self._named(reward, np.asarray(responses.lengths, np.float32), self._base)
        kl, scored = self._kl((params, self._place.policy.params), self._prompts, responses)
        return found | {
            "eval/kl/ref": mean(np.asarray(kl, np.float64).mean(1)),
            "eval/sampler_scorer_mismatch": mean(np.abs(drawn - scored).mean(1)),
        }

    def best(self, key: Key[Array, ""], outcome: Outcome, count: int) -> Metrics:
        """The same of the best of ``count`` responses of the last policy."""
        draw = self._place.draw(count, plain=True)
        found = rounds.best_of_n(key, draw, outcome.policy, outcome.judge, self._prompts)
        reward = self._reward(found.responses)
        length = np.asarray(found.responses.lengths, np.float32)
        return self._named(reward, length, self._base)

    def _answers(self, key: Any, params: Any) -> tuple[Any, Any]:
        responses = self._draw(key, params, self._prompts)
        return self._reward(responses), np.asarray(responses.lengths, np.float32)

    def _reward(self, responses: Ragged) -> Any:
        if self._judge is None:
            return None
        return np.asarray(self._judge(self._prompts, responses), np.float32)

    def _named(self, reward: Any, length: Any, base: Any) -> Metrics:
        found = {"eval/length": mean(length.astype(np.float64).mean(1))}
        if reward is not None and base is not None:
            found["eval/reward"] = mean(reward.astype(np.float64).mean(1))
            difference = np.sign(reward[:, :, None] - base[:, None, :])
            found["eval/wins"] = mean((0.5 + 0.5 * difference).mean((1, 2)))
        return found


def _measured(improve: Improve, measure: Callable[[Any], Metrics]) -> Improve:
    """``improve`` whose metrics, which are kept on disk, have the evaluation's beside them."""

    def both(key: Key[Array, ""], situation: Any) -> Improved:
        found = improve(key, situation)
        return Improved(found.params, {**found.metrics, **measure(found.params)})

    return both


def _offline(
    place: Place, key: Key[Array, ""], before: Journal, prompts: Ragged, judge: Judge | None
) -> Comparisons:
    """Random pairs of pi0's responses, labelled; from disk where they are there."""
    config = place.config
    count = config.offline_prompts or len(prompts.lengths)
    oracle = parts.make_oracle(place, judge, None)

    def collect() -> tuple[Comparisons, Metrics]:
        place.console.print(f"{count} pairs of pi0's responses", highlight=False)
        found = rounds.collect(
            key,
            place.policy.params,
            prompts=_portion(prompts, 1, count),
            sampler=rounds.main_agent(place.draw(2)),
            reward=rounds.known(lambda p, r: np.zeros(np.asarray(r.lengths).shape, np.float32)),
            pair_rule=pairs.sampled,
            oracle=oracle,
        )
        return found, {}

    return before.phase(0, "offline", collect, like=_COMPARISONS)[0]


def _claim(config: IterateConfig, folder: Path) -> None:
    """Write the configuration, or see that the one that is there is the same."""
    done = finished.read(folder)
    rounds = 0 if done is None else done["config"].get("rounds", 0)
    if config.setting != "offline" and config.rounds < rounds:
        raise InputError(
            f"{folder}: {rounds} rounds are done, --rounds asks for {config.rounds}; ask for "
            "more, or name another --output."
        )
    begun = (folder / "before").exists() or (folder / "rounds").exists()
    runs.claim(folder, "iterate", config, free=FREE, begun=begun)
    placement.lead(lambda: finished.unmark(folder))


def _read(config: IterateConfig, encoder: tokenize.Encoder) -> Data:
    """Prompts and preferences. Held-out prompts are chosen by the seed."""
    rows = None
    if config.data is not None:
        rows = sources.read_rows(config.data, config, encoder, split=config.split)
    if config.prompts is not None:
        asking = sources.read_rows(config.prompts, config, encoder, split=config.prompts_split)
    else:
        asking = rows or []
    found = _shuffled(sources.distinct_prompts(asking), config.seed)
    if len(found) <= config.held_out:
        raise InputError(
            f"{config.prompts or config.data}: {len(found)} different prompts, of which --held-out "
            f"{config.held_out} are kept from learning; give more, or keep fewer."
        )
    held_out, prompts = found[: config.held_out], found[config.held_out :]
    for name, count in (
        ("--prompts-per-round", config.prompts_per_round),
        ("--offline-prompts", config.offline_prompts),
    ):
        if count is not None and count > len(prompts):
            raise InputError(f"{name} is {count}; there are {len(prompts)} prompts to learn on.")
    if rows is not None:
        rows = [row for row in rows if tuple(row.prompt) not in set(held_out)]
        sources.as_comparisons(rows, str(config.data))  # refused before anything is computed
    return Data(prompts, held_out, rows)


def _shuffled(prompts: list[tuple[int, ...]], seed: int) -> list[tuple[int, ...]]:
    order = np.random.default_rng(seed).permutation(len(prompts))
    return [prompts[i] for i in order]


def _portion(prompts: Ragged, number: int, count: int) -> Ragged:
    """``count`` prompts for a round, one round's after the other's, from the first again."""
    index = (np.arange(count) + max(number - 1, 0) * count) % len(prompts.lengths)
    return ragged(np.asarray(prompts.ids)[index], np.asarray(prompts.lengths)[index])


def _line(found: Metrics) -> str:
    return "  ".join(f"{name} {metric}" for name, metric in found.items())


def _cell(found: Metrics, name: str) -> Any:
    if name not in found:
        return ""
    digits = {"labels/count": 0, "rewards/accuracies": 3, "eval/length": 1}.get(name)
    return found[name] if digits is None else f"{found[name].value:.{digits}f}"


def _finish(
    config: IterateConfig,
    folder: Path,
    console: Console,
    base: Metrics,
    reports: dict[int, Metrics],
    best: Metrics,
    seconds: float,
) -> None:
    """The table and ``results.json``."""
    named = {"pi0": base} | {
        "offline" if number == 0 else f"round {number}": found for number, found in reports.items()
    }
    if best:
        named[f"best of {config.best_of}"] = best
    shown = {name for found in named.values() for name in found}
    print_table(
        f"{config.setting}, {config.improve.method}, kl_coef {config.kl_coef:g}",
        {
            row: {title: _cell(found, name) for name, title in COLUMNS.items() if name in shown}
            for row, found in named.items()
            if found
        },
        console=console,
        caption="± one standard error over held-out prompts; acc.: of the fit on its own pairs",
    )
    if placement.leader():
        write_results(
            folder,
            name="iterate",
            config=finished.plain(config),
            seeds=[config.seed],
            seconds=seconds,
            metrics={
                f"{row.replace(' ', '-')}/{config.improve.method}/{name}": metric
                for row, found in named.items()
                for name, metric in found.items()
            },
        )


__all__ = ["IterateConfig", "iterate"]
