"""What changed between two compiled programs: collectives, memory, cost, donation."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

import jax

from stepc._text import aligned_table, readable_bytes
from stepc.inspect.collectives import Collective, Collectives, collectives
from stepc.inspect.cost import cost
from stepc.inspect.donation import aliases
from stepc.inspect.memory import memory


@runtime_checkable
class HasExecutable(Protocol):
    """Anything with an executable and the mesh it is for, such as `stepc.Compiled`."""

    @property
    def executable(self) -> jax.stages.Compiled: ...
    @property
    def mesh(self) -> jax.sharding.Mesh | None: ...


Program: TypeAlias = "jax.stages.Compiled | HasExecutable | str"


@dataclass(frozen=True)
class Change:
    """A number that changed; None where it is unknown."""

    of: str
    name: str
    before: int | None
    after: int | None

    def __str__(self) -> str:
        show = readable_bytes if self.of == "memory" or self.name == "bytes moved" else "{:,}".format
        before, after = ("unknown" if one is None else show(one) for one in (self.before, self.after))
        if self.before is None or self.after is None:
            return f"{before} -> {after}"
        by = self.after - self.before
        share = f", {by / self.before:+.1%}" if self.before else ""
        return f"{before} -> {after}  ({'+' if by > 0 else '-'}{show(abs(by))}{share})"


@dataclass(frozen=True)
class Diff:
    """What changed from one program to another. `print` shows it; it is false if nothing changed.

    Attributes:
      removed: the collectives that only the first program has.
      added: the collectives that only the second has. One whose bytes, axes, loops or executions changed is in both.
      changes: of memory, cost and donation.
    """

    removed: tuple[Collective, ...]
    added: tuple[Collective, ...]
    changes: tuple[Change, ...]

    def __bool__(self) -> bool:
        return bool(self.removed or self.added or self.changes)

    def __str__(self) -> str:
        return "\n".join(_lines(self)) if self else "nothing changed"


def diff(a: Program, b: Program) -> Diff:
    """Compare two compiled programs.

    Meaning: the multiset difference of their collectives, whatever lines they come from, and every number of
      `memory`, `cost` and `aliases` that differs.
    Why: shows what a change of the model, the mesh or the version of JAX did to the step.

    Args:
      a: what `jax.jit(f).lower(...).compile()` or `step.lower(...).compile()` returns, or HLO text.
      b: the program to compare with it. Text does not tell memory, so memory is compared only if neither is text.
    Errors: ValueError if a backend prints no HLO.
    Example:
      >>> program = jax.jit(lambda x: 2 * x).lower(1.0).compile()
      >>> print(diff(program, program))
      nothing changed

    Source: ours.
    """
    (first, rows_before), (second, rows_after) = map(_unwrapped, (a, b))
    before, after = _numbers(first), _numbers(second)
    changes = tuple(
        Change(of, name, before[of, name], after[of, name])
        for of, name in before
        if (of, name) in after and before[of, name] != after[of, name]
    )
    return Diff(_only_in(rows_before, rows_after), _only_in(rows_after, rows_before), changes)


def _unwrapped(program: Program) -> tuple[jax.stages.Compiled | str, Collectives]:
    if isinstance(program, HasExecutable):
        return program.executable, collectives(program.executable, program.mesh)
    return program, collectives(program)


def _numbers(program: jax.stages.Compiled | str) -> dict[tuple[str, str], int | None]:
    numbers: dict[tuple[str, str], int | None] = {}
    if not isinstance(program, str):
        needs = memory(program)
        for name in ("arguments", "outputs", "aliased", "temporaries", "code", "total"):
            numbers["memory", name] = {**needs.__dict__, "total": needs.total}[name]
    work = cost(program)
    numbers["cost", "flops"], numbers["cost", "bytes moved"] = work.flops, work.bytes
    numbers["donation", "results that reuse the buffer of an argument"] = len(aliases(program))
    return numbers


def _key(row: Collective) -> tuple[object, ...]:
    """What makes two collectives the same. Not the source line, which moves when anything above it changes."""
    return (row.kind, row.bytes, row.axes, row.executions, row.loops, row.conditional, row.asynchronous)


def _only_in(rows: Collectives, others: Collectives) -> tuple[Collective, ...]:
    unmatched, found = Counter(map(_key, others)), []
    for row in rows:
        if unmatched[_key(row)]:
            unmatched[_key(row)] -= 1
        else:
            found.append(row)
    return tuple(found)


def _lines(found: Diff) -> Iterator[str]:
    if found.removed or found.added:
        yield "collectives"
        yield from (f"  - {_line(row)}" for row in found.removed)
        yield from (f"  + {_line(row)}" for row in found.added)
    for of in dict.fromkeys(change.of for change in found.changes):
        yield of
        rows = [(change.name, str(change)) for change in found.changes if change.of == of]
        yield from (f"  {line}" for line in aligned_table(rows))


def _line(row: Collective) -> str:
    times = "? x" if row.executions is None else f"{row.executions} x"
    over = f" over {', '.join(row.axes)}" if row.axes else ""
    place = f" in {' > '.join(row.loops) or 'a loop'}" if row.in_loop else ""
    is_async = " (async)" if row.asynchronous else ""
    return f"{times} {row.kind}{is_async} of {readable_bytes(row.bytes)}{over}{place}: {row.source or 'unknown source'}"
