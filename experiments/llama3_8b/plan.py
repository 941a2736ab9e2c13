"""Every phase of ``iterate.yaml``, compiled for a TPU slice that nobody has rented.

    python -m experiments.llama3_8b.plan [--topology v5e:8x8] [--phases train score]

The phases are a training step, the weights' way to the sampler's mesh (*move*), sampling, the
reward model on the responses (*score*), and the reference's log-probabilities of the pairs
(*reference*). Needs libtpu, and no TPU. Each takes two
to five minutes of a processor.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro

from jax_klrlhf import defaults
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.errors import reported
from jax_klrlhf.models import partition, scoring
from jax_klrlhf.models import reward as rewards
from jax_klrlhf.models.config import ModelConfig
from jax_klrlhf.models.transformer import language_model
from jax_klrlhf.plan import report
from jax_klrlhf.plan.chips import devices, read_topology
from jax_klrlhf.plan.command import read_mesh
from jax_klrlhf.plan.presets import read_model
from jax_klrlhf.plan.program import (
    Program,
    Shapes,
    forward_flops,
    move,
    parameters,
    sampler,
    sampling_mesh,
    train_step,
)
from jax_klrlhf.programs.config import read
from jax_klrlhf.programs.iterate_config import IterateConfig
from jax_klrlhf.results import write_results
from jax_klrlhf.training import mesh as meshes
from jax_klrlhf.training import optimizers
from jax_klrlhf.training.state import cast_floating

Phase = Literal["train", "move", "sample", "score", "reference"]
CONFIG = Path(__file__).with_name("iterate.yaml")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What to compile."""

    config: Path = CONFIG
    """Configuration of the run, whose sizes are planned."""
    model: str = "llama-3-8b"
    """Shapes: a preset of klrlhf plan, or a folder with config.json."""
    topology: str = "v5e:8x8"
    mesh: str = ""
    """In place of the configuration's mesh: fsdp=16,tensor=4."""
    sampling_tensor: int | None = None
    """In place of the configuration's."""
    sampling_weights: Literal["float", "int8"] | None = None
    """In place of the configuration's."""
    sampling_kv: Literal["float", "int8"] | None = None
    """In place of the configuration's."""
    phases: tuple[Phase, ...] = ("train", "move", "sample", "score", "reference")
    rows: int | None = None
    """In place of the configuration's rows."""
    micro_batches: int | None = None
    """In place of the configuration's fit.micro_batches."""
    output: Path = Path("results/llama3_8b")


def main(config: Config) -> list[report.Plan]:
    """Compile, print and write each phase's plan."""
    run = read(config.config, IterateConfig, command="iterate")
    run = dataclasses.replace(
        run,
        rows=config.rows or run.rows,
        sampling_weights=config.sampling_weights or run.sampling_weights,
        sampling_kv=config.sampling_kv or run.sampling_kv,
        fit=dataclasses.replace(
            run.fit, micro_batches=config.micro_batches or run.fit.micro_batches
        ),
    )
    topology = read_topology(config.topology)
    if config.mesh:
        mesh = read_mesh(config.mesh, topology)
    else:
        mesh = meshes.make(**dataclasses.asdict(run.mesh), devices=devices(topology))
    facts = ModelConfig.from_hf(
        read_model(config.model),
        where=config.model,
        dtype=jnp.dtype(run.dtype),
        param_dtype=jnp.float32,
        remat=run.remat,
        kv=run.sampling_kv,
        platform="cpu" if topology.chip is None else "tpu",
    )
    tensor = run.sampling_tensor if config.sampling_tensor is None else config.sampling_tensor
    eight = run.sampling_weights == "int8"
    on = sampling_mesh(facts, mesh, topology, tensor=tensor, eight=eight)
    plans = []
    for phase in config.phases:
        plan = report.compile_program(_program(phase, run, facts, mesh, on), topology)
        print(report.table(plan), flush=True)
        plans.append(plan)
        write_results(
            config.output,
            name="llama3_8b plan",
            config=config,
            seeds=[],
            seconds=sum(plan.seconds for plan in plans),
            metrics={key: value for plan in plans for key, value in report.metrics(plan).items()},
        )
    return plans


