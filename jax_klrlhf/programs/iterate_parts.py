"""From the configuration of ``klrlhf iterate`` to the values that :func:`rounds.iterate` is handed.

Axes: ``B`` prompts, ``K`` responses, ``C`` response positions, ``D`` features.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Key
from rich.console import Console

from jax_klrlhf import models, placement
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.data import tokenize
from jax_klrlhf.errors import InputError
from jax_klrlhf.models import heads, lora, partition, pretrained, quantized
from jax_klrlhf.models import reward as rewards
from jax_klrlhf.models.reward import RewardParams
from jax_klrlhf.programs import adapters
from jax_klrlhf.programs.gold import CLASSES, fit_sentiment
from jax_klrlhf.programs.iterate_config import FitConfig, IterateConfig
from jax_klrlhf.programs.losses import load_function
from jax_klrlhf.training import health, optimizers, rounds
from jax_klrlhf.training import mesh as meshes
from jax_klrlhf.training.rounds import oracle, settings
from jax_klrlhf.training.rounds.compute import mapped
from jax_klrlhf.training.rounds.features import Features
from jax_klrlhf.training.rounds.parts import (
    Comparisons,
    DataRule,
    Improve,
    Improved,
    Judge,
    Oracle,
    Reward,
    Sampler,
    Situation,
    ragged,
)
from jax_klrlhf.training.state import cast_floating


@dataclass(frozen=True, kw_only=True)
class Place:
    """What all parts of a run need."""

    config: IterateConfig
    loaded: models.Loaded
    """pi0 as it was loaded, which beliefs are made of."""
    policy: models.Loaded
    """pi0 as it is trained: with ``adapter`` low-rank updates beside its parameters."""
    adapter: lora.Lora | None
    encoder: tokenize.Encoder
    stop: tuple[int, ...]
    """Ids that end a response."""
    mesh: Mesh | None
    console: Console

    @property
    def compute_dtype(self) -> Any:
        """What parameters are cast to, or None."""
        return jnp.bfloat16 if self.config.dtype == "bfloat16" else None

    @property
    def weights(self) -> Any:
        """What becomes of parameters that are sampled with, or None."""
        return quantized.weights if self.config.sampling_weights == "int8" else None

    @property
    def sampling(self) -> Mesh | None:
        """The mesh that prompts are answered on."""
        cast = self.weights or cast_floating
        params = jax.eval_shape(lambda x: cast(x, self.compute_dtype), self.policy.params)
        return meshes.for_sampling(
            self.mesh,
            params,
            tensor=self.config.sampling_tensor,
            memory=placement.memory(self.mesh),
        )

    def draw(
        self, samples: int, *, temperature: float | None = None, plain: bool = False
    ) -> rounds.Draw:
        """``samples`` responses to each prompt, as the configuration says; ``plain``: of the
        policy itself, at temperature 1 and without cuts."""
        config = self.config
        return rounds.Draw(
            model=self.policy.model,
            samples=samples,
            max_new_tokens=config.max_response_length,
            stop=self.stop,
            temperature=1.0 if plain else temperature or config.temperature,
            top_k=None if plain else config.top_k,
            top_p=None if plain else config.top_p,
            rows=config.rows,
            continuous=config.continuous,
            mesh=self.sampling,
            compute_dtype=self.compute_dtype,
            weights=self.weights,
        )

    def policy_fitting(self) -> rounds.Fitting:
        """How policies are fitted."""
        found = self.fitting(self.config.fit, self.policy.params)
        if self.adapter is None:
            return found
        return dataclasses.replace(found, trainable=adapters.is_adapter)

    def fitting(self, fit: FitConfig, params: Any) -> rounds.Fitting:
        """How ``params`` are fitted."""
        return rounds.Fitting(
            optimizer=_optimizer(fit),
            steps=fit.steps,
            batch_size=fit.batch_size,
            micro_batches=fit.micro_batches,
            compute_dtype=self.compute_dtype,
            mesh=self.mesh,
            shardings=None if self.mesh is None else partition.shardings(params, self.mesh),
            save_every=fit.save_every,
            limits=health.Limits(skipped=fit.max_skipped),
            log_every=fit.log_every,
            console=self.console,
        )

    def strength(self) -> dict[str, Any]:
        """What methods on the KL-regularized objective have in common."""
        return {"kl_coef": self.config.kl_coef, "fitting": self.policy_fitting()}

    def reward_models(self, belief: Any, keys: Sequence[Key[Array, ""]]) -> list[Reward]:
        """Reward models on pi0's trunk with random heads, which share their programs."""
        dim = self.loaded.config.hidden_size
        starts = [self._on_trunk(rewards.init_head(key, dim=dim)) for key in keys]
        given = self._belief_fitting(belief, starts[0])
        return [rounds.reward_model(self.loaded.model, start, **given) for start in starts]

    def heads(self, belief: Any, key: Key[Array, ""], combine: rounds.Combine) -> Reward:
        """Random heads on one trunk of pi0's."""
        dim = self.loaded.config.hidden_size
        start = self._on_trunk(heads.init(key, members=belief.members, dim=dim))
        given = self._belief_fitting(belief, start)
        return rounds.heads(self.loaded.model, start, combine=combine, **given)

    def _on_trunk(self, head: Any) -> RewardParams:
        if self.mesh is not None:
            head = jax.device_put(np.asarray(head), jax.NamedSharding(self.mesh, jax.P()))
        return RewardParams(self.loaded.params, head)

    def _belief_fitting(self, belief: Any, params: RewardParams) -> dict[str, Any]:
        """How a reward model is fitted, and how it pools."""
        ours = self.config.fit
        fit = FitConfig(
            steps=belief.steps,
            learning_rate=belief.learning_rate,
            batch_size=ours.batch_size,
            micro_batches=ours.micro_batches,
            log_every=ours.log_every,
        )
        pooling = rewards.mean if belief.pooling == "mean" else rewards.last
        fitting = self.fitting(fit, params)
        return {"fitting": fitting, "pooling": pooling, "rows": self.config.rows}

    def features(self, key: Key[Array, ""], prompts: Ragged, pool: Any) -> Features:
        """pi0's pooled hidden states, centred at the mean and scaled by the largest norm of those
        of its own responses; what lies outside of the unit ball is drawn back to it."""
        loaded = self.loaded
        pooling = rewards.last if pool == "last" else rewards.mean

        def pooled(params: Any, prompts: Ragged, responses: Ragged) -> Array:
            return rewards.features(loaded.model, params, prompts, responses, pooling=pooling)

        program = mapped(pooled, rows=self.config.rows, mesh=self.mesh)
        some = ragged(prompts.ids[:256], prompts.lengths[:256])
        drawn = self.draw(2)(key, self.policy.params, some)
        seen = np.asarray(program(loaded.params, some, drawn), np.float64)
        centre = seen.mean((0, 1))
        scale = float(np.linalg.norm(seen - centre, axis=-1).max()) or 1.0

        def features(prompts: Ragged, responses: Ragged) -> np.ndarray:
            found = (program(loaded.params, prompts, responses) - centre) / scale
            norm = np.linalg.norm(found, axis=-1, keepdims=True)
            return (found / np.maximum(norm, 1)).astype(np.float32)

        return features

    def model_judge(self, path: str) -> Judge:
        """A trained reward model, which reads the policy's ids or their text."""
        folder = pretrained.find(Path(path).expanduser() if Path(path).is_dir() else path)
        tokenizer, translate = pretrained.load_tokenizer(folder), None
        if tokenizer is not None:
            theirs = tokenize.encoder(tokenizer).continuation.get_vocab()
            # Tokens that it has besides (a pad token, say) do not change what it reads.
            if not self.encoder.continuation.get_vocab().items() <= theirs.items():
                translate = translation(self.encoder, tokenize.encoder(tokenizer))
        rows, mesh = self.config.rows, self.mesh
        return oracle.reward_model(folder, rows=rows, mesh=mesh, translate=translate)


