"""What is reported of a step, while it is still being added up: over microbatches, lanes and devices.

The lowering's own reading of `core/terms.py`: numbers that are the same in every cell are not carried but multiplied.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from stepc._language.terms import AbstractTerms, Last, Max, Metric, Min, Sum, divide_by_count, is_static, sum_arrays

SUMMED_KINDS = ("mean", "sum", "last")  # those that a sum over devices adds up


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MetricAccumulator:
    """One number in the making.

    Args:
      value: what was added up, or the largest, smallest or last so far.
      count: of a mean whose rows decide, the counts added up; else None.
      kind: "mean", "sum", "max", "min" or "last".
      times: of a mean that counts alike in every cell, the counts added up.
    """

    value: Any  # Any: an array, its shape, or a spec
    count: Any
    kind: str = field(metadata={"static": True})
    times: float = field(default=0.0, metadata={"static": True})


MetricAccumulators: TypeAlias = dict[str, tuple[MetricAccumulator, ...]]  # a metric is the sum of its tallies


def accumulate_metric(metric: Metric) -> tuple[MetricAccumulator, ...]:
    """A metric of one cell."""
    match metric:
        case AbstractTerms():
            return tuple(
                MetricAccumulator(one.total, None, "mean", float(one.count))
                if is_static(one.count)
                else MetricAccumulator(one.total, one.count, "mean")
                for one in metric.terms
            )
        case Sum(value):
            return (MetricAccumulator(value, None, "sum"),)
        case Max(value):
            return (MetricAccumulator(value, None, "max"),)
        case Min(value):
            return (MetricAccumulator(value, None, "min"),)
        case Last(value):
            return (MetricAccumulator(value, None, "last"),)


def zero_metrics(shapes: MetricAccumulators) -> MetricAccumulators:
    """What is there before the first cell."""

    def none(one: MetricAccumulator) -> MetricAccumulator:
        dtype = one.value.dtype
        if one.kind not in ("max", "min"):
            return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), one)
        limits = jnp.finfo(dtype) if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype)
        inexact = jnp.issubdtype(dtype, jnp.floating)
        least, most = (-jnp.inf, jnp.inf) if inexact else (limits.min, limits.max)
        return replace(one, value=jnp.full(one.value.shape, least if one.kind == "max" else most, dtype))

    return _map_metrics(none, shapes)


def add_metrics(before: MetricAccumulators, after: MetricAccumulators) -> MetricAccumulators:
    """Two groups of cells, the first one before the second. `times` stays: the caller knows how many there are."""

    def both(one: MetricAccumulator, two: MetricAccumulator) -> MetricAccumulator:
        if one.kind == "max":
            return replace(one, value=jnp.maximum(one.value, two.value))
        if one.kind == "min":
            return replace(one, value=jnp.minimum(one.value, two.value))
        if one.kind == "last":
            return two
        return jax.tree.map(jnp.add, one, two)

    pairs = {name: zip(before[name], after[name], strict=True) for name in before}
    return {name: tuple(both(one, two) for one, two in pair) for name, pair in pairs.items()}


def reduce_vmap_metrics(tallies: MetricAccumulators) -> MetricAccumulators:
    """Added up over a first axis."""

    def over(one: MetricAccumulator) -> MetricAccumulator:
        if one.kind in ("max", "min"):
            return replace(one, value=one.value.max(axis=0) if one.kind == "max" else one.value.min(axis=0))
        if one.kind == "last":
            return replace(one, value=one.value[-1])
        return jax.tree.map(lambda leaf: leaf.sum(axis=0, dtype=leaf.dtype), one)

    return _map_metrics(over, tallies)


def scale_metric_counts(tallies: MetricAccumulators, size: int) -> MetricAccumulators:
    """Where `size` parts were added up."""
    return _map_metrics(lambda one: replace(one, times=one.times * size), tallies)


def mask_last_metrics(tallies: MetricAccumulators, is_last: Any) -> MetricAccumulators:  # Any: a bool scalar
    """Zeros where this device is not the last one, so that a sum over devices gives the last."""

    def only(one: MetricAccumulator) -> MetricAccumulator:
        return replace(one, value=jnp.where(is_last, one.value, jnp.zeros_like(one.value)))

    return _map_metrics(lambda one: only(one) if one.kind == "last" else one, tallies)


def has_last_metrics(tallies: MetricAccumulators) -> bool:
    """Whether any of it is the last of its kind."""
    return any(one.kind == "last" for each in tallies.values() for one in each)


def extreme_values(tallies: MetricAccumulators) -> dict[str, dict[str, Any]]:  # Any: arrays
    """The values that no sum adds up, by kind and name."""
    kinds = sorted({one.kind for each in tallies.values() for one in each} - set(SUMMED_KINDS))
    return {kind: {name: each[0].value for name, each in tallies.items() if each[0].kind == kind} for kind in kinds}


def replace_extremes(tallies: MetricAccumulators, found: dict[str, dict[str, Any]]) -> MetricAccumulators:
    """The tallies with these values instead."""
    values = {name: value for one in found.values() for name, value in one.items()}
    return {name: (replace(each[0], value=values[name]),) if name in values else each for name, each in tallies.items()}


def final_metrics(tallies: MetricAccumulators) -> dict[str, jax.Array]:
    """The numbers, once all is added up."""

    def number(one: MetricAccumulator) -> jax.Array:
        if one.kind != "mean":
            return one.value
        return divide_by_count(one.value, one.times if one.count is None else one.count)

    values = {name: [number(one) for one in each] for name, each in tallies.items()}
    return {name: sum_arrays(each) for name, each in values.items()}


def _map_metrics(
    function: Callable[[MetricAccumulator], MetricAccumulator], tallies: MetricAccumulators
) -> MetricAccumulators:
    return {name: tuple(map(function, each)) for name, each in tallies.items()}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Diagnostics:
    """Flags of one step. They are outputs of their own, never donated: they can be read as late as one likes.

    Args:
      finite: whether the loss and the norm of the gradient are finite, after the reduction; with `loss_scale` alone,
        which adapts to an overflow of the gradient, whether the loss is, and the scale could still become smaller.
      losses: `[devices, microbatches]`, whether the loss of each cell is; `[1, microbatches]` on a single device.
      squares: `[leaves]`, the sum of squares of each leaf of the gradient, before `clip` and `noise`. In one array: an
        array for each leaf would be a microsecond of each call, each.
      paths: of those leaves.
    """

    finite: Any  # Any: a bool scalar
    losses: Any  # Any: a bool array
    squares: Any  # Any: an array
    paths: tuple[str, ...] = field(metadata={"static": True})

    def describe(self) -> list[tuple[str, str]]:
        """Rows of (label, text) that name the microbatches and the leaves of the gradient that are not finite."""
        return [
            ("microbatches", self._microbatches()),
            ("gradient", self._gradient()),
            ("gradient norm", f"{self.grad_norm:g}"),
        ]

    @property
    def grad_norm(self) -> float:
        """The global norm of the gradient, before `clip` and `noise`."""
        return math.sqrt(sum(map(float, np.asarray(self.squares))))

    def _microbatches(self) -> str:
        rows = [
            (number, np.asarray(shard.data))
            for shard in sorted(self.losses.addressable_shards, key=lambda one: one.index[0].start or 0)
            for number in [shard.index[0].start or 0]
        ]
        # A replicated array has the same rows on every device: each number once.
        seen = {number + offset: row for number, block in rows for offset, row in enumerate(block)}
        size = self.losses.shape[-1]
        bad = {number: np.flatnonzero(~row) for number, row in seen.items() if not row.all()}
        if not bad:
            return f"the loss of each of the {size} is finite" if size > 1 else "the loss is finite"
        many = self.losses.shape[0] > 1
        parts = [
            f"{', '.join(map(str, cells))}{f' on device {number}' if many else ''}" for number, cells in bad.items()
        ]
        return f"{'; '.join(parts)} (of {size}, counted from 0)"

    def _gradient(self) -> str:
        is_finite = np.isfinite(np.asarray(self.squares))
        bad = [path or "the parameter" for path, is_fine in zip(self.paths, is_finite, strict=True) if not is_fine]
        total = len(self.paths)
        if not bad:
            return "every leaf is finite"
        return f"not finite in {', '.join(bad)} ({len(bad)} of {total} leaves)"
