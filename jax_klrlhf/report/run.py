"""What a run's folder says of it, as one page: of any run, finished, stopped, or going on.

Nothing is asked of the run itself: the page is made of the files that it leaves (``config.json``,
``metrics.jsonl``, ``results.json``, ``rounds/``), which appear whole. Whether it goes on is seen by
the lock of its folder.
"""

import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jax_klrlhf import finished, folders, labelling
from jax_klrlhf.errors import InputError
from jax_klrlhf.report import page
from jax_klrlhf.results import Metric
from jax_klrlhf.training import health

SHOWN = 6
"""Pairs of each round that are shown."""
PHASES = ("sample", "score", "pair", "label", "believe", "fit")
CHARTS = {
    "Loss": ("loss", "eval/loss"),
    "Accuracy on pairs": ("rewards/accuracies", "eval/rewards/accuracies"),
    "Margin of the implicit reward, nats": ("rewards/margins", "eval/rewards/margins"),
    "Implicit reward, nats": ("rewards/chosen", "rewards/rejected"),
    "Log-probability of responses, nats": ("logps/chosen", "logps/rejected"),
    "Reward on held-out prompts": ("eval/reward",),
    "Wins over pi0": ("eval/wins",),
    "KL(pi || pi0), nats": ("eval/kl/ref",),
    "Tokens of an answer": ("eval/length", "eval/length/sampled", "length/sampled"),
    "Believed reward of what was sampled": ("reward/believed",),
    "Norm of the gradient": ("grad_norm",),
    "Learning rate": ("learning_rate",),
    "Tokens a second": ("perf/tokens_per_second",),
}
"""Charts, and the metrics in each; what else a run logs has a chart of its own."""


def read(folder: str | Path) -> dict[str, Any]:
    """All that the page shows, as JSON has it.

    Raises:
        InputError: where the folder holds no run.
    """
    folder = Path(folder)
    config, results = _object(folder / "config.json"), _object(folder / "results.json")
    if config is None and results is None:
        raise InputError(
            f"{folder}: no run: neither config.json nor results.json in it; give the --output of "
            "klrlhf dpo, sft, reward, iterate or eval."
        )
    settings = config or results["config"] or {}  # pyright: ignore[reportOptionalSubscript]
    command = str(settings.get("command") or (results or {}).get("name") or "run")
    lines = list(_lines(folder / "metrics.jsonl"))
    if command == "iterate":
        rounds = list(_rounds(folder, settings))
        found: dict[str, Any] = {"rounds": rounds, "waits": _waits(folder, settings)}
        lines = _with_pi0(folder, lines)
    else:
        found = {"rounds": [], "waits": None}
    return found | {
        "name": str(folder),
        "command": command,
        "made": time.time(),
        "status": _status(folder, config is not None, results is not None),
        "last": lines[-1].get("time") if lines else None,
        "axis": "round" if command == "iterate" else "step",
        "plane": _plane(command, lines),
        "charts": _charts(lines),
        "warnings": warnings(command, lines),
        "results": _results(results),
        "config": {key: _said(value) for key, value in _flat(settings).items()},
        "device": None if results is None else results.get("device"),
        "versions": None if results is None else results.get("versions"),
    }


def write(
    folder: str | Path, path: str | Path | None = None, *, every: float | None = None
) -> Path:
    """Write the page of a run, by default ``folder/report.html``, and return its path.

    ``every``: the page of a run that goes on loads itself anew after so many seconds.

    Raises:
        InputError: where the folder holds no run, or the file cannot be written.
    """
    found = read(folder)
    head = ""
    if every is not None and found["status"]["state"] == "running":
        head = f'<meta http-equiv="refresh" content="{max(1, round(every))}">\n'
    target = Path(folder) / "report.html" if path is None else Path(path)
    return page.write(target, text(found, head=head))


def text(found: Mapping[str, Any], *, head: str = "", live: float | None = None) -> str:
    """The page of what :func:`read` found. ``live``: it is served, and asks anew so often."""
    return page.document(
        f"{found['command']}: {found['name']}",
        '<main id="page"><noscript>This page needs JavaScript.</noscript></main>',
        data={**found, "live": live},
        scripts=[page.asset("common.js"), page.asset("run.js")],
        styles=[page.asset("run.css")],
        head=head,
        connect="'none'" if live is None else "'self'",
    )


