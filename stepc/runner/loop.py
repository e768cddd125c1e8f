"""`run`: puts the parts together, and sees to it that each way out leaves everything in order."""

import importlib
import importlib.util
import logging
import platform
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from stepc.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    Interrupted,
    NonFiniteError,
    Preempted,
    ResumeError,
    StepError,
)
from stepc.language.kinds import Batch
from stepc.language.state import State
from stepc.runner.agenda import Agenda, Evaluation, Hook, Profile
from stepc.runner.anchor import copy
from stepc.runner.arguments import check_arguments, check_replay, check_state, goes_back
from stepc.runner.cache import kept_programs
from stepc.runner.checkpoints import Checkpoints, Keeper
from stepc.runner.feed import Feed, Positioned, Source
from stepc.runner.flight import (
    Runnable,
    call_of,
    deleted_leaves,
    mesh_of,
    place_of,
    plan_of,
    skip_limit_of,
    steps_per_call_of,
)
from stepc.runner.policies import Ledger, Policy, policies_of
from stepc.runner.result import Run as Run
from stepc.runner.sameness import check_data, go_to
from stepc.runner.scribe import Logger as Logger
from stepc.runner.scribe import Scribe
from stepc.runner.signals import Signals, watched_signals
from stepc.runner.training import Training
from stepc.runner.watchdog import Watchdog

OnError = str | Policy | dict[str, str | Policy]


def run(
    step: Runnable,
    state: State,
    data: Iterable[Batch],
    *,
    steps: int | None = None,
    on_error: OnError = "raise",
    checkpoint: Checkpoints | None = None,
    loggers: Sequence[Logger] = (),
    log_every: int = 10,
    strict_loggers: bool = False,
    eval: tuple[int, Callable[[Any, Batch], Any], Iterable[Batch]] | None = None,
    hooks: Sequence[tuple[int, Hook]] = (),
    profile: tuple[int, int, str | Path] | None = None,
    window: int = 2,
    snapshot_every: int = 10,
    prefetch: int = 0,
    place: Callable[[Batch], Batch] | None = None,
    short_batches: str = "raise",
    donate_input: bool = False,
    watchdog_seconds: float | None = None,
    compilation_cache: str | Path | None = None,
) -> Run:
    """Train: one step for each batch.

    Meaning: for batch in data: state, metrics = step(state, batch).
    Why: a failure keeps the number of its step and is met as a policy says; no way out loses a state that could live.

    Args:
      step: a compiled step, or a reference.
      state: it is copied, and stays alive.
      data: batches. An iterator with `get_state` and `set_state` is resumed exactly.
      steps: the number of the last step, steps of earlier runs on the same checkpoints included; None: all the data.
      on_error: a policy or its name, "raise", "skip", "retry" or "rollback"; or a dict of them by kind of failure:
        "data", "nonfinite", "device", "save". Without a name a policy governs the first three, where it can.
      checkpoint: where to save, and to go on from.
      loggers: each is told of the first step, of every `log_every`-th, and of the last.
      log_every: in steps.
      strict_loggers: whether a logger that fails is an error. Otherwise it is left alone after three in a row.
      eval: (every, judge, data): `judge(state, batch)` gives metrics; their means are logged as `eval_…`.
      hooks: (every, hook): `hook(step, metrics, snapshot)`, where `snapshot()` gives a copy of the state.
      profile: (start, stop, directory): jax's profiler traces these steps.
      window: how many steps may be in flight. 0 waits for each.
      snapshot_every: in steps; how often a policy that goes on copies the state, and how many batches it keeps.
      prefetch: how many batches a thread reads ahead, and puts on the devices; 0 reads in the main thread.
      place: what to do with each batch that was read, instead.
      short_batches: of fewer rows than the first: "raise"; "drop" them; or "pad" them with copies of their first row
        that have a 0 in the leaf "mask", by which the loss must weigh its rows (`sc.Mean`).
      watchdog_seconds: writes the stacks of all threads to the log when no step was begun for so long; None for never.
      compilation_cache: a directory where jax keeps compiled programs, for this run and the next.
      donate_input: takes the caller's state instead of a copy.
    Errors: ConfigError before anything runs; a StepError from the original, with the number of the step;
      CheckpointError, ResumeError; Interrupted (a KeyboardInterrupt) for Ctrl-C and Preempted (exit code 143) for
      SIGTERM, at a step boundary, after a checkpoint. A policy that goes on after a failure on a device pays for a copy
      of the state, and the batches since.
    Source: ours.
    """
    asked = dict(locals())
    check_arguments(asked)
    policies = policies_of(on_error)
    check_state(state)
    source = Source(data, place or place_of(step, is_ahead=prefetch > 0), short_batches)
    check_replay(policies, is_positioned=isinstance(source.batches, Positioned), saves=checkpoint is not None)
    with ExitStack() as ways_out:
        ways_out.enter_context(kept_programs(compilation_cache))
        watchdog = Watchdog(watchdog_seconds)
        ways_out.callback(watchdog.close)
        signals = ways_out.enter_context(watched_signals())
        scribe = Scribe(loggers, log_every, strict_loggers)
        ledger = Ledger(policies)
        feed = Feed(source, num_ahead=prefetch, is_over=signals.is_over, reading=signals.reading)
        ways_out.callback(feed.close)
        agenda = Agenda(eval and Evaluation(*eval), hooks, profile and Profile(*profile))
        ways_out.callback(agenda.close)
        training = Training(
            call=call_of(step),
            plan=plan_of(step),
            run=Run(state if donate_input else copy(state)),
            feed=feed,
            ledger=ledger,
            scribe=scribe,
            signals=signals,
            agenda=agenda,
            keeper=None if checkpoint is None else _keeper(checkpoint, state, ledger, scribe, ways_out),
            watchdog=watchdog,
            steps=steps,
            window=window,
            steps_per_call=steps_per_call_of(step),
            skip_limit=skip_limit_of(step),
            snapshot_every=snapshot_every if goes_back(policies) else None,
        )
        _train(training, _header(step, signals))
    return _given_back(training.run, signals)


