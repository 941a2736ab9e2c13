"""What every experiment does around its own question: sizes, clock, folder, results, command line.

    def main(config: Config, *, console: Console | None = None) -> Path:
        here = study.begin("coverage", config, console=console)
        ...                                    # here.config, here.output, here.console
        return here.end(metrics, beside="coverage.png")

    cli = study.entry(main, Config, __doc__)

A configuration may have ``resized()`` (itself, or the small size that was asked for) and
``check()``, which refuses what cannot run before any compute is spent.
"""

import dataclasses
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

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.perf_counter() - self.began

    def write(
        self,
        metrics: Mapping[str, results.Metric],
        *,
        seeds: Sequence[int] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write ``results.json`` and return its path; again with more, and it is replaced.

        ``seeds`` are the configuration's own ``seed`` by default. ``facts`` stand beside the
        configuration: the machine, say, or versions of what was compared with.
        """
        config = self.config
        if facts is not None:
            config = {**dataclasses.asdict(config), **facts}
        return results.write_results(
            self.output,
            name=self.name,
            config=config,
            seeds=[self.config.seed] if seeds is None else seeds,
            seconds=self.seconds,
            metrics=metrics,
        )

    def end(
        self,
        metrics: Mapping[str, results.Metric],
        *,
        seeds: Sequence[int] | None = None,
        facts: Mapping[str, Any] | None = None,
        beside: str | None = "the figures",
    ) -> Path:
        """:meth:`write`, and say where it is and what is ``beside`` it."""
        path = self.write(metrics, seeds=seeds, facts=facts)
        more = "" if beside is None else f" and {beside} beside it"
        self.console.print(f"{path}{more}, in {self.seconds:.0f} s", highlight=False)
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


def entry(
    main: Callable[[Any], Path],
    config: type,
    description: str | None,
    *,
    default: Callable[[], Any] | None = None,
    first: Callable[[Any], None] | None = None,
) -> Callable[[], None]:
    """The command line of an experiment: trouble with input is one line and exit code 2.

    ``default`` makes the configuration that flags change, where it is not that of no arguments;
    ``first`` is called with what was asked for, before anything looks for JAX's devices.
    """

    def cli() -> None:
        with reported():
            given = {} if default is None else {"default": default()}
            asked = tyro.cli(config, description=description, **given)
            if first is not None:
                first(asked)
            main(asked)

    return cli
