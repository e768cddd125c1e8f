"""Metric accumulators, which add up what a step reports over microbatches, rows and devices; and its diagnostics.

This is the lowering's own reading of `_language/terms.py`: a count that is the same in every local microbatch is not an
array of the program but a number, which is multiplied at trace time.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, assert_never

import jax
import jax.numpy as jnp
import numpy as np

from stepc._language.terms import AbstractTerms, Last, Max, Metric, Min, Sum, divide_by_count, is_static, sum_arrays
from stepc.errors import listed

SUMMED_KINDS = ("mean", "sum", "whole", "last")  # those that are reduced by a sum over devices


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MetricAccumulator:
    """One term of a metric while it is added up.

    Args:
      value: the sum so far, or the largest, smallest or last value.
      count: of a mean whose rows decide its count, the sum of the counts; else None.
      kind: "mean", "sum", "whole", "max", "min" or "last". "whole" is a sum of whole numbers of 32 bits, in two parts:
        the value is `[2, ...]`, a multiple of 2**16 and a rest, and does not overflow.
      dtype: of a "whole" sum.
      static_count: of a mean with the same count in every local microbatch, the sum of the counts.
    """

    value: Any  # Any: an array, its shape, or a spec
    count: Any
    kind: str = field(metadata={"static": True})
    static_count: float = field(default=0.0, metadata={"static": True})
    dtype: str = field(default="", metadata={"static": True})


# By name; a metric is the sum of its terms.
MetricAccumulators: TypeAlias = dict[str, tuple[MetricAccumulator, ...]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Diagnostics:
    """Which losses and gradients of a step are not finite. It is never donated, so it can be read at any later time.

    Args:
      finite: whether the loss and the norm of the reduced gradient are finite. With `loss_scale` alone, which adapts to
        an overflow of the gradient: whether the loss is finite, and the gradient is or the scale could become smaller.
      losses: `[devices, microbatches]`, whether the loss of each local microbatch is finite; one row without a mesh.
      squares: `[leaves]`, the sum of squares of each leaf of the gradient, before `clip` and `noise`. It is one array,
        because each output array costs a microsecond of every call.
      paths: those of the leaves.
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
        # Each device has its own row, or every device has all rows. Collected by number, each row counts once.
        by_device: dict[int, np.ndarray] = {}
        for shard in sorted(self.losses.addressable_shards, key=lambda shard: shard.index[0].start or 0):
            first = shard.index[0].start or 0
            by_device |= {first + offset: row for offset, row in enumerate(np.asarray(shard.data))}
        num_devices, size = self.losses.shape
        bad = {device: np.flatnonzero(~row) for device, row in by_device.items() if not row.all()}
        if not bad:
            return f"the loss of each of the {size} is finite" if size > 1 else "the loss is finite"
        parts = [
            f"{listed(map(str, numbers))}{f' on device {device}' if num_devices > 1 else ''}"
            for device, numbers in bad.items()
        ]
        return f"{listed(parts, separator='; ')} (of {size}, counted from 0)"

    def _gradient(self) -> str:
        is_finite = np.isfinite(np.asarray(self.squares))
        bad = [path or "the parameter" for path, is_fine in zip(self.paths, is_finite, strict=True) if not is_fine]
        if not bad:
            return "every leaf is finite"
        return f"not finite in {listed(bad)} ({len(bad)} of {len(self.paths)} leaves)"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TurnDiagnostics:
    """The diagnostics of a step that has turns.

    Args:
      finite: whether those of all turns that were made are.
      turns: those of each, by name; what is not made is finite.
    """

    finite: Any  # Any: a bool scalar
    turns: dict[str, Diagnostics]

    def describe(self) -> list[tuple[str, str]]:
        """Rows of (label, text) that name the turns that are not finite, and what in them."""
        bad = {name: one for name, one in self.turns.items() if not np.asarray(one.finite)}
        return [(label, f"{text}, in the turn {name!r}") for name, one in bad.items() for label, text in one.describe()]


def accumulate_metric(metric: Metric) -> tuple[MetricAccumulator, ...]:
    """A metric of one local microbatch."""
    match metric:
        case AbstractTerms():
            return tuple(
                MetricAccumulator(term.total, None, "mean", float(term.count))
                if is_static(term.count)
                else MetricAccumulator(term.total, term.count, "mean")
                for term in metric.terms
            )
        case Sum(value) if value.dtype in (jnp.int32, jnp.uint32):
            parts = jnp.stack([(value >> 16).astype(jnp.int32), (value & 0xFFFF).astype(jnp.int32)])
            return (MetricAccumulator(parts, None, "whole", dtype=str(value.dtype)),)
        case Sum(value):
            return (MetricAccumulator(value, None, "sum"),)
        case Max(value):
            return (MetricAccumulator(value, None, "max"),)
        case Min(value):
            return (MetricAccumulator(value, None, "min"),)
        case Last(value):
            return (MetricAccumulator(value, None, "last"),)
        case _:
            assert_never(metric)


def zero_metrics(shapes: MetricAccumulators) -> MetricAccumulators:
    """The accumulators before the first microbatch: zeros, and the limits of the dtype for extremes."""

    def zero(one: MetricAccumulator) -> MetricAccumulator:
        dtype = one.value.dtype
        if one.kind not in ("max", "min"):
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), one)
        if jnp.issubdtype(dtype, jnp.floating):
            least, most = -jnp.inf, jnp.inf
        else:
            least, most = jnp.iinfo(dtype).min, jnp.iinfo(dtype).max
        return replace(one, value=jnp.full(one.value.shape, least if one.kind == "max" else most, dtype))

    return _map_metrics(zero, shapes)


