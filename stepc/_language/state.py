"""The state of training, and how its leaves are named, printed and unwrapped. It knows no transform and no mesh."""

import re
import zlib
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from stepc._core.nodes import Turn, slot_name
from stepc._core.sharding import Spec, normalized_spec
from stepc._language.kinds import Batch, Params
from stepc.errors import ConfigError, FieldTypeError, did_you_mean, listed


@dataclass(frozen=True)
class Place:
    """Where a leaf of a state is.

    Args:
      spec: its dimensions along the axes of the mesh.
      names: those that the model library gave its dimensions, as a spec.
      shape: that of the leaf without padding, if it is padded; None if it is not.
      is_matrix: of a parameter: whether an optimizer multiplies its gradient as whole matrices, and `zero` shards it.
      is_along_rows: of a parameter: whether a rule, not `zero`, shards it along an axis of the rows.
    """

    spec: PartitionSpec = PartitionSpec()
    names: Spec = ()
    shape: tuple[int, ...] | None = None
    is_matrix: bool = False
    is_along_rows: bool = False


# The leaves that are not simply replicated, or that have names, sorted by path.
Placement: TypeAlias = tuple[tuple[str, Place], ...]

# The `wrt` of a gradient with respect to every parameter.
EVERY_LEAF = ("**",)

# The implementation of the key that an integer seed makes. Fixed here instead of taken from jax's configuration: no
# ambient state changes what a pipeline means.
KEYS = "threefry2x32"
KEY_IMPLS = (KEYS, "rbg", "unsafe_rbg")  # those of jax


# What a state is padded with, where it has floating-point numbers: what reads it by mistake shows it.
PADDING = float("nan")


