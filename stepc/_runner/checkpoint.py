"""`Checkpoints`, what a user asks for; `restore`, which reads one; `CheckpointKeeper`, which decides when to save.

It does not know the disk.
"""

import importlib
import importlib.util
import logging
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, overload

import jax
import numpy as np

from stepc._language.kinds import HostMetrics
from stepc._language.state import leaves_by_path
from stepc._runner.arguments import ArgumentFaults
from stepc._runner.best import deciding_value, is_better
from stepc._runner.data import DataFingerprint
from stepc._runner.events import EventLog, is_due
from stepc._runner.policies import FailureCounts
from stepc.errors import CheckpointError, ConfigError

if TYPE_CHECKING:  # `import stepc` must not need Orbax
    from stepc._runner.checkpoint_store import CheckpointStore

T = TypeVar("T")
Settings: TypeAlias = Sequence[tuple[str, Mapping[str, str]]]
SLOW_SECONDS = 0.5  # waits for saves that add up to less are not logged
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # with one slash: `Path("s3://bucket")` has lost the other


@dataclass(frozen=True)
class Checkpoints:
    """Save a run in a directory, and resume it from there.

    Meaning: every `every` steps, every `every_seconds`, and at the end, one commit holds the state, the position of the
      data and their metadata. A run that finds checkpoints in its directory resumes from the last good one.
    Why: a process may die at any moment; the next start then repeats at most `every` steps, and the result is the same
      to the last bit.

    Args:
      directory: where to save: a path on a mounted file system, not a URL; created if it is missing. `~` is the home
        directory. One run at a time may use it.
      every: in steps; a positive integer.
      keep: how many of the newest checkpoints to keep; a positive integer.
      best: a metric and "min" or "max", such as ("eval/loss", "min"): the checkpoint with the best value is kept too.
        An evaluation that has the best value is saved, at whatever step. A value that is not finite is never the best.
      every_seconds: save sooner than `every` if this long has passed; None for never.
      timeout_seconds: a save that takes longer has failed. A thread that waits for a disk cannot be ended, and Python
        waits for it at exit; a second Ctrl-C ends that wait.
      check_data: on resume, read the last batch before the checkpoint again, and refuse data that gives another one: an
        iterator made with another seed accepts its old position silently. False also lets the signature of the
        batches change, such as their number of rows.
      exact_resume: refuse data that has no position. Otherwise that is an event, and a resumed run begins with the
        first batch again.
    Errors: FieldTypeError or ConfigError with all faults. A run with checkpoints needs the extra "checkpoint".
    A pipeline with the same tree of leaves resumes, such as one with another learning rate, clip or k, or with adamw in
    place of adam. The event `pipeline_changed` says what changed.
    For an exact resume the data must be an iterator with `get_state()` and `set_state(state)`, such as those of Grain.
    Example:
      >>> Checkpoints("runs/first", every=100).keep
      3
    """

    directory: str | Path
    every: int
    keep: int = 3
    every_seconds: float | None = None
    timeout_seconds: float = 600.0
    check_data: bool = True
    exact_resume: bool = False
    best: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        faults = ArgumentFaults("Checkpoints")
        if faults.instance("directory", self.directory, (str, Path), "a path"):
            _check_directory(self.directory, faults)
        faults.count("every", self.every)
        faults.count("keep", self.keep)
        faults.seconds("every_seconds", self.every_seconds)
        faults.number(
            "timeout_seconds", self.timeout_seconds, "a positive number", lambda seconds: 0 < seconds < math.inf
        )
        faults.instance("check_data", self.check_data, bool, "True or False")
        faults.instance("exact_resume", self.exact_resume, bool, "True or False")
        match self.best:
            case None | (str(), "min" | "max"):
                pass
            case _:
                faults.wrong_type("best", 'a pair such as ("eval/loss", "min"), or None', self.best)
        faults.refuse()

    @property
    def decides(self) -> str:
        """What decides by a metric, for messages."""
        return f"`Checkpoints(best={self.best!r})`"


@overload
def restore(
    directory: str | Path, *, like: None = None, only: str | Sequence[str] = "**", step: int | str | None = None
) -> dict[str, Any]: ...  # Any: arrays, and dicts of them


@overload
def restore(
    directory: str | Path, *, like: T, only: str | Sequence[str] = "**", step: int | str | None = None
) -> T: ...


