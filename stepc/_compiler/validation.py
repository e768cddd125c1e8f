"""What `compile`, `init` and a step are given, checked before anything runs. An error reports all faults at once."""

import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeAlias, assert_never

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding

from stepc._compiler.loss import RESERVED
from stepc._core.nodes import (
    AlternateNode,
    InScan,
    MeanNode,
    Node,
    OverMesh,
    Program,
    RepeatNode,
    Turn,
    UnderVmap,
    num_minibatches,
    rows_axis,
    turns_of,
)
from stepc._jax import buffer_address
from stepc._language.kinds import Batch, Metrics, Params
from stepc._language.model_state import OVERWRITTEN, is_overwritten, rules_by_leaf
from stepc._language.state import (
    DLPack,
    NumpyExport,
    Placement,
    State,
    check_goes_on,
    describe_leaf,
    describe_tied_leaves,
    have_same_shapes,
    is_numeric,
    is_trained,
    is_typed_key,
    leaves_by_path,
    own_shapes,
    path_matches,
    path_of,
    pattern_hint,
)
from stepc.errors import (
    BatchError,
    ConfigError,
    FieldTypeError,
    ShardingError,
    faults_in_one,
    leaf_text,
    listed,
    misspelt_axes,
)

_LOG = logging.getLogger("stepc")

# The tree of a batch, and the shape and dtype of each leaf. Any: a jax.tree_util.PyTreeDef, and a dtype of numpy.
BatchSignature: TypeAlias = tuple[Any, tuple[tuple[tuple[int, ...], Any], ...]]

# By path: the type of a leaf, and where it is.
ArgumentTypes: TypeAlias = dict[str, tuple[str, str]]

_NUMBERS = (np.number, np.bool, bool, int, float, complex)
_MOST_REMEDIES = 2  # of one message
_ARRAYS = (np.ndarray, jax.Array, jax.ShapeDtypeStruct)  # leaves that have rows; typed keys are jax arrays too


def batch_signature(batch: Batch) -> BatchSignature:
    """The tree, shapes and dtypes of a batch, which decide the program that it runs; hashable."""
    leaves, tree = jax.tree.flatten(batch)
    return tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


def argument_types(tree: object) -> ArgumentTypes:
    """What decides, leaf by leaf, whether jax traces a program again for an argument: its type, and where it is."""
    found: ArgumentTypes = {}
    for path, leaf in leaves_by_path(tree):
        weak = " of weak type" if isinstance(leaf, jax.Array) and jax.typeof(leaf).weak_type else ""
        match leaf.sharding if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) else None:
            case None:
                place = "on the host"
            case NamedSharding(spec=spec, memory_kind=kind):
                place = f"sharded as {spec}{_memory(kind)}"
            case SingleDeviceSharding(memory_kind=kind) as single:
                place = f"on {next(iter(single.device_set))}{_memory(kind)}"
            case sharding:
                place = str(sharding)
        found[path] = (f"{describe_leaf(leaf)}{weak}", place)
    return found


def _memory(kind: str | None) -> str:
    return "" if kind in (None, "device") else f" in the memory {kind!r}"


def type_changes(before: ArgumentTypes, after: ArgumentTypes) -> list[str]:
    """Each leaf that differs, as it was and as it is."""
    changes = [f"{leaf_text(path, 'the batch')} is gone" for path in before if path not in after]
    for path, (kind, place) in after.items():
        old_kind, old_place = before.get(path, ("", ""))
        shown = leaf_text(path, "the batch")
        if path not in before:
            changes.append(f"{shown} is new")
        elif old_kind != kind:
            changes.append(f"{shown} was {old_kind}, and is {kind}")
        elif old_place != place:
            changes.append(f"{shown} was {kind} {old_place}, and is {place}")
    return changes


def check_option(name: str, value: object, kind: type, *, expected: str, remedy: str | None = None) -> None:
    """Refuse an argument that is neither None nor of its type. Errors: FieldTypeError."""
    if value is not None and not isinstance(value, kind):
        facts = (("expected", f"{expected}, or None"), ("got", type(value).__name__))
        raise FieldTypeError(f"`{name}` is not a {name}.", facts=facts, suggestion=remedy)


