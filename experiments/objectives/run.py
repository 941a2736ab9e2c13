r"""Which objective, and which law: losses on groups and pairs, the same samples for each.

On small linear bandits with a tabular policy (every expectation exact) each loss is trained by Adam
on K draws of the current policy per context and step. Measured at the end, over seeds (problems):

- J(pi*) - J(pi) at the loss's own ``kl_coef``;
- reward below the frontier: E r of the Gibbs law of equal KL, less E r (never negative);
- total variation to the Gibbs law, and to the forward KL's law: which of them was reached;
- the largest probability, and the entropy.

So the table says what each loss converges to in practice, beside what its docstring says.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key
from rich.console import Console
from rich.progress import Progress

from experiments import plotting, study
from jax_klrlhf import bandit, results
from jax_klrlhf.core import (
    divergence,
    fdivergence,
    gibbs,
    group_losses,
    measure,
    numerics,
    regularized,
)
from jax_klrlhf.core import policy_gradient as gradients
from jax_klrlhf.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Train every loss at every coefficient on the same problems."""

    output: Path = Path("results/objectives")
    """Where results.json and the figure go."""
    smoke: bool = False
    """A toy size that ends in half a minute: nothing is learned."""
    seeds: int = 32
    """Problems; every loss sees the same."""
    seed: int = 0
    kl_coefs: tuple[float, ...] = (0.2, 0.5, 1.0)
    contexts: int = 8
    actions: int = 12
    dim: int = 6
    bound: float = 3.0
    """Norm of theta*: rewards lie between plus and minus it."""
    coverage: float = 0.3
    """Of the rarer half of the actions by pi0; 1 is a uniform pi0."""
    samples: int = 8
    """Draws at each context and step, K."""
    steps: int = 1500
    learning_rate: float = 0.02
    """Of Adam on the logits; falls linearly to 0."""

    def resized(self) -> "Config":
        """This, or the small size if it was asked for."""
        if not self.smoke:
            return self
        return dataclasses.replace(
            self, seeds=4, kl_coefs=(0.5,), contexts=2, actions=4, dim=3, samples=4, steps=60
        )

    def check(self) -> None:
        """Refuse what cannot run, before any compute is spent."""
        if self.seeds < 2:
            raise InputError(f"--seeds {self.seeds}: a standard error needs at least two seeds.")
        if not self.kl_coefs or not all(0 < c < np.inf for c in self.kl_coefs):
            raise InputError("--kl-coefs: positive numbers.")
        if self.samples < 2 or self.steps < 1 or self.contexts < 1 or self.actions < 2:
            raise InputError(
                "--samples and --actions: at least 2; --steps, --contexts: at least 1."
            )
        if not self.learning_rate > 0:
            raise InputError(f"--learning-rate {self.learning_rate}: a positive number.")


def losses(config: Config) -> dict[str, Callable[[Array], group_losses.Loss]]:
    """Every loss as a function of its coefficient."""

    def k2(advantage: group_losses.Advantage) -> Callable[[Array], group_losses.Loss]:
        return lambda kl_coef: group_losses.clipped(
            advantage=advantage, low=0.2, high=0.2, mean="group", kl_coef=kl_coef,
            penalty=fdivergence.reverse_kl,
        )  # fmt: skip

    return {
        "regression (PRDP, VarGrad)": lambda c: group_losses.regression(kl_coef=c),
        "regression, forward KL": lambda c: group_losses.regression(
            kl_coef=c, divergence=fdivergence.forward_kl
        ),
        "RLOO": lambda c: group_losses.rloo(kl_coef=c),
        "leave-one-out, k2 as a loss": k2(gradients.leave_one_out),
        "GRPO (k3 as a loss, by std)": lambda c: group_losses.grpo(kl_coef=c),
        "by std, k2 as a loss": k2(gradients.by_std),
        "Dr. GRPO (k3 as a loss)": lambda c: group_losses.dr_grpo(size=1, kl_coef=c),
        "DAPO (no KL)": lambda c: group_losses.dapo(),
    }


LAWS = {
    "regression (PRDP, VarGrad)": "Gibbs",
    "regression, forward KL": "Gibbs",
    "RLOO": "Gibbs",
    "leave-one-out, k2 as a loss": "Gibbs",
    "GRPO (k3 as a loss, by std)": "forward KL at eta sd(r)",
    "by std, k2 as a loss": "Gibbs at eta sd(r), or none",
    "Dr. GRPO (k3 as a loss)": "forward KL",
    "DAPO (no KL)": "none",
}
"""What the docstrings say, in the limit of many draws."""


def forward_law(
    reward: Float[Array, "contexts actions"], ref: Float[Array, "contexts actions"], kl_coef: Array
) -> Float[Array, "contexts actions"]:
    """log of eta pi0 / (lambda - r), the optimum of E r - eta KL(pi0 || pi)."""
    return regularized.log_prob(reward, ref, kl_coef=kl_coef, divergence=fdivergence.forward_kl)


