"""How often each computation of a program runs. It must not know what the computations compute."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from stepc.inspect.hlo import Computation, Instruction, Module

# What one instruction costs by itself, in anything that adds up: flops, bytes.
InstructionCost: TypeAlias = Callable[[Computation, Instruction], int]

_BRANCHES = ("branch_computations", "true_computation", "false_computation")


@dataclass(frozen=True)
class ExecutionCount:
    """How often a computation runs while the entry runs once.

    Attributes:
      count: None if it is unknown. If `conditional`, an upper bound: a branch counts as often as its conditional.
      in_loop: whether it runs in a loop, at any depth.
      conditional: whether it runs in a branch.
      asynchronous: whether a `-start` instruction runs it.
      loops: the loops around it with their trip counts, outermost first: "microbatches/while x4".
    """

    count: int | None
    in_loop: bool
    conditional: bool
    asynchronous: bool
    loops: tuple[str, ...] = field(default=(), compare=False)


def executions(module: Module) -> dict[str, ExecutionCount]:
    """Count how often each computation runs in one execution of the entry.

    Meaning: count(entry) = 1; count(c) = sum over the call sites of c of count(caller) * call_count(site).
    Why: HLO text shows a loop body once, however often it runs.

    Args:
      module: a program, as `stepc.inspect.hlo.parse` reads it.
    Trip counts come from `known_trip_count`, or from a counter that starts at a constant, moves by a constant and is
    compared with a constant. Any other loop has count None, and so has everything that it calls. A reducer or
    comparator also has None: it runs once an element. A computation that nothing calls has count 0.
    Source: ours.
    """
    sites: dict[str, list[_CallSite]] = {name: [] for name in module.computations}
    for computation in module.computations.values():
        for instruction in computation.instructions.values():
            # `-done` and `-update` may name the computation that `-start` runs; it runs once.
            if instruction.opcode.endswith(("-done", "-update")):
                continue
            # A computation that XLA did not print has nothing to count.
            for call in (call for call in instruction.calls if call.computation in sites):
                sites[call.computation].append(_CallSite(computation.name, instruction, call.role))
    known = {module.entry: ExecutionCount(1, in_loop=False, conditional=False, asynchronous=False)}
    for name in module.computations:
        _count(module, name, sites, known)
    return known


def program_total(module: Module, cost: InstructionCost, *, excluded: Collection[str] = ()) -> int | None:
    """Add up a cost over all instructions times their executions; None if a loop with a cost has no known trip count.

    Args:
      excluded: the names of computations to leave out.
    """
    total, known = 0, executions(module)
    for computation in module.computations.values():
        if computation.name in excluded:
            continue
        once = sum(cost(computation, each) for each in computation.instructions.values())
        count = known[computation.name].count
        if once and count is None:
            return None
        total += once * (count or 0)
    return total


def instruction_total(
    module: Module,
    computation: Computation,
    instruction: Instruction,
    cost: InstructionCost,
    *,
    includes_calls: Callable[[Instruction], bool] = lambda _: True,
) -> int | None:
    """Add up a cost over one instruction and everything that it runs; None if that has a loop of unknown trip count.

    Args:
      includes_calls: whether the computations that an instruction names are counted.
    """
    total = cost(computation, instruction)
    calls = instruction.calls if includes_calls(instruction) else ()
    for call in (call for call in calls if call.computation in module.computations):
        inner = module.computations[call.computation]
        parts = [
            instruction_total(module, inner, each, cost, includes_calls=includes_calls)
            for each in inner.instructions.values()
        ]
        count = call_count(module, computation.name, instruction, call.role)
        if None in parts or (count is None and any(parts)):
            return None
        total += (count or 0) * sum(part or 0 for part in parts)
    return total


def call_count(module: Module, caller: str, instruction: Instruction, role: str) -> int | None:
    """How often one execution of an instruction runs its computation of this role; None if that is unknown."""
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


def trip_count(module: Module, caller: str, loop: Instruction) -> int | None:
    """Return how often the body of a `while` runs, or None if the text does not tell.

    Meaning: XLA's `known_trip_count`; else ceil((limit - start) / step) for `while i < limit: i += step`.
    Why: the TPU compiler writes no trip counts.

    Args:
      caller: the name of the computation that contains `loop`.
      loop: an instruction with a body and a condition.
    Reads only counters that start, step and end at constants, and start in `caller` itself. Loops with `!=`, or
    with an end that depends on data, give None.
    Source: ours.
    """
    written = re.search(r'known_trip_count\\?":\s*\{\s*\\?"n\\?":\s*\\?"(\d+)', loop.attributes)
    if written:
        return int(written[1])
    roles = {call.role: call.computation for call in loop.calls}
    compared = _comparison(module, _Frame(roles["condition"]))
    if compared is None:
        return None
    left, direction, right = compared
    trips = _trips_of_counter(module, caller, loop, roles["body"], left, direction, right)
    if trips is None:
        trips = _trips_of_counter(module, caller, loop, roles["body"], right, _MIRRORED[direction], left)
    return trips


def label(instruction: Instruction) -> str:
    """The last two parts of its op_name, where a user's own scopes are, or its name in HLO."""
    parts = [part for part in instruction.scopes if not part.startswith("jit(") and part != "shard_map"]
    return "/".join(parts[-2:]) or instruction.name