def restore(
    directory: str | Path,
    *,
    like: Any = None,  # Any: a tree of arrays or their shapes
    only: str | Sequence[str] = "**",
    step: int | str | None = None,
) -> Any:  # Any: a tree like `like`, or dicts
    """Read a checkpoint without a run.

    Meaning: `like`, with each leaf that `only` names as it was saved after `step`.
    Why: inference needs the parameters, and fine-tuning begins with them; neither needs the optimizer's state.

    Args:
      directory: that of the `Checkpoints`.
      like: a state; or its parameters alone, such as `model.init` makes; or a dict of some of its fields, such as
        `{"params": params, "model_state": batch_stats}`; or the shapes of any of them, by `jax.eval_shape`.
        Each leaf is placed as the one there: on the devices of its sharding, whatever mesh it was saved from, and
        padded where those of a state are. None gives dicts by the keys of the state, `restored["params"]`, on the
        default device.
      only: a pattern of paths in the checkpoint, or several: `*` stands for anything within a key, `**` across keys.
        Only these are read.
      step: None for the newest checkpoint that is intact; "best" for the one that is best by the `best` of the run's
        `Checkpoints`.
    Errors: CheckpointError if there is none, or the one that is asked for cannot be read; ResumeError if it does not
      fit `like`, with every leaf that differs; ConfigError for a pattern that matches no leaf.
    It takes no lock, and changes nothing: a run may go on in the directory. Without `like`, lists and tuples come back
    as dicts with the keys "0", "1", …
    Example:
      >>> params = restore("runs/first", like=params, only="params/**")  # doctest: +SKIP

    Source: ours.
    """
    faults = ArgumentFaults("restore")
    if faults.instance("directory", directory, (str, Path), "a path"):
        _check_directory(directory, faults)
    patterns = (only,) if isinstance(only, str) else only
    if faults.instance("only", patterns, Sequence, "a pattern, or a list of patterns"):
        for pattern in patterns:
            faults.instance("only", pattern, str, "a pattern, or a list of patterns")
    for path, leaf in leaves_by_path(like):
        if not isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
            faults.wrong_type(f"like {path}".rstrip(), "an array, or its shape", leaf)
    expected = 'a non-negative integer, "best" or None'
    match step:
        case None | "best":
            pass
        case int() if not isinstance(step, bool):
            if step < 0:
                faults.wrong_value("step", expected, step)
        case str():
            faults.wrong_value("step", expected, step)
        case _:
            faults.wrong_type("step", expected, step)
    faults.refuse()
    return checkpoint_store().restored(Path(directory).expanduser(), like, tuple(patterns), step)


def checkpoint_store() -> Any:  # Any: a module
    """The module that writes and reads. Errors: ConfigError without Orbax."""
    # By name, and not at the top: `import stepc` must not need Orbax. Asking first keeps other failures a traceback.
    if importlib.util.find_spec("orbax") is None:
        raise ConfigError("Checkpoints need Orbax.", suggestion="Install it with: pip install 'stepc[checkpoint]'")
    return importlib.import_module("stepc._runner.checkpoint_store")


def _check_directory(directory: str | Path, faults: ArgumentFaults) -> None:
    if URL.match(str(directory)):
        # A lock, an atomic rename and a deletion make a checkpoint complete or absent; a bucket has none of them.
        faults.wrong_value("directory", "a directory on a mounted file system", directory)
    elif directory == "":
        faults.wrong_value("directory", 'a path; "." is the working directory', directory)
    try:
        Path(directory).expanduser()
    except RuntimeError:
        faults.wrong_value("directory", "the home directory of a user that exists", directory)


@dataclass(frozen=True)
class RestoredCheckpoint:
    """What was read: a state and its step; position, batch signature and fingerprint of the data; what was trained."""

    state: Any  # Any: a state
    number: int
    position: Any  # Any: see Positioned
    batch: Mapping[str, str]
    last: DataFingerprint | None
    settings: Settings | None = None  # None in the checkpoints of stepc 0.1
    best_values: Sequence[Mapping[str, Any]] = ()  # Any: JSON values; see `BestValue.record`


def pipeline_changes(before: Settings, now: Settings) -> tuple[str, str] | None:
    """What two pipelines have not in common, as they print; None if they are the same.

    Of a transform that prints alike in both, the numbers that differ.
    """
    parts = [[(text, tuple(sorted(numbers.items()))) for text, numbers in one] for one in (before, now)]
    was: list[str] = []
    instead: list[str] = []
    for kind, i, i_end, j, j_end in SequenceMatcher(None, *parts, autojunk=False).get_opcodes():
        old, new = parts[0][i:i_end], parts[1][j:j_end]
        if kind == "equal":
            continue
        if [text for text, _ in old] == [text for text, _ in new]:
            for (text, mine), (_, theirs) in zip(old, new, strict=True):
                was.append(_with_numbers(text, mine, theirs))
                instead.append(_with_numbers(text, theirs, mine))
        else:
            was += [text for text, _ in old]
            instead += [text for text, _ in new]
    return (" @ ".join(was) or "nothing", " @ ".join(instead) or "nothing") if was or instead else None


def _with_numbers(text: str, mine: Sequence[tuple[str, str]], theirs: Sequence[tuple[str, str]]) -> str:
    return (
        f"{text} with {', '.join(f'{name}={value}' for name, value in mine if (name, value) not in theirs) or 'none'}"
    )


