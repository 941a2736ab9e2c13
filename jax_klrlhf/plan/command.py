"""``klrlhf plan``: will it fit, and how fast could it be, before a TPU is rented."""

import re
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jax_klrlhf import defaults
from jax_klrlhf.errors import InputError
from jax_klrlhf.models.config import ModelConfig
from jax_klrlhf.models.lora import Lora
from jax_klrlhf.plan import candidates, report
from jax_klrlhf.plan.chips import Slice, devices, read_topology
from jax_klrlhf.plan.presets import PRESETS, read_model
from jax_klrlhf.plan.program import Program, Shapes, sampler, sampling_mesh, train_step
from jax_klrlhf.programs import options as declared
from jax_klrlhf.programs.plan_config import PlanConfig
from jax_klrlhf.results import write_results
from jax_klrlhf.training import mesh as meshes
from jax_klrlhf.training import optimizers


def main(config: PlanConfig) -> list[report.Plan]:
    """Compile, print and return the plans.

    Raises:
        InputError: for a model, topology or mesh that there is not, and without libtpu; after all
            plans are printed and written, where a program does not fit.
    """
    declared.check(config)
    settings = read_model(config.model)
    topology = read_topology(config.topology)
    mesh = read_mesh(config.mesh, topology)
    model = ModelConfig.from_hf(
        settings,
        where=config.model,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.float32,
        remat=config.remat,
        kv=config.sampling_kv,
        prefill_chunk=config.sampling_prefill_chunk,
        platform="cpu" if topology.chip is None else "tpu",
    )
    if config.prompt + config.response > model.max_length:
        raise InputError(
            f"{config.model}: --prompt {config.prompt} and --response {config.response} exceed "
            f"its context of {model.max_length} tokens"
        )
    if config.search:
        return _search(config, model, topology)
    plans = []
    for program in _programs(config, model, mesh, topology):
        plan = report.compile_program(program, topology)
        print(report.table(plan), flush=True)
        plans.append(plan)
    if config.output is not None:
        path = write_results(
            config.output,
            name="plan",
            config=config,
            seeds=[],
            seconds=sum(plan.seconds for plan in plans),
            metrics={key: value for plan in plans for key, value in report.metrics(plan).items()},
        )
        for plan in plans:
            if plan.refusal is not None:
                continue  # There is no compiled program.
            name = plan.program.name.replace(" ", "_")
            (path.parent / f"{name}.hlo.txt").write_text(plan.text)
    refused = [plan.program.name for plan in plans if plan.refusal is not None]
    if refused:
        raise InputError(
            f"{' and '.join(refused)} on {topology.name}: does not fit. {advice(config, mesh)}"
        )
    return plans


def _search(config: PlanConfig, model: ModelConfig, topology: Slice) -> list[report.Plan]:
    """Compile the candidates, say each as it is done, and print the table."""
    tried: list[tuple[str, PlanConfig]] = []
    if config.program != "sample":
        rows = config.pairs // config.micro_batches
        for mesh in config.search_meshes or candidates.meshes(topology, rows=rows):
            for remat in config.search_remat:
                options = f"--mesh {mesh} --remat {remat}"
                one = replace(config, program="train", mesh=mesh, remat=remat)
                tried.append((options, one))
    if config.program != "train":
        for tensor in config.search_tensors or candidates.tensors(topology, rows=config.pairs):
            one = replace(config, program="sample", sampling_tensor=tensor)
            tried.append((f"--sampling-tensor {tensor}", one))
    if not tried:
        raise InputError(
            f"--search: {config.pairs} pairs divide over no mesh of {topology.name}; give "
            "--search-meshes, or other --pairs"
        )
    found = []
    laid = read_mesh(config.mesh, topology)
    for options, one in tried:
        kept = model if one.remat is None else replace(model, remat=one.remat)
        laid = read_mesh(one.mesh, topology)
        for program in _programs(one, kept, laid, topology):
            plan = report.compile_program(program, topology)
            said = f"{program.name} {options}: {report.verdict(plan)}"
            print(f"{said}; {plan.seconds:.0f} s", flush=True)
            found.append(candidates.Candidate(options, plan))
    print(candidates.table(found), flush=True)
    ordered = candidates.ranked(found)
    if config.output is not None:
        write_results(
            config.output,
            name="plan search",
            config=config,
            seeds=[],
            seconds=sum(one.plan.seconds for one in found),
            metrics={
                f"{key}/{one.options.replace('/', ':')}": value
                for one in ordered
                for key, value in report.metrics(one.plan).items()
            },
        )
    if all(one.plan.refusal is not None for one in found):
        raise InputError(f"no candidate fits on {topology.name}. {advice(config, laid)}")
    return [one.plan for one in ordered]


