"""What is known of a compiled step, for eyes: text, a page, a fragment of one. It decides nothing."""

from stepc.report.known import ProgramFacts as ProgramFacts
from stepc.report.known import known as known
from stepc.report.known import known_of_step as known_of_step
from stepc.report.page import fragment as fragment
from stepc.report.page import page as page
from stepc.report.page import write as write
from stepc.report.text import text as text
