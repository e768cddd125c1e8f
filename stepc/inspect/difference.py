"""What changed between two compiled programs: collectives, memory, work, donation; it blames neither."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

import jax

from stepc._units import readable
from stepc.inspect.collectives import Collective, collectives
from stepc.inspect.donation import aliases
from stepc.inspect.memory import cost, memory


@runtime_checkable
class Wrapped(Protocol):
    """Anything that holds an executable and the mesh it is for, such as `stepc.Compiled`."""

    @property
    def executable(self) -> jax.stages.Compiled: ...
    @property
    def mesh(self) -> jax.sharding.Mesh | None: ...


Program: TypeAlias = "jax.stages.Compiled | Wrapped | str"


@dataclass(frozen=True)
class Change:
    """One number that is another one now; None where it is unknown."""

    of: str
    name: str
    before: int | None
    after: int | None

    def __str__(self) -> str:
        show = readable if self.of == "memory" or self.name == "bytes moved" else "{:,}".format
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
      added: those that only the second has. A collective whose bytes, axes, loops or turns changed is in both.
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

    Meaning: the multiset difference of their collectives, without the lines they came from, and every number of
      `memory`, `cost` and `aliases` that is not equal.
    Why: what a change to a model, a mesh or a version of jax really did to the step.

    Args:
      a: what `jax.jit(f).lower(...).compile()` or `step.lower(...).compile()` returns, or HLO text.
      b: the same; what became of it. Of a text, memory is not known, and is not compared.
    Errors: ValueError if a backend prints no HLO.
    Example:
      >>> program = jax.jit(lambda x: 2 * x).lower(1.0).compile()
      >>> print(diff(program, program))
      nothing changed

    Source: ours.
    """
    before, after = (collectives(_bare(one), _mesh(one)) for one in (a, b))
    facts_before, facts_after = _facts(a), _facts(b)
    changes = tuple(
        Change(of, name, facts_before[of, name], facts_after[of, name])
        for of, name in facts_before
        if (of, name) in facts_after and facts_before[of, name] != facts_after[of, name]
    )
    return Diff(_only(before.rows, after.rows), _only(after.rows, before.rows), changes)


def _bare(program: Program) -> jax.stages.Compiled | str:
    return program.executable if isinstance(program, Wrapped) else program


def _mesh(program: Program) -> jax.sharding.Mesh | None:
    return program.mesh if isinstance(program, Wrapped) else None


def _facts(program: Program) -> dict[tuple[str, str], int | None]:
    bare = _bare(program)
    facts: dict[tuple[str, str], int | None] = {}
    if not isinstance(bare, str):
        needs = memory(bare)
        for name in ("arguments", "outputs", "aliased", "temporaries", "code", "total"):
            facts["memory", name] = {**needs.__dict__, "total": needs.total}[name]
    work = cost(bare)
    facts["cost", "flops"], facts["cost", "bytes moved"] = work.flops, work.bytes
    facts["donation", "results that take the buffer of an argument"] = len(aliases(bare))
    return facts


def _key(row: Collective) -> tuple[object, ...]:
    """What makes two collectives the same: not the line, which moves when anything above it does."""
    return (row.kind, row.bytes, row.axes, row.executions, row.loops, row.conditional, row.asynchronous)


def _only(rows: tuple[Collective, ...], others: tuple[Collective, ...]) -> tuple[Collective, ...]:
    left, found = Counter(map(_key, others)), []
    for row in rows:
        if left[_key(row)]:
            left[_key(row)] -= 1
        else:
            found.append(row)
    return tuple(found)


def _lines(found: Diff) -> Iterator[str]:
    if found.removed or found.added:
        yield "collectives"
        yield from (f"  - {_told(row)}" for row in found.removed)
        yield from (f"  + {_told(row)}" for row in found.added)
    for of in dict.fromkeys(change.of for change in found.changes):
        yield of
        changes = [change for change in found.changes if change.of == of]
        width = max(len(change.name) for change in changes)
        yield from (f"  {change.name:<{width}}  {change}" for change in changes)


def _told(row: Collective) -> str:
    times = "? x" if row.executions is None else f"{row.executions} x"
    over = f" over {', '.join(row.axes)}" if row.axes else ""
    place = f" in {' > '.join(row.loops) or 'a loop'}" if row.in_loop else ""
    apart = " (async)" if row.asynchronous else ""
    return f"{times} {row.kind}{apart} of {readable(row.bytes)}{over}{place}: {row.source or 'no source known'}"
