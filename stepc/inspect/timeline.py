"""The course of a program: work, exchanges and the loops around them, in the order of its text."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TypeAlias

import jax

from stepc.inspect.collectives import Collective, collectives
from stepc.inspect.cost import flops_of, moved_by
from stepc.inspect.hlo import Computation, Instruction, Module, parse, text_of
from stepc.inspect.loops import named, turns
from stepc.inspect.roofline import Device, wire_bytes


@dataclass(frozen=True)
class ComputeSegment:
    """Instructions of one device, one after another, without an exchange among them."""

    flops: int
    bytes: int
    label: str

    def seconds(self, device: Device) -> float:
        """At the peaks of the device; an estimate."""
        return max(self.flops / device.flops_per_second, self.bytes / device.memory_bytes_per_second)


@dataclass(frozen=True)
class CollectiveSegment:
    """One collective, `times` times; `beside` says that something is scheduled while it runs."""

    kind: str
    wire_bytes: float
    times: int
    axes: tuple[str, ...]
    beside: bool
    label: str

    def seconds(self, device: Device) -> float:
        """In a ring, at the full speed of all links of the device; an estimate."""
        return self.times * self.wire_bytes / device.link_bytes_per_second


@dataclass(frozen=True)
class LoopSegment:
    """Segments that are run `times` times."""

    times: int
    segments: tuple["ComputeSegment | CollectiveSegment", ...]
    label: str

    def seconds(self, device: Device) -> float:
        """Of all turns; an estimate."""
        return self.times * sum(segment.seconds(device) for segment in self.segments)


Segment: TypeAlias = ComputeSegment | CollectiveSegment | LoopSegment


def timeline(compiled: jax.stages.Compiled | str, mesh: jax.sharding.Mesh | None = None) -> tuple[Segment, ...] | None:
    """Return the course of a program: what it works, what it exchanges, in which loop; None if a loop hides that.

    Meaning: the instructions of the entry in their order, consecutive work joined; a loop with work in it is a segment
      of its own, and the loops inside it are multiplied out.
    Why: a picture of a step is drawn from it, to the scale of a device's peaks.

    Args:
      compiled: what `jax.jit(f).lower(...).compile()` returns, or its `as_text()`.
      mesh: as in `collectives`.
    Errors: ValueError if the backend prints no HLO.
    A branch counts as if it were taken every time. An exchange stands where it starts.
    Source: ours.
    """
    module = parse(text_of(compiled))
    reader = _Reader(module, {row.name: row for row in collectives(compiled, mesh)})
    entry = module.computations[module.entry]
    parts = [reader.top(entry, instruction) for instruction in entry.instructions.values()]
    if any(part is None for part in parts):
        return None
    return tuple(_joined(segment for part in parts if part for segment in part))


@dataclass(frozen=True)
class _Reader:
    """Reads instructions as segments; `exchanges` are the collectives by the name of their instruction."""

    module: Module
    exchanges: dict[str, Collective]

    def top(self, computation: Computation, instruction: Instruction) -> list[Segment] | None:
        """The segments of an instruction of the entry: a loop with products or exchanges in it stays a loop."""
        flat = self.flat(computation, instruction)
        plain = flat is None or not any(isinstance(one, CollectiveSegment) or one.flops for one in flat)
        if instruction.opcode != "while" or plain:
            return None if flat is None else list(flat)
        body = next(call for call in instruction.calls if call.role == "body")
        inner, times = self.all_of(body.computation), turns(self.module, computation.name, instruction, body.role)
        if inner is None or times is None:
            return None
        return [LoopSegment(times, tuple(_joined_flat(inner)), named(instruction))]

    def flat(
        self, computation: Computation, instruction: Instruction
    ) -> list[ComputeSegment | CollectiveSegment] | None:
        """The segments of an instruction and of all that it runs, loops multiplied out; None if one hides its turns."""
        if instruction.name in self.exchanges:
            return [_exchange(self.exchanges[instruction.name])]
        if instruction.opcode.endswith(("-done", "-update")):
            return []
        found: list[ComputeSegment | CollectiveSegment] = []
        for call in (call for call in instruction.calls if self._exchanges_in(call.computation)):
            inner, times = self.all_of(call.computation), turns(self.module, computation.name, instruction, call.role)
            if inner is None or times is None:
                return None
            # What stands inside a fusion touches no memory on its own.
            kept = (
                [one for one in inner if isinstance(one, CollectiveSegment)]
                if instruction.opcode == "fusion"
                else inner
            )
            found += [_repeated(segment, times) for segment in kept]
        return found or self._work(computation, instruction)

    def all_of(self, name: str) -> list[ComputeSegment | CollectiveSegment] | None:
        """The segments of a computation, one execution of it."""
        computation = self.module.computations[name]
        parts = [self.flat(computation, instruction) for instruction in computation.instructions.values()]
        if any(part is None for part in parts):
            return None
        return [segment for part in parts if part for segment in part]

    def _exchanges_in(self, name: str) -> bool:
        if name not in self.module.computations:
            return False
        return any(
            each.name in self.exchanges or any(self._exchanges_in(call.computation) for call in each.calls)
            for each in self.module.computations[name].instructions.values()
        )

    def _work(
        self, computation: Computation, instruction: Instruction
    ) -> list[ComputeSegment | CollectiveSegment] | None:
        flops = flops_of(self.module, computation, instruction)
        bytes_ = moved_by(self.module, computation, instruction)
        if flops is None or bytes_ is None:
            return None
        return [ComputeSegment(flops, bytes_, named(instruction))] if flops or bytes_ else []


def _exchange(row: Collective) -> CollectiveSegment:
    beside = row.between is not None and bool(row.between.instructions)
    return CollectiveSegment(row.kind, wire_bytes(row), 1, row.axes, beside, row.source)


def _repeated(segment: ComputeSegment | CollectiveSegment, times: int) -> ComputeSegment | CollectiveSegment:
    match segment:
        case ComputeSegment(flops, bytes_, label):
            return ComputeSegment(times * flops, times * bytes_, label)
        case CollectiveSegment():
            return replace(segment, times=times * segment.times)


def _joined_flat(
    segments: Iterable[ComputeSegment | CollectiveSegment],
) -> Iterator[ComputeSegment | CollectiveSegment]:
    """Work next to work is one piece, named after its heaviest part."""
    for is_work, group in groupby(segments, key=lambda segment: isinstance(segment, ComputeSegment)):
        if not is_work:
            yield from group
            continue
        works = [one for one in group if isinstance(one, ComputeSegment)]
        heaviest = max(works, key=lambda one: (one.flops, one.bytes))
        yield ComputeSegment(sum(one.flops for one in works), sum(one.bytes for one in works), heaviest.label)


def _joined(segments: Iterable[Segment]) -> Iterator[Segment]:
    pending: list[ComputeSegment | CollectiveSegment] = []
    for segment in segments:
        match segment:
            case LoopSegment():
                yield from _joined_flat(pending)
                yield segment
                pending = []
            case _:
                pending.append(segment)
    yield from _joined_flat(pending)
