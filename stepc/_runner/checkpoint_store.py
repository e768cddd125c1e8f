"""Checkpoints on disk, written by Orbax: committed or absent, checked by digests, on one process or by all together.

Orbax's `AsyncCheckpointer` writes and commits. Its `CheckpointManager` would also delete old checkpoints and clean up,
but it waits for the other processes in barriers that do not know of a failed save: with it
`test_directory_that_becomes_read_only_fails_on_all` ends in an abort by gloo, where here all processes raise.
"""

import json
import os
import shutil
import threading
import zlib
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from itertools import count
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import SingleDeviceSharding

from stepc._language.state import (
    is_typed_key,
    key_data,
    key_impl_of,
    leaf_crc32,
    leaves_by_path,
    path_matches,
    with_key_type,
)
from stepc._runner.checkpoint import RestoredCheckpoint
from stepc._runner.checkpoint_lock import DirectoryLock
from stepc._runner.data import DataFingerprint, decode_position, encode_position
from stepc._runner.multihost import GroupCommit
from stepc._runner.pending import copy_state
from stepc.errors import CheckpointError, ResumeError, first_line

FORMAT = 1
TEMPORARY = ".orbax-checkpoint-tmp"
ABANDONED, DELETING = "abandoned", ".deleting"
# Orbax globs the path of a checkpoint for the files of each process, and does not escape it: it finds none, or those
# of another directory. TensorStore reads "\\" as "/".
UNUSABLE = "*?[\\\0"


# How Orbax is told to read some of the leaves; an older one has no name for that.
SOME_LEAVES: Mapping[str, Any] = (  # Any: arguments of Orbax
    {"partial_restore": True}
    if "partial_restore" in ocp.args.PyTreeRestore.__dataclass_fields__
    else {"transforms": {}}
)


