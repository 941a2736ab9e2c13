"""The training programs: ``klrlhf dpo``, ``klrlhf sft``, ``klrlhf reward``."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from jax_klrlhf import models, placement
from jax_klrlhf.data import check
from jax_klrlhf.data.prepare import Prepared
from jax_klrlhf.errors import InputError
from jax_klrlhf.models import lora, partition, pretrained
from jax_klrlhf.models import reward as rewards
from jax_klrlhf.models.config import ModelConfig
from jax_klrlhf.programs import adapters, batches
from jax_klrlhf.programs import config as configs
from jax_klrlhf.programs import run as runs
from jax_klrlhf.programs.config import DpoConfig, RewardConfig, SftConfig
from jax_klrlhf.programs.fit import fit
from jax_klrlhf.programs.losses import objective
from jax_klrlhf.programs.splits import Splits, open_data
from jax_klrlhf.training import evaluate as evaluation
from jax_klrlhf.training import reference, state, tasks
from jax_klrlhf.training.state import TrainState


@runs.alone
def dpo(config: DpoConfig, *, console: Console | None = None) -> TrainState:
    """Train a policy on preferences against the model it starts from.

    Leaves the policy in ``output/model``; with LoRA the adapter in ``output/adapter`` too.

    Raises:
        InputError: naming what is wrong with configuration, model or data.
        loop.Stopped: where the run was stopped, with the reason.
    """
    configs.check(config)
    loss, needs_reference = objective(
        config.objective, kl_coef=config.kl_coef, options=config.options
    )
    if config.reference == "live" and not needs_reference:
        raise InputError(f"reference: {config.objective} reads no reference; leave it out.")
    run = runs.begin(config, "dpo", console)
    options = runs.optional(config, frozen=config.lora.rank > 0)
    loaded = models.load(config.model, mesh=run.mesh, **options)
    splits = open_data(run, loaded, needs=check.pairs)
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    model, params, adapter = adapters.attach(key, loaded, config.lora)
    pi0 = {"base": loaded.params, "lora": {}} if adapter else loaded.params

    source, tables = reference.free, [None, None]
    digest = state.digest(pi0)
    if needs_reference and config.reference == "live":
        source = reference.base(adapters.base) if adapter else reference.live
    elif needs_reference:
        source = reference.cached
        name = state.fingerprint_text(digest)
        for number, data in enumerate((splits.train, splits.held_out)):
            if data is not None:
                tables[number] = _reference_table(run, model, pi0, data, name)
    task = tasks.preference(
        model, loss, reference=source, report_coef=config.kl_coef, chunk=runs.chunk(run, model)
    )

    more = None
    live = config.reference == "live" and not adapter and needs_reference
    if config.kl_prompts and splits.held_out is not None:
        kept = None if live or adapter else reference.on_host(pi0, run.compute_dtype)
        stop = models.stop_tokens(splits.encoder.tokenizer, loaded.generation)
        more = _divergence(run, model, splits, stop, kept=kept, adapted=bool(adapter))
    whole, generation = loaded.config, loaded.generation
    del loaded, pi0
    final = fit(
        run,
        task,
        params,
        splits,
        batches.pairs,
        tables=tables,
        trainable=adapters.is_adapter if adapter else None,
        live=live,
        # With the live reference the state takes it from the reference itself.
        fingerprint=None if live else digest,
        more=more,
    )
    _save(run, whole, final.policy, splits, adapter, generation)
    return final


@runs.alone
def sft(config: SftConfig, *, console: Console | None = None) -> TrainState:
    """Train a model on the first response of each row by maximum likelihood.

    Leaves the model in ``output/model``; with LoRA the adapter in ``output/adapter`` too.

    Raises:
        InputError: naming what is wrong with configuration, model or data.
        loop.Stopped: where the run was stopped, with the reason.
    """
    run = runs.begin(config, "sft", console)
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    if config.weights == "random":
        loaded = _random(key, config, run)
    else:
        options = runs.optional(config, frozen=config.lora.rank > 0)
        loaded = models.load(config.model, mesh=run.mesh, **options)
    splits = open_data(run, loaded, needs=check.responses)
    model, params, adapter = adapters.attach(key, loaded, config.lora)
    task = tasks.likelihood(model, chunk=runs.chunk(run, model))
    whole, generation = loaded.config, loaded.generation
    del loaded
    final = fit(
        run,
        task,
        params,
        splits,
        batches.firsts,
        picked=batches.best,
        trainable=adapters.is_adapter if adapter else None,
    )
    _save(run, whole, final.policy, splits, adapter, generation)
    return final


@runs.alone
def reward(config: RewardConfig, *, console: Console | None = None) -> TrainState:
    """Train a Bradley-Terry reward model on preferences.

    Leaves it in ``output/model``, as a sequence classifier with one label.

    Raises:
        InputError: naming what is wrong with configuration, model or data.
        loop.Stopped: where the run was stopped, with the reason.
    """
    run = runs.begin(config, "reward", console)
    loaded = models.load(config.model, mesh=run.mesh, **runs.optional(config))
    splits = open_data(run, loaded, needs=check.pairs)
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    params = rewards.RewardParams(
        loaded.params, rewards.init_head(key, dim=loaded.config.hidden_size)
    )
    task = tasks.bradley_terry_reward(
        partial(rewards.reward, loaded.model),
        margin_coef=config.margin_coef,
        centring=config.centring,
    )
    whole = loaded.config
    del loaded
    final = fit(run, task, params, splits, batches.pairs)
    rewards.save(run.folder / "model", whole, final.policy, splits.encoder.tokenizer)
    runs.close(run, "model")
    return final


def _random(key: Any, config: SftConfig, run: runs.Run) -> models.Loaded:
    """A model of a folder's config.json with random weights."""
    folder = pretrained.find(config.model)
    where = folder / "config.json"
    facts = ModelConfig.from_hf(
        pretrained.read_json(where), where=str(where), **runs.optional(config)
    )
    model = models.language_model(facts)
    if run.mesh is None:
        params = jax.jit(model.init)(key)
    else:
        shapes = jax.eval_shape(model.init, key)
        placed = partition.shardings(shapes, run.mesh)
        params = jax.jit(model.init, out_shardings=placed)(key)
    generation = pretrained.generation_settings(folder, pretrained.read_json(where))
    return models.Loaded(model, params, pretrained.load_tokenizer(folder), facts, generation)


