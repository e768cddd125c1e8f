"""`run`: the arguments of a run, checked all at once, and the parts that it puts together. It knows no loop."""

import inspect
import logging
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from signal import Signals
from types import FunctionType, MethodType
from typing import Any, TypeAlias

import jax

from stepc._language.kinds import Batch
from stepc._language.pipeline import Pipeline, Transform
from stepc._language.state import State, describe_tied_leaves, leaves_by_path
from stepc._runner.arguments import ArgumentFaults
from stepc._runner.best import BestValue
from stepc._runner.callbacks import EVALUATED, Callbacks, EarlyStopping, Eval, Hook, Profile
from stepc._runner.checkpoint import CheckpointKeeper, Checkpoints, checkpoint_store, pipeline_changes
from stepc._runner.data import DataReader, Positioned, Source, check_data, go_to
from stepc._runner.events import EventLog, Logger, Meter
from stepc._runner.multihost import Peers, peers_for, replica_digests
from stepc._runner.pending import (
    AnyStep,
    CompiledStep,
    PlainStep,
    RejectIf,
    Runnable,
    as_step,
    copy_state,
    deleted_leaves,
)
from stepc._runner.policies import FailureCounts, Policy, Raise, Rollback, check_policies, policies_of
from stepc._runner.recompilation import RecompilationMonitor
from stepc._runner.signals import SignalWatch, watched_signals
from stepc._runner.trainer import (
    Run,
    StateTree,
    Trainer,
    abandon_after_error,
    end_reason,
    fill_in_run,
    finish_after_error,
    run_or_exit,
)
from stepc._runner.watchdog import StallWatcher, Watchdog, log_stalls
from stepc.errors import ConfigError, DataError, StepError

INVALID = "Invalid arguments to `run`."
SHOWN = 5  # how many keys of a batch a message names


@dataclass(frozen=True)
class Data:
    """Batches, and how `run` reads them.

    Meaning: `for batch in loader`, each one checked against the first, copied and placed on the devices. A numpy array
      that is read-only, and not a view of one that is not, is not copied.
    Why: a slow, short or hanging loader needs an answer, and the plain iterable that `run` also takes has none.

    Args:
      loader: an iterable of batches. An iterator with `get_state` and `set_state` is resumed exactly.
      prefetch: how many batches a thread reads ahead and puts on the devices; 0 reads in the main thread. Where the
        state is on one CPU, batches stay where they were read. It reads no more than `steps` asks for. A run that ends
        earlier leaves an iterator with `set_state` where its last step stands; what it has read ahead of another one is
        lost, and the event `batches_lost` says how much.
      short_batches: what becomes of a batch with fewer rows than the first: "raise"; "drop"; or "pad" with copies of
        its first row that have a 0 in the leaf "mask", by which the loss must weigh its rows (`sc.Mean`).
      signatures: "one", every batch has the shapes of the first; or "many", for buckets of lengths and curricula: the
        step is compiled once for each set of shapes, `Watchdog(max_recompiles=…)` bounds how many, and a short batch is
        one of fewer rows than an earlier one of its other sizes.
      timeout_seconds: how long to wait for a batch before that is a DataError; needs `prefetch`.
      place: puts a batch on the devices, instead of `run`.
    Errors: FieldTypeError or ConfigError with all faults.
    Example:
      >>> Data([], prefetch=2, timeout_seconds=60)
      Data(loader=[], prefetch=2, short_batches='raise', signatures='one', timeout_seconds=60, place=None)
    """

    loader: Iterable[Batch]
    prefetch: int = 0
    short_batches: str = "raise"
    signatures: str = "one"
    timeout_seconds: float | None = None
    place: Callable[[Batch], Batch] | None = None

    def __post_init__(self) -> None:
        faults = ArgumentFaults("Data")
        _check_loader("loader", self.loader, "an iterable of batches", faults)
        faults.count("prefetch", self.prefetch, least=0)
        faults.choice("short_batches", self.short_batches, ("raise", "drop", "pad"))
        faults.choice("signatures", self.signatures, ("one", "many"))
        faults.seconds("timeout_seconds", self.timeout_seconds)
        faults.callable_("place", self.place, "a function of a batch, or None", optional=True)
        if self.timeout_seconds is not None and self.prefetch == 0:
            faults.wrong_value("prefetch", "1 or more with timeout_seconds: only a thread's read can be given up", 0)
        faults.refuse()


