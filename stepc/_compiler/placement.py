"""Where every leaf of a state lies, as a table and as a drawing. It is told, it decides nothing."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from stepc._compiler.multihost import RowSharding, check_program, checked_global_batch, global_batch, mesh_processes
from stepc._compiler.normalize import NormalForm, shape_of
from stepc._compiler.plan import PlannedLeaf
from stepc._compiler.sharding import BoundRules, followed, mirrors, shard_dimension, specs_of_batch, specs_of_params
from stepc._compiler.validation import check_batch
from stepc._core.sharding import Spec, axes_of, normalized_spec, sharded_spec, spec_text
from stepc._language.kinds import Batch, Params
from stepc._language.state import Placement, State, leaves_by_path, path_of

_MOST_PARTS = 8  # of a dimension that is drawn part by part
_COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red")


@dataclass(frozen=True)
class LeafSharding:
    """One leaf of a state.

    Args:
      path: its keys joined by `/`.
      shape: of the whole leaf.
      dtype: of its numbers.
      spec: how it lies along the axes of the mesh.
      bytes_: what one device holds of it.
      follows: which parameter it mirrors.
      because: why it stays whole along an axis that others lie in parts along, and what that costs.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: PartitionSpec
    bytes_: int
    follows: str = ""
    because: str = ""

    @property
    def about(self) -> str:
        """Both in one."""
        return ", ".join(text for text in (self.follows, self.because) if text)

    @property
    def lying(self) -> str:
        """The spec as it is written in source, or "whole"."""
        return spec_text(tuple(self.spec)) if any(self.spec) else "whole"


