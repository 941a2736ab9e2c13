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
import numpy as np
import optax
from jaxtyping import Float, Key
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from scipy.special import stdtrit

from experiments import plotting, prompts
from experiments.quickstart.world import World
from jax_klrlhf import results
from jax_klrlhf.core import pairs, sequence
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.errors import InputError
from jax_klrlhf.training import rounds
from jax_klrlhf.training.evaluate import kl_along
from jax_klrlhf.training.rounds import oracle
from jax_klrlhf.training.rounds.compute import mapped
from jax_klrlhf.training.rounds.parts import Improve, join, ragged
from jax_klrlhf.training.state import TrainState

METHODS = ("pi0", "offline", "more offline", "online")
STOPPED = "online, no larger KL"
"""The online fit at its last point whose KL is no larger than the offline policy's: a row of its
own where that is not the fit's end."""
NAMES = {"more offline": "offline, more", STOPPED: "online, less KL"}
"""What rows of the table are called where that is not the method's name."""
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
    pair_samples: int = 2
    """Responses of pi0 of which two, picked at random, are a pair of the offline data. Sizes that
    are equal share a compiled program."""
    eval_samples: int = 4
    """Responses to each held-out prompt that a policy is judged by."""
    shown: int = 3
    """Held-out prompts to which the answers are printed."""
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
    runs = [_one_seed(lab, seed, progress) for seed in seeds]
    paths = [found.path for found in runs]
    judged = {method: [path[method][-1] for path in paths] for method in METHODS}
    stopped = [_stopped(path) for path in paths]
    if any(a is not b for a, b in zip(stopped, judged["online"], strict=True)):
        judged[STOPPED] = stopped
    labels = {m: int(np.mean([found.labels[m] for found in runs])) for m in runs[0].labels}
    labels |= {"pi0": 0, STOPPED: labels["online"]}
    table = {
        method: {field: _pooled([getattr(j, field) for j in found]) for field in Judged._fields}
        for method, found in judged.items()
    }
    _figure(paths, table, output / "practice.png")
    results.print_table(
        f"Practice: {world.name}, {len(paths)} seeds x {config.held_out_prompts} held-out prompts",
        {
            NAMES.get(method, method): {
                "labels": str(labels[method]),
                "gold reward": row["reward"],
                "KL(pi||pi0)": row["kl"],
                "win rate": row["wins"],
                "tokens": f"{row['length'].value:.1f}",
            }
            for method, row in table.items()
        },
        console=console,
        caption="± one standard error: over seeds, or over prompts where that is larger. "
        "Win rate against pi0.",
    )
    gains = {
        f"{better} - {base}": _gain(judged[better], judged[base])
        for better, base in (
            ("online", "pi0"),
            ("online", "offline"),
            ("online", "more offline"),
            (STOPPED, "offline"),
            (STOPPED, "more offline"),
        )
        if better in judged
    }
    _tell_answers(runs[0].answers, console)
    for name, gain in gains.items():
        better, base = name.split(" - ")
        console.print(
            f"{NAMES.get(better, better)} ({labels[better]} labels) against "
            f"{NAMES.get(base, base)} ({labels[base]}): {gain.text}",
            markup=False,
            highlight=False,
        )
    if STOPPED not in judged:
        console.print("The online policies are not farther from pi0 than the offline ones.")
    metrics = {
        f"practice/{method}/{field}": metric
        for method, row in table.items()
        for field, metric in row.items()
    }
    metrics |= {f"practice/{method}/labels": results.Metric(labels[method]) for method in table}
    metrics |= {f"practice/{name}/reward": gain.metric for name, gain in gains.items()}
    return metrics


class Gain(NamedTuple):
    """A difference in gold reward between two policies on the same prompts."""

    metric: results.Metric
    text: str
    """With its 95 % interval, and whether that decides."""