def check_compiler_options(options: object) -> None:
    """Refuse what jax cannot give to XLA as its flags. Errors: FieldTypeError."""
    if not isinstance(options, Mapping):
        rows = (("expected", "a dict of flags of XLA by name, or None"), ("got", type(options).__name__))
        raise FieldTypeError("`compiler_options` is not a dict.", facts=rows)
    facts: list[tuple[str, str]] = []
    for name, value in options.items():
        if not isinstance(name, str):
            facts.append((repr(name), f"expected the name of a flag, got {type(name).__name__}"))
        elif not isinstance(value, str | bool | int | float):
            facts.append((name, f"expected a string, a bool or a number, got {type(value).__name__}"))
    if facts:
        raise FieldTypeError("`compiler_options` must be flags of XLA by name.", facts=facts)


# What XLA says of a flag and of a value that it does not know. It has one class for all that it refuses.
_NO_FLAG = re.compile(r"No such compile option: '(.*)'$")
_NO_VALUE = re.compile(r"While setting option (\S+), '(.*)' is not a valid (\S+) value")


def refused_option(error: Exception) -> ConfigError | None:
    """What to raise where XLA has refused one of the `compiler_options`; None for any other error."""
    said = str(error) if isinstance(error, jax.errors.JaxRuntimeError) else ""
    if found := _NO_FLAG.search(said):
        name, bare = found[1], found[1].lstrip("-")
        remedy = "Names are those of `XLA_FLAGS` without the dashes. Each backend and version of XLA has its own."
        if name != bare:
            remedy = f"Write the name without the dashes: {bare!r}."
        return ConfigError(f"XLA has no flag {name!r}, which `compiler_options` sets.", suggestion=remedy)
    if found := _NO_VALUE.search(said):
        name, value, kind = found.groups()
        remedy = "Write True or False." if kind == "bool" else None
        facts = [("expected", f"a value of type {kind}"), ("got", value)]
        what = f"XLA cannot read the value that `compiler_options` gives its flag {name!r}."
        return ConfigError(what, facts=facts, suggestion=remedy)
    return None


def bind(program: Program, sizes: Mapping[str, int]) -> Program:
    """Give every mean over mesh axes the size that the mesh gives it; drop means over no axes.

    Errors: ShardingError with all axes that the mesh lacks or that are used twice; ConfigError if single rows are split
    """
    match program:
        case (*outer, AlternateNode(turns) as alternate):
            bound_turns = tuple(replace(turn, program=bind(turn.program, sizes)) for turn in turns)
            return (*outer, replace(alternate, turns=bound_turns))
        case _:
            pass
    places = [node.place for node in program if isinstance(node, MeanNode) and isinstance(node.place, OverMesh)]
    used = Counter(axis for place in places for axis in (*place.axes, *place.layout.automatic))
    unknown = sorted(used.keys() - sizes)
    faults = [f"the pipeline shards over the axis {axis!r}, which the mesh does not have." for axis in unknown]
    faults += [f"the pipeline shards over the axis {axis!r} twice." for axis, times in used.items() if times > 1]
    if faults:
        hints = [misspelt_axes(unknown, sizes)]
        if not sizes:
            shape, axes = ", ".join("1" for _ in used), ", ".join(f'"{axis}"' for axis in used)
            hints = [f"Write `compile(pipeline, mesh=jax.make_mesh(({shape},), ({axes},)))` for one device."]
        mesh = ", ".join(f"{name}={size}" for name, size in sizes.items()) or "none was given to compile"
        suggestion = " ".join(hint for hint in hints if hint) or None
        raise ShardingError(_all(faults, of="the mesh axes"), facts=(("mesh", mesh),), suggestion=suggestion)

    def bound(node: Node) -> tuple[Node, ...]:
        match node:
            case MeanNode(OverMesh(())):
                return ()  # it averages nothing, and only carries sharding rules
            case MeanNode(OverMesh(axes)):
                return (replace(node, place=OverMesh(axes, math.prod(sizes[axis] for axis in axes))),)
            case _:
                return (node,)

    made = tuple(one for node in program for one in bound(node))
    means = [node for node in made if isinstance(node, MeanNode)]
    rows = next((place for place, node in enumerate(means) if isinstance(node.place, UnderVmap)), len(means))
    for node in means[rows + 1 :]:
        if not isinstance(node.place, UnderVmap) and node.place.size != 1:
            raise ConfigError(
                f"`{node.written}` stands to the right of `{means[rows].written}`, but a single row cannot be split.",
                suggestion=f"Write `{node.written}` to the left of `{means[rows].written}`.",
            )
    return made


