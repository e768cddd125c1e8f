"""The end of one process is the end of all: the first to fail says why, the others hear it wherever they are stuck.

Nothing that waits for another process can be trusted then, jax's own way out included: it waits for all of them, and
ends each by SIGABRT when one does not come. So from here a process leaves by `os._exit`, after it has said why.
"""

import atexit
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import TracebackType

from stepc.errors import PeerError
from stepc.processes.board import Board, board

_LOG = logging.getLogger("stepc")
GRACE_SECONDS = 1.0  # how long the main thread may take to notice: it is between steps, or stuck in a collective
HEARD_SECONDS = 1.4  # how long process 0, which keeps the board, stays for the others to read it
LEAVE_SECONDS = 30.0  # how long a program may take to end, once `run` has told it by an exception
LISTEN_SECONDS = 86400.0  # then it listens anew
OVER = ""  # written to its own key by a process that ends in order


@dataclass(frozen=True)
class Cause:
    """Why the job ends: which process, at which step and in which phase, and the text of its error."""

    process: int
    step: int | None
    phase: str
    text: str
    by: int  # the process that says so

    def error(self) -> PeerError:
        """What the other processes raise."""
        what = f"Process {self.process} failed: {self.text}"
        return PeerError(what, process=self.process, step=self.step, phase=self.phase)


@dataclass
class Alarm:
    """Of one process: hears what the others say, and says what ends this one."""

    board: Board
    cause: Cause | None = None
    exit_code: int | None = None
    _rung_at: float = 0.0
    _heard: threading.Event = field(default_factory=threading.Event)
    _answered: threading.Event = field(default_factory=threading.Event)
    _is_over: bool = False
    _thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._listen, name="stepc-alarm", daemon=True)
        self._thread.start()
        atexit.register(self._leave)
        self._hook, sys.excepthook = sys.excepthook, self._uncaught

    def ring(self, cause: Cause, *, exit_code: int = 1) -> None:
        """End all processes: the first cause is the one that is told."""
        self._answered.set()
        if self.exit_code is None:
            self.exit_code, self._rung_at = exit_code, time.monotonic()
            self.stop(cause)

    def stop(self, cause: Cause) -> None:
        """End all processes, this one too, wherever its main thread is stuck."""
        for process in range(self.board.num):
            self.board.put(_key(process), json.dumps(cause.__dict__))

    def heard(self, *, seconds: float = 0.0) -> Cause | None:
        """What ended another process, if one did; waits for so long to hear it."""
        if self._heard.wait(seconds) or self._heard.is_set():
            return self.cause
        return None

    def _listen(self) -> None:
        told = self._hear()
        if told in (None, OVER) or self._is_over:
            return
        cause = Cause(**json.loads(told or ""))
        if cause.by == self.board.me and self._answered.is_set():
            return
        self.cause, self._rung_at = cause, time.monotonic()
        self._heard.set()
        _LOG.error("process %d failed at step %s (%s): %s", cause.process, cause.step, cause.phase, cause.text)
        if cause.by == self.board.me:  # its main thread is stuck, and process 0 keeps the board for the others
            time.sleep(HEARD_SECONDS if self.board.me == 0 else 0.0)
        elif self._answered.wait(GRACE_SECONDS):
            time.sleep(LEAVE_SECONDS)
        if not self._is_over:
            self.end(cause)

    def _hear(self) -> str | None:
        """What is written for this process, however long that takes; None if the board is gone."""
        while True:
            began = time.monotonic()
            told = self.board.read(_key(self.board.me), seconds=LISTEN_SECONDS)
            if told is not None or time.monotonic() - began < LISTEN_SECONDS / 2:
                return told

    def end(self, cause: Cause) -> None:
        """End this process alone, now."""
        _end(f"stepc.errors.PeerError: {cause.error()}\n", self.exit_code or 1)

    def _uncaught(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        self._hook(kind, error, trace)
        self.note(error, exit_code=130 if issubclass(kind, KeyboardInterrupt) else 1)

    def note(self, error: BaseException, *, exit_code: int = 1) -> None:
        """End all processes for an exception that no `run` has told of."""
        if self.exit_code is None:
            text = f"{type(error).__name__}: {error}".partition("\n")[0]
            self.ring(Cause(self.board.me, None, "outside of `run`", text, self.board.me), exit_code=exit_code)

    def _leave(self) -> None:
        """At the end of the process. atexit calls this before jax's own clean-up, which waits for the others."""
        if self.exit_code is None:
            self._is_over = True
            self.board.put(_key(self.board.me), OVER)
            self._thread.join(GRACE_SECONDS)
            return
        if self.board.me == 0:
            time.sleep(max(0.0, self._rung_at + HEARD_SECONDS - time.monotonic()))
        _end("", self.exit_code)


@contextmanager
def ending_all() -> Iterator[None]:
    """Let an error that leaves this end all processes, for a program that turns its errors into an exit code."""
    try:
        yield
    except Exception as error:  # it is raised again
        if (alarm := listen()) is not None:
            alarm.note(error)
        raise


def _end(last_words: str, code: int) -> None:
    sys.stderr.write(last_words)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    logging.shutdown()
    os._exit(code)


def _key(process: int) -> str:
    return f"stepc/alarm/{process}"


@cache
def _alarm(found: Board) -> Alarm:
    return Alarm(found)


def listen() -> Alarm | None:
    """The alarm of this process, which hears from now on; None if the job has one process."""
    found = board()
    return None if found is None else _alarm(found)
