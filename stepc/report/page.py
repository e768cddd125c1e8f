"""The facts about a program as one page that needs no network: pictures, sortable tables, the HLO with search."""

import base64
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import TypeAlias

import jax

from stepc._text import few_rows, readable_bytes, readable_seconds
from stepc.errors import listed
from stepc.inspect.collectives import Collective
from stepc.inspect.roofline import Roofline, wire_bytes
from stepc.report import pictures
from stepc.report.facts import PlanFacts, ProgramFacts, check_facts
from stepc.report.text import UNKNOWN_TRIP_COUNT, donation

# At most this much compressed HLO goes into a page; base64 makes 4/3 of it, and the page stays under a megabyte.
_MAX_HLO_BYTES = 600_000
_LONGEST_TITLE = 50
_MOST = 200  # more leaves than that are grouped by the pattern of their paths

# What a cell shows, and the number or text that it sorts by.
Cell: TypeAlias = tuple[str, str | int | float]


def write(facts: ProgramFacts, path: str | Path) -> Path:
    """Write the page of a program to a file, and return its path. Errors: FieldTypeError for what are no facts."""
    file = Path(path)
    file.write_text(page(facts), encoding="utf-8")
    return file


def page(facts: ProgramFacts) -> str:
    """The whole page as one HTML file that loads nothing."""
    check_facts(facts)
    assets = files("stepc.report")
    style, script = (assets.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    named = list(_sections(facts))
    sections = "".join(f'<section id="{_anchor(title)}"><h2>{title}</h2>{body}</section>' for title, body in named)
    contents = "".join(f'<a href="#{_anchor(title)}">{title}</a>' for title in (*(title for title, _ in named), "HLO"))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(_short(facts.title))}</title><style>{style}</style></head>"
        f'<body class="stepc"><main>{_header(facts)}<nav aria-label="contents">{contents}</nav>{sections}'
        f"{_hlo(facts.hlo)}</main>"
        f"<script>{script}</script></body></html>"
    )


def fragment(facts: ProgramFacts) -> str:
    """The pictures and the collectives alone, without a script, for a notebook."""
    check_facts(facts)
    style = files("stepc.report").joinpath("page.css").read_text(encoding="utf-8")
    shown = ("The step", "One step, to scale", "Memory on one device", "Collectives")
    sections = "".join(
        f"<section><h2>{title}</h2>{body}</section>" for title, body in _sections(facts) if title in shown
    )
    return f'<div class="stepc"><style>{style}</style>{_cards(facts)}{sections}</div>'


def _anchor(title: str) -> str:
    return title.lower().replace(",", "").replace(" ", "-")


def _short(title: str) -> str:
    """The names of the transforms without their arguments, as much as a tab may show."""
    bare = title
    while bare != (bare := re.sub(r"\([^()]*\)", "", bare)):
        pass
    return bare if len(bare) <= _LONGEST_TITLE else f"{bare[: _LONGEST_TITLE - 1]}…"


def _header(facts: ProgramFacts) -> str:
    mesh = ", ".join(f"{axis}={size}" for axis, size in facts.mesh)
    return (
        f'<header><p class="brand">stepc</p><h1><code>{escape(facts.title)}</code></h1>'
        f'<p class="note">for {escape(facts.kind)}; {f"mesh {escape(mesh)}" if mesh else "no mesh"}; '
        f"jax {jax.__version__}</p></header>{_cards(facts)}"
    )


def _cards(facts: ProgramFacts) -> str:
    rows = facts.collectives
    counts = [row.executions for row in rows]
    executed = "unknown" if None in counts else str(sum(count or 0 for count in counts))
    in_loops = f"{len(rows.in_loops)} of {len(rows)} in a loop" if len(rows) else "none in the program"
    sent = "unknown" if None in counts else readable_bytes(rows.executed_bytes)
    best = next((one for one in facts.rooflines if one.device == facts.device), None)
    time = "unknown" if best is None else readable_seconds(best.overlapped_seconds)
    temporaries = readable_bytes(facts.memory.temporaries)
    cards = (
        ("collectives per step", executed, in_loops),
        ("collective bytes per step", sent, "bytes × executions"),
        ("memory on one device", readable_bytes(facts.memory.total), f"including {temporaries} of temporaries"),
        ("matrix products", _flops(facts.cost.flops), "flops on one device"),
        ("step time, at least", time, f"estimated from the peaks of {facts.device.name}"),
    )
    shown = (f"<div><span>{name}</span><b>{value}</b><i>{note}</i></div>" for name, value, note in cards)
    return f'<div class="cards">{"".join(shown)}</div>'


