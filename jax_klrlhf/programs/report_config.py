"""Configuration of ``klrlhf report``, and what no type says of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jax_klrlhf.errors import InputError
from jax_klrlhf.programs.options import positive


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """A page about a run: configuration, the plane of KL and reward, losses, health, samples,
    results with intervals. Of any run, finished or going on.

    klrlhf report run                           # run/report.html
    klrlhf report run --watch 30                # again every 30 seconds, while the run goes on
    klrlhf report run --serve                   # a page that follows the run
    klrlhf report answers.jsonl                 # the same prompts answered by several policies
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Output folder of klrlhf dpo, sft, reward, iterate or eval; or a file of answers that klrlhf
    generate or eval wrote, which are shown side by side."""
    output: Path | None = None
    """The page; by default RUN/report.html, and of answers a file beside them."""
    watch: float | None = None
    """Seconds after which the page is written again, as long as the run goes on."""
    serve: bool = False
    """Serve the page, which then follows the run by itself."""
    host: str = "127.0.0.1"
    """--serve: address to listen on. Another than the loopback address is served with a token
    alone."""
    port: int = 8766
    """--serve: 0 for any that is free."""
    token: Literal["auto", "always"] = "auto"
    """--serve: always: a token on the loopback address too, for a machine that others use."""


def check(config: ReportConfig) -> None:
    """What no type says. Raises ``InputError`` naming the option."""
    positive("watch", config.watch)
    if config.serve and (config.watch is not None or config.output is not None):
        raise InputError("--serve: the page follows the run; leave out --watch and --output.")
    for name in ("host", "port", "token"):
        if not config.serve and getattr(config, name) != getattr(ReportConfig(run=Path()), name):
            raise InputError(f"--{name} is of a page that is served: add --serve, or leave it out.")
