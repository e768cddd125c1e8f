"""Optimizers that multiply whole matrices, as Muon and Shampoo do: of which parameters; and the gather of sharded ones.

The operations of `update` are read. What is made of the gradient of a parameter element by element has the sharding of
that gradient. The first other operation that leads to a product of matrices needs the whole matrix: of a sharded one
XLA would gather or reduce something in every product, so it is gathered there, once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from stepc._compiler.layers import apply_equation, programs_in
from stepc._compiler.rows import ELEMENTWISE
from stepc._language.kinds import Grads, Params
from stepc._language.optimizers import WHOLE_BATCH_LOSSES, Optimizer, run_optimizer
from stepc._language.state import leaves_by_path

PRODUCTS = frozenset(
    """
    cholesky conv_general_dilated dot_general eig eigh geqrf householder_product lu qr schur svd triangular_solve
    """.split()
)
CALLS = ("jit", "pjit", "closed_call")

Gather = Callable[[jax.Array, int], jax.Array]  # of the parameter at a place among the trained ones


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

    def update(params: Params, opt_state: Any) -> Any:
        losses = dict.fromkeys(WHOLE_BATCH_LOSSES, lambda params: jnp.zeros(()))
        offered = {"value": jnp.zeros(()), "grad": params, **losses}
        return run_optimizer(optimizer, params, opt_state, params, offered, written, gathering(note))

    jax.eval_shape(update, params, opt_state)
    paths = [path for path, _ in leaves_by_path(params)]
    return tuple(paths[place] for place in sorted(found))


def gathering(gather: Gather) -> Callable[..., Any]:
    """Runs the `update` of an optimizer, with matrices gathered where it first needs them whole."""

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
        results = _run(traced, [*images, *jax.tree.leaves((opt_state, params, arrays))], noted)
        updates, new = jax.tree.structure(shapes).unflatten(map(_whole, results))
        # Otherwise XLA would shard the products as the update is sharded.
        leaves, tree = jax.tree.flatten(updates)
        return tree.unflatten(
            [gather(leaf, place) if place in whole else leaf for place, leaf in enumerate(leaves)]
        ), new

    return run


def _run(traced: ClosedJaxpr, values: Sequence[Any], gather: Gather) -> list[Any]:  # Any: arrays, numbers, `_Image`
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

    for equation in jaxpr.eqns:
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
    return list(map(read, jaxpr.outvars))


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
