"""What preparing preferences costs: CPU seconds of 100,000 rows, and the memory of millions.

    python -m experiments.benchmarks.preparing --tokenizer MODEL --text STORIES.txt
    python -m experiments.benchmarks.preparing --tokenizer MODEL --text STORIES.txt --rows 2000000

A source of ``--rows`` rows is written first: prompt and two answers of consecutive sentences of
``--text``, about 500 bytes a row. A process of its own then prepares and describes it, as ``klrlhf
data`` does, and says its CPU seconds (all threads) and the peak of its resident memory, beside that
of the same process on 1,000 rows: the imports'. Both go to results.json.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from experiments import study
from jax_klrlhf.results import Metric

FEW = 1_000
CHILD = """
import json, resource, sys, time
from jax_klrlhf import cli

began = time.process_time()
status = cli.main(["data", "--data", sys.argv[1], "--tokenizer", sys.argv[2]])
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"status": status, "cpu": time.process_time() - began, "peak": used.ru_maxrss}))
"""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure the preparation of a made-up source."""

    tokenizer: str
    """Folder of a model."""
    text: Path
    """Its sentences make the rows."""
    rows: int = 100_000
    output: Path = Path("results/benchmarks/preparing")
    """Where results.json goes."""


def write(path: Path, text: Path, rows: int) -> int:
    """A source of preferences; returns its bytes."""
    sentences = [s.strip() + "." for s in text.read_text().replace("\n", " ").split(".") if s]
    with path.open("w") as file:
        for number in range(rows):
            at = 7 * number
            said = [sentences[(at + k) % len(sentences)] for k in range(8)]
            record = {
                "prompt": f"{number}. {' '.join(said[:4])}",
                "chosen": f" {' '.join(said[4:6])}",
                "rejected": f" {' '.join(said[6:])}",
            }
            file.write(json.dumps(record) + "\n")
    return path.stat().st_size


def measure(path: Path, tokenizer: str) -> tuple[float, float]:
    """CPU seconds and peak MiB of a process that prepares and describes a source."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(path), tokenizer], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    found = json.loads(done.stdout.splitlines()[-1])
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return found["cpu"], found["peak"] / unit


def main(config: Config, *, console: Console | None = None) -> Path:
    """Measure, print and write ``results.json``."""
    here = study.begin("benchmarks/preparing", config, console=console)
    with TemporaryDirectory() as folder:
        source = Path(folder) / "rows.jsonl"
        write(source, config.text, FEW)
        first, floor = measure(source, config.tokenizer)
        size = write(source, config.text, config.rows)
        cpu, peak = measure(source, config.tokenizer)
    each = 1e5 * (cpu - first) / (config.rows - FEW)
    found = {
        "rows": float(config.rows),
        "source_mib": size / 2**20,
        "cpu_seconds_of_100000_rows": each,
        "peak_mib": peak,
        "peak_mib_of_1000_rows": floor,
        "bytes_of_a_row": 2**20 * (peak - floor) / (config.rows - FEW),
    }
    for name, value in found.items():
        here.console.print(f"{name.replace('_', ' '):28} {value:12,.1f}", highlight=False)
    metrics = {f"preparing/klrlhf data/{name}": Metric(value) for name, value in found.items()}
    return here.end(metrics, seeds=[], beside=None)


cli = study.entry(main, Config, __doc__)

if __name__ == "__main__":
    cli()