def make_judge(place: Place) -> Judge | None:
    """The reward that the annotator has in mind; None where labels are recorded or people's.

    Raises:
        InputError: where --reward names neither a reward model nor two heaps of sentences.
    """
    config = place.config
    if config.recorded or config.human:
        return None
    scale = np.float32(config.annotator.scale)
    folder = Path(config.reward).expanduser()
    if ":" in config.reward and not folder.exists():
        own = load_function(config.reward, option="--reward")
        judge = oracle.prompted(own, place.encoder.decode)
    elif any((folder / f"{name}.txt").is_file() for name in CLASSES):
        judge = oracle.texts(fit_sentiment(folder), place.encoder.decode)
    elif folder.is_dir() and not (folder / "config.json").is_file():
        raise InputError(
            f"{folder}: neither a reward model (config.json) nor positive.txt and negative.txt."
        )
    else:
        judge = place.model_judge(config.reward)
    return lambda prompts, responses: scale * judge(prompts, responses)


def translation(ours: tokenize.Encoder, theirs: tokenize.Encoder) -> oracle.Translate:
    """From the ids of one tokenizer to another's, by the text; an end stays an end, a response that
    was cut off stays without one."""

    def translate(prompt: Sequence[int], response: Sequence[int]) -> tuple[list[int], list[int]]:
        answer = theirs.response(ours.decode(response))
        if not response or response[-1] != ours.end:
            answer = answer[:-1]
        return theirs.prompt(ours.decode(prompt)), answer

    return translate


