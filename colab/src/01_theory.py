# %% [markdown]
# # Theory in ten minutes
#
# Preference learning under a KL constraint on a *bandit*: contexts, a few actions, a linear reward.
# Everything is a sum over actions, so what a theorem says can be looked at. The paper is Xiong et
# al., [arXiv 2312.11456](https://arxiv.org/abs/2312.11456). No accelerator is needed.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from jax_klrlhf import bandit, figures
from jax_klrlhf.core import bounds, divergence, gibbs

plt.rcParams.update(figures.STYLE)
SMALL = os.environ.get("KLRLHF_SMALL") == "1"  # continuous integration
SEEDS, ROUNDS, BATCH = (4, 4, 8) if SMALL else (64, 24, 16)
ETA = 0.3  # the paper's eta, DPO's beta: `kl_coef` everywhere in this library

# %% [markdown]
# ## The objective and its optimum
#
# $$J(\pi) = E_x\left[E_{a \sim \pi} r(x, a)
# - \eta\, \mathrm{KL}(\pi(\cdot|x) \| \pi_0(\cdot|x))\right], \qquad
# \pi^*(a|x) \propto \pi_0(a|x)\, e^{r(x, a) / \eta}$$
#
# The optimum is a Gibbs policy, and what another policy loses is exactly
# $\eta\,\mathrm{KL}(\pi \| \pi^*)$. Check it on one context with four actions.

# %%
reward = jnp.array([0.0, 0.5, 1.0, 2.0])
ref_log_prob = jnp.log(jnp.array([0.4, 0.3, 0.29, 0.01]))
optimum = gibbs.log_prob(reward, ref_log_prob, kl_coef=ETA)
other = jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4]))


def value(log_prob):
    """J of one context."""
    return gibbs.value(log_prob, reward, ref_log_prob, kl_coef=ETA)


print("pi*", np.round(jnp.exp(optimum), 3))
print("J(pi*) - J(pi) =", float(value(optimum) - value(other)))
print("eta KL(pi||pi*) =", float(ETA * divergence.categorical(other, optimum)))

# %%
coefficients = jnp.geomspace(0.05, 20.0, 60)
policies = jax.vmap(lambda eta: gibbs.log_prob(reward, ref_log_prob, kl_coef=eta))(coefficients)


