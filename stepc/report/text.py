"""What is known of a program, as plain text."""

from collections.abc import Iterator

from stepc.report.known import ProgramFacts


def text(known: ProgramFacts) -> str:
    """Print all that is known: the plan, if there is one, and what the compiler made of it."""
    parts = [known.plan.text] if known.plan is not None else [f"program {known.title}"]
    parts += ["\n".join((title, *(f"  {line}".rstrip() for line in lines))) for title, lines in _sections(known)]
    return "\n\n".join(parts)


def _sections(known: ProgramFacts) -> Iterator[tuple[str, list[str]]]:
    yield "as compiled: collectives", str(known.collectives).splitlines()
    yield "as compiled: memory on one device", str(known.memory).splitlines()
    yield "as compiled: work on one device", str(known.cost).splitlines()
    yield "least time of one step, estimated from peaks", rooflines(known)
    if known.donated:
        yield "as compiled: donation", [donation(known)]


def rooflines(known: ProgramFacts) -> list[str]:
    """One line a device."""
    unknown = ["unknown: a loop does not say how often it turns"]
    return [str(one).replace(": an estimate,", ":") for one in known.rooflines] or unknown


def donation(known: ProgramFacts) -> str:
    """One line: how many leaves are donated, and which of them no result takes."""
    asked = [leaf for leaf in known.donated if leaf.donated]
    lost = [leaf.path for leaf in asked if not leaf.aliased]
    if not asked:
        return "nothing is donated: arguments and results lie beside each other"
    if not lost:
        return f"all {len(asked)} donated leaves are written over"
    return f"{len(lost)} of {len(asked)} donated leaves are copied instead: {', '.join(lost)}"
