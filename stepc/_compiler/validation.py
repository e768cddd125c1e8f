"""The form of a batch, which decides what program it runs: as a key to look up, and as text."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NoReturn, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from stepc._core.nodes import DifferentiateNode, InScan, MeanNode, Node, OverMesh, Program, RepeatNode, UnderVmap
from stepc._language.kinds import Batch, Params
from stepc._language.state import State, describe_tied_leaves, leaves_by_path
from stepc.errors import BatchError, ConfigError, ShardingError, did_you_mean, faults_in_one

# The tree, and the shape and dtype of each leaf. Any: a jax.tree_util.PyTreeDef, and what numpy calls a dtype.
BatchSignature: TypeAlias = tuple[Any, tuple[tuple[tuple[int, ...], Any], ...]]


def batch_signature(batch: Batch) -> BatchSignature:
    """The tree, shapes and dtypes of a batch; it hashes."""
    leaves, tree = jax.tree.flatten(batch)
    return tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


def signature_text(batch: Batch) -> str:
    """The paths, types and shapes of a batch that is traced, in a line."""
    weak = {True: " of weak type", False: ""}
    rows = [(path or "the batch", leaf, weak[jax.typeof(leaf).weak_type]) for path, leaf in leaves_by_path(batch)]
    return ", ".join(f"{path} {leaf.dtype}{list(leaf.shape)}{kind}" for path, leaf, kind in rows)


def retrace_reason(was: str, now: str, batch: Batch) -> str:
    """Why a program was traced again for a batch, by what `shown` says of the one before it and of this one."""
    if was != now:
        return f"its form was {was}, and is {now}"
    if all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(batch)):
        return "the state is of another type, or its arrays lie elsewhere"
    return "jax types host arrays and device arrays apart"


_LOG = logging.getLogger("stepc")

# Leaves that have rows. Typed keys are jax arrays too.
ArrayLike: TypeAlias = np.ndarray | jax.Array | jax.ShapeDtypeStruct


def bind(program: Program, sizes: Mapping[str, int]) -> Program:
    """Give every mean over mesh axes the size that the mesh gives it.

    Errors: ShardingError, with all axes that the mesh lacks and all that are used twice.
    """
    places = [node.place for node in program if isinstance(node, MeanNode)]
    spaces = [place for place in places if isinstance(place, OverMesh)]
    used = [axis for place in spaces for axis in (*place.axes, *place.layout.automatic)]
    unknown = sorted(set(used) - set(sizes))
    faults = [f"the pipeline shards over the axis {axis!r}, which the mesh does not have." for axis in unknown]
    faults += [f"the pipeline shards over the axis {axis!r} twice." for axis, n in Counter(used).items() if n > 1]
    if faults:
        have = ", ".join(f"{name}={size}" for name, size in sizes.items())
        hints = [did_you_mean(axis, sizes) for axis in unknown]
        if not sizes:
            axes = ", ".join(f'"{axis}"' for axis in dict.fromkeys(used))
            shape = ", ".join("1" for _ in dict.fromkeys(used))
            hints = [f"Write `compile(pipeline, mesh=jax.make_mesh(({shape},), ({axes},)))` for one device."]
        facts = (("mesh", have or "none was given to compile"),)
        suggestion = " ".join(hint for hint in hints if hint) or None
        raise ShardingError(_sentence(faults_in_one(faults, of="the axes")), facts=facts, suggestion=suggestion)
    bound = tuple(one for node in program for one in _bound(node, sizes))
    _check_single_rows(bound)
    return bound


def _bound(node: Node, sizes: Mapping[str, int]) -> tuple[Node, ...]:
    match node:
        case MeanNode(OverMesh(())):
            return ()  # a mean over no axes averages nothing: it says where things lie
        case MeanNode(OverMesh(axes)):
            return (replace(node, place=OverMesh(axes, math.prod(sizes[axis] for axis in axes))),)
        case _:
            return (node,)


def _check_single_rows(program: Program) -> None:
    means = [node for node in program if isinstance(node, MeanNode)]
    single = next((place for place, node in enumerate(means) if isinstance(node.place, UnderVmap)), len(means))
    for node in means[single + 1 :]:
        if not isinstance(node.place, UnderVmap) and node.place.size != 1:
            raise ConfigError(
                f"`{node.written}` stands on the right of `{means[single].written}`: one row has no parts.",
                suggestion=f"Write `{node.written}` on the left of `{means[single].written}`.",
            )


def check_model_state(model_state: object, program: Program) -> None:
    """Refuse a model_state that the loss does not ask for, or the lack of one. Errors: ConfigError with all faults."""
    node = program[-1]
    if not isinstance(node, DifferentiateNode):
        raise ValueError("a complete program ends in a loss")
    if model_state is None and node.model_state:
        what = f"The loss of `{node.written}` carries a state of the model's own, and `init` was given none."
        raise ConfigError(what, suggestion="Write `step.init(params, model_state=...)`.")
    if model_state is not None and not node.model_state:
        what = f"`init` was given a model_state, and the loss of `{node.written}` does not take one."
        raise ConfigError(what, suggestion="Write `grad(loss, model_state=True)`.")
    faults = []
    for path, leaf in leaves_by_path(model_state):
        numeric = isinstance(leaf, (*ArrayLike.__args__, np.generic)) and (
            jnp.issubdtype(leaf.dtype, jnp.floating) or jnp.issubdtype(leaf.dtype, jnp.integer)
        )
        if not numeric:
            faults.append(f"`model_state/{path}` is {_described(leaf)}; what is averaged over devices is a number.")
    if faults:
        raise ConfigError(_sentence(faults_in_one(faults, of="the model_state")))


def check_params(params: Params) -> None:
    """Refuse what cannot be trained. Errors: ConfigError with every leaf that is not a floating-point array."""
    leaves = leaves_by_path(params)
    faults = [] if leaves else ["the tree of parameters has no leaves."]
    for path, leaf in leaves:
        shown = f"`{path}`" if path else "the parameter"
        if not isinstance(leaf, (*ArrayLike.__args__, np.generic, float)):
            faults.append(f"{shown} is {_a(type(leaf).__name__)}, not an array.")
        elif isinstance(leaf, jax.Array) and leaf.is_deleted():
            faults.append(f"{shown} is deleted: it was donated to an earlier step.")
        elif not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            faults.append(f"{shown} has dtype {jnp.result_type(leaf)}; a gradient needs floating-point parameters.")
    if faults:
        raise ConfigError(_sentence(faults_in_one(faults, of="the parameters")))
    if ties := describe_tied_leaves(params):
        _LOG.warning("parameters that are one array are copied, and trained apart: %s", ties)


def check_state(state: object, expected: Callable[[Params], Any]) -> None:
    """Refuse a state that another step made.

    Args:
      expected: what the transforms make for the state's parameters, `{"opt_state": ..., "slots": ...}`; its shapes are what
        must be found.
    Errors: ConfigError with every path that is missing, unexpected or of another shape or dtype.
    """
    if not isinstance(state, State):
        facts = (("expected", "the State that `step.init(params)` returned"), ("got", type(state).__name__))
        raise ConfigError("This is not a state.", facts=facts)
    wanted = dict(leaves_by_path(jax.eval_shape(expected, state.params)))
    found = dict(leaves_by_path({"opt_state": state.opt_state, "slots": state.slots}))
    faults = [f"`{path}` is missing." for path in wanted if path not in found]
    faults += [f"`{path}` is not expected." for path in found if path not in wanted]
    for path in wanted.keys() & found.keys():
        want, have = (f"{one.dtype}{list(one.shape)}" for one in (wanted[path], found[path]))
        if want != have:
            faults.append(f"`{path}` is {have}, expected {want}.")
    if faults:
        raise ConfigError(
            _sentence(faults_in_one(sorted(faults), of="the state")),
            suggestion="Make the state with the `init` of the step that is to run it.",
        )


def refuse_state(state: Any, expected: Callable[[Params], Any]) -> NoReturn:
    """Say why a step cannot take this: another's state, the shapes of one, or one whose arrays are deleted."""
    check_state(state, expected)
    if not isinstance(state.step, jax.Array):
        raise ConfigError("These are the shapes of a state: `lower` takes them, a step needs the arrays.")
    raise ConfigError(
        "This state was donated to an earlier step: its arrays are deleted.",
        suggestion="Use the state that the step returned: `state, metrics = step(state, batch)`.",
    )


