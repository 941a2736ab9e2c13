"""How fast the offline gap falls, and how loose the bounds are: in n, d, B and delta.

Every seed draws its own problem (unit features and theta* on spheres, uniform pi0) and one stream
of comparisons from pi0, of which the learners see the first n. Measured against

* the fast rate: the gap is second order in the error of the reward (statement L2; 2411.04625), so
  of slope -1 in n and +1 in d, while
* the bounds (statement T1, Options I and II of 2312.11456) are first order: -1/2 in n;
* the confidence set (L3) of radius beta = C sqrt((d + log 1/delta) / gamma^2 + lambda B^2), where
  gamma is the least curvature for margins up to 2B. The papers leave C open; here C = 1 unless
  asked otherwise, and the least C that would have sufficed is reported.

Pessimism is run with that radius and with the *realized* error ||theta_hat - theta*||_Sigma, the
least radius for which T1 is a theorem: a bound violated there would be a wrong program.
"""

from pathlib import Path

from rich.console import Console

from experiments import study
from experiments.rates import figure, report
from experiments.rates.measure import Config, sweep
from jax_klrlhf import results


def main(config: Config, *, console: Console | None = None) -> Path:
    """Run the sweeps, draw the figure, print the tables; returns the path of ``results.json``."""
    here = study.begin("rates", config, console=console)
    config, output, console = here.config, here.output, here.console
    by_dim, by_bound = sweep(config, console=console)
    base = by_bound.get(config.bound) or by_dim[config.dim]
    metrics = report.numbers(config, base, by_dim, by_bound)
    slopes, rows = report.slopes(config, base, by_dim, by_bound)
    metrics |= slopes
    figure.figure(config, base, by_dim, by_bound, output / "rates.png")
    results.print_table(
        f"Log-log slopes, {config.seeds} seeds",
        rows,
        console=console,
        caption="95 % percentile bootstrap over seeds; theory: see experiments/rates/README.md",
    )
    report.print_confidence(config, by_dim, by_bound, console)
    return here.end(metrics, beside="rates.png")


cli = study.entry(main, Config, __doc__)
