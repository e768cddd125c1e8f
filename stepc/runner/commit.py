"""What the processes of a run say to each other while they save: all of them commit a checkpoint, or none."""

import time
from collections.abc import Callable

from stepc.processes.alarm import Alarm
from stepc.processes.board import Board
from stepc.processes.poll import poll

LOOK_SECONDS = 0.02


class Commit:
    """The saves of one run.

    Args:
      place: where on the board.
    `is_busy` is whether a save is under way on any process, as of the last poll before a step.
    """

    def __init__(self, board: Board, alarm: Alarm, place: str) -> None:
        self.board, self.alarm, self.place = board, alarm, place
        self.is_first = board.me == 0
        self.is_busy = False
        self.is_busy_here: Callable[[], bool] = lambda: False
        self._attempt = 0

    def begin(self) -> None:
        """A save begins, on all processes."""
        self._attempt += 1
        self.is_busy = True

    def fail(self, text: str) -> None:
        """This process cannot save: no other is to wait for it."""
        self.board.put(self._failed, f"process {self.board.me}: {text}")

    def agree(self, text: str | None) -> str | None:
        """Once all are at the same place: why it failed, on whichever process; None if it failed on none.

        Args:
          text: why it failed here.
        """
        if text is not None:
            self.fail(text)
        failed = poll((int(text is not None),), tuple(range(self.board.num)))
        return self.board.read(self._failed, seconds=5) if failed.any() else None

    def everyone(self, number: int, mine: str) -> list[str]:
        """What each process has to say of a step, for process 0; the others get their own alone."""
        here = f"{self.place}/save/{self._attempt}/{number}"
        self.board.put(f"{here}/{self.board.me}", mine)
        if not self.is_first:
            return [mine]
        return [self.board.read(f"{here}/{process}", seconds=60) or mine for process in range(self.board.num)]

    def barrier(self, *, key: str, timeout_ms: int) -> None:
        """Wait until all are here; it is Orbax that calls this, from its own thread.

        Why: jax's own barrier waits its whole time for a process that has failed to write, or is gone.
        Errors: OSError with what failed on another process; TimeoutError.
        """
        here, until = f"{self.place}/barrier/{self._attempt}/{key}", time.monotonic() + timeout_ms / 1000
        self.board.put(f"{here}/{self.board.me}", "here")
        missing = list(range(self.board.num)) if self.is_first else ["all"]
        while missing:
            missing = [one for one in missing if self.board.peek(f"{here}/{one}") is None]
            if (text := self.board.peek(self._failed)) is not None:
                raise OSError(text)
            if (cause := self.alarm.heard()) is not None or self.alarm.exit_code is not None:
                raise OSError("the run has ended" if cause is None else cause.text)
            if missing and time.monotonic() > until:
                raise TimeoutError(f"the processes {missing} did not write their part in time")
            time.sleep(LOOK_SECONDS if missing else 0)
        if self.is_first:
            self.board.put(f"{here}/all", "here")

    @property
    def _failed(self) -> str:
        return f"{self.place}/failed/{self._attempt}"
