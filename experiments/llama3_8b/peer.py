r"""MaxText's DPO step for Llama 3 8B, compiled for the slice and counted as ours is.

MaxText trains DPO through Tunix: ``train_dpo`` gives its model to ``tunix.sft.dpo.DPOTrainer``. The
trainer is made here as there, from shapes alone, and its own two programs are compiled: ``train``,
its step, and ``reference``, the frozen copy's log-probabilities, which it computes of every batch
before the step. Python 3.12, in an environment of its own, with this folder's repository as
PYTHONPATH (MaxText's own requirements hold a good deal that this does not need):

    pip install "jax[tpu]==0.11.1" flax optax orbax-checkpoint google-metrax qwix aqtp tokamax \
        grain datasets transformers sentencepiece tiktoken omegaconf pydantic jaxtyping drjax \
        ml-collections pathwaysutils ml-goodput-measurement google-cloud-mldiagnostics pillow \
        tensorboardx jsonlines cloud-accelerator-diagnostics safetensors pylatexenc numba psutil \
        python-dotenv perfetto tenacity kagglehub sympy einshape rich tyro
    pip install --no-deps maxtext==0.2.5 google-tunix==0.1.7
    PYTHONPATH=. python -m experiments.llama3_8b.peer --program train
"""

# pyright: reportMissingImports=false

import dataclasses
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro

from jax_klrlhf.plan import report
from jax_klrlhf.plan.chips import read_topology
from jax_klrlhf.plan.program import Program

CHIPS, LAYERS, HIDDEN, FEEDFORWARD, KEYS, WORDS = 64, 32, 4096, 14336, 1024, 128_256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What to compile."""

    program: Literal["train", "reference"] = "train"
    layers: int = LAYERS
    """Fewer to try."""
    data: int = 1
    """Copies of the parameters; fsdp is 64 over this. By MaxText's default 1."""
    pairs: int = 64
    prompt: int = 1024
    response: int = 1024
    output: Path | None = None
    """Folder for the text of the compiled program."""


def main(config: Config) -> report.Plan:
    """Compile and print."""
    # No TPU is asked for; MaxText asks for one unless told which there would be.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("DECOUPLE_GCLOUD", "FALSE")
    mesh, rules, trainer = _trainer(config)
    batch = _batch(config, mesh, trainer)
    attention = 4.0 * HIDDEN * config.layers * 2 * config.pairs * _seen(config)
    program = Program(
        name=f"MaxText {config.program}",
        lower=partial(_lower, config, mesh, rules, trainer, batch),
        arguments={"batch": batch},
        useful_flops=(3 if config.program == "train" else 1) * _forward(config),
        attention_flops=attention,
        layers=config.layers,
        vocabulary=WORDS * HIDDEN,
        stack=config.layers * HIDDEN * KEYS,
        pieces=0,  # A prompt and its response are one row: one kernel a layer.
    )
    plan = report.compile_program(program, read_topology("v5e:8x8"))
    print(report.table(plan))
    if config.output is not None:
        config.output.mkdir(parents=True, exist_ok=True)
        (config.output / f"{config.program}.hlo.txt").write_text(plan.text)
    return plan


def _seen(config: Config) -> float:
    """Keys that the queries of a row see."""
    length = config.prompt + config.response
    return length * (length + 1) / 2


def _forward(config: Config) -> float:
    """FLOPs of a forward pass that sends a prompt through the layers once, as ours are counted."""
    layer = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * KEYS + 3 * HIDDEN * FEEDFORWARD
    tokens = config.prompt + 2 * config.response
    seen = 2 * _seen(config) - config.prompt * (config.prompt + 1) / 2
    of_pair = 2.0 * config.layers * layer * tokens + 4.0 * HIDDEN * config.layers * seen
    return config.pairs * (of_pair + 2.0 * WORDS * HIDDEN * 2 * config.response)


