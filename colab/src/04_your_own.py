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
from rich.console import Console

from jax_klrlhf import bandit, figures, toy
from jax_klrlhf.core import choices, fdivergence, objectives, pairs, targets
from jax_klrlhf.core.preferences import PreferenceModel
from jax_klrlhf.core.reward_class import RewardClass, linear
from jax_klrlhf.training import rounds
from jax_klrlhf.training.rounds import oracle

plt.rcParams.update(figures.STYLE)
SMALL = os.environ.get("KLRLHF_SMALL") == "1"  # continuous integration
ETA = 0.3

# %% [markdown]
# ## Seven values
#
# A **pair rule**: the main agent against a *tempered* copy of itself, halfway back to pi0. pi is in
# proportion to pi0 exp(r / eta), so the copy is pi exp(-r / 2 eta): weights over whatever the main
# agent can choose among, all actions, eight of them, or four responses.


# %%
def halfway(given):
    return given.log_mass - given.require("reward", by="halfway") / (2 * ETA)


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
def capped(given, kl_coef=ETA):
    reward = given.require("reward", by="capped")
    mean = jnp.sum(given.mass * reward, -1, keepdims=True)
    return targets.optimum(given._replace(reward=jnp.minimum(reward, mean + 1)), kl_coef=kl_coef)


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
# ## On the bandit: what a target is
#
# Every law can be looked at before anything is learned: here the targets on one problem whose
# reward is known. Two-sided pays for leaving pi0 in either direction, and so stays where KL's
# optimum gives an action up; the cap stops where more reward would only mean more KL.


# %%
def problem_of(key, coverage=0.03):
    """Half of the actions are rare under pi0, and only they show half of the features."""
    return bandit.sphere(
        key, contexts=8, actions=6, dim=6, hidden=3, coverage=coverage, bound=2.0, kl_coef=ETA
    )


problem = problem_of(jax.random.key(1))
reward, ref = problem.reward, problem.setting.ref_log_prob
given = choices.enumerated(ref, ref_log_prob=ref, reward=reward)
TARGETS = {
    "KL's optimum": targets.optimum,
    "ours: two-sided optimum": its_optimum,
    "ours: capped target": capped,
}
coefficients = jnp.geomspace(0.05, 5.0, 40)


@partial(jax.jit, static_argnums=0)
def laws(target, coefficients):
    """A target at each coefficient, its KL to pi0 and its reward above pi0's: exact sums."""

    def one(eta):
        law = target(given, kl_coef=eta)
        gain = jnp.sum((jnp.exp(law) - jnp.exp(ref)) * reward, -1)
        return law, bandit.kl(problem.setting, law), gain @ problem.setting.context_prob

    return jax.vmap(one)(coefficients)


def look(kl_coef):
    """The targets at every coefficient, and what they do to one context at one of them."""
    _, (left, right) = plt.subplots(1, 2, figsize=(7, 2.8), layout="constrained")
    at = np.arange(6)
    right.bar(at - 0.3, jnp.exp(ref[0]), 0.2, label=r"$\pi_0$", color="0.7")
    for number, (name, target) in enumerate(TARGETS.items()):
        law, *way = laws(target, jnp.append(coefficients, kl_coef))
        left.plot(*(x[:-1] for x in way), color=f"C{number}", label=name)
        left.plot(*(x[-1] for x in way), "o", color=f"C{number}")
        right.bar(at + 0.2 * number - 0.1, jnp.exp(law[-1, 0]), 0.2, color=f"C{number}")
        print(f"{name:<24} largest log-ratio to pi0 {float(jnp.abs(law[-1] - ref).max()):.2f}")
    left.set(xlabel=r"$\mathrm{KL}(\pi\,\|\,\pi_0)$, nats", ylabel=r"reward above $\pi_0$'s")
    left.set_title(rf"Points: $\eta$ = {kl_coef:.2g}")
    right.set_xticks(at, [f"{r:.1f}" for r in reward[0]])
    right.set(xlabel="reward of the action", ylabel="probability", title="One context")
    right.legend()
    left.legend()
    plt.show()


figures.explore(look, kl_coef=(ETA, 0.05, 5.0))

# %% [markdown]
# ## On the bandit: exact gaps
#
# Now the reward has to be learned from comparisons, on problems in which pi0 rarely plays what is
# worth learning about. DPO, solved exactly in every round, *is* the greedy learner: it stands for
# both.

