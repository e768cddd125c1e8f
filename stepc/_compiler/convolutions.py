"""Convolutions in loops, for XLA's CPU backend: channels last, the only order that it computes fast there.

The backend has a library for convolutions of `[rows, ..., channels]` with kernels `[..., channels, filters]`. It brings
others into that order itself, but not in loops and branches: there it adds up one product after another, in up to 40
times the processor time (jax 0.10.2; https://github.com/jax-ml/jax/issues/12868). Every gradient has others: that of a
kernel is a convolution along the rows.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun
from jax.lax import ConvDimensionNumbers, conv_general_dilated_p

CONVOLUTION = conv_general_dilated_p.name
LOOPS_AND_BRANCHES = ("cond", "scan", "while")

T = TypeVar("T")


def channels_last_in_loops(function: Callable[[], T]) -> tuple[T, int]:
    """What a function returns, with the convolutions in its loops computed channels last, and the number of those."""
    traced, shapes = jax.make_jaxpr(function, return_shape=True)()
    jaxpr, number = _reordered(traced.jaxpr, in_loop=False)
    results = jaxpr_as_fun(ClosedJaxpr(jaxpr, traced.consts))()
    return jax.tree.structure(shapes).unflatten(map(jnp.asarray, results)), number


def _reordered(jaxpr: Jaxpr, *, in_loop: bool) -> tuple[Jaxpr, int]:
    """The same program, and how many of its convolutions have another order of dimensions now."""
    made = [_equations_for(equation, in_loop=in_loop) for equation in jaxpr.eqns]
    number = sum(number for _, number in made)
    return (jaxpr.replace(eqns=[one for equations, _ in made for one in equations]) if number else jaxpr), number


def _equations_for(equation: Any, *, in_loop: bool) -> tuple[list[Any], int]:  # Any, twice: a jax.extend.core.JaxprEqn
    if equation.primitive.name == CONVOLUTION:
        return _channels_last(equation) if in_loop else ([equation], 0)
    in_loop = in_loop or equation.primitive.name in LOOPS_AND_BRANCHES
    params = {name: _parameter(value, in_loop=in_loop) for name, value in equation.params.items()}
    number = sum(number for _, number in params.values())
    if number:
        equation = equation.replace(params={name: value for name, (value, _) in params.items()})
    return [equation], number


def _parameter(value: Any, *, in_loop: bool) -> tuple[Any, int]:  # Any, twice: a parameter of any operation
    """The programs in a parameter of an operation, reordered."""
    match value:
        case Jaxpr():  # since jax 0.11 a ClosedJaxpr too
            return _reordered(value, in_loop=in_loop)
        case ClosedJaxpr():
            jaxpr, number = _reordered(value.jaxpr, in_loop=in_loop)
            return ClosedJaxpr(jaxpr, value.consts), number
        case tuple() | list():
            made = [_parameter(one, in_loop=in_loop) for one in value]
            number = sum(number for _, number in made)
            return (tuple(one for one, _ in made) if number else value), number
        case _:
            return value, 0


def _channels_last(equation: Any) -> tuple[list[Any], int]:  # Any, twice: as above
    """A convolution between transpositions, as equations of the same variables; itself if it is channels last."""
    num_dims = len(equation.outvars[0].aval.shape)
    last, spatial = num_dims - 1, range(1, num_dims - 1)
    of_rows, of_kernel = (0, last, *spatial), (last, last - 1, *range(num_dims - 2))
    numbers = ConvDimensionNumbers(of_rows, of_kernel, of_rows)
    given: ConvDimensionNumbers = equation.params["dimension_numbers"]
    if given == numbers:
        return [equation], 0

    def convolution(rows: jax.Array, kernel: jax.Array) -> jax.Array:
        rows = jnp.transpose(rows, _order(given.lhs_spec, of_rows))
        kernel = jnp.transpose(kernel, _order(given.rhs_spec, of_kernel))
        found = conv_general_dilated_p.bind(rows, kernel, **{**equation.params, "dimension_numbers": numbers})
        return jnp.transpose(found, _order(of_rows, given.out_spec))

    with equation.ctx.manager:  # its mesh, of which axes may be manual
        inner = jax.make_jaxpr(convolution)(*(var.aval for var in equation.invars)).jaxpr
    same = dict(zip((*inner.invars, *inner.outvars), (*equation.invars, *equation.outvars), strict=True))

    def renamed(variables: list[Any]) -> list[Any]:  # Any, twice: variables and literals
        return [var if isinstance(var, Literal) else same.get(var, var) for var in variables]

    # Each is still an operation of the line that asked for the convolution.
    return [
        one.replace(invars=renamed(one.invars), outvars=renamed(one.outvars), source_info=equation.source_info)
        for one in inner.eqns
    ], 1


def _order(before: Sequence[int], after: Sequence[int]) -> list[int]:
    """The transposition that moves each dimension from its place in one specification to that in another."""
    places = dict(zip(after, before, strict=True))
    return [places[place] for place in range(len(places))]
