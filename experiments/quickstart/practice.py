"""Practice panel: align a language model to a gold reward, offline and then online.

The whole of it is :func:`align`, on :mod:`jax_klrlhf.training.rounds`: draw responses from pi0, let
a Bradley-Terry annotator label pairs by the gold reward, fit DPO (*offline*); then draw from that
policy, label the best and the worst of n by gold, and fit DPO again from pi0 on all data (*online*,
one iteration of arXiv 2312.11456, section 5). *More offline* spends the online round's labels on
further pairs from pi0: the same number of labels, no exploration. Every fit takes the same number
of optimizer steps and the same kl_coef.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from jaxtyping import Float, Key
from rich.console import Console
from rich.progress import Progress

from experiments import prompts
from experiments.quickstart.world import World
from jax_klrlhf import results
from jax_klrlhf.core import pairs, sequence
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.errors import InputError
from jax_klrlhf.models import scoring
from jax_klrlhf.models.base import LanguageModel
from jax_klrlhf.training import rounds
from jax_klrlhf.training.rounds import oracle
from jax_klrlhf.training.rounds.compute import mapped
from jax_klrlhf.training.rounds.parts import Improve, join, ragged
from jax_klrlhf.training.state import TrainState

METHODS = ("pi0", "offline", "more offline", "online", "online, no larger KL")
ROWS = 256
"""Prompts answered and comparisons scored at one time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of the practice panel."""

    train_prompts: int = 512
    held_out_prompts: int = 256
    new_tokens: int = 64
    """Longest response."""
    samples: int = 8
    """Responses of which the online round labels the best and the worst (n)."""
    eval_samples: int = 4
    """Responses to each held-out prompt that a policy is judged by."""
    kl_coef: float = 0.2
    learning_rate: float = 5e-4
    steps: int = 60
    """Optimizer steps of every DPO fit."""
    batch: int = 64
    """Pairs in a step."""
    evaluations: int = 3
    """Points along each fit at which the policy is judged."""
    stories: int = 4000
    """Embedded default: stories that pi0 is trained on."""
    sft_steps: int = 300
    """Embedded default: optimizer steps that make pi0."""


class Judged(NamedTuple):
    """A policy on the held-out prompts, one entry per prompt (averaged over its responses)."""

    reward: Float[np.ndarray, " B"]
    kl: Float[np.ndarray, " B"]
    """KL(pi || pi0) of a response, nats."""
    wins: Float[np.ndarray, " B"]
    """Share of comparisons with pi0's responses to the same prompt won; a tie counts one half."""
    length: Float[np.ndarray, " B"]
    """Tokens."""


def check(config: Config, world: World) -> None:
    """Refuse sizes that do not fit the world, before any compute is spent."""
    prompts.split(
        world.prompts, train=config.train_prompts, held_out=config.held_out_prompts, seed=0
    )
    longest = int(world.encode(world.prompts).lengths.max())
    if longest + config.new_tokens > world.model.max_length:
        raise InputError(
            f"the longest prompt has {longest} tokens, with --practice.new-tokens "
            f"{config.new_tokens} more than the model's context of {world.model.max_length}: "
            "lower --practice.new-tokens or give shorter prompts."
        )


