"""Configuration of ``klrlhf report``, and what no type says of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jax_klrlhf.errors import InputError
from jax_klrlhf.programs import options
from jax_klrlhf.programs.options import Number, Port, When

_SERVED = When("serve")


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
    watch: Number | None = None
    """Seconds after which the page is written again, as long as the run goes on."""
    serve: bool = False
    """Serve the page, which then follows the run by itself."""
    host: Annotated[str, _SERVED] = "127.0.0.1"
    """--serve: address to listen on. Another than the loopback address is served with a token
    alone."""
    port: Annotated[Port, _SERVED] = 8766
    """--serve: 0 for any that is free."""
    token: Annotated[Literal["auto", "always"], _SERVED] = "auto"
    """--serve: always: a token on the loopback address too, for a machine that others use."""


def check(config: ReportConfig) -> None:
    """What no type says. Raises ``InputError`` naming the option."""
    options.check(config)
    if config.serve and (config.watch is not None or config.output is not None):
        raise InputError("--serve: the page follows the run; leave out --watch and --output.")
