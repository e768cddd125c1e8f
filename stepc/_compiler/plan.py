"""The plan: everything the compiler decided, as a value that prints. It is told, it decides nothing.

Text only: a plan is compared with golden files, and read by people.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import TypeAlias, assert_never

from stepc._compiler.normalize import AppliedLaw
from stepc._compiler.schedule import (
    AllGather,
    AllReduce,
    Apply,
    AverageModelState,
    Compute,
    Count,
    CountFirst,
    DivideByCount,
    Instruction,
    Multiply,
    Optimize,
    ReduceScatter,
    RepeatSteps,
    ScanMicrobatches,
    Schedule,
    Unscale,
    Vmap,
)
from stepc._compiler.search import SearchResult
from stepc._core.nodes import Program, show

_LAYERED = "a layer at a time where the loss scans over layers"


@dataclass(frozen=True)
class PlannedLeaf:
    """One leaf of the state, and where it lies."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    bytes_: int
    sharding: str


@dataclass(frozen=True)
class PlannedCollective:
    """One reduction that the schedule asks for. `executions` are those of a step, or, under `repeat`, of a dispatch."""

    kind: str
    axes: tuple[str, ...]
    executions: int
    in_loop: bool
    reason: str
    per: str = "step"


@dataclass(frozen=True)
class Plan:
    """What the compiler decided.

    Args:
      pipeline: the pipeline as it was written.
      mesh: axis sizes by name, in the order of the mesh; empty for a single device.
      core: the core program before any law.
      laws: every law that was applied, with the program before and after it.
      schedule: the order of work.
      rows: the mesh axes that batch rows lie along.
      leaves: every leaf of the state; all of them are donated.
      notes: what the layout costs beside what one would expect.
      accumulator: for each parameter, the shape of the sum of its gradient on one device, while it is added up.
      search: how a number was found that the pipeline left to the compiler; None if it left none.
    """

    pipeline: str
    mesh: tuple[tuple[str, int], ...]
    core: Program
    laws: tuple[AppliedLaw, ...]
    schedule: Schedule
    rows: tuple[str, ...]
    leaves: tuple[PlannedLeaf, ...]
    notes: tuple[str, ...] = ()
    accumulator: tuple[tuple[int, ...], ...] = ()
    search: SearchResult | None = None

    @property
    def normal(self) -> Program:
        """The core program after all laws."""
        return self.laws[-1].after if self.laws else self.core

    @property
    def loop_length(self) -> int:
        """How many microbatches the loop runs over; 1 if there is no loop."""
        return max(_loop_lengths(self.schedule, 1))

    @property
    def collectives(self) -> tuple[PlannedCollective, ...]:
        """Every reduction, with its place and the reason for it."""
        return tuple(_collectives(self.schedule, 1))

    @property
    def _no_collectives(self) -> str:
        return "none of ours: XLA places its own" if self.rows else "none"

    def __str__(self) -> str:
        parts = (
            f"plan of {self.pipeline}",
            _section("mesh", [", ".join(f"{name}={size}" for name, size in self.mesh) or "a single device"]),
            *([] if self.search is None else [_section("search", str(self.search).splitlines())]),
            _section("core", _table([("", show(self.core)), *((_law(one), show(one.after)) for one in self.laws)])),
            *([_section("laws applied", _table(_why(self.laws)))] if self.laws else []),
            _section("schedule of one step", list(_lines(self.schedule, 0))),
            _section("collectives", _table([_row(one) for one in self.collectives]) or [self._no_collectives]),
            _section("batch", [_rows(self.rows)]),
            *([_section("layout", list(self.notes))] if self.notes else []),
            _section(_state_title(self.leaves), _table([_leaf(one) for one in self.leaves])),
        )
        return "\n\n".join(parts)


Row: TypeAlias = tuple[str, ...]


def _section(title: str, lines: list[str]) -> str:
    return "\n".join((title, *(f"  {line}".rstrip() for line in lines)))


