"""Steps that were given to the devices and are not done: how to call a step, and how to wait for what it made."""

import logging
import signal
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, assert_never

import jax

from stepc._runner.callbacks import Callbacks, is_due
from stepc._runner.checkpoint import CheckpointKeeper
from stepc._runner.data import (
    DataItem,
    DataReader,
    EndOfData,
    ReadFailure,
    data_failure,
    data_fingerprint,
)
from stepc._runner.events import EventLog
from stepc._runner.events import Logger as Logger
from stepc._runner.multihost import Peers
from stepc._runner.pending import (
    Bad,
    Call,
    PendingStep,
    Snapshot,
    StepStatus,
    changes_of_names,
    check_metrics,
    check_verdict,
    copy_state,
    deleted_leaves,
    nonfinite_failure,
    step_failure,
    wait_for_step,
)
from stepc._runner.policies import FailureCounts, Raise, Retry, Rollback, Skip
from stepc._runner.recompilation import RecompilationMonitor
from stepc._runner.signals import LeaveLoop, SignalWatch
from stepc._runner.watchdog import StallWatcher, log_watchdog_firings
from stepc.errors import (
    CheckpointError,
    DataError,
    DeviceError,
    Interrupted,
    NonFiniteError,
    PeerError,
    Preempted,
    ResumeError,
    StepError,
)

KINDS = {DataError: "data", NonFiniteError: "nonfinite", DeviceError: "device"}
EXHAUSTED = "the policy is to raise"


