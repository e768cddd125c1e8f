"""Says where a run hangs, and ends the process if `exit_seconds` is given. It touches no run."""

import faulthandler
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from stepc._runner.arguments import ArgumentFaults
from stepc._runner.events import EventLog

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: to start again may help

_LOG = logging.getLogger("stepc")


@dataclass(frozen=True)
class Watchdog:
    """What `run` watches for, so that a run cannot go wrong in silence.

    Meaning: each field that is not None turns on one check; none of them changes a number.
    Why: a run that hangs, recompiles or trains on diverged replicas costs as much as one that trains.

    Args:
      warn_seconds: when no step has begun for so long, the stacks of all threads go to the log. On several processes
        the one that the others wait for is named, and all of them end.
      exit_seconds: when no step has begun for so long, the process ends with exit code 75; more than `warn_seconds`.
        The last checkpoint is what a new start resumes from.
      max_recompiles: how often the step may be compiled again after its first call; one more is a BuildError.
      compare_replicas_every: in steps; how often the copies of replicated leaves on the devices are compared. It reads
        the state once. Copies that differ are a DeviceError, or on several processes a PeerError on all of them.
    Errors: FieldTypeError or ConfigError with all faults.
    Example:
      >>> Watchdog(warn_seconds=60, max_recompiles=0)
      Watchdog(warn_seconds=60, exit_seconds=None, max_recompiles=0, compare_replicas_every=None)
    """

    warn_seconds: float | None = None
    exit_seconds: float | None = None
    max_recompiles: int | None = None
    compare_replicas_every: int | None = None

    def __post_init__(self) -> None:
        faults = ArgumentFaults("Watchdog")
        faults.seconds("warn_seconds", self.warn_seconds)
        faults.seconds("exit_seconds", self.exit_seconds)
        faults.count("max_recompiles", self.max_recompiles, least=0, optional=True)
        faults.count("compare_replicas_every", self.compare_replicas_every, optional=True)
        faults.refuse()
        if self.exit_seconds is not None and (self.warn_seconds is None or self.exit_seconds <= self.warn_seconds):
            faults.wrong_value("exit_seconds", f"more than warn_seconds={self.warn_seconds!r}", self.exit_seconds)
            faults.refuse()


class StallWatcher:
    """A thread that logs the stacks of all threads when no step has begun for a while, once for each such stall.

    Args:
      warn_seconds: how long; None for no thread at all.
      stalled: called then, with the seconds since the last step began.
      exit_seconds: after how long the process ends, with exit code 75 and without cleaning up; None for never.
    """

    def __init__(
        self,
        warn_seconds: float | None,
        stalled: Callable[[float], None] = lambda seconds: None,
        exit_seconds: float | None = None,
    ) -> None:
        self.warn_seconds, self.stalled, self.exit_seconds = warn_seconds, stalled, exit_seconds
        self.step = 0
        self.stalls: list[tuple[int, float, str]] = []
        self._beat_at = time.monotonic()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stepc-watchdog", daemon=True)
        if warn_seconds is not None:
            self._thread.start()

    def beat(self, step: int) -> None:
        """Note that the step after `step` begins."""
        self.step = step
        self._beat_at = time.monotonic()

    def close(self) -> None:
        """End the thread."""
        self._end.set()
        if self.warn_seconds is not None:
            self._thread.join()

    def _watch(self) -> None:
        warn_seconds, warned_of = self.warn_seconds or 0.0, 0.0
        while not self._end.wait(min(warn_seconds / 4, 1.0)):
            waited = time.monotonic() - self._beat_at
            if waited > warn_seconds and warned_of != self._beat_at:
                warned_of = self._beat_at
                stacks = _stacks()
                _LOG.warning("no step has begun for %.1f s, since step %d\n%s", waited, self.step, stacks)
                self.stalls.append((self.step, waited, stacks))
                self.stalled(waited)
            if self.exit_seconds is not None and waited > self.exit_seconds:
                text = "no step has begun for %.1f s, since step %d: the process ends with exit code %d"
                _LOG.critical(text, waited, self.step, EXIT_CODE)
                os._exit(EXIT_CODE)  # nothing else ends a thread that hangs in a device or a disk


def log_stalls(watcher: StallWatcher, events: EventLog) -> None:
    """Tell the loggers of stalls that are over: no logger is called from the thread that watches."""
    while watcher.stalls:
        step, waited, stacks = watcher.stalls.pop(0)
        events.event("hung", step, waited_seconds=f"{waited:.1f}", stacks=stacks)


def _stacks() -> str:
    with tempfile.TemporaryFile("w+") as written:
        faulthandler.dump_traceback(written)
        written.seek(0)
        return f"{written.read()}(python {sys.version_info.major}.{sys.version_info.minor})"
