r"""Two reward models of one chat model: gold, which labels and judges, and the proxies.

Both are Bradley-Terry rewards, linear in frozen features phi of the model's hidden states (mean and
last over the response, and the logarithm of its length), in principal components of the responses
that people compared:

.. math:: r(x, y) = \langle\theta, \phi(x, y)\rangle, \qquad
          \theta \sim \text{maximum likelihood with a ridge chosen by five-fold log-loss}

Gold is the mean of an ensemble on bootstrap samples of its own half of the human pairs and sees
more components; the proxies see fewer, and the other half. Gold is scaled so that its standard
deviation among pi0's answers to a prompt is ``spread`` nats: how decided the annotator is.

Axes: ``B`` prompts, ``K`` responses, ``N`` pairs, ``D`` components, ``M`` members.
"""

import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments.chat.human import Tokens
from jax_klrlhf import results
from jax_klrlhf.core import estimation, posterior
from jax_klrlhf.core.sequence import Ragged
from jax_klrlhf.models import reward as rewards
from jax_klrlhf.models.base import LanguageModel
from jax_klrlhf.training import rounds
from jax_klrlhf.training.rounds.compute import mapped
from jax_klrlhf.training.rounds.parts import Judge, Reward

RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
FOLDS = 5
KEPT = 48
"""Rows from which on states are kept on disk."""
PROXIES = ("mean", "worst", "lower bound", "PAR")


