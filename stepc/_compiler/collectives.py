"""The manual region of a step, and the collectives in it: trees are reduced, scattered and gathered over mesh axes.

The region is manual over the axes that rows are split over, and automatic over the others. Each collective is in
an inner region that is manual over all axes: in a partly automatic one XLA gathers model-sharded operands of tiled
collectives, and bfloat16 sums abort the process on CPU.
"""

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from math import prod
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec

from stepc._compiler.layers import LossFunction, TracedFunction, gather_by_layer
from stepc._compiler.metrics import (
    MetricAccumulators,
    extreme_values,
    has_last_metrics,
    mask_last_metrics,
    replace_extremes,
)
from stepc._compiler.padded_update import PaddedUpdate
from stepc._compiler.padding import along_padding, cut_along, padded_along, padded_shape
from stepc._compiler.schedule import (
    Across,
    AllGather,
    AllReduce,
    Compute,
    ModelStateLeaf,
    ReduceModelState,
    ReduceScatter,
    RepeatSteps,
    ShardGradient,
)
from stepc._core.sharding import sharded_spec
from stepc._jax import mesh_of_step
from stepc._language.encoded import Encoded
from stepc._language.kinds import Batch, BatchRows, Grads, Params
from stepc._language.model_state import MEANS, part_of_mean
from stepc._language.state import PADDING, key_data, leaves_by_path, path_of, with_key_type
from stepc._language.terms import accumulation_dtype
from stepc._text import by_pattern

HeldParams: TypeAlias = dict[tuple[str, str], jax.Array]  # gathered parameters, by path and dtype
Z_OF_HEAD = "z of the head"  # what a collective carries that is no parameter and no gradient


