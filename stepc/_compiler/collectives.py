"""What devices say to each other: sums, parts and wholes over mesh axes. With `lower`, the only file that names these.

It all stands in a region of its own that is manual over all axes: in a partly automatic region XLA gathers
model-sharded operands of tiled collectives, and bfloat16 sums abort the process on CPU.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from stepc._compiler.gradient import GradientSum, StepInputs, scale_counts
from stepc._compiler.layers import by_layer
from stepc._compiler.metrics import extreme_values, has_last_metrics, mask_last_metrics, replace_extremes
from stepc._compiler.schedule import AllGather, AllReduce, AverageModelState, Compute, ReduceScatter
from stepc._core.sharding import sharded_spec
from stepc._language.terms import accumulation_dtype


@dataclass(frozen=True)
class ManualRegion:
    """Where the program runs.

    Args:
      mesh: a mesh of Auto axes, or None for a single device.
      rows: the axes that rows lie along and a mean is taken over, the outermost first: they are manual.
      params: a tree of PartitionSpec, one for each parameter; they name no axis of `rows`.
      parts: a tree of whole numbers, the dimension along which each parameter's gradient lies in parts, or -1.
      axis: the axis of those parts; None if there are none.
      divided: whether the parameters themselves lie in parts.
      model_state: a tree of PartitionSpec for the model's own state.
      numbered: whether rows are to know their numbers.
    """

    mesh: Mesh | None
    rows: tuple[str, ...]
    params: Any  # Any: the tree of the parameters
    parts: Any  # Any: the tree of the parameters
    axis: str | None
    divided: bool
    model_state: Any  # Any: the tree of the model's own state
    numbered: bool

    @property
    def others(self) -> frozenset[str]:
        """The axes that stay automatic."""
        return frozenset(self.mesh.axis_names if self.mesh else ()) - set(self.rows)

    def size_of(self, axes: tuple[str, ...]) -> int:
        """How many devices there are along these axes."""
        return prod(self.mesh.shape[axis] for axis in axes) if self.mesh else 1

    def manual_specs(self, *, divided: bool) -> Any:  # Any: the tree of the parameters
        """How a tree like the parameters lies along `rows`: whole, or in parts."""
        axis = self.axis if divided else None
        return jax.tree.map(lambda dim: PartitionSpec(*sharded_spec((), dim, axis)), self.parts)

    def specs(self, *, divided: bool) -> Any:  # Any: the tree of the parameters
        """How it lies along all axes."""
        axis = self.axis if divided else None
        return jax.tree.map(
            lambda dim, spec: PartitionSpec(*sharded_spec(tuple(spec), dim, axis)), self.parts, self.params
        )

    def laid(self, tree: Any, *, divided: bool) -> Any:
        """A tree like the parameters, told to lie so."""
        if self.mesh is None or (not self.others and self.axis is None):
            return tree
        return jax.lax.with_sharding_constraint(tree, self.specs(divided=divided))

    def divide(self, tree: Any, *, divided: bool) -> Any:
        """The same where anything lies in parts; else the tree as it is."""
        return tree if self.axis is None else self.laid(tree, divided=divided)


def all_reduce(one: AllReduce, flow: GradientSum, given: StepInputs, place: ManualRegion) -> GradientSum:
    """Everything added up over devices, but for what is scattered already."""
    metrics = flow.metrics
    if has_last_metrics(metrics):
        metrics = mask_last_metrics(metrics, shard_index(one.axes, given, place) == place.size_of(one.axes) - 1)
    found = extreme_values(metrics)
    specs = (jax.tree.map(lambda _: PartitionSpec(), metrics), place.params if jax.tree.leaves(flow.grads) else ())
    metrics, grads = fully_manual(partial(_added_up, one, place.parts), (metrics, flow.grads), specs, place)
    across = {"max": jax.lax.pmax, "min": jax.lax.pmin}
    for kind, values in found.items():
        spec = jax.tree.map(lambda _: PartitionSpec(), values)
        found[kind] = fully_manual(lambda tree, kind=kind: across[kind](tree, one.axes), values, spec, place)
    flow = replace(flow, metrics=replace_extremes(metrics, found), grads=grads)
    return scale_counts(flow, place.size_of(one.axes))


def reduce_scatter(one: ReduceScatter, flow: GradientSum, place: ManualRegion) -> GradientSum:
    """Each device's own part of the sum of the gradient."""

    def summed(grads: Any) -> Any:
        def part(leaf: jax.Array, dim: int) -> jax.Array:
            if dim < 0:
                return leaf
            narrow = leaf if one.dtype is None else leaf.astype(one.dtype)
            summed = jax.lax.psum_scatter(narrow, one.axis, scatter_dimension=dim, tiled=True)
            return summed.astype(leaf.dtype)

        return jax.tree.map(part, grads, place.parts)

    return replace(flow, grads=fully_manual(summed, flow.grads, place.params, place))


