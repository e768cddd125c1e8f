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

from stepc.compiler import flow as flows
from stepc.compiler import tally
from stepc.compiler.flow import Flow, Given
from stepc.compiler.instructions import AverageCarry, Compute, Gather, Reduce, Scatter
from stepc.compiler.layers import by_layer
from stepc.core.layout import in_parts
from stepc.core.terms import wide


@dataclass(frozen=True)
class Place:
    """Where the program runs.

    Args:
      mesh: a mesh of Auto axes, or None for a single device.
      rows: the axes that rows lie along and a mean is taken over, the outermost first: they are manual.
      params: a tree of PartitionSpec, one for each parameter; they name no axis of `rows`.
      parts: a tree of whole numbers, the dimension along which each parameter's gradient lies in parts, or -1.
      axis: the axis of those parts; None if there are none.
      divided: whether the parameters themselves lie in parts.
      carry: a tree of PartitionSpec for the model's own state.
      numbered: whether rows are to know their numbers.
    """

    mesh: Mesh | None
    rows: tuple[str, ...]
    params: Any  # Any: the tree of the parameters
    parts: Any  # Any: the tree of the parameters
    axis: str | None
    divided: bool
    carry: Any  # Any: the tree of the model's own state
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
        return jax.tree.map(lambda dim: PartitionSpec(*in_parts((), dim, axis)), self.parts)

    def specs(self, *, divided: bool) -> Any:  # Any: the tree of the parameters
        """How it lies along all axes."""
        axis = self.axis if divided else None
        return jax.tree.map(lambda dim, spec: PartitionSpec(*in_parts(tuple(spec), dim, axis)), self.parts, self.params)

    def laid(self, tree: Any, *, divided: bool) -> Any:
        """A tree like the parameters, told to lie so."""
        if self.mesh is None or (not self.others and self.axis is None):
            return tree
        return jax.lax.with_sharding_constraint(tree, self.specs(divided=divided))

    def divide(self, tree: Any, *, divided: bool) -> Any:
        """The same where anything lies in parts; else the tree as it is."""
        return tree if self.axis is None else self.laid(tree, divided=divided)


def reduced(one: Reduce, flow: Flow, given: Given, place: Place) -> Flow:
    """Everything added up over devices, but for what is scattered already."""
    metrics = flow.metrics
    if tally.has_last(metrics):
        metrics = tally.only_last(metrics, part_of(one.axes, given, place) == place.size_of(one.axes) - 1)
    found = tally.extremes(metrics)
    specs = (jax.tree.map(lambda _: PartitionSpec(), metrics), place.params if jax.tree.leaves(flow.grads) else ())
    metrics, grads = over_devices(partial(_added_up, one, place.parts), (metrics, flow.grads), specs, place)
    across = {"max": jax.lax.pmax, "min": jax.lax.pmin}
    for kind, values in found.items():
        spec = jax.tree.map(lambda _: PartitionSpec(), values)
        found[kind] = over_devices(lambda tree, kind=kind: across[kind](tree, one.axes), values, spec, place)
    flow = replace(flow, metrics=tally.with_extremes(metrics, found), grads=grads)
    return flows.times(flow, place.size_of(one.axes))


def scattered(one: Scatter, flow: Flow, place: Place) -> Flow:
    """Each device's own part of the sum of the gradient."""

    def summed(grads: Any) -> Any:
        def part(leaf: jax.Array, dim: int) -> jax.Array:
            if dim < 0:
                return leaf
            narrow = leaf if one.dtype is None else leaf.astype(one.dtype)
            summed = jax.lax.psum_scatter(narrow, one.axis, scatter_dimension=dim, tiled=True)
            return summed.astype(leaf.dtype)

        return jax.tree.map(part, grads, place.parts)

    return replace(flow, grads=over_devices(summed, flow.grads, place.params, place))


def gathered(one: Gather, given: Given, place: Place) -> Given:
    """Whole parameters."""

    def whole(params: Any) -> Any:
        return jax.tree.map(
            lambda leaf, dim: leaf if dim < 0 else jax.lax.all_gather(leaf, one.axis, axis=dim, tiled=True),
            params, place.parts,
        )  # fmt: skip

    return replace(given, params=over_devices(whole, given.params, place.params, place))


def layered(one: Compute, call: Any, given: Given, place: Place) -> Any:  # Any, twice: a loss
    """The loss on parameters in parts: it makes them whole as it uses them, a layer at a time in a scan over layers."""
    axis = one.layered
    if axis is None:
        return call

    def whole(leaf: jax.Array, dim: int, spec: PartitionSpec, dtype: np.dtype) -> jax.Array:
        def gather(part: jax.Array) -> jax.Array:
            return jax.lax.all_gather(part.astype(dtype), axis, axis=dim, tiled=True)

        def scatter(grad: jax.Array) -> jax.Array:
            wider = grad.astype(one.dtype or wide(leaf.dtype))
            return jax.lax.psum_scatter(wider, axis, scatter_dimension=dim, tiled=True).astype(leaf.dtype)

        @jax.custom_vjp
        def gathered(part: jax.Array) -> jax.Array:
            return over_devices(gather, part, spec, place)

        gathered.defvjp(
            lambda part: (gathered(part), None), lambda _, grad: (over_devices(scatter, grad, spec, place),)
        )
        return gathered(leaf)

    def shape(leaf: jax.Array, dim: int) -> jax.ShapeDtypeStruct:
        times = place.size_of((axis,))
        sizes = tuple(size * times if number == dim else size for number, size in enumerate(leaf.shape))
        return jax.ShapeDtypeStruct(sizes, leaf.dtype)

    shapes = jax.tree.map(shape, given.params, place.parts)
    return by_layer(call, shapes, place.parts, place.params, whole)


def averaged(one: AverageCarry, flow: Flow, place: Place) -> Flow:
    """The model's own state, averaged."""
    total = over_devices(lambda tree: jax.lax.psum(tree, one.axes), flow.carry, place.carry, place)
    return replace(flow, carry=jax.tree.map(lambda leaf: (leaf / one.num_devices).astype(leaf.dtype), total))


def over_devices(function: Callable[[Any], Any], tree: Any, specs: Any, place: Place) -> Any:
    """The function in a region that is manual over all axes; the mesh is the context's, as jax demands in another."""
    if not place.others or not jax.tree.leaves(tree):
        return function(tree)
    return jax.shard_map(
        function, in_specs=(specs,), out_specs=specs, axis_names=set(place.others), check_vma=False
    )(tree)  # fmt: skip


def part_of(axes: tuple[str, ...], given: Given, place: Place) -> Any:  # Any: an int32 scalar
    """Which part along these axes this device has."""
    part = jnp.zeros((), jnp.int32)
    for axis in axes:
        part = part * place.size_of((axis,)) + coordinate(axis, given, place)
    return part


def coordinate(axis: str, given: Given, place: Place) -> Any:  # Any: an int32 scalar
    """Where this device is along an axis, from the number of its first row."""
    inner = place.size_of(place.rows[place.rows.index(axis) + 1 :])
    return given.start // given.width // inner % place.size_of((axis,))


def _added_up(one: Reduce, parts: Any, summed: tuple[Any, Any]) -> tuple[Any, Any]:
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
