"""``klrlhf iterate`` on the policy's own draws: a loss on groups by its name, checked and built.

Names and words come from :mod:`core.catalogue`, keywords from each loss's own signature, so that a
loss that is added there is a method here.
"""

import dataclasses
import inspect
import math
from typing import Any, cast

import jax
import jax.numpy as jnp

from jax_klrlhf.core import group_losses
from jax_klrlhf.core.catalogue import CHOICES, METHODS, WEIGHED
from jax_klrlhf.errors import InputError
from jax_klrlhf.programs.config import default_of
from jax_klrlhf.training import rounds
from jax_klrlhf.training.rounds.parts import Improve


def group_loss(improve: Any, *, kl_coef: float, length: int) -> tuple[group_losses.GroupLoss, bool]:
    """The loss on groups of ``improve.method`` with ``improve.options``, and whether it has a KL.

    ``length``, the most tokens of a response, is Dr. GRPO's constant unless the options name one.

    Raises:
        InputError: where an option is unknown, missing, ignored or out of range.
    """
    name, options = improve.method, dict(improve.options)
    parameters = inspect.signature(METHODS[name]).parameters
    strength: dict[str, Any] = {}
    if "kl_coef" in parameters:
        spared = parameters["kl_coef"].default is None and options.get("kl") == "none"
        if spared:
            options.pop("kl")
        else:
            strength["kl_coef"] = kl_coef
    accepted = [p for p in parameters if p != "kl_coef"]
    constant = name == "dr_grpo" or options.get("mean") == "constant"
    given: dict[str, Any] = {"size": float(length)} if constant else {}
    for option, value in options.items():
        words = CHOICES.get(option)
        if option not in accepted:
            takes = ", ".join(accepted) or "none"
            raise InputError(f"options: {name} takes no {option!r}; it takes {takes}.")
        if words is not None and value not in words:
            raise InputError(f"options: {option} {value}: it is one of {', '.join(words)}.")
        if words is None and (isinstance(value, str) or math.isnan(value)):
            raise InputError(f"options: {option} is {value}; give a number.")
        if not strength and option in ("kl", "penalty"):
            raise InputError(f"options: {option} is of a KL, and kl none leaves it out.")
        given[option] = value if words is None else words[value]
    for option in accepted:
        if parameters[option].default is inspect.Parameter.empty and option not in given:
            raise InputError(f"options: {name} needs {option!r}.")
    shape = (2, 3, 4)
    token, at = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape, jnp.bool_)
    reward = jax.ShapeDtypeStruct(shape[:2], jnp.float32)
    try:
        loss = METHODS[name](**strength, **given)
        jax.eval_shape(loss, group_losses.Group(*cast(Any, (token, reward, at, token, token))))
    except (ValueError, TypeError) as error:
        raise InputError(f"improve.method {name}: {error}") from None
    return loss, bool(strength)


def check(config: Any) -> None:
    """Refuse what is ignored or cannot be.

    Raises:
        InputError: naming the option.
    """
    improve, steps = config.improve, config.fit.steps
    times = improve.iterations or steps
    _, reads = group_loss(improve, kl_coef=config.kl_coef, length=config.max_response_length)
    others = config.belief.kind == "implicit" or config.pairs.rule == "enhancer"
    if not reads and not others and config.kl_coef != default_of(type(config), "kl_coef"):
        raise InputError(
            f"--kl-coef: --improve.method {improve.method} has no KL in it, and nothing else in "
            "this run reads it; leave it out."
        )
    if improve.importance_limit is not None and improve.method not in WEIGHED:
        raise InputError(
            f"--improve.importance-limit: {improve.method} keeps its law on anyone's draws and "
            "takes no weights; leave it out."
        )
    if steps % times:
        raise InputError(
            f"--fit.steps {steps} cannot be divided among --improve.iterations {times} draws."
        )
    if improve.each(config) < 2:
        raise InputError("--improve.proposals is 1: a group has at least two responses.")


def improvement(place: Any) -> Improve:
    """A loss on groups of the policy's own responses."""
    config, improve = place.config, place.config.improve
    loss, _ = group_loss(improve, kl_coef=config.kl_coef, length=config.max_response_length)
    times = improve.iterations or config.fit.steps
    each = config.fit.steps // times
    # The schedule is that of all of the round's steps; a draw is followed by few of them.
    fitting = dataclasses.replace(place.policy_fitting(), steps=each)
    return rounds.on_policy(
        place.policy.model,
        place.draw(improve.each(config), plain=True),
        loss,
        fitting=fitting,
        iterations=times,
        prompts=improve.prompts or config.fit.batch_size * each,
        informative_only=improve.informative_only,
        importance_limit=improve.importance_limit,
        quantiles=improve.quantiles if improve.method == "qrpo" else None,
        rows=config.rows,
    )
