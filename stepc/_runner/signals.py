"""Ctrl-C and SIGTERM become a flag that the loop reads between steps. It must not know what the loop does."""

import os
import signal
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from stepc._forks import undone_in_children


class LeaveLoop(BaseException):
    """Raised by a handler while the user's own code waits for a batch: no work is in progress that could be lost.

    A `BaseException`, so that an `except Exception` in the user's loader does not swallow it and wait on.
    """


class SignalWatch:
    """The signals of one run. `received` is the first one; a second Ctrl-C acts at once, as without a handler."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.is_protected = False
        self.is_reading = False
        self._pid = os.getpid()
        self._before: dict[int, Any] = {}  # Any: what `signal` says of a handler
        self._reading = BlockingRead(self)

    def is_over(self) -> bool:
        """Whether a signal asked the run to end."""
        return self.received is not None

    def wait(self, seconds: float) -> None:
        """Sleep, unless a signal comes."""
        until = time.monotonic() + seconds
        while not self.is_over() and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.05))

    def reading(self) -> "BlockingRead":
        """A context in which the first signal raises `LeaveLoop` at once."""
        return self._reading

    def start_reading(self) -> None:
        """Enter that context."""
        if self.is_protected:
            self.is_reading = True
            if self.is_over():
                self.is_reading = False
                raise LeaveLoop

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The handler: it sets the flag; a second Ctrl-C does what it would do without us."""
        if os.getpid() != self._pid:  # a forked child that has not come to `forget` yet
            self.forget()
            os.kill(os.getpid(), number)
            return
        if self.received is not None and number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        self.received = self.received or number
        if self.is_reading:
            self.is_reading = False
            raise LeaveLoop

    def install(self) -> None:
        """Handle SIGINT and SIGTERM, if this is the main thread: Python delivers signals to no other."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            before = signal.getsignal(number)
            if before is not None and before is not signal.SIG_IGN:  # None: set by something other than Python
                self._before[number] = before
                signal.signal(number, self.handle)
        self.is_protected = True

    def restore(self) -> None:
        """Put the handlers back that were there before."""
        for number, before in self._before.items():
            signal.signal(number, before)
        self.is_protected = False

    def forget(self) -> None:
        """In a forked child: put back the handlers from before, but for those that the user has set since."""
        for number, before in self._before.items():
            if signal.getsignal(number) == self.handle:
                signal.signal(number, before)
        self.is_protected = self.is_reading = False

    def pass_on(self) -> None:
        """Call the user's own handler of the signal that came, if there is one."""
        before = self._before.get(self.received or 0)
        if callable(before) and before is not signal.default_int_handler:
            before(self.received, None)


class BlockingRead:
    """The context of `SignalWatch.reading`. It is entered once a step: one object is cheaper than a generator."""

    def __init__(self, signals: SignalWatch) -> None:
        self.signals = signals

    def __enter__(self) -> None:
        self.signals.start_reading()

    def __exit__(self, *_: object) -> None:
        self.signals.is_reading = False


@contextmanager
def watched_signals() -> Generator[SignalWatch]:
    """Handle signals in this context; the handlers from before come back however it is left."""
    signals = SignalWatch()
    with undone_in_children(signals.forget):
        signals.install()
        try:
            yield signals
        finally:
            signals.restore()
