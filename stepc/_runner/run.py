"""What a run did."""

import importlib
import importlib.util
import logging
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from stepc._language.kinds import Batch
from stepc._language.state import State, describe_tied_leaves, leaves_by_path
from stepc._runner.callbacks import Callbacks, Evaluation, Hook, Profile
from stepc._runner.checkpoint import CheckpointKeeper, Checkpoints, is_positive
from stepc._runner.data import DataReader, Positioned, Source, check_data, go_to
from stepc._runner.events import EventLog
from stepc._runner.events import Logger as Logger
from stepc._runner.multihost import Peers, peers_for, replica_digests
from stepc._runner.pending import (
    Bad,
    DiagnosableStep,
    Runnable,
    batch_placer,
    call_of,
    copy_state,
    deleted_leaves,
    mesh_of,
    skip_limit_of,
    steps_per_call_of,
)
from stepc._runner.policies import FailureCounts, Policy, Raise, Rollback, faults_of, policies_of
from stepc._runner.recompilation import RecompilationMonitor
from stepc._runner.signals import SignalWatch, watched_signals
from stepc._runner.trainer import (
    Run,
    Trainer,
    abandon_after_error,
    end_reason,
    fill_in_run,
    finish_after_error,
    run_or_exit,
)
from stepc._runner.watchdog import StallWatcher, log_watchdog_firings
from stepc.errors import ConfigError, DataError, StepError

SMALL_TOO = {"jax_persistent_cache_min_compile_time_secs": 0.0, "jax_persistent_cache_min_entry_size_bytes": -1}
WANTED = ("jax_compilation_cache_dir", *SMALL_TOO)


@contextmanager
def compilation_cache_at(directory: str | Path | None) -> Iterator[None]:
    """Let jax keep compiled programs there while this is entered, also small ones; None changes nothing."""
    if directory is None:
        yield
        return
    before = {name: jax.config.values[name] for name in WANTED}
    try:
        _set({"jax_compilation_cache_dir": str(directory), **SMALL_TOO})
        yield
    finally:
        _set(before)


def _set(wanted: dict[str, object]) -> None:
    for name, value in wanted.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # jax looks for the directory once, at its first compilation


NOT_ASKED = "`run` cannot do what it was asked for."


def check_arguments(asked: Mapping[str, Any]) -> None:  # Any: it is checked here
    """Refuse arguments that cannot be.

    Errors: ConfigError.
    """
    steps, place, checkpoint, data = (asked[name] for name in ("steps", "place", "checkpoint", "data"))
    faults: list[tuple[str, str, object]] = []
    if not callable(asked["step"]):
        faults.append(("step", "a compiled step", asked["step"]))
    if not isinstance(data, Iterable):
        faults.append(("data", "an iterable of batches", data))
    if steps is not None and not _is_count(steps):
        faults.append(("steps", "a positive integer or None", steps))
    if asked["compare_every"] is not None and not _is_count(asked["compare_every"]):
        faults.append(("compare_every", "a positive integer or None", asked["compare_every"]))
    faults += [
        (name, "a positive integer", asked[name])
        for name in ("log_every", "snapshot_every")
        if not _is_count(asked[name])
    ]
    faults += [
        (name, "an integer from 0", asked[name])
        for name in ("window", "prefetch")
        if not (asked[name] == 0 and type(asked[name]) is int or _is_count(asked[name]))
    ]
    if checkpoint is not None and not isinstance(checkpoint, Checkpoints):
        faults.append(("checkpoint", "sc.Checkpoints(directory, every=…) or None", checkpoint))
    faults += [*_faults_of_watching(asked), *_faults_of_short_batches(asked), *_schedules(asked)]
    if place is not None and not callable(place):
        faults.append(("place", "a function of a batch, or None", place))
    facts = [(name, f"expected {expected}, got {got!r}") for name, expected, got in faults]
    facts += faults_of(asked["on_error"])
    if facts:
        raise ConfigError(NOT_ASKED, facts=facts)
    _check_debugging(asked["step"])


