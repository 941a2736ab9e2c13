"""Real preferences: a small model trained on a data set's own texts, then DPO and a reward model.

For each data set: its prompts are split, a tokenizer and a language model are made from the
*training* texts alone (``klrlhf sft``), the model is aligned by ``klrlhf dpo`` and a Bradley-Terry
reward model is trained by ``klrlhf reward``, the programs themselves, as functions. On the held-out
pairs: how often the preferred response is preferred, with its interval, beside a bag of words, and
KL(policy || pi0) on held-out prompts.
"""

import dataclasses
import gzip
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from rich.console import Console

from experiments import plotting, study
from experiments.hh_harmless import words
from jax_klrlhf import models, results
from jax_klrlhf.core import bradley_terry
from jax_klrlhf.data import prepare, tokenize
from jax_klrlhf.data.prepare import Prepared
from jax_klrlhf.data.sources import open_source
from jax_klrlhf.errors import InputError
from jax_klrlhf.models import pretrained
from jax_klrlhf.models import reward as rewards
from jax_klrlhf.programs import batches as feeds
from jax_klrlhf.programs import train as programs
from jax_klrlhf.programs.config import DpoConfig, RewardConfig, SftConfig
from jax_klrlhf.results import Metric
from jax_klrlhf.training import evaluate, reference


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Train on real preferences and measure on held-out ones."""

    data: tuple[Path, ...]
    """Files of records with prompt, chosen and rejected: hh_harmless.jsonl.gz polite.jsonl.gz."""
    output: Path = Path("results/hh_harmless")
    """Where results.json, the figure and the models go. A run that was cut off goes on."""
    smoke: bool = False
    """A toy size that ends in a minute: nothing is learned."""
    seeds: int = 1
    """Trainings of each model; the split stays."""
    test_fraction: float = 0.2
    """Share of the prompts held out."""
    vocab_size: int = 4096
    hidden_size: int = 192
    layers: int = 4
    heads: int = 6
    max_prompt_length: int = 384
    max_response_length: int = 256
    token_budget: int = 4096
    max_shapes: int = 6
    sft_epochs: float = 4.0
    sft_learning_rate: float = 2e-3
    dpo_epochs: float = 1.0
    dpo_learning_rate: float = 1e-4
    kl_coef: float = 0.1
    reward_epochs: float = 1.0
    reward_learning_rate: float = 2e-4
    kl_prompts: int = 64
    """Held-out prompts from which KL(policy || pi0) is estimated."""
    kl_tokens: int = 128
    """Length at which sampled responses are cut."""
    rows: int | None = None
    """Records read of each file; all by default."""

    def resized(self) -> "Config":
        """This, or the toy size if it was asked for."""
        return dataclasses.replace(self, **SMOKE) if self.smoke else self

    def names(self) -> list[str]:
        """Of the data sets: their files', without endings."""
        return [path.name.split(".")[0] for path in self.data]

    def check(self) -> None:
        """Refuse what cannot run, before any compute is spent."""
        names = self.names()
        if not names or len(set(names)) != len(names) or self.seeds < 1:
            raise InputError("--data needs files of different names, and --seeds at least 1.")


SMOKE = {
    "rows": 96,
    "vocab_size": 320,
    "hidden_size": 16,
    "layers": 1,
    "heads": 2,
    "max_prompt_length": 24,
    "max_response_length": 16,
    "token_budget": 2048,
    "max_shapes": 1,
    "sft_epochs": 1.0,
    "kl_prompts": 4,
    "kl_tokens": 8,
}

Record = Mapping[str, Any]


def main(config: Config, *, console: Console | None = None) -> Path:
    """Run every data set and return the path of ``results.json``."""
    here = study.begin("hh_harmless", config, console=console)
    config, output, console = here.config, here.output, here.console
    names = config.names()
    split = {n: _split(p, config) for n, p in zip(names, config.data, strict=True)}
    metrics: dict[str, Metric] = {}
    for name, (train, test) in split.items():
        console.print(f"{name}: {len(train)} training pairs, {len(test)} held out", highlight=False)
        found = _run(config, output / name, train, test, console)
        metrics |= {f"{name}/{key}": metric for key, metric in found.items()}
        results.print_table(f"{name}, held out", _table(found), console=console)
    _figure(metrics, output / "accuracy.png")
    return here.end(metrics, seeds=range(config.seeds), beside="accuracy.png")


cli = study.entry(main, Config, __doc__)


def _split(path: Path, config: Config) -> tuple[list[Record], list[Record]]:
    """Records for training and held out; a prompt is on one side only."""
    train, test = [], []
    for number, (where, record) in enumerate(open_source(str(path)).records()):
        if config.rows is not None and number == config.rows:
            break
        kept = {key: record.get(key) for key in ("prompt", "chosen", "rejected")}
        for key, value in kept.items():
            if not isinstance(value, str):
                raise InputError(f"{where}, column {key!r}: expected text, found {value!r}")
        draw = int.from_bytes(hashlib.sha256(str(kept["prompt"]).encode()).digest()[:8], "big")
        (test if draw < config.test_fraction * 2**64 else train).append(kept)
    if not train or not test:
        raise InputError(
            f"{path}: {len(train)} training and {len(test)} held-out pairs: give more records, or "
            "another --test-fraction"
        )
    return train, test


