"""The instructions of a schedule: what a step does, in the order in which it does it. Values only, no decisions."""

from dataclasses import dataclass, replace
from math import prod
from typing import TypeAlias, assert_never

from stepc._compiler.sharding import BoundRules
from stepc._core.nodes import (
    DifferentiateNode,
    FollowNode,
    GuardNode,
    InScan,
    MapNode,
    MeanNode,
    Node,
    OverMesh,
    Program,
    RepeatNode,
    RescaleNode,
    ScaleNode,
    UnderVmap,
    UpdateNode,
    named,
)


@dataclass(frozen=True)
class LossSignature:
    """What a loss returns, as far as the order of work depends on it.

    Args:
      counts: for each term of its value, the number it counts in every cell, or None where the rows decide.
      apart: "max", "min" and "whole numbers", where a metric is one: they do not ride in the sum of the gradient.
      has_last: whether a metric is the last of its kind.
      model_state_dtypes: of the leaves of the model state.
    """

    counts: tuple[float | None, ...] = (1.0,)
    apart: tuple[str, ...] = ()
    has_last: bool = False
    model_state_dtypes: tuple[str, ...] = ()

    @property
    def counts_first(self) -> bool:
        """Whether one accumulated gradient cannot be divided after the sum, since its terms have different counts."""
        return len(self.counts) > 1


@dataclass(frozen=True)
class Compute:
    """The loss and its gradient on the rows at hand.

    Args:
      counts_first: whether each term is divided by its own count before the gradient is taken.
      rescaled: whether the loss is multiplied by a scale before that.
      count: what the loss counts on every cell; 1 unless it is a `Mean` with a number for its count.
      layered: the axis along which parameters lie in parts, if the loss makes them whole as it uses them.
      dtype: in which their gradient is added up over devices then; None for their own, or float32.
    """

    node: DifferentiateNode
    counts_first: bool = False
    rescaled: bool = False
    count: float = 1.0
    layered: str | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class Count:
    """The counts of the terms of the loss on the rows at hand; nothing else of it."""

    node: DifferentiateNode


@dataclass(frozen=True)
class CountFirst:
    """A pass that adds up the counts, before the one that needs them."""

    body: "Schedule"


@dataclass(frozen=True)
class ScanMicrobatches:
    """The body once per microbatch, its results added up in `dtype`: one `lax.scan`."""

    size: int
    body: "Schedule"
    dtype: str | None = None


@dataclass(frozen=True)
class Vmap:
    """The body on every row side by side, its results added up: `vmap`."""

    body: "Schedule"


@dataclass(frozen=True)
class AllReduce:
    """Pay the debt: add up over the devices along `axes`. Metrics `apart` are reductions of their own.

    Args:
      scattered: an axis over which the gradient is added up already, but for leaves that do not lie in parts.
      dtype: in which the gradient is added up; None for its own.
    """

    axes: tuple[str, ...]
    num_devices: int
    reason: str
    apart: tuple[str, ...] = ()
    scattered: str | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class ReduceScatter:
    """Pay the debt along one axis in parts: each device adds up its own part of the gradient, of metrics nothing.

    Leaves that do not lie in parts are left to the `Reduce` that comes after it.
    """

    axis: str
    num_devices: int
    reason: str
    dtype: str | None = None


@dataclass(frozen=True)
class AllGather:
    """Make parameters whole that lie in parts along an axis."""

    axis: str
    num_devices: int
    reason: str


@dataclass(frozen=True)
class AverageModelState:
    """The mean of the model's own state over the devices along `axes`, as soon as it is there: one for each type."""

    axes: tuple[str, ...]
    num_devices: int
    reason: str
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class Multiply:
    """Multiply the gradient, not its metrics, by a constant."""

    factor: float


@dataclass(frozen=True)
class Unscale:
    """Divide the gradient by the scale that the loss was multiplied by."""

    node: RescaleNode


@dataclass(frozen=True)
class DivideByCount:
    """The gradient becomes a value: divided once by what was added up, in the dtypes of the parameters.

    Args:
      by: "cells", how often the loss was called, times what it counts each time; "count", a count that was added up
        with it; or "nothing", if each term was divided before its gradient was taken.
      cells: how often the loss was called, times what it counts.
      lanes: whether each row was a cell, so that the number is that of the rows besides.
    """

    by: str = "cells"
    cells: float = 1.0
    lanes: bool = False


