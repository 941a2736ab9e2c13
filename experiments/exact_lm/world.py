"""A transformer whose every response can be listed: a language model that is also a bandit.

pi0 is trained by maximum likelihood on a Markov chain over a few tokens. The gold reward is linear
in the frozen hidden features of pi0's own network, so that the theory's assumption holds for a
real network. Policies are trained in float32; their laws are evaluated in float64.

Axes: ``B`` prompts, ``N`` all responses, ``D`` features.
"""

import dataclasses
import itertools
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models import ModelConfig, language_model
from jax_klrlhf.models import enumerate as enumerated
from jax_klrlhf.models.base import LanguageModel
from jax_klrlhf.models.batch import Batch
from jax_klrlhf.training import rounds, tasks
from jax_klrlhf.training.rounds import fitting
from jax_klrlhf.training.rounds.features import Features
from jax_klrlhf.training.rounds.parts import ragged

STOP = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of the world."""

    vocab: int = 6
    """Tokens, the stop token included."""
    length: int = 5
    """Longest response; with vocabulary 6 that makes 3906 responses."""
    prompts: int = 6
    hidden: int = 24
    layers: int = 2
    kl_coef: float = 0.5
    reward_std: float = 1.0
    """Standard deviation of the gold reward under pi0, at a prompt."""
    sft_steps: int = 400
    """Optimizer steps that make pi0."""


class World(NamedTuple):
    """pi0 and all there is to know of it."""

    config: Config
    model: LanguageModel
    params: Any
    """pi0's."""
    prompts: Ragged
    """ids ``[B, P]``, on the host."""
    every: Ragged
    """All responses, ids ``[N, C]``."""
    features: Features
    theta: Float[np.ndarray, " D"]
    phi: Float[np.ndarray, "B N D"]
    reward: Float[np.ndarray, "B N"]
    """Gold reward of every response, float64."""
    base: Float[np.ndarray, "B N"]
    """log pi0, float64."""

    def judge(self, prompts: Ragged, responses: Ragged) -> Float[np.ndarray, "B K"]:
        """Gold reward, as oracles ask for it."""
        return self.features(prompts, responses) @ self.theta.astype(np.float32)


class Exact(NamedTuple):
    """A policy's law and what it is worth, per prompt, in float64."""

    log_prob: Float[np.ndarray, "B N"]
    value: Float[np.ndarray, " B"]
    """J of the policy."""
    optimum: Float[np.ndarray, " B"]
    """J of pi*."""
    kl: Float[np.ndarray, " B"]
    """KL(pi || pi0)."""
    to_optimum: Float[np.ndarray, " B"]
    """KL(pi || pi*)."""
    variation: Float[np.ndarray, " B"]
    """Total variation between pi and pi*."""

    @property
    def gap(self) -> Float[np.ndarray, " B"]:
        """J(pi*) - J(pi)."""
        return self.optimum - self.value


def build(config: Config, *, seed: int = 0) -> World:
    """Train pi0, list its responses and choose the gold reward."""
    keys = iter(jax.random.split(jax.random.key(seed), 6))
    model = language_model(_shape(config, jnp.float32))
    rng = np.random.default_rng(seed)
    tokens = list(itertools.product(range(1, config.vocab), repeat=3))
    chosen = rng.choice(len(tokens), config.prompts, replace=False)
    prompts = ragged([tokens[i] for i in chosen], np.full(config.prompts, 3))
    chain = rng.dirichlet(np.full(config.vocab, 0.7), config.vocab)
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, config.sft_steps))
    fit = rounds.Fitting(optimizer=optimizer, steps=config.sft_steps, batch_size=64).compile(
        tasks.likelihood(model)
    )
    params = fit(next(keys), model.init(next(keys)), fitting.deal([_chains(config, chain, rng)]))
    params = params.params
    every = enumerated.responses(
        vocab_size=config.vocab, max_new_tokens=config.length, stop=(STOP,)
    )
    features = rounds.hidden_features(model, params, scale=config.hidden**0.5, rows=4)
    count = len(every.lengths)
    wide = ragged(
        np.broadcast_to(every.ids, (config.prompts, count, config.length)),
        np.broadcast_to(every.lengths, (config.prompts, count)),
    )
    phi = features(prompts, wide).astype(np.float64)
    theta = np.asarray(jax.random.normal(next(keys), (phi.shape[-1],)), np.float64)
    base = law(config, params, prompts, every)
    reward = phi @ theta
    prob = np.exp(base)
    mean = (prob * reward).sum(1, keepdims=True)
    theta = theta * config.reward_std / np.sqrt((prob * (reward - mean) ** 2).sum(1).mean())
    return World(config, model, params, prompts, every, features, theta, phi, phi @ theta, base)