@dataclass(frozen=True)
class ManualRegion:
    """The mesh that a step runs on, and how its trees are sharded there.

    Args:
      mesh: a mesh of Auto axes, or None for a single device.
      batch_axes: the axes that rows are split over, the outermost first: they are manual.
      specs: a tree like the parameters, of their PartitionSpec along the automatic axes.
      dimensions: a tree like the parameters, of the dimension that is sharded over `shard_axes`, or -1.
      grad_specs, grad_dimensions: the same for the gradient, which has the trained parameters alone.
      shard_axes: the axes that gradients and optimizer state are sharded over; none if they are replicated.
      has_sharded_params: whether the parameters are sharded over `shard_axes` too.
      model_state: the leaves of the model state.
      model_state_tree: its structure.
      slot_specs: for each slot, a tree like it of the PartitionSpec along the automatic axes.
      activation_axes: those that shard activations, and neither rows nor parameters.
      matrices: the places, among the trained parameters, of those that an optimizer multiplies as matrices and that are
        sharded inside of a matrix; each with the dimension that is sharded while they are multiplied, or -1.
      matrices_alone: of those that are in no stack that divides, the spec along the automatic axes.
      opt_state_padding: of each leaf of the optimizer state, its spec and its own shape; None if it is not padded.
      model_state_specs: of each, the number of dimensions and the PartitionSpec along the automatic axes.
      has_row_numbers: whether rows need to know their position in the batch.
      padded_update: how the optimizer runs on padded leaves; None if it runs on those without padding.
      batch_specs: of each leaf of the batch that one step takes, the PartitionSpec over all axes.
      outside: of each parameter that no scan over layers takes, the dtypes that the loss uses it in, by name.
      loss: the operations of the loss, for one local microbatch; None if it is to be called instead.
      sites: the transforms of the pipeline as written, each with the user's line that made it.
      cut_from: by the id of an array without padding, that array and the padded one that it was cut from.
    """

    mesh: Mesh | None
    batch_axes: tuple[str, ...]
    specs: Any  # Any: a tree like the parameters
    dimensions: Any  # Any: a tree like the parameters
    grad_specs: Any  # Any: a tree like the gradient
    grad_dimensions: Any  # Any: a tree like the gradient
    shard_axes: tuple[str, ...]
    has_sharded_params: bool
    model_state: tuple[ModelStateLeaf, ...]
    model_state_specs: tuple[tuple[int, PartitionSpec], ...]
    model_state_tree: Any  # Any: a jax.tree_util.PyTreeDef
    has_row_numbers: bool
    slot_specs: dict[str, Any]  # Any: a tree like the slot
    activation_axes: tuple[str, ...] = ()
    matrices: dict[int, int] = field(default_factory=dict)
    matrices_alone: dict[int, PartitionSpec] = field(default_factory=dict)
    opt_state_padding: tuple[tuple[PartitionSpec, tuple[int, ...]] | None, ...] = ()
    padded_update: PaddedUpdate | None = None
    batch_specs: tuple[PartitionSpec, ...] = ()
    outside: dict[str, tuple[str, ...]] = field(default_factory=dict)
    loss: TracedFunction | None = None
    sites: tuple[tuple[str, str], ...] = ()
    cut_from: dict[int, tuple[Any, Any]] = field(default_factory=dict)  # Any: arrays

    @property
    def automatic_axes(self) -> frozenset[str]:
        """The axes that are left to XLA."""
        return frozenset(self.mesh.axis_names if self.mesh else ()) - set(self.batch_axes)

    def num_devices(self, axes: tuple[str, ...]) -> int:
        """The number of devices along these axes."""
        return prod(self.mesh.shape[axis] for axis in axes) if self.mesh else 1

    def scope(self, written: str) -> AbstractContextManager[Any]:
        """The named scope for what transforms ask for, so that compiled text and profiles show their lines."""
        named = (written, *written.split(" @ "))  # a law merges two into one; `grad(cast(...) @ loss)` is one itself
        lines = dict.fromkeys(line for transform, line in self.sites if transform in named)
        # XLA drops what follows an `@` in a name; compositions are written with a dot, as programs of the core are.
        name = re.sub(r"\s*@\s*", " . ", written)
        return jax.named_scope(f"stepc:{name} ({', '.join(lines)})")

    def leaves_scope(self, paths: Sequence[str]) -> AbstractContextManager[Any]:
        """The named scope inside of it for the leaves that a collective carries."""
        shown, num_left = by_pattern(paths, most=8)
        # What XLA or a reader of the text takes for the end of a name becomes the glob for one character.
        names = [f"{path} x{times}" if times > 1 else path for path, times in shown]
        name = re.sub(r"[^\w\s./*,+-]", "?", ", ".join([*names, *[f"and {num_left} more"] * bool(num_left)]))
        return jax.named_scope(f"stepc-leaves({name})")

    def manual_specs(self, dimensions: Any, *, sharded: bool) -> Any:  # Any: trees of one structure
        """The specs of a tree along the manual axes."""
        axes = self.shard_axes if sharded else ()
        return jax.tree.map(lambda dim: PartitionSpec(*sharded_spec((), dim, axes)), dimensions)

    def constrain(self, tree: Any, *, sharded: bool) -> Any:  # Any: a tree like the gradient
        """The tree with a sharding constraint over all axes."""
        if self.mesh is None or (not self.automatic_axes and not self.shard_axes):
            return tree
        axes = self.shard_axes if sharded else ()

        def constrained(keys: Any, leaf: jax.Array, dim: int, spec: PartitionSpec) -> jax.Array:  # Any: as in path_of
            with self.leaves_scope([path_of(keys)]):
                return jax.lax.with_sharding_constraint(leaf, PartitionSpec(*sharded_spec(tuple(spec), dim, axes)))

        return jax.tree_util.tree_map_with_path(constrained, tree, self.grad_dimensions, self.grad_specs)

    def padded(self, tree: Any, specs: Any, filling: float = PADDING) -> Any:  # Any: trees of one structure
        """The tree with each leaf padded to what its axes divide: only such leaves stay sharded at the border."""
        sizes = {} if self.mesh is None else self.mesh.shape

        def padded(leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
            shape = padded_shape(leaf.shape, spec, sizes) if any(spec) else leaf.shape
            own, source = self.cut_from.get(id(leaf), (None, None))
            # A leaf that nothing has changed since it was cut: a copy less.
            return source if own is leaf and source.shape == shape else padded_along(leaf, spec, shape, filling)

        return jax.tree.map(padded, tree, specs)

    def cut(self, made: Any, padded: Any, own: Any, specs: Any) -> Any:  # Any: as above
        """The inverse, for what was made of a padded tree: `own` as it was before, or its shapes."""

        def cut(made: jax.Array, padded: Any, own: Any, spec: PartitionSpec) -> jax.Array:  # Any: arrays, or shapes
            return cut_along(made, spec, along_padding(made.shape, padded.shape, own.shape)) if any(spec) else made

        return jax.tree.map(cut, made, padded, own, specs)

    def all_specs(self, specs: Any, dimensions: Any, *, sharded: bool) -> Any:  # Any: as above
        """The specs of a tree along all axes."""
        axes = self.shard_axes if sharded else ()
        return jax.tree.map(lambda dim, spec: PartitionSpec(*sharded_spec(tuple(spec), dim, axes)), dimensions, specs)

    def is_manual(self, axes: tuple[str, ...]) -> bool:
        """Whether collectives over these axes are the step's own; otherwise XLA makes them, of constraints."""
        return {*axes} <= {*self.batch_axes}

    def gathered_matrix(self, value: jax.Array, place: int) -> jax.Array:
        """What is made of the gradient at a place of the trained parameters, with whole matrices on each device."""
        if place not in self.matrices:
            return value
        path, _ = leaves_by_path(self.grad_dimensions)[place]
        specs = jax.tree.leaves(self.grad_specs, is_leaf=lambda one: isinstance(one, PartitionSpec))
        with self.leaves_scope([path]):
            spec = sharded_spec(tuple(specs[place]), self.matrices[place], self.shard_axes)
            return jax.lax.with_sharding_constraint(value, PartitionSpec(*spec))

    def shared_matrices(
        self,
        function: Callable[..., Any],  # Any: of the arrays of one matrix, and of those of all; a list of arrays
        own: list[list[jax.Array]],
        common: list[jax.Array],
        place: int,
    ) -> list[list[jax.Array]]:
        """A function of each of several matrices, which are given whole to one device each, in turn."""
        axes, number = self.shard_axes, len(own[0])
        (path, dim), spec = leaves_by_path(self.grad_dimensions)[place], self.matrices_alone[place]
        # Up to a multiple of the devices with the first again, whose further results are dropped.
        filled = [*range(number), *[0] * (-number % self.num_devices(axes))]

        def along(leaf: jax.Array) -> jax.Array:
            kept = tuple(spec) if leaf.shape[1:] == own[0][0].shape else ()
            return jax.lax.with_sharding_constraint(leaf, PartitionSpec(axes, *kept))

        with self.leaves_scope([path]):
            stacks = [along(jnp.stack([leaves[index] for index in filled])) for leaves in own]
            made = list(map(along, jax.vmap(function, in_axes=(0, None))(stacks, common)))
            as_before = PartitionSpec(None, *sharded_spec(tuple(spec), dim, axes))
            shape = own[0][0].shape
            made = [
                jax.lax.with_sharding_constraint(leaf, as_before) if leaf.shape[1:] == shape else leaf for leaf in made
            ]
        return [[leaf[index] for index in range(number)] for leaf in made]

    def axis_index(self, axis: str, device: jax.Array) -> jax.Array:
        """The position along one axis of the `device`-th one, as rows are split."""
        inner = self.batch_axes[self.batch_axes.index(axis) + 1 :]
        return device // self.num_devices(inner) % self.num_devices((axis,))

    def fully_manual(
        self,
        function: Callable[[Any], Any],
        tree: Any,  # Any, here and below: trees of one structure
        specs: Any,
        given_specs: Any = None,
    ) -> Any:
        """Call the function in an inner region that is manual over all axes.

        It takes the mesh of the context, as jax demands of a region inside another. Only there are leaves padded.

        Args:
          given_specs: the specs of what the function is given, if they are not those of what it returns.
        """
        if not self.automatic_axes or not jax.tree.leaves(tree):
            return function(tree)
        padded = self.padded(tree, specs)
        made = jax.shard_map(
            function, in_specs=(specs if given_specs is None else given_specs,), out_specs=specs,
            axis_names=set(self.automatic_axes), check_vma=False,
        )(padded)  # fmt: skip
        return self.cut(made, padded, tree, specs)

    def dimension_of_parts(self, leaf: jax.Array, dim: int, spec: PartitionSpec) -> int:
        """The dimension along which a gradient is in parts over `activation_axes` while it is reduced.

        It is the largest that divides, and not `dim`, along which the gradient is scattered; -1 if there is none.
        """
        number = self.num_devices(self.activation_axes)
        sharded = {dim, *(place for place, entry in enumerate(spec) if entry is not None)}
        sizes = {
            place: size for place, size in enumerate(leaf.shape) if place not in sharded and size and not size % number
        }
        return max(sizes, key=lambda place: (sizes[place], -place)) if number > 1 and sizes else -1

    def spec_of_parts(self, along: int, spec: PartitionSpec) -> PartitionSpec:
        """The spec along the automatic axes of a gradient in such parts along a dimension, or -1."""
        return PartitionSpec(*sharded_spec(tuple(spec), along, self.activation_axes))


def on_every_device(function: Callable[..., Any], mesh: Mesh, axes: tuple[str, ...]) -> Callable[..., Any]:
    """The function in a region that is manual over these axes, with the same arguments on every device."""
    same = PartitionSpec()
    return jax.shard_map(function, mesh=mesh, in_specs=same, out_specs=same, axis_names=set(axes), check_vma=False)


def as_on_one_device(axes: tuple[str, ...]) -> AbstractContextManager[Any]:  # Any: whatever jax gives
    """Trace under the mesh of the step as a region does that is manual over these axes, whose names are not known."""
    mesh = mesh_of_step()
    if mesh is None or not axes:
        return nullcontext()
    types = dict.fromkeys(axes, AxisType.Manual)
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh.update_axis_types(types))


