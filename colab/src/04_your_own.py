# %% [markdown]
# # Write your own algorithm
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jax-klrlhf/jax_klrlhf/blob/main/colab/04_your_own.ipynb)
#
# An algorithm is a few pure functions. First a learner of your own on the bandit, then a loss of
# your own on a language model, each beside built-in ones.

# %%
import functools
import importlib.util
import subprocess
import sys

SOURCE = "jax-klrlhf @ git+https://github.com/jax-klrlhf/jax_klrlhf"
if importlib.util.find_spec("jax_klrlhf") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", SOURCE], check=True)

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from jax_klrlhf import bandit, models, training
from jax_klrlhf.core import objectives, pairs
from jax_klrlhf.models import scoring
from jax_klrlhf.training import rounds
from jax_klrlhf.training.rounds import oracle
from jax_klrlhf.training.rounds.compute import mapped
from jax_klrlhf.training.rounds.parts import ragged

SMALL = os.environ.get("KLRLHF_SMALL") == "1"  # continuous integration

# %% [markdown]
# ## A learner
#
# A learner is four functions: `init`, `propose`, `update`, `policy`. `bandit.linear` gives those
# that every learner with a linear reward shares (history, maximum likelihood, ellipsoid), so what
# is left to say is whom it compares and what it deploys. Ours: the main agent against a *tempered*
# copy of itself, halfway back to pi0.

# %%
ETA = 0.3
SEEDS, ROUNDS, BATCH = (4, 4, 8) if SMALL else (64, 24, 16)


def main_policy(setting, state):
    """Gibbs policy of the estimated reward."""
    return jax.nn.log_softmax(setting.ref_log_prob + setting.reward(state.theta) / setting.kl_coef)


def tempered(*, half=0.5):
    def propose(key, setting, state, context):
        main = main_policy(setting, state)
        other = jax.nn.log_softmax(half * main + (1 - half) * setting.ref_log_prob)
        key_one, key_two = jax.random.split(key)
        return bandit.Proposal(
            jax.random.categorical(key_one, main[context]).astype(jnp.int32),
            jax.random.categorical(key_two, other[context]).astype(jnp.int32),
        )

    return bandit.linear(propose, main_policy)


LEARNERS = {
    "ours: tempered": lambda: tempered(),
    "online, greedy": lambda: bandit.greedy(),
    "against pi0": lambda: bandit.greedy_against_reference(),
    "GSHF, enhancer": lambda: bandit.gshf(radius=2.0),
}


def simulate(name):
    def one(key):
        key_problem, key_run = jax.random.split(key)
        problem = bandit.sphere(
            key_problem,
            contexts=16,
            actions=8,
            dim=8,
            hidden=4,
            coverage=0.02,
            bound=3.0,
            kl_coef=ETA,
        )
        run = bandit.simulate(
            key_run, problem, LEARNERS[name](), rounds=ROUNDS, batch=BATCH, record=bandit.record_gap
        )
        return jnp.append(run.record, run.gap)

    return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), SEEDS)))


figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
seen = BATCH * np.arange(1, ROUNDS + 1)
for name in LEARNERS:
    gap = simulate(name)
    mean, error = gap.mean(0), gap.std(0, ddof=1) / SEEDS**0.5
    (line,) = axes.plot(seen, mean[1:], label=name)
    axes.fill_between(
        seen, (mean - 2 * error)[1:], (mean + 2 * error)[1:], color=line.get_color(), alpha=0.2
    )
    print(f"{name:<18} gap {mean[-1]:.4f} ± {error[-1]:.4f}")
axes.set(xscale="log", yscale="log", xlabel="comparisons", ylabel="J(pi*) - J(pi)")
_ = axes.legend()

# %% [markdown]
# ## A toy world
#
# A vocabulary of 13 words; a prompt is a name and what it did first, a response goes on. pi0 is a
# small transformer trained here on sentences in which sad things happen more often than happy ones.
# The gold reward counts happy words less sad words; only the annotator knows it.

# %%
NAMES = ["Ana", "Ben", "Cleo"]
HAPPY, PLAIN = ["laughed", "danced", "sang"], ["walked", "waited", "slept"]
SAD = ["cried", "fell", "left"]
WORDS = ["<end>", *NAMES, *HAPPY, *PLAIN, *SAD]
WORTH = np.array([0, 0, 0, 0, 1, 1, 1, 0, 0, 0, -1, -1, -1], np.float32)
PROB = np.array([2, 2, 2, 4, 4, 4, 5, 5, 5]) / 33  # of the nine verbs
END, LONGEST = 0, 6

model = models.language_model(
    models.ModelConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, layers=1, heads=2,
        kv_heads=2, head_dim=16, max_length=16,
    )
)  # fmt: skip


def stories(count, *, seed):
    """Prompts ``[count, 2]`` and responses ``[count, 1, LONGEST]``, on the host."""
    rng = np.random.default_rng(seed)
    prompts = np.stack([rng.integers(1, 4, count), rng.choice(9, count, p=PROB) + 4], 1)
    length = rng.integers(2, LONGEST, count)
    words = rng.choice(9, (count, LONGEST), p=PROB) + 4
    words = np.where(np.arange(LONGEST) < length[:, None], words, END)
    return (
        ragged(prompts, np.full(count, 2)),
        ragged(words[:, None], (length + 1)[:, None]),
    )


