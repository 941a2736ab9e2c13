"""How programs are compiled: the compiler's options by platform, and a cache that is kept.

``klrlhf plan`` compiles with the same options, so that what it says is of the program that a run
compiles.
"""

import os
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jax_klrlhf.errors import InputError

OPTIONS: dict[str, dict[str, Any]] = {
    "tpu": {},
}
"""Of a training step, by platform.

None are set so far. On v5e libtpu gathers weights asynchronously by itself; on v5p it does not, and
with five of its options for that, set at once, libtpu 0.0.42.1 did not finish 8B in 14 minutes.
"""


def options(mesh: Mesh | None) -> dict[str, Any] | None:
    """The compiler's options for a training step on a mesh (None: on the default device)."""
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return OPTIONS.get(platform)


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
