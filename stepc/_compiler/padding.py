"""How a leaf is padded where jax demands even shards, and cut to its own shape again. It knows no state and no rules.

jax refuses uneven shards of what enters or leaves a program, and Shardy gathers what enters or leaves a manual region
with such. Between those places XLA shards unevenly by itself: with the padding at the end its shards are those of the
padded leaf, so neither function moves anything.
"""

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from stepc._core.sharding import Entry, axes_of
from stepc._language.state import PADDING


def padded_shape(shape: tuple[int, ...], spec: Iterable[Entry], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape with each dimension as the next multiple of the axes that shard it."""
    parts = [prod(sizes[axis] for axis in axes_of((entry,))) for entry in spec]
    parts += [1] * (len(shape) - len(parts))
    return tuple(-(-size // number) * number for size, number in zip(shape, parts, strict=True))


def padded(leaf: Any, shape: tuple[int, ...], filling: float = PADDING) -> Any:  # Any, twice: of numpy or jax
    """The leaf, filled up to a shape."""
    if leaf.shape == shape:
        return leaf
    widths = [(0, size - own) for size, own in zip(shape, leaf.shape, strict=True)]
    number = filling if jnp.issubdtype(leaf.dtype, jnp.inexact) else 0
    module = np if isinstance(leaf, np.ndarray) else jnp
    return module.pad(leaf, widths, constant_values=module.asarray(number, leaf.dtype))


def padded_along(leaf: jax.Array, spec: PartitionSpec, shape: tuple[int, ...], filling: float = PADDING) -> jax.Array:
    """The leaf of a program, filled up to a shape that its axes divide, and sharded along them."""
    return leaf if leaf.shape == shape else jax.lax.with_sharding_constraint(padded(leaf, shape, filling), spec)


def along_padding(shape: tuple[int, ...], padded: tuple[int, ...], own: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of what was made of a padded leaf, with the leaf's own size of each dimension that was padded."""
    return tuple(size if full == one else one for size, full, one in zip(shape, padded, own, strict=True))


def cut_along(leaf: jax.Array, spec: PartitionSpec, shape: tuple[int, ...]) -> jax.Array:
    """The inverse: the leaf in its own shape, with the same axes."""
    if leaf.shape == shape:
        return leaf
    return jax.lax.with_sharding_constraint(jax.lax.slice(leaf, [0] * leaf.ndim, shape), spec)
