"""DPO side by side: this library, TRL and tunix on one machine, one model and the same real pairs.

Every tool trains the same Llama-shaped model from the same weights on the same pairs of token ids,
in float32 with AdamW. Before anything is timed, the losses of the first steps must agree; otherwise
nothing is reported. Each tool is a process of its own, warmed first (compiling apart), and then all
take their turns alternately. What is counted is *useful* tokens: each prompt once, each response
once, no padding.

The pairs are those of whole batches of an epoch of ours (``--layout packed``), taken evenly over
the batch shapes; the peers get the same pairs in random order (TRL also in order of length) in
batches of --batch-size. Allocator settings are equal for all within a table; each tool's best of
them is set against ours. Results are written after every table; after --minutes no other is begun.

TRL and tunix live in environments of their own, named by --trl-python and --tunix-python.
"""

from pathlib import Path
from typing import Any

from rich.console import Console

from experiments import study
from experiments.benchmarks import paired
from experiments.benchmarks.dpo_parts import contenders, report
from experiments.benchmarks.dpo_parts.options import Config, Part
from experiments.benchmarks.dpo_parts.stage import Stage
from experiments.benchmarks.dpo_parts.task import prepare_task
from jax_klrlhf import results
from jax_klrlhf.results import Metric

TITLES = {
    "cached": "reference cached",
    "live": "reference live",
    "breakdown": "ours, parts off",
}


def main(config: Config, *, console: Console | None = None) -> Path:
    """Prepare, check, measure, print the tables and write ``results.json``."""
    here = study.begin("benchmarks/dpo", config, console=console)
    config, console = here.config, here.console
    peers = contenders.peers(config, console)
    work = results.output_folder(here.output / "work")
    task = prepare_task(config, work)
    packed, padded = task.padding
    console.print(
        f"{len(task.pairs)} pairs, {task.useful} useful tokens; padding of an epoch of ours "
        f"{packed:.1%} (in padded batches of as many shapes {padded:.1%})",
        highlight=False,
    )
    metrics: dict[str, Metric] = {
        "data/pairs/number": Metric(len(task.pairs)),
        "data/pairs/useful_tokens": Metric(task.useful),
        "data/ours/padding_fraction": Metric(packed),
        "data/ours/padding_fraction_bucketed": Metric(padded),
    }
    versions = {name: contenders.versions(python) for name, python in peers.items()}

    def facts() -> dict[str, Any]:
        return {"machine": paired.machine(), "peers": versions}

    found: dict[str, dict[str, dict[str, paired.Times]]] = {"cached": {}, "live": {}}
    agreed, longest = False, 0.0
    for part, setting in _stages(config):
        start = here.seconds
        if start + longest > 60 * config.minutes:
            console.print(f"left out for lack of time: {part}, allocator {setting}")
            continue
        console.print(f"{start:.0f} s: {part}, allocator {setting}", highlight=False)
        with Stage(config, task, work / f"{part}-{setting}", setting, peers) as run:
            everything = setting == config.settings[0]
            run.start(contenders.contenders(part, peers, heads=config.heads, everything=everything))
            if not agreed:
                metrics |= run.agree()
                agreed = True
            times = run.measure(console)
            if part in found:
                found[part][setting] = times
            metrics |= run.report(
                f"{TITLES[part]}, allocator {setting}", f"{part} {setting}", console
            )
        longest = max(longest, here.seconds - start)
        here.write(metrics, seeds=[0], facts=facts())
    metrics |= report.at_best(found, task.useful, console)
    return here.end(metrics, seeds=[0], facts=facts(), beside=None)


def _stages(config: Config) -> list[tuple[Part, str]]:
    """What to measure, in order of worth: all parts as the system is, then other allocators."""
    first, *others = config.settings
    stages: list[tuple[Part, str]] = [(part, first) for part in config.parts]
    return stages + [(p, s) for s in others for p in config.parts if p != "breakdown"]


cli = study.entry(main, Config, __doc__)

if __name__ == "__main__":
    cli()
