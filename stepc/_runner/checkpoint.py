"""A state as what can be written and read again: bare leaves, their names, rows and digests. It knows no disk."""

import logging
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from stepc._language.state import leaves_by_path
from stepc._runner.data import DataFingerprint
from stepc._runner.events import EventLog
from stepc._runner.policies import FailureCounts
from stepc.errors import CheckpointError, ConfigError, ResumeError


def check_saveable(state: Any) -> None:  # Any: a state
    """Refuse a state that Orbax does not write. Errors: CheckpointError."""
    faults = [
        (path, f"expected at least one number, got {leaf.dtype}{list(leaf.shape)}")
        for path, leaf in leaves_by_path(state)
        if leaf.size == 0
    ]
    if faults:
        raise CheckpointError("This state cannot be saved: Orbax does not write arrays without numbers.", facts=faults)


def check_fits(meta: Mapping[str, Any], target: Any) -> None:  # Any: a state
    """Refuse a checkpoint of another state. Errors: ResumeError with every leaf that differs."""
    saved = {path: f"{dtype}{shape}{impl}" for path, shape, dtype, impl, _ in meta["leaves"]}
    wanted = {path: f"{dtype}{shape}{impl}" for path, shape, dtype, impl in rows_of(target)}
    facts = [
        (path, f"saved {saved.get(path, 'nothing')}, the state has {wanted.get(path, 'nothing')}")
        for path in [*wanted, *(one for one in saved if one not in wanted)]
        if saved.get(path) != wanted.get(path)
    ]
    if facts:
        raise ResumeError(f"The checkpoint of step {meta['step']} is of another state.", facts=facts)


def rows_of(state: Any) -> list[tuple[str, list[int], str, str]]:  # Any: a state
    return [
        (path, list(leaf.shape), str(leaf.dtype), f" {jax.random.key_impl(leaf)}" if is_key(leaf) else "")
        for path, leaf in leaves_by_path(state)
    ]


def bare_leaves(state: Any) -> list[jax.Array]:  # Any: a state
    return [jax.random.key_data(leaf) if is_key(leaf) else leaf for leaf in jax.tree.leaves(state)]


def is_key(leaf: Any) -> bool:  # Any: an array
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def with_key_type(bare: jax.Array, like: Any) -> jax.Array:  # Any: an array, or a typed key
    return jax.random.wrap_key_data(bare, impl=jax.random.key_impl(like)) if is_key(like) else bare


def names_of(leaves: list[jax.Array]) -> list[str]:
    return [f"leaf_{number:05}" for number in range(len(leaves))]


def digest(leaf: jax.Array) -> int:
    if not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        # Spread over processes: whole on each for a moment, one leaf at a time, so that it can be read by any number.
        return zlib.crc32(np.asarray(process_allgather(leaf, tiled=True)).tobytes())
    return zlib.crc32(np.asarray(leaf).tobytes())


SLOW_SECONDS = 0.005  # a save that is waited for less is not worth a transform