@dataclass(frozen=True, repr=False)
class ShardingTable:
    """Every leaf of a state, and where it lies: `str` is a table with drawings, `rich.print` shows it in colours."""

    rows: tuple[LeafSharding, ...]
    mesh: Mesh | None

    @property
    def bytes_(self) -> int:
        """What one device holds of the state."""
        return sum(row.bytes_ for row in self.rows)

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return "\n".join(self._lines({}))

    def __rich__(self) -> str:
        specs = dict.fromkeys(row.spec for row in self.rows if any(row.spec))
        return "\n".join(self._lines({spec: _COLOURS[n % len(_COLOURS)] for n, spec in enumerate(specs)}))

    def _lines(self, colours: Mapping[PartitionSpec, str]) -> Iterator[str]:
        mesh = (
            "a single device" if self.mesh is None else ", ".join(f"{n}={size}" for n, size in self.mesh.shape.items())
        )
        yield f"state on {mesh}: {len(self.rows)} leaves, {self.bytes_:,} bytes on each device"
        cells = [
            (row.path, f"{row.dtype}{list(row.shape)}", row.lying, f"{row.bytes_:,} B", row.about) for row in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for row, cell in zip(self.rows, cells, strict=True):
            path, form, spec, size, about = (
                text.rjust(width) if n == 3 else text.ljust(width)
                for n, (text, width) in enumerate(zip(cell, widths, strict=True))
            )
            colour = colours.get(row.spec)
            spec = spec if colour is None else f"[{colour}]{spec}[/{colour}]"
            form = form.replace("[", r"\[") if colours else form
            yield f"  {path}  {form}  {spec}  {size}  {about}".rstrip()
        for spec in dict.fromkeys(row.spec for row in self.rows if any(row.spec)):
            likes = [row for row in self.rows if row.spec == spec]
            more = f" and {len(likes) - 1} more" if len(likes) > 1 else ""
            yield ""
            yield f"  {likes[0].path}{more}: {likes[0].lying}"
            yield from (f"    {line}" for line in _drawn(likes[0], self.mesh))


def sharding_table(state: State, laid: BoundRules, mesh: Mesh | None) -> ShardingTable:
    """The table of a state that lies on the mesh."""
    leaves = leaves_by_path(state)
    params = dict(leaves_by_path(state.params))
    follows = mirrors([path for path, _ in leaves], params)
    specs = dict(state.placement)
    rows = []
    for path, leaf in leaves:
        spec = specs.get(path, PartitionSpec())
        shape = leaf.shape if mesh is None else NamedSharding(mesh, spec).shard_shape(leaf.shape)
        whole = _bytes(leaf)
        bytes_ = whole * prod(shape) // max(prod(leaf.shape), 1)
        name = follows.get(path)
        row = LeafSharding(path, leaf.shape, str(leaf.dtype), spec, bytes_)
        rows.append(_told(row, name, None if name is None else params[name], laid))
    return ShardingTable(tuple(rows), mesh)


def planned_leaves(state: State, laid: BoundRules, mesh: Mesh | None) -> tuple[PlannedLeaf, ...]:
    """The leaves as the plan lists them, in the order in which jax flattens them."""

    def lies(row: LeafSharding) -> str:
        whole = ["whole on every device", *([row.because] if row.because else [])]
        return row.lying if any(row.spec) else ", ".join(whole)

    pairs = zip(sharding_table(state, laid, mesh).rows, jax.tree.leaves(state), strict=True)
    return tuple(PlannedLeaf(row.path, row.shape, row.dtype, _bytes(leaf), lies(row)) for row, leaf in pairs)


def _bytes(leaf: Any) -> int:  # Any: an array, or its shape
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return int(jax.eval_shape(jax.random.key_data, leaf).size) * 4
    return int(leaf.size) * leaf.dtype.itemsize


def _told(
    row: LeafSharding, name: str | None, like: Any, laid: BoundRules
) -> LeafSharding:  # Any: the parameter it mirrors
    room = row.path.partition("/")[0]
    if room not in ("params", "opt_state", "slots"):
        return row
    if name is None or followed(row.shape, like.shape, ()) is None:
        return replace(row, follows="follows no parameter" if name is None else f"follows {name}, but not its shape")
    if laid.layout.zero >= (3 if room == "params" else 1) and laid.axis not in axes_of(row.spec):
        instead = f"{row.bytes_:,} B instead of {row.bytes_ // laid.num_parts:,} B"
        why = f"{instead}: no free dimension divides by {laid.num_parts}, the size of {laid.axis}"
        row = replace(row, because=why)
    return row if room == "params" else replace(row, follows=f"follows {name}")


def _drawn(row: LeafSharding, mesh: Mesh | None) -> Iterator[str]:
    """The leaf cut into its parts, each with the numbers of the devices that hold it."""
    if mesh is None:
        return
    cut = [dim for dim, entry in enumerate(row.spec) if entry is not None]
    parts = [prod(mesh.shape[axis] for axis in axes_of((row.spec[dim],))) for dim in cut]
    if len(cut) > 2 or max(parts) > _MOST_PARTS:
        yield " × ".join(f"{number} parts of dimension {dim}" for dim, number in zip(cut, parts, strict=True))
        return
    table: dict[tuple[int, ...], list[int]] = {}
    for device, index in NamedSharding(mesh, row.spec).devices_indices_map(row.shape).items():
        place = tuple(
            (index[dim].start or 0) * number // row.shape[dim] for dim, number in zip(cut, parts, strict=True)
        )
        table.setdefault(place, []).append(device.id)
    heights, widths = (parts[0], parts[1]) if len(cut) == 2 else (1, parts[0])
    cells = {
        (top, left): ",".join(map(str, sorted(table[(top, left) if len(cut) == 2 else (left,)])))
        for top, left in product(range(heights), range(widths))
    }
    yield from _boxes(cells, heights, widths)


def _boxes(cells: Mapping[tuple[int, int], str], heights: int, widths: int) -> Iterator[str]:
    width = max(map(len, cells.values())) + 2
    bar = "─" * width
    yield f"┌{'┬'.join([bar] * widths)}┐"
    for top in range(heights):
        if top:
            yield f"├{'┼'.join([bar] * widths)}┤"
        yield f"│{'│'.join(cells[top, left].center(width) for left in range(widths))}│"
    yield f"└{'┴'.join([bar] * widths)}┘"


def with_automatic_axes(mesh: Mesh) -> Mesh:
    """The same devices and names, every axis automatic: `jax.make_mesh` makes Explicit ones by default."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def model_axis_specs(params: Params, mesh: Mesh | None, laid: BoundRules) -> dict[str, Spec]:
    """How parameters lie along the axes that are not those of the rows: by the rules, or else as they lie already.

    Errors: ShardingError where rules and parameters do not fit.
    """
    leaves = leaves_by_path(params)
    if laid.has_rules:
        return specs_of_params(laid, leaves)
    found = ((path, tuple(_without(laid.rows, _spec_on(leaf, mesh)))) for path, leaf in leaves)
    return {path: spec for path, spec in found if spec}


def placement_of_state(shapes: State, specs: Mapping[str, Spec], laid: BoundRules) -> Placement:
    """Extend the parameters' specs to a whole state: what mirrors a parameter lies as it does.

    Along the axis that things lie in parts along, the optimizer's state and slots lie so, and with `zero=3` parameters.
    """
    params = dict(leaves_by_path(shapes.params))
    leaves = dict(leaves_by_path(shapes))
    found: dict[str, Spec | None] = {}
    for path, name in mirrors(list(leaves), params).items():
        like, spec = params[name], specs.get(name, ())
        room = path.partition("/")[0]
        if laid.layout.zero == 3 or (laid.layout.zero and room not in ("params", "model_state")):
            spec = sharded_spec(spec, shard_dimension(like, spec, laid), laid.axis)
        found[path] = followed(leaves[path].shape, like.shape, spec)
    pairs = ((path, PartitionSpec(*spec)) for path, spec in found.items() if spec)
    return tuple(sorted((path, spec) for path, spec in pairs))


def shard_dimensions(params: Params, placement: Placement, laid: BoundRules) -> tuple[Any, Any]:
    """Trees like the parameters: specs along automatic axes, and the dimension each lies in parts along, or -1."""
    table = dict(placement)

    def spec(path: str) -> PartitionSpec:
        return _without(laid.rows, table.get("/".join(part for part in ("params", path) if part), PartitionSpec()))

    tree = jax.tree.structure(params)
    specs = [spec(path) for path, _ in leaves_by_path(params)]
    dims = [
        shard_dimension(leaf, tuple(spec), laid) if laid.layout.zero else -1
        for leaf, spec in zip(jax.tree.leaves(params), specs, strict=True)
    ]
    return tree.unflatten(specs), tree.unflatten(dims)


def gradient_shapes(
    params: Params, placement: Placement, laid: BoundRules, *, divided: bool
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The sum of each parameter's gradient as one device has it: whole along the axes of the rows, or in parts."""
    specs, dims = shard_dimensions(params, placement, laid)
    sizes = dict(laid.sizes)

    def local(leaf: Any, spec: PartitionSpec, dim: int) -> jax.ShapeDtypeStruct:
        entries = sharded_spec(tuple(spec), dim, laid.axis if divided else None)
        parts = [prod(sizes[axis] for axis in axes_of((entry,))) for entry in entries]
        full = (*parts, *([1] * (leaf.ndim - len(parts))))
        shape = tuple(size // number for size, number in zip(leaf.shape, full, strict=True))
        return jax.ShapeDtypeStruct(shape, jnp.promote_types(leaf.dtype, jnp.float32))

    lying = jax.tree.leaves(specs, is_leaf=lambda one: isinstance(one, PartitionSpec))
    return tuple(map(local, jax.tree.leaves(params), lying, jax.tree.leaves(dims)))


def specs_by_path(tree: Any, placement: Placement, *, prefix: str = "") -> Any:
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
        specs_by_path(tree, placement),
        is_leaf=lambda one: isinstance(one, PartitionSpec),
    )


def without_weak_types(tree: Any) -> Any:
    """The same arrays, none of them of a weak type: jax makes those of Python numbers, and a step gives strong ones."""
    return jax.tree.map(lambda leaf: leaf.astype(leaf.dtype), tree)


def place_on_devices(tree: Any, shardings: Any | None) -> Any:
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
    return PartitionSpec(
        *normalized_spec(tuple(axis for axis in axes_of((entry,)) if axis not in axes) for entry in spec)
    )


def shapes_with(shapes: State, shardings: Any) -> State:  # Any: a tree of NamedSharding, or None without a mesh
    """The shapes of a state, each with where it lies."""
    if shardings is None:
        return shapes
    return jax.tree.map(
        lambda one, lying: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=lying), shapes, shardings
    )