@dataclass(frozen=True)
class Buffers:
    """What a run holds on the devices besides its state.

    Meaning: none of these changes a number; they trade memory for speed, and for what a policy can recover from.

    Args:
      in_flight: how many steps may be dispatched and not finished; each holds its batch. 0 waits for each step.
      snapshot_every: in steps; how often the state is copied for a policy that goes on after a failure, and how many
        batches it holds besides those in flight. No step waits for the copy. Without such a policy nothing is copied.
      donate_state: train on the caller's state, which is then deleted, instead of a copy.
    Errors: FieldTypeError or ConfigError with all faults.
    Example:
      >>> Buffers(in_flight=4)
      Buffers(in_flight=4, snapshot_every=10, donate_state=False)
    """

    in_flight: int = 2
    snapshot_every: int = 10
    donate_state: bool = False

    def __post_init__(self) -> None:
        faults = ArgumentFaults("Buffers")
        faults.count("in_flight", self.in_flight, least=0)
        faults.count("snapshot_every", self.snapshot_every)
        faults.instance("donate_state", self.donate_state, bool, "True or False")
        faults.refuse()


OnError: TypeAlias = str | Policy | Mapping[str, str | Policy]


def run(
    step: Runnable,
    state: StateTree,
    data: Iterable[Batch] | Data,
    *,
    steps: int | None = None,
    on_error: OnError = "raise",
    checkpoint: Checkpoints | None = None,
    loggers: Sequence[Logger | Meter] = (),
    log_every: int = 10,
    eval: Eval | None = None,
    hooks: Sequence[tuple[int, Hook]] = (),
    profile: Profile | None = None,
    reject_if: RejectIf | None = None,
    watchdog: Watchdog | None = None,
    buffers: Buffers | None = None,
) -> Run[StateTree]:
    """Train: one step for each batch.

    Meaning: for batch in data: state, metrics = step(state, batch).
    Why: a failure is known by the number of its step and handled by a policy; no way out loses a state that could live.

    Args:
      step: a compiled step, its reference, or any function of a state and a batch.
      state: it is copied, and stays alive.
      data: an iterable of batches, or `sc.Data(loader, ...)`. An iterator with `get_state` and `set_state` is resumed
        exactly.
      steps: the number of the last step, counting those of earlier runs on the same checkpoints; None: all the data.
      on_error: a policy or its name, "raise", "skip", "retry" or "rollback"; or a dict of them by kind of failure:
        "data", "nonfinite", "device", "save", "log". Without a kind a policy governs the first three, where it can. A
        logger that fails is left alone after three failures in a row, unless "log" is to raise.
      checkpoint: where to save, and to resume from.
      loggers: they get the metrics of the first step, of every `log_every`-th, and of the last. `sc.Throughput(…)`
        among them adds steps, examples and tokens per second, and the share of the peak of the device.
      log_every: in steps.
      eval: `sc.Eval(every, evaluate, data)` logs metrics of `evaluate(state, batch)` over all rows, as `eval/<name>`.
      hooks: pairs (every, hook): `hook(step, metrics, snapshot)`, where `snapshot()` makes a copy of the state. A hook
        that returns `sc.Stop(why)` ends the run.
      profile: `sc.Profile(start, stop, directory)` traces these steps with JAX's profiler.
      reject_if: `reject_if(metrics)` takes host floats and returns why the step is not wanted, in words, or None. It
        is called for every finished step, replayed ones too; the policy for "nonfinite" governs a rejection.
      watchdog: `sc.Watchdog(...)` looks for hangs, recompilations, replicas that differ and further signals.
      buffers: `sc.Buffers(...)` says how many steps are in flight and how often the state is copied.
    Errors: FieldTypeError or ConfigError before anything runs; a StepError from the original exception, with the number
      of the step: DataError, BuildError, NonFiniteError, RejectedError, DeviceError; CheckpointError, ResumeError,
      PeerError. Ctrl-C raises Interrupted (a KeyboardInterrupt), and SIGTERM Preempted (a SystemExit with code 143), at
      a step boundary, after a checkpoint; `except sc.StepcError` catches neither.
    A policy that continues after a failure on a device needs memory for a copy of the state and the batches since.
    On several processes each calls this with the rows it has. If one process gets a signal, a bad batch or the end of
    its data, all of them act on it at the same step; an error that ends one ends all, by a PeerError that names it.
    Process 0 has the loggers. To keep compiled programs between runs, set `jax_compilation_cache_dir` in `jax.config`.
    Source: ours.
    """
    arguments = dict(locals())
    _check_arguments(arguments)
    data = data if isinstance(data, Data) else Data(data)
    watchdog, buffers = watchdog or Watchdog(), buffers or Buffers()
    ours, policies = as_step(step), policies_of(on_error)
    _check_debugging(ours)
    _check_state(state, ours)
    with ExitStack() as at_the_end:
        peers = at_the_end.enter_context(closing(peers_for(state)))
        is_placed = peers.are_many or data.prefetch > 0 and not _takes_numpy(state)
        place = data.place or (ours.put if is_placed else lambda batch: batch)
        source = Source(data.loader, place, data.short_batches, has_many=data.signatures == "many")
        is_positioned = isinstance(source.batches, Positioned)
        peers.check_same("arguments", lambda: _comparable(arguments, policies, watchdog, buffers, data, is_positioned))
        _check_replay(policies, checkpoint, is_positioned=is_positioned)
        watcher = StallWatcher(watchdog.warn_seconds, peers.stalled, watchdog.exit_seconds)
        at_the_end.enter_context(closing(watcher))
        signals = at_the_end.enter_context(watched_signals(watchdog.signals))
        meters = [one for one in loggers if isinstance(one, Meter)]
        listeners = [one for one in loggers if not isinstance(one, Meter)] if peers.is_first else []
        events = EventLog(listeners, log_every, is_strict="log" in policies, meters=meters)
        if ties := describe_tied_leaves(state):
            events.event("tied_leaves", 0, leaves=ties, why="each is copied and trained apart")
        counts = FailureCounts(policies)
        reader = DataReader(
            source,
            num_ahead=data.prefetch,
            seconds=data.timeout_seconds,
            is_over=signals.is_over,
            reading=signals.reading,
        )
        callbacks = Callbacks(eval, hooks, profile, watcher, peers, best_values=_best_values(eval, checkpoint))
        for one in (reader, callbacks):
            at_the_end.callback(one.close)
        trainer = Trainer(
            step=ours,
            run=Run(state if buffers.donate_state else copy_state(state)),
            reader=reader,
            counts=counts,
            events=events,
            signals=signals,
            callbacks=callbacks,
            checkpoints=checkpoint and _keeper(checkpoint, ours, state, counts, events, peers, at_the_end),
            watcher=watcher,
            peers=peers,
            monitor=RecompilationMonitor(ours, events, watchdog.max_recompiles, _best_of_steps(checkpoint)),
            reject_if=reject_if,
            steps=steps,
            max_in_flight=buffers.in_flight,
            snapshot_every=buffers.snapshot_every if _needs_snapshots(policies) else None,
            compare_replicas_every=watchdog.compare_replicas_every,
        )
        pid = os.getpid()
        try:
            _train(trainer, _header(ours, signals))
        except BaseException:
            if os.getpid() != pid:
                at_the_end.pop_all()  # what is closed at the end belongs to the parent
            raise
    return run_or_exit(trainer.run, signals)


