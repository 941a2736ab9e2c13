"""TRL's DPOTrainer on the job's pairs: its own collator, loss, optimizer and loop.

Only its tokenization is passed over: the ids are given. Batches are the job's, in order.
It runs in an environment of its own, where TRL is and this library is not.
"""

import gc
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_DATASETS_CACHE", tempfile.mkdtemp())

import torch  # pyright: ignore[reportMissingImports]
from datasets import Dataset  # pyright: ignore[reportMissingImports]
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer  # pyright: ignore[reportMissingImports]

from experiments.benchmarks.dpo_peers.serve import Contender, serve


class Given(DPOTrainer):
    """DPOTrainer on token ids."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset


class Losses(TrainerCallback):
    """The loss of each logged step."""

    def __init__(self):
        self.found: list[float] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.found.append(float(logs["loss"]))


def make(job: dict[str, Any]) -> Contender:
    """The trainer of a job."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    logging.getLogger("trl").setLevel(logging.ERROR)
    folder = Path(tempfile.mkdtemp())

    def trainer(pairs: list[list[list[int]]], *, every_loss: bool) -> DPOTrainer:
        columns = zip(*pairs, strict=True)
        data = Dataset.from_dict(
            dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), columns, strict=True))
        )
        model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
        settings = DPOConfig(
            output_dir=str(folder),
            per_device_train_batch_size=job["batch_size"],
            num_train_epochs=1,
            learning_rate=job["learning_rate"],
            lr_scheduler_type="constant",
            warmup_steps=0,
            max_grad_norm=1.0,
            weight_decay=0.0,
            optim="adamw_torch",
            beta=job["kl_coef"],
            precompute_ref_log_probs=job["reference"] == "cached",
            precompute_ref_batch_size=job["batch_size"],
            gradient_checkpointing=job["checkpointing"],
            max_length=None,
            bf16=False,
            use_cpu=True,
            logging_strategy="steps",
            logging_steps=1 if every_loss else 10,
            disable_tqdm=True,
            save_strategy="no",
            report_to=[],
            train_sampling_strategy="sequential",
            dataloader_pin_memory=False,
            seed=0,
        )
        tokenizer = AutoTokenizer.from_pretrained(job["model"])
        return Given(model=model, args=settings, train_dataset=data, processing_class=tokenizer)

    def check() -> list[float]:
        losses = Losses()
        made = trainer(job["check"], every_loss=True)
        made.add_callback(losses)
        made.train()
        del made
        gc.collect()
        return losses.found

    training: list[DPOTrainer] = []

    def turn() -> None:
        if not training:
            training.append(trainer(job["pairs"], every_loss=False))
        training[0].train()

    return Contender(check, turn, slots(job))


def slots(job: dict[str, Any]) -> int:
    """Every row of a batch is padded to its longest prompt and response together."""
    total = 0
    for begin in range(0, len(job["pairs"]), job["batch_size"]):
        batch = job["pairs"][begin : begin + job["batch_size"]]
        longest = max(len(p) + max(len(c), len(r)) for p, c, r in batch)
        total += 2 * len(batch) * longest
    return total


if __name__ == "__main__":
    serve(make)