@dataclass(frozen=True)
class Apply:
    """A function of the gradient that needs its value.

    Args:
      name: from which its draws come, if it draws.
      summed: the mesh axes that are added up already; the cell that it draws for spans them.
    """

    node: MapNode
    name: str | None = None
    summed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Optimize:
    """The optimizer, and all that happens with a step or not at all.

    Args:
      follows: slots that follow the parameters, by name.
      guard: who skips a step that is not finite, by name.
      rescale: who adapts the scale of the loss, by name.
      gather: what makes the new parameters whole again, if each device makes a part of them only.
    """

    node: UpdateNode
    follows: tuple[tuple[str, FollowNode], ...] = ()
    guard: tuple[str, GuardNode] | None = None
    rescale: tuple[str, RescaleNode] | None = None
    gather: AllGather | None = None


@dataclass(frozen=True)
class RepeatSteps:
    """Whole steps, one after another in one dispatch: a `lax.scan` over the first axis of the batch."""

    node: RepeatNode
    body: "Schedule"


Instruction: TypeAlias = (
    Compute | Count | CountFirst | ScanMicrobatches | Vmap | AllGather | ReduceScatter | AllReduce | AverageModelState | Multiply | Unscale
    | DivideByCount | Apply | Optimize | RepeatSteps
)  # fmt: skip
Schedule: TypeAlias = tuple[Instruction, ...]


def all_instructions(body: Schedule) -> Schedule:
    """Every instruction, those inside others too."""
    inner = (
        all_instructions(one.body)
        for one in body
        if isinstance(one, ScanMicrobatches | Vmap | CountFirst | RepeatSteps)
    )
    return (*body, *(one for part in inner for one in part))


@dataclass(frozen=True)
class _Pending:
    """A schedule so far, and what its result still owes.

    `summed` are the axes added up or owed so far; `counts` are those of the loss until they are divided by.
    """

    signature: LossSignature
    schedule: Schedule = ()
    axes: tuple[str, ...] = ()
    num_devices: int = 1
    parts: int = 1
    lanes: bool = False
    factor: float = 1.0
    rescaled: RescaleNode | None = None
    summed: tuple[str, ...] = ()
    counts: tuple[float | None, ...] = (1.0,)

    def then(self, instruction: Instruction) -> "_Pending":
        return replace(self, schedule=(*self.schedule, instruction))

    def paid(self, reason: str) -> "_Pending":
        """Nothing owed: first the sum, then, once, the division."""
        first: list[Instruction] = []
        pay: list[Instruction] = []
        if self.axes:
            pay.append(AllReduce(self.axes, self.num_devices, reason, self.signature.apart))
        if len(self.counts) > 1:
            why = "its terms have counts of their own"
            owed = (AllReduce(self.axes, self.num_devices, why),) if self.axes else ()
            first.append(CountFirst((*_counting(self.schedule), *owed)))
        if self.factor != 1.0:
            pay.append(Multiply(self.factor))
        if self.rescaled is not None:
            pay.append(Unscale(self.rescaled))
        match self.counts:
            case (None,):
                pay.append(DivideByCount("count"))
            case (count,):
                pay.append(DivideByCount("cells", self.parts * (count or 0.0), self.lanes))
            case _:
                pay.append(DivideByCount("nothing"))
        return _Pending(self.signature, (*first, *self.schedule, *pay), summed=self.summed)


def schedule(program: Program, signature: LossSignature) -> Schedule:
    """The work of a bound program, in the order in which it is done."""
    match program:
        case (RepeatNode() as node, *rest):
            return (RepeatSteps(node, schedule(tuple(rest), signature)),)
        case _:
            pass
    names = {id(node): name for name, node in named(program).items()}
    owing = _Pending(signature, counts=signature.counts)
    for place in reversed(range(len(program))):
        owing = _next(owing, program[place], program[:place], names)
        if isinstance(program[place], UpdateNode):
            return owing.schedule  # what stands on its left is part of what it does
    raise ValueError("a program without an update makes no step")


def _next(owing: _Pending, node: Node, outer: Program, names: dict[int, str]) -> _Pending:
    match node:
        case DifferentiateNode():
            rescaled = any(isinstance(one, RescaleNode) for one in outer)
            count = owing.counts[0] if len(owing.counts) == 1 else None
            return owing.then(Compute(node, owing.signature.counts_first, rescaled, count or 1.0))
        case MeanNode(place):
            return _averaged(owing, node, place)
        case ScaleNode(factor):
            return replace(owing, factor=owing.factor * factor)
        case RescaleNode():
            return replace(owing, rescaled=node)
        case MapNode():
            name = names[id(node)] if node.draws else None
            return owing.paid(_reason(node, outer)).then(Apply(node, name, owing.summed))
        case UpdateNode():
            owing = owing.paid(f"`{node.written}` needs the whole sum")
            return owing.then(_optimized(node, owing.schedule, outer, names))
        case FollowNode() | GuardNode() | RepeatNode():
            raise ValueError(f"`{node}` stands on the left of the update")
        case _:
            assert_never(node)