def warnings(command: str, lines: list[dict[str, Any]]) -> list[str]:
    """What the health checks say of a log, once each: those of the run, made again from its log.

    What a run says of its first batch is not in its log. Of an iterative run each round's fit is
    looked at by itself, and besides whether pairs could be made and the sampler is the scorer.
    """
    limits, seen, found = health.Limits(), health.Seen(), []
    told: set[str] = set()
    skipped = 0.0
    for line in lines:
        step = int(line["step"])
        named = {
            name: Metric(value, line.get(f"{name}/stderr"), None)
            for name, value in line.items()
            if isinstance(value, int | float) and not name.endswith("/stderr")
        }
        if command == "iterate":
            # A fit begins anew each round: its gradient is not to be held against another's.
            seen = health.Seen()
            named.pop("grad_norm", None)
            if "eval/length" in named:
                named["eval/length/sampled"] = named["eval/length"]
            for name, bad, said in _OF_ROUNDS:
                if name in named and bad(named[name].value) and name not in told:
                    told.add(name)
                    found.append(f"round {step}: {said.format(named[name].value)}")
        seen, findings = health.observe(seen, step, named, limits)
        for finding in findings:
            if finding.name not in told:
                told.add(finding.name)
                found.append(f"{finding.name}: {finding.message}")
        now = line.get("updates/skipped") or 0.0
        if now > skipped:
            found.append(
                f"{line['step']}: {now:.0f} updates in all were skipped, not being finite."
            )
            skipped = now
    return found


_OF_ROUNDS = (
    (
        "pairs/valid",
        lambda share: share < 0.5,
        "only {:.0%} of the prompts made a pair: the others' responses are alike, or ranked alike.",
    ),
    (
        "eval/sampler_scorer_mismatch",
        lambda nats: nats > 0.1,
        "sampler and scorer differ by {:.2f} nats a response: they compute in different precision.",
    ),
    (
        "labels/ties",
        lambda share: share > 0.5,
        "{:.0%} of the labels are ties, which teach little.",
    ),
)


def _status(folder: Path, begun: bool, results: bool) -> dict[str, Any]:
    holder = folders.holder(folder)
    if holder is not None:
        return {"state": "running", "by": holder}
    if finished.read(folder) is not None or not begun:
        return {"state": "finished", "by": None}
    return {"state": "finished" if results else "stopped", "by": None}