def _faults_of_watching(asked: Mapping[str, Any]) -> list[tuple[str, str, object]]:  # Any: it is checked here
    faults: list[tuple[str, str, object]] = []
    if asked["bad"] is not None and not callable(asked["bad"]):
        faults.append(("bad", "a function of metrics, or None", asked["bad"]))
    most = asked["max_recompiles"]
    if most is not None and not (most == 0 and type(most) is int or _is_count(most)):
        faults.append(("max_recompiles", "an integer from 0, or None", most))
    waits = {name: asked[name] for name in ("watchdog_seconds", "exit_seconds", "data_seconds")}
    odd = [name for name, seconds in waits.items() if seconds is not None and not is_positive(seconds)]
    faults += [(name, "a positive number or None", waits[name]) for name in odd]
    watchdog, end = waits["watchdog_seconds"], waits["exit_seconds"]
    if end is not None and not {"watchdog_seconds", "exit_seconds"} & set(odd) and not (watchdog and watchdog < end):
        faults.append(("exit_seconds", f"more than watchdog_seconds={watchdog!r}, which comes first", end))
    if waits["data_seconds"] is not None and asked["prefetch"] == 0:
        faults.append(("prefetch", "1 or more with data_seconds: only a thread's read can be left", 0))
    return faults


def _faults_of_short_batches(asked: Mapping[str, Any]) -> list[tuple[str, str, object]]:  # Any: it is checked here
    faults: list[tuple[str, str, object]] = []
    if asked["short_batches"] not in ("raise", "drop", "pad"):
        faults.append(("short_batches", '"raise", "drop" or "pad"', asked["short_batches"]))
    if asked["short_batches"] == "pad" and steps_per_call_of(asked["step"]) > 1:
        faults.append(("short_batches", '"raise" or "drop" for a step that repeats', "pad"))
    return faults


def _check_debugging(step: object) -> None:
    """jax makes a step again, operation by operation, when it finds NaN; the state was donated to the first time."""
    on = [name for name in ("jax_debug_nans", "jax_debug_infs") if getattr(jax.config, name)]  # as contexts set them
    if isinstance(step, DiagnosableStep) and on:
        raise ConfigError(
            f"A step that its state is donated to cannot run with {' and '.join(on)}.",
            facts=(("expected", "off"), ("got", "on")),
            suggestion="Switch them off: `run` names the step, microbatch and leaf. Or run `step.meaning`.",
        )


def _schedules(asked: Mapping[str, Any]) -> list[tuple[str, str, object]]:
    faults: list[tuple[str, str, object]] = []
    match asked["eval"]:
        case None:
            pass
        case (every, judge, data) if _is_count(every) and callable(judge) and isinstance(data, Iterable):
            if iter(data) is data:
                faults.append(("eval", "data that can be gone through again, such as a list", data))
        case other:
            faults.append(("eval", "(every, judge, data)", other))
    match asked["profile"]:
        case None:
            pass
        case (start, stop, _) if _is_count(start) and _is_count(stop) and start <= stop:
            pass
        case other:
            faults.append(("profile", "(start, stop, directory)", other))
    for hook in asked["hooks"]:
        match hook:
            case (every, function) if _is_count(every) and callable(function):
                pass
            case other:
                faults.append(("hooks", "pairs (every, function)", other))
    return faults


def check_state(state: object) -> None:
    """Refuse a state that holds anything but living arrays.

    Errors: ConfigError with each path.
    """
    odd, dead = [], []
    for path, leaf in leaves_by_path(state):
        if not isinstance(leaf, jax.Array):
            odd.append((path or "state", f"expected a jax array, got {type(leaf).__name__}"))
        elif leaf.is_deleted():
            dead.append((path, "deleted"))
    if odd or not jax.tree.leaves(state):
        facts = odd or [("state", "expected arrays, got none")]
        raise ConfigError("This is not a state.", facts=facts, suggestion="`step.init(params)` makes one.")
    if dead:
        raise ConfigError(
            "This state was donated to an earlier step or run: its arrays are deleted.",
            facts=dead[:5],
            suggestion="Use the state that was returned: `run = sc.run(…)`, then `run.state`.",
        )


def arguments_by_name(asked: Mapping[str, Any], policies: Mapping[str, Policy]) -> dict[str, str]:  # Any: as above
    """What must be the same on all processes of a run, each in a line."""
    same = ("step", "steps", "checkpoint", "window", "snapshot_every", "compare_every", "watchdog_seconds")
    every = [None if asked["eval"] is None else asked["eval"][0], [hook[0] for hook in asked["hooks"]]]
    return {name: repr(asked[name]) for name in same} | {"on_error": repr(policies), "eval and hooks": repr(every)}


def state_by_path(state: Any, number: int) -> dict[str, str]:  # Any: a state
    """The same of a state, with the digest of each leaf that is whole on every device."""
    found = replica_digests(state)
    return {"step": str(number)} | {
        path: f"{leaf.dtype}{list(leaf.shape)} digest {found.get(path, 'none')}" for path, leaf in leaves_by_path(state)
    }


