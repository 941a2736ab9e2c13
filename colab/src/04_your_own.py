# %% [markdown]
# # Write your own algorithm
#
# An algorithm is a composition of values: a **loss** (a function of `Scores`), a **pair rule** (of
# a key and a choice set), a **divergence**, a **preference model**, a **target** of improvement, a
# **class of rewards**.
# Each is written once, here in the notebook, and then used twice, *the same object*: on a bandit,
# where its gap is exact, and on a language model.
#
# | what | lines | on a bandit | on a language model |
# |---|---|---|---|
# | rule, enhancer | 3 | `bandit.from_rule(rule)` | `rounds.iterate(pair_rule=rule)` |
# | loss | 5 | `bandit.policy_learner(loss)` | `rounds.preference_optimization(model, loss)` |
# | divergence | 8 | in a target, in a loss | in a target, in a loss |
# | preference model | 6 | a problem's labels, a fit, a loss | in a loss |
# | learner, by what it deploys | 4 | `bandit.from_target(target)` | `rounds.weighted_likelihood` |
# | class of rewards | 6 | a problem's `reward_class=mine` | `rounds.parametric(features, mine)` |
# | learner, by whom it compares | 5 | `bandit.reward_learner(propose, policy)` | as a rule |

# %%
import os
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from jax_klrlhf import bandit, models, training
from jax_klrlhf.core import fdivergence, objectives, pairs, regularized, targets
from jax_klrlhf.core.preferences import PreferenceModel
from jax_klrlhf.core.reward_class import RewardClass, linear
from jax_klrlhf.models import scoring
from jax_klrlhf.training import rounds
from jax_klrlhf.training.rounds import oracle
from jax_klrlhf.training.rounds.compute import mapped
from jax_klrlhf.training.rounds.parts import ragged

SMALL = os.environ.get("KLRLHF_SMALL") == "1"  # continuous integration
ETA = 0.3

# %% [markdown]
# ## Seven values
#
# A **pair rule**: the main agent against a *tempered* copy of itself, halfway back to pi0. pi is in
# proportion to pi0 exp(r / eta), so the copy is pi exp(-r / 2 eta): weights over whatever the main
# agent can choose among, all actions, eight of them, or four responses.


# %%
def halfway(choices):
    return choices.log_mass - choices.require("reward", by="halfway") / (2 * ETA)


tempered = pairs.against(halfway)

# %% [markdown]
# A **loss**: the likelihood of an annotator who does not look in 5 % of cases, so that no single
# comparison pulls without bound. `Scores` are log-probabilities `[batch, responses]` of policy and
# reference, the chosen response first.


# %%
def with_floor(scores, floor=0.05):
    margin = ETA * (scores.chosen_log_ratio - scores.rejected_log_ratio)
    # log((1 - floor) sigma(m) + floor / 2), in log-space
    return -jnp.logaddexp(
        jnp.log1p(-floor) + jax.nn.log_sigmoid(margin), jnp.log(jnp.asarray(floor / 2))
    )


# %% [markdown]
# The same annotator as a **preference model**: what a label means at a margin. Handed to a problem
# it labels, handed to a fit or to a loss it is the likelihood.


# %%
def _lapsing(floor, margin):
    looked = jnp.log1p(-floor)
    return tuple(
        jnp.logaddexp(looked + jax.nn.log_sigmoid(m), jnp.log(floor / 2)) for m in (margin, -margin)
    )


lapsing = PreferenceModel(_lapsing, parameters=jnp.array(0.05), concave=False)

# %% [markdown]
# A **divergence**: f'(z) = (z - 1/z) / 2, steep on both sides, of u = log z: the link, its inverse,
# its integral, f(z)/z, its supremum and f(0).

# %%
two_sided = fdivergence.FDivergence(
    link=jnp.sinh,
    inverse=jnp.arcsinh,
    surrogate=lambda u: jnp.cosh(u) - 1,
    value=lambda u: jnp.exp(u) / 4 - (u / 2 + 0.25) * jnp.exp(-u),
    supremum=float("inf"),
    at_zero=float("inf"),
)
with_divergence = partial(objectives.f_divergence, kl_coef=ETA, divergence=two_sided)
its_optimum = partial(targets.optimum, kl_coef=ETA, divergence=two_sided)

# %% [markdown]
# A **learner** by what it deploys, a *target* over a choice set: its law where all choices are
# listed, the weights of the draws otherwise. Ours is the Gibbs policy of a reward capped at 1 above
# the mean: nothing is gained by being extreme.


# %%
def capped(choices):
    reward = choices.require("reward", by="capped")
    mean = jnp.sum(choices.mass * reward, -1, keepdims=True)
    return targets.optimum(choices._replace(reward=jnp.minimum(reward, mean + 1)), kl_coef=ETA)