def _gain(better: Sequence[Judged], base: Sequence[Judged]) -> Gain:
    """Student's interval with a degree of freedom less than seeds: three seeds know little of their
    own spread, and two standard errors would decide too often."""
    metric = _pooled([x.reward - y.reward for x, y in zip(better, base, strict=True)])
    if len(better) < 2:
        return Gain(metric, f"{metric} in gold reward; one seed decides nothing")
    half = float(stdtrit(len(better) - 1, 0.975)) * (metric.stderr or 0.0)
    low, high = metric.value - half, metric.value + half
    verdict = "undecided" if low <= 0 <= high else "better" if low > 0 else "worse"
    return Gain(metric, f"{verdict}, {metric.value:+.3f} [{low:.3f}, {high:.3f}] gold reward")


class Answer(NamedTuple):
    """What two policies say to a prompt, each its first draw."""

    prompt: str
    pi0: str
    aligned: str
    rewards: tuple[float, float]


def _tell_answers(answers: Sequence[Answer], console: Console) -> None:
    """Side by side. Text of a model is text: none of it is read as markup."""
    table = Table(
        title="The first held-out prompts, the first draw of each policy (gold reward)",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 1, 0),
        show_edge=False,
    )
    for title in ("prompt", "pi0", "aligned (online)"):
        table.add_column(title, ratio=1, overflow="fold")
    for answer in answers:
        said = (answer.pi0, answer.aligned)
        cells = [f"{text.strip()} ({r:.1f})" for text, r in zip(said, answer.rewards, strict=True)]
        table.add_row(*map(Text, (answer.prompt.strip(), *cells)))
    console.print(table)


def align(
    key: Key[jax.Array, ""], world: World, train: Ragged, draw: "Draws", improve: Improve
) -> tuple[dict[str, Any], dict[str, int]]:
    """The three aligned policies, and the labels each has cost: the whole of this panel."""
    gold = lambda prompts, responses: world.reward(responses)  # noqa: E731
    keys = jax.random.split(key, 3)
    parts = {"prompts": train, "reward": rounds.known(gold), "oracle": oracle.bradley_terry(gold)}
    pairs_of_pi0 = {"sampler": rounds.main_agent(draw.two), "pair_rule": pairs.sampled}
    best_and_worst = {"sampler": rounds.main_agent(draw.many), "pair_rule": pairs.best_worst}

    first, further = (rounds.collect(k, world.params, **parts, **pairs_of_pi0) for k in keys[:2])
    fit = partial(
        rounds.iterate, keys[2], world.params, improve=improve, console=Console(quiet=True),
        **parts, **best_and_worst,
    )  # fmt: skip
    run = fit(rounds=1, offline=first)
    more = fit(rounds=0, offline=join([first, further]))
    policies = {"offline": run.policies[1], "online": run.policy, "more offline": more.policy}
    count = lambda *data: sum(len(part.label) for part in data)  # noqa: E731
    labels = {
        "offline": count(first),
        "online": count(first, *run.comparisons),
        "more offline": count(first, further),
    }
    return policies, labels


class Draws(NamedTuple):
    """How policies are sampled from, each a program of its own."""

    two: rounds.Draw
    """Of which a pair is picked at random."""
    many: rounds.Draw
    """What the best and the worst are taken of."""
    judged: rounds.Draw
    """Responses to held-out prompts."""


class _Lab:
    """What all seeds share: programs compiled once, and who is told of a fit's way."""

    def __init__(self, config: Config, world: World):
        self.config, self.world = config, world
        self.width = max(len(world.encoder.prompt(text)) for text in world.prompts)
        sizes = (config.pair_samples, config.samples, config.eval_samples)
        programs = {samples: self._draw(samples) for samples in sizes}
        self.draws = Draws(*(programs[samples] for samples in sizes))
        model = world.model
        self.kl = mapped(
            lambda both, asked, given: kl_along(
                model, both[0], asked, given, reference=(model, both[1])
            ).kl.sum(-1),
            rows=ROWS,
        )
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


class Found(NamedTuple):
    """One seed's run."""

    path: dict[str, list[Judged]]
    """Every method's evaluations along its fit (pi0: one)."""
    labels: dict[str, int]
    answers: list[Answer]


