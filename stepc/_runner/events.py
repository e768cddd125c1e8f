"""The event log: what the loggers of a run hear, and when. It must not know how a step is made."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from stepc._language.kinds import HostMetrics, Metrics
from stepc.errors import StepError

_LOG = logging.getLogger("stepc")
FAILURES_IN_A_ROW = 3  # after so many a logger is left alone
SLOW_SECONDS = 0.5  # a call of a logger that takes longer is an event, once for each logger


@runtime_checkable
class Logger(Protocol):
    """Anything with `log`. It gets host floats of finished steps; arrays too, if it is an `ArrayLogger`."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Take the metrics of one step; steps count from 1."""


@runtime_checkable
class EventLogger(Protocol):
    """A logger that wants to hear of failures, skips, checkpoints and the like."""

    def event(self, name: str, facts: Mapping[str, str], step: int) -> None: ...


@runtime_checkable
class ArrayLogger(Protocol):
    """A logger with the attribute `shows_arrays = True`: metrics that are no scalars come as numpy arrays."""

    shows_arrays: bool


@runtime_checkable
class TrimmingLogger(Protocol):
    """A logger that can forget what came after a step, when a run goes on from there."""

    def trim(self, step: int) -> None: ...


@runtime_checkable
class ReservingLogger(Protocol):
    """A logger that has columns or keys of its own, which no metric may be called."""

    reserved: tuple[str, ...]


@runtime_checkable
class PausedLogger(Protocol):
    """A logger or a meter that measures time, and leaves out that in which nothing is trained."""

    def leave_out(self, seconds: float) -> None: ...


@runtime_checkable
class Meter(Protocol):
    """What adds metrics of its own to those of each logged step, given among the loggers."""

    reserved: tuple[str, ...]

    def program(
        self,
        batch: Any,  # Any: a batch
        executable: Any,  # Any: a jax.stages.Compiled, or None for a function of the user's own
        devices: frozenset[Any],  # Any: devices of jax
        *,
        steps_per_call: int,
        rows_axis: int,
    ) -> None: ...

    def measured(self, step: int) -> Mapping[str, float]: ...