class Hidden:
    """``hidden(prompts, responses) -> [B, K, H]``, each set of responses read once."""

    def __init__(self, model: LanguageModel, params: Any, *, rows: int, folder: Path | None = None):
        def pooled(params: Any, prompts: Ragged, responses: Ragged) -> Any:
            return rewards.features(model, params, prompts, responses, pooling=_mean_and_last)

        self._program, self._params = mapped(pooled, rows=rows), params
        self._found: dict[str, np.ndarray] = {}
        self._folder = None if folder is None else results.output_folder(folder)

    def __call__(self, prompts: Ragged, responses: Ragged) -> Float[np.ndarray, "B K H"]:
        digest = hashlib.blake2b()
        for array in (prompts.ids, prompts.lengths, responses.ids, responses.lengths):
            digest.update(repr(np.shape(array)).encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        at = digest.hexdigest()[:32]
        if at not in self._found:
            path = None if self._folder is None else self._folder / f"{at}.npy"
            if path is not None and path.exists():
                self._found[at] = np.load(path)
                return self._found[at]
            length = np.log1p(np.asarray(responses.lengths, np.float32))[..., None]
            states = self._program(self._params, prompts, responses)
            self._found[at] = np.concatenate([states, length], -1)
            # People's answers are kept: they are most of what is read. A policy's are its cell's.
            if path is not None and responses.ids.shape[1] == 2 and len(states) >= KEPT:
                with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
                    np.save(file, self._found[at])
                Path(file.name).rename(path)
        return self._found[at]


class Components(NamedTuple):
    """Frozen coordinates: of unit variance among the responses they were made of."""

    centre: Float[np.ndarray, " H"]
    matrix: Float[np.ndarray, "H D"]

    def __call__(self, hidden: Float[np.ndarray, "*batch H"]) -> Float[np.ndarray, "*batch D"]:
        return ((hidden - self.centre) @ self.matrix).astype(np.float32)


class Fit(NamedTuple):
    """A Bradley-Terry fit on human pairs."""

    theta: Float[np.ndarray, " D"]
    members: Float[np.ndarray, "M D"]
    """On bootstrap samples."""
    belief: posterior.Gaussian
    """Laplace's."""
    ridge: float


def components(hidden: Float[np.ndarray, "N K H"], *, dim: int) -> Components:
    """Principal components of standardized states; the length stays a coordinate of its own."""
    flat = hidden.reshape(-1, hidden.shape[-1]).astype(np.float64)
    centre, scale = flat.mean(0), np.maximum(flat.std(0), 1e-6)
    states = ((flat - centre) / scale)[:, :-1]
    _, values, vectors = np.linalg.svd(states, full_matrices=False)
    kept = min(dim - 1, int((values > 1e-3 * values[0]).sum()))
    matrix = np.zeros((flat.shape[1], kept + 1))
    spread = values[:kept] / np.sqrt(len(states))
    matrix[:-1, :-1] = vectors[:kept].T / scale[:-1, None] / spread
    matrix[-1, -1] = 1 / scale[-1]
    return Components(centre, matrix)


def fit(phi: Float[np.ndarray, "N 2 D"], *, members: int, seed: int) -> Fit:
    """Fit on pairs whose first is preferred.

    Raises:
        ValueError: for fewer pairs than folds.
    """
    count = len(phi)
    if count < FOLDS:
        raise ValueError(f"{count} pairs: a fit needs {FOLDS} or more.")
    z, rng = jnp.asarray(phi[:, 0] - phi[:, 1]), np.random.default_rng(seed)
    fold = rng.permutation(count) % FOLDS
    kept = jnp.asarray(np.stack([fold != n for n in range(FOLDS)]), jnp.float32)
    each = [_solve(z, kept, ridge) for ridge in RIDGES]
    lost = [np.logaddexp(0, -np.asarray(thetas @ z.T)[fold, np.arange(count)]) for thetas in each]
    ridge = RIDGES[int(np.argmin([loss.sum() for loss in lost]))]
    drawn = [np.bincount(rng.integers(count, size=count), minlength=count) for _ in range(members)]
    weights = jnp.asarray(np.stack([np.ones(count), *drawn]), jnp.float32)
    theta, *members_found = _solve(z, weights, ridge)
    return Fit(
        np.asarray(theta),
        np.stack(members_found),
        posterior.laplace(theta, estimation.hessian(theta, z, ridge=ridge)),
        ridge,
    )


@jax.jit
def _solve(z: Array, weights: Float[Array, "M N"], ridge: Any) -> Float[Array, "M D"]:
    """A fit for each row of weights; every first is preferred."""
    label = jnp.ones(z.shape[0], z.dtype)
    one = lambda weight: estimation.fit(z, label, ridge=ridge, weights=weight).theta  # noqa: E731
    return jax.vmap(one)(weights)


def margins(theta: Float[np.ndarray, " D"], phi: Float[np.ndarray, "N 2 D"]) -> np.ndarray:
    """Reward of the preferred less that of the other, nats."""
    return (phi[:, 0] - phi[:, 1]) @ theta


class Judges(NamedTuple):
    """What labels, what judges and what is believed."""

    gold: Judge
    proxies: Mapping[str, Reward]
    fits: Mapping[str, Fit]
    features: Mapping[str, Callable[[Ragged, Ragged], np.ndarray]]
    """Of ``gold`` and ``proxy``."""


def build(
    hidden: Hidden,
    *,
    gold: Sequence[Tokens],
    proxy: Tokens,
    pi0: tuple[Ragged, Ragged],
    dims: tuple[int, int],
    members: int,
    spread: float,
    pessimism: float,
) -> Judges:
    """Fit both.

    Args:
        hidden: states of the chat model.
        gold: pairs of each source that gold learns from.
        proxy: pairs that the proxies learn from.
        pi0: prompts and pi0's answers to them, by which gold is scaled.
        dims: components of gold and of the proxies.
        members: of each ensemble.
        spread: nats.
        pessimism: posterior standard deviations below the mean, of the lower bound.
    """
    seen = [hidden(*part) for part in gold]
    project = components(np.concatenate(seen), dim=dims[0])
    wide = fit(project(np.concatenate(seen)), members=members, seed=0)
    answers = project(hidden(*pi0)) @ wide.members.mean(0)
    within = np.sqrt(np.mean(np.var(answers, axis=1, ddof=1)))
    scale = spread / max(float(within), 1e-6)
    theta = wide.members.mean(0) * scale
    narrow_seen = hidden(*proxy)
    narrow = components(narrow_seen, dim=dims[1])
    small = fit(narrow(narrow_seen), members=members, seed=1)

    def phi(project: Components) -> Callable[[Ragged, Ragged], np.ndarray]:
        return lambda prompts, responses: project(hidden(prompts, responses))

    features = {"gold": phi(project), "proxy": phi(narrow)}

    def linear(which: str, theta: np.ndarray) -> Judge:
        return lambda prompts, responses: (features[which](prompts, responses) @ theta).astype(
            np.float32
        )

    def lower(prompts: Ragged, responses: Ragged) -> np.ndarray:
        # Components are centred: the distance from 0 is that from the mean human response.
        found = posterior.margin(small.belief, jnp.asarray(features["proxy"](prompts, responses)))
        bound = found.mean - pessimism * jnp.sqrt(found.variance)
        return np.asarray(bound, np.float32)

    each = [rounds.known(linear("proxy", member)) for member in small.members]
    average = rounds.ensemble(each, combine=rounds.mean)
    return Judges(
        gold=linear("gold", theta),
        proxies={
            "mean": average,
            "worst": rounds.ensemble(each, combine=rounds.worst),
            "lower bound": rounds.known(lower),
            "PAR": rounds.transformed(average, rounds.win_rate),
        },
        fits={"gold": wide, "proxy": small},
        features=features,
    )


def _mean_and_last(prompt: Any, hidden: Any, mask: Any) -> Any:
    both = rewards.mean(prompt, hidden, mask), rewards.last(prompt, hidden, mask)
    return jnp.concatenate(both, -1)
