"""The loop of one run: dispatch steps, wait for them, recover from failures, and end without losing the state."""

import logging
import signal
import time
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, assert_never

import jax
import numpy as np

from stepc._runner.callbacks import Callbacks
from stepc._runner.checkpoint import CheckpointKeeper
from stepc._runner.data import (
    DataItem,
    DataReader,
    EndOfData,
    LeftOut,
    Read,
    ReadFailure,
    data_failure,
    data_fingerprint,
)
from stepc._runner.events import EventLog, is_due
from stepc._runner.multihost import Peers
from stepc._runner.pending import (
    AnyStep,
    PendingStep,
    RejectIf,
    Snapshot,
    StepStatus,
    changed_names,
    check_metrics,
    check_verdict,
    copy_state,
    deleted_leaves,
    nonfinite_failure,
    step_failure,
    wait_for_step,
)
from stepc._runner.policies import EXHAUSTED, FailureCounts, Raise, Retry, Rollback, Skip
from stepc._runner.recompilation import RecompilationMonitor
from stepc._runner.signals import LeaveLoop, SignalWatch, end_by_signal_if_uncaught
from stepc._runner.watchdog import StallWatcher, log_stalls
from stepc.errors import (
    BuildError,
    CheckpointError,
    DataError,
    DeviceError,
    Interrupted,
    NonFiniteError,
    Preempted,
    RejectedError,
    ResumeError,
    StepError,
)

# Which policy governs a failure. A step that `reject_if` refuses is as bad as one that is not finite.
KINDS: dict[type[StepError], str] = {
    DataError: "data",
    NonFiniteError: "nonfinite",
    RejectedError: "nonfinite",
    DeviceError: "device",
}


StateTree = TypeVar("StateTree")  # a state, whatever it is made of


