"""Checkpoints on disk, written by Orbax: committed or absent, checked by digests, on one process or by all together.

Orbax's `AsyncCheckpointer` writes and commits. Its `CheckpointManager` would also delete old checkpoints and clean up,
but it waits for the other processes in barriers that do not know of a failed save: with it
`test_directory_that_becomes_read_only_fails_on_all` ends in an abort by gloo, where here all processes raise.
"""

import json
import math
import os
import shutil
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from operator import ge
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import NamedSharding, SingleDeviceSharding

from stepc._language.state import (
    State,
    is_typed_key,
    key_data,
    key_impl_of,
    leaf_crc32,
    leaves_by_path,
    own_shapes,
    path_matches,
    path_of,
    pattern_hint,
    with_key_type,
    with_padding,
)
from stepc._runner.checkpoint import RestoredCheckpoint
from stepc._runner.checkpoint_lock import DirectoryLock
from stepc._runner.data import DataFingerprint, decode_position, encode_position
from stepc._runner.multihost import GroupCommit
from stepc._runner.pending import copy_state
from stepc.errors import CheckpointError, ConfigError, ResumeError, first_line, listed

FORMAT = 1
TEMPORARY, METADATA = ".orbax-checkpoint-tmp", "metadata"
ABANDONED, DELETING = "abandoned", ".deleting"
# Orbax globs the path of a checkpoint for the files of each process, and does not escape it: it finds none, or those
# of another directory. TensorStore reads "\\" as "/".
UNUSABLE = "*?[\\\0"


class MetaHandler(ocp.AsyncCheckpointHandler):
    """Writes the metadata when Orbax commits, in its thread: the digests in it are of every byte of the state."""

    def save(self, directory: Path, args: "MetaArgs") -> None:
        if jax.process_index() == 0:
            text = json.dumps(args.body())
            stored = {"body": text, "crc32": zlib.crc32(text.encode())}
            (Path(directory) / METADATA).write_text(json.dumps(stored))

    async def async_save(self, directory: Path, args: "MetaArgs") -> list[Any] | None:  # Any: futures, to Orbax
        return [Committing(lambda: self.save(directory, args))]

    def restore(self, directory: Path, args: object = None) -> Any:  # Any: a JSON value
        return json.loads((Path(directory) / METADATA).read_text())


@ocp.args.register_with_handler(MetaHandler, for_save=True, for_restore=True)
@dataclass
class MetaArgs(ocp.args.CheckpointArgs):
    """What is saved: `body` gives the metadata when Orbax commits."""

    body: Callable[[], Mapping[str, Any]]  # Any: a JSON value


@dataclass
class Committing:
    """What Orbax's thread waits for before it commits."""

    act: Callable[[], None]

    def result(self, timeout: float | None = None) -> None:
        self.act()