# %% [markdown]
# A **class of rewards**: what a reward may be, a function of parameters and six features, and where
# learning begins. Rules, enhancers and bonuses then see its gradient where they saw features.


# %%
def network(parameters, features):
    return jnp.tanh(features @ parameters["in"]) @ parameters["out"]


keys = jax.random.split(jax.random.key(9))
mine = RewardClass(
    network,
    {"in": jax.random.normal(keys[0], (6, 4)), "out": jax.random.normal(keys[1], (4,))},
)

# %% [markdown]
# And a learner by whom it compares and what it deploys, for what no rule over draws can say: here
# pi_t against the policy of *twice* its reward.


# %%
def against_bolder(setting, state):
    return bandit.mle_policy(setting, state._replace(theta=2 * state.theta))


def propose(key, setting, state, context):
    one, two = bandit.mle_policy(setting, state), against_bolder(setting, state)
    return bandit.draw(key, one, two, context)


# %% [markdown]
# ## On the bandit: exact gaps
#
# Every learner has the same problems, in which pi0 rarely plays what is worth learning about.

# %%
SEEDS, ROUNDS, BATCH = (4, 4, 8) if SMALL else (48, 16, 16)
LEARNERS = {
    "ours: tempered rule, 8 draws": lambda: bandit.from_rule(tempered, samples=8),
    "ours: tempered rule, all": lambda: bandit.from_rule(tempered),
    "ours: loss with a floor": lambda: bandit.policy_learner(with_floor),
    "ours: two-sided divergence": lambda: bandit.policy_learner(with_divergence),
    "ours: two-sided optimum": lambda: bandit.from_target(its_optimum),
    "ours: capped target": lambda: bandit.from_target(capped),
    "ours: against bolder": lambda: bandit.reward_learner(propose, bandit.mle_policy),
    "online, greedy": lambda: bandit.greedy(),
    "best and worst of 8": lambda: bandit.from_rule(pairs.best_worst, samples=8),
    "GSHF, enhancer": lambda: bandit.gshf(radius=1.0),
    "DPO": lambda: bandit.dpo(),
}


def problem_of(key):
    return bandit.sphere(
        key, contexts=8, actions=6, dim=6, hidden=3, coverage=0.03, bound=2.0, kl_coef=ETA
    )


def simulate(make, problem_of=problem_of):
    def one(key):
        key_problem, key_run = jax.random.split(key)
        run = bandit.simulate(
            key_run, problem_of(key_problem), make(), rounds=ROUNDS, batch=BATCH,
            record=bandit.record_gap,
        )  # fmt: skip
        return jnp.append(run.record, run.gap)

    return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), SEEDS)))


figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
seen = BATCH * np.arange(1, ROUNDS + 1)
for number, (name, make) in enumerate(LEARNERS.items()):
    gap = simulate(make)
    mean, error = gap.mean(0), gap.std(0, ddof=1) / SEEDS**0.5
    style = "-" if name.startswith("ours") else "--"
    axes.plot(seen, mean[1:], style, color=f"C{number}", label=name)
    print(f"{name:<30} gap {mean[-1]:.4f} ± {error[-1]:.4f}")
axes.set(xscale="log", yscale="log", xlabel="comparisons", ylabel="J(pi*) - J(pi)")
_ = axes.legend(fontsize=7)

# %% [markdown]
# The divergence has an exact optimum too, and the preference model labels a problem and is the
# likelihood that its learner fits: against it, the learner that believes Bradley-Terry.

# %%
problem = problem_of(jax.random.key(1))
reward, ref = problem.reward, problem.setting.ref_log_prob
optimum = regularized.log_prob(reward, ref, kl_coef=ETA, divergence=two_sided)
print(
    "largest log-ratio to pi0: {:.2f}, of the KL's optimum {:.2f}".format(
        *(float(jnp.max(jnp.abs(law - ref))) for law in (optimum, bandit.optimum(problem)))
    )
)


def lapsed(key, *, known):
    problem = problem_of(key)._replace(preference=lapsing)
    setting = problem.setting._replace(preference=lapsing) if known else problem.setting
    return problem._replace(setting=setting)


for known in (True, False):
    gap = simulate(bandit.greedy, partial(lapsed, known=known))[:, -1]
    print(f"lapses known: {known!s:<5} gap {gap.mean():.4f} ± {gap.std(ddof=1) / SEEDS**0.5:.4f}")

# %% [markdown]
# Gold that is no linear function of the features: the size of one. On these few comparisons the
# network does no better than the linear class, beyond noise, and asking for the pair that tells
# most is worse than two draws for both: what a label tells is judged by the class, linear or
# linearized, and neither is right yet.


