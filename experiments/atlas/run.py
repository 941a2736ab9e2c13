"""An atlas of claims: one row for each system, what it claims, and what exact small worlds say.

Every row is a function of the library and an exact check (`checks.py`), over random worlds; the
verdict follows from the interval, not from a person. Effects above 0 speak for the claim. Worlds
and sizes are ours: they show direction, not a paper's size.

Further rows are read from the `results.json` of other experiments (`--goodhart`, `--pluralism`).
"""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from experiments.atlas import checks, policy
from jax_klrlhf import results
from jax_klrlhf.errors import InputError, reported


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A claim. Its effect is measured by `check`, or read from another experiment's results."""

    system: str
    claim: str
    function: str
    check: Callable[..., checks.Effect] | None = None
    source: tuple[str, str] | None = None
    """Experiment, and the metric that is the effect."""
    control: str = ""


ROWS = (
    Row(
        system="MaxMin-RLHF (2402.08925)",
        claim="max-min over groups raises the worst group",
        function="saddle.simplex",
        check=checks.maxmin_helps_the_worst_group,
        control="equal groups",
    ),
    Row(
        system="MaxMin-RLHF (2402.08925)",
        claim="the majority is not harmed",
        function="saddle.simplex",
        check=checks.maxmin_leaves_the_majority_unharmed,
        control="equal groups",
    ),
    Row(
        system="public max-min trainers",
        claim="the minimum over groups may be taken response by response",
        function="aggregate.minimum",
        check=checks.minimum_inside_is_max_min,
        control="the saddle's own gap",
    ),
    Row(
        system="constrained RLHF (2310.04373)",
        claim="constraints on mean proxies stop hacking better than a ceiling on each sample",
        function="saddle.free",
        check=checks.constrained_means_stop_hacking,
        control="no hacks",
    ),
    Row(
        system="MORE (2312.07401)",
        claim="min-norm weights improve a pooled fit",
        function="groups.min_norm",
        check=checks.multi_task_weights_repair_a_pooled_fit,
        control="from a cold start",
    ),
    Row(
        system="Parrot",
        claim="training on non-dominated samples puts more mass on the front than the sum",
        function="select.non_dominated",
        check=checks.non_dominated_training_beats_the_sum,
        control="over pi0",
    ),
    Row(
        system="Secrets of RLHF II (2401.06080)",
        claim="flipping the weakest tenth of 25 % noisy labels helps",
        function="labels.edit",
        check=checks.flipping_the_weakest_labels_helps,
        control="clean labels",
    ),
    Row(
        system="Crowd-BT",
        claim="annotators' flip rates by EM mend the direction of the reward",
        function="labels.reliability",
        check=checks.annotators_are_told_apart,
        control="equal annotators",
    ),
    Row(
        system="HERON (2309.02633)",
        claim="ranked factors with margins are the preferences of some reward",
        function="labels.lexicographic",
        check=checks.ranked_factors_have_a_reward,
        control="no margins",
    ),
    Row(
        system="DNO (2404.03715)",
        claim="regression to the win rate improves monotonically (on a cycle)",
        function="links.win_rate",
        check=checks.win_rate_regression_improves_monotonically,
        control="preferences with a reward",
    ),
    Row(
        system="general preferences (2402.07314)",
        claim="the equilibrium is less exploitable than the Bradley-Terry optimum (on a cycle)",
        function="links.nash",
        check=checks.equilibrium_is_less_exploitable_than_a_reward,
        control="indifferent preferences",
    ),
    Row(
        system="regret preferences (2206.02231)",
        claim="regret identifies the optimum's prefixes, partial return does not",
        function="links.regret",
        check=checks.regret_identifies_prefix_preferences,
        control="whole responses",
    ),
    Row(
        system="PAR (2502.18770)",
        claim="the transform is harmless when the reward is exact",
        function="reshape.win_rate",
        check=checks.transforms_are_harmless_with_an_exact_reward,
        control="another scale",
    ),
    Row(
        system="transforming and combining (2402.00742)",
        claim="a sum of log-sigmoids is an AND: more responses that are good in both",
        function="aggregate.conjunction",
        check=checks.log_sigmoids_sum_to_and,
        control="raw sum of rewards",
    ),
    Row(
        system="DARLING (2509.02534)",
        claim="reward times rarity makes a policy more diverse (rewards above 0)",
        function="reshape.rarity",
        check=checks.rarity_makes_policies_diverse,
        control="rewards below 0",
    ),
    Row(
        system="TP-GRPO, potential shaping",
        claim="step rewards with free ends keep the optimum",
        function="reshape.shaped",
        check=checks.step_rewards_keep_the_optimum,
        control="a potential that ends at 0",
    ),
    Row(
        system="Laplace-LoRA reward models",
        claim="the posterior calibrates predictions off the data",
        function="posterior.probability",
        check=checks.laplace_calibrates_off_the_data,
        control="on the data",
    ),
    Row(
        system="VPL (2408.10075), MaxMin-RLHF",
        claim="groups are found by EM with user ids",
        function="mixture.fit",
        check=checks.groups_are_found_with_user_ids,
        control="no user ids",
    ),
    Row(
        system="MiCRo (2505.24846)",
        claim="one reward has an irreducible error on a mixture",
        function="links.matrix",
        check=checks.one_reward_errs_on_a_mixture,
        control="two actions",
    ),
    Row(
        system="PAL (2406.08469)",
        claim="a person between prototypes is learned from 20 labels",
        function="mixture.simplex",
        check=checks.prototypes_learn_a_person_from_few_labels,
        control="a person outside, 80 labels",
    ),
    Row(
        system="VPL (2408.10075)",
        claim="informative questions find a person sooner",
        function="mixture.route",
        check=checks.informative_questions_find_a_person,
        control="equal people",
    ),
    Row(
        system="off-switch game (1611.08219)",
        claim="uncertainty makes deferring worthwhile",
        function="posterior.deferral",
        check=checks.deferring_is_worthwhile_under_uncertainty,
        control="no uncertainty",
    ),
    Row(
        system="APO (2402.10500)",
        claim="asking by feature distance beats random (theta of norm 10)",
        function="pairs.most_uncertain",
        check=checks.asking_by_feature_distance_beats_random,
        control="norm 2",
    ),
    Row(
        system="BALD (1112.5745)",
        claim="asking by information beats random (theta of norm 10)",
        function="select.most_informative",
        check=checks.asking_by_information_beats_random,
        control="Fisher score",
    ),
    Row(
        system="STARC (2309.15257)",
        claim="a distance of 0 means no KL-regularized gap",
        function="measure.starc",
        check=checks.starc_bounds_our_gap,
        control="minus the distance of 5 r",
    ),
    Row(
        system="policy cliff (2507.20150)",
        claim="entropy makes the map smooth: total variation is below tanh(span / 4 eta)",
        function="measure.variation_bound",
        check=checks.entropy_makes_the_reward_to_policy_map_smooth,
        control="eta = 0.001",
    ),
    Row(
        system="CDR (2411.02481)",
        claim="log strong/weak ranks better than the strong policy alone (foreign weak)",
        function="gibbs.implicit_reward",
        check=checks.strong_to_weak_ratios_beat_the_strong_policy,
        control="weak = strong's own base",
    ),
)


