"""What is known of a program, as one page that needs no network: pictures, tables that sort, the HLO with search."""

import base64
import zlib
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import TypeAlias

import jax

from stepc._core.nodes import show
from stepc._units import readable
from stepc.inspect.collectives import Collective
from stepc.inspect.roofline import Roofline, duration, wire_bytes
from stepc.report import pictures
from stepc.report.known import ProgramFacts
from stepc.report.text import donation

# So much of the compressed HLO goes into the page, as text of 4/3 that size: the page stays under a megabyte.
_MOST_HLO_BYTES = 600_000

# A cell is what is shown, and the number or text that it sorts by.
Cell: TypeAlias = tuple[str, str | int | float]


def write(known: ProgramFacts, path: str | Path) -> Path:
    """Write the page of a program to a file, and return where."""
    place = Path(path)
    place.write_text(page(known), encoding="utf-8")
    return place


def page(known: ProgramFacts) -> str:
    """The whole page, in one file: no network is asked for anything."""
    assets = files("stepc.report")
    style, script = (assets.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    sections = "".join(f"<section><h2>{title}</h2>{body}</section>" for title, body in _sections(known))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(known.title)}</title><style>{style}</style></head>"
        f'<body class="stepc"><main>{_head(known)}{sections}{_hlo(known.hlo)}</main>'
        f"<script>{script}</script></body></html>"
    )


def fragment(known: ProgramFacts) -> str:
    """The pictures and the tables alone, for a notebook."""
    style = files("stepc.report").joinpath("page.css").read_text(encoding="utf-8")
    shown = ("The step", "One step, to scale", "Memory on one device", "Collectives")
    sections = "".join(
        f"<section><h2>{title}</h2>{body}</section>" for title, body in _sections(known) if title in shown
    )
    return f'<div class="stepc"><style>{style}</style>{_cards(known)}{sections}</div>'


def _head(known: ProgramFacts) -> str:
    mesh = ", ".join(f"{axis}={size}" for axis, size in known.mesh) or "a single device, or a mesh that is not known"
    return (
        f'<header><p class="brand">stepc</p><h1><code>{escape(known.title)}</code></h1>'
        f'<p class="note">for {escape(known.kind)}; mesh {escape(mesh)}; jax {jax.__version__}</p></header>'
        f"{_cards(known)}"
    )


def _cards(known: ProgramFacts) -> str:
    rows = known.collectives
    counts = [row.executions for row in rows]
    executed = "unknown" if None in counts else str(sum(count or 0 for count in counts))
    best = next((one for one in known.rooflines if one.device == known.device), None)
    cards = [
        (
            "collectives a step",
            executed,
            f"{len(rows.in_loops)} of {len(rows)} in a loop" if len(rows) else "none at all",
        ),
        ("sent in full a step", "unknown" if None in counts else readable(rows.executed_bytes), "bytes × executions"),
        ("memory on one device", readable(known.memory.total), f"{readable(known.memory.temporaries)} of it temporary"),
        ("matrix products", _flops(known.cost.flops), "flops on one device"),
        (
            "at least",
            "unknown" if best is None else duration(best.overlapped_seconds),
            f"on {known.device.name}, an estimate",
        ),
    ]
    shown = (f"<div><span>{name}</span><b>{value}</b><i>{note}</i></div>" for name, value, note in cards)
    return f'<div class="cards">{"".join(shown)}</div>'


def _flops(flops: int | None) -> str:
    if flops is None:
        return "unknown"
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if flops >= size:
            return f"{flops / size:.3g} {unit}"
    return str(flops)


def _sections(known: ProgramFacts) -> Iterator[tuple[str, str]]:
    if known.plan is not None:
        yield "The step", _step(known)
    yield "One step, to scale", pictures.course(known.segments, known.device)
    yield "Memory on one device", pictures.memory(known.memory)
    yield "Collectives", _collectives(known.collectives)
    yield "Least time on named devices", _rooflines(known)
    if known.plan is not None and known.plan.laws:
        yield "Laws", _laws(known)
    if known.plan is not None:
        yield "Plan", f"<pre>{escape(str(known.plan))}</pre>"
    yield "Donation", _donation(known)


def _step(known: ProgramFacts) -> str:
    plan = known.plan
    if plan is None:
        return ""
    many = len(plan.laws)
    after = "no law applies" if not many else f"after {many} law{'s' if many > 1 else ''}"
    return (
        f'<p class="note">as written, in the order in which the words act</p>{pictures.words(plan.pipeline, " @ ")}'
        f'<p class="note">as it runs: {after}</p>{pictures.words(show(plan.normal), " . ")}'
    )


def _collectives(rows: Sequence[Collective]) -> str:
    if not rows:
        return '<p class="note">No value leaves its device.</p>'
    head = ("kind", "size", "sent in a ring", "axes", "executions", "in loop", "meanwhile", "source")
    return _table(head, (_collective(row) for row in rows))


