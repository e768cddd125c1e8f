"""How often a loop turns: read from XLA's annotation, or worked out from the loop's counter."""

import re
from dataclasses import dataclass

from stepc.inspect.hlo import Instruction, Module

_MIRRORED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}


@dataclass(frozen=True)
class _Linear:
    """A whole number: `offset`, plus the element `carried` of the tuple that the computation is given."""

    carried: int | None
    offset: int


@dataclass(frozen=True)
class _Scope:
    """A computation, and what it is called with; `given` is None where it is given one unknown tuple."""

    computation: str
    given: tuple[_Linear | None, ...] | None = None


def trip_count(module: Module, caller: str, loop: Instruction) -> int | None:
    """Return how often the body of the `while` runs, or None if that cannot be read.

    Meaning: XLA's `known_trip_count`; else ceil((limit - start) / step) for `while i < limit: i += step`.
    Why: the TPU compiler writes no trip counts.

    Args:
      caller: the name of the computation in which `loop` stands.
      loop: an instruction with a body and a condition.
    Only a counter that starts, moves and ends at constants is read, and starts in `caller` itself. `!=` and
    ends that depend on data are not.
    Source: ours.
    """
    written = re.search(r'known_trip_count\\?":\s*\{\s*\\?"n\\?":\s*\\?"(\d+)', loop.attributes)
    if written:
        return int(written[1])
    roles = {call.role: call.computation for call in loop.calls}
    compared = _comparison(module, _Scope(roles["condition"]))
    if compared is None:
        return None
    left, direction, right = compared
    turns = _counted(module, caller, loop, roles["body"], left, direction, right)
    if turns is None:
        turns = _counted(module, caller, loop, roles["body"], right, _MIRRORED[direction], left)
    return turns


def _counted(
    module: Module, caller: str, loop: Instruction, body: str, counter: _Linear, direction: str, end: _Linear
) -> int | None:
    """The turns of `while counter < end`, if `counter` moves by a constant and `end` stays."""
    limit = _initial(module, caller, loop, body, end)
    if counter.carried is None or limit is None:
        return None
    start = _element(module, _Scope(caller), loop.operands[0], counter.carried)
    moved = _element(module, _Scope(body), module.computations[body].root.name, counter.carried)
    if start is None or start.carried is not None or moved is None or moved.carried != counter.carried:
        return None
    return _turns(start.offset + counter.offset, direction, limit, moved.offset)


def _turns(start: int, direction: str, limit: int, step: int) -> int | None:
    if direction in ("GT", "GE"):  # i > limit  ==  -i < -limit
        start, limit, step = -start, -limit, -step
    if direction in ("LE", "GE"):
        limit += 1
    return max(0, -(-(limit - start) // step)) if step > 0 else None


def _initial(module: Module, caller: str, loop: Instruction, body: str, value: _Linear) -> int | None:
    """The number that `value` is in every turn, if it is one: a constant, or carried along unchanged."""
    if value.carried is None:
        return value.offset
    start = _element(module, _Scope(caller), loop.operands[0], value.carried)
    kept = _element(module, _Scope(body), module.computations[body].root.name, value.carried)
    if start is None or start.carried is not None or kept != _Linear(value.carried, 0):
        return None
    return start.offset + value.offset


def _comparison(module: Module, scope: _Scope) -> tuple[_Linear, str, _Linear] | None:
    """The root of a loop condition, through the fusions around it, as left, direction, right."""
    root = module.computations[scope.computation].root
    values = tuple(_value(module, scope, name) for name in root.operands)
    if root.opcode in ("fusion", "call"):
        return _comparison(module, _Scope(root.calls[0].computation, values))
    direction = re.search(r"\bdirection=(LT|GT|LE|GE)\b", root.attributes)
    if root.opcode != "compare" or direction is None or values[0] is None or values[1] is None:
        return None
    return values[0], direction[1], values[1]


def _value(module: Module, scope: _Scope, name: str) -> _Linear | None:
    """What a scalar instruction computes, where that is linear in one carried number."""
    instruction = module.computations[scope.computation].instructions[name]
    match instruction.opcode:
        case "constant":
            return _Linear(None, int(instruction.literal)) if _is_whole(instruction.literal) else None
        case "parameter":
            return scope.given[int(instruction.literal)] if scope.given is not None else None
        case "get-tuple-element":
            return _element(module, scope, instruction.operands[0], _index(instruction))
        case "copy" | "bitcast" | "convert" | "reshape":
            return _value(module, scope, instruction.operands[0])
        case "add" | "subtract":
            left, right = (_value(module, scope, operand) for operand in instruction.operands)
            return _sum(left, right, sign=1 if instruction.opcode == "add" else -1)
        case "fusion" | "call":
            inner = _inner(module, scope, instruction)
            return _value(module, inner, module.computations[inner.computation].root.name)
        case _:
            return None


def _element(module: Module, scope: _Scope, name: str, index: int) -> _Linear | None:
    """What stands at `index` of a tuple."""
    instruction = module.computations[scope.computation].instructions[name]
    match instruction.opcode:
        case "parameter":
            return _Linear(index, 0) if scope.given is None else None
        case "tuple":
            return _value(module, scope, instruction.operands[index])
        case "copy" | "optimization-barrier" | "opt-barrier":
            return _element(module, scope, instruction.operands[0], index)
        case "fusion":
            inner = _inner(module, scope, instruction)
            return _element(module, inner, module.computations[inner.computation].root.name, index)
        case _:
            return None


def _inner(module: Module, scope: _Scope, instruction: Instruction) -> _Scope:
    given = tuple(_value(module, scope, operand) for operand in instruction.operands)
    return _Scope(instruction.calls[0].computation, given)


def _sum(left: _Linear | None, right: _Linear | None, *, sign: int) -> _Linear | None:
    """left + sign * right, if at most one carried number stands in it, and that with sign +1."""
    if left is None or right is None or (right.carried is not None and (left.carried is not None or sign < 0)):
        return None
    carried = left.carried if right.carried is None else right.carried
    return _Linear(carried, left.offset + sign * right.offset)


def _index(instruction: Instruction) -> int:
    found = re.search(r"\bindex=(\d+)", instruction.attributes)
    if found is None:
        raise ValueError(f"`{instruction.name}` takes an element of a tuple and does not say which.")
    return int(found[1])


def _is_whole(literal: str) -> bool:
    return re.fullmatch(r"-?\d+", literal) is not None
