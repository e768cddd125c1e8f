"""How a run ends, whatever ends it: what is saved, waited for, counted and said."""

import signal
from typing import Any

from stepc.errors import CheckpointError, Interrupted, PeerError, Preempted, ResumeError, StepError
from stepc.runner.anchor import copy
from stepc.runner.flight import deleted_leaves
from stepc.runner.result import Run
from stepc.runner.signals import Signals
from stepc.runner.training import Training


def how_it_ended(training: Training) -> str:
    """By a signal, because the steps are made, or because the data ended."""
    match training.signals.received:
        case signal.SIGINT:
            return "interrupted"
        case signal.SIGTERM:
            return "preempted"
        case _:
            return "steps" if training.is_over() else "data"


def leave(training: Training, error: BaseException) -> None:
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
            kept: Any = None if training.anchor is None else copy(training.anchor.state)  # Any: a state, or none
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


def forsake(training: Training, error: BaseException) -> None:
    """The same, where nothing can be done together any more: no last checkpoint; a state in flight is lost."""
    run = training.run
    run.state = None if training.flight or deleted_leaves(run.state) else run.state
    match error:
        case StepError() | CheckpointError() | PeerError():
            error.run = run
        case _:
            pass


def report(training: Training) -> None:
    """Write what was counted into the run."""
    run, ledger = training.run, training.ledger
    run.failures = dict(ledger.failures)
    run.skipped, run.rollbacks = ledger.num_skipped, ledger.rollbacks
    run.logger_failures = dict(training.scribe.failures)
    run.log_seconds = dict(training.scribe.seconds)
    if run.ended:
        run.metrics = training.scribe.last_metrics()


def given_back(run: Run, signals: Signals) -> Run:
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
