"""How a state and a batch are placed on a mesh: from specs to shardings, shard shapes and arrays on devices."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from stepc._compiler.multihost import RowSharding, check_program, checked_global_batch, global_batch, mesh_processes
from stepc._compiler.normalize import NormalForm, shape_of
from stepc._compiler.padding import cut_along, padded, padded_along, padded_shape
from stepc._compiler.plan import LeafSharding, ShardingTable
from stepc._compiler.sharding import (
    BoundRules,
    counts_matrices,
    mirrored_params,
    mirrored_spec,
    shard_dimension,
    specs_of_batch,
    specs_of_params,
    why_unsharded,
)
from stepc._compiler.validation import check_batch
from stepc._core.nodes import Turn
from stepc._core.sharding import Spec, axes_of, normalized_spec, sharded_spec
from stepc._language.kinds import Batch, Params
from stepc._language.model_state import rules_by_leaf
from stepc._language.state import (
    Place,
    Placement,
    State,
    as_arrays,
    is_typed_key,
    key_data,
    leaves_by_path,
    memory_of,
    own_shapes,
    padded_places,
    path_of,
    state_of_turn,
)


def with_automatic_axes(mesh: Mesh) -> Mesh:
    """The same devices and names, every axis automatic: `jax.make_mesh` makes Explicit ones by default."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def model_axis_specs(
    params: Params, names: Mapping[str, Spec], mesh: Mesh | None, rules: BoundRules
) -> dict[str, Spec]:
    """How parameters are sharded over the automatic axes: by the rules, or as the caller's arrays are.

    Args:
      names: of the dimensions of parameters, by path.
    Errors: ShardingError where rules and parameters do not fit.
    """
    leaves = leaves_by_path(params)
    if rules.has_rules:
        return specs_of_params(rules, leaves, names)
    found = ((path, tuple(_without(rules.manual_rows, _spec_on(leaf, mesh)))) for path, leaf in leaves)
    return {path: spec for path, spec in found if spec}


def _spec_on(leaf: Any, mesh: Mesh | None) -> PartitionSpec:  # Any: an array, its shape, or a number
    sharding = leaf.sharding if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) else None
    if mesh is None or not isinstance(sharding, NamedSharding):
        return PartitionSpec()
    # Axis types apart, it is the same mesh.
    is_same = isinstance(sharding.mesh, Mesh) and with_automatic_axes(sharding.mesh) == with_automatic_axes(mesh)
    return sharding.spec if is_same else PartitionSpec()


def _without(axes: tuple[str, ...], spec: PartitionSpec) -> PartitionSpec:
    kept = (tuple(axis for axis in axes_of((entry,)) if axis not in axes) for entry in spec)
    return PartitionSpec(*normalized_spec(kept))


def placement_of_state(
    shapes: State,
    specs: Mapping[str, Spec],
    names: Mapping[str, Spec],
    rules: BoundRules,
    model_state: tuple[tuple[str, str], ...],
    matrices: tuple[str, ...],
) -> Placement:
    """Extend the specs of parameters to a state: what mirrors a parameter is sharded as it is.

    The names of the dimensions of parameters stay with them.
    Leaves of the model state whose rule, by `model_state`, is "rows" are sharded as the rows of a batch are.

    `zero` shards the optimizer state and the slots besides, and at level 3 the parameters. `matrices` are the paths of
    the parameters that an optimizer multiplies as such.
    """
    params = dict(leaves_by_path(shapes.params))
    leaves = dict(leaves_by_path(shapes))
    found: dict[str, Spec | None] = {}
    for path, name in mirrored_params(list(leaves), params).items():
        like, spec = params[name], specs.get(name, ())
        field = path.partition("/")[0]
        if rules.layout.zero == 3 or (rules.layout.zero and field not in ("params", "model_state")):
            dim = shard_dimension(like, spec, rules, is_matrix=name in matrices)
            spec = sharded_spec(spec, dim, rules.shard_axes)
        found[path] = mirrored_spec(leaves[path].shape, like.shape, spec)
    rows = normalized_spec((rules.rows,))
    of_model_state = zip(
        leaves_by_path(shapes.model_state), rules_by_leaf(model_state, shapes.model_state), strict=True
    )
    for (path, _), rule in of_model_state:
        if rule == "rows":
            found[_in("model_state", path)] = rows
    named, sizes = {_in("params", path): one for path, one in names.items()}, dict(rules.sizes)

    def place(path: str) -> Place:
        spec, shape = PartitionSpec(*(found.get(path) or ())), leaves[path].shape
        own = None if padded_shape(shape, spec, sizes) == shape else shape
        return Place(spec, named.get(path, ()), own, path in multiplied, path in along_rows)

    multiplied = {_in("params", path) for path in matrices}
    along_rows = {_in("params", path) for path, spec in specs.items() if {*rules.rows} & {*axes_of(spec)}}
    places = {path: place(path) for path in sorted({*found, *named})}
    return tuple((path, place) for path, place in places.items() if place != Place())