class CheckpointStore:
    """A directory of numbered checkpoints, each complete or absent.

    Meaning: `<directory>/<step>/state` holds the leaves and `/meta` the metadata: each leaf's path, shape, dtype and
      CRC-32, and a CRC-32 of the metadata itself. Checkpoints that were set aside are in `<directory>/abandoned/`.
    Errors: CheckpointError if the directory cannot be used or is in use, or if the state cannot be saved.
    """

    def __init__(
        self, directory: Path, *, keep: int, timeout_seconds: float, state: Any, commit: GroupCommit | None = None
    ) -> None:  # Any: a state
        self.directory = directory.expanduser().absolute()
        self.keep, self.timeout_seconds = keep, timeout_seconds
        self.commit = commit
        self._is_first = commit is None or commit.is_first  # the process that renames and deletes
        _check_path(self.directory)
        _check_saveable(state)
        self._lock = self._take_lock()
        for left in self.directory.iterdir() if self._is_first else ():  # by a process killed in a save or a deletion
            if TEMPORARY in left.name or left.name.endswith(DELETING):
                shutil.rmtree(left, ignore_errors=True)
        # Directories are created in the call: where that fails in Orbax's own thread, its other threads wait for it in
        # native code, and the process hangs at exit for 20 minutes.
        barrier = None if commit is None else commit.barrier
        options = ocp.AsyncOptions(barrier_sync_fn=barrier, create_directories_asynchronously=False)
        items = ocp.CompositeCheckpointHandler(
            "state", "meta", composite_options=ocp.CompositeOptions(async_options=options)
        )
        self._writer = ocp.AsyncCheckpointer(items, async_options=options)
        self._begun = -1
        self._hangs = False
        if commit is not None:
            commit.is_busy_here = self._is_busy_here

    @property
    def why_exclusive(self) -> str | None:
        """Why the lock of the directory is not `flock`; None if it is."""
        return None if self._lock is None else self._lock.why_exclusive

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:  # Any: a state; see `CheckpointKeeper.save`
        """Begin to save; the state may be donated when this returns. Errors: CheckpointError."""
        if self.commit is not None:
            self.commit.begin()
        with self._all_or_none(step):
            self._check_directory()
            self._set_aside(step, step)
            position = encode_position(meta["position"], step)
            last: DataFingerprint | None = None if self.commit is not None else meta["last"]
            before = last and encode_position(last.before, step)
        # Whatever can fail on one process alone is above: below, the others would wait for it.
        with self._all_or_none(step):
            # Of a copy: reading the live state on the host would leave a view of it, and its donation would do nothing.
            leaves = _arrays(copy_state(state))
            body = {
                **meta,
                "format": FORMAT,
                "position": position if self.commit is None else self.commit.gather(step, position),
                "last": last and {"before": before, "crc32": last.crc32},
                "processes": jax.process_count(),
                "versions": {"jax": jax.__version__, "orbax": ocp.__version__},
                "leaves": [[*row, _saved_crc32(leaf)] for row, leaf in zip(_described(state), leaves, strict=True)],
            }
            text = json.dumps(body)
            args = ocp.args.Composite(
                state=ocp.args.PyTreeSave(dict(zip(_names(leaves), leaves, strict=True))),
                meta=ocp.args.JsonSave({"body": text, "crc32": zlib.crc32(text.encode())}),
            )
            self._in_time(lambda: self._writer.save(self.directory / str(step), args=args))
        self._begun = step

    def is_busy(self) -> bool:
        """Whether a save is in flight, on any process."""
        return self._is_busy_here() if self.commit is None else self.commit.is_busy

    def wait(self) -> None:
        """Wait until the save in flight is committed and each leaf of it is there. Errors: CheckpointError."""
        with self._all_or_none(self._begun):
            self._in_time(self._writer.wait_until_finished)
            if self._is_first:
                self._in_time(self._check_committed)

    def metrics(self) -> dict[int, Mapping[str, float]]:
        """The metrics of each checkpoint that a run has written; none for those of stepc 0.1."""
        return {step: self._body(step).get("metrics", {}) for step in self.steps() if self._is_ours(step)}

    def delete_old(self, *, but: Sequence[int] = ()) -> None:
        """Delete the oldest checkpoints, all but `keep` and those that are named; only those that a run has written.

        Errors: CheckpointError.
        """
        with self._all_or_none(self._begun, "is saved, but older checkpoints could not be deleted"):
            ours = [step for step in self.steps() if self._is_ours(step)] if self._is_first else []
            for old in [step for step in ours[self.keep :] if step not in but]:
                doomed = self.directory / f"{old}{DELETING}"
                with suppress(FileNotFoundError):  # someone else has deleted it
                    (self.directory / str(old)).rename(doomed)  # first, so that one that is half deleted has no number
                    shutil.rmtree(doomed)

    def steps(self) -> list[int]:
        """The steps of all checkpoints, newest first."""
        return steps_in(self.directory)

    def restore(self, target: Any, tell: Callable[[str, int, str], None]) -> RestoredCheckpoint | None:
        """The newest intact checkpoint, placed like `target` (a state); None if there is none at all.

        Damaged ones are skipped and later ones set aside; `tell(event, step, why)` is called for each.
        Errors: ResumeError if a checkpoint does not fit the target, or none of them is intact.
        """
        faults: list[tuple[str, str]] = []
        for step in self.steps():
            try:
                meta = _checked_meta(self.directory, step)
                _check_fits(meta, target)
                state = _read_leaves(self._writer, self.directory, step, target, meta)
            except ResumeError:
                raise
            except Exception as error:  # damage shows as ValueError, KeyError, AttributeError, a bare Exception, …
                why = first_line(error)[:300]
                faults.append((str(step), why))
                tell("damaged_checkpoint", step, why)
                continue
            with self._all_or_none(step, "was read, but later checkpoints could not be set aside"):
                for later in self.steps():
                    if later > step and self._saved_step(later) in (later, None):
                        self._set_aside(later, step)
                        tell("abandoned_checkpoint", later, f"the run resumes from step {step}")
            same = meta.get("processes", 1) == jax.process_count()  # else each has other rows, at another position
            if not same and "each" in meta["position"]:
                tell("resume_not_exact", step, f"{meta['processes']} processes, each with its own position of the data")
            last = None
            if same and meta["last"]:
                before = decode_position(meta["last"]["before"], is_same=True)
                last = DataFingerprint(before, meta["last"]["crc32"])
            position = decode_position(meta["position"], is_same=same)
            settings = meta.get("settings")  # stepc 0.1 did not write them
            return RestoredCheckpoint(state, meta["step"], position, meta["batch"] if same else {}, last, settings)
        if faults:
            raise ResumeError(
                f"None of the checkpoints in {self.directory} can be read.",
                facts=faults,
                suggestion="To start afresh, name another directory or move this one away.",
            )
        return None

    def close(self) -> None:
        """Close the writer and release the lock. While a save hangs, the lock stays until the process ends."""
        if self._hangs:
            return
        with nullcontext() if self.commit is None else suppress(OSError):  # a save that the end of the run interrupts
            self._writer.close()
        if self._lock is not None:
            self._lock.release()

    def _is_busy_here(self) -> bool:
        return self._begun >= 0 and not (self.directory / str(self._begun)).is_dir()

    def _take_lock(self) -> DirectoryLock | None:
        """The lock, which process 0 takes for all; the directory exists when this returns."""
        try:
            lock = DirectoryLock(self.directory) if self._is_first else None
        except CheckpointError as error:
            if self.commit is not None:
                self.commit.agree(str(error))
            raise
        if self.commit is not None and (failure := self.commit.agree(None)) is not None:
            raise CheckpointError(f"The checkpoint directory cannot be used: {failure}")
        return lock

    @contextmanager
    def _all_or_none(self, step: int, failed: str = "could not be saved") -> Generator[None]:
        """A failure in this block fails the save; if it fails on one process, it fails on all."""
        error, text = None, None
        try:
            yield
        except Exception as raised:  # Orbax and its storage raise many classes, a bare Exception among them
            error, text = raised, first_line(raised)
        failure = text if self.commit is None else self.commit.agree(text)
        if failure is None:
            return
        if error is None:
            with suppress(Exception):  # it repeats what the other process has reported
                self._writer.wait_until_finished()
            raise self._failure(OSError(failure), step, failed)
        raise error if isinstance(error, CheckpointError) else self._failure(error, step, failed) from error

    def _check_directory(self) -> None:
        """Raise where Orbax would not, or too late: it recreates a lost directory, and with it goes the lock."""
        if self._lock is None:
            return
        if not self._lock.is_held():
            raise FileNotFoundError("the directory is not the one that the run began with: its lock is gone")
        probe = self.directory / f"probe{TEMPORARY}"  # if Orbax's own mkdir fails, other processes wait for it
        probe.mkdir()
        probe.rmdir()

    def _check_committed(self) -> None:
        """Raise for a checkpoint in which a leaf is missing; it is set aside. Errors: OSError."""
        path = self.directory / str(self._begun)
        if not path.is_dir():
            raise FileNotFoundError("it was written, and is not there")
        base = {"driver": "file", "path": f"{path}/state/"}
        stored = ts.KvStore.open({"driver": "ocdbt", "base": base}).result().list().result()
        found = {key.decode().partition("/")[0] for key in stored}
        leaves = self._body(self._begun)["leaves"]
        missing = [leaf[0] for leaf, name in zip(leaves, _names(leaves), strict=True) if name not in found]
        if missing:
            self._set_aside(self._begun, self._begun)
            raise OSError(f"it was written, and {len(missing)} of {len(leaves)} leaves are not in it: {missing[0]}")

    def _body(self, step: int) -> Mapping[str, Any]:  # Any: a JSON value
        return json.loads(_stored(self.directory, step)["body"])

    def _is_ours(self, step: int) -> bool:
        """Whether a run wrote this checkpoint here: it is no link, and its metadata is of the step in its name."""
        return not (self.directory / str(step)).is_symlink() and self._saved_step(step) == step

    def _saved_step(self, step: int) -> int | None:
        """The step in the metadata of a folder; None if it cannot be read."""
        try:
            return self._body(step)["step"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _set_aside(self, step: int, instead: int) -> None:
        path = self.directory / str(step)
        if os.path.lexists(path) and self._is_first:
            folder = self.directory / ABANDONED
            folder.mkdir(exist_ok=True)
            names = (folder / f"{step}-for-{instead}-{attempt}" for attempt in count(1))
            path.rename(next(name for name in names if not name.exists()))

    def _in_time(self, act: Callable[[], object]) -> None:
        """Act in a thread that can be abandoned: a wait for a disk cannot be interrupted. Errors: TimeoutError."""
        failures: list[Exception] = []

        def work() -> None:
            try:
                act()
            except Exception as error:  # raised again below
                failures.append(error)

        thread = threading.Thread(target=work, name="stepc-save", daemon=True)
        thread.start()
        thread.join(min(self.timeout_seconds, threading.TIMEOUT_MAX))  # more is an OverflowError
        self._hangs = thread.is_alive()
        if self._hangs:
            raise TimeoutError(f"it did not finish in {self.timeout_seconds} s; its thread still waits for the disk")
        if failures:
            raise failures[0]

    def _failure(self, error: Exception, step: int, failed: str) -> CheckpointError:
        exists = self.directory.is_dir()
        facts = (
            ("step", str(step)),
            ("directory", str(self.directory)),
            ("free", f"{shutil.disk_usage(self.directory).free if exists else 0:,} bytes"),
            ("intact", ", ".join(map(str, self.steps() if exists else ())) or "none"),
        )
        what = f"Step {step} {failed}: {type(error).__name__}: {error}"
        return CheckpointError(what.partition("\n")[0], step=step, facts=facts)


def steps_in(directory: Path) -> list[int]:
    """The steps of all checkpoints, newest first: of the directories with a number as `save` writes it."""
    names = [path.name for path in directory.iterdir() if path.is_dir() and not _is_foreign(path)]
    return sorted((int(name) for name in names if name.isdecimal() and name == str(int(name))), reverse=True)


def restored(directory: Path, like: Any, patterns: Sequence[str], step: int | None) -> Any:  # Any, twice: see `restore`
    """What `restore` gives, of checked arguments."""
    directory = directory.absolute()
    _check_path(directory)
    steps = steps_in(directory) if directory.is_dir() else []
    wanted = steps if step is None else [step]
    if not wanted or wanted[0] not in steps:
        what = f"There is no checkpoint{'' if step is None else f' of step {step}'} in {directory}."
        raise CheckpointError(what, step=step, facts=[("steps", ", ".join(map(str, steps)) or "none")])
    is_read = [any(path_matches(one, path) for one in patterns) for path, _ in leaves_by_path(like)]
    leaves, structure = jax.tree.flatten(like)
    chosen = structure.unflatten([leaf if read else None for leaf, read in zip(leaves, is_read, strict=True)])
    faults: list[tuple[str, str]] = []
    with closing(ocp.Checkpointer(ocp.CompositeCheckpointHandler("state"))) as reader:
        for one in wanted:
            try:
                meta = _checked_meta(directory, one)
                _check_fits(meta, chosen, are_all=False)
                found = iter(jax.tree.leaves(_read_leaves(reader, directory, one, chosen, meta)))
                return structure.unflatten(
                    [next(found) if read else leaf for leaf, read in zip(leaves, is_read, strict=True)]
                )
            except ResumeError:
                raise
            except Exception as error:  # damage shows as ValueError, KeyError, AttributeError, a bare Exception, …
                faults.append((str(one), first_line(error)[:300]))
    raise CheckpointError(f"No checkpoint in {directory} can be read.", step=step, facts=faults)


def _stored(directory: Path, step: int) -> Mapping[str, Any]:  # Any: a JSON value
    """The metadata as it is in the file. Orbax's own `restore` waits for the other processes."""
    return json.loads((directory / str(step) / "meta" / "metadata").read_text())


def _checked_meta(directory: Path, step: int) -> Mapping[str, Any]:  # Any: a JSON value
    """The metadata of a checkpoint. Errors: CheckpointError if it is damaged, ResumeError if it is of a newer stepc."""
    stored = _stored(directory, step)
    if zlib.crc32(stored["body"].encode()) != stored["crc32"]:
        raise CheckpointError("the CRC-32 of the metadata is not the saved one")
    meta = json.loads(stored["body"])
    if meta["format"] > FORMAT:
        facts = (("this stepc reads", f"format {FORMAT}"), ("saved", f"format {meta['format']}"))
        raise ResumeError(f"The checkpoint of step {step} was saved by a newer stepc.", facts=facts)
    if meta["step"] != step:
        raise CheckpointError(f"it is the checkpoint of step {meta['step']}, and its folder was renamed")
    return meta


def _read_leaves(
    reader: ocp.Checkpointer, directory: Path, step: int, target: Any, meta: Mapping[str, Any]
) -> Any:  # Any: a state, or some leaves of one, or their shapes
    """The leaves of a checkpoint at the paths of `target`, placed like those. Errors: CheckpointError for a digest."""
    numbers = {path: number for number, (path, *_) in enumerate(meta["leaves"])}
    paths = [path for path, _ in leaves_by_path(target)]
    likes, structure = jax.tree.flatten(target)
    names = _names(meta["leaves"])
    wanted = {names[numbers[path]]: _shape_of(like) for path, like in zip(paths, likes, strict=True)}
    args = ocp.args.Composite(
        state=ocp.args.PyTreeRestore(
            wanted,
            restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
            **({} if len(wanted) == len(names) else SOME_LEAVES),
        )
    )
    read = reader.restore(directory / str(step), args=args)["state"]
    arrays = [read[name] for name in wanted]
    for path, array in zip(paths, arrays, strict=True):
        saved = meta["leaves"][numbers[path]][-1]
        if (found := _saved_crc32(array)) != saved:
            raise CheckpointError(f"the CRC-32 of {path} is {found:08x}, and {saved:08x} was saved")
    return copy_state(structure.unflatten([with_key_type(one, like) for one, like in zip(arrays, likes, strict=True)]))


def _shape_of(like: Any) -> jax.ShapeDtypeStruct:  # Any: an array, or its shape
    """What Orbax reads for a leaf: a typed key as its numbers; a shape without a place on the default device."""
    numbers = jax.eval_shape(key_data, like)
    sharding = key_data(like).sharding if isinstance(like, jax.Array) else like.sharding
    place = SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(numbers.shape, numbers.dtype, sharding=sharding or place)


def _is_foreign(path: Path) -> bool:
    """Whether someone else made this directory. An empty one may be a checkpoint that a file system has lost."""
    try:
        names = {one.name for one in path.iterdir()}
    except OSError:  # a checkpoint that cannot be read, for all that is known
        return False
    return bool(names) and names.isdisjoint(("state", "meta", "_CHECKPOINT_METADATA"))


def _check_path(directory: Path) -> None:
    """Raise for a path that Orbax cannot take. Errors: CheckpointError."""
    found = [character for character in UNUSABLE if character in str(directory)]
    unprintable = any("\ud800" <= character <= "\udfff" for character in str(directory))
    if found or unprintable:
        why = f"holds {' and '.join(map(repr, found))}" if found else "is not UTF-8"
        raise CheckpointError(
            f"Orbax cannot save in this directory: its path {why}.",
            facts=(("directory", repr(str(directory))),),
            suggestion="Name another directory, or a link to this one.",
        )


def _check_saveable(state: Any) -> None:  # Any: a state
    """Raise for a leaf that Orbax does not write. Errors: CheckpointError."""
    faults = [
        (path, f"expected at least one number, got {leaf.dtype}{list(leaf.shape)}")
        for path, leaf in leaves_by_path(state)
        if leaf.size == 0
    ]
    if faults:
        raise CheckpointError("This state cannot be saved: Orbax does not write empty arrays.", facts=faults)


def _check_fits(meta: Mapping[str, Any], target: Any, *, are_all: bool = True) -> None:  # Any: a state
    """Raise if a checkpoint is of another state. Errors: ResumeError with every leaf that differs.

    Args:
      are_all: whether the target must have every leaf that was saved.
    """
    saved = {path: f"{dtype}{shape}{impl}" for path, shape, dtype, impl, _ in meta["leaves"]}
    wanted = {path: f"{dtype}{shape}{impl}" for path, shape, dtype, impl in _described(target)}
    facts = [
        (path, f"saved {saved.get(path, 'nothing')}, the state has {wanted.get(path, 'nothing')}")
        for path in [*wanted, *(path for path in saved if are_all and path not in wanted)]
        if saved.get(path) != wanted.get(path)
    ]
    if facts:
        raise ResumeError(f"The checkpoint of step {meta['step']} does not fit this state.", facts=facts)


def _described(state: Any) -> list[tuple[str, list[int], str, str]]:  # Any: a state
    """Path, shape, dtype and, for typed keys, implementation of each leaf."""
    return [
        (path, list(leaf.shape), str(leaf.dtype), f" {key_impl_of(leaf)}" if is_typed_key(leaf) else "")
        for path, leaf in leaves_by_path(state)
    ]


def _arrays(state: Any) -> list[jax.Array]:  # Any: a state
    return [key_data(leaf) for leaf in jax.tree.leaves(state)]


def _names(leaves: Sequence[object]) -> list[str]:
    return [f"leaf_{number:05}" for number in range(len(leaves))]


def _saved_crc32(array: jax.Array) -> int:
    """The CRC-32 of the whole array. One that is sharded over processes is gathered for it, one leaf at a time, so that
    any number of processes can check it."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return leaf_crc32(array)
    return leaf_crc32(np.asarray(process_allgather(array, tiled=True)))
