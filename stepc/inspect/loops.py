"""How often each computation of a program runs; it must not know what the computations do."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from stepc.inspect.hlo import Computation, Instruction, Module

# What one instruction takes by itself, of anything that adds up.
Measure: TypeAlias = Callable[[Computation, Instruction], int]

_BRANCHES = ("branch_computations", "true_computation", "false_computation")


@dataclass(frozen=True)
class Execution:
    """How often a computation runs while the entry runs once.

    `count` is None where it is unknown. If `conditional`, it is the most that can happen: a branch counts
    as often as the conditional itself. `asynchronous` says that the computation is reached through a start.
    `loops` are the loops around it, the outermost first, with their turns: "microbatches/while x4".
    """

    count: int | None
    in_loop: bool
    conditional: bool
    asynchronous: bool
    loops: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class _Site:
    """A place in `caller` where `instruction` runs a computation."""

    caller: str
    instruction: Instruction
    role: str


def executions(module: Module) -> dict[str, Execution]:
    """Count how often each computation runs in one execution of the entry.

    Meaning: count(entry) = 1; count(c) = sum over the places that call c of count(caller) * trips(place).
    Why: HLO text shows a loop body once, however often it runs.

    Args:
      module: a program, as `stepc.inspect.hlo.parse` reads it.
    Trip counts come from `known_trip_count`, or from a counter that starts at a constant, moves by a
    constant, and is compared with a constant. Any other loop has count None, and so has all that it calls.
    So has a reducer or comparator, which is applied to elements. What nothing calls has count 0.
    Source: ours.
    """
    sites: dict[str, list[_Site]] = {name: [] for name in module.computations}
    for computation in module.computations.values():
        for instruction in computation.instructions.values():
            # `-done` and `-update` may name the computation again that `-start` runs.
            if instruction.opcode.endswith(("-done", "-update")):
                continue
            # A computation that XLA did not print has nothing to count.
            for call in (call for call in instruction.calls if call.computation in sites):
                sites[call.computation].append(_Site(computation.name, instruction, call.role))
    known = {module.entry: Execution(1, in_loop=False, conditional=False, asynchronous=False)}
    for name in module.computations:
        _count(module, name, sites, known)
    return known


def over_program(module: Module, measure: Measure, *, apart: Collection[str] = ()) -> int | None:
    """Add up a measure over all instructions, loops multiplied out; None if a loop around any of it hides its turns.

    Args:
      apart: the names of computations that are left out.
    """
    total, known = 0, executions(module)
    for computation in module.computations.values():
        if computation.name in apart:
            continue
        once = sum(measure(computation, each) for each in computation.instructions.values())
        count = known[computation.name].count
        if once and count is None:
            return None
        total += once * (count or 0)
    return total


def over_instruction(
    module: Module,
    computation: Computation,
    instruction: Instruction,
    measure: Measure,
    *,
    runs: Callable[[Instruction], bool] = lambda _: True,
) -> int | None:
    """Add up a measure over one instruction and all that it runs; None if it holds a loop that hides its turns.

    Args:
      runs: whether the computations that an instruction names are to be counted.
    """
    total = measure(computation, instruction)
    calls = instruction.calls if runs(instruction) else ()
    for call in (call for call in calls if call.computation in module.computations):
        inner = module.computations[call.computation]
        parts = [over_instruction(module, inner, each, measure, runs=runs) for each in inner.instructions.values()]
        times = turns(module, computation.name, instruction, call.role)
        if None in parts or (times is None and any(parts)):
            return None
        total += (times or 0) * sum(part or 0 for part in parts)
    return total


def _count(module: Module, name: str, sites: Mapping[str, list[_Site]], known: dict[str, Execution]) -> Execution:
    if name not in known:
        parts = [_through(module, site, _count(module, site.caller, sites, known)) for site in sites[name]]
        counts = [part.count for part in parts if part.count is not None]
        known[name] = Execution(
            count=sum(counts) if len(counts) == len(parts) else None,
            in_loop=any(part.in_loop for part in parts),
            conditional=any(part.conditional for part in parts),
            asynchronous=any(part.asynchronous for part in parts),
            loops=tuple(dict.fromkeys(loop for part in parts for loop in part.loops)),
        )
    return known[name]


def _through(module: Module, site: _Site, caller: Execution) -> Execution:
    """What a call makes of the execution of its caller."""
    times = turns(module, site.caller, site.instruction, site.role)
    # libtpu writes asynchronous collectives as fusions, and says so only in their names.
    is_start = site.instruction.opcode.endswith("-start") or "async-collective-start" in site.instruction.name
    loop = f"{named(site.instruction)} x{'?' if times is None else times}"
    return Execution(
        count=None if times is None or caller.count is None else times * caller.count,
        in_loop=caller.in_loop or site.role in ("body", "condition"),
        conditional=caller.conditional or site.role in _BRANCHES,
        asynchronous=caller.asynchronous or is_start,
        loops=(*caller.loops, loop) if site.role == "body" else caller.loops,
    )


def turns(module: Module, caller: str, instruction: Instruction, role: str) -> int | None:
    """How often an instruction runs one of its computations; None if that is unknown."""
    match role:
        case "body":
            return trip_count(module, caller, instruction)
        case "condition":
            trips = trip_count(module, caller, instruction)
            return None if trips is None else trips + 1
        case "to_apply":
            return 1 if instruction.opcode in ("call", "call-start") else None
        case _:
            return 1


def named(instruction: Instruction) -> str:
    """The end of its path of JAX names, which holds the user's own scopes, or its name in HLO."""
    path = [part for part in instruction.op_name.split("/") if not part.startswith("jit(") and part != "shard_map"]
    return "/".join(path[-2:]) or instruction.name


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
