r"""Bandits made of real human choices: a fitted human model is nature, recorded choices the data.

A context is one recorded choice situation, its actions the alternatives that were on offer. The
**environment** is the Bradley-Terry model fitted to everyone's choices; the **offline data**
are the choices of some people; a policy is evaluated exactly on the situations of the others.

    choices = train_tickets(path)
    problem = environment(choices, kl_coef=0.1)
    known, held_out = split_people(choices, fraction=0.5, seed=0)
    data = comparisons(take(choices, known))
    test = restrict(problem, held_out)

Arrays here are NumPy: this is preparation on the host. Features are centred, divided by their
standard deviations, and scaled together so that the largest norm is 1; the centre is a constant
of the reward, so differences within a situation are those of the raw features up to scale.

Axes: ``situations`` (contexts), ``alternatives`` (actions), ``dim``.
"""

import zipfile
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jax_klrlhf.bandit.problem import Duels, Problem
from jax_klrlhf.bandit.worlds import from_arrays
from jax_klrlhf.core import estimation
from jax_klrlhf.core.numerics import Scalar
from jax_klrlhf.core.preferences import PreferenceModel, bradley_terry
from jax_klrlhf.errors import InputError


class RecordedChoices(NamedTuple):
    """Recorded choices; `person` says who chose, `person_features` what is known of them."""

    features: Float[np.ndarray, "situations alternatives dim"]
    choice: Int[np.ndarray, " situations"]
    person: Int[np.ndarray, " situations"]
    person_features: Float[np.ndarray, "situations traits"]
    names: tuple[str, ...]


def train_tickets(path: str | Path) -> RecordedChoices:
    """2,929 choices between two train tickets by 235 people: price, time, changes, comfort.

    An .npz file with ``xa``, ``xb`` [n, 4], ``y`` (1 where A was chosen), ``user``, ``features``
    (Ecdat's ``Train``). InputError if it is absent, not such a file, or has other shapes.
    """
    raw = _load(path, ("xa", "xb", "y", "user", "features"))
    _same(path, raw, "xb", raw["xa"].shape)
    for name in ("y", "user"):
        _same(path, raw, name, raw["xa"].shape[:1])
    features = _scale(path, np.stack([raw["xa"], raw["xb"]], 1))
    choice = np.where(raw["y"] == 1, 0, 1)
    return RecordedChoices(
        features,
        choice,
        raw["user"].astype(np.int64),
        np.zeros((len(choice), 0), np.float32),
        tuple(raw["features"].tolist()),
    )


def cars(path: str | Path) -> RecordedChoices:
    """4,654 choices among six cars with 19 features each, one by each person, with three traits.

    An .npz file with ``x`` [n, 6, 19], ``choice`` [n], ``user_x`` [n, 3], ``features`` (Ecdat's
    ``Car``). See :func:`interact` for rewards that differ between people. InputError as in
    :func:`train_tickets`.
    """
    raw = _load(path, ("x", "choice", "user_x", "features"))
    situations, alternatives = raw["x"].shape[:2]
    _same(path, raw, "choice", (situations,))
    if not ((raw["choice"] >= 0) & (raw["choice"] < alternatives)).all():
        raise InputError(f"{path}: `choice` must lie in 0..{alternatives - 1}")
    return RecordedChoices(
        _scale(path, raw["x"]),
        raw["choice"].astype(np.int64),
        np.arange(situations),
        raw["user_x"].astype(np.float32),
        tuple(raw["features"].tolist()),
    )


def interact(choices: RecordedChoices) -> RecordedChoices:
    """Add the products of every feature with every trait of the person, and rescale to norm 1."""
    x, traits = choices.features, choices.person_features
    products = [x] + [x * traits[:, None, k, None] for k in range(traits.shape[1])]
    features = np.concatenate(products, -1)
    names = choices.names + tuple(
        f"{name} x trait {k}" for k in range(traits.shape[1]) for name in choices.names
    )
    largest = np.linalg.norm(features, axis=-1).max()
    return choices._replace(features=features / largest, names=names)