@dataclass
class Run:
    """What a run did.

    Args:
      state: the state after the last finished step; alive.
      steps: the number of the last finished step, those of earlier runs on the same checkpoints among them.
      ended: "steps", "data", "interrupted" or "preempted".
      metrics: those of the last finished step, as floats.
      failures: how many of each kind there were, also those that a policy went on from.
      skipped: how many steps, and how many reads of the data, were left out.
      rollbacks: how often the run went back.
      logger_failures: how often each logger raised, by the name of its class.
      log_seconds: how long each logger took, by the name of its class.
    """

    state: Any  # Any: a state, whatever it is made of; None in the `.run` of an error that left none
    steps: int = 0
    ended: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)
    skipped: int = 0
    rollbacks: int = 0
    logger_failures: dict[str, int] = field(default_factory=dict)
    log_seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class Trainer:
    """What `run` puts together: each part has a file of its own, and this is where they meet."""

    call: Call
    run: Run
    feed: DataReader
    ledger: FailureCounts
    scribe: EventLog
    signals: SignalWatch
    agenda: Callbacks
    keeper: CheckpointKeeper | None
    watchdog: StallWatcher
    peers: Peers
    steps: int | None
    window: int
    steps_per_call: int
    skip_limit: int | None
    bad: Bad | None
    programs: RecompilationMonitor
    snapshot_every: int | None
    compare_every: int | None
    number: int = 0
    position: Any = None  # Any: where the data stands after the last settled step
    last: DataItem | None = None  # what that step was given
    flight: deque[PendingStep] = field(default_factory=deque)
    anchor: Snapshot | None = None
    last_checked: Any = None  # Any: the names of the metrics of the last call

    def loop(self) -> None:
        """Until the steps are made, the data ends or a signal came: take a batch, make a step, settle an older one."""
        self.drop_anchor()
        while True:
            found: DataItem | ReadFailure | EndOfData = EndOfData()
            try:
                self.peers.at("data", self.number)
                if not self.is_over():
                    found = self.feed.read()
                found = self.peers.agreed(found, self.number, self.feed.source.spec, self.signals)
                match found:
                    case EndOfData():
                        self.settle(0)
                        return
                    case ReadFailure():
                        self.settle(0)
                        raise data_failure(found, self.number + 1) from found.error
                    case DataItem():
                        self.dispatch(found)
                        self.settle(self.window)
                        self.between()
            except LeaveLoop:
                continue  # a signal, while a batch was waited for
            except StepError as failure:
                self.recover(failure, found)

    def is_over(self) -> bool:
        """Whether no further step is to be made."""
        return self.signals.is_over() or (self.steps is not None and self.number >= self.steps)

    def dispatch(self, item: DataItem) -> None:
        """Give a batch to the step. What fails here is this step's, once the older ones have settled."""
        first = self.number + 1
        self.watchdog.beat(self.number)
        log_watchdog_firings(self.watchdog, self.scribe)
        if self.anchor is not None:
            self.anchor.kept.append(item)
        if not item.is_hole:
            try:
                self.programs.prepare(self.number, self.run.state, item.batch)
                state, metrics, watch = self.call(self.run.state, item.batch)
            except Exception as error:  # whatever the step raises: its class says little, its phase says much
                self.settle(0)
                is_alive = not deleted_leaves(self.run.state)
                is_device = self.programs.is_built and isinstance(error, jax.errors.JaxRuntimeError)
                phase = "build" if is_alive and not is_device else "dispatch"
                raise step_failure(error, phase, first, state_ok=is_alive) from error
            if not isinstance(metrics, dict) or metrics.keys() != self.last_checked:
                check_metrics(metrics, step=first, num_steps=self.steps_per_call)
                if self.last_checked is None:
                    self.programs.note_first(self.run.state, state)
                else:
                    self.scribe.event("metrics_changed", first, names=changes_of_names(self.last_checked, metrics))
                self.last_checked = metrics.keys()
            self.run.state = state
            self.flight.append(PendingStep(first, item, metrics, watch))
        self.number += self.steps_per_call
        self.programs.note(first)

    def settle(self, most: int) -> None:
        """Wait for the oldest calls until at most `most` are in flight."""
        while len(self.flight) > most:
            flying = self.flight[0]
            landed = wait_for_step(flying)
            for row in range(self.steps_per_call if landed is not None or self.bad is not None else 0):
                self.judge(flying, landed, row)
            self.flight.popleft()
            self.position, self.last = flying.item.after, flying.item
            self.run.steps = flying.first + self.steps_per_call - 1
            for row in range(self.steps_per_call):
                self.scribe.settled(flying.first + row, flying.metrics, row=row)

    def drain(self) -> None:
        """Wait for what is in flight and tell nobody, up to a step that is not finite and was not skipped."""
        while self.flight:
            landed = wait_for_step(flying := self.flight[0])
            if landed is not None and not (landed.is_finite | landed.is_skipped).all():
                return
            self.flight.popleft()
            self.position, self.last = flying.item.after, flying.item
            self.run.steps = flying.first + self.steps_per_call - 1

    def judge(self, flying: PendingStep, landed: StepStatus | None, row: int) -> None:
        """Refuse a step that is not finite; count one that left the state as it was."""
        step = flying.first + row
        skips = self.ledger.skipped.setdefault("in the program", set())
        if landed is not None and landed.is_skipped[row]:
            if step not in skips:
                skips.add(step)
                self.scribe.event("skipped", step, why="not finite; the state is as it was")
            limit = self.skip_limit
            if limit is not None and all(step - back in skips for back in range(limit)):
                why = f", and so were the {limit - 1} before it: skip_nonfinite allows fewer than {limit} in a row"
                raise nonfinite_failure(flying, step, row, state_ok=True, why=why if limit > 1 else "")
        elif landed is not None and not landed.is_finite[row]:
            raise nonfinite_failure(flying, step, row, state_ok=False)
        elif self.bad is not None:
            check_verdict(self.bad, flying.metrics, row=row, step=step)

    def between(self) -> None:
        """Do what is due after this step, with everything settled."""
        per = self.steps_per_call
        self.peers.at("between steps", self.number)
        saves = False
        compares = is_due(self.compare_every, self.number, per)
        copies = self.anchor is not None and self.number - self.anchor.number >= (self.snapshot_every or 1)
        if self.keeper is not None:
            self.keeper.poll()
            saves = self.keeper.is_due(self.number, steps_per_call=per)
        if saves or copies or compares or self.agenda.is_due(self.number, per):
            self.settle(0)
            if compares:
                self.peers.compare(self.run.state, self.number)
            if copies:
                self.drop_anchor()
            # Before the save: what a run goes on from, has been judged; a process that dies between would lose that.
            self.agenda.act(self.number, per, self.run.state, self.scribe)
            if saves:
                self.save()

    def save(self) -> None:
        """Begin a checkpoint of the settled state, if there is none of this step."""
        spec = self.feed.source.spec
        if self.keeper is not None and self.number > self.keeper.saved:
            rows = {} if spec is None else spec.rows()
            self.keeper.save(
                self.number,
                self.run.state,
                self.position,
                rows,
                None if self.peers.are_many else data_fingerprint(self.last),
            )

    def recover(self, failure: StepError, found: DataItem | ReadFailure | EndOfData) -> None:
        """Log a failure; then raise it, or bring back what the policy promised."""
        kind = KINDS.get(type(failure))
        place = failure.step
        if isinstance(found, ReadFailure) and kind == "data":
            # To skip goes on to another read; to read again begins with as many batches given.
            place = found.given if isinstance(self.ledger.policies[kind], Retry) else found.place
        refusal = self.refusal(kind, failure, found, place)
        what = str(failure).partition("\n")[0]
        policy = self.ledger.policies.get(kind or "", Raise())
        self.scribe.event(
            "failure", failure.step, level=logging.ERROR, what=what, phase=failure.phase, policy=policy
        )  # fmt: skip
        if refusal is not None or kind is None:
            if refusal not in (None, EXHAUSTED):
                failure.add_note(f"stepc: {refusal}")
            raise self.peers.raised(failure)
        match policy:
            case Retry():
                wait = float(policy.wait_seconds) * 2 ** (self.ledger.attempts[kind, place] - 1)
                self.signals.wait(wait)
                self.feed.retry(found) if kind == "data" else self.rewind(leave_out=None)
            case Skip():
                self.feed.skip() if kind == "data" else self.rewind(leave_out=failure.step)
            case Rollback():
                self.roll_back(policy, failure.step)
            case Raise():
                raise failure
            case _:
                assert_never(policy)

    def refusal(self, kind: str | None, failure: StepError, found: object, place: int) -> str | None:
        """Why a failure is raised; None if the run goes on."""
        if kind is None:
            self.ledger.failures[failure.phase] += 1
            return EXHAUSTED
        why = self.ledger.refusal(kind, place)
        policy = self.ledger.policies[kind]
        if why is None and kind == "device" and self.peers.are_many:
            return "the other processes are at the same step, and cannot be brought back"
        if why is None and isinstance(found, ReadFailure) and kind == "data":
            why = found.refusal(is_retry=isinstance(policy, Retry))
        if why is None and kind == "nonfinite" and failure.state_ok and isinstance(policy, Skip):
            return "skip_nonfinite has skipped as often as it may"
        return why

    def drop_anchor(self) -> None:
        """Copy the settled state, if a policy needs it, to come back to."""
        if self.snapshot_every is not None:
            first = self.anchor is None
            self.anchor = Snapshot(copy_state(self.run.state), self.number, self.position, self.steps_per_call)
            if first:
                self.scribe.event("snapshots", self.number, level=logging.INFO, price=self.anchor.price())

    def rewind(self, *, leave_out: int | None) -> None:
        """Go back to the anchor, and give again what was given since, but for the step `leave_out`."""
        anchor = self._anchor()
        self._give_again(anchor.replay(leave_out))
        self._stand_at(anchor.state, anchor.number, anchor.after)

    def roll_back(self, policy: Rollback, failed_at: int) -> None:
        """Return to the last checkpoint, or to the anchor, and go on as the policy says."""
        anchor = self._anchor()
        later = anchor.kept[anchor.place_of(failed_at) + 1 :]
        restored = None if self.keeper is None else self.keeper.restore(anchor.state)
        if restored is None:
            self._give_again(later if policy.data == "skip" else anchor.replay(None))
            state, number, after = anchor.state, anchor.number, anchor.after
        else:
            state, number, after = restored.state, restored.number, restored.position
            if policy.data == "skip":
                self._give_again(later)
            else:
                self.feed.go_to(after)
        self.scribe.trim(number)
        self.scribe.event("rollback", failed_at, to=number, data=policy.data)
        self.agenda.go_back(number)
        self.ledger.forget_skips_after(number)
        self._stand_at(state, number, after)

    def _anchor(self) -> Snapshot:
        if self.anchor is None:
            raise RuntimeError("a policy that goes on has an anchor")
        return self.anchor

    def _give_again(self, items: Sequence[DataItem]) -> None:
        """Put these before what is read next."""
        self.feed.again.extendleft(reversed(items))

    def _stand_at(self, state: Any, number: int, after: Any) -> None:  # Any: a state, and where the data stands
        self.flight.clear()
        self.run.state, self.number, self.position, self.last = copy_state(state), number, after, None
        self.run.steps = number
        self.anchor = Snapshot(state, number, after, self.steps_per_call)


