"""How often each computation of a program runs; it must not know what the computations do."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from stepc.inspect.hlo import Computation, Instruction, Module
from stepc.inspect.trips import trip_count

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
