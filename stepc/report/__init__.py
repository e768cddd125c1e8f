"""A compiled program made readable: as text, as a page, as a fragment for a notebook. It decides nothing."""

from stepc.report.facts import LawFacts, LeafFacts, PlanFacts, ProgramFacts, facts
from stepc.report.page import fragment, page, write
from stepc.report.text import text

__all__ = [
    "LawFacts",
    "LeafFacts",
    "PlanFacts",
    "ProgramFacts",
    "facts",
    "fragment",
    "page",
    "text",
    "write",
]
