"""The bandit experiments at toy size: what they write, and that the theory holds in it."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from rich.console import Console

from experiments import plotting
from experiments.benchmarks import bandit as benchmark
from experiments.coverage import run as coverage
from experiments.human_choices import run as human_choices
from experiments.online import run as online
from experiments.rates import report as rates_report
from experiments.rates import run as rates
from jax_klrlhf import bandit
from jax_klrlhf.errors import InputError

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def quick():
    """The same programs, less polished machine code: compile time is what these tests cost."""
    with pytest.MonkeyPatch.context() as patch:
        options = {"xla_backend_optimization_level": "0"}
        patch.setattr(jax, "jit", partial(jax.jit, compiler_options=options))
        yield


def metrics_of(path, *figures):
    """The metrics of a results file that is strict JSON, its figures beside it."""

    def no_constant(name):
        raise AssertionError(f"{name} is not JSON")

    content = json.loads(path.read_text(), parse_constant=no_constant)
    assert set(content) == {"name", "config", "seeds", "versions", "device", "seconds", "metrics"}
    for figure in figures:
        assert (path.parent / figure).read_bytes().startswith(b"\x89PNG")
    for name, metric in content["metrics"].items():
        assert name.count("/") == 2, name
        assert metric["value"] is not None, name
    return {name: metric["value"] for name, metric in content["metrics"].items()}


# rates


@pytest.fixture(scope="module")
def measured_rates(quick, tmp_path_factory):
    config = rates.Config(
        output=tmp_path_factory.mktemp("rates"),
        seeds=6,
        comparisons=(64, 256),
        fit_from=64,
        dims=(3,),
        dim=3,
        bounds=(1.0,),
        deltas=(0.5, 0.1),
        contexts=2,
        actions=4,
    )
    return config, metrics_of(rates.main(config, console=QUIET), "rates.png")


@pytest.mark.slow
def test_no_bound_is_violated(measured_rates):
    """T1 at the realized radius is a theorem, and the theory's radius is the larger one here."""
    _, found = measured_rates
    violations = [name for name in found if name.endswith("/violations")]
    assert len(violations) == 4 * (2 + 1 + 1 + 2)
    assert all(found[name] == 0 for name in violations)


def test_an_action_needs_nearly_all_of_the_realized_radius(measured_rates):
    """Cauchy-Schwarz over 8 actions in 3 dimensions: T1's step about the radius, with little slack.

    A radius a third of the error would leave an action uncovered, so this fails where the norm, its
    inverse, or nu is another.
    """
    _, found = measured_rates
    for n in (64, 256):
        assert 1 / 3 < found[f"n={n}/T1/needed over realized radius"] <= 1 + 1e-5


def test_the_least_constant_is_a_quantile_between_order_statistics():
    config = rates.Config(delta=0.1)
    found, low, high = rates_report.least_constant(config, np.arange(1.0, 101.0)[::-1], 100.0)
    assert low < found < high < 1
    # Binomial(100, 0.9) lies in [84, 95] with 95 %: the 84th of the hundred, and the 96th.
    assert (low, high) == (0.84, 0.96)
    assert rates_report.least_constant(config, np.ones(6), 1.0)[2] == np.inf


@pytest.mark.parametrize("radius", ["", ", realized radius"])
def test_bounds_and_gaps(measured_rates, radius):
    _, found = measured_rates
    for n in (64, 256):
        one, two = (found[f"n={n}/Option {k}{radius}/bound"] for k in ("I", "II"))
        # Jensen: the norm of the mean is at most the mean of the norm.
        assert 0 < one < two
        assert found[f"n={n}/Option I{radius}/gap"] < one
        assert found[f"n={n}/Option II{radius}/gap"] < two
    assert found[f"n=256/Option II{radius}/bound"] < found[f"n=64/Option II{radius}/bound"]


def test_radius_is_the_formula_and_covers(measured_rates):
    config, found = measured_rates
    gamma = 1 / (2 + np.exp(2.0) + np.exp(-2.0))
    for delta in config.deltas:
        formula = np.sqrt((config.dim + np.log(1 / delta)) / gamma**2 + config.ridge)
        assert found[f"delta={delta:g}/confidence set/radius"] == pytest.approx(formula, rel=1e-5)
    # The empirical coverage is monotone in the radius and full at the theory's (6 of 6 seeds).
    shares = [
        found[f"B=1, radius x {shrunk:g}/confidence set/coverage"] for shrunk in rates_report.SHRUNK
    ]
    assert shares == sorted(shares)
    assert shares[-1] == found["n=256/confidence set/coverage"] == 1.0
    # d = 3 and B = 1 are the base panel too: the same seeds, the same numbers.
    for panel in ("d=3", "B=1", "delta=0.1"):
        assert found[f"{panel}/greedy/gap"] == found["n=256/greedy/gap"]


