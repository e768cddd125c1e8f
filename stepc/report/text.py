"""The facts about a program as plain text."""

from collections.abc import Iterator

from stepc._text import indented_section
from stepc.inspect.memory import Memory, MemoryPart
from stepc.report.facts import ProgramFacts, check_facts


def text(facts: ProgramFacts) -> str:
    """Print the plan, if there is one, and what became of it in the compiled program."""
    check_facts(facts)
    parts = [facts.plan.text] if facts.plan is not None else [f"program {facts.title}"]
    parts += [indented_section(title, lines) for title, lines in _sections(facts)]
    return "\n\n".join(parts)


def _sections(facts: ProgramFacts) -> Iterator[tuple[str, list[str]]]:
    yield "as compiled: collectives", str(facts.collectives).splitlines()
    yield "as compiled: memory on one device", str(facts.memory).splitlines()
    yield "as compiled: work on one device", str(facts.cost).splitlines()
    estimates = [str(one).replace(": estimated ", ": ") for one in facts.rooflines]
    yield "least time of one step, estimated from device peaks", estimates or [UNKNOWN_TRIP_COUNT]
    if facts.donated:
        yield "as compiled: donation", [donation(facts)]


UNKNOWN_TRIP_COUNT = "unknown: a loop has no known trip count"


def memory_parts(needs: Memory) -> list[MemoryPart]:
    """What arguments and temporaries are for, as far as that is known; the whole of each where it is not."""
    explained = {part.of for part in needs.parts}
    whole = {"arguments": needs.arguments, "temporaries": needs.temporaries}
    return [*needs.parts, *(MemoryPart(of, of, bytes_) for of, bytes_ in whole.items() if of not in explained)]


def donation(facts: ProgramFacts) -> str:
    """One line: how many leaves are donated, and which of them no result reuses."""
    asked = [leaf for leaf in facts.donated if leaf.donated]
    copied = [leaf.path for leaf in asked if not leaf.aliased]
    if not facts.donated:
        return "unknown: JAX dropped unused arguments, so leaves cannot be matched to buffers"
    if not asked:
        return "nothing is donated: every result needs a buffer of its own"
    if not copied:
        return f"all {len(asked)} donated leaves are aliased"
    return f"{len(copied)} of {len(asked)} donated leaves are copied instead of aliased: {', '.join(copied)}"