_ORDER = "The order is `sc.run(step, state, data)`."


def _check_arguments(arguments: Mapping[str, Any]) -> None:  # Any: it is checked here
    """Refuse wrong arguments, all at once. Errors: FieldTypeError, ConfigError."""
    faults = ArgumentFaults("run")
    step, data, loggers, hooks = (arguments[name] for name in ("step", "data", "loggers", "hooks"))
    if isinstance(step, Transform | Pipeline):
        faults.mistaken("step", "a compiled step", "a pipeline", "Compile it: `sc.run(sc.compile(pipeline), …)`.")
    elif isinstance(step, State):
        faults.mistaken("step", "a compiled step", "a state", _ORDER)
    else:
        faults.callable_("step", step, "a compiled step")
    _check_loader("data", data, "an iterable of batches, or sc.Data(loader, …)", faults)
    faults.count("steps", arguments["steps"], optional=True)
    check_policies(arguments["on_error"], faults)
    values: tuple[tuple[str, type, str], ...] = (
        ("checkpoint", Checkpoints, "sc.Checkpoints(directory, every=…)"),
        ("eval", Eval, "sc.Eval(every, evaluate, data)"),
        ("profile", Profile, "sc.Profile(start, stop, directory)"),
        ("watchdog", Watchdog, "sc.Watchdog(warn_seconds=…)"),
        ("buffers", Buffers, "sc.Buffers(in_flight=…)"),
    )
    for name, kind, expected in values:
        faults.instance(name, arguments[name], (kind, type(None)), f"{expected} or None")
    if isinstance(loggers, Logger):
        faults.mistaken("loggers", "a list of loggers", f"{loggers!r}", "Write `loggers=[logger]`.")
    elif isinstance(loggers, str):
        faults.wrong_type("loggers", "a list of loggers", loggers)
    elif faults.instance("loggers", loggers, Sequence, "a list of loggers"):
        for index, logger in enumerate(loggers):
            _check_logger(f"loggers[{index}]", logger, faults)
    match arguments["checkpoint"], arguments["eval"]:
        case Checkpoints(best=(name, _)) as checkpoint, None if name.startswith(EVALUATED):
            faults.wrong_value("eval", f"an evaluation, by which {checkpoint.decides} decides", None)
        case _:
            pass
    faults.count("log_every", arguments["log_every"])
    if faults.instance("hooks", hooks, Sequence, "a list of pairs (every, hook)"):
        for index, hook in enumerate(hooks):
            match hook:
                case (every, function) if callable(function):
                    faults.count(f"hooks[{index}]", every)
                case EarlyStopping() | (_, EarlyStopping()):
                    remedy = "Write `eval=sc.Eval(every, evaluate, data, stop=sc.EarlyStopping(…))`."
                    faults.mistaken(f"hooks[{index}]", "a pair (every, hook)", repr(hook), remedy)
                case _:
                    faults.wrong_type(f"hooks[{index}]", "a pair (every, hook)", hook)
    faults.callable_("reject_if", arguments["reject_if"], "a function of metrics, or None", optional=True)
    is_padded = isinstance(data, Data) and data.short_batches == "pad"
    if is_padded and isinstance(step, CompiledStep) and step.rows_axis:
        faults.wrong_value("short_batches", '"raise" or "drop" for a step that makes several steps in a call', "pad")
    faults.refuse()