class SkipCounts(NamedTuple):
    """How many steps `skip_nonfinite` has skipped: in total, and in a row."""

    total: Any  # Any, twice: an int32 scalar, or its shape
    consecutive: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Everything that a step changes.

    Shapes: `params` and `opt_state` are trees of the user and of optax. `step` is an int32 scalar, so any number of
    steps is one trace. `rng` is a scalar typed key, the seed; it never changes, since keys are folded from it and the
    step. `model_state` is the model's own state, None without `grad(loss, model_state=True)`. `slots` holds what each
    stateful transform keeps, by the transform's name. `wrt` says which parameters are trained; `opt_state` and slots
    like the parameters have those leaves alone, and None for the others.
    With `tp(..., pad=True)` the leaves are padded; `unpadded()` is the state without that.
    Errors: a step donates its state, which deletes the arrays: use the state that the step returns.
    """

    params: Params
    opt_state: Any  # Any: the optimizer's own tree
    step: Any  # Any: an int32 scalar, or its shape when nothing is computed
    rng: Any  # Any: a typed key, or its shape
    model_state: Any = None  # Any: the model's own tree
    slots: dict[str, Any] = field(default_factory=dict)  # Any: by transform
    # Part of the tree's type, not of its leaves: another placement is another program.
    placement: Placement = field(default=(), metadata={"static": True})
    wrt: tuple[str, ...] = field(default=EVERY_LEAF, metadata={"static": True})

    @property
    def trained(self) -> Params:
        """The parameters that are trained, and None in the place of each that is frozen."""
        return trained_leaves(self.params, self.wrt)

    def with_trained(self, trained: Params) -> "State":
        """The state with these trained parameters; the frozen ones stay."""
        return replace(self, params=with_frozen(trained, self.params, self.wrt))

    def unpadded(self) -> "State":
        """The state without what `tp(..., pad=True)` has added to it; the same state, if that is nothing.

        Meaning: each leaf in the shape that `init` was given, or that the optimizer made for it.
        Why: inference, and any other function of your own, needs the parameters as the loss sees them.

        A leaf that was padded is gathered along the axes that padded it, since jax has no arrays with uneven shards: it
        takes its whole size on each device. Inside a `jit` nothing need be gathered. Keep the padded state to train on.
        Example:
          >>> logits = model(state.unpadded().params, tokens)  # doctest: +SKIP
        """
        shapes = {path: shape for path, (_, shape) in padded_places(self.placement).items()}
        if not shapes:
            return self
        cut = jax.tree_util.tree_map_with_path(lambda keys, leaf: unpadded_leaf(leaf, shapes.get(path_of(keys))), self)
        stored = dict(leaves_by_path(self))
        placement = ((path, _place_unpadded(place, stored[path].shape)) for path, place in self.placement)
        return replace(cut, placement=tuple((path, place) for path, place in placement if place != Place()))


def padded_places(placement: Placement) -> dict[str, tuple[PartitionSpec, tuple[int, ...]]]:
    """The spec and the own shape of each leaf that is padded, by path."""
    return {path: (place.spec, place.shape) for path, place in placement if place.shape is not None}


def own_shapes(state: State) -> State:
    """The state with the shape of each padded leaf in its place, without the padding."""
    shapes = {path: shape for path, (_, shape) in padded_places(state.placement).items()}
    if not shapes:
        return state

    def own(keys: Any, leaf: Any) -> Any:  # Any: as in path_of; a leaf, or its shape
        shape = shapes.get(path_of(keys))
        return leaf if shape is None else jax.ShapeDtypeStruct(shape, leaf.dtype)

    return jax.tree_util.tree_map_with_path(own, state)


def unpadded_params(params: Params, state: State) -> Params:
    """The parameters without padding, where they are padded as those of a state are."""
    places, stored = dict(state.placement), dict(leaves_by_path(state.params))

    def cut(keys: Any, leaf: Any) -> Any:  # Any: as in path_of; an array, or its shape
        path = path_of(keys)
        place = places.get(f"params/{path}" if path else "params", Place())
        is_padded = place.shape is not None and path in stored and jnp.shape(leaf) == stored[path].shape
        return unpadded_leaf(leaf, place.shape) if is_padded else leaf

    return jax.tree_util.tree_map_with_path(cut, params)


def unpadded_leaf(leaf: Any, shape: tuple[int, ...] | None) -> Any:  # Any, twice: an array, or its shape
    """A leaf without its padding, if it has a shape of its own. An array is gathered along the padded dimensions.

    Dimensions before those of the shape, such as that of an ensemble, stay.
    """
    if shape is None:
        return leaf
    shape = (*leaf.shape[: len(leaf.shape) - len(shape)], *shape)
    if leaf.shape == shape:
        return leaf
    match leaf:
        case jax.ShapeDtypeStruct():
            return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=_gathered_where_padded(leaf.sharding, leaf, shape))
        case jax.Array() if not isinstance(leaf, Tracer):
            on_device = jax.device_put(leaf, leaf.sharding.with_memory_kind("device")) if memory_of(leaf) else leaf
            return _cut(on_device, shape, _gathered_where_padded(leaf.sharding, leaf, shape))
        case _:
            return leaf[tuple(map(slice, shape))]


@partial(jax.jit, static_argnames=("shape", "sharding"))
def with_padding(leaf: jax.Array, shape: tuple[int, ...], sharding: NamedSharding) -> jax.Array:
    """A padded leaf whose own shape is `shape`, with `PADDING` in the rest of it."""
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return leaf
    places = (jax.lax.broadcasted_iota(jnp.int32, leaf.shape, dim) < size for dim, size in enumerate(shape))
    filled = jnp.where(reduce(jnp.logical_and, places), leaf, jnp.asarray(PADDING, leaf.dtype))
    return jax.lax.with_sharding_constraint(filled, sharding)


@partial(jax.jit, static_argnames=("shape", "sharding"))
def _cut(leaf: jax.Array, shape: tuple[int, ...], sharding: NamedSharding | None) -> jax.Array:
    cut = leaf[tuple(map(slice, shape))]
    return cut if sharding is None else jax.lax.with_sharding_constraint(cut, sharding)


def _gathered_where_padded(
    sharding: Any, leaf: Any, shape: tuple[int, ...]
) -> NamedSharding | None:  # Any: a sharding of jax, or None; an array, or its shape
    """The sharding of a leaf that is gathered along the dimensions that differ from `shape`."""
    if not isinstance(sharding, NamedSharding):
        return None
    place = _place_unpadded(Place(sharding.spec, (), shape), leaf.shape)
    return NamedSharding(sharding.mesh, place.spec)


def _place_unpadded(place: Place, stored: tuple[int, ...]) -> Place:
    """Where a leaf is without its padding, from where it is with it, in the shape `stored`."""
    if place.shape is None:
        return place
    pairs = zip(place.spec, place.shape, stored[-len(place.shape) :], strict=False)
    spec = normalized_spec(entry if size == padded else None for entry, size, padded in pairs)
    return replace(place, spec=PartitionSpec(*spec), shape=None)


def state_of_turn(state: State, turn: Turn, key: Any) -> State:  # Any: a typed key
    """What one turn of several sees of the whole state: its own optimizer state, slots and key, and everyone's rest."""
    everyones = {name: slot for name, slot in state.slots.items() if "/" not in name}
    return replace(
        state,
        opt_state=state.opt_state[turn.name],
        rng=key,
        model_state=None if turn.loss.model_state is None else state.model_state,
        slots={**everyones, **_own_slots(state, turn)},
        wrt=turn.loss.wrt,
    )


