"""What training carries from step to step.

Parameters are split once into the part that is trained and the part that is frozen, each the
whole tree with ``None`` where the other has an array. The optimizer sees the trained part alone:
a frozen base (LoRA) has no moments and no gradient.

The state carries the fingerprint of pi0, the policy that the KL of the objective is taken to.
Caches of reference log-probabilities and checkpoints are checked against it.
"""

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, Int, Key, PRNGKeyArray, UInt32


class TrainState(NamedTuple):
    """Carried by the train step, donated to it, and saved in checkpoints."""

    step: Int[Array, ""]
    params: Any
    """The trained part; ``None`` where a parameter is frozen."""
    frozen: Any
    """The frozen part; ``None`` where a parameter is trained. Not saved in checkpoints."""
    opt_state: Any
    ref_params: Any
    """Parameters of pi0 for the live reference, or ``None``. Not saved in checkpoints."""
    key: Key[Array, ""]
    """Root key: step t uses ``jax.random.fold_in(key, t)``."""
    fingerprint: UInt32[Array, "8"]
    """Of pi0's parameters: :func:`fingerprint`."""

    @property
    def policy(self) -> Any:
        """The whole parameters of the policy."""
        return merge(self.params, self.frozen)


def path_name(path: tuple[Any, ...]) -> str:
    """A parameter's path as text, ``layers/attention/query``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def split(params: Any, trainable: Callable[[str], bool]) -> tuple[Any, Any]:
    """Split into (trained, frozen) by ``trainable(path)``; :func:`merge` undoes it.

    Raises:
        ValueError: when no parameter would be trained.
    """
    chosen = jax.tree_util.tree_map_with_path(lambda path, _: trainable(path_name(path)), params)
    if not any(jax.tree.leaves(chosen)):
        names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        raise ValueError(f"split: no parameter is trainable among {', '.join(names[:8])}, ...")
    trained = jax.tree.map(lambda leaf, keep: leaf if keep else None, params, chosen)
    frozen = jax.tree.map(lambda leaf, keep: None if keep else leaf, params, chosen)
    return trained, frozen


def merge(trained: Any, frozen: Any) -> Any:
    """The whole parameters from the two parts of :func:`split`."""
    return jax.tree.map(
        lambda first, second: second if first is None else first,
        trained,
        frozen,
        is_leaf=lambda leaf: leaf is None,
    )


def cast_floating(params: Any, dtype: Any) -> Any:
    """The floating-point leaves in another type; unchanged where ``dtype`` is None."""
    if dtype is None:
        return params
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, params
    )


def init(
    key: PRNGKeyArray,
    params: Any,
    optimizer: optax.GradientTransformation,
    *,
    trainable: Callable[[str], bool] | None = None,
    ref_params: Any = None,
    fingerprint: UInt32[Array, "8"] | None = None,
    donate: bool = False,
) -> TrainState:
    """State at step 0.

    The trained part is copied, since a step uses its state up: ``params`` stays usable. The frozen
    part and ``ref_params`` are held, never used up.

    Args:
        key: typed root key of the run.
        params: the policy's parameters (float32 masters).
        optimizer: any Optax transformation; clipping and schedules are part of it.
        trainable: predicate on a parameter's path (:func:`path_name`); all, by default.
        ref_params: pi0 for the live reference. Leave it out where the reference is cached in the
            batches, or is the frozen base.
        fingerprint: of pi0, where that is neither ``ref_params`` nor ``params`` (a run that
            continues from a trained policy, with a cached reference).
        donate: do not copy: the first step uses ``params`` up, so that whoever else holds them
            holds no memory. Not where they are ``ref_params`` too.
    """
    if donate and ref_params is params:
        raise ValueError("init: parameters that are the reference too are not to be given away.")
    if ref_params is not None and fingerprint is not None:
        raise ValueError("init: ref_params has a fingerprint of its own; give one of the two.")
    pi0 = params if ref_params is None else ref_params
    trained, frozen = split(params, trainable or (lambda _: True))
    trained = jax.tree.map(lambda leaf: jnp.array(leaf, copy=not donate), trained)
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=trained,
        frozen=frozen,
        opt_state=optimizer.init(trained),
        ref_params=ref_params,
        key=jnp.copy(key),
        fingerprint=digest(pi0) if fingerprint is None else jnp.copy(fingerprint),
    )
    return _placed(state)


def _placed(state: TrainState) -> TrainState:
    """All of it bound to one device, if the parameters or the reference are (as loaded ones are).

    What a step returns is bound where any of its arguments was. A state that is so only in part
    would be of another type than the one after its first step, and the step compiled twice.
    """
    homes = {
        leaf.sharding
        for leaf in jax.tree.leaves((state.params, state.frozen, state.ref_params))
        if isinstance(leaf, Array)
        and not isinstance(leaf, Tracer)  # under jit its caller says where the state lies
        and leaf.committed
        and isinstance(leaf.sharding, SingleDeviceSharding)
    }
    return jax.device_put(state, homes.pop()) if len(homes) == 1 else state


def fingerprint(params: Any) -> str:
    """64 hexadecimal digits that name these parameters: paths, shapes, types and every bit.

    Sums modulo 2^32 are exact in any order, so the name does not depend on the mesh. It tells
    models apart; it is no defence against someone who forges one.
    """
    return fingerprint_text(digest(params))


def fingerprint_text(digest: Any) -> str:
    """The digits of a state's ``fingerprint`` field, or of a :func:`checksum`."""
    return "".join(f"{word:08x}" for word in np.asarray(digest).tolist())


