"""The table of results: `pytest tests/faults tests/distributed --results` writes RESULTS.md from what passed."""

from pathlib import Path

import pytest

RESULTS = Path(__file__).parent / "RESULTS.md"
HEAD = """# Faults, and the tests that inject them

Written by `pytest tests/faults tests/distributed --results` from the tests that passed; the numbers are those of the
catalogue of faults.
A test marked `long` runs for minutes and is left out of `make test`.

| # | injected | asserted | test |
|---|---|---|---|
"""


def rows_of(item: pytest.Item) -> list[tuple[str, str]]:
    """(number, row of the table) for each fault that a test is marked with."""
    name = f"{item.path.stem}::{item.name.partition('[')[0]}"
    return [(mark.args[0], row_of(*mark.args, name)) for mark in item.iter_markers("fault")]


def row_of(number: str, injected: str, asserted: str, test: str) -> str:
    """One row of the table."""
    return f"| {number} | {injected} | {asserted} | `{test}` |"


def table(items: list[pytest.Item]) -> str:
    """The whole file."""
    rows = {row: number for item in items for number, row in rows_of(item)}
    ordered = sorted(rows, key=lambda row: (int(rows[row].strip("abcdefgh")), row))
    return HEAD + "".join(f"{row}\n" for row in ordered)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", action="store_true", help="write tests/faults/RESULTS.md from what passed")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--results"):
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        passed = {report.nodeid for report in reporter.stats.get("passed", []) if report.when == "call"}
        RESULTS.write_text(table([item for item in session.items if item.nodeid in passed]))
