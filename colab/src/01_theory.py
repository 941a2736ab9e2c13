# %% [markdown]
# # Theory in ten minutes
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jax-klrlhf/jax_klrlhf/blob/main/colab/01_theory.ipynb)
#
# Preference learning under a KL constraint on a *bandit*: contexts, a few actions, a linear reward.
# Everything is a sum over actions, so what a theorem says can be looked at. The paper is Xiong et
# al., [arXiv 2312.11456](https://arxiv.org/abs/2312.11456). No accelerator is needed.

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
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from jax_klrlhf import bandit
from jax_klrlhf.core import bounds, divergence, gibbs

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
figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
axes.plot(coefficients, jnp.exp(policies), label=[f"r = {r:g}" for r in reward])
axes.set(xscale="log", xlabel="eta", ylabel="pi*(a)", title="From the best action to pi0")
_ = axes.legend()

# %% [markdown]
# ## The confidence set
#
# The learner sees comparisons, never the reward. Maximum likelihood gives $\hat\theta$, and the
# feature differences $z$ that were compared give an ellipsoid
# $\{\theta : \|\theta - \hat\theta\|_\Sigma \le \beta\}$, $\Sigma = \lambda I + \sum z z^\top$. It
# is narrow where comparisons were made and wide where pi0 never goes.

# %%
RADIUS = bounds.radius(dim=8, delta=0.1, ridge=1.0, bound=3.0, curvature=0.25, constant=0.8)


def problem_of(key):
    """Half of the actions are rare under pi0, and only they show four of the eight features."""
    return bandit.sphere(
        key, contexts=16, actions=8, dim=8, hidden=4, coverage=0.02, bound=3.0, kl_coef=ETA
    )


key = jax.random.key(0)
problem = problem_of(key)
offline = bandit.offline_greedy()
run = bandit.simulate(jax.random.key(1), problem, offline, rounds=ROUNDS, batch=BATCH)
width = jnp.sqrt(jnp.diagonal(jnp.linalg.inv(run.state.ellipsoid.precision)))
figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
where = np.arange(8)
axes.bar(where, RADIUS * width, color="C0", alpha=0.6)
axes.set(xlabel="coordinate of theta", ylabel="half width of the set")
_ = axes.set_title("Wide where only rare actions would tell")
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
    "offline, greedy": lambda: bandit.offline_greedy(),
    "offline, pessimistic": lambda: bandit.offline_gshf_two(radius=RADIUS),
    "online, greedy": lambda: bandit.greedy(),
    "online, enhancer": lambda: bandit.gshf(radius=RADIUS),
}


def simulate(name):
    """Gap before each round, and of the final policy: ``[SEEDS, ROUNDS + 1]``."""

    def one(key):
        key_problem, key_run = jax.random.split(key)
        run = bandit.simulate(
            key_run,
            problem_of(key_problem),
            LEARNERS[name](),
            rounds=ROUNDS,
            batch=BATCH,
            record=bandit.record_gap,
        )
        return jnp.append(run.record, run.gap)

    return jax.jit(jax.vmap(one))(jax.random.split(key, SEEDS))


figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
for name in LEARNERS:
    gap = np.asarray(simulate(name))
    mean, error = gap.mean(0), gap.std(0, ddof=1) / np.sqrt(SEEDS)
    seen = BATCH * np.arange(1, ROUNDS + 1)
    (line,) = axes.plot(seen, mean[1:], label=name)
    axes.fill_between(
        seen, (mean - 2 * error)[1:], (mean + 2 * error)[1:], color=line.get_color(), alpha=0.2
    )
    print(f"{name:<22} gap {mean[-1]:.4f} ± {error[-1]:.4f}")
axes.set(xscale="log", yscale="log", xlabel="comparisons", ylabel="J(pi*) - J(pi)")
_ = axes.legend()

# %% [markdown]
# Going on learning from pi0 stops paying where pi0 has nothing to show; exploring does not. Whether
# pessimism beats greedy depends on the coverage and on the radius: `experiments/coverage` sweeps
# both. The next notebook trains a language model with the very same likelihood.
