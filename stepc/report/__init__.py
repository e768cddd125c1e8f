"""What is known of a compiled step, for eyes: text, a page, a fragment of one. It decides nothing."""

from stepc.report.known import LawFacts as LawFacts
from stepc.report.known import LeafFacts as LeafFacts
from stepc.report.known import PlanFacts as PlanFacts
from stepc.report.known import ProgramFacts as ProgramFacts
from stepc.report.known import facts as facts
from stepc.report.page import fragment as fragment
from stepc.report.page import page as page
from stepc.report.page import write as write
from stepc.report.text import text as text
