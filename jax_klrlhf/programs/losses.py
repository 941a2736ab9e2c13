"""Losses by the names that commands call them, and functions of a user's own."""

import importlib
import inspect
import math
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jax_klrlhf.core import fdivergence, objectives, onesided
from jax_klrlhf.core.scores import Scores
from jax_klrlhf.errors import InputError, meant

# Members that read a pair's Scores alone, so that a name and numbers say all.
OBJECTIVES: dict[str, Callable[..., Array]] = {
    "sigmoid": objectives.sigmoid,
    "ipo": objectives.ipo,
    "hinge": objectives.hinge,
    "robust": objectives.robust,
    "rpo": objectives.rpo,
    "simpo": objectives.simpo,
    "length_normalized": objectives.length_normalized,
    "chi_po": objectives.chi_po,
    "cpo": objectives.cpo,
    "orpo": objectives.orpo,
    "exo": objectives.exo,
    "discopop": objectives.discopop,
    "modpo": objectives.modpo,
    "odpo": objectives.odpo,
    "mm_dpo": objectives.mm_dpo,
    "nca": onesided.nca,
    "sppo": onesided.sppo,
    "kto": onesided.kto,
    "apo_zero": onesided.apo_zero,
    "apo_down": onesided.apo_down,
    "forward_kl": partial(objectives.f_divergence, divergence=fdivergence.forward_kl),
    "jensen_shannon": partial(objectives.f_divergence, divergence=fdivergence.jensen_shannon),
}


def objective(name: str, *, kl_coef: float, options: Mapping[str, Any]) -> tuple[Any, bool]:
    """The loss ``Scores -> [B]`` of a name, and whether it reads the reference.

    Raises:
        InputError: where there is no such name, or an option is unknown, missing or ignored.
    """
    if ":" in name:
        function = load_function(name, option="--objective")
    elif name in OBJECTIVES:
        function = OBJECTIVES[name]
    else:
        raise InputError(
            f"objective {name!r}: there are {', '.join(OBJECTIVES)}, and module:function for one "
            f"of your own{meant(name, OBJECTIVES)}"
        )
    fixed = function.keywords if isinstance(function, partial) else {}
    parameters = inspect.signature(function).parameters.values()
    arrays = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    numbers = {
        p.name: p.default
        for p in parameters
        if p.kind is p.KEYWORD_ONLY and p.name not in {*fixed, "kl_coef", "preference"}
    }
    strength = {"kl_coef": kl_coef} if any(p.name == "kl_coef" for p in parameters) else {}
    for array in arrays:
        if array != "scores" and not hasattr(Scores, array):
            raise InputError(
                f"objective {name}: its argument {array!r} is nothing that a pair has; there are "
                f"scores, {', '.join(n for n in dir(Scores) if n.startswith(('chosen', 'rej')))}."
            )
    accepted = ", ".join(numbers) or "none"
    for option, value in options.items():
        if option not in numbers:
            raise InputError(f"options: {name} takes no {option!r}; it takes {accepted}.")
        if isinstance(value, str) or math.isnan(value):
            raise InputError(f"options: {option} is {value}; give a number.")
    for option, default in numbers.items():
        if default is inspect.Parameter.empty and option not in options:
            raise InputError(f"options: {name} needs a number for {option!r}.")
    if not 0 <= options.get("label_smoothing", 0.0) <= 0.5:
        raise InputError(
            f"options: label_smoothing is {options['label_smoothing']}; it is the share of wrong "
            "labels, in [0, 1/2]: above it labels would be turned round."
        )

    def loss(scores: Scores) -> Array:
        given = (scores if a == "scores" else getattr(scores, a) for a in arrays)
        return function(*given, **strength, **options)

    # Numbers out of range and losses of another shape are refused here, before any compute.
    number, count = (jax.ShapeDtypeStruct((3, 2), t) for t in (jnp.float32, jnp.int32))
    example: Any = Scores(*cast(Any, (number, number, count)), reward=cast(Any, number))
    try:
        shape = jax.eval_shape(loss, example).shape
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"objective {name}: {error}") from None
    if shape != (3,):
        raise InputError(f"objective {name}: a loss is [pairs], one number each; got {shape}.")
    try:
        jax.eval_shape(loss, example._replace(ref_log_prob=None))
    except (ValueError, TypeError, AttributeError):
        return loss, True
    return loss, False


def load_function(spec: str, *, option: str) -> Callable[..., Any]:
    """The function that ``module:function`` names; the module may lie in the current folder.

    Raises:
        InputError: where there is no such module or function.
    """
    module, _, name = spec.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise InputError(f"{option} {spec}: {module} cannot be imported ({error}).") from None
    finally:
        sys.path.remove(here)
    if not callable(found):
        raise InputError(f"{option} {spec}: {module} has no function {name!r}.")
    return found