@jax.jit
def digest(params: Any) -> UInt32[Array, "8"]:
    """:func:`fingerprint` as an array. Sharded parameters are hashed where they lie."""
    return _hash(params, words=8)


@jax.jit
def checksum(tree: Any) -> UInt32[Array, "2"]:
    """A quarter of :func:`digest`, at a quarter of its price: it tells damage, not models.

    Any change within 32 bits that are one entry's changes it; of larger damage one in 2^64 passes.
    """
    return _hash(tree, words=2)


def _hash(tree: Any, *, words: int) -> UInt32[Array, " words"]:
    total = jnp.zeros((words,), jnp.uint32)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        seeds = np.frombuffer(_leaf_seed(path, leaf), np.uint32)[:words]
        total = total + jax.lax.map(lambda seed, leaf=leaf: _leaf_hash(leaf, seed), seeds)
    return total


def host_digest(params: Any) -> UInt32[np.ndarray, "8"]:
    """:func:`digest` of arrays in host memory, by NumPy: the same digits, nothing compiled."""
    total = np.zeros((8,), np.uint32)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        leaf = np.asarray(leaf)
        seeds = np.frombuffer(_leaf_seed(path, leaf), np.uint32)
        place = np.arange(leaf.size, dtype=np.uint64).astype(np.uint32)
        bits = _host_bits(leaf)
        words = [_mix(_mix(place + seed) ^ bits).sum(dtype=np.uint32) for seed in seeds]
        total = total + np.array(words, np.uint32)
    return total


def _leaf_seed(path: tuple[Any, ...], leaf: Any) -> bytes:
    return hashlib.sha256(f"{path_name(path)} {leaf.shape} {leaf.dtype}".encode()).digest()


def _host_bits(leaf: np.ndarray) -> np.ndarray:
    """:func:`_bits`, flat, of a host array."""
    flat = np.ascontiguousarray(leaf).reshape(-1)
    if leaf.dtype == np.bool_:
        return flat.astype(np.uint32)
    width = leaf.dtype.itemsize * 8
    if width <= 32:
        return flat.view(f"uint{width}").astype(np.uint32)
    words = flat.view(np.uint32).reshape(-1, 2)
    return _mix(words[:, 0]) ^ words[:, 1]


def _leaf_hash(leaf: Array, seed: UInt32[Array, ""]) -> UInt32[Array, ""]:
    """Sum over entries of a hash of (seed, position, bits)."""
    position = jnp.full(leaf.shape, seed)
    stride = 1
    for axis in reversed(range(leaf.ndim)):
        step = jnp.uint32(stride % 2**32)
        position = position + step * jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        stride *= leaf.shape[axis]
    return jnp.sum(_mix(_mix(position) ^ _bits(leaf)), dtype=jnp.uint32)


def _bits(leaf: Array) -> Array:
    """The entries' bits as uint32 (64-bit types: their halves mixed)."""
    if leaf.dtype == jnp.bool_:
        return leaf.astype(jnp.uint32)
    width = leaf.dtype.itemsize * 8
    if width < 32:
        return jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{width}")).astype(jnp.uint32)
    words = jax.lax.bitcast_convert_type(leaf, jnp.uint32)
    return words if width == 32 else _mix(words[..., 0]) ^ words[..., 1]


def _mix(word: Any) -> Any:
    """Finalizer of MurmurHash3: every input bit reaches every output bit."""
    word = (word ^ (word >> 16)) * np.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * np.uint32(0xC2B2AE35)
    return word ^ (word >> 16)