@dataclass(frozen=True)
class _CallSite:
    """Where `instruction`, in the computation `caller`, runs a computation."""

    caller: str
    instruction: Instruction
    role: str


def _count(
    module: Module, name: str, sites: Mapping[str, list[_CallSite]], known: dict[str, ExecutionCount]
) -> ExecutionCount:
    if name not in known:
        parts = [_count_of_site(module, site, _count(module, site.caller, sites, known)) for site in sites[name]]
        counts = [part.count for part in parts if part.count is not None]
        known[name] = ExecutionCount(
            count=sum(counts) if len(counts) == len(parts) else None,
            in_loop=any(part.in_loop for part in parts),
            conditional=any(part.conditional for part in parts),
            asynchronous=any(part.asynchronous for part in parts),
            loops=tuple(dict.fromkeys(loop for part in parts for loop in part.loops)),
        )
    return known[name]


def _count_of_site(module: Module, site: _CallSite, caller: ExecutionCount) -> ExecutionCount:
    count = call_count(module, site.caller, site.instruction, site.role)
    # libtpu writes asynchronous collectives as fusions; only their names show it.
    is_start = site.instruction.opcode.endswith("-start") or "async-collective-start" in site.instruction.name
    loop = f"{label(site.instruction)} x{'?' if count is None else count}"
    return ExecutionCount(
        count=None if count is None or caller.count is None else count * caller.count,
        in_loop=caller.in_loop or site.role in ("body", "condition"),
        conditional=caller.conditional or site.role in _BRANCHES,
        asynchronous=caller.asynchronous or is_start,
        loops=(*caller.loops, loop) if site.role == "body" else caller.loops,
    )


_MIRRORED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}


@dataclass(frozen=True)
class _Affine:
    """An integer: `offset`, plus element `carried` of the tuple that the computation receives if that is not None."""

    carried: int | None
    offset: int


@dataclass(frozen=True)
class _Frame:
    """A computation and its arguments; None for the one tuple that a loop's body or condition receives."""

    computation: str
    arguments: tuple[_Affine | None, ...] | None = None