def _trainer(config: Config) -> tuple[Any, Any, Any]:
    """Mesh, rules of sharding, and Tunix's trainer of MaxText's model, all of shapes.

    As ``train_dpo.setup_trainer_state``, without a checkpoint, a tokenizer and data.
    """
    import maxtext
    import optax
    from flax import nnx
    from maxtext.configs import pyconfig
    from maxtext.integration.tunix.tunix_adapter import TunixMaxTextAdapter
    from maxtext.optimizers import optimizers
    from maxtext.trainers.post_train.dpo import train_dpo
    from maxtext.trainers.pre_train import train_compile
    from maxtext.utils import maxtext_utils, model_creation_utils
    from tunix.sft import peft_trainer

    settings = [
        "run_name=peer",
        f"base_output_directory={tempfile.gettempdir()}",
        "model_name=llama3.1-8b",  # The shapes of 3; the adapter to Tunix does not know llama3-8b.
        "compile_topology=v5e-64",
        "compile_topology_num_slices=1",
        "skip_jax_distributed_system=True",
        "tokenizer_path=none",
        f"per_device_batch_size={config.pairs / CHIPS:g}",
        f"max_target_length={config.prompt + config.response}",
        f"ici_data_parallelism={config.data}",
        "enable_checkpointing=False",
    ]
    if config.data > 1:  # An axis of 16 takes a physical axis of 8 and a part of the other.
        settings.append("allow_split_physical_axes=True")
    if config.layers != LAYERS:
        settings += ["override_model_config=True", f"base_num_decoder_layers={config.layers}"]
    recipe = Path(str(maxtext.__file__)).parent / "configs/post_train/dpo.yml"
    dpo = {
        "algo": "dpo", "orpo_lambda": 0.1, "dpo_label_smoothing": 0.0, "dpo_beta": 0.1,
        "max_prompt_length": config.prompt,
    }  # fmt: skip
    theirs = pyconfig.initialize_pydantic(["train_dpo", str(recipe), *settings], dpo=dpo)
    mesh = train_compile.get_topology_mesh(theirs)
    _, model = model_creation_utils.create_nnx_abstract_model(theirs, mesh)
    with mesh:
        model = TunixMaxTextAdapter(base_model=model, pad_id=0)
    model.config = None
    schedule = maxtext_utils.create_learning_rate_schedule(theirs)
    optimizer = optax.chain(
        optax.clip_by_global_norm(max_norm=theirs.gradient_clipping_threshold),
        optimizers.get_optimizer(theirs, schedule, model),
    )
    # The trainer makes its optimizer's state at once: of shapes here.
    concrete = nnx.Optimizer
    peft_trainer.nnx.Optimizer = lambda model, tx, wrt: nnx.eval_shape(
        lambda: concrete(model, tx, wrt=wrt)
    )
    try:
        tunix = train_dpo.get_tunix_config(theirs)
        tunix.metrics_logging_options = None
        tunix.checkpoint_root_directory = None
        trainer = train_dpo.DPOTrainer(
            model=model, ref_model=nnx.clone(model), optimizer=optimizer, training_config=tunix,
            tokenizer=None,
        )  # fmt: skip
    finally:
        peft_trainer.nnx.Optimizer = concrete
    trainer.optimizer = _placed(trainer.optimizer, model, mesh)
    return mesh, theirs.logical_axis_rules, trainer


def _placed(optimizer: Any, model: Any, mesh: jax.sharding.Mesh) -> Any:
    """Every moment where its parameter is, as ``zeros_like`` puts it; the rest on all chips."""
    from flax import nnx

    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    at = {
        tuple(str(getattr(k, "key", k)) for k in path): leaf.sharding
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    everywhere = jax.NamedSharding(mesh, jax.P())
    graph, state = nnx.split(optimizer)

    def place(path: Any, leaf: Any) -> Any:
        if not hasattr(leaf, "shape"):
            return leaf
        names = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]
        while names[-1] in ("value", "raw_value"):  # Of nnx, where it is the last.
            names.pop()
        tails = (tuple(names[start:]) for start in range(len(names)))
        sharding = next((at[tail] for tail in tails if tail in at), everywhere)
        if leaf.ndim and sharding is everywhere:
            raise ValueError(f"no sharding for {names} of shape {leaf.shape}")
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(place, state))


def _batch(config: Config, mesh: jax.sharding.Mesh, trainer: Any) -> Any:
    """What ``DPOTrainer._prepare_inputs`` makes of a batch, its rows over all chips."""
    widths = {"prompt": config.prompt, "chosen": config.response, "rejected": config.response}
    given = {
        f"{kind}_{part}": jax.ShapeDtypeStruct((config.pairs, width), jnp.int32)
        for kind, width in widths.items()
        for part in ("ids", "mask")
    }
    # With a reference it would be run here, not traced.
    exists, trainer._ref_model_exists = trainer._ref_model_exists, False
    made = jax.eval_shape(trainer._prepare_inputs, given)
    trainer._ref_model_exists = exists
    scores = jax.ShapeDtypeStruct((config.pairs,), jnp.float32)
    made = made.replace(ref_chosen_logps=scores, ref_rejected_logps=scores)
    rows = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), made)


def _lower(config: Config, mesh: Any, rules: Any, trainer: Any, batch: Any) -> Any:
    from flax.core.spmd import logical_axis_rules
    from tunix.sft.dpo import dpo_trainer

    with jax.set_mesh(mesh), logical_axis_rules(rules):
        if config.program == "train":
            step, _ = trainer.jit_train_and_eval_step()
            return step.func.lower(trainer.model, trainer.optimizer, batch)
        return dpo_trainer.compute_logps.lower(
            trainer.ref_model, batch.input_ids, batch.positions, batch.attention_mask,
            batch.logits_to_keep, batch.completion_mask, images=None,
        )  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
