"""Ctrl-C and SIGTERM become a flag that the loop reads between steps. It must not know what the loop does."""

import os
import signal
import sys
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from stepc._forks import undone_in_children
from stepc.errors import Interrupted


class LeaveLoop(BaseException):
    """Raised by a handler while the user's own code waits for a batch: no work is in progress that could be lost.

    A `BaseException`, so that an `except Exception` in the user's loader does not swallow it and wait on.
    """


class SignalWatch:
    """The signals of one run. `received` is the first one; a second Ctrl-C acts at once, as without a handler."""

    def __init__(self, further: Sequence[int] = ()) -> None:
        self.numbers = tuple(dict.fromkeys((signal.SIGINT, signal.SIGTERM, *further)))
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
        if os.getpid() != self._pid:  # a forked child that has not reached `forget` yet
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
        """Handle the signals of the run, if this is the main thread: Python delivers signals to no other."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in self.numbers:
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
        self._before.clear()
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


class EndBySignal:
    """The hook for uncaught exceptions that ends the process by SIGINT for an `Interrupted`.

    Python ends by SIGINT for an uncaught KeyboardInterrupt, after its own cleaning up, so that a shell leaves the loop
    `for seed in 1 2 3; do python train.py; done`. It does that for the class itself alone, and an `Interrupted` would
    end with code 1. The flag by which it knows is set where source text that is executed raises the class itself, so
    that is what this does, after the hook from before has printed the exception.
    """

    def __init__(self) -> None:
        self.before = sys.excepthook

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        self.before(kind, error, trace)
        if isinstance(error, Interrupted):
            try:
                exec("raise KeyboardInterrupt", {})
            except KeyboardInterrupt:
                pass


def end_by_signal_if_uncaught() -> None:
    """Called where an `Interrupted` is raised; until then the hook of the user stays as it is."""
    if not isinstance(sys.excepthook, EndBySignal):
        sys.excepthook = EndBySignal()


@contextmanager
def watched_signals(further: Sequence[int] = ()) -> Generator[SignalWatch]:
    """Handle signals in this context, further ones too; the handlers from before come back however it is left."""
    signals = SignalWatch(further)
    with undone_in_children(signals.forget):
        signals.install()
        try:
            yield signals
        finally:
            signals.restore()