def check_params(params: Params, wrt: tuple[str, ...]) -> None:
    """Refuse parameters that cannot be trained, or that cannot even be frozen.

    Args:
      wrt: path patterns of the parameters that are trained.
    Errors: ConfigError with every trained leaf that is not a floating-point array, every other that is no array, and
      every pattern that matches nothing.
    """
    leaves = leaves_by_path(params)
    if isinstance(params, State):
        raise FieldTypeError("These parameters are a State.", suggestion="Write `step.init(state.params)`.")
    if any(base.__module__ == "flax.nnx.module" for base in type(params).__mro__):
        raise FieldTypeError(
            "These parameters are an NNX module.",
            facts=(("expected", "a tree of arrays"), ("got", type(params).__name__)),
            suggestion="Write `graphdef, params, rest = nnx.split(module, nnx.Param, ...)`, and in the loss "
            "`nnx.merge(graphdef, params, rest)`.",
        )
    if [path for path, _ in leaves] == [""] and not isinstance(leaves[0][1], (*_ARRAYS, np.generic, float)):
        facts = (("expected", "a tree of arrays"), ("got", type(params).__name__))
        raise FieldTypeError("These parameters are not a tree of arrays.", facts=facts)
    faults = [] if leaves else ["the tree of parameters has no leaves."]
    hints: list[str | None] = []
    for path, leaf in leaves:
        shown = leaf_text(path, "the parameter")
        if not isinstance(leaf, (*_ARRAYS, np.generic, float, int)):
            faults.append(f"{shown} is {_a(type(leaf).__name__)}, not an array.")
        elif isinstance(leaf, jax.Array) and leaf.is_deleted():
            faults.append(f"{shown} is deleted: it was donated to an earlier step.")
        elif is_trained(path, wrt) and not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            faults.append(f"{shown} has dtype {jnp.result_type(leaf)}; a gradient needs floating-point parameters.")
            hints.append("`grad(loss, wrt=...)` freezes the parameters that it does not name.")
    for pattern in wrt if leaves else ():
        if not any(path_matches(pattern, path) for path, _ in leaves):
            faults.append(f"`wrt` names {pattern!r}, which matches no parameter.")
            hints.append(pattern_hint(pattern, [path for path, _ in leaves]))
    if faults:
        if any("equinox" in base.__module__ for base in type(params).__mro__):
            partition = "`params, static = eqx.partition(model, eqx.is_inexact_array)`"
            hints = [f"Write {partition}, and in the loss `eqx.combine(params, static)`."]
        suggestion = " ".join(dict.fromkeys(filter(None, hints))) or None
        raise ConfigError(_all(faults, of="the parameters"), suggestion=suggestion)
    overwritten = [path for path, _ in leaves if is_trained(path, wrt) and is_overwritten(path)]
    if overwritten:
        raise ConfigError(
            f"`{overwritten[0]}`{f' and {len(overwritten) - 1} more' if overwritten[1:] else ''}: what arrives as the "
            "gradient of these leaves is their next value, which an optimizer must not see.",
            suggestion=f'Give them as model state: `init(params, model_state={{"{OVERWRITTEN}": ...}})`, '
            "with `grad(loss, model_state=True)`; the loss returns them as they were.",
        )
    if ties := describe_tied_leaves(params):
        _LOG.warning("tied parameters are copied, and trained apart: %s", ties)


def check_memory(kinds: Mapping[str, str], usable: str) -> None:
    """Refuse arrays in a memory that no program takes; `kinds` is that of each leaf, by path. Errors: ConfigError."""
    if faults := [f"`{path}` is in the memory {kind!r}." for path, kind in kinds.items() if kind != usable]:
        suggestion = f"`jax.device_put(..., sharding.with_memory_kind({usable!r}))` moves an array there."
        facts = (("a program takes", f"'device' and {usable!r}"),)
        raise ConfigError(_all(faults, of="the arrays"), facts=facts, suggestion=suggestion)