def _check_loader(name: str, loader: object, expected: str, faults: ArgumentFaults) -> None:
    match loader:
        case Data():
            pass
        case Mapping():
            names = ", ".join(repr(key) for key in list(loader)[:SHOWN]) + (", …" if len(loader) > SHOWN else "")
            faults.mistaken(name, expected, f"one batch: a dict of {names}", "Put it in a list: `[batch]`.")
        case State():
            faults.mistaken(name, expected, "a state", _ORDER)
        case str() | bytes():
            faults.wrong_type(name, expected, loader)
        case _:
            faults.instance(name, loader, Iterable, expected)


# What trackers are called where others take a string, and the object that this runner takes.
_LOGGERS_BY_NAME = {
    "wandb": "Give the run that `wandb.init(…)` returns: its `log` takes metrics and a step.",
    "tensorboard": "Make one: `sc.TensorBoard(…)`.",
    "csv": "Make one: `sc.CSV(…)`.",
    "jsonl": "Make one: `sc.JSONL(…)`.",
    "json": "Make one: `sc.JSONL(…)`.",
    "console": "Make one: `sc.Console()`.",
    "stdout": "Make one: `sc.Console()`.",
}


def _check_logger(name: str, logger: object, faults: ArgumentFaults) -> None:
    expected = "an object with a method log(metrics, step)"
    match logger:
        case Logger() if isinstance(logger, type):
            remedy = f"Make one: `{logger.__name__}(…)`."
            faults.mistaken(name, expected, f"the class {logger.__name__}", remedy)
        case Logger() if _takes_metrics(logger.log):
            pass
        case Meter() if not isinstance(logger, type):
            pass
        case str() if remedy := _LOGGERS_BY_NAME.get(logger.lower()):
            faults.mistaken(name, expected, repr(logger), remedy)
        case _:
            faults.wrong_type(name, expected, logger)