def environment(
    choices: RecordedChoices,
    *,
    kl_coef: Scalar,
    ridge: float = 1.0,
    preference: PreferenceModel = bradley_terry,
) -> Problem:
    """The fitted human model as a bandit: uniform pi0, uniform over the recorded situations.

    theta* is the fit of all recorded comparisons by ``preference``, which also draws the labels.
    ValueError if it didn't converge.
    """
    data = comparisons(choices)
    x = jnp.asarray(choices.features)
    differences = x[data.context, data.first] - x[data.context, data.second]
    fit = estimation.fit(differences, data.label, ridge=ridge, weights=data.weight, link=preference)
    if not bool(fit.converged):
        raise ValueError(f"the human model did not converge with ridge={ridge}; raise the ridge")
    return from_arrays(x, fit.theta, kl_coef=kl_coef, preference=preference)


def comparisons(choices: RecordedChoices) -> Duels:
    """The chosen alternative against each other one of its situation, as comparisons won.

    With two alternatives this is the record itself. With more it is a convention: the comparisons
    within one situation share their winner and aren't independent, so each has weight
    ``1 / (alternatives - 1)``: a choice counts once.
    """
    situations, alternatives, _ = choices.features.shape
    offset = np.arange(1, alternatives)
    second = (choice := choices.choice)[:, None] + offset
    return Duels(
        jnp.asarray(np.repeat(np.arange(situations), alternatives - 1), jnp.int32),
        jnp.asarray(np.repeat(choice, alternatives - 1), jnp.int32),
        jnp.asarray(second.reshape(-1) % alternatives, jnp.int32),
        jnp.ones(second.size),
        jnp.full(second.size, 1 / (alternatives - 1)),
    )


def split_people(
    choices: RecordedChoices, *, fraction: float, seed: int
) -> tuple[Int[np.ndarray, " known"], Int[np.ndarray, " held_out"]]:
    """Indices of the situations of a random ``fraction`` of the people, and of the others."""
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie strictly between 0 and 1, got {fraction}")
    people = np.unique(choices.person)
    chosen = np.random.default_rng(seed).permutation(people)[: round(fraction * len(people))]
    known = np.isin(choices.person, chosen)
    return np.flatnonzero(known), np.flatnonzero(~known)


def take(choices: RecordedChoices, index: Int[np.ndarray, " kept"]) -> RecordedChoices:
    """The choices at ``index``, with features as they are (not rescaled)."""
    return RecordedChoices(
        choices.features[index],
        choices.choice[index],
        choices.person[index],
        choices.person_features[index],
        choices.names,
    )


def restrict(problem: Problem, index: Int[np.ndarray, " kept"]) -> Problem:
    """The problem on some of its contexts, with their probabilities renormalized."""
    setting = problem.setting
    prob = setting.context_prob[index]
    kept = setting._replace(
        features=setting.features[index],
        ref_log_prob=setting.ref_log_prob[index],
        context_prob=prob / jnp.sum(prob),
        where=setting.where[index],
        preference=setting.preference.at_contexts(index),
    )
    return problem._replace(
        setting=kept,
        reward=problem.reward[index],
        preference=problem.preference.at_contexts(index),
    )


def _load(path: str | Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in names if name not in file]
            if missing:
                raise InputError(f"{path}: no array {missing[0]!r}; it has {sorted(file)}")
            return {name: file[name] for name in names}
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give the path of the .npz of choices") from None
    except (zipfile.BadZipFile, OSError, EOFError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: not an .npz archive of arrays ({error})") from None
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not an .npz archive of arrays ({error})") from None


def _same(path: str | Path, raw: dict[str, np.ndarray], name: str, shape: tuple[int, ...]) -> None:
    if raw[name].shape != shape:
        raise InputError(f"{path}: {name!r} has shape {raw[name].shape}, expected {shape}")


def _scale(
    path: str | Path, features: Float[np.ndarray, "situations alternatives dim"]
) -> Float[np.ndarray, "situations alternatives dim"]:
    if not np.isfinite(features).all():
        raise InputError(f"{path}: a feature is not finite; remove that choice")
    flat = features.reshape(-1, features.shape[-1]).astype(np.float64)
    spread = flat.std(0)
    scaled = (features - flat.mean(0)) / np.where(spread > 0, spread, 1)
    return (scaled / np.linalg.norm(scaled, axis=-1).max()).astype(np.float32)