def make_oracle(place: Place, judge: Judge | None, data: Comparisons | None) -> Oracle:
    """Who labels."""
    config = place.config
    if config.human:
        folder = config.annotator.folder or config.output / "labels"

        def say(labelled: int, count: int) -> None:
            where = f": klrlhf label --output {folder}" if labelled < count else ""
            told = f"people have labelled {labelled} of {count} pairs{where}"
            place.console.print(told, markup=False, highlight=False, soft_wrap=True)

        return oracle.human(folder, place.encoder.decode, each=config.annotator.each, say=say)
    if judge is None:
        assert data is not None  # the configuration was checked
        return oracle.recorded(data)
    if config.annotator.labels == "expected":
        return oracle.expected(judge, noise=config.annotator.noise)
    return oracle.bradley_terry(judge, noise=config.annotator.noise, tie=config.annotator.tie)


def make_sampler(place: Place) -> Sampler:
    """Who answers."""
    config, second = place.config, place.config.pairs
    main = place.draw(config.samples)
    if second.other == "none":
        return rounds.main_agent(main)
    draw = place.draw(second.samples or config.samples, temperature=second.temperature)
    policy = {
        "pi0": rounds.base,
        "temperature": rounds.current,
        "earlier": rounds.earlier(second.back),
    }[second.other]
    return rounds.mixture(
        rounds.Agent(policy=rounds.current, draw=main), rounds.Agent(policy=policy, draw=draw)
    )


def preferred_first(improve: Improve) -> Improve:
    """``improve`` on pairs turned so that the first is the preferred one: the losses are the same,
    and the margins and accuracies that are reported are towards the label."""

    def turned(data: Comparisons) -> Comparisons:
        swap = data.label < 0.5
        ids, lengths = np.asarray(data.responses.ids), np.asarray(data.responses.lengths)
        return data._replace(
            responses=ragged(
                np.where(swap[:, None, None], ids[:, ::-1], ids),
                np.where(swap[:, None], lengths[:, ::-1], lengths),
            ),
            label=np.where(swap, 1 - data.label, data.label),
        )

    def sorted_first(key: Any, situation: Situation) -> Improved:
        data = situation.data
        sources = [turned(source) for source in data.sources]
        return improve(key, situation._replace(data=data._replace(sources=sources)))

    return sorted_first


def make_setting(config: IterateConfig) -> DataRule:
    """Which data a round learns from."""
    if config.setting == "offline":
        return settings.offline_only
    if config.setting == "online":
        return settings.history_only
    if config.setting == "newest":
        return settings.newest
    if config.offline_share is None:
        return settings.everything
    return settings.hybrid(config.offline_share, newest_share=config.newest_share)


def check_batches(place: Place) -> None:
    """Raises ``InputError`` where batches, or copies to sample from, do not divide over devices."""
    try:
        place.sampling  # noqa: B018
    except ValueError as error:
        raise InputError(f"--sampling-tensor: {error}") from None
    fit = place.config.fit
    parts = 1 if place.mesh is None else meshes.rows(place.mesh)
    if fit.batch_size % (parts * fit.micro_batches):
        raise InputError(
            f"--fit.batch-size {fit.batch_size} must be a multiple of {parts * fit.micro_batches}: "
            f"{fit.micro_batches} micro-batches on {parts} parts of the mesh."
        )


def _optimizer(fit: FitConfig) -> Any:
    decay = {"cosine": optimizers.cosine, "linear": optimizers.linear, "constant": None}
    rate = optimizers.schedule(
        fit.learning_rate,
        warmup=int(fit.warmup * fit.steps),
        steps=fit.steps,
        decay=decay[fit.schedule],
    )
    if fit.optimizer == "adafactor":
        return optimizers.adafactor(rate, clip=fit.clip)
    return optimizers.adamw(
        rate, clip=fit.clip, weight_decay=fit.weight_decay, mu_dtype=jnp.dtype(fit.moments)
    )
