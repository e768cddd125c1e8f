"""Losses that find a wrong split or a wrong law, and whole numbers on which sums are exact.

A mean over rows alone is blind: a batch split wrongly has the same mean. So there is a loss that depends on which
rows share a cell, and one that depends on their order in it. Batches hold small whole numbers, so with part counts
that are powers of two every sum is exact in float32, and results are compared with `==`.
"""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Probe: TypeAlias = Callable[[Any, Any], Float[Array, ""]]  # Any, twice: the trees of `probe_params` and `probe_batch`


def over_rows(params: dict[str, Any], rows: dict[str, Any]) -> Float[Array, ""]:
    """A mean over rows: the half square of a linear prediction's error."""
    error = jnp.matmul(rows["x"], params["w"]) + params["b"] - rows["y"]
    return jnp.mean(error * error) * 0.5


def sharing_a_cell(params: dict[str, Any], rows: dict[str, Any]) -> Float[Array, ""]:
    """A product of two means: it depends on which rows share a cell."""
    return jnp.mean(jnp.matmul(rows["x"], params["w"]) + params["b"]) * jnp.mean(rows["y"])


def in_order(params: dict[str, Any], rows: dict[str, Any]) -> Float[Array, ""]:
    """A sum weighted by the place of a row in its cell: it depends on the order as well."""
    weights = jnp.arange(rows["y"].shape[0], dtype=jnp.float32)
    return jnp.mean(weights * (jnp.matmul(rows["x"], params["w"]) + params["b"]) * rows["y"])


PROBES = MappingProxyType({"over_rows": over_rows, "sharing_a_cell": sharing_a_cell, "in_order": in_order})


def probe_params() -> dict[str, np.ndarray]:
    """Whole-number parameters: a vector of three and a scalar."""
    return {"w": np.array([2.0, -1.0, 1.0], np.float32), "b": np.array(1.0, np.float32)}


def probe_batch(num_rows: int, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Whole numbers from -3 to 3: `x` is [num_rows, 3], `y` is [num_rows]."""
    random = np.random.default_rng(seed)
    numbers = random.integers(-3, 4, size=(num_rows, 4)).astype(np.float32)
    return {"x": numbers[:, :3], "y": numbers[:, 3]}
