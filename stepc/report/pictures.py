"""Pictures of a program as HTML and SVG: its transforms, its timeline to scale, its memory. No script, no network."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import assert_never

from stepc._text import readable_bytes, readable_seconds, split_outside_brackets
from stepc.inspect.memory import Memory
from stepc.inspect.roofline import Device
from stepc.inspect.timeline import CollectiveSegment, ComputeSegment, FlatSegment, LoopSegment, Segment
from stepc.report.text import memory_parts


def transforms(pipeline: str, separator: str) -> str:
    """The transforms of a pipeline as boxes, in the order in which they act."""
    boxes = [
        f'<span class="transform {_role(transform.strip())}">{escape(transform.strip())}</span>'
        for transform in reversed(split_outside_brackets(pipeline, separator))
    ]
    return f'<div class="pipeline">{"<span class=arrow>→</span>".join(boxes)}</div>'


def _role(transform: str) -> str:
    """What a transform or core node is about, for its colour: `mean[scan 4]`, like `accumulate(4)`, is a scan."""
    if mean := re.match(r"mean\[(\w+)", transform):
        return mean[1]
    known = {"accumulate": "scan", "shard": "mesh", "rows": "vmap", "grad": "source", "update": "end"}
    return known.get(transform.partition("(")[0], "plain")


# A loop with at most this many bars is drawn iteration by iteration; more would be too thin to see.
_MAX_BARS = 240
_LANES = {"compute": 18, "collective": 58}
_BAR_HEIGHT, _BRACKET_Y = 30, 104


@dataclass(frozen=True)
class _Bar:
    """One bar of the timeline; its position is in seconds."""

    lane: str
    start: float
    seconds: float
    tooltip: str


@dataclass(frozen=True)
class _Bracket:
    """The extent of a loop, and where its iterations begin and end."""

    start: float
    seconds: float
    ticks: tuple[float, ...]
    label: str


def timeline(segments: Sequence[Segment] | None, device: Device) -> str:
    """One step from left to right; widths are to scale at the peaks of the device."""
    if segments is None:
        return '<p class="note">The timeline is unknown: a loop has no known trip count.</p>'
    bars, brackets, end = _layout(segments, device)
    if not end:
        return '<p class="note">The estimate counts none of the work in this program.</p>'
    drawn = "".join((*_axis(end), *(_rect(bar, end) for bar in bars), *(_bracket(one, end) for one in brackets)))
    legend = (
        '<span class="key compute">compute on one device</span>'
        '<span class="key collective">communication between devices</span>'
    )
    note = (
        f"Widths are to scale at the peaks of {escape(device.name)}: an estimate without latency, in which each "
        f"collective is a ring at full link speed. {readable_seconds(end)} in total. Hover over a bar for details."
    )
    return (
        f'<figure class="timeline"><svg role="img" aria-label="timeline of one step" height="126">{drawn}</svg>'
        f'<figcaption>{legend}<span class="note">{note}</span></figcaption></figure>'
    )


def _layout(segments: Sequence[Segment], device: Device) -> tuple[list[_Bar], list[_Bracket], float]:
    bars: list[_Bar] = []
    brackets: list[_Bracket] = []
    now = busy_until = 0.0
    for segment in segments:
        match segment:
            case LoopSegment(trip_count, inner, label):
                start = now = max(now, busy_until)
                ticks = []
                is_unrolled = trip_count * len(inner) <= _MAX_BARS
                for iteration in range(trip_count if is_unrolled else 1):
                    shown = inner if is_unrolled else [one.repeated(trip_count) for one in inner]
                    where = f"iteration {iteration + 1} of {trip_count}" if is_unrolled else f"{trip_count} iterations"
                    ticks.append(now)
                    now = max(_place(shown, device, now, now, bars, f", {where}"))
                brackets.append(_Bracket(start, now - start, (*ticks, now), f"{label} × {trip_count}"))
            case ComputeSegment() | CollectiveSegment():
                now, busy_until = _place([segment], device, now, busy_until, bars, "")
            case _:
                assert_never(segment)
    end = max((bar.start + bar.seconds for bar in bars), default=0.0)
    return bars, brackets, end


def _place(
    segments: Sequence[FlatSegment], device: Device, now: float, busy_until: float, bars: list[_Bar], where: str
) -> tuple[float, float]:
    """Append the bars of consecutive segments; return where the next begins, and when the last collective ends."""
    for segment in segments:
        seconds = segment.seconds(device)
        match segment:
            case ComputeSegment(flops, bytes_, label):
                sizes = f"{flops:,} flops, {readable_bytes(bytes_)} moved, {readable_seconds(seconds)}"
                bars.append(_Bar("compute", now, seconds, f"{label}: {sizes}{where}"))
                now = max(now + seconds, busy_until)
            case CollectiveSegment(kind, wire, executions, axes, overlapped, label):
                over = f" over {', '.join(axes)}" if axes else ""
                sizes = f"{readable_bytes(round(wire))} sent each time, {readable_seconds(seconds)}"
                tooltip = f"{executions} × {kind}{over}: {sizes}{where}; {label}"
                bars.append(_Bar("collective", now, seconds, tooltip))
                busy_until = max(busy_until, now + seconds)
                now = now if overlapped else busy_until
            case _:
                assert_never(segment)
    return now, busy_until


def _rect(bar: _Bar, end: float) -> str:
    return (
        f'<rect class="{bar.lane}" x="{bar.start / end:.4%}" width="{bar.seconds / end:.4%}" y="{_LANES[bar.lane]}" '
        f'height="{_BAR_HEIGHT}"><title>{escape(bar.tooltip)}</title></rect>'
    )


def _bracket(one: _Bracket, end: float) -> str:
    start, width, stop = one.start / end, one.seconds / end, (one.start + one.seconds) / end
    y = _BRACKET_Y
    ticks = "".join(
        f'<line class="bracket" x1="{tick / end:.4%}" x2="{tick / end:.4%}" y1="{y - 6}" y2="{y}"/>'
        for tick in one.ticks
    )
    middle = min(max(start + width / 2, 0.08), 0.92)
    return (
        f'<line class="bracket" x1="{start:.4%}" x2="{stop:.4%}" y1="{y}" y2="{y}"/>{ticks}'
        f'<text x="{middle:.4%}" y="{y + 16}" text-anchor="middle">{escape(one.label)}</text>'
    )


def _axis(end: float) -> Iterator[str]:
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        anchor = "start" if share == 0 else "end" if share == 1 else "middle"
        time = readable_seconds(share * end)
        yield f'<text class="tick" x="{share:.0%}" y="12" text-anchor="{anchor}">{time}</text>'
        yield f'<line class="tick" x1="{share:.0%}" x2="{share:.0%}" y1="16" y2="92"/>'


def memory(needs: Memory) -> str:
    """What a device holds at once: one bar, and one row for each part of it."""
    parts = [part for part in _memory_parts(needs) if part[2]]
    total = sum(bytes_ for _, _, bytes_ in parts) or 1
    bar = "".join(
        f'<span class="{colour}" style="flex-grow:{bytes_}" title="{escape(name)}: {readable_bytes(bytes_)}"></span>'
        for colour, name, bytes_ in parts
    )
    rows = "".join(
        f'<li><span class="swatch {colour}"></span>{escape(name)}<b>{readable_bytes(bytes_)}</b>'
        f"<i>{'< 1%' if bytes_ / total < 0.01 else f'{bytes_ / total:.0%}'}</i></li>"
        for colour, name, bytes_ in parts
    )
    return f'<div class="memory"><div class="bar">{bar}</div><ul>{rows}</ul></div>'


def _memory_parts(needs: Memory) -> Iterator[tuple[str, str, int]]:
    """Colour, name and bytes: arguments in cool colours, temporaries in warm ones."""
    colours = {"arguments": iter(("a1", "a2", "a3", "a4", "a5")), "temporaries": iter(("t1", "t2"))}
    for part in memory_parts(needs):
        yield next(colours[part.of]), part.name, part.bytes
    yield "o1", "results not aliased with arguments", needs.outputs - needs.aliased
    yield "c1", "code", needs.code