@dataclass
class Run(Generic[StateTree]):
    """What a run did.

    Args:
      state: the state after the last finished step; alive.
      steps: the number of the last finished step, counting those of earlier runs on the same checkpoints.
      ended: "steps", all that were asked for; "data", which ended, before that if `steps` was given; "stopped", by a
        `Stop`; "interrupted" or "preempted".
      why: the reason of the `Stop` or the `EarlyStopping`, if one ended it.
      best: for each metric by which `EarlyStopping` or `Checkpoints` decide, the step and the value of its best
        evaluation.
      metrics: the metrics of the last finished step: floats, and arrays of numpy where they are no scalars.
      failures: how many failures of each kind there were, counting those that a policy recovered from.
      skipped: how many steps and reads of the data were left out.
      rollbacks: how often the run went back.
      logger_failures: how often each logger raised, by the name of its class.
      log_seconds: how long each logger took, by the name of its class.
    """

    state: StateTree  # None in the `.run` of an error that destroyed it
    steps: int = 0
    ended: str = ""
    why: str = ""
    best: dict[str, tuple[int, float]] = field(default_factory=dict)
    metrics: dict[str, float | np.ndarray] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)
    skipped: int = 0
    rollbacks: int = 0
    logger_failures: dict[str, int] = field(default_factory=dict)
    log_seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class Trainer:
    """One run: its parts, each from a file of its own, and where it stands."""

    step: AnyStep
    run: Run[Any]  # Any: a state
    reader: DataReader
    counts: FailureCounts
    events: EventLog
    signals: SignalWatch
    callbacks: Callbacks
    checkpoints: CheckpointKeeper | None
    watcher: StallWatcher
    peers: Peers
    monitor: RecompilationMonitor
    reject_if: RejectIf | None
    steps: int | None
    max_in_flight: int
    snapshot_every: int | None  # None if no policy needs a snapshot
    compare_replicas_every: int | None
    number: int = 0  # of the last dispatched step
    position: Any = None  # Any: where the data stands after the last finished step
    last_item: DataItem | None = None  # the batch of that step
    in_flight: deque[PendingStep] = field(default_factory=deque)
    dispatching: DataItem | None = None  # a batch whose step is called, and is not in flight yet
    snapshot: Snapshot | None = None
    next_snapshot: Snapshot | None = None  # one of a step that is not known to be good yet
    metric_names: Any = None  # Any: the keys of the metrics of the last call

    def __post_init__(self) -> None:
        self.steps_per_call = self.step.steps_per_call
        self._may_skip = self.step.skip_limit is not None

    def loop(self) -> None:
        """Take a batch, dispatch a step, wait for an older one; until the steps are made, the data ends or a signal."""
        self.take_snapshot()
        while True:
            found = read = EndOfData()
            try:
                self.peers.at("data", self.number)
                if not self.is_over():
                    read = self.reader.read(self._num_calls_left())
                found = self.peers.agreed(read, self.number, self.signals)
                match found:
                    case DataItem():
                        self.dispatch(found)
                        self.wait(self.max_in_flight)
                        self.between_steps()
                    case EndOfData():
                        if isinstance(read, DataItem):  # another process has ended the run
                            self.reader.again.appendleft(read)
                        self.wait(0)
                        return
                    case LeftOut(process):
                        if process is not None:
                            self.events.event("batch_left_out", self.number, why=f"it is short on process {process}")
                    case ReadFailure():
                        self.wait(0)
                        raise data_failure(found, self.number + 1) from found.error
            except LeaveLoop:
                continue  # a signal came while the data was read
            except StepError as failure:
                self.recover(failure, found)

    def is_over(self) -> bool:
        """Whether no further step is to be made."""
        is_made = self.steps is not None and self.number >= self.steps
        return is_made or self.callbacks.stopped is not None or self.signals.is_over()

    def _num_calls_left(self) -> int | None:
        """How many calls the run makes at most from here; None for as many as the data has."""
        return None if self.steps is None else -(-(self.steps - self.number) // self.steps_per_call)

    def dispatch(self, item: DataItem) -> None:
        """Call the step on a batch. What the call raises is this step's own, once the older steps are waited for."""
        first = self.number + 1
        self.watcher.beat(self.number)
        if self.watcher.stalls:
            log_stalls(self.watcher, self.events)
        if self.snapshot is not None:
            self.snapshot.items.append(item)
            if self.next_snapshot is not None:
                self.next_snapshot.items.append(item)
        if item.is_hole:
            self.wait(0)
            self.position = item.after  # what is left out is not read again
        else:
            self.dispatching = item
            try:
                if not self.monitor.is_built_for(item.spec):
                    with self.watcher.patient():  # tracing alone may take minutes, and as long after a new start
                        self.monitor.prepare(self.number, self.run.state, item)
                state, metrics, diagnostics = self.step.step_with_diagnostics(self.run.state, item.batch)
            except BuildError:
                raise  # by `prepare`, which says what and where itself
            except Exception as error:  # whatever the step raises: its class says little, its phase says much
                self.wait(0)
                is_alive = not deleted_leaves(self.run.state)
                is_device = self.monitor.is_built_for(item.spec) and isinstance(error, jax.errors.JaxRuntimeError)
                phase = "build" if is_alive and not is_device else "dispatch"
                raise step_failure(error, phase, first, state_ok=is_alive) from error
            if not isinstance(metrics, dict) or metrics.keys() != self.metric_names:
                check_metrics(
                    metrics,
                    step=first,
                    num_steps=self.steps_per_call,
                    taken=self.events.taken_names,
                    best=self.monitor.best,
                )
                if self.metric_names is None:
                    self.monitor.check_first(self.run.state, state)
                else:
                    self.events.event("metrics_changed", first, names=changed_names(self.metric_names, metrics))
                self.metric_names = metrics.keys()
            self.run.state = state
            self.in_flight.append(PendingStep(first, item, metrics, diagnostics))
            self.dispatching = None
        self.number += self.steps_per_call
        self.monitor.check_traces(first)

    def wait(self, most: int) -> None:
        """Wait for the oldest calls until at most `most` are in flight; judge and log their steps."""
        while len(self.in_flight) > most:
            pending = self.in_flight[0]
            status = wait_for_step(pending, may_skip=self._may_skip)
            if status is not None or self.reject_if is not None:
                for row in range(self.steps_per_call):
                    self.judge(pending, status, row)
            self._finish_oldest()
            for row in range(self.steps_per_call):
                self.events.step_finished(pending.first + row, pending.metrics, row=row)

    def drain(self) -> None:
        """Wait for what is in flight without logging it, up to a step that is not finite and was not skipped."""
        while self.in_flight:
            status = wait_for_step(self.in_flight[0], may_skip=self._may_skip)
            if status is not None and not (status.is_finite | status.is_skipped).all():
                return
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        pending = self.in_flight.popleft()
        self.position, self.last_item = pending.item.after, pending.item
        self.run.steps = pending.first + self.steps_per_call - 1
        if self.next_snapshot is not None and self.next_snapshot.step == self.run.steps:
            self.snapshot, self.next_snapshot = self.next_snapshot, None
        self.watcher.progress()

    def judge(self, pending: PendingStep, status: StepStatus | None, row: int) -> None:
        """Refuse a step that is not finite or that the user rejects; count one that the program skipped."""
        step = pending.first + row
        if status is not None and status.is_skipped[row]:
            skipped = self.counts.skipped.setdefault("in the program", set())
            if step not in skipped:
                skipped.add(step)
                self.events.event("skipped", step, why="not finite; the state is unchanged")
            limit = self.step.skip_limit
            if limit is not None and all(step - back in skipped for back in range(limit)):
                before = "was the one" if limit == 2 else f"were the {limit - 1}"
                why = f", nor {before} before it: skip_nonfinite allows fewer than {limit} in a row"
                why = why if limit > 1 else ""
                raise nonfinite_failure(pending, step, row, rows_axis=self.step.rows_axis, state_ok=True, why=why)
        elif status is not None and not status.is_finite[row]:
            raise nonfinite_failure(pending, step, row, rows_axis=self.step.rows_axis, state_ok=False)
        elif self.reject_if is not None:
            check_verdict(self.reject_if, pending.metrics, row=row, step=step, agreed=self.peers.verdict)

    def between_steps(self) -> None:
        """Do what is due after this step, with nothing in flight; but for a snapshot nothing is waited for."""
        self.peers.at("between steps", self.number)
        is_save = False
        if self.checkpoints is not None:
            if self.checkpoints.is_saving:
                with self.watcher.patient():
                    self.checkpoints.poll()
            is_save = self.checkpoints.is_due(self.number, steps_per_call=self.steps_per_call)
        is_compare = is_due(self.compare_replicas_every, self.number, self.steps_per_call)
        is_boundary = is_save or is_compare or self.callbacks.is_due(self.number, self.steps_per_call)
        if is_boundary:
            self.wait(0)
        if is_compare:
            self.peers.compare(self.run.state, self.number)
            self.watcher.progress()
        newest = self.next_snapshot or self.snapshot
        if newest is not None and self.number - newest.step >= (self.snapshot_every or 1):
            self.take_snapshot()
        if is_boundary:
            began = time.perf_counter()
            # Before the save: a run that resumes from it does not repeat them, so a process that dies between the two
            # would lose them.
            self.callbacks.act(self.number, self.steps_per_call, self.run.state, self.events)
            if is_save or self._is_best():
                self.save()
            self.events.leave_out(time.perf_counter() - began)

    def _is_best(self) -> bool:
        """Whether the evaluation after this step has the best value so far, by process 0's numbers."""
        if self.checkpoints is None or self.callbacks.evaluated_at != self.number:
            return False
        return self.checkpoints.asks_for_best and bool(
            self.peers.numbers(self.checkpoints.is_best(self.callbacks.evaluated))[0]
        )

    def unfinished(self) -> list[DataItem]:
        """The batches that were given to a step that has not finished, in order."""
        return [pending.item for pending in self.in_flight] + ([self.dispatching] if self.dispatching else [])

    def give_back(self, unfinished: Sequence[DataItem] = ()) -> None:
        """Leave the data where the state in `run` stands, or say what is lost."""
        if (lost := self.reader.give_back(unfinished)) is not None:
            num, why = lost
            self.events.event("batches_lost", self.run.steps, batches=num, why=why)

    def save(self) -> None:
        """Begin a checkpoint of the finished state, if this step has none."""
        if self.checkpoints is not None and self.number > self.checkpoints.saved:
            spec = self.reader.source.spec
            with self.watcher.patient():
                self.checkpoints.save(
                    self.number,
                    self.run.state,
                    self.position,
                    {} if spec is None else spec.rows(),
                    None if self.peers.are_many else data_fingerprint(self.last_item),
                    {**self.events.metrics_of(self.number), **self.callbacks.evaluated_after(self.number)},
                    [one.record() for one in self.callbacks.best_values],
                )

    def recover(self, failure: StepError, found: Read) -> None:
        """Log a failure; then raise it, or restore what the policy needs to continue."""
        self.watcher.progress()
        kind = KINDS.get(type(failure))
        place = failure.step
        if isinstance(found, ReadFailure) and kind == "data":
            # A skip goes on with another read; a retry reads again when as many batches were given.
            place = found.given if isinstance(self.counts.policies[kind], Retry) else found.place
        refusal = self._refusal(kind, failure, found, place)
        what = str(failure).partition("\n")[0]
        policy = self.counts.policies.get(kind or "", Raise())
        level = logging.ERROR
        self.events.event("failure", failure.step, level=level, what=what, phase=failure.phase, policy=policy)
        if refusal is not None or kind is None:
            if refusal not in (None, EXHAUSTED):
                failure.add_note(f"stepc: {refusal}")
            raise self.peers.raised(failure)
        match policy:
            case Retry():
                with self.watcher.patient():
                    self.signals.wait(policy.wait_before(self.counts.attempts[kind, place]))
                self.reader.retry(found) if kind == "data" else self.rewind(leave_out=None)
            case Skip():
                self.reader.skip() if kind == "data" else self.rewind(leave_out=failure.step)
            case Rollback():
                self.roll_back(policy, failure.step)
            case Raise():
                raise failure
            case _:
                assert_never(policy)

    def _refusal(self, kind: str | None, failure: StepError, found: object, place: int) -> str | None:
        """Why a failure is raised; None if the run goes on."""
        if kind is None:
            self.counts.failures[failure.phase] += 1
            return EXHAUSTED
        why = self.counts.refusal(kind, place)
        policy = self.counts.policies[kind]
        if why is None and kind == "device" and self.peers.are_many:
            return "the other processes are at the same step and cannot be brought back"
        if why is None and isinstance(found, ReadFailure) and kind == "data":
            why = found.refusal(is_retry=isinstance(policy, Retry))
        if why is None and kind == "nonfinite" and failure.state_ok and isinstance(policy, Skip):
            return "skip_nonfinite has skipped as often as it may"
        return why

    def take_snapshot(self) -> None:
        """Copy the last state to come back to, if a policy needs that. It counts once its step is known to be good."""
        if self.snapshot_every is None:
            return
        if self.next_snapshot is not None:
            self.wait(0)  # no more than two copies, if more steps are in flight than there are from one to the next
        try:
            state = copy_state(self.run.state)
        except Exception:
            self.wait(0)  # a step in flight that has failed says so itself
            raise
        position = self.in_flight[-1].item.after if self.in_flight else self.position
        made = Snapshot(state, self.number, position, self.steps_per_call)
        if self.in_flight:
            self.next_snapshot = made
            return
        if self.snapshot is None:
            self.events.event("snapshots", self.number, level=logging.INFO, cost=made.cost())
        self.snapshot = made

    def rewind(self, *, leave_out: int | None) -> None:
        """Go back to the snapshot and give the batches since again, but for that of the step `leave_out`."""
        snapshot = self._existing_snapshot()
        self._give_again(snapshot.replay(leave_out))
        self._restart_from(snapshot.state, snapshot.step, snapshot.position)

    def roll_back(self, policy: Rollback, failed_at: int) -> None:
        """Go back to the last checkpoint, or else to the snapshot, and go on as the policy says."""
        snapshot = self._existing_snapshot()
        later = snapshot.items_after(failed_at)
        with self.watcher.patient():
            restored = None if self.checkpoints is None else self.checkpoints.restore(snapshot.state)
        if restored is None:
            self._give_again(later if policy.data == "skip" else snapshot.replay(None))
            state, number, position = snapshot.state, snapshot.step, snapshot.position
        else:
            state, number, position = restored.state, restored.number, restored.position
            if policy.data == "skip":
                self._give_again(later)
            else:
                self.reader.go_to(position)
        self.events.trim(number)
        self.events.event("rollback", failed_at, to=number, data=policy.data)
        self.callbacks.go_back(number)
        if restored is not None:
            self.callbacks.resume(number, restored.best_values, self.events)
        self.counts.forget_skips_after(number)
        self._restart_from(state, number, position)

    def _existing_snapshot(self) -> Snapshot:
        if self.snapshot is None:
            raise RuntimeError("a policy that goes on has a snapshot")
        return self.snapshot

    def _give_again(self, items: Sequence[DataItem]) -> None:
        """Put these before what is read next."""
        self.reader.again.extendleft(reversed(items))

    def _restart_from(self, state: Any, number: int, position: Any) -> None:  # Any: a state, and where the data stands
        self.in_flight.clear()
        self.dispatching = None
        self.run.state, self.number, self.position, self.last_item = copy_state(state), number, position, None
        self.run.steps = number
        self.snapshot, self.next_snapshot = Snapshot(state, number, position, self.steps_per_call), None


def end_reason(trainer: Trainer) -> str:
    """Why the loop ended without an error: a signal, a `Stop`, all steps made, or the end of the data."""
    match trainer.signals.received:
        case None if trainer.callbacks.stopped is not None:
            return "stopped"
        case None:
            return "steps" if trainer.is_over() else "data"
        case signal.SIGINT:
            return "interrupted"
        case _:
            return "preempted"


def finish_after_error(trainer: Trainer, error: BaseException) -> None:
    """Before an error is raised: save a live state, wait for saves, and note on the error what else failed."""
    run = trainer.run
    if isinstance(error, KeyboardInterrupt):  # a second Ctrl-C: at once
        abandon_after_error(trainer, error)
        return
    trainer.events.is_leaving = True
    with _noted_on(error):
        _settle(trainer, error)
    is_good = not trainer.in_flight and not (isinstance(error, StepError) and not error.state_ok)
    unfinished = trainer.unfinished()
    if not is_good or deleted_leaves(run.state):
        run.state = None
        if (snapshot := trainer.snapshot) is not None:
            run.state, run.steps, unfinished = copy_state(snapshot.state), snapshot.step, snapshot.items
    if trainer.checkpoints is not None:
        with _noted_on(error):
            if is_good and not isinstance(error, CheckpointError | ResumeError) and trainer.number > 0:
                trainer.save()
            with trainer.watcher.patient():
                trainer.checkpoints.finish()
    trainer.give_back(unfinished)
    _attach_run(error, run)


@contextmanager
def _noted_on(error: BaseException) -> Generator[None]:
    """What fails while an error is handled becomes a note on it."""
    try:
        yield
    except (StepError, CheckpointError) as second:
        error.add_note(f"stepc: and then: {type(second).__name__}: {str(second).partition(chr(10))[0]}")


def _settle(trainer: Trainer, error: BaseException) -> None:
    """Wait for the steps in flight, up to one that is not good."""
    if isinstance(error, StepError):
        if error.state_ok:
            trainer.drain()
    elif not isinstance(error, CheckpointError):
        try:
            trainer.wait(0)
        except (Exception, KeyboardInterrupt):
            raise
        except BaseException as second:  # `reject_if` leaves again: what it has not judged is kept, and not lost
            error.add_note(f"stepc: and then: {type(second).__name__}: {second}")
            trainer.drain()


def abandon_after_error(trainer: Trainer, error: BaseException) -> None:
    """The same where the processes can do nothing together any more: no last checkpoint; what is in flight is lost."""
    run = trainer.run
    trainer.events.is_leaving = True
    if trainer.in_flight or deleted_leaves(run.state):
        run.state = None
    trainer.give_back(trainer.unfinished())
    _attach_run(error, run)


def _attach_run(error: BaseException, run: Run[Any]) -> None:  # Any: a state
    """Every exception keeps the run that it ended, a user's own too: without checkpoints it is all that is left."""
    error.__dict__["run"] = run


def fill_in_run(trainer: Trainer) -> None:
    """Write what was counted into the run."""
    run, counts = trainer.run, trainer.counts
    run.why = trainer.callbacks.stopped or ""
    run.best = {one.metric: one.best for one in trainer.callbacks.best_values if one.best is not None}
    run.failures = dict(counts.failures)
    run.skipped, run.rollbacks = counts.num_skipped, counts.rollbacks
    run.logger_failures = dict(trainer.events.failures)
    run.log_seconds = dict(trainer.events.seconds)
    if run.ended:
        run.metrics = trainer.events.last_metrics()


def run_or_exit(run: Run[StateTree], signals: SignalWatch) -> Run[StateTree]:
    """The run, or the exception that its signal asks for. The handlers from before are back by now."""
    what = f"after step {run.steps}; the state is alive in `.run.state`."
    match run.ended:
        case "interrupted":
            signals.pass_on()
            end_by_signal_if_uncaught()
            raise Interrupted(f"Interrupted {what}", run=run)
        case "preempted":
            signals.pass_on()
            raise Preempted(f"Preempted {what}", run=run, signal=signals.received or signal.SIGTERM)
        case _:
            return run