def _one_seed(lab: _Lab, seed: int, progress: Progress) -> Found:
    config, world = lab.config, lab.world
    train, held_out = prompts.split(
        world.prompts, train=config.train_prompts, held_out=config.held_out_prompts, seed=seed
    )
    questions = lab.encode(held_out)
    key_run, key_judge = jax.random.split(jax.random.key(seed))
    bar = progress.add_task(f"seed {seed}: three fits", total=3 * lab.points)
    base = world.reward(lab.draws.judged(jax.random.fold_in(key_judge, 1), world.params, questions))
    judge = partial(_judge, jax.random.fold_in(key_judge, 0), lab, questions, base)
    way: list[tuple[Judged, Ragged]] = []

    def told(params: Any) -> None:
        way.append(judge(params))
        progress.advance(bar)

    lab.told = told
    found, labels = align(key_run, world, lab.encode(train), lab.draws, lab.improve)
    start, at_start = judge(world.params)
    # Fits are in the order of `found`, with as many points each.
    parts = {name: way[n * lab.points : (n + 1) * lab.points] for n, name in enumerate(found)}
    path = {name: [judged for judged, _ in part] for name, part in parts.items()}
    answers = _answers(lab, held_out, at_start, parts["online"][-1][1])
    return Found({"pi0": [start], **path}, labels, answers)


def _answers(lab: _Lab, asked: Sequence[str], of_pi0: Ragged, aligned: Ragged) -> list[Answer]:
    """The first draws at the first prompts."""
    count = min(lab.config.shown, len(asked))
    texts, rewards = [], []
    for drawn in (of_pi0, aligned):
        ids, lengths = np.asarray(drawn.ids)[:count, :1], np.asarray(drawn.lengths)[:count, :1]
        texts.append(
            [
                lab.world.encoder.decode(i[0, : n[0]].tolist())
                for i, n in zip(ids, lengths, strict=True)
            ]
        )
        rewards.append(lab.world.reward(ragged(ids, lengths))[:, 0])
    return [
        Answer(asked[n], texts[0][n], texts[1][n], (float(rewards[0][n]), float(rewards[1][n])))
        for n in range(count)
    ]


def _judge(
    key: Any, lab: _Lab, questions: Ragged, base_reward: np.ndarray, params: Any
) -> tuple[Judged, Ragged]:
    """A policy on the held-out prompts, and what it said."""
    drawn = lab.draws.judged(key, params, questions)
    reward = lab.world.reward(drawn)
    kl = lab.kl((params, lab.world.params), questions, drawn)
    difference = reward[:, :, None] - base_reward[:, None, :]
    judged = Judged(
        reward=reward.mean(1),
        kl=kl.mean(1),
        wins=(0.5 + 0.5 * np.sign(difference)).mean((1, 2)),
        length=np.asarray(drawn.lengths).mean(1),
    )
    return judged, drawn


def _stopped(path: Mapping[str, list[Judged]]) -> Judged:
    """See :data:`STOPPED`."""
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


def _figure(paths: Sequence[Mapping[str, list[Judged]]], table: Mapping, target: Path) -> None:
    """Gold reward against KL: the mean way of every fit from pi0, and where it ends."""
    figure, axes = plotting.grid(1, 1, width=4.4, height=3.1)
    ax = axes[0, 0]
    for colour, method in enumerate(METHODS[1:]):
        ways = [[path["pi0"][0], *path[method]] for path in paths]
        kl = np.mean([[j.kl.mean() for j in way] for way in ways], 0)
        reward = np.mean([[j.reward.mean() for j in way] for way in ways], 0)
        ax.plot(kl, reward, color=f"C{colour}", linewidth=1)
        row = table[method]
        ax.errorbar(
            row["kl"].value,
            row["reward"].value,
            xerr=row["kl"].stderr,
            yerr=row["reward"].stderr,
            fmt="o",
            color=f"C{colour}",
            label=NAMES.get(method, method),
        )
    plotting.label(ax, x=r"KL($\pi\,\|\,\pi_0$), nats", y="gold reward", title="Held-out prompts")
    ax.legend()
    plotting.save(figure, target)
