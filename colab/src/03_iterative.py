# %% [markdown]
# # Iterative alignment and the frontier
#
# Offline DPO learns from what pi0 said. Online iterations (GSHF, arXiv 2312.11456) draw from the
# policy so far, ask about a pair that tells, and fit again from pi0 on all data. At an equal number
# of labels, where do both end in the plane of reward and KL?

# %%
import os

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from rich.console import Console

from jax_klrlhf import figures, toy
from jax_klrlhf.core import pairs
from jax_klrlhf.training import rounds
from jax_klrlhf.training.rounds import oracle

plt.rcParams.update(figures.STYLE)
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


def of_pi0(seed):
    """Labelled pairs of pi0."""
    return rounds.collect(
        jax.random.fold_in(jax.random.key(3), seed),
        pi0,
        prompts=train,
        sampler=rounds.main_agent(two),
        reward=rounds.known(gold),  # not looked at: the pair is drawn at random
        pair_rule=pairs.sampled,
        oracle=annotator,
    )


SEEDS = range(2 if SMALL else 3)
offline = [of_pi0(seed) for seed in SEEDS]
print(len(offline[0].label), "labelled pairs of pi0")


def portion(number):
    """Each round its own part of the prompts."""
    count = LABELS // ROUNDS
    at = (np.arange(count) + max(number - 1, 0) * count) % LABELS
    return jax.tree.map(lambda x: x[at], train)


def run(method, eta, seed):
    shared = {
        "sampler": rounds.main_agent(draw),
        "reward": belief,
        "oracle": annotator,
        # Best and worst by what is believed; two draws while that ranks none.
        "pair_rule": pairs.otherwise(pairs.best_worst, pairs.sampled),
        "improve": rounds.dpo(model, kl_coef=eta, fitting=fitting, rows=256),
        "console": Console(quiet=True),  # else a line for each round
    }
    key = jax.random.fold_in(jax.random.key(4), seed)
    if method == "offline DPO":
        return rounds.iterate(key, pi0, prompts=train, rounds=0, offline=offline[seed], **shared)
    if method == "online, enhancer":
        shared["pair_rule"] = pairs.enhancer(kl_coef=eta)
    return rounds.iterate(key, pi0, prompts=portion, rounds=ROUNDS, **shared)


# %% [markdown]
# ## The frontier
#
# One colour for each method; at each coefficient as many small points as training seeds, and their
# mean. The same number of labels everywhere.

# %%
ETAS = (0.2,) if SMALL else (0.1, 0.3, 1.0)
METHODS = ("offline DPO", "online, best and worst", "online, enhancer")
figure, axes = plt.subplots(figsize=(5, 3.6), layout="constrained")
for colour, method in enumerate(METHODS):
    # [coefficients, seeds, (gold, KL), (value, standard error over prompts)]
    found = np.array([[judge(run(method, eta, seed).policy) for seed in SEEDS] for eta in ETAS])
    gold_reward, nats = found[..., 0, 0], found[..., 1, 0]
    axes.plot(nats.ravel(), gold_reward.ravel(), ".", color=f"C{colour}", alpha=0.45)
    axes.plot(nats.mean(1), gold_reward.mean(1), "o-", color=f"C{colour}", label=method)
    for eta, gold_of, kl_of, point in zip(ETAS, gold_reward, nats, found, strict=True):
        over_seeds = gold_of.std(ddof=1) / len(SEEDS) ** 0.5
        print(
            f"{method:<24} eta {eta:<4g} labels {LABELS}  KL {kl_of.mean():.2f}  gold "
            f"{gold_of.mean():.3f} ± {over_seeds:.3f} over seeds, each ± {point[0, 0, 1]:.3f} "
            "over prompts"
        )
base = judge(pi0)[0]
axes.axhline(base[0], color="grey", ls=":", label=r"$\pi_0$")
axes.set(xlabel=r"$\mathrm{KL}(\pi\,\|\,\pi_0)$, nats", ylabel="gold reward, held-out prompts")
_ = axes.legend()

# %% [markdown]
# Two errors are at work. Over *prompts* the error is small and is shared by all points, which are
# judged on the same prompts. Over *training seeds*, the luck of labels and fits, it is what the
# small points show; with three of them it is itself hardly known, and methods whose points mix are
# not told apart here. `experiments/frontier` does this with a pretrained model, more methods and
# seeds, intervals that hold both errors, and says which of the paper's statements hold.
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