def _takes_metrics(log: Callable[..., object]) -> bool:
    """Whether `log(metrics, step)` fits its signature; True where Python cannot say."""
    try:
        inspect.signature(log).bind({}, 1)
    except TypeError:
        return False
    except ValueError:  # a builtin without a signature
        return True
    return True


def _check_debugging(step: AnyStep) -> None:
    """JAX runs a step again, operation by operation, when it finds NaN; by then its state is donated."""
    flags = [name for name in ("jax_debug_nans", "jax_debug_infs") if getattr(jax.config, name)]
    if flags and not isinstance(step, PlainStep):
        raise ConfigError(
            f"A step that donates its state cannot run with {' and '.join(flags)}.",
            facts=(("expected", "off"), ("got", "on")),
            suggestion="Switch it off: `run` names the step, microbatch and leaf. Or run `step.reference`.",
        )


def _check_state(state: object, step: AnyStep) -> None:
    """Refuse a state with leaves that are not live arrays, and for a compiled step one that it did not make.

    Errors: ConfigError with each path.
    """
    wrong, deleted = [], []
    for path, leaf in leaves_by_path(state):
        if not isinstance(leaf, jax.Array):
            wrong.append((path or "state", f"expected a jax array, got {type(leaf).__name__}"))
        elif leaf.is_deleted():
            deleted.append((path, "deleted"))
    if wrong or not jax.tree.leaves(state):
        facts = wrong or [("state", "expected arrays, got none")]
        raise ConfigError(
            "The state must be a tree of arrays.", facts=facts, suggestion="`step.init(params)` makes one."
        )
    if isinstance(step, CompiledStep) and not isinstance(state, State):
        raise ConfigError(
            "A compiled step takes a `stepc.State`.",
            facts=[("state", f"expected State, got {type(state).__name__}")],
            suggestion="`step.init(params)` makes one of the parameters.",
        )
    if deleted:
        raise ConfigError(
            "This state was donated to an earlier step or run: its arrays are deleted.",
            facts=deleted[:5],
            suggestion="Use the state that was returned: `run = sc.run(…)`, then `run.state`.",
        )


def _comparable(
    arguments: Mapping[str, Any],  # Any: arguments
    policies: Mapping[str, Policy],
    watchdog: Watchdog,
    buffers: Buffers,
    data: Data,
    is_positioned: bool,
) -> dict[str, str]:
    """The arguments that must be the same on all processes of a run: those by which it decides what all do next."""
    evaluation, hooks = arguments["eval"], arguments["hooks"]
    return {name: repr(arguments[name]) for name in ("step", "steps", "checkpoint")} | {
        "in_flight": repr(buffers.in_flight),
        "snapshot_every": repr(buffers.snapshot_every),
        "compare_replicas_every": repr(watchdog.compare_replicas_every),
        "warn_seconds": repr(watchdog.warn_seconds),
        "signals": ", ".join(map(_name_of, watchdog.signals)),
        "on_error": repr(policies),
        "eval": "None"
        if evaluation is None
        else f"Eval({evaluation.every}, {_name_of_function(evaluation.evaluate)}, stop={evaluation.stop})",
        "hooks": f"every {[every for every, _ in hooks]}",
        "reject_if": _name_of_function(arguments["reject_if"]),
        # A profile waits for the steps in flight, and `reject_if` is voted when they are waited for.
        "profile": repr(None if arguments["reject_if"] is None else arguments["profile"]),
        "short_batches": repr(data.short_batches),
        "signatures": repr(data.signatures),
        "place": _name_of_function(data.place),
        "data": f"with{'' if is_positioned else 'out'} `get_state()` and `set_state(state)`",
    }