def check_seed(seed: object) -> None:
    """Refuse a seed that is neither an integer of 64 bits nor one typed key. Errors: FieldTypeError; ConfigError."""
    expected = ("expected", "an integer of 64 bits, or one typed key")
    if isinstance(seed, jax.Array) and is_typed_key(seed):
        if seed.shape != ():
            raise ConfigError("`seed` is an array of keys.", facts=(expected, ("got", describe_leaf(seed))))
    elif isinstance(seed, bool) or not isinstance(seed, int):
        got = repr(seed)[:200]
        is_number = isinstance(seed, np.integer)
        is_old = isinstance(seed, jax.Array) and seed.dtype == np.uint32 and seed.shape == (2,)
        remedy = "Write `int(seed)`." if is_number else "Write `jax.random.wrap_key_data(key)`." if is_old else None
        what = "`seed` is neither an integer nor a typed key."
        raise FieldTypeError(what, facts=(expected, ("got", got)), suggestion=remedy)
    elif not -(2**63) <= seed < 2**63:
        raise ConfigError("`seed` has more than 64 bits.", facts=(expected, ("got", repr(seed))))


def check_model_state(model_state: Any, program: Program, num_devices: int) -> None:  # Any: the model's own tree
    """Refuse model state that the loss does not take, missing model state, and leaves that their rules do not fit.

    Args:
      num_devices: that the rows of a batch are sharded over.
    Errors: ConfigError with all faults.
    """
    losses = [turn.loss for turn in turns_of(program)]
    taking = [node for node in losses if node.model_state is not None]
    if model_state is None and taking:
        what = f"`{taking[0].written}` takes model state, but `init` was given none."
        raise ConfigError(what, suggestion="Write `step.init(params, model_state=...)`.")
    if model_state is not None and not taking:
        what = f"`init` was given model state, but {listed(f'`{node.written}`' for node in losses)} takes none."
        raise ConfigError(what, suggestion="Write `grad(loss, model_state=True)`.")
    leaves = leaves_by_path(model_state)
    headed = next((node for node in taking if node.head is not None), None)
    if headed is not None and (given := [path for path, _ in leaves if is_overwritten(path)]):
        raise ConfigError(
            f"`model_state/{given[0]}`{f' and {len(given) - 1} more' if given[1:] else ''}: what arrives as the "
            f"gradient of these leaves is their next value, and the encoder of `{headed.written}` gets none before the "
            "head has the whole batch.",
            suggestion="Keep fp8 ranges out of a loss of the whole batch, or leave out `across`.",
        )
    faults = [
        f"`model_state/{path}` is {describe_leaf(leaf)}, not an array of numbers, bools or typed keys."
        for path, leaf in leaves
        if not _is_model_state(leaf)
    ]
    hints: list[str | None] = []
    shuffling = [one.written for one in program if isinstance(one, RepeatNode) and one.minibatches is not None]
    if not faults:
        by_loss = [rules_by_leaf(node.model_state or (), model_state) for node in taking]
        for (path, leaf), *rules in zip(leaves, *by_loss, strict=True):
            faults += _rule_faults(path, leaf, tuple(dict.fromkeys(rules)), num_devices, shuffling)
    for pattern, rule in dict.fromkeys(pair for node in taking for pair in node.model_state or ()):
        if not any(path_matches(pattern, path) for path, _ in leaves):
            faults.append(f'the rule {pattern!r}: "{rule}" matches no leaf.')
            hints.append(pattern_hint(pattern, [path for path, _ in leaves]))
    if faults:
        raise ConfigError(_all(faults, of="the model state"), suggestion=" ".join(filter(None, hints)) or None)


def _rule_faults(
    path: str, leaf: Any, rules: tuple[str, ...], num_devices: int, shuffling: list[str]
) -> Iterator[str]:  # Any: an array, or its shape
    """Why a leaf cannot have its rules; every turn that takes it has one."""
    if len(rules) > 1 and "rows" in rules:
        named = " and ".join(f'"{rule}"' for rule in rules)
        yield f"`model_state/{path}` has the rules {named} in different turns: either each row has its own, or none."
    for rule in rules:
        if rule == "rows" and shuffling:
            shown = f'`model_state/{path}` has the rule "rows"'
            yield f"{shown}, but `{shuffling[0]}` gives a row another place in every epoch."
        elif fault := _rule_fault(rule, leaf, num_devices):
            yield f'`model_state/{path}` is {describe_leaf(leaf)}, with the rule "{rule}": {fault}.'


