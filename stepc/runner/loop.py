"""The loop: takes batches, makes steps, tells the loggers. It knows nothing of what a step is made of."""

import logging
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol

import jax

from stepc.errors import ConfigError, DataError, Interrupted, StepError
from stepc.language.kinds import Batch, Metrics
from stepc.language.state import State

IN_FLIGHT = 2  # more un-awaited steps on simulated devices abort the process; fewer cost nothing (measured)
_LOG = logging.getLogger("stepc")


class Logger(Protocol):
    """Anything with `log`. It gets host floats of settled steps, never an array."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Take note of the metrics of one step; steps count from 1."""


class Runnable(Protocol):
    """A compiled step, or its reference."""

    def __call__(self, state: State, batch: Batch) -> tuple[State, Metrics]:
        """One step."""
        ...


@dataclass
class Run:
    """What a run did.

    Args:
      state: the state after the last finished step; alive.
      steps: how many steps were finished.
      ended: "steps", "data" or "interrupted".
      metrics: those of the last finished step, as floats.
      logger_failures: how often each logger raised, by the name of its class.
    """

    state: State
    steps: int = 0
    ended: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    logger_failures: dict[str, int] = field(default_factory=dict)


def run(
    step: Runnable,
    state: State,
    data: Iterable[Batch],
    *,
    steps: int | None = None,
    on_error: str = "raise",
    loggers: Sequence[Logger] = (),
    log_every: int = 10,
) -> Run:
    """Train: one step for each batch.

    Meaning: for batch in data: state, metrics = step(state, batch).
    Why: errors keep the number of the step that failed, loggers cannot stop training, and Ctrl-C leaves a live state.

    Args:
      step: a compiled step, or a reference.
      state: it is donated to the first step, as in a call of `step`; use `Run.state`.
      data: batches.
      steps: how many steps; None for as many as there are batches.
      on_error: "raise": log, then raise. There is no other policy yet.
      loggers: each is told of the first step, of every `log_every`-th, and of the last.
      log_every: in steps.
    Errors: ConfigError before the first step; StepError from the original, with the number of the step; DataError
      if the data raises, or has no batch; Interrupted (a KeyboardInterrupt) on Ctrl-C, at a step boundary.
    At most two steps are in flight, so a late error is known by the step that caused it.
    """
    _check(step, data, steps, on_error, log_every)
    run = Run(state)
    flight: deque[tuple[int, Metrics]] = deque()
    with _interruptible() as interrupted:
        for number, batch in _numbered(data, steps, run):
            try:
                run.state, metrics = step(run.state, batch)
            except Exception as error:  # whatever the step raises: it is logged, and raised from
                raise _failure(error, "step", number, run.state) from error
            flight.append((number, metrics))
            _settle(flight, IN_FLIGHT, run, loggers, log_every)
            if interrupted.is_set():
                break
        _settle(flight, 0, run, loggers, log_every)
        run.ended = "interrupted" if interrupted.is_set() else "steps" if run.steps == steps else "data"
    if run.steps % log_every and run.steps != 1:
        _tell(loggers, run)
    if run.ended == "interrupted":
        raise Interrupted(f"Interrupted after step {run.steps}; the state is alive in `.run.state`.", run=run)
    return run


def _check(step: object, data: object, steps: int | None, on_error: str, log_every: int) -> None:
    faults = []
    if not callable(step):
        faults.append(("step", "a compiled step", step))
    if not isinstance(data, Iterable):
        faults.append(("data", "an iterable of batches", data))
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        faults.append(("steps", "a positive integer or None", steps))
    if on_error != "raise":
        faults.append(("on_error", '"raise"', on_error))
    if isinstance(log_every, bool) or not isinstance(log_every, int) or log_every < 1:
        faults.append(("log_every", "a positive integer", log_every))
    if faults:
        facts = [(name, f"expected {expected}, got {got!r}") for name, expected, got in faults]
        raise ConfigError("`run` cannot do what it was asked for.", facts=facts)


def _numbered(data: Iterable[Batch], steps: int | None, run: Run) -> Iterator[tuple[int, Batch]]:
    batches, number = iter(data), 0
    while steps is None or number < steps:
        number += 1
        try:
            batch = next(batches)
        except StopIteration:
            if number == 1:
                raise DataError("There is no batch at all.", phase="data", step=1, state_ok=True) from None
            return
        except Exception as error:  # whatever the data raises: it is logged, and raised from
            raise _failure(error, "data", number, run.state) from error
        yield number, batch


def _settle(flight: deque[tuple[int, Metrics]], most: int, run: Run, loggers: Sequence[Logger], every: int) -> None:
    """Wait for the oldest steps until at most `most` are in flight."""
    while len(flight) > most:
        number, metrics = flight.popleft()
        try:
            run.metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        except (RuntimeError, ValueError) as error:  # jax raises either for a failed program
            raise _failure(error, "settle", number, run.state) from error
        run.steps = number
        if number == 1 or number % every == 0:
            _tell(loggers, run)


def _tell(loggers: Sequence[Logger], run: Run) -> None:
    for logger in loggers:
        try:
            logger.log(run.metrics, run.steps)
        except Exception as error:  # a logger never stops training; its failures are counted and reported
            name = type(logger).__name__
            run.logger_failures[name] = run.logger_failures.get(name, 0) + 1
            _LOG.warning("the logger %s failed at step %d: %s: %s", name, run.steps, type(error).__name__, error)


def _failure(error: Exception, phase: str, number: int, state: State) -> StepError:
    alive = phase != "settle" and not any(
        leaf.is_deleted() for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array)
    )
    what = f"Step {number} failed in phase {phase!r}: {type(error).__name__}: {error}"
    _LOG.error("%s", what)
    return (DataError if phase == "data" else StepError)(what, phase=phase, step=number, state_ok=alive)


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Ctrl-C sets a flag that the loop reads between steps; a second one acts at once."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag  # Python delivers signals to the main thread only
        return

    def note(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        flag.set()

    before: Any = signal.signal(signal.SIGINT, note)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, before)
