"""Practice panel: align a language model to a gold reward, offline and then online.

Draw responses from pi0, let a Bradley-Terry annotator label pairs by the gold reward, fit DPO
(*offline*); then draw from that policy, label the best and the worst of n by gold, and fit DPO
again from pi0 on all data (*online*, one iteration of arXiv 2312.11456, section 5). *More offline*
spends the online round's labels on further pairs from pi0: the same number of labels, no
exploration. Every fit takes the same number of optimizer steps and the same kl_coef.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jaxtyping import Float, Key
from rich.console import Console
from rich.progress import Progress

from experiments import prompts
from experiments.quickstart.world import World
from jax_klrlhf import results
from jax_klrlhf.core import bradley_terry, objectives, pairs
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.errors import InputError
from jax_klrlhf.models import sampling, scoring
from jax_klrlhf.training import Batch, make_train_step, state
from jax_klrlhf.training.step import TrainStep

METHODS = ("pi0", "offline", "more offline", "online", "online, no larger KL")


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
    trainer = _trainer(config, world)
    paths = [_one_seed(config, world, trainer, seed, progress) for seed in seeds]
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


def collect(
    key: Key[jax.Array, ""],
    world: World,
    params: Any,
    prompt_texts: list[str],
    *,
    rule: Any,
    samples: int,
    new_tokens: int,
) -> Batch:
    """Responses from a policy, paired by a rule and labelled by the gold annotator.

    Of the rows that come back, responses are ``[N, 2, C]``, the preferred one first, with their
    log-probabilities under pi0. Prompts whose responses all equal each other make no pair.
    """
    key_sample, key_pair, key_label = jax.random.split(key, 3)
    questions = world.encode(prompt_texts)
    drawn = draw(key_sample, world, params, questions, samples=samples, new_tokens=new_tokens)
    reward = jnp.asarray(world.reward(drawn))
    pair = rule(key_pair, reward, where=pairs.distinct(drawn.ids))
    at = lambda x, index: jnp.take_along_axis(x, index[:, None], axis=1)[:, 0]  # noqa: E731
    margin = at(reward, pair.first) - at(reward, pair.second)
    first_wins = bradley_terry.sample(key_label, margin)
    order = jnp.where(
        first_wins[:, None],
        jnp.stack([pair.first, pair.second], 1),
        jnp.stack([pair.second, pair.first], 1),
    )
    answers = Ragged(
        jnp.take_along_axis(drawn.ids, order[..., None], axis=1),
        jnp.take_along_axis(drawn.lengths, order, axis=1),
    )
    rows = Batch(
        questions,
        answers,
        weight=pair.valid.astype(jnp.float32),
        ref_log_prob=_log_prob(world.model, world.params, questions, answers),
    )
    kept = np.flatnonzero(np.asarray(pair.valid))
    # On the host, where picking the rows of a step costs nothing.
    return jax.tree.map(lambda x: np.asarray(x)[kept], rows)


def draw(
    key: Key[jax.Array, ""],
    world: World,
    params: Any,
    questions: Ragged,
    *,
    samples: int,
    new_tokens: int,
) -> Ragged:
    """``samples`` responses to every prompt, ids ``[B, K, C]``."""
    return sampling.generate(
        key,
        world.model,
        params,
        questions,
        samples=samples,
        max_new_tokens=new_tokens,
        stop=(world.encoder.end,),
        pad_id=world.pad_id,
    ).responses


def _one_seed(
    config: Config, world: World, trainer: "_Trainer", seed: int, progress: Progress
) -> dict[str, list[Judged]]:
    """Every method's evaluations along its fit (pi0: one)."""
    train, held_out = prompts.split(
        world.prompts, train=config.train_prompts, held_out=config.held_out_prompts, seed=seed
    )
    key_offline, key_more, key_online, key_fit, key_judge = jax.random.split(
        jax.random.key(seed), 5
    )
    bar = progress.add_task(f"seed {seed}", total=3 * config.steps)

    def gather(key, params, rule, samples):
        return collect(
            key,
            world,
            params,
            train,
            rule=rule,
            samples=samples,
            new_tokens=config.new_tokens,
        )

    questions = world.encode(held_out)
    base = draw(
        jax.random.fold_in(key_judge, 1),
        world,
        world.params,
        questions,
        samples=config.eval_samples,
        new_tokens=config.new_tokens,
    )
    base_reward = world.reward(base)

    def judge(params) -> Judged:
        return _judge(key_judge, config, world, params, questions, base_reward)

    def fit(data):
        return _fit(key_fit, config, world, trainer, data, judge, lambda: progress.advance(bar))

    first = gather(key_offline, world.params, pairs.sampled, 2)
    path = {"pi0": [judge(world.params)]}
    path["offline"], policy = fit(first)
    more = gather(key_more, world.params, pairs.sampled, 2)
    path["more offline"], _ = fit(_join(first, more))
    best_and_worst = gather(key_online, policy, pairs.best_worst, config.samples)
    path["online"], _ = fit(_join(first, best_and_worst))
    return path