def law(config: Config, params: Any, prompts: Ragged, every: Ragged) -> Float[np.ndarray, "B N"]:
    """log pi of every response, by the network in float64, whatever its parameters were stored in.

    The log-probabilities of float32 parameters are exact for those parameters.
    """
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), params)
        found = _law(_shape(config, jnp.float64), wide, prompts, ragged(*every))
        return np.asarray(found)


@partial(jax.jit, static_argnums=0)
def _law(shape: ModelConfig, params: Any, prompts: Ragged, every: Ragged) -> Any:
    return enumerated.log_prob(language_model(shape), params, prompts, every)


def evaluate(world: World, params: Any) -> Exact:
    """A policy's exact law and value."""
    return evaluate_law(world, law(world.config, params, world.prompts, world.every))


def evaluate_law(world: World, log_prob: Float[np.ndarray, "B N"]) -> Exact:
    """The value of a law over all responses.

    NumPy, and each side of the identity by its own definition: ``value`` and ``optimum`` never see
    the divergence from pi*.
    """
    eta = world.config.kl_coef
    prob, log_ratio = np.exp(log_prob), log_prob - world.base
    value = (prob * (world.reward - eta * log_ratio)).sum(1)
    star = optimum(world)
    best = np.exp(star)
    return Exact(
        log_prob=log_prob,
        value=value,
        optimum=(best * (world.reward - eta * (star - world.base))).sum(1),
        kl=(prob * log_ratio).sum(1),
        to_optimum=(prob * (log_prob - star)).sum(1),
        variation=np.abs(prob - best).sum(1) / 2,
    )


def optimum(world: World, *, kl_coef: float | None = None) -> Float[np.ndarray, "B N"]:
    """log pi*, the Gibbs policy of the gold reward, in float64 NumPy."""
    eta = world.config.kl_coef if kl_coef is None else kl_coef
    logits = world.base + world.reward / eta
    top = logits.max(1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(1, keepdims=True))


def _shape(config: Config, dtype: Any) -> ModelConfig:
    return ModelConfig(
        vocab_size=config.vocab,
        hidden_size=config.hidden,
        intermediate_size=2 * config.hidden,
        layers=config.layers,
        heads=2,
        kv_heads=2,
        head_dim=config.hidden // 2,
        max_length=16,
        dtype=dtype,
        param_dtype=dtype,
        init_scale=0.1,
    )


def _chains(config: Config, chain: Float[np.ndarray, "V V"], rng: np.random.Generator) -> Batch:
    """Rows of the Markov chain: three tokens of prompt, and on until the stop token."""
    rows = 1024
    prompts = rng.integers(1, config.vocab, (rows, 3))
    ids, lengths = np.zeros((rows, 1, config.length), np.int32), np.zeros((rows, 1), np.int32)
    for row in range(rows):
        token = prompts[row, -1]
        for place in range(config.length):
            token = rng.choice(config.vocab, p=chain[token])
            ids[row, 0, place] = token
            lengths[row, 0] = place + 1
            if token == STOP:
                break
    weight = np.ones(rows, np.float32)
    return Batch(
        ragged(prompts, np.full(rows, 3)),
        ragged(ids, lengths),
        weight=weight,  # pyright: ignore[reportArgumentType]  # NumPy: on the host
    )