@dataclass
class EventLog:
    """The loggers of one run.

    Args:
      meters: what measures the run for them.
      every: the metrics of the first step, of every `every`-th and of the last are logged.
      is_strict: whether a logger that fails stops the training.
      is_leaving: whether the run ends by an exception; then no logger keeps it from saving by another one.
    """

    loggers: Sequence[Logger]
    every: int
    is_strict: bool = False
    is_leaving: bool = False
    meters: Sequence[Meter] = ()
    failures: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)
    _slow: set[int] = field(default_factory=set)
    _not_shown: set[tuple[int, str]] = field(default_factory=set)
    _failures_in_a_row: Counter[int] = field(default_factory=Counter)
    _logged: int = 0
    _last: tuple[int, Metrics, int] | None = None

    def __post_init__(self) -> None:
        # Asked once: to look for the attribute of a protocol takes as long as a small step.
        self._shows_arrays = [isinstance(one, ArrayLogger) and one.shows_arrays for one in self.loggers]

    def taken_names(self, names: Iterable[str]) -> list[tuple[str, str]]:
        """The metrics whose name a logger uses itself, with a sentence for each."""
        rows: list[tuple[str, str]] = []
        for logger in (*self.loggers, *self.meters):
            match logger:
                case ReservingLogger(reserved=reserved):
                    why = f"{type(logger).__name__} writes something else under this name"
                    rows += [(f"metric {name!r}", why) for name in names if name in reserved]
                case _:
                    pass
        return rows

    def step_finished(self, step: int, metrics: Metrics, *, row: int) -> None:
        """Log a finished step if it is one to be logged. A step that is made again is logged once.

        Args:
          row: which of the steps of its call.
        """
        self._last = (step, metrics, row)
        if step > self._logged and (step == 1 or step % self.every == 0):
            self.log_last()

    def log_last(self) -> None:
        """Log the last finished step, if that has not been done."""
        if self._last is None or self._last[0] <= self._logged:
            return
        self._logged = self._last[0]
        if self.loggers:
            measured = {name: value for meter in self.meters for name, value in meter.measured(self._logged).items()}
            self.log({**self.last_metrics(), **measured}, self._logged)

    def leave_out(self, seconds: float) -> None:
        """Let what measures time leave out that in which nothing was trained."""
        for one in (*self.loggers, *self.meters):
            match one:
                case PausedLogger():
                    one.leave_out(seconds)
                case _:
                    pass

    def metrics_of(self, step: int) -> HostMetrics:
        """The metrics of a step, if it is the last that was logged or could have been; none of one that was drained."""
        return self.last_metrics() if self._last is not None and self._last[0] == step else {}

    def last_metrics(self) -> dict[str, float | np.ndarray]:
        """The metrics of the last finished step, as floats, and arrays where they are no scalars."""
        if self._last is None:
            return {}
        _, metrics, row = self._last
        return on_host(metrics, row)

    def log(self, metrics: HostMetrics, step: int) -> None:
        """Give these metrics to every logger: arrays to those that show them. An event says once who does not."""
        scalars = {name: value for name, value in metrics.items() if not isinstance(value, np.ndarray)}
        for number, logger in enumerate(self.loggers):
            shown: Any = metrics if self._shows_arrays[number] else scalars  # Any: its `log` takes arrays, or none
            if len(shown) < len(metrics):
                self._note_not_shown(number, {name: metrics[name] for name in metrics if name not in scalars}, step)
            if shown or not metrics:
                self._guarded(number, logger, step, lambda logger=logger, shown=shown: logger.log(dict(shown), step))

    def _note_not_shown(self, number: int, arrays: HostMetrics, step: int) -> None:
        if new := {name: value for name, value in arrays.items() if (number, name) not in self._not_shown}:
            self._not_shown |= {(number, name) for name in new}
            names = ", ".join(f"{name} {list(np.shape(value))}" for name, value in new.items())
            name = type(self.loggers[number]).__name__
            self.event("metric_not_shown", step, level=logging.INFO, logger=name, metrics=names)

    def event(self, name: str, step: int, *, level: int = logging.WARNING, **facts: object) -> None:
        """Give an event to every logger that takes events, and to Python's logger "stepc"."""
        texts = {key: str(value) for key, value in facts.items()}
        _LOG.log(level, "%s at step %d%s", name, step, "".join(f"; {key}: {text}" for key, text in texts.items()))
        for number, logger in enumerate(self.loggers):
            match logger:
                case EventLogger():
                    self._guarded(number, logger, step, lambda logger=logger: logger.event(name, dict(texts), step))
                case _:
                    pass

    def trim(self, step: int) -> None:
        """Let the loggers forget what came after a step, those that can."""
        self._logged = min(self._logged, step)
        self._last = None if self._last is not None and self._last[0] > step else self._last
        for number, logger in enumerate(self.loggers):
            match logger:
                case TrimmingLogger():
                    self._guarded(number, logger, step, lambda logger=logger: logger.trim(step))
                case _:
                    pass

    def resume(self, step: int) -> None:
        """Go on after a step that an earlier run has logged."""
        self._logged = step
        self.trim(step)

    def _guarded(self, number: int, logger: Logger, step: int, act: Callable[[], None]) -> None:
        if self._failures_in_a_row[number] >= FAILURES_IN_A_ROW:
            return
        name, began = type(logger).__name__, time.perf_counter()
        try:
            act()
            self._failures_in_a_row[number] = 0
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            # A logger never stops training, unless `on_error` says so, or it leaves by SystemExit or the like: once.
            if not isinstance(error, Exception) and not self.is_leaving:
                raise
            self.failures[name] += 1
            self._failures_in_a_row[number] += 1
            what = f"logger {name} failed at step {step}: {type(error).__name__}: {error}"
            _LOG.warning("%s", what)
            if self._failures_in_a_row[number] == FAILURES_IN_A_ROW:
                _LOG.warning("logger %s failed %d times in a row and is left alone", name, FAILURES_IN_A_ROW)
            if self.is_strict and not self.is_leaving:
                raise StepError(f"L{what[1:]}", phase="log", step=max(step, 1), state_ok=True) from error
        finally:
            took = time.perf_counter() - began
            self.seconds[name] = self.seconds.get(name, 0.0) + took
        if took > SLOW_SECONDS and number not in self._slow:
            self._slow.add(number)
            self.event("slow_logger", step, logger=name, log_seconds=f"{took:.2f}")


def on_host(metrics: Metrics, row: int) -> dict[str, float | np.ndarray]:
    """The metrics of one of the steps of a call, on the host. Those of several steps are stacked, as the loss is."""
    is_stacked = np.ndim(metrics["loss"]) > 0
    values = {name: np.asarray(value)[row] if is_stacked else np.asarray(value) for name, value in metrics.items()}
    return {name: np.array(value) if value.ndim else float(value) for name, value in values.items()}


def is_due(every: int | None, step: int, steps_per_call: int) -> bool:
    """Whether the call that ended with `step` made a step that is a multiple of `every`; None is never due."""
    return every is not None and step // every > (step - steps_per_call) // every