# %%
SEEDS, ROUNDS, BATCH = (4, 4, 8) if SMALL else (48, 16, 16)
LEARNERS = {
    "ours: tempered rule, 8 draws": partial(bandit.from_rule, tempered, samples=8),
    "ours: tempered rule, all": partial(bandit.from_rule, tempered),
    "ours: against bolder": partial(bandit.reward_learner, propose, bandit.mle_policy),
    "best and worst of 8": partial(bandit.from_rule, pairs.best_worst, samples=8),
    "GSHF, enhancer": partial(bandit.gshf, radius=1.0),
    "ours: loss with a floor": partial(bandit.policy_learner, with_floor),
    "ours: two-sided divergence": partial(bandit.policy_learner, with_divergence),
    "ours: two-sided optimum": partial(bandit.from_target, its_optimum),
    "ours: capped target": partial(bandit.from_target, capped),
    "DPO": bandit.dpo,
}
RULES = 5  # so many differ in whom they compare, the others in what they fit or deploy


def simulations(make):
    """A program: gap before each round, and of the final policy, ``[SEEDS, ROUNDS + 1]``."""

    def one(key, problem, ridge):
        run = bandit.simulate(
            key, problem, make(ridge=ridge), rounds=ROUNDS, batch=BATCH, record=bandit.record_gap
        )
        return jnp.append(run.record, run.gap)

    program = jax.jit(jax.vmap(one, in_axes=(0, 0, None)))
    return lambda problems, ridge=1.0: np.asarray(program(RUNS, problems, ridge))


KEYS, RUNS = jax.random.split(jax.random.key(0), (2, SEEDS))
worlds = jax.jit(jax.vmap(problem_of, in_axes=(0, None)))
PROGRAMS = {name: simulations(make) for name, make in LEARNERS.items()}


def said(gap):
    """Mean and standard error over problems and runs."""
    return f"gap {gap.mean():.4f} ± {gap.std(ddof=1) / len(gap) ** 0.5:.4f}"


def compare(coverage, ridge):
    """Gap against comparisons; where the sliders stand is data, and compiles nothing anew."""
    figure, both = plt.subplots(1, 2, figsize=(7, 3.4), layout="constrained", sharey=True)
    seen, problems = BATCH * np.arange(1, ROUNDS + 1), worlds(KEYS, coverage)
    for number, (name, program) in enumerate(PROGRAMS.items()):
        gap = program(problems, ridge)
        axes, style = both[int(number >= RULES)], "-" if name.startswith("ours") else "--"
        axes.plot(seen, gap.mean(0)[1:], style, color=f"C{number % RULES}", label=name)
        print(f"{name:<30} {said(gap[:, -1])}")
    for axes, title in zip(both, ("Whom to compare", "What to fit and deploy"), strict=True):
        axes.set(xscale="log", yscale="log", xlabel="comparisons", title=title)
        axes.legend()
    both[0].set_ylabel(r"$J(\pi^*) - J(\pi)$")
    figures.tidy(figure)
    plt.show()


figures.explore(compare, coverage=(0.03, 0.003, 1.0), ridge=(1.0, 0.05, 5.0))

# %% [markdown]
# The two-sided loss hardly leaves pi0 on so few comparisons, while the target of the same
# divergence does as well as DPO: a loss and a target of one law are not one learner.
#
# The preference model labels a problem, and is the likelihood that its learner fits: against it,
# the learner that believes Bradley-Terry.


# %%
def lapsed(key, known):
    problem = problem_of(key)._replace(preference=lapsing)
    setting = problem.setting._replace(preference=lapsing) if known else problem.setting
    return problem._replace(setting=setting)


for known in (True, False):
    gap = simulations(bandit.greedy)(jax.vmap(partial(lapsed, known=known))(KEYS))[:, -1]
    print(f"lapses known: {known!s:<5} {said(gap)}")

# %% [markdown]
# Gold that is no linear function of the features: the size of one. On these few comparisons the
# network does no better than the linear class, beyond noise, and asking for the pair that tells
# most is worse than two draws for both: what a label tells is judged by the class, linear or
# linearized, and neither is right yet.


# %%
def bent(key, rewards):
    problem = problem_of(key)
    return problem._replace(
        reward=jnp.abs(problem.reward), setting=problem.setting._replace(reward_class=rewards)
    )


for name, rewards in {"linear": linear, "ours: network": mine}.items():
    for rule in (pairs.sampled, pairs.most_uncertain):
        problems = jax.vmap(partial(bent, rewards=rewards))(KEYS)
        gap = simulations(partial(bandit.from_rule, rule))(problems)[:, -1]
        print(f"{name:<14} {rule.__name__:<15} {said(gap)}")

# %% [markdown]
# ## On the language model: the same objects
#
# The toy of the other notebooks, which comes with the library (`jax_klrlhf.toy`): a name and what
# it did first, then what it did next; happy words are better. The annotator swaps one label in ten.
# All losses see the same comparisons; the rules and the target choose among four responses of the
# policy to each prompt. The class of rewards sees how many happy, plain and sad words there are,
# early and late.