def run(
    config: Config,
    world: World,
    *,
    seeds: Sequence[int],
    output: Path,
    console: Console,
    progress: Progress,
) -> dict[str, results.Metric]:
    """Run every seed; draw the figure, print the table, return the metrics."""
    lab = _Lab(config, world)
    paths = [_one_seed(lab, seed, progress) for seed in seeds]
    judged = {method: [_chosen(path, method) for path in paths] for method in METHODS}
    table = {
        method: {field: _pooled([getattr(j, field) for j in found]) for field in Judged._fields}
        for method, found in judged.items()
    }
    _figure(paths, table, output / "practice.png")
    n = f"{len(paths)} seeds x {config.held_out_prompts} held-out prompts"
    results.print_table(
        f"Practice: {world.name}, {n}",
        {
            method: {
                "gold reward": row["reward"],
                "KL(pi||pi0)": row["kl"],
                "win rate": row["wins"],
                "tokens": row["length"],
            }
            for method, row in table.items()
        },
        console=console,
        caption="± one standard error: over seeds, or over prompts where that is larger",
    )
    differences = {
        f"{better} - {base}": _pooled(
            [x.reward - y.reward for x, y in zip(judged[better], judged[base], strict=True)]
        )
        for better, base in (
            ("online", "pi0"),
            ("online, no larger KL", "offline"),
            ("online, no larger KL", "more offline"),
        )
    }
    for name, gain in differences.items():
        if gain.stderr:
            console.print(f"gold reward, {name}: {gain} ({gain.value / gain.stderr:.1f} se)")
    metrics = {
        f"practice/{method}/{field}": metric
        for method, row in table.items()
        for field, metric in row.items()
    }
    metrics |= {f"practice/{name}/reward": gain for name, gain in differences.items()}
    return metrics


def align(
    key: Key[jax.Array, ""], world: World, train: Ragged, draw: "Draws", improve: Improve
) -> dict[str, Any]:
    """The three aligned policies: the whole of what this panel is about."""
    gold = lambda prompts, responses: world.reward(responses)  # noqa: E731
    keys = jax.random.split(key, 3)
    parts = {"prompts": train, "reward": rounds.known(gold), "oracle": oracle.bradley_terry(gold)}
    pairs_of_pi0 = {"sampler": rounds.main_agent(draw.two), "pair_rule": pairs.sampled}
    best_and_worst = {"sampler": rounds.main_agent(draw.many), "pair_rule": pairs.best_worst}

    first, further = (rounds.collect(k, world.params, **parts, **pairs_of_pi0) for k in keys[:2])
    fit = partial(rounds.iterate, keys[2], world.params, improve=improve, **parts, **best_and_worst)
    run = fit(rounds=1, offline=first)
    more = fit(rounds=0, offline=join([first, further]))
    return {"offline": run.policies[1], "online": run.policy, "more offline": more.policy}


class Draws(NamedTuple):
    """How policies are sampled from, each a program of its own."""

    two: rounds.Draw
    """A pair."""
    many: rounds.Draw
    """What the best and the worst are taken of."""
    judged: rounds.Draw
    """Responses to held-out prompts."""


class _Lab:
    """What all seeds share: programs compiled once, and who is told of a fit's way."""

    def __init__(self, config: Config, world: World):
        self.config, self.world = config, world
        self.width = max(len(world.encoder.prompt(text)) for text in world.prompts)
        sizes = (2, config.samples, config.eval_samples)
        self.draws = Draws(*(self._draw(samples) for samples in sizes))
        self.kl = mapped(partial(_kl_of_responses, world.model), rows=ROWS)
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, config.learning_rate, max(1, config.steps // 10), config.steps
        )
        every = -(-config.steps // config.evaluations)
        self.points = -(-config.steps // every)
        fitting = rounds.Fitting(
            optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule)),
            steps=config.steps,
            batch_size=config.batch,
            log_every=config.steps,
            evaluate_every=every,
            evaluate=self._along,
        )
        self.improve = rounds.dpo(world.model, kl_coef=config.kl_coef, fitting=fitting, rows=ROWS)
        self.told: Callable[[Any], None] = lambda params: None

    def encode(self, texts: list[str]) -> Ragged:
        """Prompts, all of one width."""
        rows = [self.world.encoder.prompt(text) for text in texts]
        return ragged(*sequence.pad(rows, length=self.width, pad_id=self.world.pad_id))

    def _draw(self, samples: int) -> rounds.Draw:
        return rounds.Draw(
            model=self.world.model,
            samples=samples,
            max_new_tokens=self.config.new_tokens,
            stop=(self.world.encoder.end,),
            pad_id=self.world.pad_id,
            rows=ROWS,
        )

    def _along(self, state: TrainState) -> dict[str, results.Metric]:
        self.told(state.policy)
        return {}