def train(
    key: Key[Array, ""], kl_coef: Array, *, make: Callable[[Array], group_losses.Loss],
    config: Config,
) -> dict[str, Array]:  # fmt: skip
    """One loss at one coefficient on one problem: what it came to."""
    key_world, key_run = jax.random.split(key)
    problem = bandit.sphere(
        key_world, contexts=config.contexts, actions=config.actions, dim=config.dim,
        kl_coef=kl_coef, bound=config.bound, coverage=config.coverage,
    )  # fmt: skip
    reward, ref = problem.reward, problem.setting.ref_log_prob
    loss = make(kl_coef)
    schedule = optax.linear_schedule(config.learning_rate, 0.0, config.steps)
    optimizer = optax.adam(schedule)

    def step(carry: Any, number: Array) -> tuple[Any, None]:
        logits, state = carry
        drawn = jax.random.categorical(
            jax.random.fold_in(key_run, number), logits, axis=-1,
            shape=(config.samples, config.contexts),
        ).T  # fmt: skip

        def total(logits: Array) -> Array:
            log_prob = jax.nn.log_softmax(logits)
            at = functools.partial(jnp.take_along_axis, indices=drawn, axis=-1)
            made = group_losses.from_actions(
                at(log_prob), at(reward), ref_log_prob=at(ref),
                old_log_prob=jax.lax.stop_gradient(at(log_prob)),
            )  # fmt: skip
            return jnp.mean(loss(made))

        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            updates, state = optimizer.update(jax.grad(total)(logits), state)
            logits = optax.apply_updates(logits, updates)
        return (logits, state), None

    begin = (ref, optimizer.init(ref))
    (logits, _), _ = jax.lax.scan(step, begin, jnp.arange(config.steps))
    log_prob = jax.nn.log_softmax(logits)
    optimum = gibbs.log_prob(reward, ref, kl_coef=kl_coef)
    forward = forward_law(reward, ref, kl_coef)

    def variation(law: Array) -> Array:
        return jnp.mean(jnp.sum(jnp.abs(jnp.exp(log_prob) - jnp.exp(law)), -1) / 2)

    expected = jnp.mean(numerics.expectation(log_prob, reward))
    return {
        "gap": jnp.mean(gibbs.gap(log_prob, reward, ref, kl_coef=kl_coef)),
        "reward": expected - jnp.mean(numerics.expectation(ref, reward)),
        "KL": jnp.mean(divergence.categorical(log_prob, ref)),
        "below the frontier": measure.frontier_gap(log_prob, reward, ref),
        "TV to Gibbs": variation(optimum),
        "TV to forward KL": variation(forward),
        "largest probability": jnp.mean(jnp.exp(jnp.max(log_prob, -1))),
        "entropy": jnp.mean(-numerics.expectation(log_prob, log_prob)),
    }


def main(config: Config, *, console: Console | None = None) -> Path:
    """Train every loss, print the tables, draw the figure; returns the path of ``results.json``."""
    here = study.begin("objectives", config, console=console)
    config = here.config
    keys = jax.random.split(jax.random.key(config.seed), config.seeds)
    coefs = jnp.asarray(config.kl_coefs)
    found: dict[str, dict[str, np.ndarray]] = {}
    with Progress(console=here.console) as progress:
        task = progress.add_task("objectives", total=len(losses(config)))
        for name, make in losses(config).items():
            one = functools.partial(train, make=make, config=config)
            every = jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))
            found[name] = jax.tree.map(np.asarray, every(keys, coefs))
            progress.advance(task)
    metrics = {
        f"kl_coef={coef:g}/{name}/{metric}": results.mean(values[:, at])
        for name, panel in found.items()
        for metric, values in panel.items()
        for at, coef in enumerate(config.kl_coefs)
    }
    shown = ("gap", "KL", "below the frontier", "TV to Gibbs", "TV to forward KL")
    for at, coef in enumerate(config.kl_coefs):
        rows: dict[str, dict[str, results.Metric | str]] = {}
        for name, panel in found.items():
            rows[name] = {"law": LAWS[name]}
            rows[name] |= {metric: results.mean(panel[metric][:, at]) for metric in shown}
        results.print_table(
            f"kl_coef {coef:g}: {config.steps} steps of {config.samples} draws, "
            f"{config.seeds} problems",
            rows,
            console=here.console,
            caption="± one standard error over problems",
        )
    _figure(config, found, here.output / "objectives.png")
    return here.end(metrics, beside="objectives.png")


def _figure(config: Config, found: dict[str, dict[str, np.ndarray]], target: Path) -> None:
    figure, axes = plotting.grid(1, 2, width=5.6, height=4.2)
    for number, (name, panel) in enumerate(found.items()):
        color = f"C{number}"
        axes[0, 0].errorbar(
            panel["KL"].mean(0), panel["reward"].mean(0),
            panel["reward"].std(0, ddof=1) / np.sqrt(config.seeds),
            marker="o", color=color, label=name, linewidth=1,
        )  # fmt: skip
        below = np.maximum(panel["below the frontier"], 1e-7)
        plotting.band(axes[0, 1], config.kl_coefs, below, label=name, color=color)
    plotting.label(axes[0, 0], x="KL to pi0, nats", y="reward over pi0's")
    plotting.label(axes[0, 1], x="kl_coef", y="reward below the frontier", log="xy")
    axes[0, 0].legend(fontsize=6)
    plotting.save(figure, target)


cli = study.entry(main, Config, __doc__)
