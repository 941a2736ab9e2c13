r"""``klrlhf eval``: one policy against another, on the same prompts, by a judge.

Reward and length are means over prompts; a win is a response's reward above that of the other
policy's response to the same prompt, over all pairs of responses, a tie one half. The win rate at
equal length fits

.. math:: P(\text{win}) = \sigma(\theta + \phi \tanh(\Delta \text{length} / s))

to the pairs, with s the standard deviation of the length differences, and reports
:math:`\sigma(\theta)` (the length term of arXiv 2404.04475, eq. 1). KL(policy || reference) of a
prompt is the sum over a response's tokens of the exact conditional divergence, averaged over the
policy's own responses. Diversity is the share of different pairs of neighbouring words among all
of a prompt's responses (distinct-2, arXiv 1510.03055). Prompts are the independent units of every
standard error.

Axes: ``B`` prompts, ``K`` responses to each.
"""

import itertools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from rich.console import Console

from jax_klrlhf import results
from jax_klrlhf.core import measure, sequence
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.data import tokenize
from jax_klrlhf.data.rows import Row, encode
from jax_klrlhf.errors import InputError
from jax_klrlhf.models import pretrained
from jax_klrlhf.models import reward as rewards
from jax_klrlhf.programs import options, policies
from jax_klrlhf.programs import run as runs
from jax_klrlhf.programs.evaluate_config import EvalConfig
from jax_klrlhf.programs.evaluate_proxy import by_proxy
from jax_klrlhf.programs.gold import CLASSES, fit_sentiment
from jax_klrlhf.programs.losses import load_function
from jax_klrlhf.programs.policies import Asked, Policy
from jax_klrlhf.report.answers import pieces
from jax_klrlhf.results import Metric, mean
from jax_klrlhf.training.evaluate import kl_along
from jax_klrlhf.training.rounds.compute import mapped
from jax_klrlhf.training.rounds.parts import ragged

Judge = Callable[[Sequence[Asked], Sequence[Sequence[str]]], Float[np.ndarray, "B K"]]
"""Rewards of texts ``[B][K]`` to prompts: by words, so that any tokenizer will do."""


class Said(NamedTuple):
    """A policy's answers."""

    responses: Ragged
    texts: list[list[str]]
    reward: Float[np.ndarray, "B K"]


def evaluate(config: EvalConfig, *, console: Console | None = None) -> dict[str, Metric]:
    """Print the table, write ``output``, and return the metrics.

    Raises:
        InputError: naming what is wrong with options, models, prompts or judge.
    """
    began = time.perf_counter()
    options.check(config)
    console = console or Console()
    output = None if config.output is None else results.output_folder(config.output)
    asked = policies.read_prompts(config.prompts, config, count=config.count)
    names = {"policy": config.model, "reference": config.against}
    contexts = {name: policies.context_of(policies.folder_of(name)) for name in names.values()}
    config = policies.within_context(config, contexts, console)
    mesh = runs.mesh_of(config.mesh)
    judge = make_judge(config.reward, config, mesh)
    proxy = None if config.proxy is None else make_judge(config.proxy, config, mesh, "--proxy")
    found: dict[str, Said] = {}
    loaded: dict[str, Policy] = {}
    prompts: dict[str, Ragged] = {}
    for number, (role, name) in enumerate(names.items()):
        policy = policies.load(name, dtype=config.dtype, stop=config.stop, mesh=mesh)
        prompts[role] = policies.tokens_of(policy, asked, config)
        say = f"{role}: {config.samples} answers to each of {len(asked)} prompts"
        console.print(say, markup=False, highlight=False)
        key = jax.random.fold_in(jax.random.key(config.seed), number)
        drawn = policies.answers(key, policy, prompts[role], config, mesh=mesh, plain=True)
        said = policies.texts(policy, drawn)
        found[role] = Said(drawn, said, judge(asked, said))
        loaded[role] = policy
    kl = _kl(loaded, prompts["policy"], found["policy"].responses, config, mesh)
    if kl is None:
        console.print("The two read other tokens, so that there is no KL between them.")
    metrics = compare(found["policy"], found["reference"], None if kl is None else kl.sum(-1))
    believed = None
    if proxy is not None:
        believed = {role: proxy(asked, said.texts) for role, said in found.items()}
        metrics |= by_proxy({role: said.reward for role, said in found.items()}, believed)
    _table(metrics, names, console)
    if output is not None:
        decode = loaded["policy"].encoder.decode
        seconds = time.perf_counter() - began
        _write(config, output, asked, found, believed, kl, decode, metrics, seconds)
        said = f"results.json and answers.jsonl in {output}"
        console.print(said, markup=False, highlight=False, soft_wrap=True)
    return metrics