def _keeper(wanted: Checkpoints, state: State, ledger: Ledger, scribe: Scribe, ways_out: ExitStack) -> Keeper:
    # By name, and not at the top: `import stepc` must not need Orbax. Asking first keeps other failures a traceback.
    if importlib.util.find_spec("orbax") is None:
        raise ConfigError("Checkpoints need Orbax.", suggestion="Install it with: pip install 'stepc[checkpoint]'")
    vault = importlib.import_module("stepc.runner.vault").Vault(Path(wanted.directory), keep=wanted.keep, state=state)
    ways_out.callback(vault.close)
    return Keeper(wanted, vault, ledger, scribe)


def _train(training: Training, header: Mapping[str, object]) -> None:
    """The run itself; then whatever ended it, nothing is left in flight, unsaved or unread."""
    scribe, run = training.scribe, training.run
    try:
        _resume(training)
        scribe.event("start", training.number, level=logging.INFO, **header)
        training.loop()
        run.ended = _how_it_ended(training)
        if training.number == 0 and run.ended == "data" and training.feed.source.num_given == 0:
            raise DataError("There is no batch at all.", phase="data", step=1, state_ok=True)
        if training.keeper is None or not training.signals.is_over():
            scribe.tell_last()  # of a run that is to go on, only what the whole run would tell
        if training.keeper is not None:
            training.save()
            training.keeper.finish()
        if gone := deleted_leaves(jax.block_until_ready(run.state)):
            raise StepError(f"The state was lost: {gone[0]}.", phase="settle", step=run.steps, state_ok=False)
        scribe.event("end", run.steps, level=logging.INFO, ended=run.ended)
    except BaseException as error:  # it is raised again; what must be done first, is done
        _leave(training, error)
        raise
    finally:
        _report(training)


def _resume(training: Training) -> None:
    if training.keeper is None:
        return
    source = training.feed.source
    if training.position is None and not isinstance(source.batches, Positioned):
        training.scribe.event("resume_not_exact", 0, why="the data has no `get_state()` and `set_state(state)`")
    training.position = source.position()
    found = training.keeper.restore(training.run.state)
    if found is not None:
        training.run.state, training.number, training.position = found.state, found.number, found.position
        training.run.steps = found.number
        go_to(source, found.position, step=found.number)
        source.saved_rows = dict(found.batch)
        if training.keeper.wanted.check_data and found.last is not None and isinstance(source.batches, Positioned):
            tell = partial(training.scribe.event, "data_not_checked", found.number)
            check_data(source, found.last, after=found.position, step=found.number, tell=lambda why: tell(why=why))
        training.agenda.done = found.number
    # Without a checkpoint a log that is there is of a run that had none either: it began at 0, and so does this one.
    training.scribe.resume(training.number)
    if found is not None:
        done = training.steps is not None and found.number >= training.steps
        name, level = ("already_done", logging.WARNING) if done else ("resumed", logging.INFO)
        training.scribe.event(name, found.number, level=level, asked=training.steps)


def _header(step: Runnable, signals: Signals) -> dict[str, object]:
    return {
        "trains": repr(step),
        "mesh": mesh_of(step),
        "devices": f"{jax.device_count()} {jax.devices()[0].platform}",
        "stepc": version("stepc"),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "signals": "SIGINT and SIGTERM" if signals.is_protected else "no_signal_protection",
    }


def _how_it_ended(training: Training) -> str:
    match training.signals.received:
        case signal.SIGINT:
            return "interrupted"
        case signal.SIGTERM:
            return "preempted"
        case _:
            return "steps" if training.is_over() else "data"


def _leave(training: Training, error: BaseException) -> None:
    """Before an error goes on: save what lives, wait for what is being saved, and say on the error what else failed."""
    run = training.run
    if isinstance(error, KeyboardInterrupt):
        return  # a second Ctrl-C: at once
    try:
        if not isinstance(error, StepError | CheckpointError):
            training.settle(0)
        if isinstance(error, NonFiniteError) and error.state_ok:
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
        case StepError() | CheckpointError():
            error.run = run
        case _:
            pass


def _report(training: Training) -> None:
    run, ledger = training.run, training.ledger
    run.failures = dict(ledger.failures)
    run.skipped, run.rollbacks = ledger.num_skipped, ledger.rollbacks
    run.logger_failures = dict(training.scribe.failures)
    if run.ended:
        run.metrics = training.scribe.last_metrics()


def _given_back(run: Run, signals: Signals) -> Run:
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