def _name_of_function(function: object) -> str:
    """What a function is called; of another object, its class."""
    match function:
        case None:
            return "None"
        case FunctionType() | MethodType():
            return function.__qualname__
        case _:
            return type(function).__name__


def _check_replay(policies: Mapping[str, Policy], checkpoint: Checkpoints | None, *, is_positioned: bool) -> None:
    """Refuse to give batches again if the data cannot go back to them.

    Errors: ConfigError.
    """
    if checkpoint is None or is_positioned:
        return
    remedy = "Give an iterator with `get_state()` and `set_state(state)`"
    if checkpoint.exact_resume:
        facts = [("exact_resume", "the data cannot say where it stands, so a resumed run would begin it anew")]
        raise ConfigError(INVALID, facts=facts, suggestion=f"{remedy}, such as those of Grain.")
    facts = [
        (f"on_error[{kind!r}]", f"{policy!r} returns to a checkpoint, and the data cannot")
        for kind, policy in policies.items()
        if isinstance(policy, Rollback) and policy.data == "replay"
    ]
    if facts:
        raise ConfigError(INVALID, facts=facts, suggestion=f'{remedy}, or say Rollback(data="skip").')


def _best_values(evaluation: Eval | None, checkpoint: Checkpoints | None) -> list[BestValue]:
    """The metrics of the evaluation of which the best is looked for."""
    early = None if evaluation is None else evaluation.stop
    found = [] if early is None else [early.best_value()]
    if evaluation is not None and checkpoint is not None and checkpoint.best is not None:
        name, mode = checkpoint.best
        if name.startswith(EVALUATED):
            also = BestValue(name, mode, checkpoint.decides)
            found += [] if any(one.is_of(also) for one in found) else [also]
    return found


def _best_of_steps(checkpoint: Checkpoints | None) -> str | None:
    """The metric of a step by which the checkpoints decide; None if there is none."""
    name, _ = (checkpoint and checkpoint.best) or (None, "")
    return None if name is None or name.startswith(EVALUATED) else name


def _needs_snapshots(policies: Mapping[str, Policy]) -> bool:
    """Whether a policy continues after a failure that destroys the state."""
    return any(not isinstance(policies[kind], Raise) for kind in ("nonfinite", "device"))


def _takes_numpy(state: Any) -> bool:  # Any: a state
    """Whether a program takes arrays of numpy where they are: to put them on the device first takes time alone.

    That is on one CPU, unless the user has a guard against transfers that are not asked for.
    """
    devices = {device for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array) for device in leaf.devices()}
    is_one_cpu = [device.platform for device in devices] == ["cpu"]
    return is_one_cpu and jax.config.jax_transfer_guard_host_to_device in (None, "allow")  # pyright: ignore[reportAttributeAccessIssue]


def _keeper(
    wanted: Checkpoints,
    step: AnyStep,
    state: Any,
    counts: FailureCounts,
    events: EventLog,
    peers: Peers,
    at_the_end: ExitStack,
) -> CheckpointKeeper:
    store = checkpoint_store().CheckpointStore(
        Path(wanted.directory).expanduser(), keep=wanted.keep, timeout_seconds=wanted.timeout_seconds, state=state,
        commit=peers.commit,
    )  # fmt: skip
    at_the_end.callback(store.close)
    if store.why_exclusive is not None:
        events.event("exclusive_lock", 0, why=store.why_exclusive)
    return CheckpointKeeper(wanted, store, counts, events, step.settings(), peers.clock)