@dataclass(frozen=True)
class WantedLeaf:
    """A leaf of a checkpoint that is to be read.

    Args:
      name: its key in what Orbax reads.
      shape: its own, without padding.
      like: an array, or the shape of one, placed as this will be.
      placed: its numbers there.
    """

    name: str
    path: str
    shape: tuple[int, ...]
    crc32: int
    like: Any  # Any: see `read_leaves`
    placed: jax.ShapeDtypeStruct

    @property
    def is_padded(self) -> bool:
        return self.like.shape != self.shape

    @property
    def is_read_on_host(self) -> bool:
        """Whether Orbax gives it as an array of numpy: not if each process reads a part of it, or it gets padding."""
        return not self.is_padded and self.placed.sharding.is_fully_addressable

    def check(self, crc32: int) -> None:
        """Compare the digest of what was read. Errors: CheckpointError."""
        if crc32 != self.crc32:
            raise CheckpointError(f"the CRC-32 of {self.path} is {crc32:08x}, and {self.crc32:08x} was saved")


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
            # Not compressed: zstd takes most of the time of a save and of a read, and saves a tenth.
            state=ocp.PyTreeCheckpointHandler(use_compression=False),
            meta=MetaHandler(),
            composite_options=ocp.CompositeOptions(async_options=options),
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
                "keys": _keys_with_slashes(state),
            }
            pool = ThreadPoolExecutor(1, thread_name_prefix="stepc-digest")
            rows, digests = _described(state), [_digest_in(pool, leaf) for leaf in leaves]
            pool.shutdown(wait=False)  # its thread ends when they are computed
            args = ocp.args.Composite(
                state=ocp.args.PyTreeSave(dict(zip(_names(leaves), leaves, strict=True))),
                meta=MetaArgs(
                    lambda: {
                        **body,
                        "leaves": [[*row, digest()] for row, digest in zip(rows, digests, strict=True)],
                    }
                ),
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

    def delete_old(self, *, but: Sequence[int] = ()) -> list[int]:
        """Delete the oldest checkpoints, all but `keep` and those that are named; only those that a run has written.

        Returns the steps of what was deleted. Errors: CheckpointError.
        """
        deleted: list[int] = []
        with self._all_or_none(self._begun, "is saved, but older checkpoints could not be deleted"):
            ours = [step for step in self.steps() if self._is_ours(step)] if self._is_first else []
            for old in [step for step in ours[self.keep :] if step not in but]:
                doomed = self.directory / f"{old}{DELETING}"
                with suppress(FileNotFoundError):  # someone else has deleted it
                    (self.directory / str(old)).rename(doomed)  # first, so that one that is half deleted has no number
                    shutil.rmtree(doomed)
                    deleted.append(old)
        return sorted(deleted)

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
                meta = checked_meta(self.directory, step)
                _check_fits(meta, target)
                state = read_leaves(self._writer, self.directory, step, target, meta)
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
            batch, best_values = meta["batch"] if same else {}, meta.get("best_values", ())
            return RestoredCheckpoint(state, meta["step"], position, batch, last, settings, best_values)
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
        if not (self.directory / str(self._begun)).is_dir():
            raise FileNotFoundError("it was written, and is not there")
        leaves = self._body(self._begun)["leaves"]
        missing = missing_leaves(self.directory, self._begun, leaves)
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


def restored(
    directory: Path, like: Any, patterns: Sequence[str], step: int | str | None
) -> Any:  # Any, twice: see `restore`
    """What `restore` gives, of checked arguments."""
    directory = directory.absolute()
    _check_path(directory)
    steps = steps_in(directory) if directory.is_dir() else []
    match step:
        case int():
            wanted = [step]
        case "best" if steps:
            wanted = [_best_step(directory, steps)]
        case _:
            wanted = steps
    if not wanted or wanted[0] not in steps:
        raise _no_checkpoint(directory, step, steps)
    faults: list[tuple[str, str]] = []
    with closing(ocp.Checkpointer(ocp.CompositeCheckpointHandler("state"))) as reader:
        for one in wanted:
            try:
                return _chosen_leaves(reader, directory, one, like, patterns)
            except (ConfigError, ResumeError):
                raise
            except Exception as error:  # damage shows as ValueError, KeyError, AttributeError, a bare Exception, …
                faults.append((str(one), first_line(error)[:300]))
    number = step if isinstance(step, int) else None
    raise CheckpointError(f"No checkpoint in {directory} can be read.", step=number, facts=faults)


def _chosen_leaves(
    reader: ocp.Checkpointer, directory: Path, step: int, like: Any, patterns: Sequence[str]
) -> Any:  # Any, twice: see `restore`
    """The leaves of one checkpoint that the patterns name. Errors: ConfigError for a pattern that names none."""
    meta = checked_meta(directory, step)
    saved = shapes_in(meta)
    wanted = saved if like is None else _by_saved_path(like, saved)
    own = wanted if like is None else _by_saved_path(_unpadded_shapes(like), saved)
    faults = [one for one in patterns if not any(path_matches(one, path) for path in wanted)]
    if faults:
        among = "the checkpoint" if like is None else "`like`"
        expected = f"expected a pattern that matches a leaf of {among}, got"
        raise ConfigError(
            "Invalid arguments to `restore`.",
            facts=[("only", f"{expected} {one!r}") for one in faults],
            suggestion=pattern_hint(faults[0], list(wanted)),
        )
    chosen = {path: leaf for path, leaf in wanted.items() if any(path_matches(one, path) for one in patterns)}
    _check_fits(meta, {path: own[path] for path in chosen}, are_all=False, has="`like`")
    found = read_leaves(reader, directory, step, chosen, meta)
    if like is None:
        return _nested(found, meta.get("keys", {}))
    return jax.tree.unflatten(jax.tree.structure(like), [found.get(path, leaf) for path, leaf in wanted.items()])


def _by_saved_path(like: Any, saved: Mapping[str, object]) -> dict[str, Any]:  # Any, twice: see `restore`
    """The leaves of `like` by their paths in the checkpoint: their own, or those below `params` if none has its own."""
    own = dict(leaves_by_path(like))
    below = {f"params/{path}" if path else "params": leaf for path, leaf in own.items()}
    return below if own.keys().isdisjoint(saved) and not below.keys().isdisjoint(saved) else own


def shapes_in(meta: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:  # Any: a JSON value
    """Shape and dtype of each leaf of a checkpoint, by path."""

    def dtype_of(name: str, impl: str) -> Any:  # Any: a dtype, of numpy or of keys
        return jax.eval_shape(partial(jax.random.key, 0, impl=impl.strip())).dtype if impl else jnp.dtype(name)

    return {path: jax.ShapeDtypeStruct(shape, dtype_of(dtype, impl)) for path, shape, dtype, impl, _ in meta["leaves"]}


def _nested(leaves: Mapping[str, Any], keys: Mapping[str, Sequence[str]]) -> dict[str, Any]:  # Any: arrays, and dicts
    """A dict for each level of the paths. Keys that hold a slash themselves are as `keys` says."""
    nested: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *above, last = keys.get(path) or path.split("/")
        level = nested
        for key in above:
            level = level.setdefault(key, {})
        level[last] = leaf
    return nested


def _keys_with_slashes(state: Any) -> dict[str, list[str]]:  # Any: a state
    """The keys of each leaf of which one holds a slash, as those of Haiku do; by path."""
    each = [[path_of((key,)) for key in keys] for keys, _ in jax.tree_util.tree_leaves_with_path(state)]
    return {"/".join(keys): keys for keys in each if any("/" in key for key in keys)}


def _no_checkpoint(directory: Path, step: int | str | None, steps: Sequence[int]) -> CheckpointError:
    """The error for a checkpoint that is not there, with what is."""
    number = step if isinstance(step, int) else None
    what = f"There is no checkpoint{'' if number is None else f' of step {number}'} in {directory}."
    remedy = None
    if directory.parent.is_dir() and directory.name in map(str, steps_in(directory.parent)):
        remedy = f"This is one checkpoint of a run: `sc.restore({str(directory.parent)!r}, step={directory.name})`."
    elif not steps and directory.is_dir():
        runs = [str(path) for path in sorted(directory.iterdir()) if path.is_dir() and steps_in(path)]
        remedy = f"There are checkpoints in {listed(runs)}." if runs else None
    return CheckpointError(
        what, step=number, facts=[("steps", ", ".join(map(str, steps)) or "none")], suggestion=remedy
    )


def _best_step(directory: Path, steps: Sequence[int]) -> int:
    """The step with the best value, by the metric that the newest checkpoint names. Errors: CheckpointError."""
    metas = {step: meta for step in steps if (meta := meta_or_none(directory, step)) is not None}
    best = next((meta.get("best") for meta in metas.values()), None)
    if best is None:
        names = dict.fromkeys(name for meta in metas.values() for name in meta.get("metrics", {}))
        raise CheckpointError(
            f"The run that saved in {directory} did not say which checkpoint is the best.",
            facts=[("steps", ", ".join(map(str, steps))), ("metrics", ", ".join(names) or "none")],
            suggestion='Give the run `sc.Checkpoints(…, best=("eval/loss", "min"))`, or name a step here.',
        )
    name, mode = best
    values = {step: meta.get("metrics", {}).get(name) for step, meta in metas.items()}
    finite = {step: value for step, value in values.items() if isinstance(value, float) and math.isfinite(value)}
    if not finite:
        facts = [("steps", ", ".join(map(str, steps)))]
        raise CheckpointError(f"No checkpoint in {directory} has a finite value of {name!r}.", facts=facts)
    return min(finite, key=lambda step: (finite[step] if mode == "min" else -finite[step], step))


def _stored(directory: Path, step: int) -> Mapping[str, Any]:  # Any: a JSON value
    """The metadata as it is in the file. Orbax's own `restore` waits for the other processes."""
    return json.loads((directory / str(step) / "meta" / METADATA).read_text())


def checked_meta(directory: Path, step: int) -> Mapping[str, Any]:  # Any: a JSON value
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


def missing_leaves(directory: Path, step: int, leaves: Sequence[Sequence[Any]]) -> list[str]:  # Any: JSON values
    """The paths of the leaves in the metadata of a checkpoint that are not stored in it."""
    base = {"driver": "file", "path": f"{directory / str(step)}/state/"}
    stored = ts.KvStore.open({"driver": "ocdbt", "base": base}).result().list().result()
    found = {key.decode().partition("/")[0] for key in stored}
    return [leaf[0] for leaf, name in zip(leaves, _names(leaves), strict=True) if name not in found]


def meta_or_none(directory: Path, step: int) -> Mapping[str, Any] | None:  # Any: a JSON value
    """The metadata of a checkpoint; None if it cannot be read."""
    try:
        return checked_meta(directory, step)
    except (CheckpointError, ResumeError, OSError, ValueError, KeyError, TypeError):
        return None


def read_leaves(
    reader: ocp.Checkpointer, directory: Path, step: int, target: Any, meta: Mapping[str, Any]
) -> Any:  # Any: a state, or some leaves of one, or their shapes
    """The leaves of a checkpoint at the paths of `target`, placed like those. Errors: CheckpointError for a digest."""
    leaves = _wanted_leaves(target, meta)
    shapes = {leaf.name: leaf.placed for leaf in leaves}
    on_host = [leaf for leaf in leaves if leaf.is_read_on_host]
    # Without `strict`, Orbax fills up what is smaller.
    strict = {"strict": False} if any(leaf.is_padded for leaf in leaves) else {}
    how = ocp.checkpoint_utils.construct_restore_args(shapes, **strict)
    how |= {leaf.name: ocp.RestoreArgs(restore_type=np.ndarray) for leaf in on_host}
    is_part = len(leaves) < len(meta["leaves"])
    args = ocp.args.PyTreeRestore(shapes, restore_args=how, partial_restore=is_part)
    read = reader.restore(directory / str(step), args=ocp.args.Composite(state=args))["state"]
    arrays = _from_host(on_host, read) | _from_devices([leaf for leaf in leaves if not leaf.is_read_on_host], read)
    return jax.tree.unflatten(
        jax.tree.structure(target), [with_key_type(arrays[leaf.name], leaf.like) for leaf in leaves]
    )


def _wanted_leaves(target: Any, meta: Mapping[str, Any]) -> list[WantedLeaf]:  # Any: see `read_leaves`
    names = _names(meta["leaves"])
    saved = {
        path: (name, path, tuple(shape), crc32)
        for name, (path, shape, _, _, crc32) in zip(names, meta["leaves"], strict=True)
    }
    return [
        WantedLeaf(*saved[path], like, _shape_of(like))
        for (path, _), like in zip(leaves_by_path(target), jax.tree.leaves(target), strict=True)
    ]


def _from_host(leaves: Sequence[WantedLeaf], read: dict[str, Any]) -> dict[str, jax.Array]:  # Any: arrays of numpy
    """The leaves in memory that a step can donate, by name. Errors: CheckpointError for a digest."""
    arrays: dict[str, jax.Array] = {}
    shared: dict[str, jax.Array] = {}
    with ThreadPoolExecutor() as pool:  # zlib computes while this thread moves the leaves
        digests = [pool.submit(leaf_crc32, read[leaf.name]) for leaf in leaves]
        for leaf in leaves:
            on_host = read.pop(leaf.name)  # it is freed as soon as it is copied
            arrays[leaf.name] = array = jax.device_put(on_host, leaf.placed.sharding)
            if _shares(array, on_host):
                shared[leaf.name] = array
    for leaf, digest in zip(leaves, digests, strict=True):
        leaf.check(digest.result())
    return arrays | copy_state(shared)


def _shares(array: jax.Array, on_host: np.ndarray) -> bool:
    """Whether an array lives in the memory of one of numpy, as jax has it on CPU: a donation would do nothing."""
    return any(
        shard.device.platform == "cpu" and np.may_share_memory(np.asarray(shard.data), on_host)
        for shard in array.addressable_shards
    )


def _from_devices(leaves: Sequence[WantedLeaf], read: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The same for what Orbax has put on the devices. All processes gather the leaves in the same order."""
    arrays: dict[str, jax.Array] = {}
    for leaf in leaves:
        array = _with_padding(read[leaf.name], leaf.shape) if leaf.is_padded else read[leaf.name]
        leaf.check(leaf_crc32(_on_host(array, leaf.shape if leaf.is_padded else None)))
        arrays[leaf.name] = array
    return copy_state(arrays)  # a view on the host keeps the memory of what was read


def _with_padding(array: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """What was read into a larger leaf, with padding beyond its own shape in place of the zeros of Orbax."""
    sharding = array.sharding
    if not isinstance(sharding, NamedSharding):
        raise ValueError("a padded leaf is sharded")
    place = sharding.with_memory_kind("device")
    return jax.device_put(with_padding(jax.device_put(array, place), shape, place), sharding)


def _shape_of(like: Any) -> jax.ShapeDtypeStruct:  # Any: an array, or its shape
    """What Orbax reads for a leaf: a typed key as its numbers; a shape without a place on the default device."""
    numbers = jax.eval_shape(key_data, like)
    match like:
        case jax.Array():
            sharding = key_data(like).sharding
        case jax.ShapeDtypeStruct():
            sharding = like.sharding
        case _:  # an array of numpy
            sharding = None
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


def _check_fits(
    meta: Mapping[str, Any], target: Any, *, are_all: bool = True, has: str = "the state"
) -> None:  # Any: a state
    """Raise if a checkpoint is of another state. Errors: ResumeError with every leaf that differs.

    Args:
      are_all: whether the target must have every leaf that was saved.
      has: what the message calls the target.
    """
    saved = {path: f"{dtype}{shape}{impl}" for path, shape, dtype, impl, _ in meta["leaves"]}
    wanted = {path: f"{dtype}{shape}{impl}" for path, shape, dtype, impl in _described(target)}
    facts = [
        (path, f"saved {saved.get(path, 'nothing')}, {has} has {wanted.get(path, 'nothing')}")
        for path in [*wanted, *(path for path in saved if are_all and path not in wanted)]
        if saved.get(path) != wanted.get(path)
    ]
    if facts:
        sizes, wrong = {path: tuple(shape) for path, shape, *_ in meta["leaves"]}, dict(facts)
        differ = [(leaf.shape, sizes.get(path, ())) for path, leaf in leaves_by_path(target) if path in wrong]
        may_be_padded = not are_all and all(_is_larger(shape, own) for shape, own in differ)
        fits = has.replace("the state", "this state")
        if not are_all and any(path not in saved for path in wanted):
            facts.append(("there is", _contents(saved)))
        remedy = "If `like` is of a padded state, give the state itself, or `state.unpadded().params`."
        what = f"The checkpoint of step {meta['step']} does not fit {fits}."
        raise ResumeError(what, facts=facts, suggestion=remedy if may_be_padded else None)


def _is_larger(shape: tuple[int, ...], own: tuple[int, ...]) -> bool:
    """Whether a shape may be one with padding."""
    return shape != own and len(shape) == len(own) and all(map(ge, shape, own))


def _contents(paths: Iterable[str]) -> str:
    """What a checkpoint holds: the first key of its paths, with the number of leaves below each."""
    counts = Counter(path.partition("/")[0] for path in paths)
    return ", ".join(f"{key} ({num:,} leaves)" if num > 1 else key for key, num in counts.items())


def _described(state: Any) -> list[tuple[str, list[int], str, str]]:  # Any: a state
    """Path, shape, dtype and, for typed keys, implementation of each leaf."""
    return [
        (path, list(leaf.shape), str(leaf.dtype), f" {key_impl_of(leaf)}" if is_typed_key(leaf) else "")
        for path, leaf in leaves_by_path(_unpadded_shapes(state))
    ]


def _unpadded_shapes(state: Any) -> Any:  # Any, twice: a state
    """The state with the shape of each padded leaf in its place: that is the one that is saved."""
    return own_shapes(state) if isinstance(state, State) else state


def _arrays(state: Any) -> list[jax.Array | np.ndarray]:  # Any: a state
    """What is saved of each leaf. One that is padded is cut on the host, where its digest is computed too."""
    leaves = zip(jax.tree.leaves(state), jax.tree.leaves(_unpadded_shapes(state)), strict=True)
    return [key_data(leaf) if leaf.shape == own.shape else _on_host(leaf, own.shape) for leaf, own in leaves]


def _names(leaves: Sequence[object]) -> list[str]:
    return [f"leaf_{number:05}" for number in range(len(leaves))]


def _digest_in(pool: ThreadPoolExecutor, array: jax.Array | np.ndarray) -> Callable[[], int]:
    """What gives the digest of an array, which the pool computes while Orbax writes. No buffer on a device is held."""
    if _is_here(array):
        return pool.submit(leaf_crc32, np.asarray(array)).result
    digest = leaf_crc32(_on_host(array))  # all processes gather the array at the same point of the run
    return lambda: digest


def _is_here(array: jax.Array | np.ndarray) -> bool:
    """Whether this process has the whole array."""
    return isinstance(array, np.ndarray) or array.is_fully_addressable or array.is_fully_replicated


def _on_host(array: jax.Array | np.ndarray, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """The whole array, without padding if it has a shape of its own.

    One that is sharded over processes is gathered, one leaf at a time, so that any number of processes can read it.
    """
    whole = np.asarray(array if _is_here(array) else process_allgather(array, tiled=True))
    return whole if shape is None else np.ascontiguousarray(whole[tuple(map(slice, shape))])