def gold(prompts, responses):
    """Reward ``[B, K]`` in nats."""
    del prompts
    ids, lengths = np.asarray(responses.ids), np.asarray(responses.lengths)
    kept = np.arange(ids.shape[-1]) < lengths[..., None]
    return np.where(kept, WORTH[ids], 0.0).sum(-1).astype(np.float32)


def text(ids, length):
    return " ".join(WORDS[i] for i in np.asarray(ids)[: int(length)])


def train_pi0(*, steps):
    questions, answers = stories(1024, seed=0)
    optimizer = optax.adam(1e-2)
    step = training.make_step(training.tasks.likelihood(model), optimizer)
    carried = training.state.init(jax.random.key(0), model.init(jax.random.key(1)), optimizer)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        at = rng.choice(1024, 128, replace=False)
        picked = jax.tree.map(lambda x, at=at: x[at], (questions, answers))
        carried, _ = step(carried, training.Batch(*picked, weight=np.ones(128, np.float32)))
    return carried.policy


pi0 = train_pi0(steps=20 if SMALL else 200)
draw = rounds.Draw(model=model, samples=4, max_new_tokens=LONGEST, stop=(END,))
held_out, _ = stories(64 if SMALL else 256, seed=1)


def divergence(both, prompts, responses):
    """Sum over tokens of the exact divergence at each: unbiased for KL(pi || pi0)."""
    scores = scoring.score(model, both[0], prompts, responses, reference=(model, both[1]))
    return scores.kl.sum(-1)


kl_of = mapped(divergence, rows=256)


def judge(params):
    """Gold reward and KL(pi || pi0) in nats, on held-out prompts, with standard errors."""
    answers = draw(jax.random.key(7), params, held_out)
    found = (
        gold(held_out, answers).mean(1),
        np.asarray(kl_of((params, pi0), held_out, answers)).mean(1),
    )
    return [(x.mean(), x.std(ddof=1) / len(x) ** 0.5) for x in found]


answers = draw(jax.random.key(2), pi0, held_out)
for row in range(4):
    print(f"{text(held_out.ids[row], 2)} |", text(answers.ids[row, 0], answers.lengths[row, 0]))
print("gold reward of pi0: {:.3f} ± {:.3f}".format(*judge(pi0)[0]))

# %% [markdown]
# ## A loss
#
# A loss is a function of `Scores`: log-probabilities `[batch, responses]` of policy and reference,
# chosen first. Ours is a Bradley-Terry likelihood with a floor: with probability 5 % the annotator
# does not look, so that no single comparison can pull without bound.

# %%
LOSS_ETA = 0.2


def with_floor(scores, floor=0.05):
    margin = LOSS_ETA * (scores.chosen_log_ratio - scores.rejected_log_ratio)
    # log((1 - floor) sigma(m) + floor / 2), in log-space
    return -jnp.logaddexp(
        jnp.log1p(-floor) + jax.nn.log_sigmoid(margin), jnp.log(jnp.asarray(floor / 2))
    )


LOSSES = {
    "ours: floor": with_floor,
    "DPO": functools.partial(objectives.sigmoid, kl_coef=LOSS_ETA),
    "IPO": functools.partial(objectives.ipo, kl_coef=LOSS_ETA),
}

# %% [markdown]
# The annotator swaps one label in ten. All losses see the same comparisons.

# %%
questions, _ = stories(64 if SMALL else 512, seed=2)
compared = rounds.collect(
    jax.random.key(3),
    pi0,
    prompts=questions,
    sampler=rounds.main_agent(draw),
    reward=rounds.known(gold),
    pair_rule=pairs.sampled,
    oracle=oracle.bradley_terry(gold, noise=0.1),
)
fitting = rounds.Fitting(optimizer=optax.adam(3e-3), steps=4 if SMALL else 80, batch_size=64)
found = {"pi0": judge(pi0)}
for name, loss in LOSSES.items():
    outcome = rounds.iterate(
        jax.random.key(4),
        pi0,
        prompts=questions,
        rounds=0,
        offline=compared,
        sampler=rounds.main_agent(draw),
        reward=rounds.known(gold),
        pair_rule=pairs.best_worst,
        oracle=oracle.bradley_terry(gold),
        improve=rounds.preference(model, loss, fitting=fitting, kl_coef=LOSS_ETA, rows=256),
    )
    found[name] = judge(outcome.policy)

figure, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
for name, ((reward, error), (kl, kl_error)) in found.items():
    axes.errorbar(kl, reward, 2 * error, 2 * kl_error, marker="o", capsize=2, label=name)
    print(f"{name:<12} gold {reward:.3f} ± {error:.3f}  KL {kl:.3f} ± {kl_error:.3f}")
axes.set(xlabel="KL(pi || pi0), nats", ylabel="gold reward", title="Two standard errors")
_ = axes.legend()

# %% [markdown]
# Losses differ in the scale of their margins, so a fair comparison sweeps `kl_coef` and compares
# frontiers, as the notebook before does. A learner that you keep goes through
# `tests/bandit/test_conformance.py`; a loss through `tests/core/test_objectives.py`.
