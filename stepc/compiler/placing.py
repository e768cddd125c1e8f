"""Where the leaves of a state lie on a mesh, and putting them there without touching the caller's arrays."""

from collections.abc import Mapping
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from stepc.compiler.layout import Laid, followed, mirrors, part_dimension, specs_of_params
from stepc.core.layout import Spec, axes_of, in_parts, trimmed
from stepc.language.kinds import Params
from stepc.language.state import Placement, State, leaves_by_path, path_of


def with_automatic_axes(mesh: Mesh) -> Mesh:
    """The same devices and names, every axis automatic: `jax.make_mesh` makes Explicit ones by default."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def model_specs(params: Params, mesh: Mesh | None, laid: Laid) -> dict[str, Spec]:
    """How parameters lie along the axes that are not those of the rows: by the rules, or else as they lie already.

    Errors: ShardingError where rules and parameters do not fit.
    """
    leaves = leaves_by_path(params)
    if laid.has_rules:
        return specs_of_params(laid, leaves)
    found = ((path, tuple(_without(laid.rows, _spec_on(leaf, mesh)))) for path, leaf in leaves)
    return {path: spec for path, spec in found if spec}


def placement_of_state(shapes: State, specs: Mapping[str, Spec], laid: Laid) -> Placement:
    """Extend the parameters' specs to a whole state: what mirrors a parameter lies as it does.

    Along the axis that things lie in parts along, the optimizer's state and slots lie so, and with `zero=3` parameters.
    """
    params = dict(leaves_by_path(shapes.params))
    leaves = dict(leaves_by_path(shapes))
    found: dict[str, Spec | None] = {}
    for path, name in mirrors(list(leaves), params).items():
        like, spec = params[name], specs.get(name, ())
        room = path.partition("/")[0]
        if laid.layout.zero == 3 or (laid.layout.zero and room not in ("params", "carry")):
            spec = in_parts(spec, part_dimension(like, spec, laid), laid.axis)
        found[path] = followed(leaves[path].shape, like.shape, spec)
    pairs = ((path, PartitionSpec(*spec)) for path, spec in found.items() if spec)
    return tuple(sorted((path, spec) for path, spec in pairs))


def part_dimensions(params: Params, placement: Placement, laid: Laid) -> tuple[Any, Any]:
    """Trees like the parameters: specs along automatic axes, and the dimension each lies in parts along, or -1."""
    table = dict(placement)

    def spec(path: str) -> PartitionSpec:
        return _without(laid.rows, table.get("/".join(part for part in ("params", path) if part), PartitionSpec()))

    tree = jax.tree.structure(params)
    specs = [spec(path) for path, _ in leaves_by_path(params)]
    dims = [
        part_dimension(leaf, tuple(spec), laid) if laid.layout.zero else -1
        for leaf, spec in zip(jax.tree.leaves(params), specs, strict=True)
    ]
    return tree.unflatten(specs), tree.unflatten(dims)


def sums_of(params: Params, placement: Placement, laid: Laid, *, divided: bool) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The sum of each parameter's gradient as one device has it: whole along the axes of the rows, or in parts."""
    specs, dims = part_dimensions(params, placement, laid)
    sizes = dict(laid.sizes)

    def local(leaf: Any, spec: PartitionSpec, dim: int) -> jax.ShapeDtypeStruct:
        entries = in_parts(tuple(spec), dim, laid.axis if divided else None)
        parts = [prod(sizes[axis] for axis in axes_of((entry,))) for entry in entries]
        full = (*parts, *([1] * (leaf.ndim - len(parts))))
        shape = tuple(size // number for size, number in zip(leaf.shape, full, strict=True))
        return jax.ShapeDtypeStruct(shape, jnp.promote_types(leaf.dtype, jnp.float32))

    lying = jax.tree.leaves(specs, is_leaf=lambda one: isinstance(one, PartitionSpec))
    return tuple(map(local, jax.tree.leaves(params), lying, jax.tree.leaves(dims)))


def specs_of(tree: Any, placement: Placement, *, prefix: str = "") -> Any:
    """A tree of PartitionSpec; what the placement does not name is whole on every device."""
    table = dict(placement)
    return jax.tree_util.tree_map_with_path(
        lambda keys, _: table.get("/".join(part for part in (prefix, path_of(keys)) if part), PartitionSpec()),
        tree,
    )


def shardings_of(tree: Any, placement: Placement, mesh: Mesh) -> Any:
    """A tree of NamedSharding."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs_of(tree, placement),
        is_leaf=lambda one: isinstance(one, PartitionSpec),
    )


def strong(tree: Any) -> Any:
    """The same arrays, none of them of a weak type: jax makes those of Python numbers, and a step gives strong ones."""
    return jax.tree.map(lambda leaf: leaf.astype(leaf.dtype), tree)


def put(tree: Any, shardings: Any | None) -> Any:
    """The leaves as arrays that lie as asked. They may share buffers with the caller's: copy before donating.

    What is to lie on the devices of other processes too, each of them has: it puts its own part there.
    """
    if not all(one.is_fully_addressable for one in jax.tree.leaves(shardings)):
        return jax.tree.map(_spread, tree, shardings)
    arrays = jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else jnp.asarray(np.asarray(leaf)), tree)
    return arrays if shardings is None else jax.device_put(arrays, shardings)


def _spread(leaf: Any, sharding: NamedSharding) -> jax.Array:  # Any: an array, or a number
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    host = np.asarray(jnp.asarray(np.asarray(leaf)))  # in a dtype of jax
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _spec_on(leaf: Any, mesh: Mesh | None) -> PartitionSpec:
    sharding = leaf.sharding if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) else None
    if mesh is None or not isinstance(sharding, NamedSharding):
        return PartitionSpec()
    # Axis types apart, it is the same mesh.
    same = isinstance(sharding.mesh, Mesh) and with_automatic_axes(sharding.mesh) == with_automatic_axes(mesh)
    return sharding.spec if same else PartitionSpec()


def _without(axes: tuple[str, ...], spec: PartitionSpec) -> PartitionSpec:
    return PartitionSpec(*trimmed(tuple(axis for axis in axes_of((entry,)) if axis not in axes) for entry in spec))


def shapes_with(shapes: State, shardings: Any) -> State:  # Any: a tree of NamedSharding, or None without a mesh
    """The shapes of a state, each with where it lies."""
    if shardings is None:
        return shapes
    return jax.tree.map(
        lambda one, lying: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=lying), shapes, shardings
    )