def _reference_table(run: runs.Run, model: Any, pi0: Any, data: Prepared, name: str) -> Any:
    """pi0's log-probabilities of a split: from the cache on disk, or computed and put there."""
    config: DpoConfig = run.config
    path = config.reference_cache or run.folder / "reference.safetensors"
    path = path.with_name(f"{path.stem}-{data.split}{path.suffix}")
    recipe = data.manifest["recipe"]
    identity = reference.Identity(
        model=f"{name}-{config.dtype}",
        data=data.fingerprint,
        tokenizer=recipe["tokenizer"],
        lengths=f"{recipe['max_prompt_length']}+{recipe['max_response_length']}",
    )
    if placement.agreed(path.exists()):
        shape = jax.ShapeDtypeStruct((len(data), data.responses), jnp.float32)
        return placement.shared(lambda: reference.load_cache(path, identity), shape)
    run.console.print(f"reference log-probabilities of {len(data)} rows ({data.split})")
    table = reference.tabulate(
        model,
        pi0,
        batches.whole_epoch(batches.loader(run, data, seed=None)),
        rows=len(data),
        responses=data.responses,
        compute_dtype=run.compute_dtype,
        chunk=runs.chunk(run, model),
        mesh=run.mesh,
    )
    placement.lead(lambda: reference.save_cache(path, table, identity))
    return table


def _divergence(
    run: runs.Run,
    model: Any,
    splits: Splits,
    stop: tuple[int, ...],
    *,
    kept: Callable[[], Any] | None,
    adapted: bool,
) -> Callable[[TrainState], Any]:
    """KL(policy || reference) on held-out prompts, by sampling from the policy.

    ``kept()`` brings the reference's parameters, where the state does not hold them.
    """
    config: DpoConfig = run.config
    assert splits.held_out is not None
    loaded = batches.loader(run, splits.held_out, seed=None)
    prompts = batches.first_prompts(loaded, config.kl_prompts)
    room = model.max_length - prompts.longest
    tokens = min(config.max_response_length, room)
    if tokens < 1:
        raise InputError(
            f"max_prompt_length {config.max_prompt_length}: prompts fill the model's context of "
            f"{model.max_length}, so nothing can be sampled; cut them, or set kl_prompts to 0."
        )
    measure = evaluation.make_divergence(
        model,
        samples=config.kl_samples,
        max_new_tokens=tokens,
        stop=stop,
        mesh=run.mesh,
        compute_dtype=run.compute_dtype,
        chunk=runs.chunk(run, model),
    )

    def more(carried: TrainState) -> Any:
        pi0 = carried.ref_params
        if adapted:
            pi0 = adapters.base(carried.policy)
        elif kept is not None:
            # With the reference cached its parameters are on no device; they come for this.
            pi0 = kept()
        key = jax.random.fold_in(carried.key, carried.step)
        return measure(key, carried.policy, pi0, prompts.batches, prompts.where)

    return more


def _save(
    run: runs.Run,
    whole: ModelConfig,
    params: Any,
    splits: Splits,
    adapter: lora.Lora | None,
    generation: Mapping[str, Any] | None,
) -> None:
    left = adapters.save(
        run.folder,
        whole,
        params,
        splits.encoder.tokenizer,
        adapter,
        base=run.config.model,
        merged=run.config.lora.merged,
        generation=generation,
    )
    runs.close(run, left)
