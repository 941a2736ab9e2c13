"""The third world: a pretrained model at default settings, its gold reward a bag of words.

Every loss trains the same network from the same start on its own draws, one step a draw, with one
learning rate and one coefficient; gold reward and KL are estimated on held-out prompts. Whether a
run diverged is what the library's own health check says of the evaluation.

Axes: ``B`` prompts, ``K`` responses.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import Progress

from experiments import prompts as stories
from experiments.gold import fit_sentiment
from experiments.objectives.methods import METHODS
from jax_klrlhf import models
from jax_klrlhf.core import sequence
from jax_klrlhf.data import tokenize
from jax_klrlhf.results import Metric
from jax_klrlhf.training import health, optimizers, rounds
from jax_klrlhf.training.evaluate import kl_along
from jax_klrlhf.training.rounds import oracle
from jax_klrlhf.training.rounds.compute import mapped
from jax_klrlhf.training.rounds.parts import ragged

HELD_OUT = 32
LONGEST = 24
"""Tokens of a prompt; longer ones are left out."""
BEST_OF = "best of K (no training)"


def panel(config: Any, progress: Progress) -> dict[str, dict[str, np.ndarray]]:
    """Of every method: reward over pi0's, KL, and the share of runs that were said to diverge."""
    loaded = models.load(config.model, param_dtype=jnp.float32, dtype=jnp.float32)
    assert loaded.tokenizer is not None
    encoder = tokenize.encoder(loaded.tokenizer)
    judge = oracle.texts(fit_sentiment(config.sentiment), encoder.decode)
    rows = [encoder.prompt(text) for text in stories.first_sentences(config.prompts)]
    rows = [row for row in rows if len(row) <= LONGEST]
    size = {
        "model": loaded.model,
        "max_new_tokens": config.model_tokens,
        "stop": models.stop_tokens(loaded.tokenizer, loaded.generation),
    }
    draw = rounds.Draw(samples=config.samples, rows=HELD_OUT, **size)
    known = lambda asked, given: rounds.Scored(  # noqa: E731
        np.asarray(judge(asked, given), np.float32),
        np.zeros(np.asarray(given.lengths).shape, np.float32),
    )

    def spent(both: Any, asked: Any, given: Any) -> Any:
        policy, base = both
        return kl_along(loaded.model, policy, asked, given, reference=(loaded.model, base)).kl.sum(
            -1
        )

    kl = mapped(spent, rows=HELD_OUT)
    chosen = {name: METHODS[name] for name in config.model_methods if config.only in name}
    task = progress.add_task("model", total=len(chosen) * config.model_seeds)
    found: dict[str, dict[str, list[float]]] = {}
    fitting = rounds.Fitting(
        optimizer=optimizers.adamw(config.model_learning_rate, clip=1.0),
        steps=1,
        batch_size=config.model_prompts,
    )
    improves = {
        name: rounds.on_policy(
            loaded.model,
            draw,
            method.make(jnp.float32(config.model_kl_coef)),
            fitting=fitting,
            iterations=config.model_steps,
            prompts=config.model_prompts,
            rows=HELD_OUT,
        )
        for name, method in chosen.items()
    }

    def add(name: str, **values: float) -> None:
        for metric, value in values.items():
            found.setdefault(name, {}).setdefault(metric.replace("_", " "), []).append(value)

    for seed in range(config.model_seeds):
        order = np.random.default_rng([config.seed, seed]).permutation(len(rows))
        picked = sequence.pad([rows[i] for i in order[: HELD_OUT + 256]], length=LONGEST)
        ids, lengths = (np.asarray(x) for x in picked)
        held_out, asked = (
            ragged(ids[at], lengths[at]) for at in (slice(HELD_OUT), slice(HELD_OUT, None))
        )
        key = jax.random.fold_in(jax.random.key(config.seed), seed)
        key_judge, key_run = jax.random.split(key)
        start = loaded.params
        before = np.asarray(judge(held_out, draw(key_judge, start, held_out)), np.float64)
        # The best of K of pi0's: a group's own KL is not observed, so its bound stands in.
        add(
            BEST_OF,
            reward=float((before.max(1) - before.mean(1)).mean()),
            KL=float(np.log(config.samples) - (config.samples - 1) / config.samples),
        )
        for name, improve in improves.items():
            situation = rounds.Situation(
                policies=rounds.Policies(start, start, start, (start,)),
                start=start,
                data=rounds.Mixture([], None),
                prompts=asked,
                score=known,
                folder=None,
            )
            policy = improve(key_run, situation).params
            given = draw(key_judge, policy, held_out)
            after = np.asarray(judge(held_out, given), np.float64)
            divergence = np.asarray(kl((policy, start), held_out, given), np.float64).mean(1)
            metric = Metric(
                float(divergence.mean()), float(divergence.std(ddof=1) / HELD_OUT**0.5), HELD_OUT
            )
            tokens = Metric(float(np.asarray(given.lengths).mean()))
            line = {"eval/kl/ref": metric, "eval/length/sampled": tokens}
            _, said = health.observe(health.Seen(), config.model_steps, line, health.Limits())
            add(
                name,
                reward=float(after.mean() - before.mean()),
                KL=metric.value,
                tokens=tokens.value,
                gap=-float((after - before).mean() - config.model_kl_coef * metric.value),
                diverged_by_the_health_check=float(bool(said)),
            )
            progress.advance(task)
    return {
        name: {metric: np.array(values)[None] for metric, values in columns.items()}
        for name, columns in found.items()
    }