def stored_shapes(shapes: State, rules: BoundRules) -> State:
    """The shapes of a state as it is stored, padded, from those of its leaves by themselves."""
    places, sizes = {path: place for path, place in shapes.placement if place.shape}, dict(rules.sizes)
    if not places:
        return shapes

    def stored(keys: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:  # Any: as in path_of
        place = places.get(path_of(keys))
        return jax.ShapeDtypeStruct(padded_shape(leaf.shape, place.spec, sizes), leaf.dtype) if place else leaf

    return jax.tree_util.tree_map_with_path(stored, shapes)


def padded_arrays(tree: Any, shapes: Any) -> Any:  # Any: trees of one structure
    """The caller's arrays, padded to these shapes where they are: on the host, or on their devices."""

    def filled(leaf: Any, shape: Any) -> Any:  # Any: an array, or a number; an array, or its shape
        if jnp.shape(leaf) == shape.shape:
            return leaf
        on_device = isinstance(leaf, jax.Array) and not memory_of(leaf)
        return padded(leaf if on_device else np.asarray(leaf), shape.shape)

    return jax.tree.map(filled, tree, shapes)


def stored_as(new: State, like: State) -> State:
    """A state without padding, such as a reference makes, padded as another is; where it is."""
    if new.placement == like.placement:
        return new
    return padded_arrays(replace(new, placement=like.placement), like)


def cut_leaves(tree: Any, placement: Placement, *, prefix: str = "") -> Any:  # Any, twice: as `specs_by_path`
    """The leaves of a program in their own shapes, sharded along the same axes."""
    places = padded_places(placement)

    def cut(keys: Any, leaf: jax.Array) -> jax.Array:  # Any: as in path_of
        place = places.get(_in(prefix, path_of(keys)))
        return leaf if place is None else cut_along(leaf, *place)

    return jax.tree_util.tree_map_with_path(cut, tree) if places else tree


def padded_leaves(state: State, shapes: State) -> State:
    """The inverse: the state of a program, as it is stored in these shapes."""
    specs = {path: spec for path, (spec, _) in padded_places(state.placement).items()}

    def filled(keys: Any, leaf: jax.Array, like: Any) -> jax.Array:  # Any, twice: as in path_of; an array, or its shape
        return leaf if (spec := specs.get(path_of(keys))) is None else padded_along(leaf, spec, like.shape)

    return jax.tree_util.tree_map_with_path(filled, state, shapes) if specs else state


def opt_state_padding(state: State, turn: str) -> tuple[tuple[PartitionSpec, tuple[int, ...]] | None, ...]:
    """Of each leaf of an optimizer state, that of a turn if it is named, spec and own shape; None if not padded."""
    opt_state = {turn: state.opt_state[turn]} if turn else state.opt_state
    places = padded_places(state.placement)
    if not places:
        return (None,) * len(jax.tree.leaves(opt_state))
    return tuple(places.get(_in("opt_state", path)) for path, _ in leaves_by_path(opt_state))


def slot_specs(state: State, turn: Turn, rules: BoundRules) -> dict[str, Any]:  # Any: a tree like the slot
    """The spec of each leaf of the slots along the automatic axes, for a turn whose loss reads them."""
    if not turn.loss.reads:
        return {}
    specs = specs_by_path(state, state.placement, without=rules.manual_rows)
    return (state_of_turn(specs, turn, None) if turn.name else specs).slots


def _in(field: str, path: str) -> str:
    """The path in a state of what has this path in one of its fields."""
    return "/".join(filter(None, (field, path)))


def specs_in(placement: Placement) -> dict[str, PartitionSpec]:
    """The spec of each leaf that is placed, by path."""
    return {path: place.spec for path, place in placement}


def names_in(placement: Placement) -> dict[str, Spec]:
    """The names of the dimensions of parameters, by path."""
    return {path.partition("/")[2]: place.names for path, place in placement if place.names}


def sharding_table(state: State, rules: BoundRules, mesh: Mesh | None) -> ShardingTable:
    """The sharding of every leaf of a state, in the order in which jax flattens them, and why it is what it is."""
    own = own_shapes(state)
    params, shapes = dict(leaves_by_path(own.params)), leaves_by_path(own)
    names = mirrored_params([path for path, _ in shapes], params)
    specs = specs_in(state.placement)

    def row(path: str, own: Any, leaf: Any) -> LeafSharding:  # Any, twice: an array, or its shape
        shape, spec = own.shape, specs.get(path, PartitionSpec())
        shard = leaf.shape if mesh is None else NamedSharding(mesh, spec).shard_shape(leaf.shape)
        total = _num_bytes(leaf)
        bytes_ = total * prod(shard) // max(prod(leaf.shape), 1)
        field, name, mirrors, unsharded = path.partition("/")[0], names.get(path), "", ""
        if field in ("params", "opt_state", "slots"):
            if name is None:
                mirrors = "mirrors no parameter"
            elif mirrored_spec(shape, params[name].shape, ()) is None:
                mirrors = f"not of the shape of params/{name}"
            else:
                mirrors = "" if field == "params" else f"like params/{name}"
                level = 3 if field == "params" else 1
                if rules.layout.zero >= level and not {*rules.shard_axes} & {*axes_of(spec)}:
                    unsharded = why_unsharded(own, tuple(spec), rules)
        return LeafSharding(
            path, leaf.shape, str(leaf.dtype), spec, bytes_, total, mirrors, unsharded, memory=memory_of(leaf),
            own_shape=shape,
        )  # fmt: skip

    return ShardingTable(tuple(row(*one, leaf) for one, leaf in zip(shapes, jax.tree.leaves(state), strict=True)), mesh)


def _num_bytes(leaf: Any) -> int:  # Any: an array, or its shape
    data = jax.eval_shape(key_data, leaf) if is_typed_key(leaf) else leaf
    return int(data.size) * data.dtype.itemsize


def specs_by_path(
    tree: Any, placement: Placement, *, prefix: str = "", without: tuple[str, ...] = ()
) -> Any:  # Any, twice: trees of one structure
    """A tree of PartitionSpec, without some axes; what the placement does not name is replicated."""
    specs = {path: _without(without, spec) if without else spec for path, spec in specs_in(placement).items()}
    return jax.tree_util.tree_map_with_path(
        lambda keys, _: specs.get(_in(prefix, path_of(keys)), PartitionSpec()), tree
    )


def specs_of_model_state(state: State, rules: BoundRules) -> tuple[tuple[int, PartitionSpec], ...]:
    """The number of dimensions of each leaf of the model state, and its spec along the automatic axes."""
    specs = specs_by_path(state.model_state, state.placement, prefix="model_state")
    flat = jax.tree.leaves(specs, is_leaf=lambda one: isinstance(one, PartitionSpec))
    leaves = jax.tree.leaves(state.model_state)
    return tuple((leaf.ndim, _without(rules.rows, spec)) for leaf, spec in zip(leaves, flat, strict=True))


def shardings_of(tree: Any, placement: Placement, mesh: Mesh) -> Any:  # Any, twice: as `specs_by_path`
    """A tree of NamedSharding."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs_by_path(tree, placement),
        is_leaf=lambda one: isinstance(one, PartitionSpec),
    )


def shapes_of(tree: Any) -> Any:  # Any, twice: trees of one structure
    """The shapes and dtypes of a tree, without shardings."""
    return jax.tree.map(shape_of, tree)


def shapes_with(shapes: State, shardings: Any) -> State:  # Any: a tree of NamedSharding, or None without a mesh
    """The shapes of a state with their shardings."""
    if shardings is None:
        return shapes
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )


def without_weak_types(tree: Any) -> Any:  # Any, twice: trees of one structure
    """The same arrays with strong types: jax makes weak ones of Python numbers, and a step returns strong ones."""
    return jax.tree.map(lambda leaf: leaf if is_typed_key(leaf) else leaf.astype(leaf.dtype), tree)


def place_on_devices(tree: Any, shardings: Any | None) -> Any:  # Any: trees of one structure
    """The leaves as arrays with these shardings; without any, what is on the host stays there.

    They may share the caller's buffers: copy before donating.

    Where a sharding spans several processes, every process holds the same leaf and places its own shards of it.
    """
    if all(one.is_fully_addressable for one in jax.tree.leaves(shardings)):
        arrays = jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else np.asarray(leaf), tree)
        return arrays if shardings is None else jax.device_put(arrays, shardings)

    def place(leaf: Any, sharding: NamedSharding) -> jax.Array:  # Any: an array, or a number
        if isinstance(leaf, jax.Array) and (is_typed_key(leaf) or not leaf.is_fully_addressable):
            return jax.device_put(leaf, sharding)
        host = np.asarray(jnp.asarray(np.asarray(leaf)))  # in a dtype of jax
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(place, tree, shardings)


def shard_dimensions(params: Params, placement: Placement, rules: BoundRules) -> tuple[Any, Any]:  # Any: trees
    """Two trees like the parameters: specs by the rules, and the dimension that `zero` shards, or -1."""
    table, tree = dict(placement), jax.tree.structure(params)
    places = [table.get(_in("params", path), Place()) for path, _ in leaves_by_path(params)]
    specs = [place.spec if place.is_along_rows else _without(rules.rows, place.spec) for place in places]
    dims = [
        shard_dimension(leaf, tuple(spec), rules, is_matrix=place.is_matrix) if rules.layout.zero else -1
        for leaf, spec, place in zip(jax.tree.leaves(params), specs, places, strict=True)
    ]
    return tree.unflatten(specs), tree.unflatten(dims)


def matrices_in_parts(params: Params, placement: Placement, rules: BoundRules) -> dict[int, int]:
    """The parameters that an optimizer multiplies as matrices, where `zero` shards a matrix itself, by place.

    For each the dimension along which matrices are sharded while they are multiplied: 0 of a stack that divides, or -1.
    """
    matrices = {path for path, place in placement if place.is_matrix}
    if not matrices:
        return {}
    specs, dims = shard_dimensions(params, placement, rules)
    flat = jax.tree.leaves(specs, is_leaf=lambda one: isinstance(one, PartitionSpec))
    leaves = enumerate(zip(leaves_by_path(params), flat, jax.tree.leaves(dims), strict=True))
    return {
        place: 0 if counts_matrices(leaf, 0) and not leaf.shape[0] % rules.num_parts and not any(spec[:1]) else -1
        for place, ((path, leaf), spec, dim) in leaves
        if _in("params", path) in matrices and dim >= 0 and not counts_matrices(leaf, dim)
    }


def matrices_alone(params: Params, placement: Placement, rules: BoundRules) -> dict[int, PartitionSpec]:
    """Of those, the ones that are in no stack that divides, with their spec along other axes."""
    alone = [place for place, dim in matrices_in_parts(params, placement, rules).items() if dim < 0]
    if not alone:
        return {}
    specs, _ = shard_dimensions(params, placement, rules)
    flat = jax.tree.leaves(specs, is_leaf=lambda one: isinstance(one, PartitionSpec))
    return {place: flat[place] for place in alone}


def sharded_along_rows(params: Params, placement: Placement) -> tuple[str, ...]:
    """The parameters that rules shard along an axis of the rows. Those that `zero` shards are gathered again."""
    along_rows = {path for path, place in placement if place.is_along_rows}
    return tuple(path for path, _ in leaves_by_path(params) if _in("params", path) in along_rows) if along_rows else ()


def activation_axes(placement: Placement, rules: BoundRules, named: frozenset[str]) -> tuple[str, ...]:
    """The axes that shard activations, such as those of a sequence, and neither rows nor parameters.

    Args:
      named: those that the loss names. One that neither it nor a rule of the batch names shards nothing: for a gradient
        in parts along it XLA would partition the loss along it too, with collectives in the loop.
    """
    of_batch = {axis for _, spec in rules.layout.batch for axis in axes_of(spec)}
    of_params = {
        axis for path, place in placement if path.partition("/")[0] == "params" for axis in axes_of(place.spec)
    }
    found = (named | of_batch) - {*rules.rows, *of_params}
    return tuple(axis for axis, size in rules.sizes if size > 1 and axis in found)


def gradient_shapes(
    params: Params, placement: Placement, rules: BoundRules, *, sharded: bool
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The shape of each trained parameter's summed gradient on one device; `sharded` as `zero` shards it, or not."""
    specs, dims = shard_dimensions(params, placement, rules)
    sizes = dict(rules.sizes)

    def local(leaf: Any, spec: PartitionSpec, dim: int) -> jax.ShapeDtypeStruct:  # Any: an array, or its shape
        entries = sharded_spec(tuple(spec), dim, rules.shard_axes if sharded else ())
        shards = [prod(sizes[axis] for axis in axes_of((entry,))) for entry in entries]
        shards += [1] * (leaf.ndim - len(shards))
        shape = tuple(-(-size // number) for size, number in zip(leaf.shape, shards, strict=True))
        return jax.ShapeDtypeStruct(shape, jnp.promote_types(leaf.dtype, jnp.float32))

    flat = jax.tree.leaves(specs, is_leaf=lambda one: isinstance(one, PartitionSpec))
    return tuple(map(local, jax.tree.leaves(params), flat, jax.tree.leaves(dims)))


def held_bytes(params: Params, placement: Placement, rules: BoundRules, outside: Mapping[str, Sequence[str]]) -> int:
    """The bytes on one device of parameters that are gathered beside their shards, in the dtypes that are named."""
    held = jax.tree_util.tree_map_with_path(
        lambda keys, leaf: leaf if outside.get(path_of(keys)) and not is_typed_key(leaf) else None, params
    )
    shapes = gradient_shapes(held, placement, rules, sharded=False)
    _, dims = shard_dimensions(held, placement, rules)
    rows = zip(leaves_by_path(held), shapes, jax.tree.leaves(dims), strict=True)
    sizes = [(shape.size, outside[path]) for (path, _), shape, dim in rows if dim >= 0]
    return sum(size * jnp.dtype(name).itemsize for size, names in sizes for name in names)


def _is_taken(leaf: object) -> bool:
    """Whether a program takes a leaf of a batch."""
    return type(leaf) is np.ndarray or isinstance(leaf, jax.Array)


@lru_cache
def _is_placed(found: Sharding, wanted: NamedSharding, ndim: int) -> bool:
    """Whether an array is where it is wanted, on the same mesh: over an axis of one device any spec puts it there."""
    is_on_mesh = isinstance(found, NamedSharding) and found.mesh == wanted.mesh
    return is_on_mesh and found.is_equivalent_to(wanted, ndim)


@dataclass(frozen=True)
class BatchPlacement:
    """How the batches of a step are placed.

    Args:
      mesh: a mesh of Auto axes, or None for a single device.
      decision: what was decided about the pipeline.
    """

    mesh: Mesh | None
    decision: NormalForm

    @cached_property
    def sharding(self) -> NamedSharding | None:
        """The sharding of every leaf; None without a mesh, or if rules give each leaf its own."""
        if self.mesh is None or self._by_leaf:
            return None
        leading = [None] * self.decision.rows_axis
        return NamedSharding(self.mesh, PartitionSpec(*leading, self.decision.batch_axes))

    @cached_property
    def _by_leaf(self) -> bool:
        return bool(self.decision.rules.layout.batch or self.decision.rules.layout.automatic)

    @property
    def options(self) -> dict[str, Any]:  # Any: what `jax.jit` takes
        """The arguments of `jax.jit` that say how a state and a batch are sharded."""
        return {} if self.sharding is None else {"in_shardings": (None, self.sharding)}

    def shardings(self, batch: Batch) -> Any:  # Any: the batch's tree, of shardings or None
        """The sharding of each leaf. Errors: ShardingError with every rule of `dp(batch=...)` that does not fit."""
        if self.mesh is None or not self._by_leaf:
            return jax.tree.map(lambda _: self.sharding, batch)
        leaves = leaves_by_path(batch)
        specs = specs_of_batch(self.decision.rules, leaves, self.decision.rows_axis)
        tree = jax.tree.structure(batch)
        return tree.unflatten([NamedSharding(self.mesh, PartitionSpec(*specs[path])) for path, _ in leaves])

    def minibatch_specs(self, batch: Batch) -> tuple[PartitionSpec, ...]:
        """The spec of each leaf of what one step takes of a batch; none without a mesh. Errors: as `shardings`."""
        if self.mesh is None:
            return ()
        leading, of_one_step = self.decision.rows_axis, self.decision.shapes_of_one_step(batch)
        if leading:  # each step has a batch of its own already
            return ()
        return tuple(sharding.spec for sharding in jax.tree.leaves(self.shardings(of_one_step)))

    def minibatch_bytes(self, batch: Batch) -> int:
        """The bytes of the rows that one step takes of a batch, sharded over automatic axes alone; 0 without a mesh."""
        rows, sizes = self.decision.rules.rows, {} if self.mesh is None else dict(self.mesh.shape)
        leaves = jax.tree.leaves(self.decision.shapes_of_one_step(batch))
        pairs = zip(leaves, self.minibatch_specs(batch), strict=False)
        shards = [prod(sizes[axis] for axis in axes_of(spec) if axis not in rows) for _, spec in pairs]
        return sum(_num_bytes(leaf) // number for leaf, number in zip(leaves, shards, strict=False))

    def shapes(self, batch: Batch) -> Batch:
        """The shapes of a batch with their shardings; those of host arrays have none, as jax traces them separately."""

        def shape(leaf: Any, sharding: NamedSharding | None) -> jax.ShapeDtypeStruct:  # Any: an array, or its shape
            is_placed = isinstance(leaf, jax.Array) or self._by_leaf
            dtype = shape_of(leaf).dtype  # int32 of int64, as in a call: jax 0.11 warns of shapes that it narrows
            return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding if is_placed else None)

        leaves, tree = jax.tree.flatten(batch)
        shardings = jax.tree.leaves(self.shardings(batch), is_leaf=lambda one: one is None)
        return tree.unflatten(list(map(shape, leaves, shardings)))

    def put(self, batch: Batch) -> Batch:
        """The batch on the devices. On several processes it does not check that their rows fit together."""
        batch = as_arrays(batch)
        if self._is_on_processes:
            return global_batch(batch, self._rows, self.decision.core)
        return jax.device_put(batch, None if self.mesh is None else self.shardings(batch))

    def placed(self, batch: Batch) -> Batch:
        """The batch as the program takes it, moved only if its sharding differs.

        On several processes host arrays are this process's rows, and all processes check that their rows fit together.
        """
        given, batch = batch, as_arrays(batch)
        if self._is_on_processes:
            return self._placed_on_processes(batch)
        is_by_leaf = self.mesh is not None and self._by_leaf
        if is_by_leaf or (batch is not given and not all(map(_is_taken, jax.tree.leaves(batch)))):
            check_batch(batch, self.decision.core, shapes_too=False)
        if is_by_leaf:
            return place_on_devices(batch, self.shardings(batch))
        if (sharding := self.sharding) is not None:
            for leaf in jax.tree.leaves(batch):
                if isinstance(leaf, jax.Array) and not _is_placed(leaf.sharding, sharding, leaf.ndim):
                    return place_on_devices(batch, sharding)
        return batch

    def _placed_on_processes(self, batch: Batch) -> Batch:
        for leaf in jax.tree.leaves(batch):
            if not isinstance(leaf, np.ndarray | jax.Array):
                check_batch(batch, self.decision.core, shapes_too=False)
            elif isinstance(leaf, np.ndarray) or leaf.is_fully_addressable:
                return checked_global_batch(batch, self._rows, self.decision.core)
        return global_batch(batch, self._rows, self.decision.core)

    @cached_property
    def _is_on_processes(self) -> bool:
        return bool(mesh_processes(self.mesh))

    @cached_property
    def _rows(self) -> RowSharding:
        if self.mesh is None:
            raise ValueError("several processes have a mesh")
        return RowSharding(self.mesh, self.decision.batch_axes, self.decision.rows_axis, self.shardings)

    def compare(self, program: Any, state: Any, batch: Batch) -> None:  # Any: a jitted function; a state
        """Let several processes compare their programs, once for each signature of a batch."""
        if self._is_on_processes:
            check_program(program, self._compared, state, batch, self.mesh)

    @cached_property
    def _compared(self) -> set[str]:
        return set()

    def check(self, batch: Batch) -> None:
        """Say what is wrong with a batch that a call failed on; several processes have checked theirs already."""
        if not self._is_on_processes:
            check_batch(as_arrays(batch), self.decision.core, shapes_too=False)
