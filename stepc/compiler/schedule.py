"""The order of work of one step, and where each reduction sits. It decides; `lower.py` obeys.

The rule that places every reduction: a gradient carries the sums it still owes. A mean over mesh axes owes a
sum over them; linear nodes pass the debt on, through loops as well; the first node that is not linear pays.
So a reduction stands in a loop only where the order of the words demands it.
"""

from dataclasses import dataclass, replace
from typing import assert_never

from stepc.compiler.instructions import (
    Again,
    Apply,
    AverageCarry,
    Compute,
    Count,
    CountFirst,
    Instruction,
    Loop,
    Multiply,
    Optimize,
    Reduce,
    Schedule,
    Settle,
    Signature,
    Unscale,
    Vectorise,
    everything,
)
from stepc.core.nodes import (
    Differentiate,
    Follow,
    Guard,
    Lanes,
    Map,
    Mean,
    Node,
    Program,
    Repeat,
    Rescale,
    Scale,
    Space,
    Time,
    Update,
    named,
)


@dataclass(frozen=True)
class _Owing:
    """A schedule so far, and what its result still owes.

    `summed` are the axes added up or owed so far; `counts` are those of the loss until they are divided by.
    """

    signature: Signature
    schedule: Schedule = ()
    axes: tuple[str, ...] = ()
    num_devices: int = 1
    parts: int = 1
    lanes: bool = False
    factor: float = 1.0
    rescaled: Rescale | None = None
    summed: tuple[str, ...] = ()
    counts: tuple[float | None, ...] = (1.0,)

    def then(self, instruction: Instruction) -> "_Owing":
        return replace(self, schedule=(*self.schedule, instruction))

    def paid(self, reason: str) -> "_Owing":
        """Nothing owed: first the sum, then, once, the division."""
        first: list[Instruction] = []
        pay: list[Instruction] = []
        if self.axes:
            pay.append(Reduce(self.axes, self.num_devices, reason, self.signature.apart))
        if len(self.counts) > 1:
            why = "its terms have counts of their own"
            owed = (Reduce(self.axes, self.num_devices, why),) if self.axes else ()
            first.append(CountFirst((*_counting(self.schedule), *owed)))
        if self.factor != 1.0:
            pay.append(Multiply(self.factor))
        if self.rescaled is not None:
            pay.append(Unscale(self.rescaled))
        match self.counts:
            case (None,):
                pay.append(Settle("count"))
            case (count,):
                pay.append(Settle("cells", self.parts * (count or 0.0), self.lanes))
            case _:
                pay.append(Settle("nothing"))
        return _Owing(self.signature, (*first, *self.schedule, *pay), summed=self.summed)


def schedule(program: Program, signature: Signature) -> Schedule:
    """The work of a bound program, in the order in which it is done."""
    match program:
        case (Repeat() as node, *rest):
            return (Again(node, schedule(tuple(rest), signature)),)
        case _:
            pass
    names = {id(node): name for name, node in named(program).items()}
    owing = _Owing(signature, counts=signature.counts)
    for place in reversed(range(len(program))):
        owing = _next(owing, program[place], program[:place], names)
        if isinstance(program[place], Update):
            return owing.schedule  # what stands on its left is part of what it does
    raise ValueError("a program without an update makes no step")


def _next(owing: _Owing, node: Node, outer: Program, names: dict[int, str]) -> _Owing:
    match node:
        case Differentiate():
            rescaled = any(isinstance(one, Rescale) for one in outer)
            count = owing.counts[0] if len(owing.counts) == 1 else None
            return owing.then(Compute(node, owing.signature.counts_first, rescaled, count or 1.0))
        case Mean(place):
            return _averaged(owing, node, place)
        case Scale(factor):
            return replace(owing, factor=owing.factor * factor)
        case Rescale():
            return replace(owing, rescaled=node)
        case Map():
            name = names[id(node)] if node.draws else None
            return owing.paid(_reason(node, outer)).then(Apply(node, name, owing.summed))
        case Update():
            owing = owing.paid(f"`{node.written}` needs the whole sum")
            return owing.then(_optimized(node, owing.schedule, outer, names))
        case Follow() | Guard() | Repeat():
            raise ValueError(f"`{node}` stands on the left of the update")
        case _:
            assert_never(node)


def _averaged(owing: _Owing, node: Mean, place: Time | Space | Lanes) -> _Owing:
    match place:
        case Time(size):
            loop = Loop(size, owing.schedule, node.dtype)
            return replace(owing, schedule=(loop,), parts=owing.parts * size)
        case Lanes():
            return replace(owing, schedule=(Vectorise(owing.schedule),), lanes=True)
        case Space(axes):
            num_devices, parts = owing.num_devices * node.size, owing.parts * node.size
            if _carries(owing.schedule):
                reason = f"`{node.written}` averages the model's own state"
                owing = owing.then(AverageCarry(axes, node.size, reason, owing.signature.carried))
            summed = (*axes, *owing.summed)
            return replace(owing, axes=(*axes, *owing.axes), num_devices=num_devices, parts=parts, summed=summed)
        case _:
            assert_never(place)


def _optimized(node: Update, inner: Schedule, outer: Program, names: dict[int, str]) -> Optimize:
    follows = tuple((names[id(one)], one) for one in reversed(outer) if isinstance(one, Follow))
    guard = next(((names[id(one)], one) for one in outer if isinstance(one, Guard)), None)
    rescale = next(((names[id(one.node)], one.node) for one in everything(inner) if isinstance(one, Unscale)), None)
    return Optimize(node, follows, guard, rescale)


def _reason(node: Map, outer: Program) -> str:
    reason = f"`{node.written}` is not linear: it needs the whole sum"
    loops = [one.written for one in outer if isinstance(one, Mean) and isinstance(one.place, Time)]
    if not loops:
        return reason
    return f"{reason}, and it stands inside `{'`, `'.join(loops)}`: once a microbatch"


def _counting(body: Schedule) -> Schedule:
    """The same work on the same rows, for nothing but the counts."""
    counted: list[Instruction] = []
    for one in body:
        match one:
            case Compute(node):
                counted.append(Count(node))
            case Loop(size, inner):
                counted.append(Loop(size, _counting(inner)))
            case Vectorise(inner):
                counted.append(Vectorise(_counting(inner)))
            case _:
                pass
    return tuple(counted)


def _carries(body: Schedule) -> bool:
    return any(isinstance(one, Compute) and one.node.carry for one in everything(body))


def owes(body: Schedule) -> bool:
    """Whether anything in it is added up over devices."""
    return any(isinstance(one, Reduce | AverageCarry) for one in everything(body))


def batch_axes(program: Program) -> tuple[str, ...]:
    """The mesh axes that rows lie along, the outermost first."""
    places = [node.place for node in program if isinstance(node, Mean)]
    return tuple(axis for place in places if isinstance(place, Space) for axis in place.axes)


def draws(body: Schedule) -> bool:
    """Whether anything in it is drawn, and so depends on where a row stands in the batch."""
    return any(
        (isinstance(one, Apply) and one.name is not None) or (isinstance(one, Compute) and one.node.rng is not None)
        for one in everything(body)
    )
