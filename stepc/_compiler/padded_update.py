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
# or with anything. SAME: an array that is the same without padding. OTHER: what depends on the shape, or may.
UNIFORM, NOTHING, ZERO, NAN, PADDED, SAME, OTHER = "uniform", "nothing", "zero", "nan", "padded", "same", "other"


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
    try:
        on_stored = traced(*stored)
    except (TypeError, ValueError, LookupError, AssertionError):  # it has arrays of the own shapes, or demands these
        return None
    # A number that it makes of a shape, such as a rate for each width, differs between the two.
    if not _is_same_program(own, on_stored):
        return None
    leaves = jax.tree.leaves(stored)
    if list(map(_shape, on_stored.jaxpr.outvars)) != [leaf.shape for leaf in leaves]:
        return None
    results = _kinds(own.jaxpr, on_stored.jaxpr, kinds)
    if results is None or OTHER in results:
        return None
    of_state = list(zip(_pairs(opt_state, stored[1]), results[len(jax.tree.leaves(params)) :], strict=True))
    return PaddedUpdate(params, tuple(_is_like(*pair) or kind == NAN for pair, kind in of_state))


def _pairs(own: Any, stored: Any) -> list[tuple[Any, Any]]:  # Any: trees of shapes of one structure; shapes
    return list(zip(jax.tree.leaves(own), jax.tree.leaves(stored), strict=True))


def _is_like(own: Any, stored: Any) -> bool:  # Any: shapes
    return own.shape == stored.shape


def _kind(own: Any, stored: Any, kind: str) -> str:  # Any: shapes
    if _is_like(own, stored):
        return SAME if own.ndim else UNIFORM
    return kind if jnp.issubdtype(own.dtype, jnp.inexact) else PADDED


def _kinds(jaxpr: Jaxpr, stored: Jaxpr, kinds: Sequence[str]) -> list[str] | None:
    """The kind of each result; None where a padded leaf meets an operation that is not element by element.

    Args:
      stored: the same program of the shapes that are stored.
    """
    known: dict[Any, str] = dict(zip(jaxpr.invars, kinds, strict=True))  # Any: a variable
    known |= {var: SAME if _shape(var) else UNIFORM for var in jaxpr.constvars}

    def read(var: Any) -> str:  # Any: a variable, or a literal
        if isinstance(var, Literal):
            return SAME if _shape(var) else NOTHING if var.val == 0 else UNIFORM
        return known[var]

    for equation, twin in zip(jaxpr.eqns, stored.eqns, strict=True):
        given, name = list(map(read, equation.invars)), equation.primitive.name
        shapes = {_shape(var) for var, kind in zip(equation.invars, given, strict=True) if kind in (ZERO, NAN, PADDED)}
        if name in CALLS:
            inner = _kinds(equation.params["jaxpr"].jaxpr, twin.params["jaxpr"].jaxpr, given)
            if inner is None:
                return None
            results = inner
        elif not shapes:
            results = [_kind_without_padding(equation, twin, given)] * len(equation.outvars)
        elif name == "reduce_sum" and given == [ZERO] and not _shape(equation.outvars[0]):
            results = [UNIFORM]
        elif name in ELEMENTWISE and not {*given} & {SAME, OTHER} and set(map(_shape, equation.outvars)) == shapes:
            kept = NAN if _keeps_nan(equation, given) else ZERO if _keeps_zero(equation, given) else PADDED
            results = [kept for _ in equation.outvars]
        else:
            return None
        pairs = zip(equation.outvars, results, strict=True)
        known |= {var: UNIFORM if kind == SAME and not _shape(var) else kind for var, kind in pairs}
    return list(map(read, jaxpr.outvars))


def _kind_without_padding(equation: Any, twin: Any, given: list[str]) -> str:  # Any, twice: a jax.extend.core.JaxprEqn
    """The kind of the results of an operation that is given no padded leaf; `twin` is it in the stored shapes."""
    name = equation.primitive.name
    if {*given} <= {UNIFORM, NOTHING} and (name in ELEMENTWISE or name == "broadcast_in_dim"):
        is_nothing = given == [NOTHING] and (name in KEEP_ZERO or name == "broadcast_in_dim")
        return NOTHING if is_nothing else UNIFORM
    # One number may depend on a shape too: how many ones there are, the largest of a range, a sum of what is drawn.
    return SAME if OTHER not in given and _is_same_operation(equation, twin) else OTHER


def _is_same_operation(own: Any, stored: Any) -> bool:  # Any, twice: as above
    """Whether an operation makes the same of the same in both programs, shapes included."""
    pairs = list(zip((*own.invars, *own.outvars), (*stored.invars, *stored.outvars), strict=True))
    inputs = {one: other for one, other in pairs if not isinstance(one, Literal)}
    return all(_shape(one) == _shape(other) for one, other in pairs) and has_same_operations(
        [own], [stored], inputs, ((), ())
    )


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