def check_fixed_point(old: State, new: State) -> None:
    """Refuse a step whose new state is not of the type of the old one: it would be compiled again every step.

    Errors: ConfigError with every leaf whose shape or dtype changes.
    """
    if jax.tree.structure(old) != jax.tree.structure(new):
        raise ConfigError("The step returns a state of another tree than the one it took.")
    pairs = zip(leaves_by_path(old), jax.tree.leaves(new), strict=True)
    faults = [
        f"`{path}` goes in as {_described(before)} and comes out as {_described(after)}."
        for (path, before), after in pairs
        if (before.shape, before.dtype) != (after.shape, after.dtype)
    ]
    if faults:
        raise ConfigError(
            _sentence(faults_in_one(faults, of="the new state")),
            facts=(
                (
                    "reason",
                    "a state that changes its type is compiled again every step, and its buffers are lost",
                ),
            ),
        )


def check_option(name: str, value: object, kind: type, *, expected: str) -> None:
    """Refuse an argument that is neither None nor of its kind. Errors: ConfigError."""
    if value is not None and not isinstance(value, kind):
        facts = (("expected", f"{expected}, or None"), ("got", type(value).__name__))
        raise ConfigError(f"`{name}` is not a {name}.", facts=facts)


def check_gradient(written: str, returned: Any, like: Any) -> None:  # Any: what a transform returns; a gradient
    """Refuse what a transform makes of a gradient, if it is none. Errors: ConfigError that names the transform."""
    match returned:
        case (grads, dict()):
            pass
        case _:
            raise ConfigError(
                f"`{written}` does not return a gradient.",
                facts=(("expected", "(gradient, dict of metrics)"), ("got", repr(returned)[:200])),
            )
    wanted, found = ([(path, jnp.shape(leaf)) for path, leaf in leaves_by_path(one)] for one in (like, grads))
    if wanted != found or jax.tree.structure(like) != jax.tree.structure(grads):
        shown = (", ".join(f"{path} {list(shape)}" for path, shape in rows) or "no leaves" for rows in (wanted, found))
        facts = tuple(zip(("expected", "got"), shown, strict=True))
        raise ConfigError(f"`{written}` returns a gradient of another form than it takes.", facts=facts)