def _own_slots(state: State, turn: Turn) -> dict[str, Any]:  # Any: slots
    """The slots that only this turn has, by its own names."""
    pairs = [(name.partition("/"), slot) for name, slot in state.slots.items()]
    return {own: slot for (owner, _, own), slot in pairs if own and owner == turn.name}


def after_turn(state: State, turn: Turn, made: State) -> State:
    """The whole state with what a turn has made of its part. The step counts when all turns are made."""
    own = {slot_name(turn.name, name): made.slots[name] for name in _own_slots(state, turn)}
    return replace(
        state,
        params=made.params,
        opt_state={**state.opt_state, turn.name: made.opt_state},
        model_state=state.model_state if turn.loss.model_state is None else made.model_state,
        slots={**state.slots, **own},
    )


def blank_metric(value: Any) -> jax.Array:  # Any: an array, or its shape
    """What a metric is in a step that does not make its turn."""
    return jnp.full(value.shape, jnp.nan if jnp.issubdtype(value.dtype, jnp.inexact) else 0, value.dtype)


def path_of(keys: tuple[Any, ...]) -> str:  # Any: the key types of jax.tree_util
    """The path of a leaf as stepc prints it: its keys joined by `/`."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def leaves_by_path(tree: object) -> list[tuple[str, Any]]:  # Any: leaves of the user
    """Every leaf of a tree with its path, in the order of `jax.tree.leaves`."""
    return [(path_of(keys), leaf) for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def have_same_shapes(one: object, other: object) -> bool:
    """Whether two trees have one structure, and leaves of the same shapes."""
    (leaves, tree), (other_leaves, other_tree) = map(jax.tree.flatten, (one, other))
    return tree == other_tree and list(map(jnp.shape, leaves)) == list(map(jnp.shape, other_leaves))


def path_matches(pattern: str, path: str) -> bool:
    """Whether a path matches: `*` stands for anything within a key, `**` across keys."""
    parts = re.split(r"(\*\*/|\*\*|\*)", pattern)
    means = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*"}
    return re.fullmatch("".join(means.get(part, re.escape(part)) for part in parts), path) is not None


def pattern_hint(pattern: str, paths: list[str]) -> str | None:
    """What a pattern that matches none of the paths may have been meant to be, or which paths there are."""
    wider = (f"**/{pattern}", f"{pattern}/**", f"**/{pattern}/**")
    if found := next((one for one in wider if any(path_matches(one, path) for path in paths)), None):
        return f"Did you mean {found!r}?"
    shown = listed(repr(path) for path in paths if path)
    return did_you_mean(pattern, paths) or (f"The paths are {shown}." if shown else None)


def same_tree(tree: Any) -> Any:  # Any: a tree of the user's
    """The same leaves in new nodes: those of Flax NNX may change only in the trace that made them."""
    return jax.tree.map(lambda leaf: leaf, tree)


def values_read(state: State, names: tuple[str, ...]) -> dict[str, Any]:  # Any: a slot, or the number of the step
    """The values of the state that a loss reads by name: slots, and "step"."""
    return {name: state.step if name == "step" else state.slots[name] for name in names}


def is_trained(path: str, wrt: tuple[str, ...]) -> bool:
    """Whether a parameter is trained: whether any of the patterns matches its path."""
    return any(path_matches(pattern, path) for pattern in wrt)


def trained_leaves(params: Params, wrt: tuple[str, ...]) -> Params:
    """A tree like the parameters, with None in the place of every leaf that is frozen."""
    if wrt == EVERY_LEAF:
        return params
    leaves = [leaf if is_trained(path, wrt) else None for path, leaf in leaves_by_path(params)]
    return jax.tree.structure(params).unflatten(leaves)


def with_frozen(trained: Params, params: Params, wrt: tuple[str, ...]) -> Params:
    """The inverse of `trained_leaves`: the trained leaves, and the frozen ones of `params`."""
    if wrt == EVERY_LEAF:
        return trained
    given = iter(jax.tree.leaves(trained))
    leaves = [next(given) if is_trained(path, wrt) else leaf for path, leaf in leaves_by_path(params)]
    return jax.tree.structure(params).unflatten(leaves)


def check_goes_on(like: object, seed: object, model_state: object) -> State:
    """Refuse a state to go on from that is none, or that is given besides what it holds itself.

    Args:
      seed, model_state: what `init` was given besides.
    Errors: FieldTypeError; ConfigError.
    """
    if not isinstance(like, State):
        facts = (("expected", "a State to go on from"), ("got", type(like).__name__))
        raise FieldTypeError("`like` is not a State.", facts=facts)
    given = [name for name, value in (("seed", seed), ("model_state", model_state)) if value is not None]
    if given:
        raise ConfigError(
            f"`init` was given `like` and `{'` and `'.join(given)}`: a state that goes on keeps its own.",
            suggestion=f"Leave out `{'` and `'.join(given)}`.",
        )
    return like


def carried_over(fresh: State, like: State) -> State:
    """A fresh state, with everything of `like` that is also its own.

    Optimizer state and slots are matched by path, shape and dtype: those of the parameters that were trained already,
    and those of no parameter, such as a count.
    """

    def carried(made: Any, old: Any) -> Any:  # Any: trees of arrays
        known = dict(leaves_by_path(old))
        leaves = [
            one if (was := known.get(path)) is None or describe_leaf(was) != describe_leaf(one) else was
            for path, one in leaves_by_path(made)
        ]
        return jax.tree.structure(made).unflatten(leaves)

    slots = {name: carried(made, like.slots.get(name)) for name, made in fresh.slots.items()}
    opt_state = carried(fresh.opt_state, like.opt_state)
    return replace(fresh, opt_state=opt_state, slots=slots, step=like.step, rng=like.rng, model_state=like.model_state)


def describe_leaf(leaf: object) -> str:
    """A leaf in messages: `float32[3, 4]` for an array or a shape, the name of its type for anything else."""
    if isinstance(leaf, np.ndarray | np.generic | jax.Array | jax.ShapeDtypeStruct):
        return f"{leaf.dtype}{list(leaf.shape)}"
    return type(leaf).__name__


def describe_tied_leaves(tree: object) -> str | None:
    """Which leaves of a tree are the same array, with its bytes, for a message; None if none are."""
    by_identity: dict[int, list[tuple[Any, Any]]] = {}  # Any, twice: as in path_of; a leaf
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        by_identity.setdefault(id(leaf), []).append((keys, leaf))
    tied = [same for same in by_identity.values() if len(same) > 1 and getattr(same[0][1], "nbytes", 0)]
    texts = [
        f"{listed((path_of(keys) for keys, _ in same), separator=' and ')} ({same[0][1].nbytes:,} bytes)"
        for same in tied
    ]
    return listed(texts) or None


@runtime_checkable
class DLPack(Protocol):
    """An array of a library that exports its memory."""

    def __dlpack__(self, **options: Any) -> Any: ...  # Any: a capsule

    def __dlpack_device__(self) -> tuple[int, int]: ...


@runtime_checkable
class NumpyExport(Protocol):
    """Anything that numpy makes an array of by its `__array__`."""

    def __array__(self) -> np.ndarray: ...


def as_arrays(batch: Batch) -> Batch:
    """The batch with each leaf as an array of numpy or jax, where that is exact.

    Another byte order becomes this machine's. An array of another library is what it exports itself. A leaf with a
    mask, and one that exports nothing, stay as they are: the check of a batch names them.
    """
    leaves, tree = jax.tree.flatten(batch)
    for leaf in leaves:
        if not (leaf.dtype.isnative if type(leaf) is np.ndarray else isinstance(leaf, jax.Array)):
            return tree.unflatten(map(_as_array, leaves))
    return batch


def _as_array(leaf: Any) -> Any:  # Any, twice: a leaf of a user's tree
    exports: list[Any] = []  # Any: what makes an array of it
    match leaf:
        case np.ma.MaskedArray() | np.generic() | jax.Array():
            pass
        case np.ndarray():
            return leaf if leaf.dtype.isnative else leaf.astype(leaf.dtype.newbyteorder("="))
        case DLPack():
            exports = [np.from_dlpack, _from_dlpack, np.asarray]
        case NumpyExport():
            exports = [np.asarray]
        case _:
            pass
    for export in exports:
        with suppress(AttributeError, BufferError, RuntimeError, TypeError, ValueError):
            return _as_array(export(leaf))
    return leaf


def _from_dlpack(leaf: DLPack) -> Any:  # Any: an array of numpy or jax
    """By jax, since numpy has no bfloat16 and no GPU. What is in host memory is a host array, as any other batch."""
    array = jax.dlpack.from_dlpack(leaf)
    return np.asarray(array) if {device.platform for device in array.devices()} == {"cpu"} else array


# What a loss, an encoder or a measurement may return as a number.
ARRAY_LIKE = (jax.Array, np.ndarray, np.generic, float, int)


def is_numeric(dtype: Any) -> bool:  # Any: a dtype of numpy
    """Whether a program computes with a dtype: numbers and bools, but no long doubles, objects, texts or records."""
    is_number = jnp.issubdtype(dtype, np.number) and dtype not in (np.longdouble, np.clongdouble)
    return is_number or dtype == np.bool_


def is_typed_key(leaf: Any) -> bool:  # Any: anything with a dtype, a shape too
    """Whether a leaf is an array of typed keys, which numpy cannot hold."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def key_data(leaf: Any) -> Any:  # Any: an array
    """The numbers of a typed key; any other leaf as it is."""
    return jax.random.key_data(leaf) if is_typed_key(leaf) else leaf