def _run(
    config: Config,
    folder: Path,
    train: Sequence[Record],
    test: Sequence[Record],
    console: Console,
) -> dict[str, Metric]:
    """Everything of one data set: ``method/metric``."""
    folder.mkdir(parents=True, exist_ok=True)
    # One text per dialogue and response: pi0 learns prompts too, of which there are more.
    texts = [r["prompt"] + r[key] for r in train for key in ("chosen", "rejected")]
    files = {
        "pairs": list(train),
        "held_out": list(test),
        "texts": [{"prompt": "", "response": text} for text in dict.fromkeys(texts)],
    }
    for name, rows in files.items():
        _write(folder / f"{name}.jsonl.gz", rows)
    start = _start(config, folder / "start", texts)
    held_out = prepare.build(
        str(folder / "held_out.jsonl.gz"),
        pretrained.load_tokenizer(start),
        folder / "held_out",
        max_prompt_length=config.max_prompt_length,
        max_response_length=config.max_response_length,
    )["train"]
    numbers = [row.number for row in held_out.fetch(range(len(held_out)))]
    pairs = [(test[n]["chosen"], test[n]["rejected"]) for n in numbers]

    bag = words.fit([(r["chosen"], r["rejected"]) for r in train])
    margins: dict[str, list[np.ndarray]] = {
        "shorter response": [np.diff(held_out.lengths.responses, axis=1)[:, 0].astype(np.float32)],
        "bag of words": [bag.margin(pairs)],
    }
    found: dict[str, list[dict[str, Metric]]] = {}
    for seed in range(config.seeds):
        _train(config, folder, start, seed, console)
        measured, divergence = _measure(config, folder / f"seed{seed}", held_out, seed)
        for method, margin in measured.items():
            margins.setdefault(method, []).append(margin)
        found.setdefault("DPO", []).append(divergence)

    metrics: dict[str, Metric] = {}
    for method, seeds in margins.items():
        # A pair's mean over the seeds first: pairs are the independent units.
        hits = np.mean([0.5 + 0.5 * np.sign(margin) for margin in seeds], axis=0)
        metrics[f"{method}/accuracy"] = results.mean(hits)
        if len(seeds) > 1:
            each = [float(np.mean(0.5 + 0.5 * np.sign(margin))) for margin in seeds]
            metrics[f"{method}/accuracy_over_seeds"] = results.mean(each)
        if method in ("bag of words", "DPO", "reward model"):
            losses = [np.asarray(bradley_terry.nll(jnp.asarray(margin))) for margin in seeds]
            metrics[f"{method}/log_loss"] = results.mean(np.mean(losses, axis=0))
    for method, seeds in found.items():
        for key in ("eval/kl/ref", "eval/kl/k1", "eval/entropy", "eval/length/sampled"):
            metrics[f"{method}/{key[5:]}"] = seeds[0][key]
            if len(seeds) > 1:
                metrics[f"{method}/{key[5:]}_over_seeds"] = results.mean(
                    [seed[key].value for seed in seeds]
                )
    return metrics


def _write(path: Path, rows: Sequence[Record]) -> None:
    """JSON Lines, the same bytes for the same rows."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def _start(config: Config, folder: Path, texts: Sequence[str]) -> Path:
    """A folder with a tokenizer made from the texts, and a model's shape (random weights)."""
    if (folder / "config.json").is_file():
        return folder
    tokenizer = tokenize.train_tokenizer(
        texts, vocab_size=config.vocab_size, folder=folder.with_name("tokenizer")
    )
    facts = models.ModelConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=3 * config.hidden_size,
        layers=config.layers,
        heads=config.heads,
        kv_heads=config.heads,
        head_dim=config.hidden_size // config.heads,
        max_length=config.max_prompt_length + config.max_response_length,
    )
    params = jax.jit(models.language_model(facts).init)(jax.random.key(0))
    return models.save(folder, facts, params, tokenizer)