def _is_model_state(leaf: object) -> bool:
    kinds = (jnp.floating, jnp.integer, jnp.bool_, jax.dtypes.prng_key)
    return isinstance(leaf, (*_ARRAYS, np.generic)) and any(jnp.issubdtype(leaf.dtype, kind) for kind in kinds)


def _rule_fault(rule: str, leaf: Any, num_devices: int) -> str | None:  # Any: an array, or its shape
    """Why a leaf cannot have a rule; None if it can."""
    is_key, is_floating = is_typed_key(leaf), jnp.issubdtype(leaf.dtype, jnp.floating)
    match rule:
        case "key" if not is_key:
            return "it needs typed keys, as `jax.random.key` makes them"
        case "sequential" | "average" | "max" | "sum" if is_key:
            return 'keys cannot be combined; write "key", "rows" or "constant"'
        case "average" if not is_floating:
            return 'whole numbers have no mean; write "sum", "max", or keep the leaf in float32'
        case "sum" if leaf.dtype == bool:
            return 'bools cannot be added; write "max", which is true if any part says so'
        case "rows" if not leaf.ndim:
            return "a scalar has no rows"
        case "rows" if leaf.shape[0] % num_devices:
            return f"its rows do not divide by the {num_devices} devices that share the batch"
        case _:
            return None


def check_padding(placement: Placement) -> None:
    """Refuse padding where jax looks for NaN in every array. Errors: ConfigError."""
    padded = [path for path, place in placement if place.shape is not None]
    if padded and jax.config.jax_debug_nans:  # pyright: ignore[reportAttributeAccessIssue]
        what = "`tp(..., pad=True)` pads with NaN, and `jax_debug_nans` stops at each NaN."
        facts = (("padded", listed(padded)),)
        remedy = (
            "Switch it off: `run` names the step, microbatch and leaf. Or run `step.reference`, from its own `init`."
        )
        raise ConfigError(what, facts=facts, suggestion=remedy)


def check_like(
    like: object, seed: object, model_state: object, optimizer_state: Callable[[Params, tuple[str, ...]], Any]
) -> None:  # Any: the optimizer's own tree
    """Refuse a state that another cannot go on from.

    Args:
      seed, model_state: what `init` was given besides.
      optimizer_state: makes that of these parameters, of which those that the patterns name are trained.
    Errors: FieldTypeError if it is not a State; ConfigError if it was donated, if another optimizer made it, or if it
      and an argument say the same.
    """
    state = check_goes_on(like, seed, model_state)
    if any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in jax.tree.leaves(state)):
        what = "`like` was donated to an earlier step: its arrays are deleted."
        raise ConfigError(what, suggestion="Use the state that the step returned.")
    own = own_shapes(state)
    made = jax.eval_shape(lambda params: optimizer_state(params, state.wrt), own.params)
    faults = _differences(made, own.opt_state, of="opt_state")
    if faults:
        what = _all(faults, of="`like`, whose optimizer state another optimizer made")
        raise ConfigError(what, suggestion="Leave out `like` and begin with `step.init(params)`.")


def _differences(wanted: Any, found: Any, *, of: str) -> list[str]:  # Any: trees of arrays, or of shapes
    """How the leaves of one tree differ from those that were expected, by path."""
    want, have = (
        {"/".join(filter(None, (of, path))): describe_leaf(leaf) for path, leaf in leaves_by_path(tree)}
        for tree in (wanted, found)
    )
    faults = [f"`{path}` is missing." for path in want if path not in have]
    faults += [f"`{path}` is not expected." for path in have if path not in want]
    both = want.keys() & have.keys()
    return sorted(
        faults + [f"`{path}` is {have[path]}, expected {want[path]}." for path in both if want[path] != have[path]]
    )