def _averaged(owing: _Pending, node: MeanNode, place: InScan | OverMesh | UnderVmap) -> _Pending:
    match place:
        case InScan(size):
            loop = ScanMicrobatches(size, owing.schedule, node.dtype)
            return replace(owing, schedule=(loop,), parts=owing.parts * size)
        case UnderVmap():
            return replace(owing, schedule=(Vmap(owing.schedule),), lanes=True)
        case OverMesh(axes):
            num_devices, parts = owing.num_devices * node.size, owing.parts * node.size
            if _has_model_state(owing.schedule):
                reason = f"`{node.written}` averages the model's own state"
                owing = owing.then(AverageModelState(axes, node.size, reason, owing.signature.model_state_dtypes))
            summed = (*axes, *owing.summed)
            return replace(owing, axes=(*axes, *owing.axes), num_devices=num_devices, parts=parts, summed=summed)
        case _:
            assert_never(place)


def _optimized(node: UpdateNode, inner: Schedule, outer: Program, names: dict[int, str]) -> Optimize:
    follows = tuple((names[id(one)], one) for one in reversed(outer) if isinstance(one, FollowNode))
    guard = next(((names[id(one)], one) for one in outer if isinstance(one, GuardNode)), None)
    rescale = next(
        ((names[id(one.node)], one.node) for one in all_instructions(inner) if isinstance(one, Unscale)), None
    )
    return Optimize(node, follows, guard, rescale)


def _reason(node: MapNode, outer: Program) -> str:
    reason = f"`{node.written}` is not linear: it needs the whole sum"
    loops = [one.written for one in outer if isinstance(one, MeanNode) and isinstance(one.place, InScan)]
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
            case ScanMicrobatches(size, inner):
                counted.append(ScanMicrobatches(size, _counting(inner)))
            case Vmap(inner):
                counted.append(Vmap(_counting(inner)))
            case _:
                pass
    return tuple(counted)


def _has_model_state(body: Schedule) -> bool:
    return any(isinstance(one, Compute) and one.node.model_state for one in all_instructions(body))


def has_reduction(body: Schedule) -> bool:
    """Whether anything in it is added up over devices."""
    return any(isinstance(one, AllReduce | AverageModelState) for one in all_instructions(body))


def batch_axes(program: Program) -> tuple[str, ...]:
    """The mesh axes that rows lie along, the outermost first."""
    places = [node.place for node in program if isinstance(node, MeanNode)]
    return tuple(axis for place in places if isinstance(place, OverMesh) for axis in place.axes)


def draws(body: Schedule) -> bool:
    """Whether anything in it is drawn, and so depends on where a row stands in the batch."""
    return any(
        (isinstance(one, Apply) and one.name is not None) or (isinstance(one, Compute) and one.node.rng is not None)
        for one in all_instructions(body)
    )


def shard_schedule(schedule: Schedule, laid: BoundRules) -> Schedule:
    """The same work with the gradient, the optimizer and the parameters in parts, as the layout says."""
    match schedule:
        case (RepeatSteps(node, body),):
            return (RepeatSteps(node, shard_schedule(body, laid)),)
        case _:
            pass
    schedule = tuple(_in_dtype(one, laid.layout.reduce_dtype) for one in schedule)
    if laid.axis is None or not laid.layout.zero:
        return schedule
    schedule = _scattered(schedule, laid, laid.axis)
    if laid.layout.zero < 3:
        gather = AllGather(laid.axis, laid.num_parts, "each device makes its own part of the new parameters")
        return tuple(replace(one, gather=gather) if isinstance(one, Optimize) else one for one in schedule)
    if laid.layout.gather == "step":
        return (AllGather(laid.axis, laid.num_parts, "the loss needs whole parameters: once a step"), *schedule)
    gather = AllGather(laid.axis, laid.num_parts, "the loss needs whole parameters")
    if laid.layout.gather == "layer" and _is_linear(schedule):
        return _layered(schedule, laid.axis, gather, laid.layout.reduce_dtype)
    return _before_every_cell(schedule, gather)


def gradient_is_sharded(schedule: Schedule) -> bool:
    """Whether the gradient that leaves the devices lies in parts."""
    return any(
        isinstance(one, ReduceScatter) or (isinstance(one, Compute) and one.layered)
        for one in all_instructions(schedule)
    )


def replicated_because(schedule: Schedule, laid: BoundRules) -> str | None:
    """Why the gradient is whole on every device although the optimizer's state lies in parts; None if it is not."""
    if not laid.layout.zero or gradient_is_sharded(schedule):
        return None
    return next(
        one.reason for one in all_instructions(schedule) if isinstance(one, AllReduce) and laid.axis in one.axes
    )