@dataclass(frozen=True)
class BatchPlacement:
    """The batches of a step.

    Args:
      mesh: a mesh of Auto axes, or None for a single device.
      decision: what was decided of the pipeline.
    """

    mesh: Mesh | None
    decision: NormalForm

    @cached_property
    def lying(self) -> NamedSharding | None:
        """How every leaf lies; None if that depends on the leaf, or on a single device."""
        if self.mesh is None or self._by_leaf:
            return None
        leading = [None] if self.decision.repeats > 1 else []
        return NamedSharding(self.mesh, PartitionSpec(*leading, self.decision.rows))

    @property
    def options(self) -> dict[str, Any]:  # Any: what `jax.jit` takes
        """What the program is told of where its arguments lie."""
        return {} if self.lying is None else {"in_shardings": (None, self.lying)}

    @cached_property
    def _by_leaf(self) -> bool:
        return bool(self.decision.laid.layout.batch or self.decision.laid.layout.automatic)

    def shardings(self, batch: Batch) -> Any:  # Any: the batch's tree, of shardings or None
        """How each leaf of a batch lies. Errors: ShardingError with every rule of `dp(batch=...)` that does not fit."""
        if self.mesh is None or not self._by_leaf:
            return jax.tree.map(lambda _: self.lying, batch)
        leaves = leaves_by_path(batch)
        specs = specs_of_batch(self.decision.laid, leaves, int(self.decision.repeats > 1))
        tree = jax.tree.structure(batch)
        return tree.unflatten([NamedSharding(self.mesh, PartitionSpec(*specs[path])) for path, _ in leaves])

    def shapes(self, batch: Batch) -> Batch:
        """The batch as shapes that lie so; host arrays lie nowhere, as jax traces them and device arrays apart."""

        def shape(leaf: Any, lying: NamedSharding | None) -> jax.ShapeDtypeStruct:
            lies = isinstance(leaf, jax.Array) or self._by_leaf
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=lying if lies else None)

        leaves, tree = jax.tree.flatten(batch)
        lying = jax.tree.leaves(self.shardings(batch), is_leaf=lambda one: one is None)
        return tree.unflatten(list(map(shape, leaves, lying)))

    def placed(self, batch: Batch) -> Batch:
        """The batch, moved if it does not lie as the program takes it. The only loop of a call.

        On several processes host arrays are the rows of this one.
        """
        if mesh_processes(self.mesh):
            return self._placed_by_all(batch)
        if self.mesh is not None and self._by_leaf:
            check_batch(batch, self.decision.core, shapes_too=False)
            return place_on_devices(batch, self.shardings(batch))
        lying = self.lying
        for leaf in jax.tree.leaves(batch):
            if type(leaf) is np.ndarray:
                continue
            if not isinstance(leaf, jax.Array):
                check_batch(batch, self.decision.core, shapes_too=False)
            elif lying is not None and leaf.sharding != lying:
                return place_on_devices(batch, lying)
        return batch

    def check(self, batch: Batch) -> None:
        """Say what is wrong with a batch that a call failed on; on several processes that was said of the whole."""
        if not mesh_processes(self.mesh):
            check_batch(batch, self.decision.core, shapes_too=False)

    def compare(self, program: Any, state: Any, batch: Batch) -> None:  # Any: a jitted function; a state
        """Let several processes compare their programs, once for a form of batch."""
        check_program(program, self._compared, state, batch, self.mesh)

    def put(self, batch: Batch) -> Batch:
        """The batch on the devices; that the rows of several processes fit together is left to be checked."""
        if mesh_processes(self.mesh):
            return global_batch(batch, self._rows, self.decision.core)
        return jax.device_put(batch, None if self.mesh is None else self.shardings(batch))

    def _placed_by_all(self, batch: Batch) -> Batch:
        for _, leaf in leaves_by_path(batch):
            if not isinstance(leaf, np.ndarray | jax.Array):
                check_batch(batch, self.decision.core, shapes_too=False)
            elif isinstance(leaf, np.ndarray) or leaf.is_fully_addressable:
                return checked_global_batch(batch, self._rows, self.decision.core)
        return global_batch(batch, self._rows, self.decision.core)

    @cached_property
    def _compared(self) -> set[str]:
        return set()

    @cached_property
    def _rows(self) -> RowSharding:
        if self.mesh is None:
            raise ValueError("several processes have a mesh")
        return RowSharding(self.mesh, self.decision.rows, int(self.decision.repeats > 1), self.shardings)


def shapes_of(tree: Any) -> Any:
    """Shapes and dtypes, and nothing of where they lie."""
    return jax.tree.map(shape_of, tree)
