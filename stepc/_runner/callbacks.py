"""What a user wants done between steps: evaluation, hooks, a profile. It must not know how a step is made."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from stepc._language.kinds import Batch
from stepc._runner.events import EventLog
from stepc._runner.pending import copy_state, deleted_leaves
from stepc.errors import StepError


@runtime_checkable
class Hook(Protocol):
    """What is called every so many steps."""

    def __call__(self, step: int, metrics: Mapping[str, float], snapshot: Callable[[], Any], /) -> object:
        """Take host floats of the settled step; `snapshot()` gives a copy of the state, at the price of a copy."""
        ...


@dataclass(frozen=True)
class Evaluation:
    """Every `every` steps the mean of what `judge(state, batch)` gives over `data`.

    Args:
      judge: gives metrics; or a step, whose metrics are taken and whose state is dropped.
      data: batches, gone through anew each time.
    """

    every: int
    judge: Callable[[Any, Batch], Any]  # Any: a state; metrics, or a state and metrics
    data: Iterable[Batch]

    def metrics(self, state: Any) -> dict[str, float]:  # Any: a state
        """The means, by name with `eval_` before it."""
        found: defaultdict[str, list[float]] = defaultdict(list)
        mine = copy_state(state)
        for batch in self.data:
            if deleted_leaves(mine):  # a step donates what it is given
                mine = copy_state(state)
            told = self.judge(mine, batch)
            for name, value in (told[1] if isinstance(told, tuple) else told).items():
                found[name].append(float(np.asarray(value).mean()))
        return {f"eval_{name}": sum(values) / len(values) for name, values in found.items()}


@dataclass(frozen=True)
class Profile:
    """A trace of jax's profiler, of the steps `start` to `stop`, written to `directory`."""

    start: int
    stop: int
    directory: str | Path


@dataclass
class Callbacks:
    """What is due when. What is done at a step is not done again when that step is made again."""

    evaluation: Evaluation | None = None
    hooks: Sequence[tuple[int, Hook]] = ()
    profile: Profile | None = None
    done: int = 0
    _is_profiling: bool = field(default=False)
    _everies: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self._everies = [every for every, _ in self.hooks]
        self._everies += [] if self.evaluation is None else [self.evaluation.every]

    def is_due(self, number: int, per_call: int) -> bool:
        """Whether something is."""
        return (
            self.profile is not None
            and self._profile_is_due(number)
            or number > self.done
            and any(number // every > (number - per_call) // every for every in self._everies)
        )

    def act(self, number: int, per_call: int, state: Any, scribe: EventLog) -> None:  # Any: a state
        """Do it.

        Errors: StepError from what a user's function raises; the state is intact.
        """
        self._profile(number)
        if number <= self.done:
            return
        evaluation = self.evaluation
        if evaluation is not None and number // evaluation.every > (number - per_call) // evaluation.every:
            found = _guarded("eval", number, lambda: evaluation.metrics(state))
            scribe.tell(found, number)
        for every, hook in self.hooks:
            if number // every > (number - per_call) // every:
                metrics = scribe.last_metrics()
                _guarded("hook", number, partial(hook, number, metrics, lambda: copy_state(state)))
        self.done = number

    def go_back(self, number: int) -> None:
        """Let what was done after a step be done again."""
        self.done = min(self.done, number)

    def close(self) -> None:
        """End a profile that is under way."""
        if self._is_profiling:
            jax.profiler.stop_trace()
            self._is_profiling = False

    def _profile_is_due(self, number: int) -> bool:
        wanted = self.profile
        return wanted is not None and (
            self._is_profiling
            and number >= wanted.stop
            or not self._is_profiling
            and wanted.start - 1 <= number < wanted.stop
        )

    def _profile(self, number: int) -> None:
        if self.profile is not None and self._profile_is_due(number):
            if self._is_profiling:
                self.close()
            else:
                jax.profiler.start_trace(str(self.profile.directory))
                self._is_profiling = True


def is_due(every: int | None, number: int, per_call: int) -> bool:
    """Whether the last call passed a step at which something is due; None is never."""
    return every is not None and number // every > (number - per_call) // every


def _guarded(phase: str, number: int, act: Callable[[], Any]) -> Any:  # Any: what the user's function gives
    try:
        return act()
    except Exception as error:  # whatever a user's function raises: it is raised from
        what = f"The {phase} at step {number} failed: {type(error).__name__}: {error}"
        raise StepError(what, phase=phase, step=number, state_ok=True) from error