# %%
world = toy.world(steps=20 if SMALL else 200)
model, pi0, gold, draw = world.model, world.pi0, world.gold, world.draw(4)
questions = world.prompts(64 if SMALL else 512, seed=2)
known, annotator = rounds.known(gold), oracle.bradley_terry(gold, noise=0.1)
fitting = rounds.Fitting(optimizer=optax.adam(3e-3), steps=4 if SMALL else 80, batch_size=64)


def kinds(prompts, responses):
    """Happy, plain and sad words, early and late, ``[B, K, 6]``: the class's features."""
    del prompts
    ids = np.asarray(responses.ids)
    width = ids.shape[-1]
    inside = np.arange(width) < np.asarray(responses.lengths)[..., None]
    kind = (ids[..., None] - 4) // 3 == np.arange(3)  # of the vocabulary, toy.WORDS
    kind = np.where(inside[..., None], kind, 0).astype(np.float32) / width
    return np.concatenate([kind[..., :3, :].sum(-2), kind[..., 3:, :].sum(-2)], -1)


def by_loss(loss):
    return rounds.preference_optimization(model, loss, fitting=fitting, report_coef=ETA, rows=256)


def by_target(target):
    return rounds.weighted_likelihood(model, draw, fitting=fitting, target=target)


dpo = partial(objectives.sigmoid, kl_coef=ETA)
believed = rounds.parametric(kinds, mine, dim=6, ridge=0.1, radius=1.0)
fit_dpo = by_loss(dpo)  # made once, compiled once
optimal = by_target(partial(targets.optimum, kl_coef=ETA))
METHODS = {  # how it is fitted; whom a round compares, if there is one; what is believed
    "DPO": (fit_dpo, None, known),
    "ours: loss with a floor": (by_loss(with_floor), None, known),
    "ours: two-sided divergence": (by_loss(with_divergence), None, known),
    "ours: lapses as a likelihood": (by_loss(partial(dpo, preference=lapsing)), None, known),
    "ours: two-sided optimum": (by_target(its_optimum), None, known),
    "ours: capped target": (by_target(capped), None, known),
    "ours: network's belief, its optimum": (optimal, None, believed),
    "ours: network's belief, one round": (fit_dpo, pairs.most_uncertain, believed),
    "ours: tempered rule, one round": (fit_dpo, tempered, known),
    "best and worst, one round": (fit_dpo, pairs.best_worst, known),
}


TRAINED = range(2 if SMALL else 3)
shared = {"prompts": questions, "sampler": rounds.main_agent(draw), "oracle": annotator}
keys = [jax.random.fold_in(jax.random.key(3), seed) for seed in TRAINED]
compared = [
    rounds.collect(key, pi0, reward=known, pair_rule=pairs.sampled, **shared) for key in keys
]


def train(improve, rule, belief, seed):
    """Gold reward and KL of a policy: after pi0's comparisons, and a round's if it has a rule."""
    policy = rounds.iterate(
        keys[seed], pi0, rounds=int(rule is not None), offline=compared[seed], reward=belief,
        pair_rule=rule or pairs.sampled, improve=improve, console=Console(quiet=True), **shared,
    ).policy  # fmt: skip
    found = world.evaluate(policy, count=64 if SMALL else 256)
    return found["reward"].value, found["kl"].value


base = world.evaluate(pi0)["reward"]
print(f"{'pi0':<35} gold {base.value:.3f} ± {base.stderr:.3f} over prompts")
figure, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
for number, (name, method) in enumerate(METHODS.items()):
    found = np.array([train(*method, seed) for seed in TRAINED])
    (worth, kl), (error, kl_error) = found.mean(0), found.std(0, ddof=1) / len(TRAINED) ** 0.5
    marker = "o" if name.startswith("ours") else "s"
    axes.plot(found[:, 1], found[:, 0], ".", color=f"C{number}", alpha=0.5)
    axes.plot(kl, worth, marker, color=f"C{number}", ms=6, label=name)
    print(f"{name:<35} gold {worth:.3f} ± {error:.3f}  KL {kl:.3f} ± {kl_error:.3f} over seeds")
axes.axhline(base.value, color="0.6", ls=":", label=r"$\pi_0$")
axes.set(xlabel=r"$\mathrm{KL}(\pi\,\|\,\pi_0)$, nats", ylabel="gold reward, held-out prompts")
axes.set_title(f"Small points: {len(TRAINED)} training seeds; large: their mean")
_ = figure.legend(loc="outside right upper")

# %% [markdown]
# Errors are over training seeds, the luck of labels and fits; with three of them they are
# themselves hardly known, and the error over prompts, which all share, is not in them. Losses
# differ in the scale of their margins, so that a fair comparison sweeps `kl_coef`, as the notebook
# before does. A lapse is the same thing as a floor, written as a loss and as a likelihood: the two
# policies are one. What you keep becomes a row of
# `tests/conformance`: the object, and its law in NumPy; it is then run on the bandit, on draws, and
# on a language model whose every response is listed.