def end_reason(training: Trainer) -> str:
    """By a signal, because the steps are made, or because the data ended."""
    match training.signals.received:
        case signal.SIGINT:
            return "interrupted"
        case signal.SIGTERM:
            return "preempted"
        case _:
            return "steps" if training.is_over() else "data"


def finish_after_error(training: Trainer, error: BaseException) -> None:
    """Before an error goes on: save what lives, wait for what is being saved, and say on the error what else failed."""
    run = training.run
    if isinstance(error, KeyboardInterrupt):
        return  # a second Ctrl-C: at once
    try:
        if not isinstance(error, StepError | CheckpointError):
            training.settle(0)
        if isinstance(error, StepError) and error.state_ok:
            training.drain()
        is_good = not training.flight and not (isinstance(error, StepError) and not error.state_ok)
        if not is_good or deleted_leaves(run.state):
            kept: Any = None if training.anchor is None else copy_state(training.anchor.state)  # Any: a state, or none
            run.state = kept
            run.steps = run.steps if training.anchor is None else training.anchor.number
        if training.keeper is not None:
            if is_good and not isinstance(error, CheckpointError | ResumeError) and training.number > 0:
                training.save()
            training.keeper.finish()
    except (StepError, CheckpointError) as second:
        error.add_note(f"stepc: and then: {type(second).__name__}: {str(second).partition(chr(10))[0]}")
    match error:
        case StepError() | CheckpointError() | PeerError():
            error.run = run
        case _:
            pass


def abandon_after_error(training: Trainer, error: BaseException) -> None:
    """The same, where nothing can be done together any more: no last checkpoint; a state in flight is lost."""
    run = training.run
    run.state = None if training.flight or deleted_leaves(run.state) else run.state
    match error:
        case StepError() | CheckpointError() | PeerError():
            error.run = run
        case _:
            pass


def fill_in_run(training: Trainer) -> None:
    """Write what was counted into the run."""
    run, ledger = training.run, training.ledger
    run.failures = dict(ledger.failures)
    run.skipped, run.rollbacks = ledger.num_skipped, ledger.rollbacks
    run.logger_failures = dict(training.scribe.failures)
    run.log_seconds = dict(training.scribe.seconds)
    if run.ended:
        run.metrics = training.scribe.last_metrics()


def run_or_exit(run: Run, signals: SignalWatch) -> Run:
    """The run, or the exception that its signal asks for; the handlers are those from before."""
    what = f"after step {run.steps}; the state is alive in `.run.state`."
    match run.ended:
        case "interrupted":
            signals.pass_on()
            raise Interrupted(f"Interrupted {what}", run=run)
        case "preempted":
            signals.pass_on()
            raise Preempted(f"Preempted {what}", run=run)
        case _:
            return run
