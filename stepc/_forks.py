"""What a forked child must let go of. A process forked inside a run behaves as if there were no run."""

import os
from collections.abc import Callable, Generator
from contextlib import contextmanager

_UNDONE: list[Callable[[], None]] = []


def undo_in_children(undo: Callable[[], None]) -> None:
    """Call this in each child that is forked from now on; the last one registered is called first."""
    _UNDONE.append(undo)


@contextmanager
def undone_in_children(undo: Callable[[], None]) -> Generator[None]:
    """The same for the children that are forked in this context."""
    undo_in_children(undo)
    try:
        yield
    finally:
        if undo in _UNDONE:  # not in a child that leaves this context
            _UNDONE.remove(undo)


def _forget() -> None:
    while _UNDONE:
        _UNDONE.pop()()


os.register_at_fork(after_in_child=_forget)