def _flops(flops: int | None) -> str:
    if flops is None:
        return "unknown"
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if flops >= size:
            return f"{flops / size:.3g} {unit}"
    return str(flops)


def _sections(facts: ProgramFacts) -> Iterator[tuple[str, str]]:
    if facts.plan is not None:
        yield "The step", _step(facts.plan)
    yield "One step, to scale", pictures.timeline(facts.segments, facts.device)
    yield "Memory on one device", pictures.memory(facts.memory)
    yield "Collectives", _collectives(facts.collectives)
    yield "Least time of one step, by device", _rooflines(facts.rooflines)
    if facts.plan is not None and facts.plan.laws:
        yield "Laws", _laws(facts.plan)
    if facts.plan is not None:
        yield "Plan", f"<pre>{escape(facts.plan.text)}</pre>"
    yield "Donation", _donation(facts)


def _step(plan: PlanFacts) -> str:
    count = len(plan.laws)
    laws = f", after {count} law{'s' if count > 1 else ''}" if count else "; no law applies"
    return (
        '<p class="note">the pipeline as written, in the order in which its transforms act</p>'
        f"{pictures.transforms(plan.pipeline, ' @ ')}"
        f'<p class="note">the program as it runs{laws}</p>{pictures.transforms(plan.normal, " . ")}'
    )


def _collectives(rows: Sequence[Collective]) -> str:
    if not rows:
        return '<p class="note">No collectives: nothing is sent between devices.</p>'
    head = ("kind", "size", "sent in a ring", "axes", "executions", "in loop", "overlaps with", "source", "parameters")
    each = _table(head, map(_collective, rows))
    groups: dict[tuple[str, ...], list[Collective]] = {}
    for row in rows:
        shown = [text for text, _ in _collective(row)]
        groups.setdefault((row.kind, *shown[3:-1]), []).append(row)
    if len(groups) == len(rows):
        return each
    head = ("number", "kind", "sizes", "sent in a ring", "axes", "executions of each", *head[5:])
    table = _table(head, (_alike(rows) for rows in groups.values()))
    return f"{table}<details><summary>each of the {len(rows)} collectives</summary>{each}</details>"


def _alike(rows: Sequence[Collective]) -> tuple[Cell, ...]:
    """Collectives that differ only in size: a transform asks for one of each leaf."""
    kind, *_, axes, executions, loops, overlap, source, _ = _collective(rows[0])
    smallest, largest = min(row.bytes for row in rows), max(row.bytes for row in rows)
    sizes = readable_bytes(largest)
    if smallest < largest:
        sizes = f"{readable_bytes(smallest)} to {sizes}"
    sent = sum(map(wire_bytes, rows))
    return (
        (f"{len(rows)} ×", len(rows)),
        kind,
        (sizes, largest),
        (readable_bytes(round(sent)), sent),
        axes,
        executions,
        loops,
        overlap,
        source,
        _text(listed(dict.fromkeys(row.parameters for row in rows if row.parameters)) or "–"),
    )


def _collective(row: Collective) -> tuple[Cell, ...]:
    executions = "unknown" if row.executions is None else str(row.executions)
    overlap = "synchronous" if not row.asynchronous else "unknown" if row.overlap is None else str(row.overlap)
    sent = wire_bytes(row)
    return (
        (row.kind, row.kind),
        (readable_bytes(row.bytes), row.bytes),
        (readable_bytes(round(sent)), sent),
        (", ".join(row.axes) or "–", ", ".join(row.axes)),
        (f"at most {executions}" if row.conditional else executions, row.executions or 0),
        (" > ".join(row.loops) or ("yes" if row.in_loop else "no"), len(row.loops)),
        (overlap, overlap),
        (row.source or "–", row.source),
        (row.parameters or "–", row.parameters),
    )