def check_seed(seed: object) -> None:
    """Refuse a seed that is neither a whole number of 64 bits nor a typed key. Errors: ConfigError."""
    if isinstance(seed, jax.Array) and jnp.issubdtype(seed.dtype, jax.dtypes.prng_key) and seed.shape == ():
        return
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise ConfigError(
            "The seed is neither a whole number of 64 bits nor a typed key.", facts=(("got", repr(seed)),)
        )


def check_batch(batch: Batch, program: Program, *, shapes_too: bool = True) -> None:
    """Refuse a batch that the program cannot split. Errors: BatchError with all faults.

    `shapes_too` takes shapes in the place of arrays. It may be called while a part of its faults is being handled:
    it says all there is to say, so it hides the context.
    """
    leaves = leaves_by_path(batch)
    faults = [fault for path, leaf in leaves if (fault := _leaf_fault(f"`{path}`" if path else "the batch", leaf))]
    if not leaves:
        faults = ["the batch has no leaves."]
    repeated = [node for node in program if isinstance(node, RepeatNode)]
    if repeated and not faults:
        faults = _repeat_faults(leaves, repeated[0])
    axis = len(repeated)
    rows = {path: leaf.shape[axis] for path, leaf in leaves if isinstance(leaf, ArrayLike) and leaf.ndim > axis}
    if len(set(rows.values())) > 1:
        counts = ", ".join(f"`{path}` has {number}" for path, number in rows.items())
        faults.append(f"the leaves differ in their number of rows: {counts}.")
    elif not faults:
        faults = _division_faults(next(iter(rows.values())), program)
    if not shapes_too and any(isinstance(leaf, jax.ShapeDtypeStruct) for _, leaf in leaves):
        faults.append("these are the shapes of a batch: `lower` takes them, a step needs the arrays.")
    if faults:
        raise BatchError(_sentence(faults_in_one(faults, of="the batch"))) from None


def _repeat_faults(leaves: list[tuple[str, Any]], node: RepeatNode) -> list[str]:
    stacked = f"`{node.written}` takes {node.size} batches stacked, [{node.size}, batch, ...]"
    return [
        f"`{path}` is {_described(leaf)}: {stacked}."
        for path, leaf in leaves
        if leaf.ndim < 2 or leaf.shape[0] != node.size or not leaf.shape[1]
    ]


def _leaf_fault(shown: str, leaf: object) -> str | None:
    if not isinstance(leaf, ArrayLike):
        if isinstance(leaf, np.number | np.bool | bool | int | float | complex):
            return f"{shown} is {_a(type(leaf).__name__)}: a scalar, or a list that is not an array, has no rows."
        return f"{shown} is {_a(type(leaf).__name__)}, not an array."
    if isinstance(leaf, np.ndarray) and leaf.dtype.kind not in "biufcV":
        return f"{shown} has dtype {leaf.dtype}, which a program cannot take."
    if isinstance(leaf, jax.Array) and leaf.is_deleted():
        return f"{shown} is deleted: it was donated."
    if not leaf.ndim:
        return f"{shown} is a scalar: it has no rows on axis 0."
    if not leaf.shape[0]:
        return f"{shown} has 0 rows."
    return None


def _division_faults(rows: int, program: Program) -> list[str]:
    parts = [node for node in program if isinstance(node, MeanNode) and not isinstance(node.place, UnderVmap)]
    cells = math.prod(node.size for node in parts)
    if rows % cells == 0:
        return []
    below, above = rows // cells * cells, (rows // cells + 1) * cells
    sizes = f"{below} or {above}" if below else f"{above}"
    return [f"{rows} rows do not divide by {cells}{_product(parts, cells)}; the nearest that do: {sizes}."]


def _product(parts: list[MeanNode], cells: int) -> str:
    def shown(node: MeanNode) -> str:
        match node.place:
            case InScan(size):
                return f"{size} (`{node.written}`)"
            case OverMesh(axes):
                named = ", ".join(repr(axis) for axis in axes)
                return f"{node.size} (mesh {'axis' if len(axes) == 1 else 'axes'} {named})"
            case UnderVmap():
                return "1"

    return " = " + " × ".join(shown(node) for node in parts if node.size > 1) if cells > 1 else ""


def _described(value: Any) -> str:
    if isinstance(value, ArrayLike):
        return f"{value.dtype}{list(value.shape)}"
    return type(value).__name__


def _a(name: str) -> str:
    return f"an {name}" if name[:1].lower() in "aeiou" else f"a {name}"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
