"""The order of work of one step, and where each reduction sits. It decides; `lower.py` obeys.

The rule that places every reduction: a gradient carries the sums it still owes. A mean over mesh axes owes a
sum over them; linear nodes pass the debt on, through loops as well; the first node that is not linear pays.
So a reduction stands in a loop only where the order of the words demands it.
"""

from dataclasses import dataclass, replace
from typing import TypeAlias, assert_never

from stepc.core.nodes import Differentiate, Map, Mean, Node, Program, Scale, Space, Time, Update


@dataclass(frozen=True)
class Compute:
    """The loss and its gradient on the rows at hand."""

    node: Differentiate


@dataclass(frozen=True)
class Loop:
    """The body once per microbatch, its results added up: one `lax.scan`."""

    size: int
    body: "Schedule"


@dataclass(frozen=True)
class Reduce:
    """Pay the debt: add up over the devices along `axes`."""

    axes: tuple[str, ...]
    num_devices: int
    reason: str


@dataclass(frozen=True)
class Multiply:
    """Multiply the gradient, not its metrics, by a constant."""

    factor: float


@dataclass(frozen=True)
class Divide:
    """Divide the gradient and its metrics by the number of cells that were added up."""

    count: int


@dataclass(frozen=True)
class Apply:
    """A function of the gradient that needs its value."""

    node: Map


@dataclass(frozen=True)
class Optimize:
    """The optimizer."""

    node: Update


Instruction: TypeAlias = Compute | Loop | Reduce | Multiply | Divide | Apply | Optimize
Schedule: TypeAlias = tuple[Instruction, ...]


@dataclass(frozen=True)
class _Owing:
    """A schedule so far, and what its result still owes."""

    schedule: Schedule
    axes: tuple[str, ...] = ()
    num_devices: int = 1
    count: int = 1
    factor: float = 1.0

    def then(self, instruction: Instruction) -> "_Owing":
        return replace(self, schedule=(*self.schedule, instruction))

    def paid(self, reason: str) -> "_Owing":
        """Nothing owed: first the sum, then, once, the division."""
        pay: list[Instruction] = []
        if self.axes:
            pay.append(Reduce(self.axes, self.num_devices, reason))
        if self.factor != 1.0:
            pay.append(Multiply(self.factor))
        if self.count != 1:
            pay.append(Divide(self.count))
        return _Owing((*self.schedule, *pay))


def schedule(program: Program) -> Schedule:
    """The work of a bound program, in the order in which it is done."""
    owing = _Owing(())
    for place in reversed(range(len(program))):
        owing = _next(owing, program[place], outer=program[:place])
    return owing.paid("the step ends here").schedule


def _next(owing: _Owing, node: Node, *, outer: Program) -> _Owing:
    match node:
        case Differentiate():
            return owing.then(Compute(node))
        case Mean(place):
            return _averaged(owing, place, node.size)
        case Scale(factor):
            return replace(owing, factor=owing.factor * factor)
        case Map():
            return owing.paid(_reason(node, outer)).then(Apply(node))
        case Update():
            return owing.paid(f"`{node.written}` needs the whole sum").then(Optimize(node))
        case _:
            assert_never(node)


def _averaged(owing: _Owing, place: Time | Space, size: int) -> _Owing:
    match place:
        case Time():
            return replace(owing, schedule=(Loop(size, owing.schedule),), count=owing.count * size)
        case Space(axes):
            num_devices = owing.num_devices * size
            return replace(owing, axes=(*axes, *owing.axes), num_devices=num_devices, count=owing.count * size)
        case _:
            assert_never(place)


def _reason(node: Map, outer: Program) -> str:
    reason = f"`{node.written}` is not linear: it needs the whole sum"
    loops = [one.written for one in outer if isinstance(one, Mean) and isinstance(one.place, Time)]
    if not loops:
        return reason
    return f"{reason}, and it stands inside `{'`, `'.join(loops)}`: once a microbatch"


def owes(schedule: Schedule) -> bool:
    """Whether anything in it is added up over devices."""
    return any(isinstance(one, Reduce) or (isinstance(one, Loop) and owes(one.body)) for one in schedule)


def batch_axes(program: Program) -> tuple[str, ...]:
    """The mesh axes that rows lie along, the outermost first."""
    places = [node.place for node in program if isinstance(node, Mean)]
    return tuple(axis for place in places if isinstance(place, Space) for axis in place.axes)