def _table(rows: list[Row]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _law(one: AppliedLaw) -> str:
    return f"{one.law.name}: {one.law.formula}"


def _why(laws: tuple[AppliedLaw, ...]) -> list[Row]:
    return [(law.name, law.reason, f"holds for {law.condition}") for law in dict.fromkeys(one.law for one in laws)]


def _row(one: PlannedCollective) -> Row:
    times = f"{one.executions} a {one.per}, {'in the loop' if one.in_loop else 'outside any loop'}"
    return (one.kind, f"over {', '.join(one.axes)}", times, one.reason)


def _rows(axes: tuple[str, ...]) -> str:
    return f"rows along {', '.join(axes)}" if axes else "whole on every device"


def _state_title(leaves: tuple[PlannedLeaf, ...]) -> str:
    total = sum(leaf.bytes_ for leaf in leaves)
    return f"state: {len(leaves)} leaves, {total:,} bytes, every leaf donated"


def _leaf(leaf: PlannedLeaf) -> Row:
    return (leaf.path, f"{leaf.dtype}{list(leaf.shape)}", leaf.sharding)


def _lines(schedule: Schedule, depth: int) -> Iterator[str]:
    for one in schedule:
        if line := _line(one):
            yield "  " * depth + line
        if isinstance(one, ScanMicrobatches | Vmap | CountFirst | RepeatSteps):
            yield from _lines(one.body, depth + 1)


def _line(one: Instruction) -> str | None:
    match one:
        case Compute(node, counts_first, rescaled, layered=layered):
            how = ", each term divided by its count" if counts_first else ""
            how += ", times the scale" if rescaled else ""
            how += f", parameters gathered over {layered} and their gradient scattered {_LAYERED}" if layered else ""
            return f"{node.written}: value and gradient on one cell{how}"
        case Count(node):
            return f"{node.written}: its counts on one cell, and nothing else of it"
        case CountFirst():
            return "count first: one accumulated gradient can be divided by one count only, and the terms have several"
        case ScanMicrobatches(size, _, dtype):
            inside = f" in {dtype}" if dtype else ""
            return f"loop {size} times and add up{inside}: microbatch j is the rows i with i mod {size} = j"
        case Vmap():
            return "side by side for every row, and add up"
        case AllReduce():
            return _reduce(one)
        case ReduceScatter(axis, num_devices, reason, dtype):
            inside = f" in {dtype}" if dtype else ""
            return f"reduce-scatter over {axis} ({num_devices} devices){inside}: {reason}"
        case AllGather(axis, num_devices, reason):
            return f"all-gather of parameters over {axis} ({num_devices} devices): {reason}"
        case AverageModelState(axes, num_devices, reason):
            return f"all-reduce of the model_state over {', '.join(axes)} ({num_devices} devices): {reason}"
        case Multiply(factor):
            return f"multiply by {factor}"
        case Unscale(node):
            return f"divide by the scale of `{node.written}`"
        case DivideByCount():
            return _settle(one)
        case Apply(node):
            return node.written
        case Optimize():
            return _optimize(one)
        case RepeatSteps(node):
            return f"{node.size} whole steps, one after another (`{node.written}`)"
        case _:
            assert_never(one)


def _reduce(one: AllReduce) -> str:
    also = f", then {' and '.join(one.apart)} of metrics" if one.apart else ""
    inside = f" in {one.dtype}" if one.dtype else ""
    what = "" if one.scattered is None else " of metrics, whole leaves" + (" and parts" if len(one.axes) > 1 else "")
    return f"all-reduce{what} over {', '.join(one.axes)} ({one.num_devices} devices){inside}{also}: {one.reason}"


def _settle(one: DivideByCount) -> str | None:
    if one.by == "count":
        return "divide by the count that was added up with it"
    number = " × ".join(
        [*([f"{one.cells:g}"] if one.cells != 1 else []), *(["the rows of a cell"] if one.lanes else [])]
    )
    return f"divide by {number}" if number and one.by == "cells" else None


def _optimize(one: Optimize) -> str:
    follows = "".join(f", then {node.written}" for _, node in one.follows)
    text = f"{one.node.written}{follows}"
    if one.guard is not None:
        text += f", if the loss and the gradient are finite; else the state stays as it is (`{one.guard[1].written}`)"
    elif one.rescale is not None:
        text += f", if the gradient is finite; else the state stays as it is (`{one.rescale[1].written}`)"
    return text if one.gather is None else f"{text}; then {_line(one.gather)}"


def _loop_lengths(schedule: Schedule, times: int) -> Iterator[int]:
    yield times
    for one in schedule:
        match one:
            case ScanMicrobatches(size, body):
                yield from _loop_lengths(body, times * size)
            case Vmap(body) | RepeatSteps(_, body):
                yield from _loop_lengths(body, times)
            case _:
                pass


def _collectives(schedule: Schedule, times: int) -> Iterator[PlannedCollective]:
    for one in schedule:
        match one:
            case ScanMicrobatches(size, body):
                yield from _collectives(body, prod((times, size)))
            case RepeatSteps(node, body):
                yield from (replace(one, per="dispatch") for one in _collectives(body, prod((times, node.size))))
            case CountFirst(body) | Vmap(body):
                yield from _collectives(body, times)
            case Compute(layered=str() as axis):
                yield PlannedCollective("all-gather", (axis,), times, times > 1, f"parameters, {_LAYERED}")
                yield PlannedCollective("reduce-scatter", (axis,), times, times > 1, f"their gradient, {_LAYERED}")
            case ReduceScatter(axis, _, reason):
                yield PlannedCollective("reduce-scatter", (axis,), times, times > 1, reason)
            case AllGather(axis, _, reason):
                yield PlannedCollective("all-gather", (axis,), times, times > 1, reason)
            case Optimize(gather=AllGather(axis, _, reason)):
                yield PlannedCollective("all-gather", (axis,), times, times > 1, reason)
            case AllReduce(axes, _, reason, apart):
                yield PlannedCollective("all-reduce", axes, times, times > 1, reason)
                for kind in apart:
                    why = f"{kind} of metrics: not a sum of the gradient's type"
                    yield PlannedCollective("all-reduce", axes, times, times > 1, why)
            case AverageModelState(axes, _, reason, dtypes):
                for dtype in dtypes:
                    yield PlannedCollective("all-reduce", axes, times, times > 1, f"{reason}, in {dtype}")
            case _:
                pass