@dataclass(frozen=True)
class Checkpoints:
    """Save a run in a directory, and go on from there.

    Meaning: every `every` steps, or `every_seconds`, and at the end: state, position of the data and what belongs to
      them, in one commit. A run that finds checkpoints in the directory goes on from the last good one.
    Why: a process may die at any moment; the next start then loses at most `every` steps, and no bit of the result.

    Args:
      directory: where; made if it is missing. One process at a time.
      every: in steps; a positive integer.
      keep: how many checkpoints stay; a positive integer.
      every_seconds: saves sooner than `every`, if that long has passed; None for never.
      timeout_seconds: how long the run waits for a save; then it has failed. A thread that waits for a disk cannot be
        ended, and Python waits for it at its exit: a second Ctrl-C ends that.
      check_data: when a run goes on, read the last batch before the checkpoint again, and refuse another one: an
        iterator that was made with another seed goes to its old place without a transform.
      exact_resume: refuse data that cannot say where it is. Otherwise that is an event, and a run that goes on begins
        with the first batch again.
    Errors: ConfigError for what is not such a number. Needs the extra "checkpoint" when a run starts.
    To go on exactly, the data must be an iterator with `get_state()` and `set_state(state)`, such as those of Grain.
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
        faults: list[tuple[str, str, object]]
        faults = [] if isinstance(self.directory, str | Path) else [("directory", "a path", self.directory)]
        for name, value in (("every", self.every), ("keep", self.keep)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                faults.append((name, "a positive integer", value))
        if self.every_seconds is not None and not is_positive(self.every_seconds):
            faults.append(("every_seconds", "a positive number or None", self.every_seconds))
        if not is_positive(self.timeout_seconds):
            faults.append(("timeout_seconds", "a positive number", self.timeout_seconds))
        for name, value in (("check_data", self.check_data), ("exact_resume", self.exact_resume)):
            if not isinstance(value, bool):
                faults.append((name, "True or False", value))
        if faults:
            facts = [(name, f"expected {expected}, got {got!r}") for name, expected, got in faults]
            raise ConfigError("`Checkpoints` cannot be made so.", facts=facts)


def is_positive(value: object) -> bool:
    """Whether it is a number of seconds that can be waited for."""
    return type(value) in (int, float) and value > 0  # pyright: ignore[reportOperatorIssue]  # a number, by then


@dataclass(frozen=True)
class RestoredCheckpoint:
    """What was read back."""

    state: Any  # Any: a state
    number: int
    position: Any  # Any: where the data stood
    batch: Mapping[str, str]
    last: DataFingerprint | None


@runtime_checkable
class Store(Protocol):
    """A directory of numbered saves, each whole or not there."""

    def save(self, number: int, state: Any, meta: Mapping[str, Any]) -> None:  # Any: a state; what JSON can hold
        """Begin to save; what is given may be overwritten when this returns."""

    def wait(self) -> None:
        """Until what was begun is committed. Errors: CheckpointError."""

    def is_busy(self) -> bool:
        """Whether a save is under way."""
        ...

    def restore(self, target: Any, tell: Callable[[str, int, str], None]) -> tuple[Any, Mapping[str, Any]] | None:
        """The newest good save, placed like `target`, and its meta; None if there is none. `tell` hears of bad ones."""
        ...

    def close(self) -> None:
        """Give the directory free."""


@dataclass
class CheckpointKeeper:
    """The checkpoints of one run."""

    wanted: Checkpoints
    vault: Store
    ledger: FailureCounts
    scribe: EventLog
    clock: Callable[[], float] = time.monotonic
    saved: int = -1
    _under_way: int = -1
    _saved_at: float = field(init=False)

    def __post_init__(self) -> None:
        self._saved_at = self.clock()

    def restore(self, target: Any) -> RestoredCheckpoint | None:  # Any: a state
        """The last good checkpoint, or None. Later ones are set aside: the run goes on from this one."""
        self.finish()

        def tell(name: str, step: int, why: str) -> None:
            self.scribe.event(name, step, why=why)

        found = self.vault.restore(target, tell)
        if found is None:
            return None
        state, meta = found
        self.saved = meta["step"]
        return RestoredCheckpoint(state, meta["step"], meta["position"], meta["batch"], meta["last"])

    def is_due(self, number: int, *, steps_per_call: int) -> bool:
        """Whether it is time for a checkpoint."""
        if number <= self.saved:
            return False
        if number // self.wanted.every > (number - steps_per_call) // self.wanted.every:
            return True
        seconds = self.wanted.every_seconds
        return seconds is not None and self.clock() - self._saved_at >= seconds

    def save(
        self,
        number: int,
        state: Any,  # Any: as in Restored
        position: Any,  # Any: as in Restored
        batch: Mapping[str, str],
        last: DataFingerprint | None,
    ) -> None:
        """Begin to save a settled state, after the save before it is done; one of the same step is enough."""
        if number == self._under_way:
            return
        began = self.clock()
        is_slow = self.vault.is_busy() and number != self._under_way
        self.finish()
        if number <= self.saved:  # it was under way
            return
        if is_slow and (waited := self.clock() - began) >= SLOW_SECONDS:
            self.scribe.event("slow_checkpoint", number, waited_seconds=f"{waited:.2f}")
        meta = {"step": number, "position": position, "batch": dict(batch), "last": last}
        self._guarded(number, lambda: self.vault.save(number, state, meta))
        self._under_way = number
        self._saved_at = self.clock()

    def poll(self) -> None:
        """Note what has been committed, without waiting."""
        if self._under_way >= 0 and not self.vault.is_busy():
            self.finish()

    def finish(self) -> None:
        """Wait for what is under way."""
        if self._under_way >= 0:
            number, self._under_way = self._under_way, -1
            if self._guarded(number, self.vault.wait):
                self.saved = number
                self.scribe.event("checkpoint", number, level=logging.INFO)

    def _guarded(self, number: int, act: Callable[[], None]) -> bool:
        try:
            act()
        except CheckpointError as error:
            self._under_way = -1
            refusal = self.ledger.refusal("save", number)
            self.scribe.event("failure", number, level=logging.ERROR, what=str(error).partition("\n")[0], phase="save")
            if refusal is not None:
                raise
            return False
        return True
