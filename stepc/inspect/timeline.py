"""What a program does, in the order of its text: compute, collectives, and the loops around them."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TypeAlias, TypeVar

import jax

from stepc.inspect.collectives import Collective, collectives
from stepc.inspect.cost import instruction_flops, instruction_traffic
from stepc.inspect.hlo import Computation, Instruction, Module, parse, text_of
from stepc.inspect.loops import call_count, label
from stepc.inspect.roofline import Device, wire_bytes


@dataclass(frozen=True)
class ComputeSegment:
    """Consecutive instructions of one device, with no collective among them."""

    flops: int
    bytes: int
    label: str

    def seconds(self, device: Device) -> float:
        """At the peaks of the device; an estimate."""
        return max(self.flops / device.flops_per_second, self.bytes / device.memory_bytes_per_second)

    def repeated(self, times: int) -> "ComputeSegment":
        """The same work `times` times."""
        return replace(self, flops=times * self.flops, bytes=times * self.bytes)


@dataclass(frozen=True)
class CollectiveSegment:
    """One collective, run `executions` times; `overlapped` says that something is scheduled while it runs."""

    kind: str
    wire_bytes: float
    executions: int
    axes: tuple[str, ...]
    overlapped: bool
    label: str

    def seconds(self, device: Device) -> float:
        """In a ring, at the full speed of all links of the device; an estimate."""
        return self.executions * self.wire_bytes / device.link_bytes_per_second

    def repeated(self, times: int) -> "CollectiveSegment":
        """The same collective `times` times as often."""
        return replace(self, executions=times * self.executions)


FlatSegment: TypeAlias = ComputeSegment | CollectiveSegment


@dataclass(frozen=True)
class LoopSegment:
    """Segments that a loop runs `trip_count` times."""

    trip_count: int
    segments: tuple[FlatSegment, ...]
    label: str

    def seconds(self, device: Device) -> float:
        """Of all iterations; an estimate."""
        return self.trip_count * sum(segment.seconds(device) for segment in self.segments)


Segment: TypeAlias = FlatSegment | LoopSegment


def timeline(compiled: jax.stages.Compiled | str, mesh: jax.sharding.Mesh | None = None) -> tuple[Segment, ...] | None:
    """Return the segments of a program in order; None if a loop has no known trip count.

    Meaning: the instructions of the entry in their order, consecutive compute merged. An outer loop that has products
      or collectives is a segment of its own; the loops inside it are multiplied out.
    Why: a report draws one step from it, to the scale of a device's peaks.

    Args:
      compiled: what `jax.jit(f).lower(...).compile()` returns, or its `as_text()`.
      mesh: as in `collectives`.
    Errors: ValueError if the backend prints no HLO.
    A branch counts as if it were always taken. An asynchronous collective stands where it starts.
    Source: ours.
    """
    module = parse(text_of(compiled))
    reader = _Reader(module, {row.name: row for row in collectives(compiled, mesh)})
    segments = _joined(reader.segments, module.computations[module.entry])
    return None if segments is None else tuple(_merged(segments))


@dataclass(frozen=True)
class _Reader:
    """Reads instructions as segments. `collectives` holds the collectives by the name of their instruction."""

    module: Module
    collectives: dict[str, Collective]

    def segments(self, computation: Computation, instruction: Instruction) -> list[Segment] | None:
        """The segments of an instruction of the entry: a loop with products or collectives stays a loop."""
        flat = self.flat(computation, instruction)
        is_plain = flat is None or not any(isinstance(one, CollectiveSegment) or one.flops for one in flat)
        if instruction.opcode != "while" or is_plain:
            return None if flat is None else list(flat)
        body = next(call for call in instruction.calls if call.role == "body")
        inner = self.flat_of(body.computation)
        trip_count = call_count(self.module, computation.name, instruction, body.role)
        if inner is None or trip_count is None:
            return None
        return [LoopSegment(trip_count, tuple(_merged_flat(inner)), label(instruction))]

    def flat(self, computation: Computation, instruction: Instruction) -> list[FlatSegment] | None:
        """The segments of an instruction and everything it runs, loops multiplied out; None if that is unknown."""
        if instruction.name in self.collectives:
            row = self.collectives[instruction.name]
            is_overlapped = row.overlap is not None and bool(row.overlap.instructions)
            return [CollectiveSegment(row.kind, wire_bytes(row), 1, row.axes, is_overlapped, row.source)]
        if instruction.opcode.endswith(("-done", "-update")):
            return []
        found: list[FlatSegment] = []
        for call in (call for call in instruction.calls if self._has_collectives(call.computation)):
            inner = self.flat_of(call.computation)
            count = call_count(self.module, computation.name, instruction, call.role)
            if inner is None or count is None:
                return None
            # The instructions inside a fusion touch no memory themselves.
            is_fusion = instruction.opcode == "fusion"
            found += [one.repeated(count) for one in inner if isinstance(one, CollectiveSegment) or not is_fusion]
        return found or self._compute(computation, instruction)

    def flat_of(self, name: str) -> list[FlatSegment] | None:
        """The segments of one execution of a computation."""
        return _joined(self.flat, self.module.computations[name])

    def _has_collectives(self, name: str) -> bool:
        if name not in self.module.computations:
            return False
        return any(
            each.name in self.collectives or any(self._has_collectives(call.computation) for call in each.calls)
            for each in self.module.computations[name].instructions.values()
        )

    def _compute(self, computation: Computation, instruction: Instruction) -> list[FlatSegment] | None:
        flops = instruction_flops(self.module, computation, instruction)
        bytes_ = instruction_traffic(self.module, computation, instruction)
        if flops is None or bytes_ is None:
            return None
        return [ComputeSegment(flops, bytes_, label(instruction))] if flops or bytes_ else []


_S = TypeVar("_S", bound=Segment)


def _joined(read: Callable[[Computation, Instruction], list[_S] | None], computation: Computation) -> list[_S] | None:
    """The segments of all instructions; None if those of one are unknown."""
    parts = [read(computation, instruction) for instruction in computation.instructions.values()]
    return None if None in parts else [segment for part in parts if part for segment in part]


def _merged(segments: Iterable[Segment]) -> Iterator[Segment]:
    pending: list[FlatSegment] = []
    for segment in segments:
        match segment:
            case LoopSegment():
                yield from _merged_flat(pending)
                yield segment
                pending = []
            case _:
                pending.append(segment)
    yield from _merged_flat(pending)


def _merged_flat(segments: Iterable[FlatSegment]) -> Iterator[FlatSegment]:
    """Merge consecutive compute; the result has the label of its largest part."""
    for is_compute, group in groupby(segments, key=lambda segment: isinstance(segment, ComputeSegment)):
        if not is_compute:
            yield from group
            continue
        computes = [one for one in group if isinstance(one, ComputeSegment)]
        largest = max(computes, key=lambda one: (one.flops, one.bytes))
        yield ComputeSegment(sum(one.flops for one in computes), sum(one.bytes for one in computes), largest.label)