def compare(policy: Said, reference: Said, kl: np.ndarray | None) -> dict[str, Metric]:
    """Metrics ``policy/...``, ``reference/...`` and ``difference/...``."""
    metrics: dict[str, Metric] = {}
    for role, said in {"policy": policy, "reference": reference}.items():
        metrics[f"{role}/reward"] = mean(said.reward.astype(np.float64).mean(1))
        lengths = np.asarray(said.responses.lengths, np.float64)
        metrics[f"{role}/length"] = mean(lengths.mean(1))
        metrics[f"{role}/distinct_2"] = mean([distinct_2(texts) for texts in said.texts])
    gain = policy.reward.astype(np.float64).mean(1) - reference.reward.astype(np.float64).mean(1)
    metrics["difference/reward"] = mean(gain)
    wins = _wins(policy.reward, reference.reward)
    metrics["difference/wins"] = mean(wins.mean((1, 2)))
    ours, theirs = (np.asarray(s.responses.lengths, np.float64) for s in (policy, reference))
    metrics["difference/wins_at_equal_length"] = wins_at_equal_length(
        wins, ours[:, :, None] - theirs[:, None, :]
    )
    if kl is not None:
        metrics["difference/kl"] = mean(kl.mean(1))
    return metrics


def _wins(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """``[B, K, K]``: 1 where ours is above, 1/2 at a tie."""
    return 0.5 + 0.5 * np.sign(ours[:, :, None] - theirs[:, None, :]).astype(np.float64)


def wins_at_equal_length(
    wins: Float[np.ndarray, "B K L"], longer: Float[np.ndarray, "B K L"], *, ridge: float = 1e-3
) -> Metric:
    """The win rate that the pairs would have at equal lengths, by the module's logistic regression.

    ``longer`` is the difference of the two lengths. The ridge on both coefficients, in pairs, keeps
    them finite where all pairs are won. The standard error is robust to whatever dependence there
    is among one prompt's pairs.
    """
    scale = longer.std()
    nuisance = np.tanh(longer / scale) if scale > 0 else 0 * longer
    # Where length decides every pair the likelihood is flat: float32 would be off by 1e-4 there.
    with jax.enable_x64(True):
        found = measure.controlled_win_rate(
            jnp.asarray(wins.reshape(-1)), jnp.asarray(nuisance.reshape(-1, 1)), ridge=ridge
        )
    count = len(wins)
    of_prompts = np.asarray(found.influence, np.float64).reshape(count, -1).sum(1)
    error = np.sqrt((of_prompts**2).sum() * count / (count - 1)) if count > 1 else None
    return Metric(float(found.win_rate), None if error is None else float(error), count)


def distinct_2(texts: Sequence[str]) -> float:
    """Different pairs of neighbouring words over all of them; 1 where there is no pair."""
    found = [pair for text in texts for pair in _bigrams(text)]
    return len(set(found)) / len(found) if found else 1.0


def _bigrams(text: str) -> list[tuple[str, str]]:
    words = text.lower().split()
    return list(itertools.pairwise(words))


def make_judge(spec: str, config: EvalConfig, mesh: Any, option: str = "--reward") -> Judge:
    """The judge that ``--reward``, or another option, names.

    Raises:
        InputError: where it names none.
    """
    folder = Path(spec).expanduser()
    if ":" in spec and not folder.exists():
        own = load_function(spec, option=option)

        def by_function(asked: Sequence[Asked], texts: Sequence[Sequence[str]]) -> np.ndarray:
            flat = [(a.text, text) for a, said in zip(asked, texts, strict=True) for text in said]
            found = np.asarray(own([a for a, _ in flat], [t for _, t in flat]), np.float32)
            if found.shape != (len(flat),) or not np.isfinite(found).all():
                raise InputError(
                    f"{option} {spec}: returned shape {found.shape} for {len(flat)} texts, or a "
                    "number that is not finite; it must return one finite number to each."
                )
            return found.reshape(len(asked), -1)

        return by_function
    if any((folder / f"{name}.txt").is_file() for name in CLASSES):
        words = fit_sentiment(folder)
        return lambda asked, texts: np.stack([words(said) for said in texts])
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise InputError(
            f"{folder}: neither a reward model (config.json) nor positive.txt and negative.txt."
        )
    return _by_model(spec, config, mesh)


def _by_model(spec: str, config: EvalConfig, mesh: Any) -> Judge:
    """A reward model, which reads prompts and answers in its own tokens and chat template."""
    folder = policies.folder_of(spec)
    tokenizer = pretrained.load_tokenizer(folder)
    if tokenizer is None:
        raise InputError(f"{spec}: the folder has no tokenizer, which answers need.")
    encoder = tokenize.encoder(tokenizer)
    loaded = rewards.load(folder, mesh=mesh)
    room = policies.context_of(folder)

    def score(params: Any, prompts: Ragged, responses: Ragged) -> Array:
        return rewards.reward(loaded.model, params, prompts, responses)

    program = mapped(score, rows=config.rows, mesh=mesh)

    def judge(asked: Sequence[Asked], texts: Sequence[Sequence[str]]) -> np.ndarray:
        count = len(texts[0])
        pairs = (
            a.example._replace(responses=_replies(a, [text]), scores=[0.0])
            for a, said in zip(asked, texts, strict=True)
            for text in said
        )
        prompts, answers = [], []
        for row in encode(
            encoder,
            pairs,
            max_prompt_length=max(1, room - config.max_response_length),
            max_response_length=min(config.max_response_length, room - 1),
        ):
            if isinstance(row, Row):
                prompts.append(row.prompt)
                answers.append(row.responses[0])
            else:  # an answer without a word: its end token alone
                at = len(prompts) // count
                prompts.append(prompts[-1] if len(prompts) % count else _prompt(encoder, asked[at]))
                answers.append([encoder.end])
        ids, lengths = sequence.pad(answers)
        found = program(
            loaded.params,
            ragged(*sequence.pad(prompts)),
            ragged(np.asarray(ids)[:, None], np.asarray(lengths)[:, None]),
        )
        return np.asarray(found, np.float32).reshape(len(asked), count)

    return judge


def _replies(asked: Asked, texts: Sequence[str]) -> list[Any]:
    if isinstance(asked.example.prompt, str):
        return list(texts)
    return [[{"role": "assistant", "content": text}] for text in texts]


def _prompt(encoder: tokenize.Encoder, asked: Asked) -> list[int]:
    prompt: Any = asked.example.prompt
    return encoder.prompt(prompt) if isinstance(prompt, str) else encoder.chat_prompt(prompt)


def _kl(
    loaded: dict[str, Policy], prompts: Ragged, responses: Ragged, config: EvalConfig, mesh: Any
) -> np.ndarray | None:
    """KL(policy || reference) at each token ``[B, K, C]``; None between different vocabularies."""
    ours, theirs = loaded["policy"], loaded["reference"]
    if ours.encoder.continuation.get_vocab() != theirs.encoder.continuation.get_vocab():
        return None
    if ours.loaded.model.vocab_size != theirs.loaded.model.vocab_size:
        return None

    def divergence(params: Any, prompts: Ragged, responses: Ragged) -> Array:
        policy, base = params
        reference = (theirs.loaded.model, base)
        return kl_along(ours.loaded.model, policy, prompts, responses, reference=reference).kl

    program = mapped(divergence, rows=config.rows, mesh=mesh)
    found = program((ours.loaded.params, theirs.loaded.params), prompts, responses)
    return np.asarray(found, np.float64)


def _table(metrics: dict[str, Metric], names: dict[str, str], console: Console) -> None:
    rows: dict[str, dict[str, Any]] = {}
    for role in ("policy", "reference"):
        rows[role] = {
            "reward": metrics[f"{role}/reward"],
            "tokens": metrics[f"{role}/length"],
            "distinct-2": metrics[f"{role}/distinct_2"],
        }
        for name in ("proxy", "proxy_agreement", "proxy_calibration"):
            if (metric := metrics.get(f"{role}/{name}")) is not None:
                rows[role][name.replace("_", " ")] = metric
    n = metrics["policy/reward"].n
    results.print_table(
        f"policy {names['policy']}, reference {names['reference']}",
        rows,
        console=console,
        caption=f"± one standard error over {n} prompts",
    )
    said = {
        "reward of the policy above the reference's": "reward",
        "win rate against the reference": "wins",
        "win rate at equal length": "wins_at_equal_length",
        "KL(policy || reference), nats": "kl",
        "proxy of the policy above the reference's": "proxy",
        "over-optimization, the proxy's gain less the reward's": "over_optimization",
    }
    for text, name in said.items():
        if (metric := metrics.get(f"difference/{name}")) is not None:
            console.print(f"{text}: {metric}", highlight=False)


def _write(
    config: EvalConfig,
    output: Path,
    asked: Sequence[Asked],
    found: dict[str, Said],
    believed: dict[str, np.ndarray] | None,
    kl: np.ndarray | None,
    decode: Callable[[list[int]], str],
    metrics: dict[str, Metric],
    seconds: float,
) -> None:
    ids, lengths = (np.asarray(x) for x in found["policy"].responses)
    with (output / "answers.jsonl").open("w", encoding="utf-8") as file:
        for number, prompt in enumerate(asked):
            record: dict[str, Any] = {"prompt": prompt.example.prompt}
            for role, said in found.items():
                record[role] = said.texts[number]
                record[f"{role}/reward"] = said.reward[number].tolist()
                if believed is not None:
                    record[f"{role}/proxy"] = believed[role][number].tolist()
            if kl is not None:
                record["kl"] = kl[number].sum(-1).tolist()
                rows = [
                    row[:n].tolist() for row, n in zip(ids[number], lengths[number], strict=True)
                ]
                record["policy/tokens"] = [pieces(decode, row) for row in rows]
                record["kl/tokens"] = [
                    [round(float(x), 5) for x in of[: len(row)]]
                    for of, row in zip(kl[number], rows, strict=True)
                ]
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    results.write_results(
        output,
        name="eval",
        config=config,
        seeds=[config.seed],
        seconds=seconds,
        metrics={f"eval/{name}": metric for name, metric in metrics.items()},
    )


__all__ = ["EvalConfig", "evaluate"]
