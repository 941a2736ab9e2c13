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

from jax_klrlhf import figures, toy, training
from jax_klrlhf.core import bradley_terry, choices, objectives, pairs
from jax_klrlhf.core.scores import Scores
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models import scoring
from jax_klrlhf.training import rounds

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
compared = rounds.pick(answers, np.stack([chosen, rejected], 1))
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
KL = r"$\mathrm{KL}(\pi\,\|\,\pi_0)$, nats"
number, reward_way, kl_way = (np.array(x) for x in zip(*way, strict=True))
figure, axes = plt.subplots(1, 2, figsize=(7, 2.8), layout="constrained")
axes[0].errorbar(number, reward_way[:, 0], 2 * reward_way[:, 1], fmt="o-")
axes[0].set(xlabel="step", ylabel="gold reward", title="Held-out prompts, two standard errors")
axes[1].errorbar(kl_way[:, 0], reward_way[:, 0], 2 * reward_way[:, 1], 2 * kl_way[:, 1], fmt="o-")
_ = axes[1].set(xlabel=KL, ylabel="gold reward", title="What it costs")

# %% [markdown]
# These bars are over prompts, for one training run. How far a run with other labels, in another
# order, would end from here they do not say; the next picture does.
#
# ## What the coefficient does
#
# The same training once more, as a function of a key and of the coefficient: the loss is
# differentiated and the steps are scanned. `vmap` then trains several seeds at once, and a slider
# that moves compiles nothing anew.

# %%
asked, pool = jax.tree.map(jnp.asarray, (questions, answers))
options = choices.drawn(pool.ids, reward=reward)
ref_log_prob = log_prob(model, pi0, asked, pool)  # [prompts, 4]


def fit(key, kl_coef):
    """DPO's policy; a key has its own pairs, labels and order."""
    key_pair, key_label, key_order = jax.random.split(key, 3)
    pair = pairs.sampled(key_pair, options)
    margin = reward[rows, pair.first] - reward[rows, pair.second]
    wins = bradley_terry.sample(key_label, margin)
    chosen = jnp.where(wins, pair.first, pair.second)
    both = jnp.stack([chosen, pair.first + pair.second - chosen], 1)
    take = lambda x: jnp.take_along_axis(x, both, 1)  # noqa: E731
    ids = jnp.take_along_axis(pool.ids, both[..., None], 1)
    data = training.Batch(
        asked,
        Ragged(ids, take(pool.lengths)),
        weight=jnp.where(pair.valid, 1.0, 0.0),
        ref_log_prob=take(ref_log_prob),
    )

    def loss(params, batch):
        found = scoring.log_prob(model, params, batch.prompts, batch.responses)
        scores = Scores(found, batch.ref_log_prob, batch.responses.lengths)
        return jnp.mean(batch.weight * objectives.sigmoid(scores, kl_coef=kl_coef))

    def step(carried, at):
        params, moments = carried
        gradient = jax.grad(loss)(params, jax.tree.map(lambda x: x[at], data))
        updates, moments = optimizer.update(gradient, moments)
        return (optax.apply_updates(params, updates), moments), None

    order = jax.random.randint(key_order, (STEPS, 64), 0, len(rows))
    return jax.lax.scan(step, (pi0, optimizer.init(pi0)), order)[0][0]


SEEDS = 2 if SMALL else 4
fit_seeds = jax.jit(jax.vmap(fit, in_axes=(0, None)))


def policies(kl_coef):
    """One for each seed."""
    stacked = fit_seeds(jax.random.split(jax.random.key(9), SEEDS), kl_coef)
    return [jax.tree.map(lambda x, seed=seed: x[seed], stacked) for seed in range(SEEDS)]


def place(found):
    """Gold reward and KL to pi0 of each seed's policy, ``[SEEDS, 2]``."""
    return np.array([[value for value, _ in judge(params)] for params in found])


ETAS = (0.2, 1.0) if SMALL else (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
frontier = np.array([place(policies(eta)) for eta in ETAS])  # [coefficients, seeds, 2]

# %%
KINDS = {"happy": toy.HAPPY, "plain": toy.PLAIN, "sad": toy.SAD}


def words(params):
    """Words of each kind in an answer, on average."""
    said = draw(jax.random.key(8), params, held_out)
    pairs_of = zip(said.ids.reshape(-1, said.ids.shape[-1]), said.lengths.ravel(), strict=True)
    told = [text(*one).split() for one in pairs_of]
    return [np.mean([sum(w in kind for w in one) for one in told]) for kind in KINDS.values()]


def look(kl_coef):
    """Where the seeds end at a coefficient, and what their policies say."""
    _, (left, right) = plt.subplots(1, 2, figsize=(7, 2.8), layout="constrained")
    found = policies(kl_coef)
    reward_now, kl_now = place(found).T
    left.plot(frontier[..., 1].ravel(), frontier[..., 0].ravel(), ".", color="C0", alpha=0.4)
    left.plot(*frontier.mean(1).T[::-1], "o-", label="means over seeds")
    left.plot(kl_now, reward_now, "D", color="C1", label=rf"$\eta$ = {kl_coef:.2g}, each seed")
    for eta, (gold_of, nats) in zip(ETAS, frontier.mean(1), strict=True):
        left.annotate(f"{eta:g}", (nats, gold_of), xytext=(4, -10), textcoords="offset points")
    left.set(xlabel=KL, ylabel="gold reward", title=rf"$\eta$ beside its mean; {SEEDS} seeds")
    left.legend()
    at = np.arange(len(KINDS))
    right.bar(at - 0.2, words(pi0), 0.4, label=r"$\pi_0$", color="0.7")
    right.bar(at + 0.2, words(found[0]), 0.4, label=rf"$\eta$ = {kl_coef:.2g}", color="C1")
    right.set_xticks(at, KINDS)
    right.set(ylabel="words in an answer", title="What is said")
    right.legend()
    plt.show()
    for name, x in (("gold", reward_now), ("KL", kl_now)):
        print(f"{name:<5} {x.mean():.3f} ± {x.std(ddof=1) / SEEDS**0.5:.3f} over seeds")


figures.explore(look, kl_coef=(ETA, 0.03, 3.0))

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
figure, axes = plt.subplots(figsize=(4, 2.8), layout="constrained")
axes.plot(truth.ravel(), implicit.ravel(), ".", alpha=0.3)
axes.set(xlabel="gold reward, centred", ylabel="implicit reward, centred")
print(
    "correlation within prompts:",
    round(float(np.corrcoef(truth.ravel(), implicit.ravel())[0, 1]), 3),
)

# %% [markdown]
# On a model of your own the same is `klrlhf dpo --model ... --data pairs.jsonl --output run`,
# sharded over whatever devices there are. The next notebook goes on asking.
