"""``klrlhf report``: a run, or answers, as a page that stands by itself, or that is served."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from jax_klrlhf.data.sources import open_source
from jax_klrlhf.errors import InputError
from jax_klrlhf.programs.report_config import ReportConfig, check
from jax_klrlhf.report import run as runs
from jax_klrlhf.report import serving
from jax_klrlhf.report.answers import side_by_side


def report(config: ReportConfig, *, console: Console | None = None) -> Path | None:
    """Write the page and return its path; or serve it until Ctrl-C.

    Raises:
        InputError: where there is no run, or options do not go together.
    """
    check(config)
    console = console or Console()
    tell = lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True)  # noqa: E731
    if config.run.is_file():
        if config.serve or config.watch is not None:
            raise InputError(f"{config.run}: a file does not go on; leave out --serve and --watch.")
        path = _answers(config.run, config.output or config.run.with_suffix(".html"))
        tell(f"answers side by side in {path}")
        return path
    if config.serve:
        _serve(config, tell)
        return None
    path = runs.write(config.run, config.output, every=config.watch)
    tell(f"report in {path}")
    answers = config.run / "answers.jsonl"
    if answers.is_file():
        tell(f"answers side by side in {_answers(answers, path.with_name('answers.html'))}")
    while config.watch is not None and runs.read(config.run)["status"]["state"] == "running":
        time.sleep(config.watch)
        runs.write(config.run, config.output, every=config.watch)
    return path


def read_answers(source: str | Path) -> Iterator[dict[str, Any]]:
    """Records for :func:`.side_by_side`, of what ``klrlhf generate`` or ``klrlhf eval`` wrote.

    Such records themselves (``prompt``, ``policy``, ``text``, ...) are taken as they are.

    Raises:
        InputError: naming the line that is none of these.
    """
    for where, record in open_source(source).records():
        if "prompt" not in record:
            raise InputError(f"{where}: no 'prompt'; columns found: {', '.join(record)}.")
        prompt = record["prompt"]
        if isinstance(record.get("text"), str) and isinstance(record.get("policy"), str):
            yield dict(record)
        elif isinstance(record.get("answers"), list):
            counts = record.get("tokens") or [None] * len(record["answers"])
            for text, count in zip(record["answers"], counts, strict=True):
                yield {
                    "prompt": prompt, "policy": str(record.get("model")), "text": text,
                    "tokens": count,
                }  # fmt: skip
        elif isinstance(record.get("policy"), list):
            yield from _of_eval(record)
        else:
            raise InputError(
                f"{where}: no answers of klrlhf generate or eval; columns found: "
                f"{', '.join(record)}."
            )


def _of_eval(record: Any) -> Iterator[dict[str, Any]]:
    for role in ("policy", "reference"):
        for number, text in enumerate(record[role]):
            found = {"prompt": record["prompt"], "policy": role, "text": text}
            # Beside a proxy the judge's reward is gold, which the page can order and colour by.
            judged = "gold" if f"{role}/proxy" in record else "reward"
            found[judged] = record[f"{role}/reward"][number]
            if judged == "gold":
                found["proxy"] = record[f"{role}/proxy"][number]
            if role == "policy" and "kl" in record:
                found["kl"] = record["kl"][number]
            if role == "policy" and "kl/tokens" in record:
                found["tokens"] = record["policy/tokens"][number]
                found["token_kl"] = record["kl/tokens"][number]
            yield found


def _answers(source: Path, target: Path) -> Path:
    try:
        return side_by_side(read_answers(source), target, note=f"Answers in {source}.")
    except (ValueError, KeyError, IndexError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{source}: {' '.join(str(error).split())}") from None


def _serve(config: ReportConfig, tell: Any) -> None:
    every = 5.0
    found = runs.read(config.run)
    # The page itself is had without a token: it is empty then, and asks for what it shows.
    bare = {key: found[key] for key in ("command", "axis")} | {
        "name": "", "made": time.time(), "last": None, "status": {"state": "running", "by": None},
        "waits": None, "warnings": [], "charts": [], "plane": None, "results": [], "rounds": [],
        "config": {}, "device": None, "versions": None,
    }  # fmt: skip
    text = runs.text(bare, live=every)
    served = serving.start(
        {"/api/report": lambda given: json.loads(json.dumps(runs.read(config.run)))},
        text,
        host=config.host,
        port=config.port,
        token=config.token == "always",
    )
    tell(f"the page follows {config.run}: {served.url}")
    tell("Ctrl-C ends it; the run is not touched")
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        pass
    finally:
        served.close()


__all__ = ["ReportConfig", "read_answers", "report"]