def _rooflines(rooflines: Sequence[Roofline]) -> str:
    if not rooflines:
        return f'<p class="note">{UNKNOWN_TRIP_COUNT}</p>'
    head = (
        "device", "compute", "memory", "collectives", "overlapped", "exposed", "bound by", "share of its memory",
        "source",
    )  # fmt: skip
    note = (
        '<p class="note">Estimated from the peaks in data sheets, which no program reaches, and without latency. '
        "“Overlapped” is the longest of the three; “exposed” hides no collective behind compute.</p>"
    )
    return _table(head, map(_roofline, rooflines)) + note


def _roofline(one: Roofline) -> tuple[Cell, ...]:
    times = (
        one.compute_seconds, one.memory_seconds, one.collective_seconds, one.overlapped_seconds, one.exposed_seconds,
    )  # fmt: skip
    share = one.total_bytes / one.device.memory_bytes
    return (
        _text(one.device.name),
        *((readable_seconds(seconds), seconds) for seconds in times),
        _text(one.bound),
        (f"{share:.1%}" if one.fits else f"{share:.1%}: does not fit", share),
        _text(one.device.source),
    )


def _laws(plan: PlanFacts) -> str:
    head = ("law", "formula", "before", "after", "reason", "holds for")
    rows = ((law.name, law.formula, law.before, law.after, law.reason, law.condition) for law in plan.laws)
    return _table(head, (tuple(map(_text, row)) for row in rows), wraps=True)


def _donation(facts: ProgramFacts) -> str:
    note = f'<p class="note">{escape(donation(facts))}</p>'
    if not facts.donated:
        return note
    planned = {} if facts.plan is None else {leaf.path: leaf for leaf in facts.plan.leaves}
    rows: list[tuple[str, ...]] = []
    for leaf in facts.donated:
        known = planned.get(leaf.path)
        bytes_, *rest = (f"{known.bytes:,}", known.type, known.sharding) if known else ("–", "–", "–")
        rows.append((leaf.path, bytes_, *rest, "yes" if leaf.donated else "no", "yes" if leaf.aliased else "no"))
    cells = [
        [_text(path), (size, _number(size)), *map(_text, rest)] for path, size, *rest in few_rows(rows, most=_MOST)
    ]
    table = _table(("leaf", "bytes", "type", "sharding", "donated", "aliased"), cells)
    return f"{note}<details><summary>{len(rows)} leaves</summary>{table}</details>"


def _number(shown: str) -> int:
    """The number that such a cell sorts by."""
    return int(shown.replace(",", "")) if shown[:1].isdigit() else 0


def _text(shown: str) -> Cell:
    return shown, shown


def _table(head: Sequence[str], rows: Iterable[Sequence[Cell]], *, wraps: bool = False) -> str:
    titles = "".join(f'<th scope="col"><button type="button">{title}</button></th>' for title in head)
    body = "".join(
        "<tr>" + "".join(f'<td data-by="{escape(str(by))}">{escape(shown)}</td>' for shown, by in row) + "</tr>"
        for row in rows
    )
    kind = ' class="wraps"' if wraps else ""
    return f'<div class="scroll"><table{kind}><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>'


def _hlo(text: str) -> str:
    """The text, compressed; the script unpacks it in the browser. A note says what was cut to fit."""
    kept, note = text, ""
    while len(packed := zlib.compress(kept.encode(), 9)) > _MAX_HLO_BYTES:
        kept = kept[: len(kept) * 4 // 5]
        note = f"The first {len(kept):,} of {len(text):,} characters: the rest would make the page too large."
    data = base64.b64encode(packed).decode()
    return (
        '<section id="hlo"><h2>HLO</h2><p class="tools"><input type="search" placeholder="search the HLO" '
        'aria-label="search the HLO"><button type="button" data-do="open">expand all</button>'
        '<button type="button" data-do="close">collapse all</button><label><input type="checkbox"> metadata</label>'
        f'<span class="note" id="found"></span></p><p class="note">{note}</p>'
        "<noscript>This part needs JavaScript.</noscript>"
        f'<div id="program"></div><script type="application/octet-stream" id="packed">{data}</script></section>'
    )
