"""What is known of a program, in colours on a terminal; the only file here that needs rich."""

from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from stepc._units import readable
from stepc.inspect.memory import Memory
from stepc.inspect.roofline import duration
from stepc.report.known import ProgramFacts
from stepc.report.text import donation

_COLOURS = {"arguments": "blue", "temporaries": "yellow"}


def show(known: ProgramFacts, terminal: Console | None = None) -> None:
    """Print all that is known.

    Args:
      terminal: where to write; standard output by default.
    """
    console = Console() if terminal is None else terminal
    console.print(Text(known.title, style="bold"))
    if known.plan is not None:
        _plan(console, known)
    _head(console, "collectives")
    console.print(_collectives(known) if len(known.collectives) else Text("no value leaves its device"))
    _head(console, "memory on one device")
    console.print(_memory(known.memory, width=max(console.width - 48, 10)))
    _head(console, "least time of one step, estimated from peaks")
    console.print(_rooflines(known) if known.rooflines else Text("unknown: a loop does not say how often it turns"))
    _head(console, "donation")
    console.print(Text(donation(known) if known.donated else "not known: jax dropped arguments that are not used"))


def _head(console: Console, title: str) -> None:
    console.print()
    console.print(Rule(Text(title, style="bold blue"), align="left", style="dim"))


def _plan(console: Console, known: ProgramFacts) -> None:
    plan = known.plan
    if plan is None:
        return
    if plan.laws:
        _head(console, "laws")
        for one in plan.laws:
            console.print(Text.assemble((one.name, "bold green"), f"  {one.formula}"))
            console.print(Text(f"  {one.before}", style="dim"))
            console.print(Text(f"  {one.after}"))
            console.print(Text(f"  {one.reason}; holds for {one.condition}", style="italic"))
    _head(console, "plan")
    console.print(Text(plan.text))


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in titles:
        table.add_column(title, overflow="fold")
    return table


def _collectives(known: ProgramFacts) -> Table:
    table = _table("kind", "size", "axes", "executions", "in loop", "meanwhile", "source")
    for row in known.collectives:
        table.add_row(
            Text(row.kind, style="yellow" if row.in_loop else ""),
            readable(row.bytes),
            ", ".join(row.axes) or "-",
            "unknown" if row.executions is None else str(row.executions),
            Text(" > ".join(row.loops) or ("yes" if row.in_loop else "no")),
            str(row.between) if row.between is not None else "waits" if not row.asynchronous else "not known",
            Text(row.source or "-"),
        )
    return table


def _memory(needs: Memory, *, width: int) -> Table:
    """Each part as a bar, the widest the whole."""
    table = _table("", "", "")
    parts = [(part.name, part.bytes, _COLOURS[part.of]) for part in needs.parts]
    told = {part.of for part in needs.parts}
    parts += [] if "arguments" in told else [("arguments", needs.arguments, "blue")]
    parts += [] if "temporaries" in told else [("temporaries", needs.temporaries, "yellow")]
    parts += [("results beside them", needs.outputs - needs.aliased, "magenta"), ("code", needs.code, "white")]
    for name, bytes_, colour in parts:
        cells = round(width * bytes_ / needs.total) if needs.total else 0
        table.add_row(name, readable(bytes_), Text("█" * cells or ("▏" if bytes_ else ""), style=colour))
    table.add_row(Text("total", style="bold"), Text(readable(needs.total), style="bold"), "")
    return table


def _rooflines(known: ProgramFacts) -> Table:
    table = _table("device", "compute", "memory", "links", "overlapped", "exposed", "bound by", "its memory")
    for one in known.rooflines:
        share = f"{one.total_bytes / one.device.memory_bytes:.1%}"
        table.add_row(
            Text(one.device.name, style="bold" if one.device == known.device else ""),
            *(duration(seconds) for seconds in (one.compute_seconds, one.memory_seconds, one.exchange_seconds)),
            duration(one.overlapped_seconds),
            duration(one.exposed_seconds),
            one.bound,
            share if one.fits else Text(f"{share}: does not fit", style="bold red"),
        )
    return table
