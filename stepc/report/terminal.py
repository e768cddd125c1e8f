"""The facts about a program in colours on a terminal. The only file of this folder that needs rich."""

from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from stepc._text import readable_bytes, readable_seconds
from stepc.inspect.memory import Memory
from stepc.report.facts import PlanFacts, ProgramFacts
from stepc.report.text import UNKNOWN_TRIP_COUNT, donation, memory_parts

_COLOURS = {"arguments": "blue", "temporaries": "yellow"}


def show(facts: ProgramFacts, terminal: Console | None = None) -> None:
    """Print everything that is known about a program.

    Args:
      terminal: where to print; standard output by default.
    """
    console = Console() if terminal is None else terminal
    console.print(Text(facts.title, style="bold"))
    if facts.plan is not None:
        _plan(console, facts.plan)
    _heading(console, "collectives")
    console.print(_collectives(facts) if len(facts.collectives) else Text("no collectives"))
    _heading(console, "memory on one device")
    console.print(_memory(facts.memory, width=max(console.width - 48, 10)))
    _heading(console, "least time of one step, estimated from device peaks")
    console.print(_rooflines(facts) if facts.rooflines else Text(UNKNOWN_TRIP_COUNT))
    _heading(console, "donation")
    console.print(Text(donation(facts)))


def _heading(console: Console, title: str) -> None:
    console.print()
    console.print(Rule(Text(title, style="bold blue"), align="left", style="dim"))


def _plan(console: Console, plan: PlanFacts) -> None:
    if plan.laws:
        _heading(console, "laws")
        for law in plan.laws:
            console.print(Text.assemble((law.name, "bold green"), f"  {law.formula}"))
            console.print(Text(f"  {law.before}", style="dim"))
            console.print(Text(f"  {law.after}"))
            console.print(Text(f"  {law.reason}; holds for {law.condition}", style="italic"))
    _heading(console, "plan")
    console.print(Text(plan.text))


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in titles:
        table.add_column(title, overflow="fold")
    return table


def _collectives(facts: ProgramFacts) -> Table:
    table = _table("kind", "size", "axes", "executions", "in loop", "overlaps with", "source")
    for row in facts.collectives:
        overlap = "unknown" if row.overlap is None else str(row.overlap)
        table.add_row(
            Text(row.kind, style="yellow" if row.in_loop else ""),
            readable_bytes(row.bytes),
            ", ".join(row.axes) or "-",
            "unknown" if row.executions is None else str(row.executions),
            Text(" > ".join(row.loops) or ("yes" if row.in_loop else "no")),
            overlap if row.asynchronous else "synchronous",
            Text(row.source or "-"),
        )
    return table


def _memory(needs: Memory, *, width: int) -> Table:
    """Each part as a bar; the total would fill `width`."""
    table = _table("", "", "")
    parts = [(part.name, part.bytes, _COLOURS[part.of]) for part in memory_parts(needs)]
    parts += [("results not aliased", needs.outputs - needs.aliased, "magenta"), ("code", needs.code, "white")]
    for name, bytes_, colour in parts:
        cells = round(width * bytes_ / needs.total) if needs.total else 0
        table.add_row(name, readable_bytes(bytes_), Text("█" * cells or ("▏" if bytes_ else ""), style=colour))
    table.add_row(Text("total", style="bold"), Text(readable_bytes(needs.total), style="bold"), "")
    return table


def _rooflines(facts: ProgramFacts) -> Table:
    table = _table("device", "compute", "memory", "collectives", "overlapped", "exposed", "bound by", "its memory")
    for one in facts.rooflines:
        share = f"{one.total_bytes / one.device.memory_bytes:.1%}"
        table.add_row(
            Text(one.device.name, style="bold" if one.device == facts.device else ""),
            *map(readable_seconds, (one.compute_seconds, one.memory_seconds, one.collective_seconds)),
            readable_seconds(one.overlapped_seconds),
            readable_seconds(one.exposed_seconds),
            one.bound,
            share if one.fits else Text(f"{share}: does not fit", style="bold red"),
        )
    return table
