"""A loss on parameters in parts, made whole where they are used: one layer at a time in a scan over layers.

It reads the operations of a loss and runs them again. A scan over parameters in parts runs over the parts, and its
body makes one layer whole; any other operation that is given parts is given the whole. The gradient with respect to
the parts is then the sum over devices, each device its own part.

What a layer made whole is not kept for its gradient but made again. What the loss rematerialises itself stays so: parts
go into its `jax.checkpoint`, since one around it would say anew what is kept, in it too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun
from jax.sharding import PartitionSpec

# What a layer does to whole parameters before it uses them. It is not kept for the gradient but done again: whole
# parameters of all layers would be kept otherwise, in one form or another.
DONE_AGAIN = (
    "custom_vjp_call", "custom_vjp_call_jaxpr", "all_gather", "shard_map", "convert_element_type", "transpose",
    "reshape", "squeeze", "broadcast_in_dim",
)  # fmt: skip
REMATERIALISED = ("checkpoint", "remat2")


# Of a part, its dimension, its automatic axes and the dtype that the loss wants it in.
Whole: TypeAlias = Callable[[jax.Array, int, PartitionSpec, np.dtype], jax.Array]


class _How(NamedTuple):
    """A dimension in parts, the automatic axes, and the dtype that the loss wants: it is converted when it is made
    whole, so that its gradient is added up in the dtype of the parameters."""

    dim: int
    spec: PartitionSpec
    dtype: np.dtype

    @property
    def of_a_layer(self) -> "_How":
        """How one of what lies along its first dimension lies."""
        return self._replace(dim=self.dim - 1, spec=PartitionSpec(*tuple(self.spec)[1:]))


@dataclass(frozen=True)
class _Part:
    """A value that lies in parts."""

    value: jax.Array
    how: _How


def by_layer(
    function: Callable[..., Any],  # Any, here and below: trees of the user's
    shapes: Any,
    dims: Any,
    specs: Any,
    whole: Whole,
) -> Callable[..., Any]:
    """The same function of parameters in parts.

    Args:
      function: of parameters, and of anything else.
      shapes: of whole parameters.
      dims: a tree like them, the dimension along which each lies in parts, or -1.
      specs: a tree like them, how each lies along automatic axes.
      whole: makes a part whole.
    """

    def called(params: Any, *rest: Any) -> Any:
        static: list[Any] = []

        def arrays(params: Any, *rest: Any) -> list[Any]:
            leaves, tree = jax.tree.flatten(function(params, *rest))
            static[:] = [tree, [None if isinstance(leaf, jax.Array) else leaf for leaf in leaves]]
            return [leaf for leaf in leaves if isinstance(leaf, jax.Array)]

        traced = jax.make_jaxpr(arrays)(shapes, *rest)
        lying = jax.tree.leaves(specs, is_leaf=lambda one: isinstance(one, PartitionSpec))
        given = [
            leaf if dim < 0 else _Part(leaf, _How(dim, spec, leaf.dtype))
            for leaf, dim, spec in zip(jax.tree.leaves(params), jax.tree.leaves(dims), lying, strict=True)
        ]
        made = iter(_run(traced, [*given, *jax.tree.leaves(rest)], whole))
        tree, leaves = static
        return tree.unflatten([next(made) if leaf is None else leaf for leaf in leaves])

    return called


def _run(traced: ClosedJaxpr, given: Sequence[Any], whole: Whole) -> list[jax.Array]:
    jaxpr, known, once = traced.jaxpr, _known(traced, given), _once(whole)
    for equation in jaxpr.eqns:
        _add_result(known, equation, jaxpr, once)
    return [_made_whole(_read(known, var), once) for var in jaxpr.outvars]


def _run_layer(traced: ClosedJaxpr, given: Sequence[Any], whole: Whole) -> list[jax.Array]:
    """The same for a layer, whose whole parameters are not kept: each stretch of operations that the loss does not
    rematerialise makes them again for its gradient, and nothing else."""
    jaxpr, known = traced.jaxpr, _known(traced, given)
    for is_rematerialised, found in groupby(jaxpr.eqns, key=lambda one: one.primitive.name in REMATERIALISED):
        stretch = list(found)
        if is_rematerialised:
            for equation in stretch:
                _add_result(known, equation, jaxpr, whole)
            continue
        closed = _alone(stretch, jaxpr, _used_outside(stretch, jaxpr))
        values = [known[var] for var in closed.jaxpr.invars]
        made = _rematerialised(closed, values, whole, policy=_kept, prevent_cse=False)
        known.update(zip(closed.jaxpr.outvars, made, strict=True))
    return [_made_whole(_read(known, var), whole) for var in jaxpr.outvars]


def _known(traced: ClosedJaxpr, given: Sequence[Any]) -> dict[Any, Any]:  # Any: variables; arrays, or parts
    jaxpr = traced.jaxpr
    return dict(zip((*jaxpr.constvars, *jaxpr.invars), (*traced.consts, *given), strict=True))


def _read(known: dict[Any, Any], var: Any) -> Any:  # Any: a variable, or a number; an array, or a part
    return var.val if isinstance(var, Literal) else known[var]


def _add_result(known: dict[Any, Any], equation: Any, within: Jaxpr, whole: Whole) -> None:
    values = [_read(known, var) for var in equation.invars]
    known.update(zip(equation.outvars, _result(equation, values, within, whole), strict=True))


def _used_outside(equations: Sequence[Any], within: Jaxpr) -> list[Any]:
    """What some operations of a program make for the others, or as its result."""
    inside = set(map(id, equations))
    used = [*within.outvars, *(var for one in within.eqns if id(one) not in inside for var in one.invars)]
    names = {var for var in used if not isinstance(var, Literal)}
    return [var for one in equations for var in one.outvars if var in names]


def _alone(equations: Sequence[Any], within: Jaxpr, outvars: Sequence[Any]) -> ClosedJaxpr:
    """Some operations of a program, as a program of what they are given from outside."""
    made = {var for one in equations for var in one.outvars}
    used = {var: None for one in equations for var in one.invars if not isinstance(var, Literal)}
    effects = set().union(*(one.effects for one in equations))
    alone = within.replace(
        constvars=[], invars=[var for var in used if var not in made], outvars=list(outvars), eqns=list(equations),
        effects=effects, debug_info=within.debug_info.with_unknown_names(),
    )  # fmt: skip
    return ClosedJaxpr(alone, ())


def _once(whole: Whole) -> Whole:
    """The same, which makes each part whole once."""
    made: dict[tuple[int, PartitionSpec, np.dtype], tuple[jax.Array, jax.Array]] = {}

    def cached(part: jax.Array, dim: int, spec: PartitionSpec, dtype: np.dtype) -> jax.Array:
        key = (id(part), spec, dtype)
        if key not in made:
            made[key] = (whole(part, dim, spec, dtype), part)  # held, so that no other gets its id
        return made[key][0]

    return cached


def _result(equation: Any, values: list[Any], within: Jaxpr, whole: Whole) -> Sequence[Any]:
    if not any(isinstance(value, _Part) for value in values):
        return _bound(equation, values, within)
    params = equation.params
    match equation.primitive.name:
        case "convert_element_type" if jnp.issubdtype(params["new_dtype"], jnp.floating):
            return [_Part(values[0].value, values[0].how._replace(dtype=params["new_dtype"]))]
        case "jit" | "pjit" | "closed_call":
            return _run(params["jaxpr"], values, whole)
        case name if name in REMATERIALISED:
            inner = params["jaxpr"]
            closed = ClosedJaxpr(inner, ()) if isinstance(inner, Jaxpr) else inner
            return _rematerialised(closed, values, whole, params["policy"], params["prevent_cse"])
        case "scan" if all(value.how.dim > 0 for value in _scanned(params, values) if isinstance(value, _Part)):
            return _scan(params, values, whole)
        case _:
            return _bound(equation, [_made_whole(value, whole) for value in values], within)


def _bound(equation: Any, values: list[Any], within: Jaxpr) -> Sequence[Any]:
    """One operation: a function of its own, which jax runs as it runs any."""
    pairs = {var: value for var, value in zip(equation.invars, values, strict=True) if not isinstance(var, Literal)}
    return jaxpr_as_fun(_alone([equation], within, equation.outvars))(*pairs.values())


def _rematerialised(
    closed: ClosedJaxpr, values: list[Any], whole: Whole, policy: Callable[..., Any] | None, prevent_cse: bool
) -> Sequence[Any]:
    lying = [value.how if isinstance(value, _Part) else None for value in values]

    def again(*arrays: jax.Array) -> list[jax.Array]:
        given = [one if how is None else _Part(one, how) for one, how in zip(arrays, lying, strict=True)]
        return _run(closed, given, whole)

    def both(primitive: Any, *given: Any, **params: Any) -> Any:  # Any: as in `_kept`; and what the policy says
        return _kept(primitive) and policy is not None and policy(primitive, *given, **params)

    arrays = [value.value if isinstance(value, _Part) else value for value in values]
    return jax.checkpoint(again, policy=policy and both, prevent_cse=prevent_cse)(*arrays)


def _scanned(params: Any, values: list[Any]) -> list[Any]:
    return values[params["num_consts"] + params["num_carry"] :]


def _scan(params: Any, values: list[Any], whole: Whole) -> Sequence[Any]:
    num_consts, num_carry = params["num_consts"], params["num_carry"]
    consts = [_made_whole(value, whole) for value in values[:num_consts]]
    start = [_made_whole(value, whole) for value in values[num_consts : num_consts + num_carry]]
    scanned = _scanned(params, values)
    lying = [value.how.of_a_layer if isinstance(value, _Part) else None for value in scanned]

    def turn(model_state: list[jax.Array], parts: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
        given = [one if how is None else _Part(one, how) for one, how in zip(parts, lying, strict=True)]
        made = _run_layer(params["jaxpr"], [*consts, *model_state, *given], whole)
        return made[:num_carry], made[num_carry:]

    model_state, stacked = jax.lax.scan(
        turn, start,
        [value.value if isinstance(value, _Part) else value for value in scanned],
        length=params["length"], reverse=params["reverse"], unroll=params["unroll"],
    )  # fmt: skip
    return [*model_state, *stacked]


def _kept(primitive: Any, *_: Any, **params: Any) -> bool:  # Any: a jax.extend.core.Primitive, and what it is given
    """Whether the result of an operation of a layer is kept for its gradient."""
    return primitive.name not in DONE_AGAIN


def _made_whole(value: Any, whole: Whole) -> Any:
    return whole(value.value, *value.how) if isinstance(value, _Part) else value