def test_rates_refuses():
    with pytest.raises(InputError, match="--deltas"):
        rates.main(rates.Config(delta=0.3), console=QUIET)
    with pytest.raises(InputError, match="--fit-from"):
        rates.main(rates.Config(fit_from=10**6), console=QUIET)


def test_log_slope_of_a_power_law():
    """A power law with any random scale has one slope in every resample."""
    x = [1.0, 2.0, 5.0, 30.0]
    scale = np.random.default_rng(0).exponential(size=(20, 1))
    slope, (low, high) = plotting.log_slope(x, scale * np.array(x) ** -1.5)
    np.testing.assert_allclose([slope.value, low, high], -1.5, rtol=1e-12)
    with pytest.raises(ValueError, match="not positive"):
        plotting.log_slope(x, np.zeros((3, 4)))
    with pytest.raises(ValueError, match="4 points"):
        plotting.log_slope(x, np.ones((3, 3)))


# coverage


@pytest.mark.slow
def test_coverage(quick, tmp_path):
    config = dataclasses.replace(
        coverage.Config(smoke=True).resized(), smoke=False, output=tmp_path, seeds=4, rounds=2
    )
    found = metrics_of(coverage.main(config, console=QUIET), "coverage.png")
    panel = "hidden=2, kl_coef=0.2, coverage={:g}"
    greedy = coverage.GREEDY
    for knob in config.coverages:
        for estimate in coverage.estimates(config):
            at = f"{panel.format(knob)}, {estimate}"
            inside = coverage.IN_BALL if estimate == coverage.BALL else coverage.METHODS
            for method in inside:
                assert found[f"{at}/{method}/gap"] >= 0
                if method != greedy:
                    gain = found[f"{at}/{greedy}/gap"] - found[f"{at}/{method}/gap"]
                    reported = found[f"{at}/{method}/gain over {greedy}"]
                    assert reported == pytest.approx(gain, abs=1e-6)
        for best in coverage.IDEALS:
            assert found[f"{panel.format(knob)}/{best}/gap"] >= 0
    # The ridge and the ball reach every estimate.
    for method in coverage.METHODS:
        names = [f"{panel.format(1)}, {e}/{method}/gap" for e in coverage.estimates(config)]
        gaps = [found[name] for name in names if name in found]
        count = 3 if method in coverage.IN_BALL else 2
        assert len(set(gaps)) == count or method == "offline I, theory"  # which is pi0 at any
    # pi0 is the same problem's whatever is learned: by hand in float64, as a difference of values.
    key = jax.random.split(jax.random.key(config.seed), config.seeds)
    by_hand = [_gap_of_reference(k, config, config.coverages[1]) for k in key]
    rare = panel.format(config.coverages[1])
    assert found[f"{rare}/pi0/gap"] == pytest.approx(np.mean(by_hand), rel=1e-4)
    # The knob does what it says.
    assert (
        found[f"{rare}/pi0/coverage coefficient"]
        > found[f"{panel.format(1)}/pi0/coverage coefficient"]
    )


def _gap_of_reference(key, config, knob):
    problem = bandit.sphere(
        jax.random.split(key, 4)[0],
        contexts=config.contexts,
        actions=config.actions,
        dim=config.dim,
        kl_coef=0.2,
        bound=config.bound,
        coverage=knob,
        hidden=2,
    )
    reward = np.asarray(problem.reward, np.float64)
    prior = np.exp(np.asarray(problem.setting.ref_log_prob, np.float64))
    best = 0.2 * np.log((prior * np.exp(reward / 0.2)).sum(1))
    return (best - (prior * reward).sum(1)).mean()


# online