def look(kl_coef):
    """The optimum at every coefficient, and at one of them beside pi0."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(7, 2.8), layout="constrained")
    left.plot(coefficients, jnp.exp(policies), label=[f"r = {r:g}" for r in reward])
    left.axvline(kl_coef, color="0.4", ls=":")
    left.set(xscale="log", xlabel=r"$\eta$ (`kl_coef`)", ylabel=r"$\pi^*(a)$")
    left.set_title(r"From the best action to $\pi_0$")
    left.legend()
    best, at = gibbs.log_prob(reward, ref_log_prob, kl_coef=kl_coef), np.arange(4)
    right.bar(at - 0.2, jnp.exp(ref_log_prob), 0.4, label=r"$\pi_0$", color="0.7")
    right.bar(at + 0.2, jnp.exp(best), 0.4, label=rf"$\pi^*$ at $\eta$ = {kl_coef:.2g}")
    right.set_xticks(at, [f"{r:g}" for r in reward])
    right.set(xlabel="reward of the action", ylabel="probability", ylim=(0, 1))
    kl = float(divergence.categorical(best, ref_log_prob))
    right.set_title(rf"$\mathrm{{KL}}(\pi^* \| \pi_0)$ = {kl:.2f} nats")
    right.legend()
    figures.tidy(figure)
    plt.show()


figures.explore(look, kl_coef=(ETA, 0.05, 20.0))

# %% [markdown]
# ## The confidence set
#
# The learner sees comparisons, never the reward. Maximum likelihood gives $\hat\theta$, and the
# feature differences $z$ that were compared give an ellipsoid
# $\{\theta : \|\theta - \hat\theta\|_\Sigma \le \beta\}$, $\Sigma = \lambda I + \sum z z^\top$. It
# is narrow where comparisons were made and wide where pi0 never goes.

# %%
RADIUS = bounds.radius(dim=8, delta=0.1, ridge=1.0, bound=3.0, curvature=0.25, constant=0.8)


def problem_of(key, coverage=0.02):
    """Half of the actions are rare under pi0, and only they show four of the eight features."""
    return bandit.sphere(
        key, contexts=16, actions=8, dim=8, hidden=4, coverage=coverage, bound=3.0, kl_coef=ETA
    )


key = jax.random.key(0)
problem = problem_of(key)
offline = bandit.offline_greedy()
run = bandit.simulate(jax.random.key(1), problem, offline, rounds=ROUNDS, batch=BATCH)
width = jnp.sqrt(jnp.diagonal(jnp.linalg.inv(run.state.ellipsoid.precision)))
figure, axes = plt.subplots(figsize=(4.4, 2.8), layout="constrained")
where = np.arange(8)
axes.bar(where, RADIUS * width, color=["C0"] * 4 + ["C1"] * 4)
axes.set(xlabel=r"coordinate of $\theta$", ylabel="half width of the set")
_ = axes.set_title("Wide where only rare actions would tell (the last four)")
print("theta* in the set:", bool(bandit.in_confidence_set(problem, run.state, radius=RADIUS)))

# %% [markdown]
# ## Pessimism offline, an enhancer online
#
# *Offline* the data are what pi0 left. Greedy believes $\hat\theta$; pessimism (Algorithm 1,
# Option II) takes from each action the uncertainty of its reward. *Online* the main agent plays the
# best policy so far, and a second agent, the enhancer, the most informative one within the KL
# budget of the paper's set (Algorithm 2). All make the same number of comparisons.

# %%
LEARNERS = {
    "offline, greedy": lambda ridge: bandit.offline_greedy(ridge=ridge),
    "offline, pessimistic": lambda ridge: bandit.offline_gshf_two(radius=RADIUS, ridge=ridge),
    "online, greedy": lambda ridge: bandit.greedy(ridge=ridge),
    "online, enhancer": lambda ridge: bandit.gshf(radius=RADIUS, ridge=ridge),
}


def simulations(name):
    """A program: gap before each round, and of the final policy, ``[SEEDS, ROUNDS + 1]``."""

    def one(key, coverage, ridge):
        key_problem, key_run = jax.random.split(key)
        run = bandit.simulate(
            key_run,
            problem_of(key_problem, coverage),
            LEARNERS[name](ridge),
            rounds=ROUNDS,
            batch=BATCH,
            record=bandit.record_gap,
        )
        return jnp.append(run.record, run.gap)

    return jax.jit(jax.vmap(one, in_axes=(0, None, None)))


PROGRAMS = {name: simulations(name) for name in LEARNERS}


def compare(coverage, ridge):
    """Gap against comparisons; where the sliders stand is data, and compiles nothing anew."""
    figure, axes = plt.subplots(figsize=(5, 3.6), layout="constrained")
    seen = BATCH * np.arange(1, ROUNDS + 1)
    for name, program in PROGRAMS.items():
        gap = np.asarray(program(jax.random.split(key, SEEDS), coverage, ridge))
        mean, error = gap.mean(0), gap.std(0, ddof=1) / np.sqrt(SEEDS)
        (line,) = axes.plot(seen, mean[1:], label=name)
        low, high = mean - 2 * error, mean + 2 * error
        axes.fill_between(seen, low[1:], high[1:], color=line.get_color(), alpha=0.2, lw=0)
        print(f"{name:<22} gap {mean[-1]:.4f} ± {error[-1]:.4f}")
    axes.set(xscale="log", yscale="log", xlabel="comparisons", ylabel=r"$J(\pi^*) - J(\hat\pi)$")
    axes.set_title(f"coverage {coverage:.2g}, ridge {ridge:.2g}; bands: two standard errors")
    axes.legend()
    figures.tidy(figure)
    plt.show()


figures.explore(compare, coverage=(0.02, 0.002, 1.0), ridge=(1.0, 0.05, 5.0))

# %% [markdown]
# Going on learning from pi0 stops paying where pi0 has nothing to show; exploring does not. Whether
# pessimism beats greedy depends on the coverage, on the radius and on the ridge: move the sliders,
# or see `experiments/coverage` and `experiments/ridge`, which sweep them. Gaps are of *these*
# problems: notebook 4 has smaller ones, and other numbers. The next notebook trains a language
# model with the very same likelihood.