def all_gather(one: AllGather, given: StepInputs, place: ManualRegion) -> StepInputs:
    """Whole parameters."""

    def whole(params: Any) -> Any:
        return jax.tree.map(
            lambda leaf, dim: leaf if dim < 0 else jax.lax.all_gather(leaf, one.axis, axis=dim, tiled=True),
            params, place.parts,
        )  # fmt: skip

    return replace(given, params=fully_manual(whole, given.params, place.params, place))


def gather_by_layer(one: Compute, call: Any, given: StepInputs, place: ManualRegion) -> Any:  # Any, twice: a loss
    """The loss on parameters in parts: it makes them whole as it uses them, a layer at a time in a scan over layers."""
    axis = one.layered
    if axis is None:
        return call

    def whole(leaf: jax.Array, dim: int, spec: PartitionSpec, dtype: np.dtype) -> jax.Array:
        def gather(part: jax.Array) -> jax.Array:
            return jax.lax.all_gather(part.astype(dtype), axis, axis=dim, tiled=True)

        def scatter(grad: jax.Array) -> jax.Array:
            wider = grad.astype(one.dtype or accumulation_dtype(leaf.dtype))
            return jax.lax.psum_scatter(wider, axis, scatter_dimension=dim, tiled=True).astype(leaf.dtype)

        @jax.custom_vjp
        def gathered(part: jax.Array) -> jax.Array:
            return fully_manual(gather, part, spec, place)

        gathered.defvjp(
            lambda part: (gathered(part), None), lambda _, grad: (fully_manual(scatter, grad, spec, place),)
        )
        return gathered(leaf)

    def shape(leaf: jax.Array, dim: int) -> jax.ShapeDtypeStruct:
        times = place.size_of((axis,))
        sizes = tuple(size * times if number == dim else size for number, size in enumerate(leaf.shape))
        return jax.ShapeDtypeStruct(sizes, leaf.dtype)

    shapes = jax.tree.map(shape, given.params, place.parts)
    return by_layer(call, shapes, place.parts, place.params, whole)


def average_model_state(one: AverageModelState, flow: GradientSum, place: ManualRegion) -> GradientSum:
    """The model's own state, averaged."""
    total = fully_manual(lambda tree: jax.lax.psum(tree, one.axes), flow.model_state, place.model_state, place)
    return replace(flow, model_state=jax.tree.map(lambda leaf: (leaf / one.num_devices).astype(leaf.dtype), total))


def fully_manual(function: Callable[[Any], Any], tree: Any, specs: Any, place: ManualRegion) -> Any:
    """The function in a region that is manual over all axes; the mesh is the context's, as jax demands in another."""
    if not place.others or not jax.tree.leaves(tree):
        return function(tree)
    return jax.shard_map(
        function, in_specs=(specs,), out_specs=specs, axis_names=set(place.others), check_vma=False
    )(tree)  # fmt: skip


def shard_index(axes: tuple[str, ...], given: StepInputs, place: ManualRegion) -> Any:  # Any: an int32 scalar
    """Which part along these axes this device has."""
    part = jnp.zeros((), jnp.int32)
    for axis in axes:
        part = part * place.size_of((axis,)) + axis_index(axis, given, place)
    return part


def axis_index(axis: str, given: StepInputs, place: ManualRegion) -> Any:  # Any: an int32 scalar
    """Where this device is along an axis, from the number of its first row."""
    inner = place.size_of(place.rows[place.rows.index(axis) + 1 :])
    return given.start // given.width // inner % place.size_of((axis,))


def _added_up(one: AllReduce, parts: Any, summed: tuple[Any, Any]) -> tuple[Any, Any]:
    """The sum of metrics and gradients, in one collective for all that are summed over the same axes."""
    metrics, grads = summed
    leaves, tree = jax.tree.flatten(grads)
    narrow = leaves if one.dtype is None else [leaf.astype(one.dtype) for leaf in leaves]
    divided = [one.scattered is not None and dim >= 0 for dim in jax.tree.leaves(parts)] if leaves else []
    whole = [leaf for leaf, is_part in zip(narrow, divided, strict=True) if not is_part]
    metrics, whole = jax.lax.psum((metrics, whole), one.axes)
    rest = tuple(axis for axis in one.axes if axis != one.scattered)
    part = [leaf for leaf, is_part in zip(narrow, divided, strict=True) if is_part]
    part = jax.lax.psum(part, rest) if rest and part else part
    found = (iter(whole), iter(part))
    total = [next(found[is_part]) for is_part in divided]
    return metrics, tree.unflatten([new.astype(leaf.dtype) for new, leaf in zip(total, leaves, strict=True)])