def accumulator_is_sharded(schedule: Schedule) -> bool:
    """Whether what a loop adds up lies in parts."""
    return any(
        isinstance(one, ScanMicrobatches) and gradient_is_sharded(one.body) for one in all_instructions(schedule)
    )


def sharding_notes(schedule: Schedule, laid: BoundRules, gradient_bytes: int) -> tuple[str, ...]:
    """What the layout costs, where that is not what one would expect.

    Args:
      gradient_bytes: of the whole gradient, as far as a device of the automatic axes has it.
    """
    loops = prod(one.size for one in all_instructions(schedule) if isinstance(one, ScanMicrobatches))
    size, part = f"{gradient_bytes:,} B", f"{gradient_bytes // laid.num_parts:,} B"
    if laid.layout.automatic:
        times = "once a step" if loops == 1 else f"once a microbatch, {loops} times a step"
        return (
            f"XLA partitions the loss and sums the gradient of {size} over {', '.join(laid.rows)} at least {times}",
        )
    found: list[str] = []
    if (why := replicated_because(schedule, laid)) is not None:
        found.append(f"the accumulator is whole on every device: {why}")
    elif loops > 1 and (laid.layout.zero == 2 or laid.layout.gather != "step"):
        found.append(
            f"the accumulator takes {part} instead of {size}, for {loops} reduce-scatters of {size} instead of 1"
        )
    if laid.layout.gather != "step" and laid.axis is not None:
        often = f"for {loops} all-gathers instead of 1"
        if any(isinstance(one, Compute) and one.layered for one in all_instructions(schedule)):
            found.append(f"parameters are whole a layer at a time where the loss scans over layers, {often} and back")
        else:
            found.append(f"whole parameters are kept for a microbatch, not for the step, {often}")
    return tuple(found)


def _in_dtype(one: Instruction, dtype: str | None) -> Instruction:
    match one:
        case AllReduce():
            return replace(one, dtype=dtype)
        case ScanMicrobatches():
            return replace(one, body=tuple(_in_dtype(inner, dtype) for inner in one.body))
        case _:
            return one


def _scattered(schedule: Schedule, laid: BoundRules, axis: str) -> Schedule:
    """The reduction over `axis` in parts, if nothing on the devices needs its whole result."""
    place = max((n for n, one in enumerate(schedule) if isinstance(one, AllReduce)), default=-1)
    reduce = schedule[place] if place >= 0 else None
    if not isinstance(reduce, AllReduce) or axis not in reduce.axes:
        return schedule
    scatter = ReduceScatter(axis, laid.num_parts, reduce.reason, reduce.dtype)
    before, after = schedule[:place], (replace(reduce, scattered=axis), *schedule[place + 1 :])
    if laid.layout.zero == 2 or laid.layout.gather != "step":
        return (*_early(before, scatter), *after)
    return (*before, scatter, *after)


def _early(schedule: Schedule, scatter: ReduceScatter) -> Schedule:
    """In the innermost loop after which no transform needs the whole gradient; where there is none, at the end."""
    for place, one in enumerate(schedule):
        if isinstance(one, ScanMicrobatches) and not any(isinstance(later, Apply) for later in schedule[place:]):
            scatter = replace(scatter, reason="the accumulator lies in parts: once a microbatch")
            return (*schedule[:place], replace(one, body=_early(one.body, scatter)), *schedule[place + 1 :])
    return (*schedule, scatter)


def _is_linear(schedule: Schedule) -> bool:
    """Whether each cell's gradient is only added up until it is scattered."""
    place = next((n for n, one in enumerate(schedule) if isinstance(one, AllReduce)), 0)
    return gradient_is_sharded(schedule) and not any(
        isinstance(one, Apply | Vmap) for one in all_instructions(schedule[:place])
    )


def _layered(schedule: Schedule, axis: str, gather: AllGather, dtype: str | None) -> Schedule:
    """The loss itself gathers and scatters; what counts first needs whole parameters."""
    found: list[Instruction] = []
    for one in schedule:
        match one:
            case ReduceScatter():
                continue
            case Compute():
                found.append(replace(one, layered=axis, dtype=dtype))
            case ScanMicrobatches(_, body):
                found.append(replace(one, body=_layered(body, axis, gather, dtype)))
            case CountFirst(body):
                found.append(replace(one, body=_before_every_cell(body, gather)))
            case _:
                found.append(one)
    return tuple(found)


def _before_every_cell(schedule: Schedule, gather: AllGather) -> Schedule:
    """At the beginning of the innermost loop, or where there is none; and where cells are counted."""
    loops = any(isinstance(one, ScanMicrobatches) for one in schedule)
    inner = tuple(
        replace(one, body=_before_every_cell(one.body, gather))
        if isinstance(one, ScanMicrobatches | CountFirst)
        else one
        for one in schedule
    )
    return inner if loops else (gather, *inner)