@dataclass
class CheckpointKeeper:
    """Saves and restores the checkpoints of one run.

    Args:
      settings: what the run trains, as `CompiledStep.settings` gives it.
      saved: the step of the last committed checkpoint; -1 before the first.
      best: the step and the value of the checkpoint that is kept as the best.
    """

    wanted: Checkpoints
    store: "CheckpointStore"
    counts: FailureCounts
    events: EventLog
    settings: Settings = ()
    clock: Callable[[], float] = time.monotonic
    saved: int = -1
    best: tuple[int, float] | None = None
    _metrics: HostMetrics = field(default_factory=dict)  # of the step that is being saved
    _in_flight: int = -1
    _saved_at: float = field(init=False)
    _waited: float = 0.0
    _note_at: float = SLOW_SECONDS

    def __post_init__(self) -> None:
        self._saved_at = self.clock()

    def restore(self, target: Any) -> RestoredCheckpoint | None:  # Any: a state
        """The last good checkpoint, placed like `target`; None if there is none. Later ones are set aside."""
        self.finish()
        found = self.store.restore(target, lambda name, step, why: self.events.event(name, step, why=why))
        self.best = None
        if found is not None:
            self.saved = found.number
            if self.wanted.best is not None:
                for number, metrics in sorted(self.store.metrics().items()):  # the first of equal values is kept
                    self._note_value(number, metrics)
        return found

    @property
    def asks_for_best(self) -> bool:
        return self.wanted.best is not None

    def is_best(self, metrics: HostMetrics) -> bool:
        """Whether the value of the metric that decides is better than that of every checkpoint."""
        if self.wanted.best is None:
            return False
        name, mode = self.wanted.best
        value = deciding_value(metrics, name, self.wanted.decides) if name in metrics else math.nan
        return is_better(value, None if self.best is None else self.best[1], mode)

    def _note_value(self, number: int, metrics: HostMetrics) -> None:
        if self.wanted.best is not None and self.is_best(metrics):
            self.best = (number, metrics[self.wanted.best[0]])

    def is_due(self, number: int, *, steps_per_call: int) -> bool:
        """Whether it is time to save, by steps or by seconds."""
        seconds = self.wanted.every_seconds
        return number > self.saved and (
            is_due(self.wanted.every, number, steps_per_call)
            or seconds is not None
            and self.clock() - self._saved_at >= seconds
        )

    def save(
        self,
        number: int,
        state: Any,  # Any: a state
        position: Any,  # Any: see Positioned
        batch: Mapping[str, str],
        last: DataFingerprint | None,
        metrics: HostMetrics,
        best_values: Sequence[Mapping[str, Any]] = (),  # Any: JSON values
    ) -> None:
        """Begin to save a state whose steps have all finished, once the save before it is committed."""
        if number == self._in_flight:
            return
        began, is_slow = self.clock(), self.store.is_busy()
        self.finish()
        if number <= self.saved:
            return
        if is_slow:
            self._note_wait(number, self.clock() - began)
        meta = {"step": number, "position": position, "batch": dict(batch), "last": last}
        meta |= {
            "settings": self.settings,
            "best": self.wanted.best,
            "best_values": best_values,
            "metrics": {name: np.asarray(value).tolist() for name, value in metrics.items()},
        }
        if self._guarded(number, lambda: self.store.save(number, state, meta)):
            self._in_flight, self._metrics = number, metrics
        self._saved_at = self.clock()

    def _note_wait(self, number: int, seconds: float) -> None:
        """Log that a save waited for the one before: at half a second in all, and each time that it has doubled."""
        self._waited += seconds
        if self._waited >= self._note_at:
            self._note_at = 2 * self._waited
            self.events.event(
                "slow_checkpoint", number, waited_seconds=f"{seconds:.2f}", in_all_seconds=f"{self._waited:.2f}"
            )

    @property
    def is_saving(self) -> bool:
        """Whether a save has begun and is not known to be committed."""
        return self._in_flight >= 0

    def poll(self) -> None:
        """Note what has been committed, without waiting."""
        if self._in_flight >= 0 and not self.store.is_busy():
            self.finish()

    def finish(self) -> None:
        """Wait for the save in flight."""
        if self._in_flight >= 0:
            number, self._in_flight = self._in_flight, -1
            if self._guarded(number, self.store.wait):
                self.saved = number
                self._note_value(number, self._metrics)
                facts: dict[str, object] = {}
                if self.best is not None and self.best[0] == number:
                    facts["best"] = self.best[1]
                try:
                    self._guarded(number, lambda: facts.update(self._delete_old()))
                finally:
                    self.events.event("checkpoint", number, level=logging.INFO, **facts)

    def _delete_old(self) -> dict[str, object]:
        """Delete what need not be kept; say what was, and what is left, if anything was."""
        deleted = self.store.delete_old(but=() if self.best is None else self.best[:1])
        if not deleted:
            return {}
        each = {"deleted": deleted, "kept": sorted(self.store.steps())}
        return {name: ", ".join(map(str, steps)) for name, steps in each.items()}

    def _guarded(self, number: int, act: Callable[[], None]) -> bool:
        """Whether it succeeded; raises if the policy for saves does not allow it to fail."""
        try:
            act()
        except CheckpointError as error:
            self._in_flight = -1
            refusal = self.counts.refusal("save", number)
            self.events.event("failure", number, level=logging.ERROR, what=str(error).partition("\n")[0], phase="save")
            if refusal is not None:
                raise
            return False
        return True
