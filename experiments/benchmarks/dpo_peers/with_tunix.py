"""tunix's DPOTrainer on the job's pairs: its own loss, optimizer step and loop.

It pads every prompt and every response to the two lengths given, and scores the reference in each
step; it has no cache of it. ``reference: none`` leaves the reference out of the loss, which is
what a cached one would cost. It runs in an environment of its own, without this library.
"""

import gc
import json
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from tunix.models.llama3 import model as llama  # pyright: ignore[reportMissingImports]
from tunix.models.llama3 import params as weights  # pyright: ignore[reportMissingImports]
from tunix.sft.dpo.dpo_trainer import DPOTrainer, DPOTrainingConfig, TrainingInput  # pyright: ignore[reportMissingImports]

from experiments.benchmarks.dpo_peers.serve import Contender, serve


def make(job: dict[str, Any]) -> Contender:
    """The trainer of a job."""
    logging.getLogger().setLevel(logging.ERROR)
    facts = json.loads((Path(job["model"]) / "config.json").read_text())
    config = llama.ModelConfig(
        num_layers=facts["num_hidden_layers"],
        vocab_size=facts["vocab_size"],
        embed_dim=facts["hidden_size"],
        hidden_dim=facts["intermediate_size"],
        num_heads=facts["num_attention_heads"],
        head_dim=facts["head_dim"],
        num_kv_heads=facts["num_key_value_heads"],
        rope_theta=job["rope_theta"],
        norm_eps=facts["rms_norm_eps"],
        weight_tying=facts["tie_word_embeddings"],
        remat_config=llama.RematConfig[job["remat"]],
    )
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def load() -> llama.Llama3:
        return weights.create_model_from_safe_tensors(job["model"], config, mesh)

    def trainer() -> DPOTrainer:
        optimizer = optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adamw(job["learning_rate"], weight_decay=0.0),
        )
        settings = DPOTrainingConfig(eval_every_n_steps=10**9, beta=job["kl_coef"])
        reference = load() if job["reference"] == "live" else None
        made = DPOTrainer(load(), reference, optimizer, settings)
        made.is_managed_externally = True  # else each call of train closes the logger
        return made

    def check() -> list[float]:
        made, losses = trainer(), []
        record = made._post_process_train_step

        def keep(aux: Any) -> None:
            losses.append(made._buffered_train_metrics.losses[-1])
            record(aux)

        made._post_process_train_step = keep
        made.train(batches(job["check"], job))
        found = [float(loss) for loss in losses]
        del made, losses, record
        gc.collect()
        jax.clear_caches()
        return found

    training: list[DPOTrainer] = []

    def turn() -> None:
        if not training:
            training.append(trainer())
        training[0].train(batches(job["pairs"], job))

    return Contender(check, turn, 2 * len(job["pairs"]) * sum(job["lengths"]))


def batches(pairs: list[list[list[int]]], job: dict[str, Any]):
    """Prompts padded on the left, responses on the right, as tunix wants them."""
    prompt, response = job["lengths"]
    for begin in range(0, len(pairs), job["batch_size"]):
        batch = pairs[begin : begin + job["batch_size"]]
        prompts, chosen, rejected = zip(*batch, strict=True)
        yield TrainingInput(
            *padded(prompts, prompt, left=True),
            *padded(chosen, response, left=False),
            *padded(rejected, response, left=False),
        )


def padded(rows: Any, length: int, *, left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of rows of one length."""
    ids = np.zeros((len(rows), length), np.int32)
    mask = np.zeros((len(rows), length), np.int32)
    for row, (tokens, kept) in zip(rows, zip(ids, mask, strict=True), strict=True):
        where = slice(length - len(row), None) if left else slice(0, len(row))
        tokens[where], kept[where] = row, 1
    return ids, mask


if __name__ == "__main__":
    serve(make)