def _train(config: Config, folder: Path, start: Path, seed: int, console: Console) -> None:
    """SFT, then DPO and a reward model from it."""
    common: dict[str, Any] = {
        "test_fraction": 0.0,  # Held out already.
        "token_budget": config.token_budget,
        "max_shapes": config.max_shapes,
        "seed": seed,
        "save_every": 10**6,
        "remat": "dots_with_no_batch_dims_saveable",
    }
    lengths = {
        "max_prompt_length": config.max_prompt_length,
        "max_response_length": config.max_response_length,
    }
    place = folder / f"seed{seed}"
    programs.sft(
        SftConfig(
            model=str(start),
            weights="random",
            data=str(folder / "texts.jsonl.gz"),
            output=place / "sft",
            # A text is one response to nothing; long ones lose their end.
            max_prompt_length=1,
            max_response_length=config.max_prompt_length + config.max_response_length - 1,
            epochs=config.sft_epochs,
            learning_rate=config.sft_learning_rate,
            **common,
        ),
        console=console,
    )
    pi0 = str(place / "sft" / "model")
    pairs = str(folder / "pairs.jsonl.gz")
    programs.dpo(
        DpoConfig(
            model=pi0,
            data=pairs,
            output=place / "dpo",
            epochs=config.dpo_epochs,
            learning_rate=config.dpo_learning_rate,
            kl_coef=config.kl_coef,
            kl_prompts=0,  # Measured below, on the held-out prompts.
            **lengths,
            **common,
        ),
        console=console,
    )
    programs.reward(
        RewardConfig(
            model=pi0,
            data=pairs,
            output=place / "reward",
            epochs=config.reward_epochs,
            learning_rate=config.reward_learning_rate,
            **lengths,
            **common,
        ),
        console=console,
    )


def _measure(
    config: Config, place: Path, held_out: Prepared, seed: int
) -> tuple[dict[str, np.ndarray], dict[str, Metric]]:
    """Margins of the held-out pairs by method, and the divergence of the policy from pi0."""
    loader = held_out.loader(
        seed=None, token_budget=config.token_budget, max_shapes=config.max_shapes
    )

    def batches() -> Any:
        return feeds.whole_epoch(loader)

    pi0 = models.load(place / "sft" / "model")
    policy = models.load(place / "dpo" / "model")

    def log_prob(params: Any) -> Float[np.ndarray, "rows 2"]:
        return reference.tabulate(pi0.model, params, batches(), rows=len(held_out), responses=2)

    log_ratio = log_prob(policy.params) - (before := log_prob(pi0.params))
    judge = rewards.load(place / "reward" / "model")
    score = jax.jit(lambda params, p, r: rewards.reward(judge.model, params, p, r))
    reward = _by_row(
        lambda batch: score(judge.params, batch.prompts, batch.responses), batches(), len(held_out)
    )
    divergence = evaluate.make_divergence(
        pi0.model,
        samples=2,
        max_new_tokens=config.kl_tokens,
        stop=(tokenize.encoder(pi0.tokenizer).end,),
    )
    prompts = feeds.first_prompts(loader, config.kl_prompts)
    return {
        "pi0's log-probability": before[:, 0] - before[:, 1],
        "DPO": config.kl_coef * (log_ratio[:, 0] - log_ratio[:, 1]),
        "reward model": reward[:, 0] - reward[:, 1],
    }, divergence(
        jax.random.key(seed),
        policy.params,
        pi0.params,
        prompts.batches,
        prompts.where,
    )


def _by_row(score: Callable[[Any], Any], batches: Any, rows: int) -> Float[np.ndarray, "rows 2"]:
    """Scores of batches in the order of the data set."""
    table = np.full((rows, 2), np.nan, np.float32)
    for batch in batches:
        table[batch.row] = np.asarray(score(batch))
    return table


def _table(found: Mapping[str, Metric]) -> dict[str, dict[str, Metric | str]]:
    """Accuracy with its 95 % interval, log-loss and KL by method."""
    rows: dict[str, dict[str, Metric | str]] = {}
    for key, metric in found.items():
        method, name = key.split("/", 1)
        row = rows.setdefault(method, {})
        if name == "accuracy":
            half = 1.96 * (metric.stderr or 0.0)
            row["accuracy [95 %]"] = (
                f"{metric.value:.3f} [{metric.value - half:.3f}, {metric.value + half:.3f}]"
            )
        elif name in ("log_loss", "kl/ref"):
            row[{"log_loss": "log-loss (nats)", "kl/ref": "KL to pi0 (nats)"}[name]] = metric
    return rows


def _figure(metrics: Mapping[str, Metric], path: Path) -> None:
    """Accuracy of every method on every data set, with 95 % intervals."""
    names = list(dict.fromkeys(key.split("/")[0] for key in metrics))
    figure, axes = plotting.grid(1, len(names), width=4.4, height=2.6)
    for ax, name in zip(axes[0], names, strict=True):
        found = {
            key.split("/")[1]: metric
            for key, metric in metrics.items()
            if key.startswith(f"{name}/") and key.endswith("/accuracy")
        }
        for place, metric in enumerate(found.values()):
            half = 1.96 * (metric.stderr or 0.0)
            ax.errorbar(metric.value, place, xerr=half, fmt="o", color="C0")
        ax.axvline(0.5, color="0.7", linewidth=1)
        ax.set_yticks(range(len(found)), list(found))
        ax.invert_yaxis()
        ax.set_xlabel("held-out preference accuracy")
        ax.set_title(name)
    plotting.save(figure, path)
