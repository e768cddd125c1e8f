"""What a user wants done between steps: evaluation, hooks, a profile. It must not know how a step is made."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from stepc._language.kinds import Batch
from stepc._runner.arguments import ArgumentFaults
from stepc._runner.events import EventLog, is_due
from stepc._runner.pending import copy_state, deleted_leaves
from stepc.errors import StepError


@runtime_checkable
class Hook(Protocol):
    """A function that `run` calls every so many steps."""

    def __call__(self, step: int, metrics: Mapping[str, float], snapshot: Callable[[], Any], /) -> object:
        """Take the host floats of a finished step; `snapshot()` makes a copy of the state, at the price of a copy."""
        ...


@dataclass(frozen=True)
class Eval:
    """Evaluate the state every `every` steps.

    Meaning: the mean over `data` of each metric of `evaluate(state, batch)`, logged as `eval_<name>`.
    Why: a loss on data that is not trained on, beside the losses of training.

    Args:
      every: in steps, a positive integer.
      evaluate: a function that returns a dict of metrics; or a step, whose new state is dropped.
      data: batches, iterated over anew each time: a list or a loader, not an iterator.
    Errors: FieldTypeError or ConfigError with all faults. What `evaluate` raises becomes a StepError of phase "eval".
    Each batch weighs the same, also a short one.
    Example:
      >>> Eval(100, evaluate=len, data=[])
      Eval(every=100, evaluate=<built-in function len>, data=[])
    """

    every: int
    evaluate: Callable[[Any, Batch], Any]  # Any: a state; metrics, or a state and metrics
    data: Iterable[Batch]

    def __post_init__(self) -> None:
        faults = ArgumentFaults("Eval")
        faults.count("every", self.every)
        faults.callable_("evaluate", self.evaluate, "a function of a state and a batch")
        if faults.instance("data", self.data, Iterable, "an iterable of batches") and isinstance(self.data, Iterator):
            faults.wrong_value("data", "data that can be iterated over again, such as a list", self.data)
        faults.refuse()


@dataclass(frozen=True)
class Profile:
    """Trace some steps with JAX's profiler.

    Meaning: `jax.profiler.start_trace(directory)` before step `start`, `stop_trace()` after step `stop`.
    Why: where the time of a step goes, after the first steps have compiled.

    Args:
      start: the first step that is traced, a positive integer.
      stop: the last one.
      directory: where the trace is written.
    Errors: FieldTypeError or ConfigError with all faults.
    Example:
      >>> Profile(10, 12, "traces")
      Profile(start=10, stop=12, directory='traces')
    """

    start: int
    stop: int
    directory: str | Path

    def __post_init__(self) -> None:
        faults = ArgumentFaults("Profile")
        faults.count("start", self.start)
        faults.count("stop", self.stop)
        if type(self.start) is type(self.stop) is int and self.stop < self.start:
            faults.wrong_value("stop", f"at least start={self.start}", self.stop)
        faults.instance("directory", self.directory, (str, Path), "a path")
        faults.refuse()


@dataclass
class Callbacks:
    """What is due between two steps. What was done after a step is not done again when that step is made again."""

    eval: Eval | None = None
    hooks: Sequence[tuple[int, Hook]] = ()
    profile: Profile | None = None
    done: int = 0
    _is_profiling: bool = False

    def is_due(self, step: int, steps_per_call: int) -> bool:
        """Whether anything is due after `step`."""
        everies = [every for every, _ in self.hooks] + ([] if self.eval is None else [self.eval.every])
        return (
            self._profile_is_due(step)
            or step > self.done
            and any(is_due(every, step, steps_per_call) for every in everies)
        )

    def act(self, step: int, steps_per_call: int, state: Any, events: EventLog) -> None:  # Any: a state
        """Do what is due after `step`.

        Errors: StepError from what a user's function raises; the state is intact.
        """
        self._start_or_stop_profile(step)
        if step <= self.done:
            return
        evaluation = self.eval
        if evaluation is not None and is_due(evaluation.every, step, steps_per_call):
            events.log(_guarded("eval", step, lambda: eval_metrics(evaluation, state)), step)
        for every, hook in self.hooks:
            if is_due(every, step, steps_per_call):
                _guarded("hook", step, partial(hook, step, events.last_metrics(), lambda: copy_state(state)))
        self.done = step

    def go_back(self, step: int) -> None:
        """Let what was done after `step` be done again."""
        self.done = min(self.done, step)

    def close(self) -> None:
        """Stop the profiler if it is on."""
        if self._is_profiling:
            jax.profiler.stop_trace()
            self._is_profiling = False

    def _profile_is_due(self, step: int) -> bool:
        profile = self.profile
        if profile is None:
            return False
        return step >= profile.stop if self._is_profiling else profile.start - 1 <= step < profile.stop

    def _start_or_stop_profile(self, step: int) -> None:
        if self.profile is None or not self._profile_is_due(step):
            return
        if self._is_profiling:
            self.close()
        else:
            jax.profiler.start_trace(str(self.profile.directory))
            self._is_profiling = True


def eval_metrics(evaluation: Eval, state: Any) -> dict[str, float]:  # Any: a state
    """The mean of each metric over the batches, with `eval_` before its name."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    mine = copy_state(state)
    for batch in evaluation.data:
        if deleted_leaves(mine):  # a step donates the state that it gets
            mine = copy_state(state)
        result = evaluation.evaluate(mine, batch)
        for name, value in (result[1] if isinstance(result, tuple) else result).items():
            found[name].append(float(np.asarray(value).mean()))
    return {f"eval_{name}": sum(values) / len(values) for name, values in found.items()}


def _guarded(phase: str, step: int, act: Callable[[], Any]) -> Any:  # Any: what the user's function returns
    try:
        return act()
    except Exception as error:  # whatever a user's function raises: it is raised from
        what = f"The {phase} at step {step} failed: {type(error).__name__}: {error}"
        raise StepError(what, phase=phase, step=step, state_ok=True) from error