def check_arrays(state: State, batch: Batch, placed: Batch, *, compare_buffers: bool) -> None:
    """Refuse a state with an array that is deleted, or that is there twice, or in the batch too.

    Why: a call donates each array of the state. On several devices jax does not refuse such an array: the process dies.

    Args:
      batch: as the caller gave it.
      placed: as the program takes it; its arrays may share the buffers of the caller's.
      compare_buffers: find different arrays that share a buffer as well, at a microsecond a leaf. Those that one call
        returned share none.
    Errors: ConfigError with all paths; BatchError.
    """
    leaves = jax.tree.leaves(state)
    arrays = set(map(id, leaves))
    try:
        is_alive = not [leaf for leaf in leaves if leaf.is_deleted()]
    except AttributeError:  # a leaf that is no array of jax
        is_alive = False
    if is_alive and len(arrays) == len(leaves) and arrays.isdisjoint(map(id, jax.tree.leaves(batch))):
        if not compare_buffers:
            return
        leaves += [leaf for leaf in jax.tree.leaves(placed) if isinstance(leaf, jax.Array)]
        if len(set(map(buffer_address, leaves))) == len(leaves):
            return
    _refuse_arrays(state, placed)


def _refuse_arrays(state: State, batch: Batch) -> None:
    """The errors of `check_arrays`."""
    leaves = leaves_by_path(state)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for _, leaf in leaves):
        raise ConfigError("This state holds shapes: `lower` takes shapes, a step needs arrays.")
    arrays = [(path, leaf) for path, leaf in leaves if isinstance(leaf, jax.Array)]
    deleted = [path for path, leaf in arrays if leaf.is_deleted()]
    if len(deleted) == len(arrays):
        raise ConfigError(
            "This state was donated to an earlier step: its arrays are deleted.",
            suggestion="Use the state that the step returned: `state, metrics = step(state, batch)`.",
        )
    faults = [f"`{path}` is deleted: it was donated." for path in deleted]
    paths: dict[tuple[int, str], str] = {}  # by buffer
    for path, leaf in arrays:
        if not leaf.is_deleted():
            same = paths.setdefault(_buffer(leaf), path)
            if same != path:
                faults.append(f"`{path}` is the same array as `{same}`; an array is donated only once.")
    if faults:
        copy = "Copy the arrays that another state or another leaf keeps: `jax.tree.map(jnp.copy, params)`."
        raise ConfigError(_all(faults, of="the state"), suggestion=copy)
    shared = [
        f"{leaf_text(path, 'the batch')} is the array `{same}` of the state, which the step donates."
        for path, leaf in leaves_by_path(batch)
        if isinstance(leaf, jax.Array) and not leaf.is_deleted() and (same := paths.get(_buffer(leaf)))
    ]
    if shared:
        raise BatchError(_all(shared, of="the batch"), suggestion="Give the batch a copy: `jnp.copy(leaf)`.")


def _buffer(leaf: jax.Array) -> tuple[int, str]:
    return buffer_address(leaf), str(leaf.addressable_data(0).device)


def check_state(state: object, expected: Callable[[Params], Any], wrt: tuple[str, ...]) -> None:  # Any: a dict of trees
    """Refuse a state that another step made.

    Args:
      expected: makes `{"opt_state": ..., "slots": ...}` for the state's parameters; the shapes must be these.
      wrt: path patterns of the parameters that the step trains.
    Errors: FieldTypeError if it is not a State; ConfigError with every path that is missing, unexpected, or of another
      shape or dtype.
    """
    if not isinstance(state, State):
        facts = (("expected", "the State that `step.init(params)` returned"), ("got", type(state).__name__))
        is_pair = isinstance(state, tuple) and any(isinstance(one, State) for one in state)
        suggestion = "`state, metrics = step(state, batch)`" if is_pair else "`step(state, batch)`"
        raise FieldTypeError("`state` is not a State.", facts=facts, suggestion=f"Write {suggestion}.")
    suggestion = "Make the state with `init` of the step that runs it."
    if state.wrt != wrt:
        facts = (("the state trains", ", ".join(state.wrt)), ("the step trains", ", ".join(wrt)))
        suggestion = "Write `step.init(state.params, like=state)`."
        raise ConfigError("The state is of a step that trains other parameters.", facts=facts, suggestion=suggestion)
    own = own_shapes(state)
    found = {"opt_state": own.opt_state, "slots": own.slots}
    if faults := _differences(jax.eval_shape(expected, own.params), found, of=""):
        raise ConfigError(_all(faults, of="the state"), suggestion=suggestion)