def _train(trainer: Trainer, header: Mapping[str, object]) -> None:
    """Run the loop. Whatever ends it, nothing stays in flight, unsaved or unread."""
    events, run, pid = trainer.events, trainer.run, os.getpid()
    try:
        with trainer.watcher.patient():
            _resume(trainer)
        trainer.peers.check_same("state", lambda: _state_by_path(run.state, trainer.number))
        events.event("start", trainer.number, level=logging.INFO, **header)
        trainer.loop()
        log_stalls(trainer.watcher, events)
        run.ended = end_reason(trainer)
        if trainer.number == 0 and run.ended == "data" and trainer.peers.has_none(trainer.reader):
            raise DataError("The data gave no batch at all.", phase="data", step=1, state_ok=True)
        if run.ended == "data" and trainer.steps is not None:
            events.event("data_ended_early", run.steps, asked=trainer.steps, why="the data has no further batch")
        if run.ended == "stopped":
            events.event("stopped", run.steps, level=logging.INFO, why=trainer.callbacks.stopped)
        if trainer.checkpoints is None or not trainer.signals.is_over():
            events.log_last()  # an interrupted run that resumes logs only what an uninterrupted one would
        if trainer.checkpoints is not None:
            trainer.save()
            with trainer.watcher.patient():
                trainer.checkpoints.finish()
        if deleted := deleted_leaves(jax.block_until_ready(run.state)):
            raise StepError(f"The state was lost: {deleted[0]}.", phase="wait", step=run.steps, state_ok=False)
        trainer.give_back()
        events.event("end", run.steps, level=logging.INFO, ended=run.ended)
    except BaseException as error:  # it is raised again, after what must be done first
        if os.getpid() != pid:
            raise  # a forked child ends: the run is its parent's
        is_end_of_all = trainer.peers.ends_all(error, trainer.number)
        (abandon_after_error if is_end_of_all else finish_after_error)(trainer, error)
        raise
    finally:
        fill_in_run(trainer)


def _resume(trainer: Trainer) -> None:
    """Go on from the last good checkpoint, if there is one."""
    if trainer.checkpoints is None:
        return
    source = trainer.reader.source
    if trainer.position is None and not isinstance(source.batches, Positioned):
        trainer.events.event("resume_not_exact", 0, why="the data has no `get_state()` and `set_state(state)`")
    trainer.position = source.position()
    found = trainer.checkpoints.restore(trainer.run.state)
    if found is not None:
        trainer.run.state, trainer.number, trainer.position = found.state, found.number, found.position
        trainer.run.steps = found.number
        go_to(source, found.position, step=found.number)
        if found.settings is not None and (change := pipeline_changes(found.settings, trainer.checkpoints.settings)):
            trainer.events.event("pipeline_changed", found.number, was=change[0], now=change[1])
        is_checked = trainer.checkpoints.wanted.check_data
        source.saved_rows = dict(found.batch) if is_checked else None
        if is_checked and found.last is not None and isinstance(source.batches, Positioned):
            tell = partial(trainer.events.event, "data_not_checked", found.number)
            check_data(source, found.last, after=found.position, step=found.number, tell=lambda why: tell(why=why))
        trainer.callbacks.resume(found.number, found.best_values, trainer.events)
    # A log without a checkpoint is that of a run that had none either: it began at 0, and so does this one.
    trainer.events.resume(trainer.number)
    if found is not None:
        is_done = trainer.steps is not None and found.number >= trainer.steps
        name, level = ("already_done", logging.WARNING) if is_done else ("resumed", logging.INFO)
        trainer.events.event(name, found.number, level=level, asked=trainer.steps)


def _state_by_path(state: Any, number: int) -> dict[str, str]:  # Any: a state
    """What must be the same of the state on all processes: types, and digests of the replicated leaves."""
    digests = replica_digests(state)
    return {"step": str(number)} | {
        path: f"{leaf.dtype}{list(leaf.shape)} digest {digests.get(path, 'none')}"
        for path, leaf in leaves_by_path(state)
    }


def _name_of(number: int) -> str:
    known = {one.value: one.name for one in Signals}
    return known.get(number, f"signal {number}")


def _header(step: AnyStep, signals: SignalWatch) -> dict[str, object]:
    match step:
        case PlainStep():
            mesh = "unknown"
        case _:
            mesh = "none: one device" if step.mesh is None else str(dict(step.mesh.shape))
    return {
        "trains": repr(step),
        "mesh": mesh,
        "devices": f"{jax.device_count()} {jax.devices()[0].platform}",
        "stepc": version("stepc"),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "signals": " and ".join(map(_name_of, signals.numbers)) if signals.is_protected else "no_signal_protection",
    }
