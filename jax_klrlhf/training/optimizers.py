"""The optimizers that the programs offer; a script may hand any Optax transformation to a step."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from jax_klrlhf.training.state import path_name


def schedule(
    peak: float, *, warmup: int, steps: int, decay: Callable[..., optax.Schedule] | None = None
) -> optax.Schedule:
    """Linear warm-up over ``warmup`` steps to ``peak``, then ``decay(peak, steps)``.

    ``decay`` is for example :func:`cosine` or :func:`linear`; without it the rate stays at its
    peak. Raises ``ValueError`` where the warm-up takes all the steps.
    """
    if not 0 <= warmup < max(steps, 1):
        raise ValueError(
            f"a warm-up of {warmup} steps does not fit a run of {steps}: it must be shorter."
        )
    after = optax.constant_schedule(peak) if decay is None else decay(peak, steps - warmup)
    if warmup == 0:
        return after
    # From peak / warmup, not from 0: the first step counts too.
    rise = optax.linear_schedule(peak / warmup, peak, warmup - 1)
    return optax.join_schedules([rise, after], [warmup])


def cosine(peak: float, steps: int) -> optax.Schedule:
    """Half a cosine from ``peak`` to a tenth of it."""
    return optax.cosine_decay_schedule(peak, steps, alpha=0.1)


def linear(peak: float, steps: int) -> optax.Schedule:
    """A line from ``peak`` to 0."""
    return optax.linear_schedule(peak, 0.0, steps)


def decayed(path: str) -> bool:
    """Whether weight decay acts on a parameter, by its path: on all but norms and biases.

    A norm's scale and a bias have no scale of their own that a decay could bound; peers leave them
    out too. Told by name, since the scales of stacked layers are matrices.
    """
    parts = path.lower().split("/")
    return parts[-1] not in ("scale", "bias") and not any(part.endswith("norm") for part in parts)


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    clip: float | None = 1.0,
    weight_decay: float = 0.0,
    b2: float = 0.999,
    mu_dtype: Any = None,
    decay: Callable[[str], bool] = decayed,
) -> optax.GradientTransformation:
    """AdamW behind clipping by the global norm; moments in float32, ``mu`` in ``mu_dtype``.

    ``decay`` says of a parameter's path (:func:`.state.path_name`) whether ``weight_decay`` acts on
    it.
    """

    def mask(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: decay(path_name(path)), params)

    adam = optax.adamw(
        learning_rate, b2=b2, weight_decay=weight_decay, mu_dtype=mu_dtype, mask=mask
    )
    return _clipped(adam, clip)


def adafactor(
    learning_rate: optax.ScalarOrSchedule, *, clip: float | None = 1.0
) -> optax.GradientTransformation:
    """Adafactor (arXiv 1804.04235): second moments as row and column means, no first moment."""
    return _clipped(
        optax.adafactor(learning_rate, multiply_by_parameter_scale=False, clipping_threshold=None),
        clip,
    )


def _clipped(
    optimizer: optax.GradientTransformation, clip: float | None
) -> optax.GradientTransformation:
    return optimizer if clip is None else optax.chain(optax.clip_by_global_norm(clip), optimizer)
