"""Whether an optimizer can run on padded leaves, as they are stored: it works element by element, as Adam does.

The operations of its `update` are read. The padding of a gradient is zero, so that a sum over all of it is right too,
as in `optax.clip_by_global_norm`. Without padding XLA would compute the new state of such a leaf twice, once for the
parameters and once to mask it, and copy the old one for that: a shard of each leaf in temporaries.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from stepc._compiler.layers import has_same_operations
from stepc._compiler.matrices import CALLS
from stepc._compiler.rows import ELEMENTWISE
from stepc._language.kinds import Params
from stepc._language.optimizers import Optimizer, evaluates_loss, run_optimizer

# The operations that make NaN of NaN, whatever the other operand is.
KEEP_NAN = frozenset(
    """
    abs add add_any cbrt convert_element_type copy cos div erf exp exp2 expm1 log log1p logistic max min mul neg
    reduce_precision rsqrt sign sin sqrt square stop_gradient sub tan tanh
    """.split()
)
# The operations of one operand that make zero of zero.
KEEP_ZERO = frozenset(("abs", "convert_element_type", "copy", "neg", "sign", "sqrt", "square", "stop_gradient"))
# What the shape of a leaf alone may change in an operation.
SHAPES = frozenset(("shape", "sharding"))

# Of a value while `update` is read. UNIFORM: one number, however often; NOTHING if it is zero. ZERO, NAN and PADDED:
# made element by element of a padded leaf, with zero in its padding (where all uniform numbers are finite), with NaN,
# or with anything. OTHER: what depends on the shape, or may.
UNIFORM, NOTHING, ZERO, NAN, PADDED, OTHER = "uniform", "nothing", "zero", "nan", "padded", "other"


@dataclass(frozen=True)
class PaddedUpdate:
    """An optimizer that runs on padded leaves.

    Args:
      shapes: a tree like the gradient, of the shapes without padding.
      is_kept: of each leaf of the optimizer state, whether what comes out has NaN in its padding, or has none.
    """

    shapes: Any  # Any: a tree of jax.ShapeDtypeStruct
    is_kept: tuple[bool, ...]


def padded_update(
    optimizer: Optimizer,
    params: Params,
    opt_state: Any,  # Any: the optimizer's own tree
    stored: tuple[Params, Any],  # Any: as above
    written: str,
) -> PaddedUpdate | None:
    """How an optimizer runs on padded leaves; None if it does not work element by element on them.

    Args:
      params: the shapes of those that are trained, without padding.
      opt_state: the shapes of its state, without padding.
      stored: both as they are stored.
    """
    if jax.tree.all(jax.tree.map(_is_like, params, stored[0])) or evaluates_loss(optimizer):
        return None

    def update(grads: Params, opt_state: Any, params: Params, value: jax.Array) -> Any:
        return run_optimizer(optimizer, grads, opt_state, params, {"value": value, "grad": grads}, written)

    def traced(params: Params, opt_state: Any) -> ClosedJaxpr:
        return jax.make_jaxpr(update)(params, opt_state, params, jnp.zeros(()))

    kinds = [
        *(_kind(one, other, ZERO) for one, other in _pairs(params, stored[0])),
        *(_kind(one, other, NAN) for one, other in _pairs(opt_state, stored[1])),
        *(_kind(one, other, NAN) for one, other in _pairs(params, stored[0])),
        UNIFORM,
    ]
    own = traced(params, opt_state)
    results = _kinds(own.jaxpr, kinds)
    if results is None:
        return None
    try:
        on_stored = traced(*stored)
    except (TypeError, ValueError):  # it has arrays of the own shapes, such as a mask
        return None
    # A number that it makes of a shape, such as a rate for each width, differs between the two.
    if not _is_same_program(own, on_stored):
        return None
    leaves = jax.tree.leaves(stored)
    if list(map(_shape, on_stored.jaxpr.outvars)) != [leaf.shape for leaf in leaves]:
        return None
    of_state = list(zip(_pairs(opt_state, stored[1]), results[len(jax.tree.leaves(params)) :], strict=True))
    return PaddedUpdate(params, tuple(_is_like(*pair) or kind == NAN for pair, kind in of_state))


def _pairs(own: Any, stored: Any) -> list[tuple[Any, Any]]:  # Any: trees of shapes of one structure; shapes
    return list(zip(jax.tree.leaves(own), jax.tree.leaves(stored), strict=True))


def _is_like(own: Any, stored: Any) -> bool:  # Any: shapes
    return own.shape == stored.shape


def _kind(own: Any, stored: Any, kind: str) -> str:  # Any: shapes
    if _is_like(own, stored):
        return OTHER if own.ndim else UNIFORM
    return kind if jnp.issubdtype(own.dtype, jnp.inexact) else PADDED


def _kinds(jaxpr: Jaxpr, kinds: Sequence[str]) -> list[str] | None:
    """The kind of each result; None where a padded leaf meets an operation that is not element by element."""
    known: dict[Any, str] = dict(zip(jaxpr.invars, kinds, strict=True))  # Any: a variable

    def read(var: Any) -> str:  # Any: a variable, or a literal
        if isinstance(var, Literal):
            return OTHER if _shape(var) else NOTHING if var.val == 0 else UNIFORM
        return known.get(var, OTHER) if _shape(var) else UNIFORM

    for equation in jaxpr.eqns:
        given, name = list(map(read, equation.invars)), equation.primitive.name
        shapes = {_shape(var) for var, kind in zip(equation.invars, given, strict=True) if kind in (ZERO, NAN, PADDED)}
        if not shapes:
            is_uniform = OTHER not in given and (name in ELEMENTWISE or name == "broadcast_in_dim")
            is_nothing = given == [NOTHING] and (name in KEEP_ZERO or name == "broadcast_in_dim")
            results = [NOTHING if is_nothing else UNIFORM if is_uniform else OTHER for _ in equation.outvars]
        elif name in CALLS:
            inner = _kinds(equation.params["jaxpr"].jaxpr, given)
            if inner is None:
                return None
            results = inner
        elif name == "reduce_sum" and given == [ZERO] and not _shape(equation.outvars[0]):
            results = [UNIFORM]
        elif name in ELEMENTWISE and OTHER not in given and set(map(_shape, equation.outvars)) == shapes:
            kept = NAN if _keeps_nan(equation, given) else ZERO if _keeps_zero(equation, given) else PADDED
            results = [kept for _ in equation.outvars]
        else:
            return None
        known |= {var: kind if _shape(var) else UNIFORM for var, kind in zip(equation.outvars, results, strict=True)}
    return list(map(read, jaxpr.outvars))


def _keeps_nan(equation: Any, given: list[str]) -> bool:  # Any: a jax.extend.core.JaxprEqn
    if not jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.inexact):
        return False
    match equation.primitive.name:
        case "select_n":
            return all(kind == NAN for kind in given[1:])
        case "integer_pow":
            return given == [NAN] and equation.params["y"] != 0
        case name:
            return NAN in given and name in KEEP_NAN


def _keeps_zero(equation: Any, given: list[str]) -> bool:  # Any: as above
    if not jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.inexact):
        return False
    match equation.primitive.name:
        case "mul":
            return {*given} <= {ZERO, UNIFORM, NOTHING}
        case "div":
            return given == [ZERO, UNIFORM]
        case "select_n":
            return {*given[1:]} <= {ZERO, NOTHING}
        case "integer_pow":
            return given == [ZERO] and equation.params["y"] > 0
        case "add" | "add_any" | "sub":
            return {*given} <= {ZERO, NOTHING}
        case name:
            return given == [ZERO] and name in KEEP_ZERO


def _shape(var: Any) -> tuple[int, ...]:  # Any: a variable, or a literal
    return var.aval.shape


def _is_same_program(own: ClosedJaxpr, stored: ClosedJaxpr) -> bool:
    """Whether two traces differ in shapes alone."""
    consts = zip(own.consts, stored.consts, strict=False)
    is_same = len(own.consts) == len(stored.consts) and all(np.array_equal(one, other) for one, other in consts)
    inputs = zip(
        (*own.jaxpr.constvars, *own.jaxpr.invars), (*stored.jaxpr.constvars, *stored.jaxpr.invars), strict=False
    )
    outputs = (own.jaxpr.outvars, stored.jaxpr.outvars)
    return is_same and has_same_operations(own.jaxpr.eqns, stored.jaxpr.eqns, dict(inputs), outputs, but=SHAPES)
