"""A logger for eyes: a progress bar, or plain lines where there is no terminal; the only file here that needs rich."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType

from rich.console import Console as Terminal
from rich.progress import BarColumn, Progress, TextColumn

PLAIN_EVERY_SECONDS = 10.0
UNKNOWN = "-"


class Console:
    """Show how far a run is, its loss, its speed and how long it will take.

    Meaning: seconds per step are counted from the first logged step; that one is logged when it has settled,
      so compilation is in neither the speed nor the time left.

    Args:
      steps: number of the last step.
      tokens_per_step: tokens in one batch over all devices and microbatches.
      terminal: where to write; standard output by default.
      clock: the time in seconds; for tests.
    Units: tokens per second of whole steps: loss, gradient, reduction and update.
    Without a terminal it prints a line every ten seconds, and one for the first step and the last.
    Example:
      >>> with Console(steps=300, tokens_per_step=2048) as logger: sc.run(..., loggers=(logger,))  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        steps: int,
        tokens_per_step: int,
        terminal: Terminal | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.terminal = Terminal() if terminal is None else terminal
        self.steps = steps
        self._pace = _Pace(tokens_per_step, clock)
        self._printed_at: float | None = None
        self._clock = clock
        self._bar = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=None),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s  {task.fields[left]} left"),
            console=self.terminal,
            disable=not self.terminal.is_terminal,
            expand=True,
        )
        self._task = self._bar.add_task("", total=steps, loss=UNKNOWN, speed=UNKNOWN, left=UNKNOWN)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Show the metrics of one step."""
        self._pace.reached(step)
        loss = f"{metrics['loss']:.4f}"
        speed, left = self._pace.speed(), self._pace.left(self.steps)
        if self.terminal.is_terminal:
            self._bar.start()
            self._bar.update(self._task, completed=step, loss=loss, speed=speed, left=left)
        elif self._is_due(step):
            self.say(f"step {step}/{self.steps}  loss {loss}  {speed} tokens/s  {left} left")

    def say(self, line: str) -> None:
        """Print a line, above the bar if there is one."""
        self.terminal.print(line, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock: what happens inside is not training, and must not count as slow steps."""
        before = self._clock()
        try:
            yield
        finally:
            self._pace.leave_out(self._clock() - before)

    def close(self) -> None:
        """Leave the bar as it stands and give the terminal back. Closing twice is harmless."""
        self._bar.stop()

    def __enter__(self) -> "Console":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _is_due(self, step: int) -> bool:
        now = self._clock()
        is_due = self._printed_at is None or step >= self.steps or now - self._printed_at >= PLAIN_EVERY_SECONDS
        if is_due:
            self._printed_at = now
        return is_due


class _Pace:
    """Seconds per step since the first step that was logged."""

    def __init__(self, tokens_per_step: int, clock: Callable[[], float]) -> None:
        self.tokens_per_step = tokens_per_step
        self.clock = clock
        self.first: tuple[int, float] | None = None
        self.step = 0
        self.seconds_per_step: float | None = None

    def reached(self, step: int) -> None:
        now = self.clock()
        self.step = step
        if self.first is None:
            self.first = (step, now)
            return
        first_step, first_time = self.first
        if step > first_step:
            self.seconds_per_step = max(now - first_time, 1e-9) / (step - first_step)

    def leave_out(self, seconds: float) -> None:
        if self.first is not None:
            self.first = (self.first[0], self.first[1] + seconds)

    def speed(self) -> str:
        if self.seconds_per_step is None:
            return UNKNOWN
        return f"{self.tokens_per_step / self.seconds_per_step:,.0f}"

    def left(self, steps: int) -> str:
        if self.seconds_per_step is None:
            return UNKNOWN
        return str(timedelta(seconds=round(max(steps - self.step, 0) * self.seconds_per_step)))
