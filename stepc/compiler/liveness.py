"""How much a traced program would hold at once, if nothing were fused: an estimate, to order programs before compiling.

It must not know what the program is for.
"""

from collections.abc import Iterator
from typing import Any

from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var

_LOOPS = ("scan", "while")
_NAMES = ("reshape", "squeeze", "sharding_constraint")  # another name for what is there


def live_bytes(traced: ClosedJaxpr) -> int:
    """The most bytes that intermediate values hold at once, each equation run by itself, in order.

    Arguments are left out, and so are results: a donated argument has room for its result. The compiler fuses, reuses
    and reorders, so this is of use beside the same of another program: their ratio is about that of what they need.
    Source: ours; the walk is that of a linear scan over live ranges.
    """
    return _peak(traced.jaxpr, apart=_results(traced.jaxpr))


def _results(jaxpr: Jaxpr) -> set[Var]:
    """The results, and what they are before they are told where to lie."""
    results = {var for var in jaxpr.outvars if isinstance(var, Var)}
    for equation in reversed(jaxpr.eqns):
        if equation.primitive.name == "sharding_constraint" and results & set(equation.outvars):
            results |= {var for var in equation.invars if isinstance(var, Var)}
    return results


def _peak(jaxpr: Jaxpr, *, apart: set[Var]) -> int:
    used = [(at, equation.invars) for at, equation in enumerate(jaxpr.eqns)] + [(len(jaxpr.eqns), jaxpr.outvars)]
    last = {var: at for at, operands in used for var in operands if not isinstance(var, Literal)}
    ends: dict[int, int] = {}
    live = most = 0
    for at, equation in enumerate(jaxpr.eqns):
        named = equation.primitive.name in _NAMES
        new = [] if named else [var for var in equation.outvars if var not in apart]
        made = sum(map(_bytes, new))
        inside = max((_peak(inner, apart=set()) for inner in _inner(equation.params)), default=0)
        if equation.primitive.name in _LOOPS:  # its results take the room of what it began with; its turns need more
            most = max(most, live + max(made - ends.get(at, 0), 0) + inside)
        else:  # what a call returns is made inside of it
            most = max(most, live + max(made, inside))
        for var in new:
            if var in last:
                live += _bytes(var)
                ends[last[var]] = ends.get(last[var], 0) + _bytes(var)
        live -= ends.pop(at, 0)
    return most


def _inner(params: dict[str, Any]) -> Iterator[Jaxpr]:  # Any: whatever a primitive keeps
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            match one:
                case Jaxpr():
                    yield one
                case ClosedJaxpr():
                    yield one.jaxpr
                case _:
                    pass


def _bytes(var: Var) -> int:
    match var.aval:
        case ShapedArray() as aval:
            return aval.size * aval.dtype.itemsize
        case _:
            return 0  # a token, or a reference