def _trips_of_counter(
    module: Module, caller: str, loop: Instruction, body: str, counter: _Affine, direction: str, end: _Affine
) -> int | None:
    """The trip count of `while counter < end`, if `counter` moves by a constant and `end` does not move."""
    limit = _invariant(module, caller, loop, body, end)
    if counter.carried is None or limit is None:
        return None
    initial = _element(module, _Frame(caller), loop.operands[0], counter.carried)
    moved = _element(module, _Frame(body), module.computations[body].root.name, counter.carried)
    if initial is None or initial.carried is not None or moved is None or moved.carried != counter.carried:
        return None
    start, step = initial.offset + counter.offset, moved.offset
    if direction in ("GT", "GE"):  # i > limit  ==  -i < -limit
        start, limit, step = -start, -limit, -step
    if direction in ("LE", "GE"):
        limit += 1
    return max(0, -(-(limit - start) // step)) if step > 0 else None


def _invariant(module: Module, caller: str, loop: Instruction, body: str, value: _Affine) -> int | None:
    """The number that `value` is in every iteration: a constant, or one that the loop carries unchanged."""
    if value.carried is None:
        return value.offset
    initial = _element(module, _Frame(caller), loop.operands[0], value.carried)
    kept = _element(module, _Frame(body), module.computations[body].root.name, value.carried)
    if initial is None or initial.carried is not None or kept != _Affine(value.carried, 0):
        return None
    return initial.offset + value.offset


def _comparison(module: Module, frame: _Frame) -> tuple[_Affine, str, _Affine] | None:
    """The root of a loop's condition, looked up through fusions, as left, direction, right."""
    root = module.computations[frame.computation].root
    values = tuple(_value(module, frame, name) for name in root.operands)
    if root.opcode in ("fusion", "call"):
        return _comparison(module, _Frame(root.calls[0].computation, values))
    direction = re.search(r"\bdirection=(LT|GT|LE|GE)\b", root.attributes)
    if root.opcode != "compare" or direction is None or values[0] is None or values[1] is None:
        return None
    return values[0], direction[1], values[1]


def _value(module: Module, frame: _Frame, name: str) -> _Affine | None:
    """What a scalar instruction computes, if that is affine in one carried number."""
    instruction = module.computations[frame.computation].instructions[name]
    match instruction.opcode:
        case "constant":
            is_integer = re.fullmatch(r"-?\d+", instruction.literal) is not None
            return _Affine(None, int(instruction.literal)) if is_integer else None
        case "parameter":
            return frame.arguments[int(instruction.literal)] if frame.arguments is not None else None
        case "get-tuple-element":
            return _element(module, frame, instruction.operands[0], _index(instruction))
        case "copy" | "bitcast" | "convert" | "reshape":
            return _value(module, frame, instruction.operands[0])
        case "add" | "subtract":
            left, right = (_value(module, frame, operand) for operand in instruction.operands)
            return _sum(left, right, sign=1 if instruction.opcode == "add" else -1)
        case "fusion" | "call":
            inner = _called(module, frame, instruction)
            return _value(module, inner, module.computations[inner.computation].root.name)
        case _:
            return None


def _element(module: Module, frame: _Frame, name: str, index: int) -> _Affine | None:
    """Element `index` of a tuple, if that is affine in one carried number."""
    instruction = module.computations[frame.computation].instructions[name]
    match instruction.opcode:
        case "parameter":
            return _Affine(index, 0) if frame.arguments is None else None
        case "tuple":
            return _value(module, frame, instruction.operands[index])
        case "copy" | "optimization-barrier" | "opt-barrier":
            return _element(module, frame, instruction.operands[0], index)
        case "fusion":
            inner = _called(module, frame, instruction)
            return _element(module, inner, module.computations[inner.computation].root.name, index)
        case _:
            return None


def _called(module: Module, frame: _Frame, instruction: Instruction) -> _Frame:
    arguments = tuple(_value(module, frame, operand) for operand in instruction.operands)
    return _Frame(instruction.calls[0].computation, arguments)


def _sum(left: _Affine | None, right: _Affine | None, *, sign: int) -> _Affine | None:
    """left + sign * right, if that has at most one carried number, and with sign +1."""
    if left is None or right is None or (right.carried is not None and (left.carried is not None or sign < 0)):
        return None
    carried = left.carried if right.carried is None else right.carried
    return _Affine(carried, left.offset + sign * right.offset)


def _index(instruction: Instruction) -> int:
    found = re.search(r"\bindex=(\d+)", instruction.attributes)
    if found is None:
        raise ValueError(f"`{instruction.name}` is a get-tuple-element without an index.")
    return int(found[1])
