"""Optimizers that multiply whole matrices, as Muon and Shampoo do: of which parameters; and the gather of sharded ones.

The operations of `update` are read. What is made of the gradient of a parameter element by element has the sharding of
that gradient. The first other operation that leads to a product of matrices needs the whole matrix: of a sharded one
XLA would gather or reduce something in every product, so it is gathered there, once.

Matrices of one shape to which the same operations happen are not gathered: they are stacked, and each device is given
some of them, whole. One that is alone in its shape is computed on every device: a step waits for it either way. To give
each of several such to one device would pay for the two embeddings of GPT-2 124M: 851 GFLOP on the busiest of 8 devices
with Muon instead of 1,465. Left to Adam, as Muon's authors do, they make it 254, and no matrix is alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.sharding import PartitionSpec

from stepc._compiler.layers import apply_equation, has_same_operations, programs_in
from stepc._compiler.rows import ELEMENTWISE
from stepc._language.kinds import Grads, Params
from stepc._language.optimizers import WHOLE_BATCH_LOSSES, Optimizer, UpdateRunner, run_optimizer
from stepc._language.state import leaves_by_path

PRODUCTS = frozenset(
    """
    cholesky conv_general_dilated dot_general eig eigh geqrf householder_product lu qr schur svd triangular_solve
    """.split()
)
CALLS = ("jit", "pjit", "closed_call")

Gather = Callable[[jax.Array, int], jax.Array]  # of the parameter at a place among the trained ones
# Of a function of one matrix, of what it takes of each, of what it takes of all, and of the place of the first.
Share = Callable[[Callable[..., Any], list[list[jax.Array]], list[jax.Array], int], list[list[jax.Array]]]


@dataclass(frozen=True)
class _Core:
    """What an optimizer does to one whole matrix: from the first operation that needs it whole to the last such.

    Args:
      positions: of the operations, in the program.
      inputs: the variables that they read and do not make, in the order in which they do.
      outputs: the variables that they make and others read.
    """

    positions: tuple[int, ...]
    inputs: tuple[Any, ...]  # Any, twice: variables
    outputs: tuple[Any, ...]


@dataclass(frozen=True)
class _Image:
    """What is made of the gradient of the parameter at a place, element by element."""

    value: jax.Array
    place: int


def matrices_read(optimizer: Optimizer, params: Params, opt_state: Any, written: str) -> tuple[str, ...]:
    """The paths of the parameters whose gradient an optimizer multiplies as whole matrices.

    Args:
      params: the shapes of those that are trained.
      opt_state: the shapes of its state, Any: the optimizer's own tree.
    """
    found: dict[int, None] = {}

    def note(value: jax.Array, place: int) -> jax.Array:
        found[place] = None
        return value

    jax.eval_shape(partial(_update_on_shapes, optimizer, written, gathering(note)), params, opt_state)
    paths = [path for path, _ in leaves_by_path(params)]
    return tuple(paths[place] for place in sorted(found))


def gathering(
    gather: Gather, share: Share | None = None, alone: Mapping[int, PartitionSpec] | None = None
) -> UpdateRunner:
    """Runs the `update` of an optimizer, with matrices gathered where it first needs them whole.

    Args:
      share: computes a function of several matrices, some of them on each device.
      alone: the spec of each that is not in a stack which is sharded along it, by place.
    """

    def run(
        update: Callable[..., Any], grads: Grads, opt_state: Any, params: Params, taken: Mapping[str, Any]
    ) -> tuple[Grads, Any]:  # Any, twice: the optimizer's own tree; arrays and functions
        arrays = {name: value for name, value in taken.items() if name not in WHOLE_BATCH_LOSSES}
        functions = {name: value for name, value in taken.items() if name in WHOLE_BATCH_LOSSES}

        def call(grads: Grads, opt_state: Any, params: Params, arrays: dict[str, Any]) -> Any:
            return update(grads, opt_state, params, **arrays, **functions)

        traced, shapes = jax.make_jaxpr(call, return_shape=True)(grads, opt_state, params, arrays)
        leaves, whole = jax.tree.leaves(grads), set[int]()

        def noted(value: jax.Array, place: int) -> jax.Array:
            whole.add(place)
            return gather(value, place)

        images = [_Image(leaf, place) if leaf.ndim > 1 else leaf for place, leaf in enumerate(leaves)]
        values = [*images, *jax.tree.leaves((opt_state, params, arrays))]
        results = _run(traced, values, noted, _groups(traced.jaxpr, len(leaves), alone or {}), share)
        updates, new = jax.tree.structure(shapes).unflatten(map(_whole, results))
        # Otherwise XLA would shard the products as the update is sharded.
        leaves, tree = jax.tree.flatten(updates)
        return tree.unflatten(
            [gather(leaf, place) if place in whole else leaf for place, leaf in enumerate(leaves)]
        ), new

    return run


def matrices_shared(
    optimizer: Optimizer,
    params: Params,
    opt_state: Any,  # Any: the optimizer's own tree
    alone: Mapping[int, PartitionSpec],
    written: str,
) -> tuple[int, ...]:
    """The places of the matrices that are stacked and shared; for the arguments see above."""
    found: list[int] = []

    def run(
        update: Callable[..., Any], grads: Grads, opt_state: Any, params: Params, taken: Mapping[str, Any]
    ) -> tuple[Grads, Any]:  # Any, twice: as above; arrays and functions
        traced = jax.make_jaxpr(lambda *trees: update(*trees, **taken))(grads, opt_state, params)
        found.extend(place for group in _groups(traced.jaxpr, len(jax.tree.leaves(grads)), alone) for place in group)
        return update(grads, opt_state, params, **taken)

    jax.eval_shape(partial(_update_on_shapes, optimizer, written, run), params, opt_state)
    return tuple(sorted(found))


def _update_on_shapes(optimizer: Optimizer, written: str, run: UpdateRunner, params: Params, opt_state: Any) -> Any:
    losses = dict.fromkeys(WHOLE_BATCH_LOSSES, lambda params: jnp.zeros(()))
    offered = {"value": jnp.zeros(()), "grad": params, **losses}
    return run_optimizer(optimizer, params, opt_state, params, offered, written, run)


def _groups(jaxpr: Jaxpr, num_grads: int, alone: Mapping[int, PartitionSpec]) -> list[dict[int, _Core]]:
    """The cores of several matrices each, by place: those of one shape and sharding to which the same happens."""
    inputs = jaxpr.invars[:num_grads]
    cores = _cores(jaxpr, {var: place for place, var in enumerate(inputs) if len(_type(var)[0]) > 1})
    groups: list[dict[int, _Core]] = []
    for place in alone:
        if place not in cores:
            continue
        for group in groups:
            first, core = next(iter(group.items()))
            if alone[first] == alone[place] and _is_same(jaxpr, core, cores[place]):
                group[place] = cores[place]
                break
        else:
            groups.append({place: cores[place]})
    return [group for group in groups if len(group) > 1]


def _cores(jaxpr: Jaxpr, images: dict[Any, int]) -> dict[int, _Core]:  # Any: a variable
    """What happens to each whole matrix, by place, if nothing in it depends on another matrix."""
    images, multiplied = dict(images), _multiplied(jaxpr)
    whole: dict[Any, int] = {}  # of what is made of a whole matrix: its place
    positions: dict[int, list[int]] = {}
    mixed: set[int] = set()
    for position, equation in enumerate(jaxpr.eqns):
        read = [var for var in equation.invars if not isinstance(var, Literal)]
        of_images = {images[var] for var in read if var in images}
        places = {whole[var] for var in read if var in whole}
        if not places:
            if of_images and _is_elementwise(equation):
                given = [
                    set() if isinstance(var, Literal) or var not in images else {images[var]} for var in equation.invars
                ]
                for var, made_of in zip(equation.outvars, _made_of(equation, given), strict=True):
                    images |= {var: min(made_of)} if made_of else {}
                    mixed |= made_of if len(made_of) > 1 else set()
                continue
            if not of_images or not (_multiplies(equation) or any(var in multiplied for var in equation.outvars)):
                continue
        places |= of_images
        mixed |= places if len(places) > 1 else set()
        whole |= dict.fromkeys(equation.outvars, min(places))
        for place in places:
            positions.setdefault(place, []).append(position)
    found: dict[int, _Core] = {}
    for place in positions.keys() - mixed:
        own = positions[place]
        while own and _is_elementwise(jaxpr.eqns[own[-1]]):
            own.pop()
        found |= {place: _core(jaxpr, own)} if own else {}
    return found


def _made_of(equation: Any, given: Sequence[set[int]]) -> list[set[int]]:  # Any: a jax.extend.core.JaxprEqn
    """The places of the matrices that each result of an operation is made of, element by element."""
    if equation.primitive.name not in CALLS:
        return [set().union(*given)] * len(equation.outvars)
    program = equation.params["jaxpr"].jaxpr
    known: dict[Any, set[int]] = dict(zip(program.invars, given, strict=True))  # Any: a variable

    def read(var: Any) -> set[int]:  # Any: a variable, or a literal
        return set() if isinstance(var, Literal) else known.get(var, set())

    for one in program.eqns:
        known |= dict(zip(one.outvars, _made_of(one, list(map(read, one.invars))), strict=True))
    return list(map(read, program.outvars))


def _core(jaxpr: Jaxpr, positions: list[int]) -> _Core:
    equations = [jaxpr.eqns[position] for position in positions]
    made = [var for equation in equations for var in equation.outvars]
    read = dict.fromkeys(var for one in equations for var in one.invars if not isinstance(var, Literal))
    others = (one for position, one in enumerate(jaxpr.eqns) if position not in positions)
    used = {
        var for var in (*jaxpr.outvars, *(var for one in others for var in one.invars)) if not isinstance(var, Literal)
    }
    inputs = (var for var in read if var not in set(made))
    return _Core(tuple(positions), tuple(inputs), tuple(var for var in made if var in used))


def _is_same(jaxpr: Jaxpr, one: _Core, other: _Core) -> bool:
    """Whether the same happens to two matrices of one shape."""
    if list(map(_type, one.inputs)) != list(map(_type, other.inputs)) or len(one.outputs) != len(other.outputs):
        return False
    ones, others = ([jaxpr.eqns[position] for position in core.positions] for core in (one, other))
    same = dict(zip(one.inputs, other.inputs, strict=True))
    return has_same_operations(ones, others, same, (one.outputs, other.outputs))


def _type(var: Any) -> tuple[tuple[int, ...], Any]:  # Any: a variable; a dtype
    return (var.aval.shape, var.aval.dtype)


def _is_elementwise(equation: Any) -> bool:  # Any: a jax.extend.core.JaxprEqn
    if equation.primitive.name in CALLS:
        return all(map(_is_elementwise, equation.params["jaxpr"].jaxpr.eqns))
    return equation.primitive.name in ELEMENTWISE


def _run(
    traced: ClosedJaxpr,
    values: Sequence[Any],  # Any: arrays, numbers, `_Image`
    gather: Gather,
    groups: Sequence[dict[int, _Core]] = (),
    share: Share | None = None,
) -> list[Any]:  # Any: as above
    jaxpr = traced.jaxpr
    known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*traced.consts, *values), strict=True))
    multiplied, gathered = _multiplied(jaxpr), dict[int, jax.Array]()

    def read(var: Any) -> Any:  # Any: a variable, or a literal
        return var.val if isinstance(var, Literal) else known[var]

    def whole(value: Any) -> Any:
        if not isinstance(value, _Image):
            return value
        if id(value.value) not in gathered:
            gathered[id(value.value)] = gather(value.value, value.place)
        return gathered[id(value.value)]

    def run(equation: Any) -> None:  # Any: a jax.extend.core.JaxprEqn
        given = list(map(read, equation.invars))
        image = next((one for one in given if isinstance(one, _Image)), None)
        if image is not None and equation.primitive.name in CALLS:
            results = _run(equation.params["jaxpr"], given, gather)
        elif image is None or equation.primitive.name in ELEMENTWISE:
            results = apply_equation(equation, list(map(_whole, given)), jaxpr)
            if image is not None:
                shape = image.value.shape
                results = [_Image(one, image.place) if one.shape == shape else one for one in results]
        else:
            needs_whole = _multiplies(equation) or any(var in multiplied for var in equation.outvars)
            results = apply_equation(equation, list(map(whole if needs_whole else _whole, given)), jaxpr)
        known.update(zip(equation.outvars, results, strict=True))

    # Of what is shared nothing that is made before depends on it.
    shared = {position for group in groups for core in group.values() for position in core.positions}
    after = []
    for position, equation in enumerate(jaxpr.eqns):
        if position in shared:
            continue
        if all(isinstance(var, Literal) or var in known for var in equation.invars):
            run(equation)
        else:
            after.append(equation)
    for group in groups:
        known.update(_shared(traced.jaxpr, group, lambda var: _whole(read(var)), share))
    for equation in after:
        run(equation)
    return list(map(read, jaxpr.outvars))


def _shared(
    jaxpr: Jaxpr, group: dict[int, _Core], read: Callable[[Any], Any], share: Share | None
) -> dict[Any, jax.Array]:  # Any: variables, arrays
    """What becomes of several matrices, each computed on one device."""
    place, first = next(iter(group.items()))
    cores = list(group.values())
    columns = list(zip(*(core.inputs for core in cores), strict=True))
    is_common = [all(var is column[0] for var in column) for column in columns]

    def of_one(own: list[jax.Array], common: list[jax.Array]) -> list[jax.Array]:
        rest, same = iter(own), iter(common)
        known = {var: next(same if every else rest) for var, every in zip(first.inputs, is_common, strict=True)}
        for position in first.positions:
            equation = jaxpr.eqns[position]
            given = [var.val if isinstance(var, Literal) else known[var] for var in equation.invars]
            known.update(zip(equation.outvars, apply_equation(equation, given, jaxpr), strict=True))
        return [known[var] for var in first.outputs]

    if share is None:
        raise ValueError("matrices are shared at the outermost level")
    own = [[read(var) for var in column] for column, every in zip(columns, is_common, strict=True) if not every]
    common = [read(column[0]) for column, every in zip(columns, is_common, strict=True) if every]
    made = share(of_one, own, common, place)
    pairs = zip(zip(*(core.outputs for core in cores), strict=True), made, strict=True)
    return {var: leaf for variables, leaves in pairs for var, leaf in zip(variables, leaves, strict=True)}


def _whole(value: Any) -> Any:  # Any: as in `_run`
    return value.value if isinstance(value, _Image) else value


def _multiplied(jaxpr: Jaxpr) -> set[Any]:  # Any: variables
    """The variables of two dimensions or more of which a product is made, directly or of what is made of them."""
    found: set[Any] = set()
    for equation in reversed(jaxpr.eqns):
        if _multiplies(equation) or any(var in found for var in equation.outvars):
            inputs = (var for var in equation.invars if not isinstance(var, Literal))
            found.update(var for var in inputs if len(getattr(var.aval, "shape", ())) > 1)
    return found


def _multiplies(equation: Any) -> bool:  # Any: a jax.extend.core.JaxprEqn
    inner = (one for program in programs_in(equation) for one in program.eqns)
    return equation.primitive.name in PRODUCTS or any(map(_multiplies, inner))
