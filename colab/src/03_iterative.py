# %% [markdown]
# # Iterative alignment and the frontier
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jax-klrlhf/jax_klrlhf/blob/main/colab/03_iterative.ipynb)
#
# Offline DPO learns from what pi0 said. Online iterations (GSHF, arXiv 2312.11456) draw from the
# policy so far, ask about a pair that tells, and fit again from pi0 on all data. At an equal number
# of labels, where do both end in the plane of reward and KL?

# %%
import importlib.util
import subprocess
import sys

SOURCE = "jax-klrlhf @ git+https://github.com/jax-klrlhf/jax_klrlhf"
if importlib.util.find_spec("jax_klrlhf") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", SOURCE], check=True)

# %%
import os

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax

from jax_klrlhf import toy
from jax_klrlhf.core import pairs
from jax_klrlhf.training import rounds
from jax_klrlhf.training.rounds import oracle
from jax_klrlhf.training.rounds.parts import ragged

SMALL = os.environ.get("KLRLHF_SMALL") == "1"  # continuous integration

# %% [markdown]
# ## A toy world
#
# It comes with the library (`jax_klrlhf.toy`). A vocabulary of 13 words; a prompt is a name and
# what it did first, a response goes on. pi0 is a small transformer trained here on sentences in
# which sad things happen more often than happy ones. The gold reward counts happy words less sad
# words; only the annotator knows it.

# %%
world = toy.world(steps=20 if SMALL else 200)
model, pi0, gold, draw = world.model, world.pi0, world.gold, world.draw(4)
held_out = world.prompts(64 if SMALL else 256, seed=1)


def text(ids, length):
    return toy.decode(np.asarray(ids)[: int(length)])


def judge(params):
    """Gold reward and KL(pi || pi0) in nats, on held-out prompts, with standard errors."""
    found = world.evaluate(params, count=len(held_out.lengths))
    return [(found[name].value, found[name].stderr) for name in ("reward", "kl")]


answers = draw(jax.random.key(2), pi0, held_out)
for row in range(4):
    print(f"{text(held_out.ids[row], 2)} |", text(answers.ids[row, 0], answers.lengths[row, 0]))
print("gold reward of pi0: {:.3f} ± {:.3f}".format(*judge(pi0)[0]))

# %% [markdown]
# ## Every part is a value
#
# A round is: sample, score, pair, label, believe, fit. The annotator labels by gold with noise of
# Bradley-Terry; the learner believes a linear reward on pi0's frozen hidden states, fitted by the
# bandit's own maximum likelihood, with the bandit's own ellipsoid.

# %%
LABELS, ROUNDS = (64, 2) if SMALL else (512, 2)
train = world.prompts(LABELS, seed=2)
two = world.draw(2)
features = rounds.hidden_features(model, pi0, scale=8.0, rows=256)
annotator = oracle.bradley_terry(gold)


belief = rounds.linear(features, dim=32, ridge=0.01, radius=0.3)
# All fits share it, and so one compiled step: the coefficient of the loss is data.
fitting = rounds.Fitting(optimizer=optax.adam(3e-3), steps=4 if SMALL else 80, batch_size=64)
offline = rounds.collect(
    jax.random.key(3),
    pi0,
    prompts=train,
    sampler=rounds.main_agent(two),
    reward=rounds.known(gold),  # not looked at: the pair is drawn at random
    pair_rule=pairs.sampled,
    oracle=annotator,
)
print(len(offline.label), "labelled pairs of pi0")


def portion(number):
    """Each round its own part of the prompts."""
    count = LABELS // ROUNDS
    at = (np.arange(count) + max(number - 1, 0) * count) % LABELS
    return ragged(train.ids[at], train.lengths[at])


def run(method, eta):
    shared = {
        "sampler": rounds.main_agent(draw),
        "reward": belief,
        "oracle": annotator,
        # Best and worst by what is believed; two draws while that ranks none.
        "pair_rule": pairs.otherwise(pairs.best_worst, pairs.sampled),
        "improve": rounds.dpo(model, kl_coef=eta, fitting=fitting, rows=256),
    }
    key = jax.random.key(4)
    if method == "offline DPO":
        return rounds.iterate(key, pi0, prompts=train, rounds=0, offline=offline, **shared)
    if method == "online, enhancer":
        shared["pair_rule"] = pairs.enhancer(kl_coef=eta)
    return rounds.iterate(key, pi0, prompts=portion, rounds=ROUNDS, **shared)


# %% [markdown]
# ## The frontier
#
# One point for each coefficient; the same number of labels everywhere.

# %%
ETAS = (0.2,) if SMALL else (0.1, 0.3, 1.0)
METHODS = ("offline DPO", "online, best and worst", "online, enhancer")
figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
for method in METHODS:
    outcomes = [run(method, eta) for eta in ETAS]
    found = np.array([judge(outcome.policy) for outcome in outcomes])
    (reward, error), (kl, kl_error) = found[:, 0].T, found[:, 1].T
    axes.errorbar(kl, reward, 2 * error, 2 * kl_error, marker="o", capsize=2, label=method)
    for eta, outcome, point in zip(ETAS, outcomes, found, strict=True):
        labels = sum(len(data.label) for data in outcome.comparisons) or len(offline.label)
        gold_reward, nats = (f"{mean:.3f} ± {error:.3f}" for mean, error in point)
        print(f"{method:<24} eta {eta:<4g} labels {labels}  gold {gold_reward}  KL {nats}")
base = judge(pi0)[0]
axes.axhline(base[0], color="grey", ls=":", label="pi0")
axes.set(
    xlabel="KL(pi || pi0), nats",
    ylabel="gold reward",
    title="Held-out prompts, two standard errors",
)
_ = axes.legend()

# %% [markdown]
# One seed and a toy: read the error bars, not the order of the points. `experiments/frontier` does
# this with a pretrained model, more methods and seeds, and says which of the paper's statements
# hold.
#
# ## Killed, and going on
#
# With `output=` every phase is left on disk. A run that was killed goes on from the phase it was
# in.

# %%
import tempfile

with tempfile.TemporaryDirectory() as folder:
    parts = {
        "prompts": portion,
        "sampler": rounds.main_agent(draw),
        "reward": rounds.known(gold),
        "oracle": annotator,
        "pair_rule": pairs.otherwise(pairs.best_worst, pairs.sampled),
        "improve": rounds.dpo(model, kl_coef=0.2, fitting=fitting, rows=256),
        "output": folder,
    }
    rounds.iterate(jax.random.key(5), pi0, rounds=1, **parts)
    again = rounds.iterate(jax.random.key(5), pi0, rounds=2, **parts)
    print("computed by the second call:", *again.computed)

# %% [markdown]
# From the shell: `klrlhf iterate --model ... --prompts ... --reward ... --output run`.
