"""What every experiment does around its own question: sizes, clock, folder, results, command line.

    def main(config: Config, *, console: Console | None = None) -> Path:
        here = study.begin("coverage", config, console=console)
        ...                                    # here.config, here.output, here.console
        return here.end(metrics, beside="coverage.png")

    cli = study.entry(main, Config, __doc__)

A configuration may have ``resized()`` (itself, or the small size that was asked for) and
``check()``, which refuses what cannot run before any compute is spent.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tyro
from rich.console import Console

from jax_klrlhf import results
from jax_klrlhf.errors import reported


class Study(NamedTuple):
    """A run that has begun."""

    name: str
    config: Any
    """As it is run: resized and checked."""
    output: Path
    console: Console
    began: float

    def end(
        self,
        metrics: Mapping[str, results.Metric],
        *,
        seeds: Sequence[int] | None = None,
        beside: str = "the figures",
    ) -> Path:
        """Write ``results.json``, say where it is, and return its path.

        ``seeds`` are the configuration's own ``seed`` by default.
        """
        seconds = time.perf_counter() - self.began
        path = results.write_results(
            self.output,
            name=self.name,
            config=self.config,
            seeds=[self.config.seed] if seeds is None else seeds,
            seconds=seconds,
            metrics=metrics,
        )
        self.console.print(f"{path} and {beside} beside it, in {seconds:.0f} s", highlight=False)
        return path


def begin(name: str, config: Any, *, console: Console | None = None) -> Study:
    """Start the clock, take the size that was asked for, refuse what cannot run, make the folder.

    Raises:
        InputError: where the configuration says so, or the folder cannot be made.
    """
    began = time.perf_counter()
    if hasattr(config, "resized"):
        config = config.resized()
    if hasattr(config, "check"):
        config.check()
    return Study(name, config, results.output_folder(config.output), console or Console(), began)


def entry(main: Callable[[Any], Path], config: type, description: str | None) -> Callable[[], None]:
    """The command line of an experiment: trouble with input is one line and exit code 2."""

    def cli() -> None:
        with reported():
            main(tyro.cli(config, description=description))

    return cli
