"""A gradient while it is being added up, and what travels with it. It knows no loop and no mesh."""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from stepc._compiler.metrics import (
    MetricAccumulators,
    add_metrics,
    reduce_vmap_metrics,
    scale_metric_counts,
    zero_metrics,
)
from stepc._language.kinds import BatchRows, Grads, Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LocalMicrobatch:
    """Some rows, and their numbers in the whole batch where anything asks for them."""

    rows: BatchRows
    numbers: Any  # Any: int32 `[rows]`, or None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepInputs:
    """What every cell of a step is given besides its rows.

    Args:
      params: the parameters.
      model_state: the model's own state, or None.
      key: the key of this step, or None.
      scale: by which the loss is multiplied, or None.
      start: the number of the first row on this device; None outside of the devices, where all rows are.
      width: how many rows a device has.
      counts: of each term of the loss the count over the whole sum, where they are counted first.
      parts: the number of cells in that sum.
    """

    params: Params
    model_state: Any  # Any: a tree of the user's
    key: Any  # Any: a typed key
    scale: Any  # Any: a scalar
    start: Any  # Any: an int32 scalar
    counts: Any = None  # Any: a tuple of scalars
    parts: int = field(default=1, metadata={"static": True})
    width: int = field(default=0, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GradientSum:
    """A gradient in the making, and what travels with it.

    Args:
      metrics: what is reported. It stands first: in a scan's model_state, scalars after the gradient cost XLA's buffer
        assignment half a megabyte on the demo's GPT (measured, jax 0.10.2 on CPU).
      grads: a sum, in float32 at least; after `Settle` a value in the dtypes of the parameters.
      model_state: the model's own state after the rows so far.
      finite: `[cells]`, whether the loss of each cell is.
      count: the number that the sum is to be divided by, if all cells count alike.
    """

    metrics: MetricAccumulators
    grads: Grads
    model_state: Any  # Any: a tree of the user's
    finite: Any  # Any: a bool array
    count: float = field(default=1.0, metadata={"static": True})


def add_sums(total: GradientSum, flow: GradientSum, dtype: str | None) -> GradientSum:
    """One more part, in the type of the sum. Carry and flags are the loop's own matter."""
    narrow = flow.grads if dtype is None else jax.tree.map(lambda leaf: leaf.astype(dtype), flow.grads)
    return replace(
        total, metrics=add_metrics(total.metrics, flow.metrics), grads=jax.tree.map(jnp.add, total.grads, narrow)
    )


def zero_sum(shapes: GradientSum, dtype: str | None) -> GradientSum:
    """What is there before the first part."""
    zeros = jax.tree.map(lambda one: jnp.zeros(one.shape, dtype or one.dtype), shapes.grads)
    return GradientSum(zero_metrics(shapes.metrics), zeros, None, None, shapes.count)


def sum_over_vmap(flow: GradientSum, num_lanes: int) -> GradientSum:
    """Added up over a first axis; the model_state is averaged."""
    return GradientSum(
        scale_metric_counts(reduce_vmap_metrics(flow.metrics), num_lanes),
        jax.tree.map(lambda leaf: leaf.sum(axis=0, dtype=leaf.dtype), flow.grads),
        jax.tree.map(lambda leaf: (leaf.sum(axis=0) / num_lanes).astype(leaf.dtype), flow.model_state),
        flow.finite.all(axis=0),
        flow.count * num_lanes,
    )


def scale_counts(flow: GradientSum, size: int) -> GradientSum:
    """Where `size` parts were added up."""
    return replace(flow, metrics=scale_metric_counts(flow.metrics, size), count=flow.count * size)
