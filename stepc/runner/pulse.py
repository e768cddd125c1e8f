"""Where each process of a run stands, for the others to read: it names the one that all wait for. Knows no step."""

import json
import threading
import time
from typing import NamedTuple

from stepc.processes.board import Board

PULSE_SECONDS = 0.4
WAITS = "waiting for the others"
SILENT = 3  # after so many pulses that did not come, a process counts as gone


class Beat(NamedTuple):
    """What a process says of itself: how often it has, at which step it is, what it does and for how long."""

    number: int
    step: int
    phase: str
    seconds: float


class Pulse:
    """A thread that writes, some times a second, what this process does and since when.

    Args:
      place: where on the board.
    """

    def __init__(self, board: Board, place: str) -> None:
        self.board, self.place = board, place
        self.phase, self.step, self._since = "start", 0, time.monotonic()
        self._num = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="stepc-pulse", daemon=True)
        self._thread.start()

    def at(self, phase: str, step: int) -> None:
        """Note what this process does now."""
        self.phase, self.step, self._since = phase, step, time.monotonic()

    def silent(self) -> int | None:
        """The process whose pulse has stopped, if one has; looks as long as that takes to see."""
        before = self._numbers()
        time.sleep(PULSE_SECONDS * SILENT)
        after = self._numbers()
        return next((process for process in before if before[process] == after[process]), None)

    def slowest(self) -> tuple[int, int, str]:
        """The process that the others wait for: its number, its step, and what it does, since when."""
        if (gone := self.silent()) is not None:
            was = self._read(gone)
            return gone, was.step, f"it was at {was.phase!r}, and has not been heard of since"
        told = {process: self._read(process) for process in range(self.board.num)}
        number = min(told, key=lambda one: (told[one].phase == WAITS, told[one].step, -told[one].seconds))
        found = told[number]
        return number, found.step, f"it has been at {found.phase!r} for {found.seconds:.1f} s"

    def close(self) -> None:
        """End the thread."""
        self._end.set()
        self._thread.join(PULSE_SECONDS * SILENT)

    def _beat(self) -> None:
        while True:
            self._num += 1
            seconds = time.monotonic() - self._since
            told = Beat(self._num, self.step, self.phase, seconds)
            self.board.put(f"{self.place}/{self.board.me}", json.dumps(told), again=True)
            if self._end.wait(PULSE_SECONDS):
                return

    def _numbers(self) -> dict[int, int]:
        return {process: self._read(process).number for process in range(self.board.num)}

    def _read(self, process: int) -> Beat:
        told = self.board.peek(f"{self.place}/{process}")
        return Beat(0, 0, "start", 0.0) if told is None else Beat(*json.loads(told))
