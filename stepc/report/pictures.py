"""Pictures of a program as HTML and SVG: its words, its course to scale, its memory. No script, no network."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import assert_never

from stepc._units import readable
from stepc.inspect.memory import Memory
from stepc.inspect.roofline import Device, duration
from stepc.inspect.timeline import CollectiveSegment, ComputeSegment, LoopSegment, Segment

# A loop is drawn turn by turn as long as that many bars can be told apart.
_MOST_BARS = 240
_LANES = {"work": 18, "exchange": 58}
_BAR, _BRACKET = 30, 104


def words(pipeline: str, separator: str) -> str:
    """The words of a pipeline as boxes, in the order in which they act."""
    boxes = [
        f'<span class="word {_role(word)}">{escape(word)}</span>' for word in reversed(_split(pipeline, separator))
    ]
    return f'<div class="words">{"<span class=arrow>→</span>".join(boxes)}</div>'


def _split(text: str, separator: str) -> list[str]:
    """Cut at separators that stand outside all brackets and quotes."""
    parts, depth, quote, start = [], 0, "", 0
    for at, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        elif depth == 0 and text.startswith(separator, at):
            parts.append(text[start:at])
            start = at + len(separator)
    return [part.strip() for part in (*parts, text[start:])]


def _role(word: str) -> str:
    """What a word is about, for its colour: where a mean is taken, or what ends the step."""
    name = word.partition("(")[0].partition("[")[0]
    if name == "mean":
        return "time" if "[time" in word else "space"
    known = {"accumulate": "time", "shard": "space", "rows": "space", "grad": "source", "update": "end"}
    return known.get(name, "plain")


@dataclass(frozen=True)
class _Bar:
    """One bar of the picture: where it stands, in seconds."""

    lane: str
    start: float
    seconds: float
    told: str


@dataclass(frozen=True)
class _Bracket:
    """The stretch of a loop, and where its turns begin."""

    start: float
    seconds: float
    turns: tuple[float, ...]
    told: str


def course(segments: Sequence[Segment] | None, device: Device) -> str:
    """One step from left to right, the widths to scale: the peaks of the device."""
    if segments is None:
        return '<p class="note">A loop does not say how often it turns, so the course of the step is not known.</p>'
    bars, brackets, end = _laid(segments, device)
    if not end:
        return '<p class="note">Nothing in this program takes time that is counted here.</p>'
    drawn = "".join((*_ticks(end), *(_rect(bar, end) for bar in bars), *(_bracket(one, end) for one in brackets)))
    legend = (
        '<span class="key work">work on one device</span><span class="key exchange">exchange between devices</span>'
    )
    note = (
        f"To the scale of the peaks of {escape(device.name)}: an estimate, in which nothing waits and links carry a "
        f"ring at full speed. {duration(end)} in all. Hold the pointer over a bar to read it."
    )
    return (
        f'<figure class="course"><svg role="img" aria-label="the course of one step" height="126">{drawn}</svg>'
        f'<figcaption>{legend}<span class="note">{note}</span></figcaption></figure>'
    )


def _laid(segments: Sequence[Segment], device: Device) -> tuple[list[_Bar], list[_Bracket], float]:
    bars: list[_Bar] = []
    brackets: list[_Bracket] = []
    now = until = 0.0
    for segment in segments:
        match segment:
            case LoopSegment(times, inner, label):
                start, begun = (now := max(now, until)), []
                turn_by_turn = times * len(inner) <= _MOST_BARS
                for turn in range(times if turn_by_turn else 1):
                    each = [one if turn_by_turn else _whole(one, times) for one in inner]
                    told = f"turn {turn + 1} of {times}" if turn_by_turn else f"all {times} turns together"
                    begun.append(now)
                    now = max(_flat(each, device, now, now, bars, f", {told}"))
                brackets.append(_Bracket(start, now - start, (*begun, now), f"{label} × {times}"))
            case ComputeSegment() | CollectiveSegment():
                now, until = _flat([segment], device, now, until, bars, "")
            case _:
                assert_never(segment)
    end = max((bar.start + bar.seconds for bar in bars), default=0.0)
    return bars, brackets, end


def _flat(
    segments: Sequence[ComputeSegment | CollectiveSegment],
    device: Device,
    now: float,
    until: float,
    bars: list[_Bar],
    where: str,
) -> tuple[float, float]:
    """Lay work and exchanges one after another: where the next begins, and until when an exchange runs beside it."""
    for segment in segments:
        seconds = segment.seconds(device)
        match segment:
            case ComputeSegment(flops, bytes_, label):
                told = f"{label}: {flops:,} flops, {readable(bytes_)} moved, {duration(seconds)}{where}"
                bars.append(_Bar("work", now, seconds, told))
                now = max(now + seconds, until)
            case CollectiveSegment(kind, wire, times, axes, beside, label):
                over = f" over {', '.join(axes)}" if axes else ""
                each = f"{readable(round(wire))} sent each time, {duration(seconds)}"
                bars.append(_Bar("exchange", now, seconds, f"{times} × {kind}{over}: {each}{where}; {label}"))
                until = max(until, now + seconds)
                now = now if beside else until
    return now, until


def _whole(segment: ComputeSegment | CollectiveSegment, times: int) -> ComputeSegment | CollectiveSegment:
    match segment:
        case ComputeSegment(flops, bytes_, label):
            return ComputeSegment(times * flops, times * bytes_, label)
        case CollectiveSegment(kind, wire, once, axes, beside, label):
            return CollectiveSegment(kind, wire, times * once, axes, beside, label)


def _rect(bar: _Bar, end: float) -> str:
    return (
        f'<rect class="{bar.lane}" x="{bar.start / end:.4%}" width="{bar.seconds / end:.4%}" y="{_LANES[bar.lane]}" '
        f'height="{_BAR}"><title>{escape(bar.told)}</title></rect>'
    )


def _bracket(one: _Bracket, end: float) -> str:
    start, width, stop = one.start / end, one.seconds / end, (one.start + one.seconds) / end
    ends = "".join(
        f'<line class="bracket" x1="{turn / end:.4%}" x2="{turn / end:.4%}" y1="{_BRACKET - 6}" y2="{_BRACKET}"/>'
        for turn in one.turns
    )
    middle = min(max(start + width / 2, 0.08), 0.92)
    return (
        f'<line class="bracket" x1="{start:.4%}" x2="{stop:.4%}" y1="{_BRACKET}" y2="{_BRACKET}"/>{ends}'
        f'<text x="{middle:.4%}" y="{_BRACKET + 16}" text-anchor="middle">{escape(one.told)}</text>'
    )


def _ticks(end: float) -> Iterator[str]:
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        anchor = "start" if share == 0 else "end" if share == 1 else "middle"
        yield f'<text class="tick" x="{share:.0%}" y="12" text-anchor="{anchor}">{duration(share * end)}</text>'
        yield f'<line class="tick" x1="{share:.0%}" x2="{share:.0%}" y1="16" y2="92"/>'


def memory(needs: Memory) -> str:
    """What a device holds at once, as one bar, and each part of it as a row."""
    parts = [part for part in _parts(needs) if part[2]]
    total = sum(bytes_ for _, _, bytes_ in parts) or 1
    bar = "".join(
        f'<span class="{kind}" style="flex-grow:{bytes_}" title="{escape(name)}: {readable(bytes_)}"></span>'
        for kind, name, bytes_ in parts
    )
    rows = "".join(
        f'<li><span class="swatch {kind}"></span>{escape(name)}<b>{readable(bytes_)}</b>'
        f"<i>{_share(bytes_ / total)}</i></li>"
        for kind, name, bytes_ in parts
    )
    return f'<div class="memory"><div class="bar">{bar}</div><ul>{rows}</ul></div>'


def _share(share: float) -> str:
    return "< 1%" if share < 0.01 else f"{share:.0%}"


def _parts(needs: Memory) -> Iterator[tuple[str, str, int]]:
    """Colour, name and bytes: arguments in cool colours, temporaries in warm ones."""
    colours = {"arguments": iter(("a1", "a2", "a3", "a4", "a5")), "temporaries": iter(("t1", "t2"))}
    for part in needs.parts:
        yield next(colours[part.of]), part.name, part.bytes
    told = {part.of for part in needs.parts}
    if "arguments" not in told:
        yield "a1", "arguments", needs.arguments
    if "temporaries" not in told:
        yield "t2", "temporaries", needs.temporaries
    yield "o1", "results that are not written over arguments", needs.outputs - needs.aliased
    yield "c1", "code", needs.code