class _Trainer(NamedTuple):
    """One compiled step for every fit of every seed."""

    optimizer: optax.GradientTransformation
    step: TrainStep


def _trainer(config: Config, world: World) -> _Trainer:
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, max(1, config.steps // 10), config.steps
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    def loss(scores: objectives.Scores) -> jax.Array:
        return objectives.sigmoid(
            scores.chosen_log_ratio, scores.rejected_log_ratio, kl_coef=config.kl_coef
        )

    return _Trainer(
        optimizer, make_train_step(world.model, optimizer, loss, kl_coef=config.kl_coef)
    )


def _fit(key, config: Config, world: World, trainer: _Trainer, data: Batch, judge, advance):
    """DPO from pi0: evaluations along the way, and the final parameters."""
    current = state.init(key, world.params, trainer.optimizer)
    order = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    count = data.weight.shape[0]
    stops = set(np.linspace(0, config.steps, config.evaluations + 1)[1:].astype(int).tolist())
    judged, queue = [], np.zeros(0, np.int64)
    for done in range(1, config.steps + 1):
        while queue.size < config.batch:
            queue = np.concatenate([queue, order.permutation(count)])
        chosen, queue = queue[: config.batch], queue[config.batch :]
        current, _ = trainer.step(current, jax.tree.map(lambda x, at=chosen: x[at], data))
        if done in stops:
            judged.append(judge(current.policy))
        advance()
    return judged, current.policy


def _judge(key, config: Config, world: World, params, questions: Ragged, base_reward) -> Judged:
    drawn = draw(
        jax.random.fold_in(key, 0),
        world,
        params,
        questions,
        samples=config.eval_samples,
        new_tokens=config.new_tokens,
    )
    reward = world.reward(drawn)
    kl = np.asarray(_kl(world.model, params, world.params, questions, drawn))
    difference = reward[:, :, None] - base_reward[:, None, :]
    return Judged(
        reward=reward.mean(1),
        kl=kl.mean(1),
        wins=(0.5 + 0.5 * np.sign(difference)).mean((1, 2)),
        length=np.asarray(drawn.lengths).mean(1),
    )


def _kl_of_responses(model, params, base, questions, answers):
    """KL(pi || pi0) of each response ``[B, K]``: exact at each token, on the policy's own draws."""
    scores = scoring.score(model, params, questions, answers, reference=(model, base))
    assert scores.kl is not None  # a reference was given
    return scores.kl.sum(-1)


_kl = jax.jit(_kl_of_responses, static_argnums=0)
_log_prob = jax.jit(scoring.log_prob, static_argnums=0)


def _join(first: Batch, second: Batch) -> Batch:
    return jax.tree.map(lambda *parts: np.concatenate(parts), first, second)


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
