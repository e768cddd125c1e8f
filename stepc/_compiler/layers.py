"""A loss on sharded parameters that gathers them where they are used: one layer at a time in a scan over layers.

The operations of the loss are read and run again. A scan over sharded parameters runs over the shards, and its body
gathers one layer; any other operation that takes a shard is given the gathered leaf. The gradient with respect to a
shard is then reduced and scattered by the transpose of the gather.

Gathered parameters are not kept for the gradient; they are gathered again. Whatever the loss itself rematerialises
stays that way: shards go into its own `jax.checkpoint`, because a second one around it would override what it keeps.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, update_wrapper
from itertools import groupby
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun
from jax.sharding import PartitionSpec

from stepc._jax import inlined_call, scan_counts
from stepc._language.state import leaves_by_path

# What a layer does to gathered parameters before it uses them. It is recomputed for the gradient: otherwise the
# gathered parameters of all layers would be kept, in one form or another.
DONE_AGAIN = (
    "custom_vjp_call", "custom_vjp_call_jaxpr", "all_gather", "shard_map", "convert_element_type", "transpose",
    "reshape", "squeeze", "broadcast_in_dim",
)  # fmt: skip
REMATERIALISED = ("checkpoint", "remat2")
INLINED = ("jit", "pjit", "closed_call")

LossFunction: TypeAlias = Callable[..., Any]  # Any: of parameters, and of other trees of the user's
# Gathers a shard: along its dimension, with its automatic axes, in the dtype that the loss wants; of that parameter.
Gather: TypeAlias = Callable[[jax.Array, int, PartitionSpec, np.dtype, str], jax.Array]


@dataclass(frozen=True)
class _Shard:
    """A shard of a parameter that the loss has not used yet.

    Args:
      value: the shard on this device.
      dim: the sharded dimension.
      spec: along the automatic axes.
      dtype: the one that the loss wants. A shard is converted as it is gathered, so that its gradient is reduced in the
        dtype of the parameters.
      path: of the parameter.
    """

    value: jax.Array
    dim: int
    spec: PartitionSpec
    dtype: np.dtype
    path: str

    def gathered(self, gather: Gather) -> jax.Array:
        return gather(self.value, self.dim, self.spec, self.dtype, self.path)

    def of_layer(self, value: jax.Array) -> "_Shard":
        """The shard of one layer, from a shard whose first dimension is that of the layers."""
        return _Shard(value, self.dim - 1, PartitionSpec(*tuple(self.spec)[1:]), self.dtype, self.path)

    def of(self, value: jax.Array) -> "_Shard":
        """Another value with the same sharding."""
        return _Shard(value, self.dim, self.spec, self.dtype, self.path)


_Value: TypeAlias = Any  # an array, or a `_Shard`


def gather_by_layer(
    function: "LossFunction | TracedFunction",
    shapes: Any,  # Any, here and below: trees like the parameters
    dimensions: Any,
    specs: Any,
    gather: Gather,
) -> LossFunction:
    """The same function of sharded parameters.

    Args:
      function: of parameters, and of anything else.
      shapes: those of the gathered parameters.
      dimensions: the sharded dimension of each parameter, or -1.
      specs: the spec of each parameter along automatic axes.
      gather: gathers one shard.
    """

    def on_shards(params: Any, *rest: Any) -> Any:
        traced = function if isinstance(function, TracedFunction) else trace_function(function, shapes, *rest)
        leaves = zip(
            leaves_by_path(params),
            jax.tree.leaves(dimensions),
            jax.tree.leaves(specs, is_leaf=lambda one: isinstance(one, PartitionSpec)),
            strict=True,
        )
        values = [leaf if dim < 0 else _Shard(leaf, dim, spec, leaf.dtype, path) for (path, leaf), dim, spec in leaves]
        return traced.result(_run(traced.program, [*values, *jax.tree.leaves(rest)], gather))

    return on_shards


@dataclass(frozen=True)
class TracedFunction:
    """A function of arrays, as the operations that a trace of it has found.

    Args:
      program: of the leaves of its arguments. What the function returns are the last of its results.
      tree: the structure of what the function returns.
      others: for each leaf of that, what it is if it is no array, such as a static count; None for an array.
    """

    program: ClosedJaxpr
    tree: Any  # Any: a jax.tree_util.PyTreeDef
    others: tuple[Any, ...]  # Any: what the function returned

    def __call__(self, *args: Any) -> Any:  # Any, twice: trees of the user's
        return self.result(jaxpr_as_fun(_with_shared_calls(self.program))(*jax.tree.leaves(args)))

    def result(self, results: Sequence[Any]) -> Any:  # Any, twice: arrays; a tree of the user's
        """What the function returns, of the results of the program."""
        arrays = iter(results[len(results) - sum(other is None for other in self.others) :])
        return self.tree.unflatten([next(arrays) if other is None else other for other in self.others])

    def takes(self, *args: Any) -> bool:  # Any: trees of the user's, of arrays or of shapes
        """Whether it was traced for arguments of these types."""
        leaves = jax.tree.leaves(args)
        types = [leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf) for leaf in leaves]
        return list(map(_type_of, types)) == list(map(_type_of, self.program.in_avals))


def _with_shared_calls(traced: ClosedJaxpr) -> ClosedJaxpr:
    """The same program, where operations that are the same but for their inputs are calls of one program.

    jax derives the derivative of a program once, and of an operation each time that it comes. Functions of `jax.numpy`
    are such programs; when they are traced, only their operations are left.
    """
    jaxpr, keys = traced.jaxpr, [_key_of(equation) for equation in traced.jaxpr.eqns]
    times = Counter(key for key in keys if key is not None)
    kinds = cache(inlined_call)  # one for each number of inputs, in the mesh of this trace
    calls: dict[Any, Any] = {}  # Any, twice: what `_key_of` gives; a primitive and its parameters, or None

    def shared(equation: Any, key: Any) -> Any:  # Any: equations, and a key
        if key is None or times[key] == 1:
            return equation
        inputs = list(dict.fromkeys(var for var in equation.invars if not isinstance(var, Literal)))
        if key not in calls:
            call = kinds(len(inputs))
            calls[key] = call and call(_program_of([equation], jaxpr, equation.outvars))
        if calls[key] is None:
            return equation
        primitive, params = calls[key]
        return equation.replace(primitive=primitive, params=params, invars=inputs)

    equations = list(map(shared, jaxpr.eqns, keys))
    return ClosedJaxpr(jaxpr.replace(eqns=equations), traced.consts)


def _key_of(equation: Any) -> Any:  # Any: an equation; something to compare
    """What two operations are to have in common to be one program; None for one that is a program of its own."""
    if equation.effects or len(equation.outvars) != 1 or next(programs_in(equation), None) is not None:
        return None
    places: dict[Any, int] = {}
    inputs = [
        # The bits of a number: 0.0 is not -0.0.
        (np.asarray(one.val).tobytes() if isinstance(one, Literal) else places.setdefault(one, len(places)))
        for one in equation.invars
    ]
    types = tuple(_type_of(one.aval) for one in equation.invars)
    key = equation.primitive, tuple(equation.params.items()), tuple(inputs), types, equation.ctx
    try:
        hash(key)
    except TypeError:  # an array among its parameters
        return None
    return key


def _type_of(aval: Any) -> tuple[Any, ...]:  # Any: a shape, of jax or of ours
    return aval.shape, aval.dtype, aval.weak_type


def trace_function(function: LossFunction, *shapes: Any) -> TracedFunction:
    """Trace a function for arguments of these shapes. An error of jax about its tracers names what it wraps."""
    returned: list[Any] = []

    def arrays(*args: Any) -> list[Any]:
        leaves, tree = jax.tree.flatten(function(*args))
        returned[:] = [tree, tuple(None if isinstance(leaf, jax.Array) else leaf for leaf in leaves)]
        return [leaf for leaf in leaves if isinstance(leaf, jax.Array)]

    update_wrapper(arrays, function, updated=())
    program = jax.make_jaxpr(arrays)(*shapes)
    return TracedFunction(program, *returned)


def stacked_inputs(jaxpr: Jaxpr) -> set[int]:
    """The positions of the inputs of a program that a scan takes one slice of at a time: stacks of layers."""
    origins: dict[Any, int] = {var: position for position, var in enumerate(jaxpr.invars)}  # Any: a variable
    found: set[int] = set()
    for equation in jaxpr.eqns:
        inputs = [None if isinstance(var, Literal) else origins.get(var) for var in equation.invars]
        if all(position is None for position in inputs):
            continue
        num_whole = len(inputs)  # the inputs that the operation takes whole
        match equation.primitive.name:
            case "convert_element_type" if inputs[0] is not None:
                origins[equation.outvars[0]] = inputs[0]
            case "scan":
                num_whole = sum(scan_counts(equation.params))
                found |= {position for position in inputs[num_whole:] if position is not None}
            case _:
                pass
        for inner in programs_in(equation):
            if len(inner.invars) == len(inputs):
                within = [inputs[place] for place in stacked_inputs(inner) if place < num_whole]
                found |= {position for position in within if position is not None}
    return found


def whole_inputs(jaxpr: Jaxpr) -> dict[int, set[str]]:
    """The positions of the inputs of a program that it takes whole, each with the dtypes that it takes them in."""
    origins: dict[Any, int] = {var: position for position, var in enumerate(jaxpr.invars)}  # Any: a variable
    found: dict[int, set[str]] = {}

    def take(var: Any, dtypes: set[str] | None = None) -> None:  # Any: a variable, or a literal
        if not isinstance(var, Literal) and var in origins:
            found.setdefault(origins[var], set()).update(dtypes or {var.aval.dtype.name})

    for equation in jaxpr.eqns:
        inputs: list[Any] = equation.invars  # Any: variables, and literals
        params = equation.params
        match equation.primitive.name:
            case name if name in INLINED or name in REMATERIALISED:
                for position, dtypes in whole_inputs(next(programs_in(equation))).items():
                    take(inputs[position], dtypes)
            case "convert_element_type" if _is_conversion(params, inputs[0].aval.dtype):
                if not isinstance(inputs[0], Literal) and inputs[0] in origins:
                    origins[equation.outvars[0]] = origins[inputs[0]]
            case "scan":
                for var in inputs[: sum(scan_counts(params))]:
                    take(var)
            case _:
                for var in inputs:
                    take(var)
    for var in jaxpr.outvars:
        take(var)
    return found


def has_same_operations(
    ones: Sequence[Any],  # Any, here and below: jax.extend.core.JaxprEqn, and variables
    others: Sequence[Any],
    same: dict[Any, Any],
    outputs: tuple[Sequence[Any], Sequence[Any]],
    *,
    but: frozenset[str] = frozenset(),
) -> bool:
    """Whether two lists of operations make the same of the same inputs, by their parameters but for some.

    Args:
      same: the variables of the second for those of the first that are the same before.
      outputs: variables of both that are to be the same after.
    """
    same = dict(same)

    def is_same(one: Any, other: Any) -> bool:  # Any: a variable, or a literal
        if isinstance(one, Literal) or isinstance(other, Literal):
            return type(one) is type(other) and bool(np.array_equal(one.val, other.val))
        return same.get(one) is other

    if len(ones) != len(others):
        return False
    for one, other in zip(ones, others, strict=True):
        if one.primitive is not other.primitive or not all(map(is_same, one.invars, other.invars)):
            return False
        inner = list(zip(programs_in(one), programs_in(other), strict=False))
        for program, twin in inner:
            inputs = dict(zip(program.invars, twin.invars, strict=False))
            if program.constvars or not has_same_operations(
                program.eqns, twin.eqns, inputs, (program.outvars, twin.outvars), but=but
            ):
                return False
        # Programs are compared above, and functions are derivatives of what is not differentiated here.
        names = [name for name, value in one.params.items() if name not in but and not (inner and _is_code(value))]
        if any(one.params[name] != other.params[name] for name in names):
            return False
        same |= dict(zip(one.outvars, other.outvars, strict=True))
    return all(map(is_same, *outputs))


def _is_code(value: Any) -> bool:  # Any: a parameter of an operation
    held = value if isinstance(value, tuple | list) else (value,)
    return any(isinstance(one, Jaxpr | ClosedJaxpr) or callable(one) for one in held)


def programs_in(equation: Any) -> Iterator[Jaxpr]:  # Any: an equation
    """The programs that an operation runs."""
    for value in equation.params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            match one:
                case Jaxpr():
                    yield one
                case ClosedJaxpr():
                    yield one.jaxpr
                case _:
                    pass


def _run(traced: ClosedJaxpr, values: Sequence[_Value], gather: Gather) -> list[jax.Array]:
    jaxpr, known, once = traced.jaxpr, _known(traced, values), _once(gather)
    for equation in jaxpr.eqns:
        _add_results(known, equation, jaxpr, once)
    return [_result(_read(known, var), once) for var in jaxpr.outvars]


def _run_layer(traced: ClosedJaxpr, values: Sequence[_Value], gather: Gather) -> list[jax.Array]:
    """Run one layer, whose gathered parameters are not kept.

    Each stretch of operations that the loss does not rematerialise gathers them again for its gradient, and recomputes
    nothing else.
    """
    jaxpr, known = traced.jaxpr, _known(traced, values)
    for is_rematerialised, group in groupby(jaxpr.eqns, key=lambda one: one.primitive.name in REMATERIALISED):
        stretch = list(group)
        if is_rematerialised:
            for equation in stretch:
                _add_results(known, equation, jaxpr, gather)
            continue
        program = _program_of(stretch, jaxpr, _used_outside(stretch, jaxpr))
        inputs = [known[var] for var in program.jaxpr.invars]
        results = _checkpoint(program, inputs, gather, policy=_is_kept, prevent_cse=False)
        known.update(zip(program.jaxpr.outvars, results, strict=True))
    return [_result(_read(known, var), gather) for var in jaxpr.outvars]


def _once(gather: Gather) -> Gather:
    """Gather each shard once."""
    cache: dict[tuple[int, PartitionSpec, np.dtype], tuple[jax.Array, jax.Array]] = {}

    def cached(shard: jax.Array, dim: int, spec: PartitionSpec, dtype: np.dtype, path: str) -> jax.Array:
        key = (id(shard), spec, dtype)
        if key not in cache:
            cache[key] = (gather(shard, dim, spec, dtype, path), shard)  # the shard too, so that no other gets its id
        return cache[key][0]

    return cached


def _known(traced: ClosedJaxpr, values: Sequence[_Value]) -> dict[Any, _Value]:  # Any: a variable
    jaxpr = traced.jaxpr
    return dict(zip((*jaxpr.constvars, *jaxpr.invars), (*traced.consts, *values), strict=True))


def _read(known: dict[Any, _Value], var: Any) -> _Value:  # Any: a variable, or a literal
    return var.val if isinstance(var, Literal) else known[var]


def _gathered(value: _Value, gather: Gather) -> Any:  # Any: an array, or a number
    return value.gathered(gather) if isinstance(value, _Shard) else value


def _result(value: _Value, gather: Gather) -> jax.Array:
    """What a program returns; a constant is a literal there."""
    gathered = _gathered(value, gather)
    return gathered if isinstance(gathered, jax.Array) else jnp.asarray(gathered)


def _add_results(known: dict[Any, _Value], equation: Any, jaxpr: Jaxpr, gather: Gather) -> None:
    values = [_read(known, var) for var in equation.invars]
    known.update(zip(equation.outvars, _results(equation, values, jaxpr, gather), strict=True))


def _results(equation: Any, values: list[_Value], jaxpr: Jaxpr, gather: Gather) -> Sequence[_Value]:
    if not any(isinstance(value, _Shard) for value in values):
        return apply_equation(equation, values, jaxpr)
    params = equation.params
    match equation.primitive.name:
        case "convert_element_type" if _is_conversion(params, values[0].dtype):
            (shard,) = values
            return [_Shard(shard.value, shard.dim, shard.spec, params["new_dtype"], shard.path)]
        case name if name in INLINED:
            return _run(params["jaxpr"], values, gather)
        case name if name in REMATERIALISED:
            inner = params["jaxpr"]
            program = ClosedJaxpr(inner, ()) if isinstance(inner, Jaxpr) else inner
            return _checkpoint(program, values, gather, params["policy"], params["prevent_cse"])
        case "scan":
            return _scan(params, values, gather)
        case _:
            return apply_equation(equation, [_gathered(value, gather) for value in values], jaxpr)


def _is_conversion(params: Any, dtype: np.dtype) -> bool:  # Any: of the operation
    """Whether a shard is converted before it is gathered.

    A frozen whole number is gathered as it is, and converted then: it is the smaller of the two.
    """
    return jnp.issubdtype(params["new_dtype"], jnp.floating) and jnp.issubdtype(dtype, jnp.floating)


def apply_equation(equation: Any, values: list[Any], jaxpr: Jaxpr) -> Sequence[Any]:  # Any: an equation; arrays
    """Run one operation of a program as a function of its own, which jax treats like any other."""
    inputs = {var: value for var, value in zip(equation.invars, values, strict=True) if not isinstance(var, Literal)}
    return jaxpr_as_fun(_program_of([equation], jaxpr, equation.outvars))(*inputs.values())


def _checkpoint(
    program: ClosedJaxpr,
    values: list[_Value],
    gather: Gather,
    policy: Callable[..., Any] | None,  # Any: as jax.checkpoint takes it
    prevent_cse: bool,
) -> Sequence[jax.Array]:
    def run(*arrays: jax.Array) -> list[jax.Array]:
        inputs = [
            value.of(array) if isinstance(value, _Shard) else array for array, value in zip(arrays, values, strict=True)
        ]
        return _run(program, inputs, gather)

    def both(primitive: Any, *args: Any, **params: Any) -> Any:  # Any: as in `_is_kept`; and what the policy says
        return _is_kept(primitive) and policy is not None and policy(primitive, *args, **params)

    arrays = [value.value if isinstance(value, _Shard) else value for value in values]
    return jax.checkpoint(run, policy=policy and both, prevent_cse=prevent_cse)(*arrays)


def _is_kept(primitive: Any, *_: Any, **params: Any) -> bool:  # Any: a jax.extend.core.Primitive, and its arguments
    """Whether the result of an operation of a layer is kept for the gradient."""
    return primitive.name not in DONE_AGAIN


def _scan(params: Any, values: list[_Value], gather: Gather) -> Sequence[jax.Array]:
    num_consts, num_carry = scan_counts(params)
    consts = [_gathered(value, gather) for value in values[:num_consts]]
    start = [_gathered(value, gather) for value in values[num_consts : num_consts + num_carry]]
    # A stack that is sharded along the dimension that counts its layers is gathered whole.
    stacks = [
        _gathered(value, gather) if isinstance(value, _Shard) and value.dim == 0 else value
        for value in values[num_consts + num_carry :]
    ]

    def layer(carry: list[jax.Array], slices: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
        inputs = [
            stack.of_layer(one) if isinstance(stack, _Shard) else one for one, stack in zip(slices, stacks, strict=True)
        ]
        results = _run_layer(params["jaxpr"], [*consts, *carry, *inputs], gather)
        return results[:num_carry], results[num_carry:]

    carry, stacked = jax.lax.scan(
        layer, start, [stack.value if isinstance(stack, _Shard) else stack for stack in stacks],
        length=params["length"], reverse=params["reverse"], unroll=params["unroll"],
    )  # fmt: skip
    return [*carry, *stacked]


def _used_outside(equations: Sequence[Any], jaxpr: Jaxpr) -> list[Any]:
    """The variables that some equations of a program make for the others, or for its result."""
    inside = set(map(id, equations))
    used = [*jaxpr.outvars, *(var for one in jaxpr.eqns if id(one) not in inside for var in one.invars)]
    variables = {var for var in used if not isinstance(var, Literal)}
    return [var for one in equations for var in one.outvars if var in variables]


def _program_of(equations: Sequence[Any], jaxpr: Jaxpr, outvars: Sequence[Any]) -> ClosedJaxpr:
    """Some equations of a program, as a program of the variables that they take from outside."""
    made = {var for one in equations for var in one.outvars}
    used = {var: None for one in equations for var in one.invars if not isinstance(var, Literal)}
    program = jaxpr.replace(
        constvars=[], invars=[var for var in used if var not in made], outvars=list(outvars), eqns=list(equations),
        effects=set().union(*(one.effects for one in equations)),
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )  # fmt: skip
    return ClosedJaxpr(program, ())