def with_key_type(data: Any, like: Any) -> Any:  # Any: arrays; `like` may be a shape
    """The inverse of `key_data`: the data as a typed key like `like`; as it is, if `like` is not one."""
    return jax.random.wrap_key_data(data, impl=key_impl_of(like)) if is_typed_key(like) else data


def key_impl_of(key: Any) -> str:  # Any: a typed key, or its shape
    """The implementation of a typed key, by the name that `jax.random.key` takes."""
    if isinstance(key, jax.Array):
        return str(jax.random.key_impl(key))
    return next(name for name in KEY_IMPLS if jax.eval_shape(partial(jax.random.key, 0, impl=name)).dtype == key.dtype)


def memory_of(leaf: Any) -> str:  # Any: a leaf of the caller's
    """The kind of memory that a leaf is in, if that is not the device's own; else ""."""
    sharding = leaf.sharding if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) else None
    kind = None if sharding is None else sharding.memory_kind
    return "" if kind is None or kind == "device" else kind


def copied_to(state: Any, place: Any) -> Any:  # Any: a state, or what was given as one; a device, or shardings
    """A copy of a state in the memory of one device, or of several. It waits for the state."""

    # jax does not move an array from the memory of the host to that of the same device (0.10.2, on CPU).
    def copied(leaf: Any) -> jax.Array:  # Any: an array
        return jnp.asarray(np.asarray(leaf)) if memory_of(leaf) else jnp.copy(leaf)

    # XLA aborts where a step on simulated devices and copies of its results wait for each other's threads.
    return jax.device_put(jax.tree.map(copied, jax.block_until_ready(state)), place)


def leaf_crc32(leaf: Any, crc32: int = 0) -> int:  # Any: an array
    """The CRC-32 of the bytes of a leaf, or of the numbers of a typed key, continued from `crc32`."""
    array = np.ascontiguousarray(key_data(leaf))  # copied only if it has to be
    return zlib.crc32(array.reshape(-1).view(np.uint8).data, crc32)