def advice(config: PlanConfig, mesh: jax.sharding.Mesh) -> str:
    """What would need less memory, of what this configuration does not do yet."""
    found = []
    if config.program != "sample":
        rows = config.pairs // (meshes.rows(mesh) * config.micro_batches)
        if config.remat != "full":
            found.append("--remat full")
        if rows > 1:
            found.append(f"--micro-batches up to {config.micro_batches * rows}")
        if config.lora is None:
            found.append("--lora 16")
            if config.optimizer == "adamw":
                if config.moments == "float32":
                    found.append("--moments bfloat16")
                found.append("--optimizer adafactor")
        if config.reference == "live" and config.lora is None:
            found.append("--reference cached")
    if mesh.shape["data"] > 1:
        found.append("more fsdp or tensor in place of data in --mesh")
    if config.program != "train":
        found.append("fewer --samples or --pairs")
        for option in ("sampling_weights", "sampling_kv"):
            if getattr(config, option) == "float":
                found.append(f"--{option.replace('_', '-')} int8")
    return f"Try {', '.join(found)}, shorter --prompt and --response, or more chips."


def read_mesh(text: str, topology: Slice) -> jax.sharding.Mesh:
    """The mesh ``fsdp=16,tensor=4`` on the devices of a topology.

    Raises:
        InputError: for an axis that there is not, or sizes that do not fit the topology.
    """
    sizes: dict[str, Any] = {"fsdp": 1} if text.strip() else {}
    for part in re.split(r"[,\s]+", text.strip()) if sizes else []:
        found = re.fullmatch(r"(data|fsdp|tensor)=(-?\d+)", part)
        if found is None:
            raise InputError(
                f"mesh {text!r}: {part!r} is not of the form axis=size with an axis of data, "
                "fsdp, tensor; such as fsdp=16,tensor=4"
            )
        sizes[found.group(1)] = int(found.group(2))
    found = devices(topology)
    try:
        return meshes.make(**sizes, devices=found)
    except ValueError as error:
        raise InputError(f"topology {topology.name}: {error}") from None


def _programs(
    config: PlanConfig, model: ModelConfig, mesh: jax.sharding.Mesh, topology: Slice
) -> list[Program]:
    parts = meshes.rows(mesh)
    if config.pairs % (parts * config.micro_batches):
        raise InputError(
            f"--pairs {config.pairs} does not divide into {config.micro_batches} micro-batches on "
            f"{parts} parts of the mesh; make it a multiple of {parts * config.micro_batches}"
        )
    shapes = Shapes(
        prompts=config.pairs, responses=2, prompt=config.prompt, response=config.response
    )
    found = []
    if config.program in ("train", "both"):
        adamw = partial(optimizers.adamw, mu_dtype=jnp.dtype(config.moments))
        optimizer = {"adamw": adamw, "adafactor": optimizers.adafactor}
        frozen = config.frozen_dtype
        if frozen is None:
            frozen = "float32" if config.lora is None else defaults.base_dtype(config.dtype)
        found.append(
            train_step(
                model,
                mesh,
                shapes,
                optimizer[config.optimizer](1e-6),
                compute_dtype=jnp.dtype(config.dtype),
                chunk=config.chunk or defaults.chunk(model.vocab_size, parts=parts),
                micro_batches=config.micro_batches,
                live_reference=config.reference == "live",
                adapter=None if config.lora is None else Lora(rank=config.lora),
                frozen_dtype=jnp.dtype(frozen),
            )
        )
    if config.program in ("sample", "both"):
        eight = config.sampling_weights == "int8"
        on = sampling_mesh(model, mesh, topology, tensor=config.sampling_tensor, eight=eight)
        found.append(sampler(model, on, replace(shapes, responses=config.samples), eight=eight))
    return found


__all__ = ["PRESETS", "PlanConfig", "main", "read_mesh"]
