"""What cells share: the place, the programs, the proxy, and what a cell on disk was made of."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from rich.progress import Progress

from experiments.frontier import cells, evaluate, judges, methods, proxy
from experiments.frontier import world as worlds
from experiments.frontier.options import Config, Sizes
from experiments.quickstart import world as quickstart
from jax_klrlhf.errors import InputError
from jax_klrlhf.training import rounds
from jax_klrlhf.training.rounds import journal


def place(config: Config, progress: Progress) -> worlds.Place:
    """The files that were named, or the embedded world."""
    sizes = config.sizes
    if config.model and config.prompts and config.gold and config.ood:
        other = worlds.other_prompts(config.ood, column=config.ood_column)
        both = judges.build(config.gold)
        world = quickstart.real(config.model, config.prompts, config.gold, judge=both.gold)
        second, accuracy = both.second, both.accuracy
    else:
        second = accuracy = None
        world, other = worlds.embedded(
            stories=sizes.stories, steps=sizes.sft_steps, progress=progress
        )
    return worlds.build(
        world,
        other,
        gold_scale=sizes.gold_scale,
        max_prompt_tokens=sizes.max_prompt_tokens,
        second=second,
        accuracy=accuracy,
    )


def laboratory(config: Config, place: worlds.Place, *, output: Path) -> cells.Lab:
    """Everything that cells share, compiled when first used."""
    sizes, world = config.sizes, place.world
    draws: dict[int, rounds.Draw] = {}

    def draw(samples: int) -> rounds.Draw:
        # One object to a number of samples: each compiles its own program.
        if samples not in draws:
            draws[samples] = rounds.Draw(
                model=world.model,
                samples=samples,
                max_new_tokens=sizes.new_tokens,
                stop=(world.encoder.end,),
                pad_id=world.pad_id,
                rows=max(1, 2048 // samples),
            )
        return draws[samples]

    # Pieces that even the smallest set fills, or each size would be compiled for itself.
    rows = min(64, sizes.train_prompts, sizes.held_out_prompts, sizes.labels // (2 * sizes.rounds))
    sample = place.encode(world.prompts[: sizes.held_out_prompts])
    fittings = {rate: fitting_of(sizes, sizes.steps, rate) for rate in config.rates}
    chained = sizes.steps // sizes.rounds
    short = {rate: fitting_of(sizes, chained, rate) for rate in config.rates}
    middle = config.rates[len(config.rates) // 2]
    if config.proxy == "linear":
        features, dim = proxy.whitened_features(
            world.model,
            world.params,
            sample,
            draw(max(2, sizes.eval_samples))(jax.random.key(21), world.params, sample),
            tokens=sizes.tokens,
            hidden=sizes.hidden,
            rows=rows,
        )
        reward = rounds.linear(features, dim=dim, ridge=sizes.ridge, radius=sizes.radius)
    else:
        reward = proxy.reward_model(
            world.model, world.params, sample, fitting=fittings[middle], rows=rows
        )
    parts = methods.Parts(
        model=world.model,
        pi0=world.params,
        reward=reward,
        oracle=rounds.oracle.bradley_terry(place.judge),
        fitting=fittings[middle],
        short_fitting=short[middle],
        rows=rows,
        explore=draw(sizes.explore),
        propose=draw(sizes.propose * sizes.rounds),
        propose_step=draw(sizes.propose),
        chain=sizes.rounds,
        labelling=rounds.rejection.LABELLINGS[config.rejection_labels],
        rounds=sizes.rounds,
    )

    def seed(number: int) -> cells.Seed:
        return cells.Seed(
            place, parts, draw(sizes.eval_samples), draw(2),
            train=sizes.train_prompts, held_out=sizes.held_out_prompts, labels=sizes.labels,
            seed=number,
        )  # fmt: skip

    # Too few prompts, or ones that do not fit the model, are found out before any fit.
    seed(config.first_seed)
    if place.width + sizes.new_tokens > world.model.max_length:
        raise InputError(
            f"prompts of {place.width} tokens and --sizes.new-tokens {sizes.new_tokens} exceed "
            f"the model's context of {world.model.max_length}: lower one of them."
        )
    identity = {
        "sizes": dataclasses.asdict(sizes),
        "pi0": journal.digest(world.params)[:16],
        "prompts": journal.digest(place.encode(world.prompts))[:16],
        "other prompts": journal.digest(place.encode(place.other))[:16],
        "gold reward": journal.digest(_weights(place))[:16],
        "second judge": place.second is not None,
        "rates": config.rates,
        "labels of RSO's pairs": config.rejection_labels,
    }
    if config.proxy != "linear":
        identity["proxy"] = config.proxy
    at_rate = {
        rate: parts._replace(fitting=fittings[rate], short_fitting=short[rate])
        for rate in config.rates
    }
    return cells.Lab(
        place, at_rate, evaluate.measure(world.model, rows=rows), draw(sizes.eval_samples), seed,
        sweeps=config.sweeps(), output=output, identity=identity,
    )  # fmt: skip


def fitting_of(sizes: Sizes, steps: int, rate: float) -> rounds.Fitting:
    """One fit of so many optimizer steps."""
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(1, steps // 10), steps)
    # The rate is a number in the optimizer's state: one program serves all.
    scale = optax.inject_hyperparams(optax.scale)(step_size=rate)
    return rounds.Fitting(
        optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adam(shape), scale),
        steps=steps,
        batch_size=sizes.batch,
        # What a fit reports is of its last quarter, near the policy that it comes to.
        log_every=max(1, steps // 4),
    )


def _weights(place: worlds.Place) -> dict[str, Any]:
    return {word: np.float64(weight) for word, weight in place.world.gold.weights.items()}
