"""Tells the loggers what happened, and keeps them from harming the training. It must not know why anything happened."""

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from stepc._language.kinds import Metrics
from stepc.errors import StepError

_LOG = logging.getLogger("stepc")
FAILURES_IN_A_ROW = 3  # after so many a logger is left alone
SLOW_SECONDS = 0.5  # a logger that takes longer is told of, once


@runtime_checkable
class Logger(Protocol):
    """Anything with `log`. It gets host floats of settled steps, never an array."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Take note of the metrics of one step; steps count from 1."""


@runtime_checkable
class TakesEvents(Protocol):
    """A logger that wants to hear of failures, skips, checkpoints and the like."""

    def event(self, name: str, facts: Mapping[str, str], step: int) -> None: ...


@runtime_checkable
class Trims(Protocol):
    """A logger that can forget what came after a step, when a run goes on from there."""

    def trim(self, step: int) -> None: ...


@dataclass
class EventLog:
    """The loggers of one run.

    Args:
      every: the first step, every so many, and the last are told.
      is_strict: whether a logger that fails stops the training.
    """

    loggers: Sequence[Logger]
    every: int
    is_strict: bool = False
    failures: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    _slow: set[int] = field(default_factory=set)
    _in_a_row: Counter[int] = field(default_factory=Counter)
    _told: int = 0
    _last: tuple[int, Metrics, int] | None = None

    def settled(self, step: int, metrics: Metrics, *, row: int | None) -> None:
        """Tell of a step, if it is one to be told. A step that is made again is told once.

        Args:
          row: which of the steps in one call, if a call makes several.
        """
        self._last = (step, metrics, -1 if row is None else row)
        if step > self._told and (step == 1 or step % self.every == 0):
            self.tell_last()

    def tell_last(self) -> None:
        """Tell of the last settled step, if that has not been done."""
        if self._last is None or self._last[0] <= self._told:
            return
        self._told = self._last[0]
        if self.loggers:
            self.tell(self.last_metrics(), self._told)

    def last_metrics(self) -> dict[str, float]:
        """Those of the last settled step, as floats."""
        if self._last is None:
            return {}
        _, metrics, row = self._last
        return floats_of(metrics, row)

    def tell(self, metrics: Mapping[str, float], step: int) -> None:
        """Give every logger these metrics."""
        for number, logger in enumerate(self.loggers):
            self._guarded(number, logger, step, lambda logger=logger: logger.log(dict(metrics), step))

    def event(self, name: str, step: int, *, level: int = logging.WARNING, **facts: object) -> None:
        """Tell every logger that takes events, and Python's logger "stepc"."""
        told = {key: str(value) for key, value in facts.items()}
        _LOG.log(level, "%s at step %d%s", name, step, "".join(f"; {key}: {value}" for key, value in told.items()))
        for number, logger in enumerate(self.loggers):
            match logger:
                case TakesEvents():
                    self._guarded(number, logger, step, lambda one=logger: one.event(name, told, step))
                case _:
                    pass

    def trim(self, step: int) -> None:
        """Let every logger that can forget what came after a step."""
        self._told = min(self._told, step)
        self._last = None if self._last is not None and self._last[0] > step else self._last
        for number, logger in enumerate(self.loggers):
            match logger:
                case Trims():
                    self._guarded(number, logger, step, lambda one=logger: one.trim(step))
                case _:
                    pass

    def resume(self, step: int) -> None:
        """Go on after a step that an earlier run has told of."""
        self._told = step
        self.trim(step)

    def _guarded(self, number: int, logger: Logger, step: int, tell: Any) -> None:  # Any: a call without arguments
        if self._in_a_row[number] >= FAILURES_IN_A_ROW:
            return
        name, began = type(logger).__name__, time.perf_counter()
        try:
            tell()
            self._in_a_row[number] = 0
        except Exception as error:  # a logger never stops training, unless that is asked for
            self.failures[name] += 1
            self._in_a_row[number] += 1
            what = f"the logger {name} failed at step {step}: {type(error).__name__}: {error}"
            _LOG.warning("%s", what)
            if self._in_a_row[number] == FAILURES_IN_A_ROW:
                _LOG.warning("the logger %s failed %d times in a row: it is left alone", name, FAILURES_IN_A_ROW)
            if self.is_strict:
                what = f"{what[0].upper()}{what[1:]}"
                raise StepError(what, phase="log", step=max(step, 1), state_ok=True) from error
        finally:
            took = time.perf_counter() - began
            self.seconds[name] += took  # pyright: ignore[reportArgumentType]  # a Counter of floats
        if took > SLOW_SECONDS and number not in self._slow:
            self._slow.add(number)
            self.event("slow_logger", step, logger=name, log_seconds=f"{took:.2f}")


def floats_of(metrics: Metrics, row: int) -> dict[str, float]:
    """The metrics of one of the steps of a call, on the host."""
    return {name: float(np.asarray(value).reshape(-1)[row]) for name, value in metrics.items()}
