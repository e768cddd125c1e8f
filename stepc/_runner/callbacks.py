"""What a user wants done between steps: evaluation, hooks, a profile. It must not know how a step is made."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from stepc._language.kinds import Batch, HostMetrics
from stepc._language.state import as_arrays
from stepc._runner.arguments import ArgumentFaults
from stepc._runner.best import MODES, BestValue
from stepc._runner.data import MASK, BatchSpec, checked, is_short, padded
from stepc._runner.evaluation import MetricSums
from stepc._runner.events import EventLog, is_due
from stepc._runner.multihost import Peers, SingleProcess
from stepc._runner.pending import CompiledStep, copy_state, deleted_leaves
from stepc._runner.watchdog import StallWatcher
from stepc.errors import ConfigError, StepError

HAS_NONE, CAN_FILL, HAS_BATCH = 0, 1, 2  # what a process has of the next batch of an evaluation
EVALUATED = "eval/"  # before the name of a metric of an evaluation
UNKNOWN = -1  # the leaves of a batch have other numbers of rows


@dataclass(frozen=True)
class Stop:
    """What a hook returns to end the run, or the `evaluate` of an `sc.Eval`.

    Meaning: no further step is made; what was made is logged and saved, and `run.ended` is "stopped".
    Why: a loss that no longer falls, or a budget of time, ends a training as well as a number of steps does.

    Args:
      why: the reason, for the log and `run.why`; not empty.
    Errors: FieldTypeError or ConfigError.
    On several processes the reason of one ends all of them, at the same step. A run that resumes from the checkpoint
    goes on, until a hook says so again.
    Example:
      >>> Stop("the loss no longer falls")
      Stop(why='the loss no longer falls')
    """

    why: str

    def __post_init__(self) -> None:
        faults = ArgumentFaults("Stop")
        if faults.instance("why", self.why, str, "a text") and not self.why:
            faults.wrong_value("why", "a reason", self.why)
        faults.refuse()


@dataclass(frozen=True)
class EarlyStopping:
    """End the run when a metric of the evaluation no longer gets better: `sc.Eval(…, stop=sc.EarlyStopping(…))`.

    Meaning: after `patience` evaluations in a row that are not better than the best by more than `min_delta`, no
      further step is made; what was made is logged and saved, `run.ended` is "stopped" and `run.why` says so.
    Why: a model that no longer improves on data that is not trained on begins to learn its training data by heart.

    Args:
      metric: its name as it is logged, such as "eval/loss".
      mode: "min" if less is better, "max" if more is.
      patience: how many evaluations; a positive integer.
      min_delta: by how much a value must be better to count; not negative.
    Errors: FieldTypeError or ConfigError with all faults; a StepError of phase "eval" for a metric that there is not.
    A value that is not finite is not better. With checkpoints the count goes on in a run that resumes, and a run that
    was stopped stays so until `patience` is raised. The state of the run is the last one: for the best, give
    `sc.Checkpoints(…, best=("eval/loss", "min"))` and read it by `sc.restore(…, step="best")`.
    Example:
      >>> EarlyStopping("eval/loss", "min", patience=3)
      EarlyStopping(metric='eval/loss', mode='min', patience=3, min_delta=0.0)
    """

    metric: str
    mode: str
    _: KW_ONLY
    patience: int
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        faults = ArgumentFaults("EarlyStopping")
        faults.instance("metric", self.metric, str, 'a name as it is logged, such as "eval/loss"')
        faults.choice("mode", self.mode, MODES)
        faults.count("patience", self.patience)
        faults.number("min_delta", self.min_delta, "a number that is not negative", lambda by: 0 <= by < math.inf)
        faults.refuse()

    def best_value(self) -> BestValue:
        """What it watches."""
        return BestValue(self.metric, self.mode, "`EarlyStopping`", self.patience, self.min_delta)


@runtime_checkable
class Hook(Protocol):
    """A function that `run` calls every so many steps. It may return a `Stop`."""

    def __call__(self, step: int, metrics: Mapping[str, Any], snapshot: Callable[[], Any], /) -> object:
        """Take the host floats of a finished step and of an evaluation after it; `snapshot()` copies the state."""
        ...


@dataclass(frozen=True)
class Eval:
    """Evaluate the state every `every` steps.

    Meaning: each metric of `evaluate(state, batch)`, over the rows of all of `data`, logged as `eval/<name>`. Totals
      and counts of an `sc.Mean` are added up, then divided once; an `sc.Sum`, `Max`, `Min` or `Last` is that of all
      batches; a plain number is the mean of its batch, and weighs as much as the batch has rows.
    Why: a loss on data that is not trained on, beside the losses of training.

    Args:
      every: in steps, a positive integer.
      evaluate: a function that returns a dict of metrics; or a step, whose new state is dropped.
      data: batches, iterated over anew each time: a list or a loader, not an iterator. The last may be short.
      stop: `sc.EarlyStopping(…)` ends the run when a metric no longer gets better.
    Errors: FieldTypeError or ConfigError with all faults. What `evaluate` raises becomes a StepError of phase "eval",
      and so does data that gives no batch.
    A step reports numbers that are divided already: weighed by rows they give the mean over rows, not over tokens. For
    that let `evaluate` return the `sc.Mean` of the loss. A short batch of a step is padded if it has a leaf "mask".
    On several processes a function gets the rows of its own process, and `step.put(batch)` makes one batch of those of
    all. Metrics that the processes do not share are refused.
    Example:
      >>> Eval(100, evaluate=len, data=[{"x": 1}])
      Eval(every=100, evaluate=<built-in function len>, data=[{'x': 1}], stop=None)
    """

    every: int
    evaluate: Callable[[Any, Batch], Any]  # Any: a state; metrics, or a state and metrics
    data: Iterable[Batch]
    stop: EarlyStopping | None = None

    def __post_init__(self) -> None:
        faults = ArgumentFaults("Eval")
        faults.count("every", self.every)
        faults.callable_("evaluate", self.evaluate, "a function of a state and a batch")
        if faults.instance("data", self.data, Iterable, "an iterable of batches") and isinstance(self.data, Iterator):
            faults.wrong_value("data", "data that can be iterated over again, such as a list", self.data)
        elif isinstance(self.data, Sized) and len(self.data) == 0:
            faults.wrong_value("data", "at least one batch", self.data)
        faults.instance("stop", self.stop, (EarlyStopping, type(None)), "sc.EarlyStopping(metric, mode, …) or None")
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
    """What is due between two steps. What was done after a step is not done again when that step is made again.

    Args:
      evaluated: the metrics of the last evaluation.
      evaluated_at: the step after which it was made.
      stopped: why a hook or an evaluation ends the run; None if none does.
      best_values: the metrics by which `EarlyStopping` and `Checkpoints` decide.
    """

    eval: Eval | None = None
    hooks: Sequence[tuple[int, Hook]] = ()
    profile: Profile | None = None
    watcher: StallWatcher = field(default_factory=lambda: StallWatcher(None))
    peers: Peers = field(default_factory=SingleProcess)
    done: int = 0
    evaluated: HostMetrics = field(default_factory=dict)
    evaluated_at: int = 0
    stopped: str | None = None
    best_values: Sequence[BestValue] = ()
    _is_profiling: bool = False

    def __post_init__(self) -> None:
        self._everies = [every for every, _ in self.hooks] + ([] if self.eval is None else [self.eval.every])

    def is_due(self, step: int, steps_per_call: int) -> bool:
        """Whether anything is due after `step`."""
        if self.profile is None and not self._everies:
            return False
        return self._profile_is_due(step) or self._calls_are_due(step, steps_per_call)

    def _calls_are_due(self, step: int, steps_per_call: int) -> bool:
        """Whether an evaluation or a hook is, on all processes."""
        return step > self.done and any(is_due(every, step, steps_per_call) for every in self._everies)

    def act(self, step: int, steps_per_call: int, state: Any, events: EventLog) -> None:  # Any: a state
        """Do what is due after `step`.

        Errors: StepError from what a user's function raises; the state is intact.
        """
        with self.watcher.patient():
            self._start_or_stop_profile(step)
        if not self._calls_are_due(step, steps_per_call):
            return
        stops: list[Stop] = []
        evaluation = self.eval
        if evaluation is not None and is_due(evaluation.every, step, steps_per_call):
            match _guarded("eval", step, partial(self._evaluate, evaluation, state, events)):
                case Stop() as stop:
                    stops.append(stop)
                case found:
                    self.evaluated, self.evaluated_at = found, step
                    _guarded("eval", step, lambda: self._note_best(step, found, events))
                    stops += [Stop(why) for one in self.best_values if (why := one.why_stop) is not None]
                    events.log(found, step)
        for every, hook in self.hooks:
            if is_due(every, step, steps_per_call):
                snapshot = _SnapshotOf(step, state)
                metrics = {**events.last_metrics(), **self.evaluated_after(step)}
                match _guarded("hook", step, partial(hook, step, metrics, snapshot)):
                    case Stop() as stop:
                        stops.append(stop)
                    case _:
                        pass
                snapshot.state = None
                self.watcher.progress()
        self.done = step
        self.stopped = self.peers.verdict("; ".join(stop.why for stop in stops) or None)

    def _note_best(self, step: int, metrics: HostMetrics, events: EventLog) -> None:
        """Note what is the best so far, and say so before the metrics are logged."""
        for one in self.best_values:
            if one.note(step, metrics):
                _say_best(one, step, events)

    def resume(self, step: int, records: Sequence[Mapping[str, Any]], events: EventLog) -> None:  # Any: JSON values
        """Go on after a step, from what its checkpoint has kept of the evaluations."""
        self.done = step
        for one in self.best_values:
            one.resume(records)
            if one.best is not None:
                _say_best(one, step, events)
        self.stopped = "; ".join(why for one in self.best_values if (why := one.why_stop) is not None) or None

    def evaluated_after(self, step: int) -> HostMetrics:
        """The metrics of the evaluation after a step, if there was one."""
        return self.evaluated if self.evaluated_at == step else {}

    def go_back(self, step: int) -> None:
        """Let what was done after `step` be done again."""
        self.done = min(self.done, step)
        for one in self.best_values:
            one.go_back(step)

    def close(self) -> None:
        """Stop the profiler if it is on."""
        if self._is_profiling:
            jax.profiler.stop_trace()
            self._is_profiling = False

    def _evaluate(self, evaluation: Eval, state: Any, events: EventLog) -> HostMetrics | Stop:  # Any: a state
        """Errors: ConfigError if the step has a metric of the same name, with which it would be one curve."""
        self.watcher.progress()
        metrics = eval_metrics(evaluation, state, self.peers, self.watcher.progress)
        if isinstance(metrics, Stop):
            return metrics
        if both := [name for name in metrics if name in events.last_metrics()]:
            names = ", ".join(map(repr, both))
            raise ConfigError(f"The step has metrics of the same name: {names}. Rename one of each.")
        return metrics

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


def _say_best(one: BestValue, step: int, events: EventLog) -> None:
    if one.best is not None:
        events.event("best", step, level=logging.INFO, metric=one.metric, value=one.best[1], at=one.best[0])


@dataclass
class _SnapshotOf:
    """`snapshot` of a hook: while the hook runs, the state is not yet donated to the next step."""

    step: int
    state: Any  # Any: a state; None once the hook has returned

    def __call__(self) -> Any:  # Any: a state
        if self.state is None:
            raise ConfigError(
                f"`snapshot()` of step {self.step} was called after its hook had returned.",
                suggestion="Call it in the hook, and keep the copy that it gives.",
            )
        return copy_state(self.state)


def eval_metrics(
    evaluation: Eval,
    state: Any,  # Any: a state
    peers: Peers,
    progress: Callable[[], None] = lambda: None,
) -> HostMetrics | Stop:
    """Each metric over the rows of all batches, with `eval/` before its name. It is added up on the host, in float64.

    Args:
      peers: the processes that evaluate together, each on rows of its own.
      progress: called after each batch.
    Errors: ConfigError if there is no batch, if the processes have other numbers of them or other metrics, or if
      `evaluate` does not return metrics that can be added up.
    """
    step = evaluation.evaluate if isinstance(evaluation.evaluate, CompiledStep) else None
    sums = MetricSums(num_steps=None if step is None else step.steps_per_call)
    mine = copy_state(state)
    for batch, rows, num_rows in _batches(evaluation, peers):
        if deleted_leaves(mine):  # a step donates the state that it gets
            mine = copy_state(state)
        result = evaluation.evaluate(mine, batch)
        if (stop := peers.verdict(result.why if isinstance(result, Stop) else None)) is not None:
            return Stop(stop)
        sums.add(_named(result, state), rows, num_rows)
        progress()
    if not sums.num_batches:
        raise ConfigError("Its data gave no batch.")
    values = sums.values()
    peers.check_evaluated(values)
    return {f"{EVALUATED}{name}": value for name, value in values.items()}


def _batches(evaluation: Eval, peers: Peers) -> Iterator[tuple[Batch, tuple[int, ...], int]]:
    """Each batch, the rows of its leaves, and those of all processes, 1 where they are not known.

    A process whose data has ended before that of the others gives rows that its mask leaves out, where a step
    evaluates. Errors: ConfigError on all processes, if it cannot.
    """
    first: BatchSpec | None = None
    batch: Batch = None
    left, num = iter(evaluation.data), 0
    while True:
        is_masked = isinstance(evaluation.evaluate, CompiledStep) and isinstance(batch, dict) and MASK in batch
        match list(islice(left, 1)):
            case [one]:
                batch = as_arrays(one)
                rows, state = _rows(evaluation, batch), HAS_BATCH
            case _ if is_masked:
                batch, rows, state = {**batch, MASK: np.zeros_like(batch[MASK])}, (0,), CAN_FILL
            case _:
                rows, state = (0,), HAS_NONE
        states = peers.numbers(state)
        if HAS_BATCH not in states:
            return
        if HAS_NONE in states:
            has, ended = states.index(HAS_BATCH), states.index(HAS_NONE)
            what = f"Its data gave {num} batches on process {ended}, and more on process {has}."
            remedy = "Give each process as many, or evaluate by a step on batches with a leaf 'mask'."
            peers.raise_on_all(ConfigError(what, suggestion=remedy))
        each = peers.numbers(rows[0] if len(set(rows)) == 1 else UNKNOWN)
        if isinstance(evaluation.evaluate, CompiledStep) and isinstance(batch, dict) and MASK in batch:
            first = first or checked(batch, None)
            batch = padded(batch, first) if is_short(batch, first) else batch  # its rows may not divide by the mesh
        yield batch, rows, 1 if UNKNOWN in each else sum(each)
        num += 1


def _rows(evaluation: Eval, batch: Batch) -> tuple[int, ...]:
    """The number of rows of each leaf of a batch that has rows. With `repeat(n)` those of one of its steps."""
    step = evaluation.evaluate
    axis = step.rows_axis if isinstance(step, CompiledStep) else 0
    return tuple(np.shape(leaf)[axis] for leaf in jax.tree.leaves(batch) if np.ndim(leaf) > axis)


def _named(result: Any, state: Any) -> Mapping[str, Any]:  # Any: what `evaluate` returns; a state
    match result:
        case Mapping():
            return result
        case (after, Mapping() as metrics) if jax.tree.structure(after) == jax.tree.structure(state):
            return metrics
        case _:
            got = f"{type(result).__name__} of {len(result)}" if isinstance(result, tuple) else type(result).__name__
            raise ConfigError(
                f"`evaluate` must return a dict of metrics, or as a step does a state and metrics, got {got}."
            )


def _guarded(phase: str, step: int, act: Callable[[], Any]) -> Any:  # Any: what the user's function returns
    try:
        return act()
    except Exception as error:  # whatever a user's function raises: it is raised from
        what = f"The {phase} at step {step} failed: {type(error).__name__}: {error}"
        raise StepError(what, phase=phase, step=step, state_ok=True) from error