def add_metrics(before: MetricAccumulators, after: MetricAccumulators) -> MetricAccumulators:
    """The accumulators of two groups of microbatches. The caller knows how many there are, and scales static counts."""

    def add(one: MetricAccumulator, two: MetricAccumulator) -> MetricAccumulator:
        match one.kind:
            case "max":
                return replace(one, value=jnp.maximum(one.value, two.value))
            case "min":
                return replace(one, value=jnp.minimum(one.value, two.value))
            case "last":
                return two
            case "whole":
                return replace(one, value=_carried(one.value + two.value))
            case _:
                return jax.tree.map(jnp.add, one, two)

    return {name: tuple(map(add, before[name], after[name])) for name in before}


def reduce_vmap_metrics(accumulators: MetricAccumulators) -> MetricAccumulators:
    """The accumulators of many rows, stacked on a first axis, as one."""

    def reduce(one: MetricAccumulator) -> MetricAccumulator:
        match one.kind:
            case "max":
                return replace(one, value=one.value.max(axis=0))
            case "min":
                return replace(one, value=one.value.min(axis=0))
            case "last":
                return replace(one, value=one.value[-1])
            case _:
                return jax.tree.map(lambda leaf: leaf.sum(axis=0, dtype=leaf.dtype), one)

    return _map_metrics(reduce, accumulators)


def scale_metric_counts(accumulators: MetricAccumulators, size: int) -> MetricAccumulators:
    """The static counts once `size` equal parts are added up."""
    return _map_metrics(lambda one: replace(one, static_count=one.static_count * size), accumulators)


def has_last_metrics(accumulators: MetricAccumulators) -> bool:
    """Whether a metric is a `Last`."""
    return any(one.kind == "last" for terms in accumulators.values() for one in terms)


def mask_last_metrics(accumulators: MetricAccumulators, is_last: Any) -> MetricAccumulators:  # Any: a bool scalar
    """Each `Last` as zero unless this device is the last one, so that a sum over devices gives the last value."""

    def mask(one: MetricAccumulator) -> MetricAccumulator:
        return replace(one, value=jnp.where(is_last, one.value, jnp.zeros_like(one.value)))

    return _map_metrics(lambda one: mask(one) if one.kind == "last" else one, accumulators)


def reported_once(accumulators: MetricAccumulators, is_first: Any) -> MetricAccumulators:  # Any: a bool scalar
    """Metrics that every device has alike, so that their reduction over the devices is what one of them has."""

    def once(one: MetricAccumulator) -> MetricAccumulator:
        match one.kind:
            case "max" | "min" | "last":
                return one
            case "mean":
                count = jnp.asarray(one.static_count if one.count is None else one.count, one.value.dtype)
                value, count = (jnp.where(is_first, leaf, jnp.zeros_like(leaf)) for leaf in (one.value, count))
                return replace(one, value=value, count=count, static_count=0.0)
            case _:
                return replace(one, value=jnp.where(is_first, one.value, jnp.zeros_like(one.value)))

    return _map_metrics(once, accumulators)


def extreme_values(accumulators: MetricAccumulators) -> dict[str, dict[str, Any]]:  # Any: arrays
    """The values of each `Max` and `Min`, which no sum reduces, by kind and name."""
    kinds = sorted({one.kind for terms in accumulators.values() for one in terms} - set(SUMMED_KINDS))
    return {
        kind: {name: terms[0].value for name, terms in accumulators.items() if terms[0].kind == kind} for kind in kinds
    }


def replace_extremes(accumulators: MetricAccumulators, extremes: dict[str, dict[str, Any]]) -> MetricAccumulators:
    """The accumulators with these values of each `Max` and `Min`."""
    values = {name: value for by_name in extremes.values() for name, value in by_name.items()}
    return {
        name: (replace(terms[0], value=values[name]),) if name in values else terms
        for name, terms in accumulators.items()
    }


def final_metrics(accumulators: MetricAccumulators) -> dict[str, jax.Array]:
    """The metrics, once everything is added up."""

    def value(one: MetricAccumulator) -> jax.Array:
        if one.kind == "whole":
            return _whole_number(one.value, jnp.dtype(one.dtype))
        if one.kind != "mean":
            return one.value
        return divide_by_count(one.value, one.static_count if one.count is None else one.count)

    values = {name: list(map(value, terms)) for name, terms in accumulators.items()}
    return {name: sum_arrays(each) for name, each in values.items()}


def _carried(parts: jax.Array) -> jax.Array:
    """The same whole number with a rest below 2**16."""
    high, low = parts
    return jnp.stack([high + (low >> 16), low & 0xFFFF])


def _whole_number(parts: jax.Array, dtype: np.dtype) -> jax.Array:
    """A sum of whole numbers; the largest or smallest of the dtype if that does not hold it."""
    high, low = _carried(parts)
    limits = jnp.iinfo(dtype)
    value = (high.astype(dtype) << 16) | low.astype(dtype)
    least, most = limits.min >> 16, limits.max >> 16
    largest, smallest = np.asarray(limits.max, dtype), np.asarray(limits.min, dtype)
    return jnp.where(high > most, largest, jnp.where(high < least, smallest, value))


def _map_metrics(
    function: Callable[[MetricAccumulator], MetricAccumulator], accumulators: MetricAccumulators
) -> MetricAccumulators:
    return {name: tuple(map(function, terms)) for name, terms in accumulators.items()}
