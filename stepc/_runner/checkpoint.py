"""`Checkpoints`, what a user asks for; `CheckpointKeeper`, which decides when to save. It does not know the disk."""

import logging
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from stepc._runner.arguments import ArgumentFaults
from stepc._runner.data import DataFingerprint
from stepc._runner.events import EventLog, is_due
from stepc._runner.policies import FailureCounts
from stepc.errors import CheckpointError

if TYPE_CHECKING:  # `import stepc` must not need Orbax
    from stepc._runner.checkpoint_store import CheckpointStore

Settings: TypeAlias = Sequence[tuple[str, Mapping[str, str]]]
SLOW_SECONDS = 0.5  # shorter waits for saves, added up, are no event
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # with one slash: `Path("s3://bucket")` has lost the other


@dataclass(frozen=True)
class Checkpoints:
    """Save a run in a directory, and resume it from there.

    Meaning: every `every` steps, every `every_seconds`, and at the end, one commit holds the state, the position of the
      data and their metadata. A run that finds checkpoints in its directory resumes from the last good one.
    Why: a process may die at any moment; the next start then repeats at most `every` steps, and the result is the same
      to the last bit.

    Args:
      directory: where to save, on a mounted file system, and no URL; created if it is missing. `~` is the home
        directory. One run at a time may use it.
      every: in steps; a positive integer.
      keep: how many checkpoints to keep; a positive integer.
      every_seconds: save sooner than `every` if this long has passed; None for never.
      timeout_seconds: a save that takes longer has failed. A thread that waits for a disk cannot be ended, and Python
        waits for it at exit; a second Ctrl-C ends that wait.
      check_data: on resume, read the last batch before the checkpoint again, and refuse data that gives another one: an
        iterator made with another seed accepts its old position without a word. False also lets the signature of the
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
        faults.refuse()


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
    """

    wanted: Checkpoints
    store: "CheckpointStore"
    counts: FailureCounts
    events: EventLog
    settings: Settings = ()
    clock: Callable[[], float] = time.monotonic
    saved: int = -1
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
        if found is not None:
            self.saved = found.number
        return found

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
        meta = {"step": number, "position": position, "batch": dict(batch), "last": last, "settings": self.settings}
        if self._guarded(number, lambda: self.store.save(number, state, meta)):
            self._in_flight = number
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
                try:
                    self._guarded(number, self.store.delete_old)
                finally:
                    self.events.event("checkpoint", number, level=logging.INFO)

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
