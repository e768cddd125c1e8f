"""`run`: puts the parts together, and sees to it that each way out leaves everything in order."""

import importlib
import importlib.util
import logging
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from stepc.errors import (
    ConfigError,
    DataError,
    StepError,
)
from stepc.language.kinds import Batch
from stepc.language.state import State, told_of_ties
from stepc.runner.agenda import Agenda, Evaluation, Hook, Profile
from stepc.runner.anchor import copy
from stepc.runner.arguments import check_arguments, check_replay, check_state, goes_back, told_of, told_of_state
from stepc.runner.cache import kept_programs
from stepc.runner.checkpoints import Checkpoints, Keeper
from stepc.runner.feed import Feed, Positioned, Source
from stepc.runner.flight import (
    Runnable,
    call_of,
    deleted_leaves,
    mesh_of,
    place_of,
    skip_limit_of,
    steps_per_call_of,
)
from stepc.runner.leaving import forsake, given_back, how_it_ended, leave, report
from stepc.runner.peers import Peers, peers_of
from stepc.runner.policies import Ledger, Policy, policies_of
from stepc.runner.programs import Programs
from stepc.runner.result import Run as Run
from stepc.runner.sameness import check_data, go_to
from stepc.runner.scribe import Logger as Logger
from stepc.runner.scribe import Scribe
from stepc.runner.signals import Signals, watched_signals
from stepc.runner.training import Training
from stepc.runner.verdict import Bad
from stepc.runner.watchdog import Watchdog, watchdog_told

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
    compare_every: int | None = None,
    prefetch: int = 0,
    place: Callable[[Batch], Batch] | None = None,
    short_batches: str = "raise",
    donate_input: bool = False,
    data_seconds: float | None = None,
    watchdog_seconds: float | None = None,
    exit_seconds: float | None = None,
    bad: Bad | None = None,
    max_recompiles: int | None = None,
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
      compare_every: in steps; how often the copies of the state on the devices are compared. It reads the state once.
      prefetch: how many batches a thread reads ahead, and puts on the devices; 0 reads in the main thread.
      place: what to do with each batch that was read, instead.
      short_batches: of fewer rows than the first: "raise"; "drop" them; or "pad" them with copies of their first row
        that have a 0 in the leaf "mask", by which the loss must weigh its rows (`sc.Mean`).
      watchdog_seconds: writes the stacks of all threads to the log when no step was begun for so long; None for never.
        On several processes it names the one that the others wait for, and ends all.
      exit_seconds: ends the process then, with exit code 75 and the last checkpoint; more than `watchdog_seconds`.
      data_seconds: how long a batch is waited for before that is a DataError; with `prefetch`.
      bad: `bad(metrics)` says in words why a step with these metrics, host floats, is not wanted, or None. It is asked
        about every settled step, also one that is made again; the policy for "nonfinite" governs what it refuses.
      max_recompiles: how often the step may be compiled again after its first call; None for any. Each is an event.
      compilation_cache: a directory where jax keeps compiled programs, for this run and the next.
      donate_input: takes the caller's state instead of a copy.
    Errors: ConfigError before anything runs; a StepError from the original, with the number of the step;
      CheckpointError, ResumeError; Interrupted (a KeyboardInterrupt) for Ctrl-C and Preempted (exit code 143) for
      SIGTERM, at a step boundary, after a checkpoint. A policy that goes on after a failure on a device pays for a copy
      of the state, and the batches since.
    On several processes each calls this, with the rows it has. All make the same steps and leave out the same; a signal
    to one, and an end of data on one, is one of all; what ends one ends all, by a PeerError that names it. Process 0
    tells the loggers.
    Source: ours.
    """
    check_arguments(asked := dict(locals()))
    policies = policies_of(on_error)
    check_state(state)
    with ExitStack() as ways_out:
        ways_out.enter_context(kept_programs(compilation_cache))
        peers = ways_out.enter_context(closing(peers_of(state)))
        peers.check_same("arguments", lambda: told_of(asked, policies))
        source = Source(data, place or place_of(step, is_ahead=prefetch > 0, many=peers.are_many), short_batches)
        check_replay(policies, checkpoint, is_positioned=isinstance(source.batches, Positioned))
        watchdog = ways_out.enter_context(closing(Watchdog(watchdog_seconds, peers.stalled, exit_seconds)))
        signals = ways_out.enter_context(watched_signals())
        scribe = Scribe(loggers if peers.is_first else (), log_every, strict_loggers)
        _tell_ties(state, scribe)
        ledger = Ledger(policies)
        feed = Feed(source, num_ahead=prefetch, seconds=data_seconds, is_over=signals.is_over, reading=signals.reading)
        agenda = Agenda(eval and Evaluation(*eval), hooks, profile and Profile(*profile))
        for one in (feed, agenda):
            ways_out.callback(one.close)
        training = Training(
            call=call_of(step),
            run=Run(state if donate_input else copy(state)),
            feed=feed,
            ledger=ledger,
            scribe=scribe,
            signals=signals,
            agenda=agenda,
            keeper=checkpoint and _keeper(checkpoint, state, ledger, scribe, peers, ways_out),
            watchdog=watchdog,
            peers=peers,
            steps=steps,
            window=window,
            steps_per_call=steps_per_call_of(step),
            skip_limit=skip_limit_of(step),
            bad=bad,
            programs=Programs(step, scribe, max_recompiles),
            snapshot_every=snapshot_every if goes_back(policies) else None,
            compare_every=compare_every,
        )
        _train(training, _header(step, signals))
    return given_back(training.run, signals)


def _keeper(
    wanted: Checkpoints, state: State, ledger: Ledger, scribe: Scribe, peers: Peers, ways_out: ExitStack
) -> Keeper:
    # By name, and not at the top: `import stepc` must not need Orbax. Asking first keeps other failures a traceback.
    if importlib.util.find_spec("orbax") is None:
        raise ConfigError("Checkpoints need Orbax.", suggestion="Install it with: pip install 'stepc[checkpoint]'")
    room = importlib.import_module("stepc.runner.vault")
    vault = room.Vault(
        Path(wanted.directory), keep=wanted.keep, timeout_seconds=wanted.timeout_seconds, state=state,
        commit=peers.commit,
    )  # fmt: skip
    ways_out.callback(vault.close)
    return Keeper(wanted, vault, ledger, scribe, peers.clock)


def _train(training: Training, header: Mapping[str, object]) -> None:
    """The run itself; then whatever ended it, nothing is left in flight, unsaved or unread."""
    scribe, run = training.scribe, training.run
    try:
        _resume(training)
        training.peers.check_same("state", lambda: told_of_state(run.state, training.number))
        scribe.event("start", training.number, level=logging.INFO, **header)
        training.loop()
        watchdog_told(training.watchdog, scribe)
        run.ended = how_it_ended(training)
        if training.number == 0 and run.ended == "data" and training.peers.has_none(training.feed):
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
        (forsake if training.peers.ends_all(error, training.number) else leave)(training, error)
        raise
    finally:
        report(training)


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


def _tell_ties(state: State, scribe: Scribe) -> None:
    if ties := told_of_ties(state):
        scribe.event("tied_leaves", 0, leaves=ties, why="each is copied, and trained apart")


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
