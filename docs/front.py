"""The picture of the front page: ``python docs/front.py`` writes ``docs/_static/front.svg``.

What the library is, in one figure: the same three values choose the pairs in both worlds. On the
left a bandit, where every point is exact for its seed and the best that can be had at any KL is
known; on the right a small language model (:mod:`jax_klrlhf.toy`), where both axes are estimated
from draws. Two minutes on two CPU cores.
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from matplotlib.figure import Figure
from rich.console import Console

from jax_klrlhf import bandit, figures, toy
from jax_klrlhf.core import pairs
from jax_klrlhf.training import rounds
from jax_klrlhf.training.rounds import oracle

COEFFICIENTS = (0.1, 0.2, 0.4, 0.8, 1.6)
SEEDS, LABELS, ROUNDS = 128, 512, 2
RANKED = pairs.otherwise(pairs.best_worst, pairs.sampled)
RULES = {
    "offline: pi0's draws": None,
    "online: best and worst": lambda eta: RANKED,
    "online: enhancer": lambda eta: pairs.enhancer(kl_coef=eta),
}
SHARED = (
    ("what a label means", "bradley_terry"),
    ("the policy of a reward", "gibbs.log_prob"),
    ("the reward of a policy", "gibbs.implicit_reward"),
    ("what it costs", "divergence"),
    ("whom to compare", "pairs.best_worst"),
    ("who explores", "pairs.enhancer"),
    ("what is not known", "ellipsoid"),
)


def exact(name: str | None, coefficients) -> list[np.ndarray]:
    """KL to pi0 and reward above pi0's at each coefficient, means over problems.

    Sums over actions, nothing drawn; None: of the optimum.
    """

    def one(key, eta):
        key_problem, key_run = jax.random.split(key)
        problem = _problem(key_problem, eta)
        if name is None:
            return _place(problem, bandit.optimum(problem))
        make = RULES[name]
        rule = None if make is None else make(eta)
        learner = bandit.offline_greedy() if rule is None else bandit.from_rule(rule, samples=4)
        run = bandit.simulate(key_run, problem, learner, rounds=4, batch=32)
        return _place(problem, run.log_prob)

    program = jax.jit(jax.vmap(one, in_axes=(0, None)))
    keys = jax.random.split(jax.random.key(0), SEEDS)
    found = np.array([[x.mean() for x in program(keys, eta)] for eta in coefficients])
    return list(found.T)


def _problem(key, eta):
    return bandit.sphere(
        key, contexts=8, actions=8, dim=6, hidden=3, coverage=0.05, bound=3.0, kl_coef=eta
    )


def _place(problem, log_prob):
    setting = problem.setting
    mean = lambda law: setting.context_prob @ jnp.sum(jnp.exp(law) * problem.reward, -1)  # noqa: E731
    return bandit.kl(setting, log_prob), mean(log_prob) - mean(setting.ref_log_prob)


def drawn(world: toy.World, name: str, eta: float, shared: dict) -> dict:
    """Gold reward and KL of a policy of the toy language model, on held-out prompts."""
    make, train = RULES[name], shared["train"]
    parts = {
        "sampler": rounds.main_agent(world.draw(4)),
        "reward": shared["belief"],
        "oracle": oracle.bradley_terry(world.gold),
        "pair_rule": RANKED if make is None else make(eta),
        "improve": rounds.dpo(world.model, kl_coef=eta, fitting=shared["fitting"], rows=256),
        "console": Console(quiet=True),
    }
    key = jax.random.key(4)
    if make is None:
        outcome = rounds.iterate(
            key, world.pi0, prompts=train, rounds=0, offline=shared["offline"], **parts
        )
    else:
        half = LABELS // ROUNDS
        own = lambda n: jax.tree.map(lambda x: x[(n - 1) * half : n * half], train)  # noqa: E731
        outcome = rounds.iterate(key, world.pi0, prompts=own, rounds=ROUNDS, **parts)
    return world.evaluate(outcome.policy)


def main() -> None:
    """Run both worlds and write the picture."""
    matplotlib.rcParams.update(figures.STYLE | {"font.size": 10, "axes.labelsize": 10})
    figure = Figure(figsize=(11, 4.1), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 0.72, 1))

    frontier = exact(None, jnp.geomspace(0.06, 6.0, 24))
    left.plot(*frontier, color="0.55", label="the best at its KL", zorder=1)
    for name in RULES:
        left.plot(*exact(name, jnp.array(COEFFICIENTS)), "o-", label=name)
    left.set(xlabel="KL to pi0, nats", ylabel="reward above pi0's")
    left.set_title("bandit: contexts × actions, exact sums", fontweight="bold")

    world = toy.world()
    train = world.prompts(LABELS, seed=2)
    shared = {
        "train": train,
        "belief": rounds.linear(
            rounds.hidden_features(world.model, world.pi0, scale=8.0, rows=256),
            dim=32, ridge=0.01, radius=0.3,
        ),
        "fitting": rounds.Fitting(optimizer=optax.adam(3e-3), steps=80, batch_size=64),
        "offline": rounds.collect(
            jax.random.key(3), world.pi0, prompts=train, sampler=rounds.main_agent(world.draw(2)),
            reward=rounds.known(world.gold), pair_rule=pairs.sampled,
            oracle=oracle.bradley_terry(world.gold),
        ),
    }  # fmt: skip
    base = world.evaluate(world.pi0)["reward"].value
    for number, name in enumerate(RULES):
        found = [drawn(world, name, eta, shared) for eta in COEFFICIENTS]
        found.sort(key=lambda at: at["kl"].value)
        right.errorbar(
            [at["kl"].value for at in found], [at["reward"].value - base for at in found],
            [2 * at["reward"].stderr for at in found], [2 * at["kl"].stderr for at in found],
            fmt="o-", color=left.lines[number + 1].get_color(), label=name,
        )  # fmt: skip
    right.set(xlabel="KL to pi0, nats")
    right.set_title("language model: prompts × responses, draws", fontweight="bold")

    middle.set_axis_off()
    middle.set(xlim=(0, 1), ylim=(0, 1))
    middle.set_title("one core: functions on arrays", fontweight="bold")
    for row, (text, name) in enumerate(SHARED):
        y = 0.93 - 0.118 * row
        middle.text(0.5, y, name, ha="center", va="center", family="monospace", fontsize=10.5)
        middle.text(0.5, y - 0.047, text, ha="center", va="center", color="0.4", fontsize=8.5)
    arrow = partial(middle.annotate, "", xycoords="axes fraction", annotation_clip=False)
    for x, to in ((0.08, -0.06), (0.92, 1.06)):
        arrow(xy=(to, 0.5), xytext=(x, 0.5), arrowprops={"arrowstyle": "-|>", "color": "0.4"})
    middle.text(0.5, 0.05, "bandit.simulate  |  rounds.iterate", ha="center", family="monospace",
                fontsize=9, color="0.25")  # fmt: skip
    handles, names = left.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=9.5)

    target = Path(__file__).parent / "_static" / "front.svg"
    figure.savefig(target, metadata={"Date": None}, facecolor="white")
    print(f"{target}: {target.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
