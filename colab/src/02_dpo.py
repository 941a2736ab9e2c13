# %% [markdown]
# # DPO on a small model
#
# A language model learns from comparisons of its own responses, by the bandit's likelihood: the
# implicit reward $\eta \log \pi / \pi_0$ takes the place of $\langle\theta, \phi\rangle$. The model
# is trained here; nothing is downloaded, and a CPU will do.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from jax_klrlhf import toy, training
from jax_klrlhf.core import bradley_terry, choices, objectives, pairs
from jax_klrlhf.models import scoring
from jax_klrlhf.training.rounds.parts import pick

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
# ## Comparisons
#
# pi0 answers each prompt four times, two different answers are taken at random, and an annotator
# prefers one with the Bradley-Terry probability $\sigma(r_1 - r_2)$. The three functions are the
# core's: the same that label a bandit's arms.

# %%
ETA = 0.2
log_prob = jax.jit(scoring.log_prob, static_argnums=0)
questions = world.prompts(128 if SMALL else 1024, seed=2)
answers = draw(jax.random.key(3), pi0, questions)
reward = jnp.asarray(gold(questions, answers))

pair = pairs.sampled(jax.random.key(4), choices.drawn(jnp.asarray(answers.ids), reward=reward))
rows = jnp.arange(len(reward))
wins = bradley_terry.sample(jax.random.key(5), reward[rows, pair.first] - reward[rows, pair.second])
chosen = jnp.where(wins, pair.first, pair.second)
rejected = jnp.where(wins, pair.second, pair.first)
compared = pick(answers, np.stack([chosen, rejected], 1))
batch = training.Batch(
    questions,
    compared,
    weight=np.asarray(pair.valid, np.float32),
    ref_log_prob=np.asarray(log_prob(model, pi0, questions, compared)),
)
for row in range(3):
    both = [text(compared.ids[row, k], compared.lengths[row, k]) for k in (0, 1)]
    print(f"{text(questions.ids[row], 2)} | {both[0]}   >   {both[1]}")

# %% [markdown]
# ## The loss, the step, the loop
#
# A loss is any function of log-probabilities. `objectives.sigmoid` is DPO; `ipo`, `hinge`, `rpo`,
# `chi_po` and others take its place.

# %%
optimizer = optax.adam(3e-3)


def dpo(scores):
    return objectives.sigmoid(scores, kl_coef=ETA)


step = training.make_train_step(model, optimizer, dpo, report_coef=ETA)
state = training.state.init(jax.random.key(6), pi0, optimizer)
rng = np.random.default_rng(0)
STEPS = 6 if SMALL else 120
way = [(0, *judge(state.policy))]
for number in range(1, STEPS + 1):
    at = rng.choice(len(rows), 64, replace=False)
    state, info = step(state, jax.tree.map(lambda x, at=at: x[at], batch))
    if number % (STEPS // 6) == 0:
        way.append((number, *judge(state.policy)))
        print(
            "step {:4d}  gold {:.3f} ± {:.3f}  KL {:.3f} ± {:.3f}".format(
                number, *way[-1][1], *way[-1][2]
            )
        )

# %%
number, reward_way, kl_way = (np.array(x) for x in zip(*way, strict=True))
figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
axes[0].errorbar(number, reward_way[:, 0], 2 * reward_way[:, 1])
axes[0].set(xlabel="step", ylabel="gold reward", title="Held-out prompts, two standard errors")
axes[1].errorbar(kl_way[:, 0], reward_way[:, 0], 2 * reward_way[:, 1], 2 * kl_way[:, 1])
_ = axes[1].set(xlabel="KL(pi || pi0), nats", ylabel="gold reward", title="What it costs")

# %% [markdown]
# ## The implicit reward is a reward
#
# DPO never fits a reward model, yet $\eta \log \pi / \pi_0$ ranks responses. On fresh responses of
# pi0, how does it go with the gold reward?

# %%
fresh = draw(jax.random.key(8), pi0, held_out)
implicit = ETA * (
    log_prob(model, state.policy, held_out, fresh) - log_prob(model, pi0, held_out, fresh)
)
implicit, truth = np.asarray(implicit), gold(held_out, fresh)
# A constant per prompt is not identified.
implicit, truth = (x - x.mean(1, keepdims=True) for x in (implicit, truth))
figure, axes = plt.subplots(figsize=(4, 3), layout="constrained")
axes.plot(truth.ravel(), implicit.ravel(), ".", alpha=0.3)
axes.set(xlabel="gold reward, centred", ylabel="implicit reward, centred")
print(
    "correlation within prompts:",
    round(float(np.corrcoef(truth.ravel(), implicit.ravel())[0, 1]), 3),
)

# %% [markdown]
# On a model of your own the same is `klrlhf dpo --model ... --data pairs.jsonl --output run`,
# sharded over whatever devices there are. The next notebook goes on asking.
