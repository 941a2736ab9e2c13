"""What is asked of the exact language bandit: five panels, each numbers and the data of a plot."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jaxtyping import Float
from rich.console import Console
from scipy import stats

from experiments.exact_lm.world import STOP, Exact, World, evaluate, optimum
from jax_klrlhf.core import bounds, choices, enhancer, pairs, rejection, targets
from jax_klrlhf.models import enumerate as enumerated
from jax_klrlhf.results import Metric, mean, proportion
from jax_klrlhf.training import rounds
from jax_klrlhf.training.rounds import oracle, settings
from jax_klrlhf.training.rounds import rejection as rejections
from jax_klrlhf.training.rounds.features import estimate
from jax_klrlhf.training.rounds.parts import pick, ragged, token_rows

QUIET = Console(quiet=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of the panels."""

    fixed_point_pairs: int = 6000
    """Pairs with exact probabilities as labels, from pi0."""
    fixed_point_steps: int = 3000
    evaluations: int = 20
    """Points along that fit."""
    rejection_steps: tuple[int, ...] = (1, 2, 4, 8)
    proposals: int = 8192
    """Per prompt, shared by the steps of a chain."""
    labels_per_round: int = 480
    rounds: int = 5
    steps: int = 300
    """Optimizer steps of every fit of the comparison."""
    learning_rate: float = 3e-3
    draws: int = 20_000
    """Responses to one prompt with which a sampler is compared with its law."""
    coverage_rows: tuple[int, ...] = (500, 2000, 8000)
    coverage_trials: int = 200
    delta: float = 0.05


class Path(NamedTuple):
    """Gap against labels of one method and seed."""

    labels: list[int]
    gap: list[float]
    kl: list[float]


