"""Every leaf of a state as the plan lists it: its path, type, size, and where it lies."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from stepc.compiler.plan import Leaf
from stepc.language.state import State, leaves_by_path


def planned_leaves(state: State) -> tuple[Leaf, ...]:
    """The leaves, in the order in which jax flattens them."""
    placed = dict(state.placement)
    return tuple(
        Leaf(path, leaf.shape, str(leaf.dtype), _bytes(leaf), _lies(placed.get(path)))
        for path, leaf in leaves_by_path(state)
    )


def _bytes(leaf: Any) -> int:  # Any: an array, or its shape
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return int(jax.eval_shape(jax.random.key_data, leaf).size) * 4
    return int(leaf.size) * leaf.dtype.itemsize


def _lies(spec: PartitionSpec | None) -> str:
    return "whole on every device" if spec is None else str(spec)
