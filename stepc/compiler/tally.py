"""What is reported of a step, while it is still being added up: over microbatches, lanes and devices.

The lowering's own reading of `core/terms.py`: numbers that are the same in every cell are not carried but multiplied.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from stepc.core.terms import AbstractTerms, Last, Max, Metric, Min, Sum, is_static, ratio, total_of

ADDED = ("mean", "sum", "last")  # those that a sum over devices adds up


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tally:
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


Tallies: TypeAlias = dict[str, tuple[Tally, ...]]  # a metric is the sum of its tallies


def tallied(metric: Metric) -> tuple[Tally, ...]:
    """A metric of one cell."""
    match metric:
        case AbstractTerms():
            return tuple(
                Tally(one.total, None, "mean", float(one.count))
                if is_static(one.count)
                else Tally(one.total, one.count, "mean")
                for one in metric.terms
            )
        case Sum(value):
            return (Tally(value, None, "sum"),)
        case Max(value):
            return (Tally(value, None, "max"),)
        case Min(value):
            return (Tally(value, None, "min"),)
        case Last(value):
            return (Tally(value, None, "last"),)


def none_yet(shapes: Tallies) -> Tallies:
    """What is there before the first cell."""

    def none(one: Tally) -> Tally:
        dtype = one.value.dtype
        if one.kind not in ("max", "min"):
            return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), one)
        limits = jnp.finfo(dtype) if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype)
        inexact = jnp.issubdtype(dtype, jnp.floating)
        least, most = (-jnp.inf, jnp.inf) if inexact else (limits.min, limits.max)
        return replace(one, value=jnp.full(one.value.shape, least if one.kind == "max" else most, dtype))

    return _each(none, shapes)


def added(before: Tallies, after: Tallies) -> Tallies:
    """Two groups of cells, the first one before the second. `times` stays: the caller knows how many there are."""

    def both(one: Tally, two: Tally) -> Tally:
        if one.kind == "max":
            return replace(one, value=jnp.maximum(one.value, two.value))
        if one.kind == "min":
            return replace(one, value=jnp.minimum(one.value, two.value))
        if one.kind == "last":
            return two
        return jax.tree.map(jnp.add, one, two)

    pairs = {name: zip(before[name], after[name], strict=True) for name in before}
    return {name: tuple(both(one, two) for one, two in pair) for name, pair in pairs.items()}


def over_lanes(tallies: Tallies) -> Tallies:
    """Added up over a first axis."""

    def over(one: Tally) -> Tally:
        if one.kind in ("max", "min"):
            return replace(one, value=one.value.max(axis=0) if one.kind == "max" else one.value.min(axis=0))
        if one.kind == "last":
            return replace(one, value=one.value[-1])
        return jax.tree.map(lambda leaf: leaf.sum(axis=0, dtype=leaf.dtype), one)

    return _each(over, tallies)


def times(tallies: Tallies, size: int) -> Tallies:
    """Where `size` parts were added up."""
    return _each(lambda one: replace(one, times=one.times * size), tallies)


def only_last(tallies: Tallies, is_last: Any) -> Tallies:  # Any: a bool scalar
    """Zeros where this device is not the last one, so that a sum over devices gives the last."""

    def only(one: Tally) -> Tally:
        return replace(one, value=jnp.where(is_last, one.value, jnp.zeros_like(one.value)))

    return _each(lambda one: only(one) if one.kind == "last" else one, tallies)


def has_last(tallies: Tallies) -> bool:
    """Whether any of it is the last of its kind."""
    return any(one.kind == "last" for each in tallies.values() for one in each)


def extremes(tallies: Tallies) -> dict[str, dict[str, Any]]:  # Any: arrays
    """The values that no sum adds up, by kind and name."""
    kinds = sorted({one.kind for each in tallies.values() for one in each} - set(ADDED))
    return {kind: {name: each[0].value for name, each in tallies.items() if each[0].kind == kind} for kind in kinds}


def with_extremes(tallies: Tallies, found: dict[str, dict[str, Any]]) -> Tallies:
    """The tallies with these values instead."""
    values = {name: value for one in found.values() for name, value in one.items()}
    return {name: (replace(each[0], value=values[name]),) if name in values else each for name, each in tallies.items()}


def reported(tallies: Tallies) -> dict[str, jax.Array]:
    """The numbers, once all is added up."""

    def number(one: Tally) -> jax.Array:
        if one.kind != "mean":
            return one.value
        return ratio(one.value, one.times if one.count is None else one.count)

    values = {name: [number(one) for one in each] for name, each in tallies.items()}
    return {name: total_of(each) for name, each in values.items()}


def _each(function: Callable[[Tally], Tally], tallies: Tallies) -> Tallies:
    return {name: tuple(map(function, each)) for name, each in tallies.items()}