def _one_seed(lab: _Lab, seed: int, progress: Progress) -> dict[str, list[Judged]]:
    """Every method's evaluations along its fit (pi0: one)."""
    config, world = lab.config, lab.world
    train, held_out = prompts.split(
        world.prompts, train=config.train_prompts, held_out=config.held_out_prompts, seed=seed
    )
    questions = lab.encode(held_out)
    key_run, key_judge = jax.random.split(jax.random.key(seed))
    bar = progress.add_task(f"seed {seed}", total=3 * lab.points)
    base = world.reward(lab.draws.judged(jax.random.fold_in(key_judge, 1), world.params, questions))
    judge = partial(_judge, jax.random.fold_in(key_judge, 0), lab, questions, base)
    way: list[Judged] = []

    def told(params: Any) -> None:
        way.append(judge(params))
        progress.advance(bar)

    lab.told = told
    found = align(key_run, world, lab.encode(train), lab.draws, lab.improve)
    # Fits are in the order of `found`, with as many points each.
    path = {name: way[n * lab.points : (n + 1) * lab.points] for n, name in enumerate(found)}
    return {"pi0": [judge(world.params)], **path}


def _judge(key: Any, lab: _Lab, questions: Ragged, base_reward: np.ndarray, params: Any) -> Judged:
    drawn = lab.draws.judged(key, params, questions)
    reward = lab.world.reward(drawn)
    kl = lab.kl((params, lab.world.params), questions, drawn)
    difference = reward[:, :, None] - base_reward[:, None, :]
    return Judged(
        reward=reward.mean(1),
        kl=kl.mean(1),
        wins=(0.5 + 0.5 * np.sign(difference)).mean((1, 2)),
        length=np.asarray(drawn.lengths).mean(1),
    )


def _kl_of_responses(
    model: LanguageModel, params: Any, questions: Ragged, answers: Ragged
) -> jax.Array:
    """KL(pi || pi0) of each response ``[B, K]``: exact at each token, on the policy's own draws."""
    policy, base = params
    scores = scoring.score(model, policy, questions, answers, reference=(model, base))
    assert scores.kl is not None  # a reference was given
    return scores.kl.sum(-1)


def _chosen(path: Mapping[str, list[Judged]], method: str) -> Judged:
    """The policy that a row of the table is about."""
    if method != "online, no larger KL":
        return path[method][-1]
    limit = path["offline"][-1].kl.mean()
    below = [j for j in path["online"] if j.kl.mean() <= limit]
    # pi0 itself is where the online fit starts, so there is always a policy below.
    return below[-1] if below else path["pi0"][0]


def _pooled(per_seed: Sequence[Float[np.ndarray, " B"]]) -> results.Metric:
    """Mean over seeds and prompts. The standard error is the larger of two: over seeds, which has
    few degrees of freedom, and over prompts, which is blind to the luck of a fit."""
    within = [results.mean(values) for values in per_seed]
    over_prompts = np.sqrt(sum((m.stderr or 0.0) ** 2 for m in within)) / len(within)
    over_seeds = results.mean([m.value for m in within]).stderr or 0.0
    count = sum(m.n or 0 for m in within)
    return results.Metric(
        float(np.mean([m.value for m in within])), float(max(over_prompts, over_seeds)), count
    )


def _figure(paths, table, target: Path) -> None:
    """Gold reward against KL: every fit's way from pi0, and the final policies."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for colour, method in enumerate(("offline", "more offline", "online")):
        for number, path in enumerate(paths):
            way = [path["pi0"][0], *path[method]]
            axes.plot(
                [j.kl.mean() for j in way],
                [j.reward.mean() for j in way],
                color=f"C{colour}",
                alpha=0.4,
                label=method if number == 0 else None,
            )
        row = table[method]
        axes.errorbar(
            row["kl"].value,
            row["reward"].value,
            xerr=row["kl"].stderr,
            yerr=row["reward"].stderr,
            fmt="o",
            color=f"C{colour}",
        )
    axes.set(xlabel=r"KL($\pi\,\|\,\pi_0$), nats", ylabel="gold reward", title="Held-out prompts")
    axes.legend()
    figure.savefig(target, dpi=150)
    plt.close(figure)
