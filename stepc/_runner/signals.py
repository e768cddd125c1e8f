"""Ctrl-C and SIGTERM become a flag that the loop reads between steps. It must not know what the loop does."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class LeaveLoop(BaseException):
    """Raised by a handler while the user's own code waits for a batch: nothing is under way that could be lost.

    A `BaseException`, so that code which catches every `Exception` does not stay in its wait.
    """


class SignalWatch:
    """What came so far. `received` is the first signal; a second Ctrl-C acts at once, as without a handler."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.is_protected = False
        self._before: dict[int, Any] = {}  # Any: what `signal` itself says of a handler
        self.is_reading = False
        self._reading = BlockingRead(self)

    def is_over(self) -> bool:
        """Whether the run is to end."""
        return self.received is not None

    def wait(self, seconds: float) -> None:
        """Sleep, unless a signal comes."""
        until = time.monotonic() + seconds
        while not self.is_over() and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.05))

    def reading(self) -> "BlockingRead":
        """While this is entered, a first signal leaves at once, by `Leave`."""
        return self._reading

    def enter(self) -> None:
        """What `reading` does first."""
        if self.is_protected:
            self.is_reading = True
            if self.is_over():
                self.is_reading = False
                raise LeaveLoop

    def note(self, number: int, frame: FrameType | None) -> None:
        """The handler: sets the flag, and gives a second Ctrl-C what it would have done."""
        if self.received is not None and number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        self.received = self.received or number
        if self.is_reading:
            self.is_reading = False
            raise LeaveLoop

    def install(self) -> None:
        """Take SIGINT and SIGTERM, if this is the main thread: Python delivers signals to no other."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            before = signal.getsignal(number)
            if before is not None and before is not signal.SIG_IGN:  # None: set by something that is not Python
                self._before[number] = before
                signal.signal(number, self.note)
        self.is_protected = True

    def restore(self) -> None:
        """Give the handlers back; a user's own handler of the signal that came is called, as it would have been."""
        for number, before in self._before.items():
            signal.signal(number, before)
        self.is_protected = False

    def pass_on(self) -> None:
        """Call the user's own handler of the signal that came, if there is one."""
        before = self._before.get(self.received or 0)
        if callable(before) and before is not signal.default_int_handler:
            before(self.received, None)


class BlockingRead:
    """Entered once a step, so it is one object, and no generator."""

    def __init__(self, signals: SignalWatch) -> None:
        self.signals = signals

    def __enter__(self) -> None:
        self.signals.enter()

    def __exit__(self, *_: object) -> None:
        self.signals.is_reading = False


@contextmanager
def watched_signals() -> Iterator[SignalWatch]:
    """Signals while this is entered; the handlers as before, however it is left."""
    signals = SignalWatch()
    signals.install()
    try:
        yield signals
    finally:
        signals.restore()