def check_batch(batch: Batch, program: Program, *, shapes_too: bool = True) -> None:
    """Refuse a batch that the program cannot split. Errors: BatchError with all faults.

    `shapes_too` accepts shapes in place of arrays. The error hides its context: a caller that handles a first fault
    gets one message with all of them.
    """
    if isinstance(batch, State):
        raise BatchError("This batch is a State.", suggestion="Write `step(state, batch)`.")
    leaves = leaves_by_path(batch)
    faults = [fault for path, leaf in leaves if (fault := _leaf_fault(leaf_text(path, "the batch"), leaf))]
    if not leaves:
        faults = ["the batch has no leaves."]
    axis = rows_axis(program)
    if axis and not faults:
        node = next(node for node in program if isinstance(node, RepeatNode))
        faults = [
            f"{leaf_text(path, 'the batch')} is {describe_leaf(leaf)}: `{node.written}` takes {node.size} stacked "
            f"batches, [{node.size}, batch, ...]."
            for path, leaf in leaves
            if leaf.ndim < 2 or leaf.shape[0] != node.size or not leaf.shape[1]
        ]
    rows = {path: leaf.shape[axis] for path, leaf in leaves if isinstance(leaf, _ARRAYS) and leaf.ndim > axis}
    if len(set(rows.values())) > 1:
        counts = listed(f"`{path}` has {number}" for path, number in rows.items())
        faults.append(f"the leaves differ in their number of rows: {counts}.")
    elif not faults:
        number = next(iter(rows.values()))
        by_turn = [fault for turn in turns_of(program) for fault in _division_faults(number, program, turn)]
        faults = list(dict.fromkeys(by_turn))
    if not shapes_too and any(isinstance(leaf, jax.ShapeDtypeStruct) for _, leaf in leaves):
        faults.append("the batch holds shapes: `lower` takes shapes, a step needs arrays.")
    if faults:
        remedies = dict.fromkeys(_remedies_of_numbers(batch, "batch", set(rows.values()) if axis == 0 else set()))
        suggestion = " ".join(list(remedies)[:_MOST_REMEDIES]) or None
        raise BatchError(_all(faults, of="the batch"), suggestion=suggestion) from None


def _remedies_of_numbers(tree: Any, written: str, rows: set[int]) -> Iterator[str]:  # Any: a part of a batch
    """What to write for what has no rows: numbers in a list as an array, one number or key as one per row."""
    match tree:
        case list() if all(isinstance(leaf, _NUMBERS) for leaf in jax.tree.leaves(tree)):
            yield f"Write `np.asarray({written})`."
        case dict() | list() | tuple():
            parts = tree.items() if isinstance(tree, dict) else enumerate(tree)
            for key, part in parts:
                yield from _remedies_of_numbers(part, f"{written}[{key!r}]", rows)
        case jax.Array() | jax.ShapeDtypeStruct() if not tree.ndim and is_typed_key(tree):
            if len(rows) == 1:
                yield f"Write `jax.random.split({written}, {next(iter(rows))})`: one key per row."
        case _ if isinstance(tree, _NUMBERS) or isinstance(tree, _ARRAYS) and not tree.ndim:
            if len(rows) == 1:
                yield f"Write `np.full({next(iter(rows))}, {written})`: the number once per row."
        case _:
            return


def _leaf_fault(shown: str, leaf: object) -> str | None:
    if not isinstance(leaf, _ARRAYS):
        if isinstance(leaf, _NUMBERS):
            return f"{shown} is {_a(type(leaf).__name__)}, which has no rows."
        if isinstance(leaf, DLPack | NumpyExport):
            return f"{shown} is {_a(type(leaf).__name__)}, and what it exports is no array of numpy or jax; convert it."
        return f"{shown} is {_a(type(leaf).__name__)}, not an array."
    if isinstance(leaf, np.ma.MaskedArray):
        return f"{shown} is a masked array, and a program sees no mask; give the mask as a leaf of its own."
    if isinstance(leaf, np.ndarray) and not is_numeric(leaf.dtype):
        return f"{shown} has dtype {leaf.dtype}, which a program cannot take."
    if isinstance(leaf, jax.Array) and leaf.is_deleted():
        return f"{shown} is deleted: it was donated."
    if not leaf.ndim:
        return f"{shown} is a scalar: it has no rows on axis 0."
    if not leaf.shape[0]:
        return f"{shown} has 0 rows."
    return None