def draw_of(
    world: World, samples: int, *, temperature: float = 1.0, rows: int | None = None
) -> rounds.Draw:
    """How policies of this world are sampled from; ``rows`` prompts at one time."""
    return rounds.Draw(
        model=world.model, samples=samples, max_new_tokens=world.config.length, stop=(STOP,),
        temperature=temperature, rows=rows or max(1, 65_536 // samples),
    )  # fmt: skip


def repeated(world: World, rows: int) -> Any:
    """The prompts, again and again, up to ``rows`` rows."""
    at = np.arange(rows) % len(world.prompts.lengths)
    return ragged(np.asarray(world.prompts.ids)[at], np.asarray(world.prompts.lengths)[at])


def fitting_of(steps: int, rate: float, **options: Any) -> rounds.Fitting:
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, max(1, steps // 10), steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    return rounds.Fitting(optimizer=optimizer, steps=steps, batch_size=64, **options)


def fixed_point(world: World, config: Config, key: Any) -> tuple[dict[str, Metric], list[Exact]]:
    """DPO on all the preferences there are, against the Gibbs policy, and L0 along the way."""
    key_data, key_fit = jax.random.split(key)
    path = [evaluate(world, world.params)]

    def watch(state: Any) -> dict[str, Metric]:
        path.append(evaluate(world, state.policy))
        return {}

    every = max(1, config.fixed_point_steps // config.evaluations)
    fitting = fitting_of(
        config.fixed_point_steps, config.learning_rate, evaluate_every=every, evaluate=watch
    )
    eta = world.config.kl_coef
    data = rounds.collect(
        key_data, world.params, prompts=repeated(world, config.fixed_point_pairs),
        sampler=rounds.main_agent(draw_of(world, 2)), reward=rounds.known(world.judge),
        pair_rule=pairs.sampled, oracle=oracle.expected(world.judge),
    )  # fmt: skip
    rounds.iterate(
        key_fit, world.params, console=QUIET, prompts=world.prompts, rounds=0, offline=data,
        sampler=rounds.main_agent(draw_of(world, 2)), reward=rounds.known(world.judge),
        pair_rule=pairs.best_worst, oracle=oracle.expected(world.judge),
        improve=rounds.dpo(world.model, kl_coef=eta, fitting=fitting),
    )  # fmt: skip
    error = max(float(np.abs(e.gap - eta * e.to_optimum).max()) for e in path)
    first, last = path[0], path[-1]
    return {
        "fixed_point/pi0/kl_to_optimum": mean(first.to_optimum),
        "fixed_point/dpo/kl_to_optimum": mean(last.to_optimum),
        "fixed_point/pi0/total_variation": mean(first.variation),
        "fixed_point/dpo/total_variation": mean(last.variation),
        "fixed_point/dpo/gap": mean(last.gap),
        "identity/along training/largest error": Metric(error, None, len(path)),
    }, path


def samplers(world: World, config: Config, key: Any) -> dict[str, Metric]:
    """Each sampler's draws against its exact law, by a chi-squared test on the last prompt.

    The value is the p-value: uniform where the sampler is right.
    """
    row = len(world.prompts.lengths) - 1
    prompt = ragged(world.prompts.ids[row:], world.prompts.lengths[row:])
    reward, base = world.reward[row], world.base[row]
    cold = enumerated.log_prob(
        enumerated.tempered(world.model, 0.7), world.params,
        jax.tree.map(jax.numpy.asarray, prompt), world.every,
    )  # fmt: skip
    keys = jax.random.split(key, 4)
    plain, warped = draw_of(world, config.draws), draw_of(world, config.draws, temperature=0.7)
    found = {}

    def compare(name: str, responses: Any, log_law: Any) -> None:
        count = np.bincount(_numbers(world, responses), minlength=base.size)
        found[f"samplers/{name}/p_value"] = Metric(_p_value(count, log_law), None, int(count.sum()))

    drawn = plain(keys[0], world.params, prompt)
    compare("pi0", drawn, base)
    compare("temperature 0.7", warped(keys[1], world.params, prompt), cold[0])
    n = 4
    groups = ragged(
        drawn.ids.reshape(-1, n, drawn.ids.shape[-1]), np.asarray(drawn.lengths).reshape(-1, n)
    )
    of = reward[_numbers(world, groups)].reshape(-1, n)
    every = choices.enumerated(jax.numpy.asarray(base), reward=jax.numpy.asarray(reward))
    best = targets.best_of(every, n=n)
    compare(f"best of {n}", pick(groups, of.argmax(1)[:, None]), best)
    at = _numbers(world, drawn)
    taken = rejection.accept(
        keys[2], jax.numpy.asarray(reward[at], jax.numpy.float32), reward_bound=float(reward.max()),
        kl_coef=1.0,
    )  # fmt: skip
    kept = np.asarray(taken.accepted)
    accepted = ragged(drawn.ids[:, kept], np.asarray(drawn.lengths)[:, kept])
    compare("rejection at kl_coef 1", accepted, optimum(world, kl_coef=1.0)[row])
    return found


def rejection_chain(world: World, config: Config, key: Any) -> dict[str, Metric]:
    """Multi-step rejection with maximum likelihood at every step, against its exact targets."""
    eta, bound = world.config.kl_coef, float(world.reward.max())
    found: dict[str, Metric] = {}
    fitted = rejections.likelihood(
        world.model, fitting=fitting_of(config.steps * 2, config.learning_rate)
    )
    for steps in config.rejection_steps:
        policies: list[Any] = []

        def learn(key: Any, params: Any, situation: Any, accepted: Any, to: Any = policies):
            outcome = fitted(key, params, situation, accepted)
            to.append(outcome.params)
            return outcome

        improve = rounds.rejection_sampling(
            draw_of(world, config.proposals // steps), learn, kl_coef=eta, steps=steps,
            reward_bound=bound,
        )  # fmt: skip
        situation = rounds.Situation(
            policies=rounds.Policies(world.params, world.params, world.params, (world.params,)),
            start=world.params, data=rounds.Mixture([], None), prompts=world.prompts,
            score=lambda prompts, responses: _certain(world.judge(prompts, responses)),
            folder=None,
        )  # fmt: skip
        metrics = improve(jax.random.fold_in(key, steps), situation).metrics
        name = f"{steps} step" + "s" * (steps > 1)
        coefs = [float("inf"), *(float(c) for c in rejection.schedule(eta, steps))]
        policy, rates = evaluate(world, world.params), []
        for number in range(1, steps + 1):
            exact = _acceptance(
                policy.log_prob, world.reward, bound, coefs[number], coefs[number - 1]
            )
            found[f"rejection/{name}/acceptance exact {number}"] = mean(exact)
            found[f"rejection/{name}/acceptance {number}"] = metrics[
                f"rejection/acceptance/{number}"
            ]
            rates.append(exact)
            policy = evaluate(world, policies[number - 1])
        found[f"rejection/{name}/proposals per accepted"] = mean(sum(1 / rate for rate in rates))
        found[f"rejection/{name}/total_variation"] = mean(policy.variation)
        found[f"rejection/{name}/gap"] = mean(policy.gap)
    star = np.exp(optimum(world))
    for samples in (8, 64, 512):
        # In float64: sums of thousands of probabilities in float32 do not rise monotonically.
        with jax.enable_x64(True):
            log_law = rejection.batch_maximum_log_prob(
                jax.numpy.asarray(world.reward), jax.numpy.asarray(world.base), samples=samples,
                kl_coef=eta,
            )  # fmt: skip
            law = np.exp(np.asarray(log_law))
        error = np.abs(law - star).sum(1) / 2
        found[f"rejection/unknown bound, {samples} draws/total_variation"] = mean(error)
        rows = np.arange(60) % len(world.base)
        number = _draw_exactly(np.random.default_rng(samples), world, rows, samples)
        reward = jax.numpy.asarray(world.reward[rows[:, None], number], jax.numpy.float32)
        estimated = rejections.bound_error(reward, kl_coef=eta, kl_coef_prev=float("inf"))
        found[f"rejection/unknown bound, {samples} draws/estimated"] = mean(np.asarray(estimated))
    return found


def comparison(
    world: World, config: Config, seeds: Sequence[int]
) -> tuple[dict[str, Metric], dict[str, list[Path]]]:
    """Gap of offline, online and hybrid learning at the same number of labels."""
    eta, m = world.config.kl_coef, config.labels_per_round
    improve = rounds.dpo(
        world.model, kl_coef=eta, fitting=fitting_of(config.steps, config.learning_rate)
    )
    # Pieces of one size, whatever the number of labels: one compilation.
    single, pair, eight = (draw_of(world, samples, rows=m) for samples in (1, 2, 8))
    implicit = rounds.implicit(world.model, kl_coef=eta, rows=m)
    plain = rounds.known(lambda prompts, responses: np.zeros(responses.lengths.shape, np.float32))
    linear = rounds.linear(world.features, dim=world.theta.size, ridge=1.0, radius=1.0)
    prompts, labels = repeated(world, m), oracle.bradley_terry(world.judge)
    random_pair = pairs.sampled
    parts: dict[str, dict[str, Any]] = {
        "offline": {},
        "online, two draws": {
            "sampler": rounds.main_agent(pair), "reward": plain, "pair_rule": random_pair,
        },
        "online, against pi0": {
            "sampler": rounds.against_base(single), "reward": plain,
            "pair_rule": pairs.between_agents(),
        },
        "online, best and worst of 8": {
            "sampler": rounds.main_agent(eight), "reward": implicit,
            "pair_rule": pairs.otherwise(pairs.best_worst, pairs.sampled),
        },
        "online, uncertain enhancer": {
            "sampler": rounds.main_agent(eight), "reward": linear,
            "pair_rule": pairs.enhancer(kl_coef=eta, option=enhancer.best_of_n),
        },
    }  # fmt: skip
    parts["hybrid, against pi0"] = parts["online, against pi0"]
    paths: dict[str, list[Path]] = {name: [] for name in parts}
    offline_part = {
        "sampler": rounds.main_agent(pair), "reward": plain, "pair_rule": random_pair,
    }  # fmt: skip

    def gather(key: Any, rows: int) -> rounds.Comparisons:
        return rounds.collect(
            key, world.params, prompts=repeated(world, rows), oracle=labels, **offline_part
        )

    for seed in seeds:
        for name, part in parts.items():
            key = jax.random.fold_in(jax.random.key(seed), list(parts).index(name))
            offline = gather(key, m * (config.rounds // 2))
            if name == "offline":
                outcomes = [
                    rounds.iterate(
                        key, world.params, prompts=prompts, rounds=0, improve=improve,
                        offline=gather(key, m * number), oracle=labels, console=QUIET,
                        **offline_part,
                    ).policy
                    for number in range(1, config.rounds + 1)
                ]  # fmt: skip
                first = 1
            elif name.startswith("hybrid"):
                first = config.rounds // 2
                outcomes = list(
                    rounds.iterate(
                        key, world.params, prompts=prompts, rounds=config.rounds - first,
                        improve=improve, oracle=labels, offline=offline,
                        setting=settings.everything, console=QUIET, **part,
                    ).policies
                )[1:]  # fmt: skip
            else:
                first = 1
                outcomes = list(
                    rounds.iterate(
                        key, world.params, prompts=prompts, rounds=config.rounds,
                        improve=improve, oracle=labels, console=QUIET, **part,
                    ).policies
                )[1:]  # fmt: skip
            exact = [evaluate(world, params) for params in outcomes]
            paths[name].append(
                Path(
                    [m * (first + i) for i in range(len(exact))],
                    [float(e.gap.mean()) for e in exact],
                    [float(e.kl.mean()) for e in exact],
                )
            )
    metrics = {
        f"comparison/{name}/{field}": mean([getattr(path, field)[-1] for path in found])
        for name, found in paths.items()
        for field in ("gap", "kl")
    }
    metrics |= {
        f"comparison/{name} - offline/gap": mean(
            [a.gap[-1] - b.gap[-1] for a, b in zip(found, paths["offline"], strict=True)]
        )
        for name, found in paths.items()
        if name != "offline"
    }
    return metrics, paths


def coverage(world: World, config: Config, key: Any) -> dict[str, Metric]:
    r"""How often the confidence sets of the linear belief cover the gold parameter.

    *Estimated* is the set by the likelihood's own curvature, :math:`(\hat\theta - \theta)^\top
    H(\hat\theta)(\hat\theta - \theta) \le \chi^2_{d, 1 - \delta}`; *theory* is the ellipsoid's,
    with :func:`bounds.radius` at constant 1, norm bound and least curvature of this world.
    Standard errors of a proportion; the interval is Wilson's.
    """
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())
    rows, dim = len(world.prompts.lengths), world.theta.size
    norm = float(np.linalg.norm(world.theta))
    ridge = 1e-4
    limit = float(stats.chi2.ppf(1 - config.delta, dim))
    largest = float(np.ptp(world.reward, axis=1).max())
    radius = float(
        bounds.radius(
            dim=dim, delta=config.delta, ridge=ridge, bound=norm,
            curvature=float(bounds.gamma(largest)), constant=1.0,
        )
    )  # fmt: skip
    found: dict[str, Metric] = {}
    for count in config.coverage_rows:
        inside, theory, ratio = [], [], []
        for _ in range(config.coverage_trials):
            prompt = rng.integers(0, rows, count)
            drawn = _draw_exactly(rng, world, prompt, 2).T
            z = (world.phi[prompt, drawn[0]] - world.phi[prompt, drawn[1]]).astype(np.float32)
            label = (rng.uniform(size=count) < _sigmoid(z @ world.theta)).astype(np.float32)
            belief = estimate(z, label, np.ones(count, np.float32), ridge=ridge)
            theta = np.asarray(belief.theta, np.float64)
            error, margin = theta - world.theta, z.astype(np.float64) @ theta
            weighted = z * np.sqrt(_sigmoid(margin) * _sigmoid(-margin))[:, None]
            square = np.sum((weighted @ error) ** 2) + ridge * error @ error
            inside.append(square <= limit)
            ellipsoid = np.sqrt(error @ np.asarray(belief.ellipsoid.precision, np.float64) @ error)
            theory.append(ellipsoid <= radius)
            ratio.append(ellipsoid / radius)
        for name, hits in (("estimated", inside), ("theory", theory)):
            share, (low, high) = proportion(hits)
            found[f"coverage/{name}, {count} labels/frequency"] = share
            found[f"coverage/{name}, {count} labels/low"] = Metric(low)
            found[f"coverage/{name}, {count} labels/high"] = Metric(high)
        found[f"coverage/theory, {count} labels/error over radius"] = mean(ratio)
    return found


def _certain(reward: Any) -> rounds.Scored:
    return rounds.Scored(reward, np.zeros_like(reward))


def _acceptance(
    proposal: Any, reward: Any, bound: float, kl_coef: float, previous: float
) -> Float[np.ndarray, " B"]:
    return (np.exp(proposal + (1 / kl_coef - 1 / previous) * (reward - bound))).sum(1)


def _draw_exactly(
    rng: np.random.Generator, world: World, prompt: np.ndarray, samples: int
) -> np.ndarray:
    """Numbers of responses drawn from the exact law of pi0 at each prompt, ``[rows, samples]``."""
    cumulative = np.cumsum(np.exp(world.base), 1)
    uniform = rng.uniform(size=(len(prompt), samples)) * cumulative[prompt, -1][:, None]
    found = np.zeros((len(prompt), samples), int)
    for row in np.unique(prompt):
        found[prompt == row] = np.searchsorted(cumulative[row], uniform[prompt == row])
    return found


def _numbers(world: World, responses: Any) -> np.ndarray:
    """Number of each response in the list of all."""
    table = {row: number for number, row in enumerate(token_rows(world.every))}
    flat = ragged(
        np.asarray(responses.ids).reshape(-1, responses.ids.shape[-1]),
        np.asarray(responses.lengths).ravel(),
    )
    return np.array([table[row] for row in token_rows(flat)])


def _p_value(count: np.ndarray, log_law: Any) -> float:
    """Chi-squared test of counts against a law; cells of fewer than 5 expected are one cell."""
    expected = np.exp(np.asarray(log_law, np.float64)) * count.sum()
    large = expected >= 5
    seen = np.append(count[large], count[~large].sum())
    hoped = np.append(expected[large], expected[~large].sum())
    keep = hoped > 1
    statistic = np.sum((seen[keep] - hoped[keep]) ** 2 / hoped[keep])
    return float(stats.chi2.sf(statistic, keep.sum() - 1))


def _sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))
