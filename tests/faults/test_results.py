"""The table of results is that of the tests there are, and none of the catalogue's numbers is missing."""

import importlib
from pathlib import Path
from typing import Any

from faults.results import RESULTS, row_of

NUMBERS = {str(number) for number in range(1, 90)}
ROOMS = ("distributed", "faults")


def rows_marked() -> list[str]:
    """The rows of all tests that are not long, read from their marks: none is run for it."""
    rows = []
    tests = Path(__file__).parent.parent
    for path in sorted(path for room in ROOMS for path in (tests / room).glob("test_*.py")):
        module = importlib.import_module(f"{path.parent.name}.{path.stem}")
        for name, value in vars(module).items():
            marks: list[Any] = [] if not name.startswith("test_") else value.pytestmark if marked(value) else []
            if not any(mark.name == "long" for mark in marks):
                rows += [row_of(*mark.args, f"{path.stem}::{name}") for mark in marks if mark.name == "fault"]
    return rows


def marked(value: Any) -> bool:
    return "pytestmark" in vars(value)


def test_table_is_in_step_with_the_tests() -> None:
    found = [line for line in RESULTS.read_text().splitlines() if line.startswith("| ") and line[2].isdigit()]
    how = "run pytest tests/faults tests/distributed --results -m 'not long'"
    assert sorted(found) == sorted(set(rows_marked())), how


def test_every_number_of_the_catalogue_has_a_test() -> None:
    assert NUMBERS <= {row.split()[1].strip("abcdefgh") for row in rows_marked()}
