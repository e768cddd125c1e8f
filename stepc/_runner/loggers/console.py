"""A logger for people: a progress bar, or plain lines where there is no terminal. It needs rich."""

import importlib
import importlib.util
import logging
import os
import sys
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from stepc._runner.loggers import AbstractLogger
from stepc.errors import ConfigError

PLAIN_EVERY_SECONDS = 10.0
UNKNOWN = "-"
_LOG = logging.getLogger("stepc")
QUIET = ("start", "plan", "end", "checkpoint", "snapshots")  # events of every run, which are not shown


class Console(AbstractLogger):
    """Show the progress of a run: step, loss, speed and time left; each evaluation, with the best so far.

    Meaning: time is measured from the first logged step, which is logged once it has finished, so that neither the
      speed nor the time left includes compilation.

    Args:
      steps: the number of the last step; None if it is not known, and then the time left is not shown.
      tokens_per_step: tokens in one batch, over all devices and microbatches; the speed is then in tokens.
      examples_per_step: rows in one batch; the speed is then in examples. Without either it is in steps.
      terminal: the rich console to write to; by default one on standard output.
      clock: gives the time in seconds; for tests.
    Errors: ConfigError without the extra "demo".
    Units: per second of a whole step: loss, gradient, reduction and update.
    Without a terminal it prints a line every ten seconds, and one for the first step and for the last.
    Example:
      >>> with Console(steps=300, tokens_per_step=2048) as logger: sc.run(..., loggers=(logger,))  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        steps: int | None = None,
        tokens_per_step: int | None = None,
        examples_per_step: int | None = None,
        terminal: Any = None,  # Any: a console of rich, which is imported below
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if importlib.util.find_spec("rich") is None:
            raise ConfigError("`Console` needs rich.", suggestion="Install it with: pip install 'stepc[demo]'")
        # Imported by name, here and not at the top: `import stepc` must not need it.
        progress = importlib.import_module("rich.progress")
        self.terminal = importlib.import_module("rich.console").Console() if terminal is None else terminal
        # By default rich ends the process on a broken pipe: `python train.py | head` would end the training.
        self.terminal.on_broken_pipe = self._go_quiet
        self.steps = steps
        units = [(tokens_per_step, "tokens"), (examples_per_step, "examples"), (1, "steps")]
        amount, self._unit = next((amount, unit) for amount, unit in units if amount is not None)
        self._pace = _Pace(amount, clock)
        self._best: dict[str, tuple[float, int]] = {}
        self._printed_at: float | None = None
        self._clock = clock
        self._bar = progress.Progress(
            progress.TextColumn("{task.fields[where]}"),
            progress.BarColumn(bar_width=None),
            progress.TextColumn("loss {task.fields[loss]}  {task.fields[speed]}  {task.fields[left]} left"),
            console=self.terminal,
            disable=not self.terminal.is_terminal,
            expand=True,
        )
        self._task = self._bar.add_task("", total=steps, where="", loss=UNKNOWN, speed=UNKNOWN, left=UNKNOWN)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Show the metrics of one step."""
        if "loss" not in metrics:  # those of an evaluation
            shown = (f"{name} {value:.4f}{self._best_of(name, step)}" for name, value in metrics.items())
            self.say(f"step {step}  {'  '.join(shown)}")
            return
        self._pace.reached(step)
        loss = f"{metrics['loss']:.4f}"
        where = f"step {step}" if self.steps is None else f"step {step}/{self.steps}"
        speed, left = f"{self._pace.speed()} {self._unit}/s", self._pace.left(self.steps)
        if self.terminal.is_terminal:
            self._bar.start()
            self._bar.update(self._task, completed=step, where=where, loss=loss, speed=speed, left=left)
        elif self._is_due(step):
            self.say(f"{where}  loss {loss}  {speed}  {left} left")

    def event(self, name: str, facts: Mapping[str, str], step: int) -> None:
        """Show an event, unless every run has it."""
        if name == "best":  # shown beside the metric, which is logged next
            self._best[facts["metric"]] = (float(facts["value"]), int(facts["at"]))
        elif name not in QUIET:
            self.say(f"step {step}: {name}  " + "  ".join(f"{key}: {value}" for key, value in facts.items()))

    def _best_of(self, name: str, step: int) -> str:
        """What is known of the best value of a metric, beside the one of this step."""
        if name not in self._best:
            return ""
        value, at = self._best[name]
        return " (best)" if at == step else f" (best {value:.4f} at step {at})"

    def say(self, line: str) -> None:
        """Print a line, above the progress bar if there is one."""
        self.terminal.print(line, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def paused(self) -> Generator[None]:
        """Stop the clock for what is not training, so that it does not count as slow steps."""
        before = self._clock()
        try:
            yield
        finally:
            self.leave_out(self._clock() - before)

    def leave_out(self, seconds: float) -> None:
        """Do not count a time in which nothing was trained, such as that of an evaluation."""
        self._pace.leave_out(seconds)

    def close(self) -> None:
        """Leave the bar as it is, and restore the terminal."""
        self._bar.stop()

    def _go_quiet(self) -> None:
        """Called by rich on a broken pipe."""
        self.terminal.quiet = True
        _LOG.warning("the terminal is closed: Console prints nothing from here on")
        if self.terminal.file is sys.stdout:
            print_to_nobody()

    def _is_due(self, step: int) -> bool:
        now = self._clock()
        is_last = self.steps is not None and step >= self.steps
        is_due = self._printed_at is None or is_last or now - self._printed_at >= PLAIN_EVERY_SECONDS
        if is_due:
            self._printed_at = now
        return is_due


def print_to_nobody() -> None:
    """Redirect a broken standard output to the null device: Python flushes it at exit, and would fail there."""
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


class _Pace:
    """Measures the seconds per step since the first logged step."""

    def __init__(self, amount: int, clock: Callable[[], float]) -> None:
        self.amount = amount  # tokens, examples or steps in one step
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
        return f"{self.amount / self.seconds_per_step:,.0f}"

    def left(self, steps: int | None) -> str:
        if self.seconds_per_step is None or steps is None:
            return UNKNOWN
        return str(timedelta(seconds=round(max(steps - self.step, 0) * self.seconds_per_step)))