def _division_faults(rows: int, program: Program, turn: Turn) -> list[str]:
    means = [node for node in turn.program if isinstance(node, MeanNode) and not isinstance(node.place, UnderVmap)]
    divisor = num_minibatches(program) * math.prod(node.size for node in means)
    if rows % divisor == 0:
        return []

    def factor(node: MeanNode) -> str:
        match node.place:
            case InScan(size):
                return f"{size} (`{node.written}`)"
            case OverMesh(axes):
                named = ", ".join(repr(axis) for axis in axes)
                return f"{node.size} (mesh {'axis' if len(axes) == 1 else 'axes'} {named})"
            case UnderVmap():
                raise ValueError("single rows always divide")
            case _:
                assert_never(node.place)

    shuffling = [node for node in program if isinstance(node, RepeatNode) and num_minibatches(program) > 1]
    factors = [f"{node.minibatches} (`{node.written}`)" for node in shuffling]
    product = " × ".join([*factors, *(factor(node) for node in means if node.size > 1)])
    below, above = rows // divisor * divisor, (rows // divisor + 1) * divisor
    nearest = f"{below} or {above}" if below else f"{above}"
    return [f"{rows} rows do not divide by {divisor} = {product}; the nearest that do: {nearest}."]


def check_gradient(written: str, returned: Any, like: Any) -> None:  # Any: what a transform returns; a gradient
    """Refuse what a transform returns in place of a gradient. Errors: ConfigError that names the transform."""
    match returned:
        case (grads, dict()):
            pass
        case _:
            raise ConfigError(
                f"`{written}` does not return a gradient.",
                facts=(("expected", "(gradient, dict of metrics)"), ("got", repr(returned)[:200])),
            )
    if not have_same_shapes(like, grads):
        both = map(leaves_by_path, (like, grads))
        shown = (listed(f"{path} {list(jnp.shape(leaf))}" for path, leaf in rows) or "no leaves" for rows in both)
        facts = tuple(zip(("expected", "got"), shown, strict=True))
        raise ConfigError(f"`{written}` changes the tree or the shapes of the gradient.", facts=facts)


def check_metric_names(written: str, added: Metrics, before: Mapping[str, object]) -> None:
    """Refuse a metric of a transform whose name is taken: one of the two would be lost. Errors: ConfigError.

    The norm before clipping may stand twice: that of the outermost `clip` is reported.
    """
    if taken := [name for name in added if name != "grad_norm" and (name in before or name in RESERVED)]:
        facts = (("taken", ", ".join(taken)),)
        raise ConfigError(f"`{written}` adds a metric whose name is taken.", facts=facts)


def check_fixed_point(old: Any, new: Any) -> None:  # Any, twice: a state, or a part of it
    """Refuse a step whose new state has another type than the old one: every step would be retraced.

    Errors: ConfigError with every leaf whose shape or dtype changes.
    """
    if jax.tree.structure(old) != jax.tree.structure(new):
        raise ConfigError("The step returns a state with another tree than the one it takes.")
    pairs = zip(jax.tree_util.tree_leaves_with_path(old), jax.tree.leaves(new), strict=True)
    faults = [
        f"`{path_of(keys)}` goes in as {describe_leaf(before)} and comes out as {describe_leaf(after)}."
        for (keys, before), after in pairs
        if (before.shape, before.dtype) != (after.shape, after.dtype)
    ]
    if faults:
        reason = "a state whose type changes is retraced every step, and its buffers cannot be reused"
        raise ConfigError(_all(faults, of="the new state"), facts=(("reason", reason),))


def _all(faults: list[str], *, of: str) -> str:
    text = faults_in_one(faults, of=of)
    return text[:1].upper() + text[1:]


def _a(name: str) -> str:
    return f"an {name}" if name[:1].lower() in "aeiou" else f"a {name}"
