"""Where the leaves of a state lie on a mesh, and putting them there without touching the caller's arrays."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from stepc.language.kinds import Params
from stepc.language.state import Placement, leaves_by_path, path_of


def with_automatic_axes(mesh: Mesh) -> Mesh:
    """The same devices and names, every axis automatic: `jax.make_mesh` makes Explicit ones by default."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def placement_of(params: Params, mesh: Mesh | None, *, rows: tuple[str, ...]) -> Placement:
    """How the caller's parameters lie on the mesh already: (path, spec) of every leaf that is not whole.

    Along the axes of the rows a parameter is whole, whatever the caller had: that is what `dp` says.
    """
    found = ((path, _without(rows, _spec_on(leaf, mesh))) for path, leaf in leaves_by_path(params))
    return tuple(sorted((path, spec) for path, spec in found if any(entry is not None for entry in spec)))


def placement_of_state(shapes: Any, placement: Placement, params: Params) -> Placement:
    """Extend the parameters' placement to a whole state: what mirrors a parameter lies as it does.

    A leaf mirrors the parameter whose path its own path ends in, if their shapes agree.
    """
    specs = dict(placement)
    mirrored = {path: (leaf.shape, specs[path]) for path, leaf in leaves_by_path(params) if path in specs}

    def spec(path: str, leaf: Any) -> PartitionSpec | None:
        ends = [found for name, found in mirrored.items() if path == name or path.endswith(f"/{name}") or not name]
        return next((spec for shape, spec in ends if shape == leaf.shape), None)

    pairs = ((path, spec(path, leaf)) for path, leaf in leaves_by_path(shapes))
    return tuple(sorted((path, spec) for path, spec in pairs if spec is not None))


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
    def kept(entry: Any) -> Any:  # Any: what a PartitionSpec holds, a name, a tuple of names or None
        names = tuple(one for one in (entry if isinstance(entry, tuple) else (entry,)) if one not in (*axes, None))
        return names[0] if len(names) == 1 else names or None

    entries = list(map(kept, spec))
    while entries and entries[-1] is None:
        entries.pop()  # as jax writes the shardings of results: one spec, one spelling, one compilation
    return PartitionSpec(*entries)
