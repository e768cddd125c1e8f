"""Says where a run hangs, and ends the process if `exit_seconds` is given. It never touches the run."""

import faulthandler
import logging
import math
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from stepc._jax import is_compiling
from stepc._runner.arguments import ArgumentFaults
from stepc._runner.events import EventLog

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: starting again may help
# The system handles the first two itself; after the others the faulty instruction would run again, for ever.
NOT_HANDLED = (signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)

_LOG = logging.getLogger("stepc")


@dataclass(frozen=True)
class Watchdog:
    """What `run` watches for, so that a run cannot go wrong in silence.

    Meaning: each field that is given turns on one check; none of them changes a number.
    Why: a run that hangs, recompiles or trains on diverged replicas costs as much as one that trains.

    Args:
      warn_seconds: when no step has begun for so long, the stacks of all threads go to the log. On several processes
        the one that the others wait for is named, and all of them end.
      exit_seconds: when a run makes no progress for so long, the process ends with exit code 75; more than
        `warn_seconds`. The last checkpoint is what a new start resumes from. A step that begins or finishes is
        progress, and so is an evaluated batch. A compilation, the first trace, a save, a restore and the wait before a
        retry do not count, nor does the time in which the process was stopped. One batch of the data, one hook and one
        call of a logger do: give them time enough.
      max_recompiles: how often the step may be compiled again after its first call; one more is a BuildError.
      compare_replicas_every: in steps; how often the copies of replicated leaves on the devices are compared. It reads
        the state once. Copies that differ are a DeviceError, or on several processes a PeerError on all of them.
      signals: what ends the run as SIGTERM does, with a checkpoint and by Preempted: `(signal.SIGUSR1, signal.SIGHUP)`,
        as a scheduler sends before it preempts a job. One that is ignored when the run begins, as by `nohup`, stays
        ignored.
    Errors: FieldTypeError or ConfigError with all faults.
    Example:
      >>> Watchdog(warn_seconds=60, max_recompiles=0)
      Watchdog(warn_seconds=60, exit_seconds=None, max_recompiles=0, compare_replicas_every=None, signals=())
    """

    warn_seconds: float | None = None
    exit_seconds: float | None = None
    max_recompiles: int | None = None
    compare_replicas_every: int | None = None
    signals: Sequence[int] = ()

    def __post_init__(self) -> None:
        faults = ArgumentFaults("Watchdog")
        faults.seconds("warn_seconds", self.warn_seconds)
        faults.seconds("exit_seconds", self.exit_seconds)
        faults.count("max_recompiles", self.max_recompiles, least=0, optional=True)
        faults.count("compare_replicas_every", self.compare_replicas_every, optional=True)
        if faults.instance("signals", self.signals, Sequence, "a sequence of signals"):
            for index, number in enumerate(self.signals):
                _check_signal(f"signals[{index}]", number, faults)
        faults.refuse()
        if self.exit_seconds is not None and (self.warn_seconds is None or self.exit_seconds <= self.warn_seconds):
            faults.wrong_value("exit_seconds", f"more than warn_seconds={self.warn_seconds!r}", self.exit_seconds)
            faults.refuse()


def _check_signal(name: str, number: object, faults: ArgumentFaults) -> None:
    expected = "a signal that a process can handle, such as signal.SIGUSR1"
    if not isinstance(number, int) or isinstance(number, bool):
        faults.wrong_type(name, expected, number)
    elif number not in signal.valid_signals() or number in NOT_HANDLED:
        faults.wrong_value(name, expected, number)


@dataclass
class StallTime:
    """How long a run has been without progress, by the ticks of a thread that runs in the same process.

    A tick counts for two intervals at most: a process that was stopped (SIGSTOP, a suspended machine) and continued
    has not stalled while it did not run, although the clock went on.

    Args:
      interval: between two ticks, in seconds.
      waited: the time since the last heartbeat.
      stuck: the same without the phases that may take long.
    """

    interval: float
    waited: float = 0.0
    stuck: float = 0.0
    _beat_at: float = -math.inf
    _ticked_at: float = -math.inf

    def tick(self, now: float, beat_at: float, *, is_patient: bool) -> None:
        """Count the time since the tick before, or since the heartbeat if that was later."""
        if beat_at != self._beat_at:
            self._beat_at, self.waited, self.stuck = beat_at, 0.0, 0.0
        passed = min(now - max(self._ticked_at, beat_at), 2 * self.interval)
        self._ticked_at = now
        self.waited += passed
        self.stuck += 0.0 if is_patient else passed


class StallWatcher:
    """A thread that logs the stacks of all threads when a run makes no progress for a while, once for each such stall.

    Args:
      warn_seconds: how long; None for no thread at all.
      stalled: called then, with the seconds since the last heartbeat.
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
        self._num_patient = 0
        self._run_thread = threading.get_ident()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stepc-watchdog", daemon=True)
        if warn_seconds is not None:
            self._thread.start()

    def beat(self, step: int) -> None:
        """Note that the step after `step` begins."""
        self.step = step
        self._beat_at = time.monotonic()

    def progress(self) -> None:
        """Note that something else was done: a step has finished, a batch is evaluated, a failure handled."""
        self._beat_at = time.monotonic()

    @contextmanager
    def patient(self) -> Generator[None]:
        """A phase that may take long, has a limit of its own, and would take as long after a new start.

        It is logged like any other stall, but neither ends the process nor counts for the other processes.
        """
        self._num_patient += 1
        try:
            yield
        finally:
            self.progress()  # first: there is no moment in which it has ended and counts
            self._num_patient -= 1

    def close(self) -> None:
        """End the thread."""
        self._end.set()
        if self.warn_seconds is not None:
            self._thread.join()

    def _watch(self) -> None:
        warn_seconds, exit_seconds = self.warn_seconds or 0.0, self.exit_seconds
        time_ = StallTime(min(warn_seconds / 4, 1.0))
        warned_of = told_of = 0.0
        while not self._end.wait(time_.interval):
            beat_at = self._beat_at
            time_.tick(time.monotonic(), beat_at, is_patient=self._num_patient > 0 or is_compiling(self._run_thread))
            if time_.waited > warn_seconds and warned_of != beat_at:
                warned_of = beat_at
                stacks = _stacks()
                _LOG.warning("no step has begun for %.1f s, since step %d\n%s", time_.waited, self.step, stacks)
                self.stalls.append((self.step, time_.waited, stacks))
            if time_.stuck > warn_seconds and told_of != beat_at:
                told_of = beat_at
                self.stalled(time_.stuck)
            if exit_seconds is not None and time_.stuck > exit_seconds:
                text = "no step has begun for %.1f s, since step %d: the process ends with exit code %d"
                _LOG.critical(text, time_.waited, self.step, EXIT_CODE)
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