def _goodhart(system: str, claim: str, function: str, regime: str, level: str, name: str) -> Row:
    key = f"{regime}, KL {level}/{name}/gain over mean"
    return Row(system=system, claim=claim, function=function, source=("goodhart", key))


COSTE, PAR = "reward ensembles (2310.02743)", "PAR (2502.18770)"
READ = (
    _goodhart(COSTE, "an ensemble's minimum beats its mean, the model being right, at KL 3",
              "aggregate.minimum", "well specified", "3", "minimum"),
    _goodhart(COSTE, "an ensemble's minimum beats its mean where the proxy extrapolates, at KL 1",
              "aggregate.minimum", "extrapolating", "1", "minimum"),
    _goodhart(COSTE, "an ensemble's minimum beats its mean where the proxy extrapolates, at KL 3",
              "aggregate.minimum", "extrapolating", "3", "minimum"),
    _goodhart(COSTE, "mean less variance beats the mean where the proxy extrapolates, at KL 3",
              "aggregate.penalized", "extrapolating", "3", "mean - variance"),
    _goodhart("Helping or Herding (2312.09244)", "one member does as well as the mean, at KL 3",
              "aggregate.mean", "well specified", "3", "single"),
    _goodhart("Helping or Herding (2312.09244)", "the minimum mends an error that all share, KL 1",
              "aggregate.minimum", "shared bias", "1", "minimum"),
    _goodhart(PAR, "the win rate resists rare hacks that all members share, at KL 1",
              "reshape.win_rate", "shared hacks", "1", "win rate (PAR)"),
    _goodhart(PAR, "the win rate resists them at KL 4", "reshape.win_rate", "shared hacks", "4",
              "win rate (PAR)"),
    _goodhart("transforming and combining (2402.00742)", "log-sigmoid resists rare hacks at KL 1",
              "reshape.log_sigmoid", "shared hacks", "1", "log-sigmoid, 50 %"),
    _goodhart("transforming and combining (2402.00742)", "log-sigmoid resists them at KL 4",
              "reshape.log_sigmoid", "shared hacks", "4", "log-sigmoid, 50 %"),
    _goodhart("clipped rewards", "a ceiling at the 85 % quantile resists rare hacks at KL 1",
              "reshape.ceiling", "shared hacks", "1", "ceiling, 85 %"),
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The atlas of reward-side claims."""

    output: Path = Path("results/atlas")
    """Where results.json and atlas.md go."""
    goodhart: Path | None = None
    """results.json of `experiments.goodhart`: adds its rows."""
    worlds: int = 48
    """Random worlds of each check."""
    seed: int = 0
    """Root of all randomness."""
    only: str = ""
    """Rows whose system, claim or function has this text."""
    smoke: bool = False
    """Four worlds and three rows, to see that it runs."""

    def check(self) -> None:
        """Refuse what cannot run, before any compute is spent."""
        if self.worlds < 2:
            raise InputError(f"--worlds {self.worlds}: an interval needs at least two.")
        if self.goodhart is not None and not self.goodhart.is_file():
            raise InputError(f"{self.goodhart}: no such file; --goodhart takes a results.json.")


def verdict(effect: results.Metric) -> str:
    """Held or not by the 95 % interval of the effect, undecided where it holds 0.

    An effect that is exactly 0 in every world is not one.
    """
    half = 1.96 * (effect.stderr or 0.0)
    if effect.value - half > 0:
        return "held"
    return "not held" if effect.value + half < 0 else "undecided"


def key_of(row: Row) -> str:
    """The name of a row in results.json."""
    return f"{row.system}/{row.claim}"


def measured(row: Row, config: Config, other: dict[str, Any]) -> dict[str, results.Metric]:
    """Effect, and the control's where there is one."""
    if row.check is None:
        assert row.source is not None
        experiment, name = row.source
        try:
            return {"effect": results.Metric(**other[experiment][name])}
        except KeyError:
            raise InputError(f"--{experiment}: no metric {name!r}; run it at full size.") from None
    keys = jax.random.split(jax.random.key(config.seed), config.worlds)
    found = jax.jit(jax.vmap(row.check))(keys)
    return {
        "effect": results.mean(np.asarray(found.effect)),
        "control": results.mean(np.asarray(found.control)),
    }


def main(config: Config, *, console: Console | None = None) -> Path:
    """Run the checks, print and write the atlas; returns the path of ``results.json``."""
    console = console or Console()
    began = time.perf_counter()
    config.check()
    output = results.output_folder(config.output)
    other = {}
    rows = [*ROWS, *(Row(**row) for row in policy.ROWS)]
    if config.smoke:
        config = dataclasses.replace(config, worlds=4)
        rows = [row for row in rows if row.function in ("posterior.deferral", "reshape.shaped")]
    if config.goodhart is not None:
        other["goodhart"] = json.loads(config.goodhart.read_text())["metrics"]
        rows += READ
    rows = [row for row in rows if config.only in f"{row.system} {row.claim} {row.function}"]
    if not rows:
        raise InputError(f"--only {config.only}: no row has this text.")
    metrics: dict[str, results.Metric] = {}
    lines = []
    for row in rows:
        found = measured(row, config, other)
        metrics |= {f"{key_of(row)}/{name}": value for name, value in found.items()}
        lines.append(_line(row, found))
        console.print(f"{row.system}: {row.claim}: {lines[-1][3]}")
    _write(output / "atlas.md", lines)
    _print(lines, console)
    seconds = time.perf_counter() - began
    path = results.write_results(
        output, name="atlas", config=config, seeds=[config.seed], seconds=seconds, metrics=metrics
    )
    console.print(f"{path} and atlas.md beside it, in {seconds:.0f} s")
    return path


HEAD = ("system", "claim", "function", "verdict", "effect [95 %]", "control", "command")


def _line(row: Row, found: dict[str, results.Metric]) -> tuple[str, ...]:
    effect = found["effect"]
    half = 1.96 * (effect.stderr or 0.0)
    interval = f"{effect.value:+.3f} [{effect.value - half:+.3f}, {effect.value + half:+.3f}]"
    control = f"{row.control}: {found['control'].value:+.3f}" if "control" in found else ""
    command = (
        "experiments.goodhart"
        if row.check is None
        else f'experiments.atlas --only "{row.claim[:24]}"'
    )
    return row.system, row.claim, row.function, verdict(effect), interval, control, command


def _write(path: Path, lines: list[tuple[str, ...]]) -> None:
    rule = ["---"] * len(HEAD)
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in (HEAD, rule, *lines))
    path.write_text(text + "\n")


def _print(lines: list[tuple[str, ...]], console: Console) -> None:
    table = Table(title="atlas", title_justify="left")
    for name in HEAD[:-1]:
        table.add_column(name)
    for cells in lines:
        table.add_row(*cells[:-1])
    console.print(table)


def cli() -> None:
    """Entry of ``python -m experiments.atlas``."""
    with reported():
        main(tyro.cli(Config, description=__doc__))
