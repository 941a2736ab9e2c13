"""How programs are compiled: the compiler's options by platform, and a cache that is kept.

``klrlhf plan`` compiles with the same options, so that what it says is of the program that a run
compiles.
"""

import functools
import os
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jax_klrlhf import placement
from jax_klrlhf.errors import InputError

_GATHERS = {
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
}
OPTIONS: dict[str, dict[str, Any]] = dict.fromkeys(("TPU v5", "TPU v5p", "TPU v6 lite"), _GATHERS)
"""Of a training step, by the kind of device; v5p goes by two names.

On v5e libtpu gathers weights asynchronously by itself. On v5p and v6e it does not: with these three
25 to 26 of 27 GB of the recipe's step at 8B are gathered behind its arithmetic
(`experiments/llama3_8b`; compiled, not run).
"""


def options(mesh: Mesh | None) -> dict[str, Any] | None:
    """The compiler's options for a training step on a mesh (None: on the default device).

    One that the installed compiler does not know is left out, with a warning.
    """
    device = placement.own_device(mesh)
    wanted = OPTIONS.get(device.device_kind)
    if not wanted:
        return None
    known = {name: value for name, value in wanted.items() if _known(name, value, device)}
    if len(known) < len(wanted):
        missing = ", ".join(sorted(wanted.keys() - known.keys()))
        warnings.warn(
            f"this compiler for {device.device_kind} has no option {missing}", stacklevel=2
        )
    return known or None


@functools.cache
def _known(name: str, value: Any, device: Any) -> bool:
    nothing = jax.ShapeDtypeStruct(
        (), jnp.int32, sharding=jax.sharding.SingleDeviceSharding(device)
    )
    try:
        jax.jit(lambda x: x).lower(nothing).compile(compiler_options={name: value})
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return False
    return True


def remember(where: str) -> Path | None:
    """Keep compiled programs on disk, for the next start of a run; the folder, or None.

    ``where`` is a folder, ``none``, or ``auto``: on accelerators ``JAX_COMPILATION_CACHE_DIR`` or
    else a folder of the user's, and none on a CPU, where compiling is quick and a program may be of
    another machine's instructions.

    Raises:
        InputError: where the folder cannot be made.
    """
    if where == "none" or (where == "auto" and jax.default_backend() == "cpu"):
        return None
    if where == "auto":
        given = os.environ.get("JAX_COMPILATION_CACHE_DIR")
        cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        where = given or f"{cache}/jax_klrlhf/compiled"
    folder = Path(where).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--compilation-cache {folder}: not a folder that can be written ({error.strerror}); "
            "name another, or `none`."
        ) from None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder
