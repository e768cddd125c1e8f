"""A state as what can be written and read again: bare leaves, their names, rows and digests. It knows no disk."""

import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from stepc.errors import CheckpointError, ResumeError
from stepc.language.state import leaves_by_path


def check_saveable(state: Any) -> None:  # Any: a state
    """Refuse a state that Orbax does not write. Errors: CheckpointError."""
    faults = [
        (path, f"expected at least one number, got {leaf.dtype}{list(leaf.shape)}")
        for path, leaf in leaves_by_path(state)
        if leaf.size == 0
    ]
    if faults:
        raise CheckpointError("This state cannot be saved: Orbax does not write arrays without numbers.", facts=faults)


def check_fits(meta: Mapping[str, Any], target: Any) -> None:  # Any: a state
    """Refuse a checkpoint of another state. Errors: ResumeError with every leaf that differs."""
    saved = {path: f"{dtype}{shape}{impl}" for path, shape, dtype, impl, _ in meta["leaves"]}
    wanted = {path: f"{dtype}{shape}{impl}" for path, shape, dtype, impl in rows_of(target)}
    facts = [
        (path, f"saved {saved.get(path, 'nothing')}, the state has {wanted.get(path, 'nothing')}")
        for path in [*wanted, *(one for one in saved if one not in wanted)]
        if saved.get(path) != wanted.get(path)
    ]
    if facts:
        raise ResumeError(f"The checkpoint of step {meta['step']} is of another state.", facts=facts)


def rows_of(state: Any) -> list[tuple[str, list[int], str, str]]:  # Any: a state
    return [
        (path, list(leaf.shape), str(leaf.dtype), f" {jax.random.key_impl(leaf)}" if is_key(leaf) else "")
        for path, leaf in leaves_by_path(state)
    ]


def bare_leaves(state: Any) -> list[jax.Array]:  # Any: a state
    return [jax.random.key_data(leaf) if is_key(leaf) else leaf for leaf in jax.tree.leaves(state)]


def is_key(leaf: Any) -> bool:  # Any: an array
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def clothed(bare: jax.Array, like: Any) -> jax.Array:  # Any: an array, or a typed key
    return jax.random.wrap_key_data(bare, impl=jax.random.key_impl(like)) if is_key(like) else bare


def names_of(leaves: list[jax.Array]) -> list[str]:
    return [f"leaf_{number:05}" for number in range(len(leaves))]


def digest(leaf: jax.Array) -> int:
    if not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        # Spread over processes: whole on each for a moment, one leaf at a time, so that it can be read by any number.
        return zlib.crc32(np.asarray(process_allgather(leaf, tiled=True)).tobytes())
    return zlib.crc32(np.asarray(leaf).tobytes())
