"""Laws to a fixed point, with a trace of every rewriting. It knows no particular law."""

from dataclasses import dataclass

from stepc.core.laws import Law
from stepc.core.nodes import Differentiate, Program


@dataclass(frozen=True)
class Rewriting:
    """One law at work: the program before and after it."""

    law: Law
    before: Program
    after: Program


def rewrite(program: Program, laws: tuple[Law, ...]) -> tuple[Rewriting, ...]:
    """Apply laws until none applies; the last `after` is the normal form.

    Every law either removes a node or moves a reduction or a constant outwards, so `n` nodes need at most
    `n²` rewritings; a table that needs more contradicts itself, and that is a bug of ours.
    """
    carries = any(isinstance(node, Differentiate) and node.carry for node in program)
    laws = tuple(law for law in laws if law.keeps_order or not carries)
    trace: list[Rewriting] = []
    while found := _first(program, laws):
        if len(trace) > len(program) ** 2 + 64:
            raise RuntimeError(f"the laws do not come to an end: {[one.law.name for one in trace[-8:]]}")
        trace.append(found)
        program = found.after
    return tuple(trace)


def _first(program: Program, laws: tuple[Law, ...]) -> Rewriting | None:
    for law in laws:
        for start in range(len(program) - law.width + 1):
            stop = start + law.width
            replacement = law.rewrite(*program[start:stop])
            if replacement is not None:
                return Rewriting(law, program, (*program[:start], *replacement, *program[stop:]))
    return None
