"""TRL's GRPOTrainer, a step at a time: it waits for a line on standard input before each.

Run by an environment that has TRL, as a file: nothing of this library is imported. The first line
is the settings as JSON; it answers with versions, then to every further line (a number of steps)
with the mean length of the completions and the loss, when those steps are done.
"""

import json
import os
import sys


def main() -> None:
    """Serve steps until standard input ends."""
    settings = json.loads(sys.stdin.readline())
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print is no answer

    import torch  # pyright: ignore[reportMissingImports]
    import transformers
    import trl  # pyright: ignore[reportMissingImports]
    from datasets import Dataset  # pyright: ignore[reportMissingImports]
    from transformers import TrainerCallback

    torch.set_num_threads(settings["threads"] or os.cpu_count() or 1)
    last: dict = {}

    def answer(value: object) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    def reward(completions: list, **_: object) -> list[float]:
        return [text.count("a") / 8 for text in completions]

    class Turns(TrainerCallback):
        """Lets steps pass as they are asked for."""

        left = 0

        def on_step_begin(self, args, state, control, **_):
            if self.left == 0:
                line = sys.stdin.readline()
                if not line:
                    os._exit(0)
                self.left = int(line)
            return control

        def on_step_end(self, args, state, control, **_):
            self.left -= 1
            return control

        def on_log(self, args, state, control, logs=None, **_):
            last.update(logs or {})
            if self.left == 0:
                answer({k: last.get(k) for k in ("completions/mean_length", "loss", "kl")})
            return control

    size = settings["prompts"] * settings["samples"]
    batch = settings["batch"]
    arguments = trl.GRPOConfig(
        output_dir=settings["output"],
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=size // batch,
        generation_batch_size=size,
        num_generations=settings["samples"],
        max_completion_length=settings["new_tokens"],
        generation_kwargs={"min_new_tokens": settings["new_tokens"]},
        beta=settings["kl_coef"],
        loss_type="grpo",
        scale_rewards="group",
        epsilon=0.2,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="constant",
        max_steps=10**6,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        seed=0,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        settings["model"], dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(settings["model"])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    data = Dataset.from_dict({"prompt": settings["texts"]})
    answer({"trl": trl.__version__, "torch": torch.__version__, "threads": torch.get_num_threads()})
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=arguments,
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[Turns()],
    )
    trainer.train()


if __name__ == "__main__":
    main()