def _program(phase: Phase, run: IterateConfig, facts: ModelConfig, mesh: Any, on: Any) -> Program:
    sizes = partial(Shapes, prompt=run.max_prompt_length, response=run.max_response_length)
    if phase == "train":
        return train_step(
            facts,
            mesh,
            sizes(prompts=run.fit.batch_size, responses=2),
            optimizers.adamw(
                run.fit.learning_rate, clip=run.fit.clip, mu_dtype=jnp.dtype(run.fit.moments)
            ),
            compute_dtype=facts.dtype,
            chunk=defaults.chunk(facts.vocab_size, parts=meshes.rows(mesh)),
            micro_batches=run.fit.micro_batches,
        )
    if phase == "move":
        return move(facts, mesh, on, eight=run.sampling_weights == "int8")
    if phase == "sample":
        shapes = sizes(prompts=run.rows, responses=run.samples)
        return sampler(facts, on, shapes, eight=run.sampling_weights == "int8")
    model = language_model(facts)
    policy = parameters(model)
    if phase == "reference":

        def log_prob(params: Any, prompts: Ragged, responses: Ragged) -> jax.Array:
            return scoring.log_prob(model, cast_floating(params, facts.dtype), prompts, responses)

        shapes = sizes(prompts=run.rows, responses=2)
        return _forward("reference", log_prob, policy, facts, mesh, shapes)
    # As the hub has it: 16 bits, and no vocabulary projection.
    bare = dataclasses.replace(facts, tied=True, param_dtype=facts.dtype, remat=None)
    judge = language_model(bare)
    head: Any = jax.ShapeDtypeStruct((facts.hidden_size,), facts.dtype)
    return _forward(
        "score",
        partial(rewards.reward, judge),
        rewards.RewardParams(parameters(judge), head),
        bare,
        mesh,
        sizes(prompts=run.rows, responses=run.samples),
    )


def _forward(
    name: str,
    function: Callable[..., Any],
    params: Any,
    facts: ModelConfig,
    mesh: Any,
    shapes: Shapes,
) -> Program:
    """A pass over rows that lie on the mesh; what comes out is whole on every host."""
    rows = meshes.batch_sharding(mesh)

    def laid(shape: tuple[int, ...]) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)

    count, responses = shapes.prompts, (shapes.prompts, shapes.responses)
    batch = (
        Ragged(laid((count, shapes.prompt)), laid((count,))),
        Ragged(laid((*responses, shapes.response)), laid(responses)),
    )
    bare = params
    params = jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
        params,
        partition.shardings(params, mesh),
    )
    compiled = jax.jit(function, out_shardings=jax.NamedSharding(mesh, jax.P()))

    def lower() -> Any:
        # As in `plan.program`: attention kernels keep arrays, which must lie on this machine.
        jax.eval_shape(function, bare, *batch)
        with jax.set_mesh(mesh):
            return compiled.lower(params, *batch)

    trunk = params.model if isinstance(params, rewards.RewardParams) else params
    flops = forward_flops(facts, trunk, shapes)
    # A reward model has no vocabulary projection.
    words = shapes.prompts * shapes.responses * shapes.response
    projection = 2.0 * facts.vocab_size * facts.hidden_size * words
    kernels = [x for path, x in jax.tree_util.tree_leaves_with_path(trunk)
               if partition.path_name(path).endswith("/kernel")]  # fmt: skip
    return Program(
        name=name,
        lower=lower,
        arguments={"parameters": params, "batch": batch},
        useful_flops=sum(flops) - (projection if isinstance(params, rewards.RewardParams) else 0.0),
        attention_flops=flops.attention,
        layers=facts.layers,
        vocabulary=facts.vocab_size * facts.hidden_size,
        stack=min(leaf.size for leaf in kernels),
    )


if __name__ == "__main__":
    with reported():
        main(tyro.cli(Config, description=__doc__))