def check_replay(policies: Mapping[str, Policy], checkpoint: Checkpoints | None, *, is_positioned: bool) -> None:
    """Refuse a promise to give batches again that the data cannot keep.

    Errors: ConfigError.
    """
    if checkpoint is None or is_positioned:
        return
    remedy = "Give an iterator with `get_state()` and `set_state(state)`"
    if checkpoint.exact_resume:
        facts = [("exact_resume", "a run that goes on begins where the data stood, and this data cannot say that")]
        raise ConfigError(NOT_ASKED, facts=facts, suggestion=f"{remedy}, such as those of Grain.")
    facts = [
        (f"on_error[{kind!r}]", f"{policy!r} returns to a checkpoint, and the data cannot")
        for kind, policy in policies.items()
        if isinstance(policy, Rollback) and policy.data == "replay"
    ]
    if facts:
        raise ConfigError(NOT_ASKED, facts=facts, suggestion=f'{remedy}, or say Rollback(data="skip").')


def goes_back(policies: Mapping[str, Policy]) -> bool:
    """Whether a policy promises to go on from a failure that takes the state."""
    return any(not isinstance(policy, Raise) for kind, policy in policies.items() if kind in ("nonfinite", "device"))


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 1


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
        ways_out.enter_context(compilation_cache_at(compilation_cache))
        peers = ways_out.enter_context(closing(peers_for(state)))
        peers.check_same("arguments", lambda: arguments_by_name(asked, policies))
        source = Source(data, place or batch_placer(step, is_ahead=prefetch > 0, many=peers.are_many), short_batches)
        check_replay(policies, checkpoint, is_positioned=isinstance(source.batches, Positioned))
        watchdog = ways_out.enter_context(closing(StallWatcher(watchdog_seconds, peers.stalled, exit_seconds)))
        signals = ways_out.enter_context(watched_signals())
        scribe = EventLog(loggers if peers.is_first else (), log_every, strict_loggers)
        _tell_ties(state, scribe)
        ledger = FailureCounts(policies)
        feed = DataReader(
            source, num_ahead=prefetch, seconds=data_seconds, is_over=signals.is_over, reading=signals.reading
        )
        agenda = Callbacks(eval and Evaluation(*eval), hooks, profile and Profile(*profile))
        for one in (feed, agenda):
            ways_out.callback(one.close)
        training = Trainer(
            call=call_of(step),
            run=Run(state if donate_input else copy_state(state)),
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
            programs=RecompilationMonitor(step, scribe, max_recompiles),
            snapshot_every=snapshot_every if goes_back(policies) else None,
            compare_every=compare_every,
        )
        _train(training, _header(step, signals))
    return run_or_exit(training.run, signals)


def _keeper(
    wanted: Checkpoints, state: State, ledger: FailureCounts, scribe: EventLog, peers: Peers, ways_out: ExitStack
) -> CheckpointKeeper:
    # By name, and not at the top: `import stepc` must not need Orbax. Asking first keeps other failures a traceback.
    if importlib.util.find_spec("orbax") is None:
        raise ConfigError("Checkpoints need Orbax.", suggestion="Install it with: pip install 'stepc[checkpoint]'")
    room = importlib.import_module("stepc._runner.checkpoint_store")
    vault = room.CheckpointStore(
        Path(wanted.directory), keep=wanted.keep, timeout_seconds=wanted.timeout_seconds, state=state,
        commit=peers.commit,
    )  # fmt: skip
    ways_out.callback(vault.close)
    return CheckpointKeeper(wanted, vault, ledger, scribe, peers.clock)


def _train(training: Trainer, header: Mapping[str, object]) -> None:
    """The run itself; then whatever ended it, nothing is left in flight, unsaved or unread."""
    scribe, run = training.scribe, training.run
    try:
        _resume(training)
        training.peers.check_same("state", lambda: state_by_path(run.state, training.number))
        scribe.event("start", training.number, level=logging.INFO, **header)
        training.loop()
        log_watchdog_firings(training.watchdog, scribe)
        run.ended = end_reason(training)
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
        (abandon_after_error if training.peers.ends_all(error, training.number) else finish_after_error)(
            training, error
        )
        raise
    finally:
        fill_in_run(training)


def _resume(training: Trainer) -> None:
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


def _tell_ties(state: State, scribe: EventLog) -> None:
    if ties := describe_tied_leaves(state):
        scribe.event("tied_leaves", 0, leaves=ties, why="each is copied, and trained apart")


def _header(step: Runnable, signals: SignalWatch) -> dict[str, object]:
    return {
        "trains": repr(step),
        "mesh": mesh_of(step),
        "devices": f"{jax.device_count()} {jax.devices()[0].platform}",
        "stepc": version("stepc"),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "signals": "SIGINT and SIGTERM" if signals.is_protected else "no_signal_protection",
    }