@pytest.mark.slow
def test_online(quick, tmp_path):
    config = dataclasses.replace(
        online.Config(smoke=True).resized(),
        smoke=False,
        output=tmp_path,
        racers=("greedy",),
        batches=(16, 64),
        comparisons=128,
        targets=(0.2, 10.0),
        learners=("greedy", "offline greedy", "chi-PO"),
        rounds=3,
    )
    found = metrics_of(online.main(config, console=QUIET), "target_ridge_1.png", "regret.png")
    for m in config.batches:
        cell = "ridge=1, eps={:g}, " + f"m={m}, d=2/greedy/"
        spent = [found[cell.format(eps) + "comparisons"] for eps in config.targets]
        assert spent[0] == m * found[cell.format(0.2) + "rounds"]
        # pi0 itself is within 10 of the optimum: nothing is spent.
        assert spent[1] == 0.0
        assert found[cell.format(10.0) + "reached"] == 1.0
        assert 0 <= spent[0] <= config.comparisons
    # Both begin as pi0 on the same problems, so regrets can differ by at most the later rounds.
    for estimate in ("ridge=0.1", "ridge=1", "ball"):
        at = f"regret, {estimate}"
        for name in ("greedy", "offline greedy"):
            last = found[f"{at}/{name}/final gap"]
            assert found[f"{at}/{name}/regret"] > config.batch * last
        difference = found[f"{at}/offline greedy/final gap"] - found[f"{at}/greedy/final gap"]
        reported = found[f"{at}/offline greedy/final gap less greedy's"]
        assert reported == pytest.approx(difference, abs=1e-9)
    # A policy class has no ball; the ideals have no ridge.
    assert "regret, ridge=1/chi-PO/final gap" in found
    assert "regret, ball/chi-PO/final gap" not in found
    assert all(found[f"regret/{name}/final gap"] >= 0 for name in online.IDEALS)


def test_first_below_and_regret():
    values = np.array([[3.0, 1.0, 2.0, 0.5], [3.0, 2.9, 2.8, 2.7], [0.1, 9.0, 9.0, 9.0]])
    rounds, reached = online.first_below(values, 1.0)
    assert rounds.tolist() == [1, 3, 0]
    assert reached.tolist() == [True, False, True]
    # The last entry is after the last round: nobody was served by it.
    np.testing.assert_allclose(online.regret(values, 2)[0], [6, 8, 12])


def test_every_learner_of_the_library_is_in_the_regret_figure():
    config = online.Config()
    made = {make(config, ridge=1.0).propose.__qualname__ for make in online.LEARNERS.values()}
    assert len(online.LEARNERS) == 17
    listed = {
        name for name in bandit.__all__ if isinstance(getattr(bandit, name), type(bandit.simulate))
    }
    offline = {"offline_greedy", "offline_gshf_one", "offline_gshf_two", "kl_pcb"}
    own = {name.split(".")[0] for name in made}
    # Offline learners share one way to propose, and the policy classes another.
    assert own - {"from_behaviour", "_learner"} <= listed
    assert offline <= listed


# human choices


@pytest.fixture
def choices(tmp_path):
    """Choices by a known linear rule: 12 people with tickets, 30 with cars."""
    draw = np.random.default_rng(0)
    xa, xb = draw.normal(size=(2, 96, 4)).astype(np.float32)
    y = (draw.uniform(size=96) < 1 / (1 + np.exp(-(xb - xa).sum(1)))).astype(np.int8)
    names = np.array(["price", "time", "change", "comfort"])
    user = np.repeat(np.arange(12), 8)
    np.savez(tmp_path / "train_tickets.npz", xa=xa, xb=xb, y=y, user=user, features=names)
    x = draw.normal(size=(30, 3, 2)).astype(np.float32)
    traits = draw.integers(0, 2, size=(30, 1)).astype(np.float32)
    traits[:6] = [[0], [1]] * 3
    np.savez(
        tmp_path / "cars.npz",
        x=x,
        choice=x.sum(-1).argmax(1).astype(np.int8),
        user_x=traits,
        features=np.array(["price", "range"]),
    )
    return tmp_path


@pytest.mark.slow
def test_human_choices(quick, choices, tmp_path):
    config = human_choices.Config(
        choices_dir=choices,
        output=tmp_path / "out",
        seeds=2,
        people=(3,),
        car_people=(5,),
        radii=(1.0,),
    )
    found = metrics_of(human_choices.main(config, console=QUIET), "human_choices.png")
    for name, count, alternatives in (("train_tickets", 3, 2), ("cars", 5, 3)):
        for kind in human_choices.KINDS:
            panel = f"{name}, {kind}, people={count}, radius=1"
            groups = {key.split(", ")[-1] for key in found if key.startswith(f"{panel}/pi0/gap, ")}
            groups = {group for group in groups if not group.startswith("uncertainty")}
            assert len(groups) == 2
            for group in groups:
                chance = found[f"{panel}/pi0/agreement, {group}"]
                assert chance == pytest.approx(1 / alternatives, rel=1e-5)
                for method in human_choices.METHODS:
                    assert found[f"{panel}/{method}/gap, {group}"] >= 0
                pessimist = found[f"{panel}/KL-PCB/gain over greedy, {group}"]
                # Of two alternatives under a uniform pi0 both are as far from their mean.
                if alternatives == 2:
                    assert pessimist == pytest.approx(0, abs=1e-6)
                else:
                    assert abs(pessimist) > 1e-4