# %%
def bent(key, *, rewards):
    problem = problem_of(key)
    return problem._replace(
        reward=jnp.abs(problem.reward), setting=problem.setting._replace(reward_class=rewards)
    )


for name, rewards in {"linear": linear, "ours: network": mine}.items():
    for rule in (pairs.sampled, pairs.most_uncertain):
        gap = simulate(lambda rule=rule: bandit.from_rule(rule), partial(bent, rewards=rewards))[
            :, -1
        ]
        print(
            f"{name:<14} {rule.__name__:<15} "
            f"gap {gap.mean():.4f} ± {gap.std(ddof=1) / SEEDS**0.5:.4f}"
        )

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


def kinds(prompts, responses):
    """Share of happy, plain and sad words, early and late, ``[B, K, 6]``: the class's features."""
    del prompts
    ids, lengths = np.asarray(responses.ids), np.asarray(responses.lengths)
    place = np.arange(ids.shape[-1])
    kind = WORTH[ids][..., None] == np.array([1, 0, -1])
    kind = kind & ((ids > 3) & (place < lengths[..., None]))[..., None]
    halves = [np.where((place < 3)[:, None] == early, kind, 0).sum(-2) for early in (True, False)]
    return np.concatenate(halves, -1).astype(np.float32) / LONGEST


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
# ## On the language model: the same objects
#
# The annotator swaps one label in ten. All losses see the same comparisons; the rules and the
# target choose among four responses of the policy to each prompt.

# %%
questions, _ = stories(64 if SMALL else 512, seed=2)
collect = partial(
    rounds.collect, jax.random.key(3), pi0, prompts=questions, sampler=rounds.main_agent(draw),
    reward=rounds.known(gold), oracle=oracle.bradley_terry(gold, noise=0.1),
)  # fmt: skip
compared = collect(pair_rule=pairs.sampled)
known = rounds.known(gold)
fitting = rounds.Fitting(optimizer=optax.adam(3e-3), steps=4 if SMALL else 80, batch_size=64)


def fitted(improve, data=compared, rounds_played=0, rule=pairs.sampled, reward=known):
    return rounds.iterate(
        jax.random.key(4), pi0, prompts=questions, rounds=rounds_played, offline=data,
        sampler=rounds.main_agent(draw), reward=reward, pair_rule=rule,
        oracle=oracle.bradley_terry(gold, noise=0.1), improve=improve,
    ).policy  # fmt: skip


def by_loss(loss):
    return rounds.preference_optimization(model, loss, fitting=fitting, report_coef=ETA, rows=256)


dpo = partial(objectives.sigmoid, kl_coef=ETA)
believed = rounds.parametric(kinds, mine, dim=6, ridge=0.1, radius=1.0)
weighted = partial(rounds.weighted_likelihood, model, draw, fitting=fitting)
found = {
    "pi0": judge(pi0),
    "DPO": judge(fitted(by_loss(dpo))),
    "ours: loss with a floor": judge(fitted(by_loss(with_floor))),
    "ours: two-sided divergence": judge(fitted(by_loss(with_divergence))),
    "ours: lapses as a likelihood": judge(fitted(by_loss(partial(dpo, preference=lapsing)))),
    "ours: tempered rule, one round": judge(fitted(by_loss(dpo), rounds_played=1, rule=tempered)),
    "best and worst, one round": judge(
        fitted(by_loss(dpo), rounds_played=1, rule=pairs.best_worst)
    ),
    "ours: two-sided optimum": judge(fitted(weighted(target=its_optimum))),
    "ours: capped target": judge(fitted(weighted(target=capped))),
    "ours: network's belief, its optimum": judge(
        fitted(weighted(target=partial(targets.optimum, kl_coef=ETA)), reward=believed)
    ),
    "ours: network's belief, one round": judge(
        fitted(by_loss(dpo), rounds_played=1, rule=pairs.most_uncertain, reward=believed)
    ),
}

figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
for name, ((reward, error), (kl, kl_error)) in found.items():
    axes.errorbar(kl, reward, 2 * error, 2 * kl_error, marker="o", capsize=2, label=name)
    print(f"{name:<35} gold {reward:.3f} ± {error:.3f}  KL {kl:.3f} ± {kl_error:.3f}")
axes.set(xlabel="KL(pi || pi0), nats", ylabel="gold reward", title="Two standard errors")
_ = axes.legend(fontsize=7)

# %% [markdown]
# Error bars are over held-out prompts, for one training seed each: small differences between
# methods are not to be trusted, and losses differ in the scale of their margins, so that a fair
# comparison sweeps `kl_coef`, as the notebook before does. What you keep becomes a row of
# `tests/conformance`: the object, and its law in NumPy; it is then run on the bandit, on draws, and
# on a language model whose every response is listed.