def _collective(row: Collective) -> tuple[Cell, ...]:
    executions = "unknown" if row.executions is None else str(row.executions)
    meanwhile = "waits" if not row.asynchronous else "not known" if row.between is None else str(row.between)
    sent = wire_bytes(row)
    return (
        (row.kind, row.kind),
        (readable(row.bytes), row.bytes),
        (readable(round(sent)), sent),
        (", ".join(row.axes) or "–", ", ".join(row.axes)),
        (f"at most {executions}" if row.conditional else executions, row.executions or 0),
        (" > ".join(row.loops) or ("yes" if row.in_loop else "no"), len(row.loops)),
        (meanwhile, meanwhile),
        (row.source or "–", row.source),
    )


def _rooflines(known: ProgramFacts) -> str:
    if not known.rooflines:
        return '<p class="note">Unknown: a loop does not say how often it turns.</p>'
    head = (
        "device",
        "compute",
        "memory",
        "links",
        "overlapped",
        "exposed",
        "bound by",
        "share of its memory",
        "source",
    )
    note = (
        '<p class="note">Estimates from the peaks of data sheets: no program reaches them, and latency is not in them. '
        "“Overlapped” is the longest of the three; “exposed” is as if nothing ran beside an exchange.</p>"
    )
    return _table(head, map(_roofline, known.rooflines)) + note


def _roofline(one: Roofline) -> tuple[Cell, ...]:
    times = (one.compute_seconds, one.memory_seconds, one.exchange_seconds, one.overlapped_seconds, one.exposed_seconds)
    share = one.total_bytes / one.device.memory_bytes
    return (
        (one.device.name, one.device.name),
        *((duration(seconds), seconds) for seconds in times),
        (one.bound, one.bound),
        (f"{share:.1%}" if one.fits else f"{share:.1%}: does not fit", share),
        (one.device.source, one.device.source),
    )


def _laws(known: ProgramFacts) -> str:
    head = ("law", "formula", "before", "after", "reason", "holds for")
    laws = known.plan.laws if known.plan is not None else ()
    rows = (
        (one.law.name, one.law.formula, show(one.before), show(one.after), one.law.reason, one.law.condition)
        for one in laws
    )
    return _table(head, (tuple((cell, cell) for cell in row) for row in rows), wraps=True)


def _donation(known: ProgramFacts) -> str:
    told = (
        f'<p class="note">{escape(donation(known))}.</p>'
        if known.donated
        else ('<p class="note">jax dropped arguments that are not used, so its leaves cannot be told apart.</p>')
    )
    places = {} if known.plan is None else {leaf.path: leaf for leaf in known.plan.leaves}
    rows = []
    for leaf in known.donated:
        place = places.get(leaf.path)
        size = (f"{place.bytes_:,}", place.bytes_) if place else ("–", 0)
        shape = f"{place.dtype}{list(place.shape)}" if place else "–"
        yes_no = ("yes" if leaf.donated else "no"), ("yes" if leaf.aliased else "no")
        cells = (leaf.path, shape, place.sharding if place else "–", *yes_no)
        rows.append(((cells[0], cells[0]), size, *((cell, cell) for cell in cells[1:])))
    head = ("leaf", "bytes", "type", "lies", "donated", "written over")
    return told + (f"<details><summary>{len(rows)} leaves</summary>{_table(head, rows)}</details>" if rows else "")


def _table(head: Sequence[str], rows: Iterable[Sequence[Cell]], *, wraps: bool = False) -> str:
    titles = "".join(f'<th scope="col"><button type="button">{title}</button></th>' for title in head)
    body = "".join(
        "<tr>" + "".join(f'<td data-by="{escape(str(by))}">{escape(shown)}</td>' for shown, by in row) + "</tr>"
        for row in rows
    )
    kind = ' class="wraps"' if wraps else ""
    return f'<div class="scroll"><table{kind}><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>'


def _hlo(text: str) -> str:
    """The text, compressed: the script unpacks it where it is looked at. What does not fit is left out, and said so."""
    kept, note = text, ""
    while len(packed := zlib.compress(kept.encode(), 9)) > _MOST_HLO_BYTES:
        kept = kept[: len(kept) * 4 // 5]
        note = f"The first {len(kept):,} of {len(text):,} characters: the rest would make the page too large."
    data = base64.b64encode(packed).decode()
    return (
        '<section id="hlo"><h2>HLO</h2><p class="tools"><input type="search" placeholder="search the program" '
        'aria-label="search the program"><button type="button" data-do="open">unfold all</button>'
        '<button type="button" data-do="close">fold all</button><label><input type="checkbox"> metadata</label>'
        f'<span class="note" id="found"></span></p><p class="note">{note}</p>'
        "<noscript>This part needs JavaScript.</noscript>"
        f'<div id="program"></div><script type="application/octet-stream" id="packed">{data}</script></section>'
    )