def test_people_average_to_the_exact_gap(quick, choices):
    """The split by person adds up: with equally many situations each, to the gap of their world."""
    config = human_choices.Config(choices_dir=choices)
    world = human_choices.open_world("train_tickets", config)
    known = human_choices.draw_people(world, 4, "mixed", np.random.default_rng(1))
    gap = human_choices._gap_by_situation(world.problem, world.problem.setting.ref_log_prob)
    outcome = human_choices.Outcome(np.asarray(gap)[None], np.asarray(gap)[None], np.asarray(gap))
    people = human_choices.by_person(world, outcome, known)
    assert people.gap.shape == (1, 8)
    held_out = bandit.human.restrict(world.problem, np.flatnonzero(~known))
    exact = bandit.gap(held_out, held_out.setting.ref_log_prob)
    assert people.gap.mean() == pytest.approx(float(exact), rel=1e-5)
    # Only the first group is asked where one group is.
    one_group = human_choices.draw_people(world, 3, "one group", np.random.default_rng(1))
    assert not world.second[one_group].any()


def test_human_choices_refuses(choices, tmp_path):
    with pytest.raises(InputError, match="--choices-dir"):
        human_choices.main(human_choices.Config(choices_dir=tmp_path / "none"), console=QUIET)
    config = human_choices.Config(choices_dir=choices)
    world = human_choices.open_world("train_tickets", config)
    with pytest.raises(InputError, match="99 people"):
        human_choices.draw_people(world, 99, "mixed", np.random.default_rng(0))


# the benchmark


@pytest.mark.slow
def test_benchmark(quick, tmp_path):
    config = benchmark.Config(smoke=True, output=tmp_path, turns=2)
    found = metrics_of(benchmark.main(config, console=QUIET))
    assert found["agreement/float64/largest difference"] < 1e-6
    assert found["refits/steps/per refit"] >= 1
    for name in (*benchmark.PLAIN, benchmark.LIBRARY, benchmark.REFITS):
        assert found[f"time/{name}/ms per seed"] > 0


@pytest.mark.slow
def test_benchmark_notices_another_learner(quick, monkeypatch):
    """A plain program that computes something else is not timed against."""
    wrong = partial(benchmark.newton_counted, ridge=2.0)
    monkeypatch.setattr(
        benchmark, "newton_counted", lambda z, won, lost, theta, ridge: wrong(z, won, lost, theta)
    )
    with pytest.raises(RuntimeError, match="disagree"):
        benchmark.disagreement(benchmark.Config(smoke=True).resized())


def test_plain_solvers_agree():
    """L-BFGS-B stops on its default tolerances: 1e-5 in the gradient, ridge 1 in the curvature."""
    draw = np.random.default_rng(0)
    z, y = draw.normal(size=(60, 3)), draw.integers(0, 2, 60).astype(float)
    zero = np.zeros(3)
    exact = benchmark.newton(z, y, zero, 1.0)
    gradient = z.T @ (1 / (1 + np.exp(-z @ exact)) - y) + exact
    np.testing.assert_allclose(gradient, 0, atol=1e-10)
    np.testing.assert_allclose(benchmark.lbfgs(z, y, zero, 1.0), exact, atol=1e-3)


@pytest.mark.parametrize("module", [rates, coverage, online, human_choices, benchmark])
def test_smoke_is_a_flag_and_fits(module, choices):
    """What CI types is parsed, made small, and passes the program's own checks."""
    extra = ["--choices-dir", str(choices)] if module is human_choices else []
    config = tyro.cli(module.Config, args=["--smoke", *extra])
    if module is not benchmark:  # eight fake devices against its eight seeds: allowed
        assert config.resized() != config
    config.resized().check()
    assert dataclasses.replace(config, smoke=False).resized().seeds >= config.resized().seeds


def test_shared_keys():
    """The uniform numbers handed to the plain program are those that `simulate` draws."""
    config = benchmark.Config(smoke=True).resized()
    key = jax.random.key(3)
    (draws,) = benchmark.draws_of(key[None], config, jnp.float32)
    problem = benchmark.make_problem(config)
    run = bandit.simulate(
        key,
        problem,
        bandit.greedy_against_reference(),
        rounds=1,
        batch=config.batch,
        record=lambda _, this: this.data.context,
    )
    expected = np.floor(draws.context[0] * config.contexts)
    np.testing.assert_array_equal(run.record[0], expected)
