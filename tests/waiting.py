"""Waiting for a condition, with a limit that only a hang exceeds: what a test asserts is never how long it took."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
# Twenty times what the slowest process of a test takes on an idle machine: a machine with a load of 8 is within it.
LIMIT_SECONDS = 300.0


def eventually(condition: Callable[[], T], limit_seconds: float = LIMIT_SECONDS) -> T:
    """The first true value of `condition`. Errors: AssertionError if it has none within the limit."""
    until = time.monotonic() + limit_seconds
    while not (value := condition()):
        assert time.monotonic() < until, f"still {value!r} after {limit_seconds:g} s"
        time.sleep(0.01)
    return value
