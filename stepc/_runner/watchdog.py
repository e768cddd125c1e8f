"""Says where a run stands when it does not go on, and ends the process if that was asked for. It touches no run."""

import faulthandler
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable

from stepc._runner.events import EventLog

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: to start again may help

_LOG = logging.getLogger("stepc")


class StallWatcher:
    """A thread that writes the stacks of all threads when no step was begun for so long; once for each such wait.

    Args:
      seconds: how long; None for no thread at all.
      stalled: called then, with the seconds since the last step was begun.
      exit_seconds: after how long the process ends, with exit code 75 and without a word to anybody; None for never.
    """

    def __init__(
        self,
        seconds: float | None,
        stalled: Callable[[float], None] = lambda seconds: None,
        exit_seconds: float | None = None,
    ) -> None:
        self.seconds, self.stalled, self.exit_seconds = seconds, stalled, exit_seconds
        self.step = 0
        self.alarms: list[tuple[int, float, str]] = []
        self._beat_at = time.monotonic()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stepc-watchdog", daemon=True)
        if seconds is not None:
            self._thread.start()

    def beat(self, step: int) -> None:
        """Note that the run goes on."""
        self.step = step
        self._beat_at = time.monotonic()

    def close(self) -> None:
        """End the thread."""
        self._end.set()
        if self.seconds is not None:
            self._thread.join()

    def _watch(self) -> None:
        seconds, told = self.seconds or 0.0, 0.0
        while not self._end.wait(min(seconds / 4, 1.0)):
            waited = time.monotonic() - self._beat_at
            if waited > seconds and told != self._beat_at:
                told = self._beat_at
                stacks = _stacks()
                _LOG.warning("no step was begun for %.1f s, after step %d\n%s", waited, self.step, stacks)
                self.alarms.append((self.step, waited, stacks))
                self.stalled(waited)
            if self.exit_seconds is not None and waited > self.exit_seconds:
                text = "no step was begun for %.1f s, after step %d: the process ends, with exit code %d"
                _LOG.critical(text, waited, self.step, EXIT_CODE)
                os._exit(EXIT_CODE)  # nothing else ends a thread that hangs in a device or a disk


def log_watchdog_firings(watchdog: StallWatcher, scribe: EventLog) -> None:
    """Tell the loggers of what hung and goes on: a logger is not called from the thread that watches."""
    while watchdog.alarms:
        step, waited, stacks = watchdog.alarms.pop(0)
        scribe.event("hung", step, waited_seconds=f"{waited:.1f}", stacks=stacks)


def _stacks() -> str:
    with tempfile.TemporaryFile("w+") as written:
        faulthandler.dump_traceback(written)
        written.seek(0)
        return f"{written.read()}(python {sys.version_info.major}.{sys.version_info.minor})"
