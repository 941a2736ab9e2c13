"""Forty tiny runs: no healthy one is warned of, and of every broken one the right thing is said.

Healthy runs differ in seed, learning rate, objective and task; broken ones are what users do: a
learning rate far too large or too small, everything frozen, pairs of identical responses, data
that are not finite.
"""

import io
import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from jax_klrlhf.core import objectives
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.training import evaluate, health, loop, reference, state, step, tasks
from tests.training import toy

MODEL = toy.language_model(dim=16)
STEPS, END = 60, 3
WARNING = re.compile(r"warning (\w+):")


def pairs(seed):
    """Preferences that can be learned: the chosen responses come from another part of the ids."""
    found = []
    for number in range(4):
        given = toy.batch(100 * seed + number)
        ids = given.responses.ids.copy()
        ids[:, 0], ids[:, 1] = ids[:, 0] % 8, 8 + ids[:, 1] % 8
        noise = np.random.default_rng([seed, number]).random(len(ids)) < 0.1
        ids[noise] = ids[noise][:, ::-1]
        lengths = np.maximum(given.responses.lengths, 1)
        found.append(given._replace(responses=Ragged(ids, lengths)))
    return found


def rewarded(params, prompts, responses):
    """A reward model on the toy: the last hidden state of prompt and response, by a head."""
    prefix = MODEL.prefill(params["model"], prompts)
    hidden = MODEL.extend(params["model"], prefix, responses.ids)
    last = jnp.maximum(responses.lengths - 1, 0)[..., None, None]
    return jnp.take_along_axis(hidden, last, 2)[:, :, 0] @ params["head"]


def optimizer():
    """One program for all learning rates: the rate is part of the state."""
    return optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)


@cache
def compiled(kind):
    losses = {
        "sigmoid": partial(objectives.sigmoid, kl_coef=0.1),
        "ipo": partial(objectives.ipo, kl_coef=0.1),
    }
    if kind in losses:
        task = tasks.preference(MODEL, losses[kind], report_coef=0.1)
    elif kind == "sft":
        task = tasks.likelihood(MODEL)
    else:
        task = tasks.bradley_terry_reward(rewarded)
    return task, step.make_step(task, optimizer())


SCORE = reference.make_log_prob(MODEL)
MEASURE = evaluate.make_divergence(MODEL, samples=4, max_new_tokens=8, stop=(END,))


def warnings_of(kind, seed, rate, change=lambda batch: batch):
    """The names of what a run is warned of, and what stopped it."""
    task, train = compiled(kind)
    params = MODEL.init(jax.random.key(seed))
    pi0 = params
    if kind == "reward":
        params = {"model": params, "head": jnp.zeros(16)}
    batches = [change(batch) for batch in pairs(seed)]
    if kind in ("sigmoid", "ipo"):
        # What the data hold there already, 0 or not finite, is added.
        scored = [np.asarray(SCORE(pi0, batch)) for batch in batches]
        batches = [
            batch._replace(ref_log_prob=known + 0 * batch.ref_log_prob)
            for batch, known in zip(batches, scored, strict=True)
        ]
    carried = state.init(jax.random.key(1), params, optimizer())
    hyper = carried.opt_state.hyperparams | {"learning_rate": jnp.float32(rate)}
    carried = carried._replace(opt_state=carried.opt_state._replace(hyperparams=hyper))

    def divergence(carried):
        return MEASURE(jax.random.key(7), carried.policy, pi0, [batches[0].prompts])

    console = Console(file=io.StringIO(), width=10_000)
    found = []
    try:
        loop.train(
            train, carried, loop.Repeat(batches), steps=STEPS, names=task.names, log_every=5,
            evaluate=divergence if kind in ("sigmoid", "ipo") else None, console=console,
            limits=health.Limits(patience=20),
        )  # fmt: skip
    except health.Stopped as stopped:
        found = [str(stopped)]
    return sorted(set(WARNING.findall(console.file.getvalue()))) + found


HEALTHY = [
    *[("sigmoid", seed, rate) for seed in range(4) for rate in (1e-4, 1e-3, 1e-2)],
    *[("ipo", seed, rate) for seed in range(4) for rate in (1e-3,)],
    *[("sft", seed, rate) for seed in range(4) for rate in (1e-3, 1e-2)],
    *[("reward", seed, rate) for seed in range(4) for rate in (1e-3,)],
]


def same(batch):
    """Pairs of identical responses."""
    ids, lengths = batch.responses
    return batch._replace(
        responses=Ragged(np.repeat(ids[:, :1], 2, 1), np.repeat(lengths[:, :1], 2, 1))
    )


def spoiled(batch):
    return batch._replace(ref_log_prob=np.full_like(batch.ref_log_prob, np.nan))


BROKEN = [
    *[("sigmoid", seed, 1e6, None, {"vanished_gradient", "exploded_kl"}) for seed in range(2)],
    *[("sigmoid", seed, 3.0, None, {"exploded_kl"}) for seed in range(2)],
    *[("ipo", 0, 1e6, None, {"exploded_kl"})],
    *[("sigmoid", seed, 0.0, None, {"stuck_at_ln2"}) for seed in range(2)],
    ("sigmoid", 0, 1e-3, same, {"stuck_at_ln2"}),
    ("reward", 0, 1e-3, same, {"constant_reward"}),
    ("reward", 1, 0.0, None, {"constant_reward"}),
    ("reward", 0, 1e6, None, {"exploded_loss"}),
    ("sigmoid", 0, 1e-3, spoiled, {"step 5: the loss or the gradient was not finite"}),
]


def test_the_table_has_forty_rows():
    assert (len(HEALTHY), len(BROKEN)) == (28, 12)


@pytest.mark.parametrize(("kind", "seed", "rate"), HEALTHY)
def test_a_healthy_run_is_not_warned_of(kind, seed, rate):
    assert warnings_of(kind, seed, rate) == []


@pytest.mark.parametrize(("kind", "seed", "rate", "change", "expected"), BROKEN)
def test_a_broken_run_is_told_what_is_wrong(kind, seed, rate, change, expected):
    found = warnings_of(kind, seed, rate, change or (lambda batch: batch))
    missing = {name for name in expected if not any(seen.startswith(name) for seen in found)}
    assert not missing, found
