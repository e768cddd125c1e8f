"""What a traced function depends on, and where it names mesh axes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun

from stepc.private import dce_jaxpr


def dependence(
    traced: ClosedJaxpr, *, outputs: Iterable[int]
) -> tuple[list[bool], Callable[[Sequence[Any]], list[Any]]]:
    """Of each input, whether any of these outputs depends on it; and the function that computes just these outputs.

    Args:
      traced: what `jax.make_jaxpr` returned.
      outputs: their positions.
    The function takes all inputs, as a flat list, and runs only what the outputs depend on: dead code is cut, also
    inside loops and branches. Where this jax cannot do that, the answer errs towards dependence.
    """
    wanted = set(outputs)
    if dce_jaxpr is None:
        return _by_equations(traced, wanted), lambda given: _picked(jaxpr_as_fun(traced)(*given), wanted)
    used = [n in wanted for n in range(len(traced.jaxpr.outvars))]
    jaxpr, needs = dce_jaxpr(_silent(traced.jaxpr), used)
    alone = jaxpr_as_fun(ClosedJaxpr(jaxpr, traced.consts))
    return needs, lambda given: alone(*(one for one, needed in zip(given, needs, strict=True) if needed))


def named_axes(traced: ClosedJaxpr) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """Every constraint and every region of its own in a traced function: what it is, the axes, and where it stands."""
    for equation in _equations(traced.jaxpr):
        match equation.primitive.name:
            case "sharding_constraint":
                spec = equation.params["sharding"].spec
                entries = [entry if isinstance(entry, tuple) else (entry,) for entry in spec]
                axes = tuple(axis for entry in entries for axis in entry if isinstance(axis, str))
                yield "with_sharding_constraint", axes, _line(equation)
            case "shard_map":
                yield "shard_map", tuple(sorted(equation.params.get("newly_manual_axes", ()))), _line(equation)
            case _:
                pass


def _equations(jaxpr: Jaxpr) -> Iterator[Any]:  # Any: a jax.extend.core.JaxprEqn
    for equation in jaxpr.eqns:
        yield equation
        for part in equation.params.values():
            for inner in part if isinstance(part, tuple | list) else (part,):
                if isinstance(inner, ClosedJaxpr | Jaxpr):
                    yield from _equations(inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner)


def _line(equation: Any) -> str:  # Any: a jax.extend.core.JaxprEqn
    """The user's own line; empty where this jax does not tell."""
    ours = (str(Path(jax.__file__).parent), str(Path(__file__).parent.parent))
    try:
        frames = equation.source_info.traceback.frames
    except AttributeError:
        return ""
    frame = next((frame for frame in frames if not frame.file_name.startswith(ours)), None)
    return "" if frame is None else f"{Path(frame.file_name).name}:{frame.line_num}"


def _silent(jaxpr: Jaxpr) -> Jaxpr:
    """Without what only prints or reports: it would count as needed, and with it all that it looks at."""
    equations = []
    for equation in jaxpr.eqns:
        if equation.outvars or not equation.effects:
            params = {name: _silent_part(part) for name, part in equation.params.items()}
            equations.append(equation.replace(params=params, effects=set()) if equation.effects else equation)
    return jaxpr.replace(eqns=equations, effects=set())


def _silent_part(part: Any) -> Any:
    match part:
        case Jaxpr():
            return _silent(part)
        case ClosedJaxpr():
            return ClosedJaxpr(_silent(part.jaxpr), part.consts)
        case tuple() | list():
            return type(part)(map(_silent_part, part)) if type(part) in (tuple, list) else part
        case _:
            return part


def _by_equations(traced: ClosedJaxpr, wanted: set[int]) -> list[bool]:
    needed = {id(var) for n, var in enumerate(traced.jaxpr.outvars) if n in wanted}
    for equation in reversed(traced.jaxpr.eqns):
        if any(id(var) in needed for var in equation.outvars):
            needed |= {id(var) for var in equation.invars}
    return [id(var) in needed for var in traced.jaxpr.invars]


def _picked(results: Sequence[Any], wanted: set[int]) -> list[Any]:
    return [one for n, one in enumerate(results) if n in wanted]