def _with_pi0(folder: Path, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The log with what pi0 was measured at as its first line."""
    base = _object(folder / "before" / "round-000" / "judge.json")
    if base is None:
        return lines
    row: dict[str, Any] = {"step": -1 if any(x["step"] == 0 for x in lines) else 0}
    for name, metric in base.get("metrics", {}).items():
        row[name] = metric["value"]
        row[f"{name}/stderr"] = metric["stderr"]
    row["eval/kl/ref"] = 0.0
    return [row, *lines]


def _plane(command: str, lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The run in the plane of KL and reward, in order."""
    rewards = {
        "eval/reward": "reward on held-out prompts",
        "eval/rewards/margins": "margin of the implicit reward on held-out pairs, nats",
        "reward/believed": "believed reward of what was sampled",
    }
    for name, said in rewards.items():
        rows = [x for x in lines if _number(x.get("eval/kl/ref")) and _number(x.get(name))]
        if rows:
            return {
                "reward": said,
                "x": [x["eval/kl/ref"] for x in rows],
                "xError": [x.get("eval/kl/ref/stderr") for x in rows],
                "y": [x[name] for x in rows],
                "error": [x.get(f"{name}/stderr") for x in rows],
                "labels": [_at(command, x, rows) for x in rows],
            }
    return None


def _at(command: str, line: Mapping[str, Any], rows: list[dict[str, Any]]) -> str:
    if command != "iterate":
        return str(line["step"])
    if line is rows[0] and "time" not in line:
        return "pi0"
    return "offline" if line["step"] == 0 else f"round {line['step']}"


def _charts(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = dict.fromkeys(
        name
        for line in lines
        for name in line
        if name not in ("step", "time") and not name.endswith("/stderr")
    )
    used = {name for group in CHARTS.values() for name in group}
    groups = {title: [n for n in group if n in names] for title, group in CHARTS.items()}
    groups |= {name: [name] for name in names if name not in used}
    found = []
    for number, (title, group) in enumerate(groups.items()):
        series = []
        for name in group:
            rows = [line for line in lines if _number(line.get(name))]
            if rows:
                errors = [line.get(f"{name}/stderr") for line in rows]
                series.append(
                    {
                        "name": name,
                        "x": [line["step"] for line in rows],
                        "y": [line[name] for line in rows],
                        "error": errors if any(e is not None for e in errors) else None,
                    }
                )
        if series:
            found.append({"title": title, "series": series, "main": number < len(CHARTS)})
    return found


def _results(results: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Rows of the table; intervals are the value and 1.96 standard errors."""
    found = []
    for name, metric in (results or {}).get("metrics", {}).items():
        value, stderr = metric.get("value"), metric.get("stderr")
        row = {"name": name, "value": value, "stderr": stderr, "n": metric.get("n")}
        if value is not None and stderr is not None:
            row |= {"low": value - 1.96 * stderr, "high": value + 1.96 * stderr}
        found.append(row)
    return found


def _rounds(folder: Path, settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    decode = None
    for path in sorted((folder / "rounds").glob("round-[0-9]*")):
        manifests = {name: _object(path / f"{name}.json") for name in PHASES}
        seconds = {name: m["seconds"] for name, m in manifests.items() if m and "seconds" in m}
        said: dict[str, Any] = {"number": int(path.name.split("-")[1]), "seconds": seconds}
        if (path / "label.safetensors").exists() or (path / "sample.safetensors").exists():
            decode = decode or _decoder(folder, settings)
            said["pairs"] = _pairs(path, decode)
        yield said


def _pairs(path: Path, decode: Any) -> list[dict[str, Any]]:
    """The first pairs that were labelled in a round; before there are labels, what was sampled."""
    import safetensors.numpy

    labelled = path / "label.safetensors"
    try:
        found = safetensors.numpy.load_file(
            labelled if labelled.exists() else path / "sample.safetensors"
        )
    except (OSError, safetensors.SafetensorError):
        return []  # it is being written, or damaged: the run says so
    rows = []
    for row in range(min(SHOWN, len(found["prompts/ids"]))):
        prompt = found["prompts/ids"][row][: found["prompts/lengths"][row]]
        both = zip(
            found["responses/ids"][row][:2], found["responses/lengths"][row][:2], strict=True
        )
        texts = [decode(ids[:count].tolist()) for ids, count in both]
        label = float(found["label"][row]) if "label" in found else None
        rows.append({"prompt": decode(prompt.tolist()), "texts": texts, "label": label})
    return rows


def _decoder(folder: Path, settings: Mapping[str, Any]) -> Any:
    """Text of ids by the run's tokenizer: that of its model, of where it began, or none."""
    from jax_klrlhf.data import tokenize
    from jax_klrlhf.models import pretrained

    name = str(settings.get("model"))
    begun = Path(name).expanduser()
    for place in (folder / "model", begun if begun.is_dir() else name):
        try:
            tokenizer = pretrained.load_tokenizer(pretrained.find(place))
        except (InputError, OSError, ValueError):
            continue
        if tokenizer is not None:
            return tokenize.encoder(tokenizer).decode
    return lambda ids: " ".join(map(str, ids))


def _waits(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """How far people are with what a run asks them."""
    if settings.get("reward") != "human":
        return None
    place = Path((settings.get("annotator") or {}).get("folder") or folder / "labels")
    waiting = labelling.read_pairs(place)
    votes = labelling.votes(labelling.read_labels(place))
    done = sum(p.name in votes and votes[p.name].people >= waiting.each for p in waiting.pairs)
    return {"done": done, "pairs": len(waiting.pairs), "folder": str(place)}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a log that are whole."""
    try:
        content = path.read_bytes()
    except OSError:
        return
    for line in content.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            yield row


def _object(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _flat(config: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{before}{key}.")
        else:
            found[f"{before}{key}"] = value
    return found


def _said(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


__all__ = ["read", "text", "warnings", "write"]