def take_rows(instruction: RepeatSteps, batch: Batch, numbers: jax.Array, region: ManualRegion) -> BatchRows:
    """The rows with these numbers, sharded as those of a batch are.

    Every device sends each other one a row of its own for each that the other needs, the one that is asked for if it
    has it; the receiver knows which to keep. So no device holds more than a minibatch of rows that are not its own.
    """
    leaves, tree = jax.tree.flatten(batch)
    data = [key_data(leaf) for leaf in leaves]  # of typed keys the numbers: an array like any other
    axes, devices = instruction.axes, instruction.num_devices

    def take(leaf: jax.Array, numbers: jax.Array) -> jax.Array:
        return leaf.at[numbers].get(mode="promise_in_bounds")

    def exchange(data: list[jax.Array], numbers: jax.Array) -> list[jax.Array]:
        each = len(numbers) // devices
        wanted = jax.lax.dynamic_slice_in_dim(numbers, jax.lax.axis_index(axes) * each, each)

        def exchanged(leaf: jax.Array) -> jax.Array:
            sent = take(leaf, numbers % len(leaf))
            got = jax.lax.all_to_all(sent, axes, split_axis=0, concat_axis=0, tiled=True)
            return take(got, wanted // len(leaf) * each + jnp.arange(each))

        return list(map(exchanged, data))

    with region.scope(instruction.node.written):
        if not axes:
            taken = [take(leaf, numbers) for leaf in data]
        else:
            specs = list(region.batch_specs)
            taken = jax.shard_map(
                exchange, mesh=region.mesh, in_specs=(specs, PartitionSpec()), out_specs=specs, check_vma=False
            )(data, numbers)
    return tree.unflatten(list(map(with_key_type, taken, leaves)))


def all_reduce(
    instruction: AllReduce,
    metrics: MetricAccumulators,
    grads: Grads,
    region: ManualRegion,
    device: Callable[[], jax.Array],
) -> tuple[MetricAccumulators, Grads]:
    """Reduce metrics and gradient, except what is already scattered. `device` is called only for a `Last`."""
    axes = instruction.axes
    if has_last_metrics(metrics):
        index = jnp.zeros((), jnp.int32)
        for axis in axes:
            index = index * region.num_devices((axis,)) + region.axis_index(axis, device())
        metrics = mask_last_metrics(metrics, index == region.num_devices(axes) - 1)
    extremes = extreme_values(metrics)
    paths = [path for path, _ in leaves_by_path(grads)]
    leaves, tree = jax.tree.flatten(grads)
    dimensions, specs = (region.grad_dimensions, region.grad_specs) if leaves else ((), ())
    is_scattered = [bool(instruction.scattered) and dim >= 0 for dim in jax.tree.leaves(dimensions)]
    # Over an axis of activations each device reduces a part of what is not scattered, and they gather the sums there.
    along = [
        -1 if scattered else region.dimension_of_parts(leaf, -1, spec)
        for leaf, spec, scattered in zip(leaves, tree.flatten_up_to(specs), is_scattered, strict=True)
    ]
    given_specs = tree.unflatten(map(region.spec_of_parts, along, tree.flatten_up_to(specs)))

    def reduce(sums: tuple[MetricAccumulators, Grads]) -> tuple[MetricAccumulators, Grads]:
        """One collective for everything that is reduced over all axes, one for what is scattered over some of them."""
        metrics, grads = sums
        leaves, tree = jax.tree.flatten(grads)
        narrow = leaves if instruction.dtype is None else [leaf.astype(instruction.dtype) for leaf in leaves]
        pairs = list(zip(narrow, is_scattered, strict=True))
        replicated_paths = [path for path, scattered in zip(paths, is_scattered, strict=True) if not scattered]
        with region.leaves_scope(replicated_paths) if replicated_paths else nullcontext():
            metrics, replicated = jax.lax.psum((metrics, [leaf for leaf, scattered in pairs if not scattered]), axes)
        shards = [leaf for leaf, scattered in pairs if scattered]
        other_axes = tuple(axis for axis in axes if axis not in instruction.scattered)
        shards = jax.lax.psum(shards, other_axes) if other_axes and shards else shards
        reduced = (iter(replicated), iter(shards))
        parts = [next(reduced[scattered]) for scattered in is_scattered]
        totals = [_whole(part, region.activation_axes, dim) for part, dim in zip(parts, along, strict=True)]
        if instruction.dtype is not None:
            totals = [new.astype(old.dtype) for new, old in zip(totals, leaves, strict=True)]
        return metrics, tree.unflatten(totals)

    of_metrics = _replicated(metrics)
    with region.scope(instruction.written):
        metrics, grads = region.fully_manual(reduce, (metrics, grads), (of_metrics, specs), (of_metrics, given_specs))
        for kind, values in extremes.items():
            extremes[kind] = region.fully_manual(partial(_extreme, kind, axes), values, _replicated(values))
    return replace_extremes(metrics, extremes), grads


def _extreme(kind: str, axes: tuple[str, ...], tree: Any) -> Any:  # Any: trees of one structure
    """The largest or the smallest of each leaf over the devices, and NaN where one of them has NaN.

    The all-reduce of a maximum drops a NaN (XLA on CPU), so where there is one is reduced beside the values.
    """
    reduction = {"max": jax.lax.pmax, "min": jax.lax.pmin}[kind]

    def reduce(leaf: jax.Array) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return reduction(leaf, axes)
        is_nan = jnp.isnan(leaf)
        flag = is_nan.astype(leaf.dtype) * (1 if kind == "max" else -1)
        value, flags = reduction(jnp.stack([jnp.where(is_nan, 0, leaf), flag]), axes)
        return jnp.where(flags != 0, jnp.nan, value)

    return jax.tree.map(reduce, tree)


def reduce_scatter(instruction: ReduceScatter, grads: Grads, region: ManualRegion) -> Grads:
    """Each device's own shard of the sum of each sharded leaf."""
    dimensions = region.grad_dimensions
    along = jax.tree.map(
        lambda leaf, dim, spec: region.dimension_of_parts(leaf, dim, spec) if dim >= 0 else -1,
        grads, dimensions, region.grad_specs,
    )  # fmt: skip
    given_specs = jax.tree.map(region.spec_of_parts, along, region.grad_specs)

    def scatter(keys: Any, leaf: jax.Array, dim: int, along: int) -> jax.Array:  # Any: as in path_of
        if dim < 0:
            return leaf
        narrow = leaf if instruction.dtype is None else leaf.astype(instruction.dtype)
        with region.leaves_scope([path_of(keys)]):
            total = _scattered(narrow, instruction.axes, dim, region.activation_axes, along)
        return total.astype(leaf.dtype)

    with region.scope(instruction.written):
        return region.fully_manual(
            lambda tree: jax.tree_util.tree_map_with_path(scatter, tree, dimensions, along),
            grads,
            region.grad_specs,
            given_specs,
        )


def _scattered(leaf: jax.Array, axes: tuple[str, ...], dim: int, other_axes: tuple[str, ...], along: int) -> jax.Array:
    """This device's own shard of the sum.

    Args:
      along: if the leaf is the part of one device along `other_axes`, the dimension that is in parts; they gather the
        shard there. Over `axes` each then sends its part alone, and XLA adds up the gradient over the others with a
        reduce-scatter instead of an all-reduce.
    """

    def scatter(leaf: jax.Array, dim: int) -> jax.Array:
        return jax.lax.psum_scatter(leaf, axes, scatter_dimension=dim, tiled=True)

    return _whole(_without_ones(scatter, leaf, dim), other_axes, along)


def _whole(part: jax.Array, axes: tuple[str, ...], along: int) -> jax.Array:
    """The parts along a dimension, one on each device along some axes, gathered; for -1 there are none."""

    def gather(part: jax.Array, dim: int) -> jax.Array:
        return jax.lax.all_gather(part, axes, axis=dim, tiled=True)

    return part if along < 0 else _without_ones(gather, part, along)


def _without_ones(collective: Callable[[jax.Array, int], jax.Array], leaf: jax.Array, dim: int) -> jax.Array:
    """A collective along a dimension, without the other dimensions that have size 1, such as that of an expert.

    Why: XLA for TPUs makes an all-reduce of a reduce-scatter with one in front, which sends twice as much (measured in
      compiled programs, libtpu 0.0.42.1).
    """
    ones = [place for place, size in enumerate(leaf.shape) if size == 1 and place != dim]
    if not ones:
        return collective(leaf, dim)
    made = collective(jnp.squeeze(leaf, ones), dim - sum(one < dim for one in ones))
    return jnp.expand_dims(made, ones)


def all_gather(instruction: AllGather, params: Params, region: ManualRegion) -> Params:
    """Gathered parameters."""

    def gather(keys: Any, leaf: jax.Array, dim: int) -> jax.Array:  # Any: as in path_of
        if dim < 0:
            return leaf
        with region.leaves_scope([path_of(keys)]):
            return jax.lax.all_gather(leaf, instruction.axes, axis=dim, tiled=True)

    def constrain(keys: Any, leaf: jax.Array, dim: int, spec: PartitionSpec) -> jax.Array:  # Any: as above
        if dim < 0:
            return leaf
        with region.leaves_scope([path_of(keys)]):
            return jax.lax.with_sharding_constraint(leaf, spec)

    with region.scope(instruction.written):
        if not region.is_manual(instruction.axes):
            return jax.tree_util.tree_map_with_path(constrain, params, region.dimensions, region.specs)
        return region.fully_manual(
            lambda tree: jax.tree_util.tree_map_with_path(gather, tree, region.dimensions), params, region.specs
        )


def gather_encoded(instruction: Across, encoded: Encoded, region: ManualRegion) -> Encoded:
    """What the encoder makes of the rows of all devices: one gather for each dtype, and one reduction of the sums."""
    axes, tree = instruction.axes, instruction.head.tree
    named = [(f"{Z_OF_HEAD}/{path}".rstrip("/"), kind) for path, kind in zip(tree.paths, tree.kinds, strict=True)]
    of_rows = [name for name, kind in named if kind == "rows"]
    of_sums = [name for name, kind in named if kind != "rows" for _ in range(2 if kind == "mean" else 1)]

    def gather(leaves: list[jax.Array]) -> list[jax.Array]:
        columns = [jax.lax.collapse(leaf, 1) for leaf in leaves]
        rows = jax.lax.all_gather(_joined(columns, axis=1), axes, axis=0, tiled=True)
        parts = _parted(rows, columns, axis=1)
        return [part.reshape(len(part), *leaf.shape[1:]) for part, leaf in zip(parts, leaves, strict=True)]

    def add(leaves: list[jax.Array]) -> list[jax.Array]:
        flat = [leaf.reshape(-1) for leaf in leaves]
        parts = _parted(jax.lax.psum(_joined(flat, axis=0), axes), flat, axis=0)
        return [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]

    def of_each_dtype(function: Callable[[Any], Any], leaves: Sequence[jax.Array], names: list[str]) -> list[jax.Array]:
        made = list(leaves)
        for dtype in dict.fromkeys(leaf.dtype for leaf in leaves):
            places = [place for place, leaf in enumerate(leaves) if leaf.dtype == dtype]
            given = [leaves[place] for place in places]
            with region.leaves_scope([names[place] for place in places]):
                taken = region.fully_manual(function, given, _replicated(given))
            for place, leaf in zip(places, taken, strict=True):
                made[place] = leaf
        return made

    with region.scope(instruction.written):
        rows = of_each_dtype(gather, encoded.rows, of_rows)
        sums = of_each_dtype(add, encoded.sums, of_sums)
    return Encoded(tuple(rows), tuple(sums))


def _joined(leaves: list[jax.Array], *, axis: int) -> jax.Array:
    """One array of several, for one collective: XLA does not combine all of them by itself."""
    return leaves[0] if len(leaves) == 1 else jnp.concatenate(leaves, axis=axis)


def _parted(joined: jax.Array, like: list[jax.Array], *, axis: int) -> list[jax.Array]:
    """The inverse of `_joined`."""
    return jnp.split(joined, list(accumulate(leaf.shape[axis] for leaf in like))[:-1], axis=axis)


def shard_gradient(instruction: ShardGradient, grads: Grads, region: ManualRegion) -> Grads:
    """The gradient with a sharding constraint, so that XLA reduces it to its shards."""
    with region.scope(instruction.written):
        return region.constrain(grads, sharded=True)


def gather_outside(instruction: AllGather, params: Params, region: ManualRegion) -> HeldParams:
    """The parameters that no scan over layers takes, in each dtype that the loss uses them in."""
    held = HeldParams()
    specs = jax.tree.leaves(region.specs, is_leaf=lambda one: isinstance(one, PartitionSpec))
    leaves = zip(leaves_by_path(params), jax.tree.leaves(region.dimensions), specs, strict=True)
    for (path, leaf), dim, spec in leaves:
        for dtype in region.outside.get(path, ()) if dim >= 0 else ():
            with region.scope(instruction.written), region.leaves_scope([path]):
                shard = leaf.astype(dtype)
                if region.is_manual(instruction.axes):
                    gathered = partial(_whole, axes=instruction.axes, along=dim)
                    held[path, dtype] = region.fully_manual(gathered, shard, spec)
                else:
                    held[path, dtype] = jax.lax.with_sharding_constraint(shard, spec)
    return held


def gathering_loss(
    instruction: Compute,
    loss: LossFunction | TracedFunction,
    shapes: Params,
    held: HeldParams,
    region: ManualRegion,
) -> LossFunction:
    """The loss as a function of sharded parameters, if it gathers them itself: one layer at a time in a scan.

    Args:
      loss: its operations, if they are known; else it is traced for them.
      shapes: the `gathered_shapes`.
      held: parameters that are gathered already. Their gradient is scattered all the same.
    """
    axes = instruction.layered
    if not axes:
        return loss

    def gather(leaf: jax.Array, dim: int, spec: PartitionSpec, dtype: np.dtype, path: str) -> jax.Array:
        whole = held.get((path, dtype.name))

        def gather_shard(shard: jax.Array) -> jax.Array:
            with region.scope(instruction.written), region.leaves_scope([path]):
                return _whole(shard.astype(dtype), axes, dim)  # its transpose is a reduce-scatter

        if not region.is_manual(axes):
            of_grad = PartitionSpec(*sharded_spec(tuple(spec), dim, axes))
            with region.scope(instruction.written), region.leaves_scope([path]):
                return _constrained_both_ways(leaf.astype(dtype), whole, spec, of_grad)

        # jax traces a derivative of ours again in each of its passes. Its own is the same where nothing is converted;
        # in a region inside another it would add up what is replicated along the inner axes.
        wide = jnp.dtype(instruction.dtype or accumulation_dtype(leaf.dtype))
        if whole is None and dtype == wide and not region.automatic_axes:
            return gather_shard(leaf)

        def scatter_grad(grad: jax.Array) -> jax.Array:
            along = region.dimension_of_parts(grad, dim, spec)

            def scatter(part: jax.Array) -> jax.Array:
                wider = part.astype(wide)
                with region.scope(instruction.written), region.leaves_scope([path]):
                    total = _scattered(wider, axes, dim, region.activation_axes, along)
                return total.astype(leaf.dtype)

            return region.fully_manual(scatter, grad, spec, region.spec_of_parts(along, spec))

        @jax.custom_vjp
        def gathered(shard: jax.Array, whole: jax.Array | None) -> jax.Array:
            return region.fully_manual(gather_shard, shard, spec) if whole is None else whole

        gathered.defvjp(lambda shard, whole: (gathered(shard, whole), None), lambda _, grad: (scatter_grad(grad), None))
        return gathered(leaf, whole)

    return gather_by_layer(loss, shapes, region.dimensions, region.specs, gather)


def gathered_shapes(instruction: Compute, params: Params, region: ManualRegion) -> Params:
    """The parameters that the loss is given, as shapes where it gathers them itself."""
    axes = instruction.layered
    if not axes:
        return params

    def gathered_shape(leaf: jax.Array, dim: int) -> jax.ShapeDtypeStruct:
        times = region.num_devices(axes) if region.is_manual(axes) else 1
        sizes = tuple(size * times if number == dim else size for number, size in enumerate(leaf.shape))
        return jax.ShapeDtypeStruct(sizes, leaf.dtype)

    return jax.tree.map(gathered_shape, params, region.dimensions)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _constrained_both_ways(
    leaf: jax.Array, whole: jax.Array | None, spec: PartitionSpec, of_grad: PartitionSpec
) -> jax.Array:
    """The leaf with a sharding constraint, or `whole`, which has it; and its gradient with another."""
    return jax.lax.with_sharding_constraint(leaf, spec) if whole is None else whole


_constrained_both_ways.defvjp(
    lambda leaf, whole, spec, of_grad: (_constrained_both_ways(leaf, whole, spec, of_grad), None),
    lambda _, of_grad, residuals, grad: (jax.lax.with_sharding_constraint(grad, of_grad), None),
)


def reduce_model_state(
    instruction: ReduceModelState, results: tuple[Any, ...], region: ManualRegion
) -> tuple[Any, ...]:  # Any: arrays, or None
    """The results over all devices, of those leaves of the model state that this instruction reduces."""
    chosen = {
        place: leaf.rule
        for place, leaf in enumerate(region.model_state)
        if leaf.reduction and leaf.rule in instruction.rules
    }

    def reduce(results: dict[int, Any]) -> dict[int, Any]:  # Any: arrays
        summed = {place: wide for place, wide in results.items() if chosen[place] != "max"}
        # XLA has no maximum of bools over devices.
        others = {place: leaf for place, leaf in results.items() if chosen[place] == "max"}
        numbers = {place: leaf.astype(jnp.int8) if leaf.dtype == bool else leaf for place, leaf in others.items()}
        summed = jax.lax.psum(summed, instruction.axes) if summed else {}
        return {**summed, **_extreme("max", instruction.axes, numbers)}

    # A mean is divided first, so that the sum cannot overflow.
    wide = {
        place: part_of_mean(results[place], instruction.num_devices) if rule in MEANS else results[place]
        for place, rule in chosen.items()
    }
    specs = {
        place: PartitionSpec(*([None] * (results[place].ndim - rank)), *spec)
        for place in chosen
        for rank, spec in (region.model_state_specs[place],)
    }
    with region.scope(instruction.written):
        reduced = region.fully_manual(reduce, wide, specs)
    return tuple(reduced[place].astype(old.dtype) if place in reduced else old for place, old in enumerate(results))


def _replicated(tree: Any) -> Any:
    return jax.tree.map(lambda _: PartitionSpec(), tree)
