"""Checkpoints on disk: the only file that imports Orbax. It must not know when a run is saved, or why."""

import base64
import fcntl
import json
import os
import shutil
import socket
import time
import zlib
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from stepc.errors import CheckpointError, ResumeError
from stepc.language.state import leaves_by_path
from stepc.runner.anchor import copy
from stepc.runner.sameness import Seen

FORMAT = 1
TEMPORARY = ".orbax-checkpoint-tmp"
ABANDONED, DELETING, LOCK = "abandoned", ".deleting", "lock"


class Vault:
    """A directory of numbered checkpoints, each whole or not there.

    Meaning: `<directory>/<step>/state` and `/meta`; the meta names every leaf with shape, dtype and CRC-32, and has a
      CRC-32 of its own. What was left behind stands in `<directory>/abandoned/`.
    Errors: CheckpointError if the directory cannot be used, is in use, or the state cannot be saved.
    """

    def __init__(self, directory: Path, *, keep: int, state: Any) -> None:  # Any: a state
        self.directory = directory.absolute()
        self.keep = keep
        _check_saveable(state)
        self._lock = _locked(self.directory)
        for left in self.directory.iterdir():  # what a process that was killed was writing or deleting
            if TEMPORARY in left.name or left.name.endswith(DELETING):
                shutil.rmtree(left, ignore_errors=True)
        self._writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler("state", "meta"))
        self._begun = -1

    def save(self, number: int, state: Any, meta: Mapping[str, Any]) -> None:  # Any: a state; what JSON can hold
        """Begin to save; the state may be donated when this returns."""
        # A copy: to read the live state on the host would leave a view of it, and a donation then does nothing.
        leaves = _bare_leaves(copy(state))
        last: Seen | None = meta["last"]
        body = {
            **meta,
            "format": FORMAT,
            "position": _encoded(meta["position"], number),
            "last": last and {"before": _encoded(last.before, number), "crc32": last.crc32},
            "versions": {"jax": jax.__version__, "orbax": ocp.__version__},
            "leaves": [[*row, _digest(leaf)] for row, leaf in zip(_rows(state), leaves, strict=True)],
        }
        text = json.dumps(body)
        self._set_aside(number, number)
        try:
            self._writer.save(
                self.directory / str(number),
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(dict(zip(_names(leaves), leaves, strict=True))),
                    meta=ocp.args.JsonSave({"body": text, "crc32": zlib.crc32(text.encode())}),
                ),
            )
        except Exception as error:  # Orbax and its storage raise many classes, bare Exception among them
            raise self._failure(error, number) from error
        self._begun = number

    def wait(self) -> None:
        """Until the checkpoint that was begun is committed; then the oldest are deleted."""
        try:
            self._writer.wait_until_finished()
        except Exception as error:  # as above
            raise self._failure(error, self._begun) from error
        if not (self.directory / str(self._begun)).is_dir():
            raise self._failure(FileNotFoundError("it is not there after it was written"), self._begun)
        for old in self.steps()[self.keep :]:
            doomed = self.directory / f"{old}{DELETING}"
            (self.directory / str(old)).rename(doomed)  # first, so that a half-deleted one is never taken for a whole
            shutil.rmtree(doomed, ignore_errors=True)

    def is_busy(self) -> bool:
        """Whether a save is under way."""
        return self._begun >= 0 and not (self.directory / str(self._begun)).is_dir()

    def steps(self) -> list[int]:
        """The numbers that are there, newest first."""
        return sorted((int(one.name) for one in self.directory.iterdir() if one.name.isdecimal()), reverse=True)

    def restore(self, target: Any, tell: Callable[[str, int, str], None]) -> tuple[Any, Mapping[str, Any]] | None:
        """The newest checkpoint that is whole, placed like `target`, and its meta; None if there is none at all."""
        faults: list[tuple[str, str]] = []
        for number in self.steps():
            try:
                meta = self._meta(number)
                _check_fits(meta, target)
                state = self._state(number, target, meta)
            except ResumeError:
                raise
            except Exception as error:  # damage shows as ValueError, KeyError, AttributeError, a bare Exception, …
                why = f"{type(error).__name__}: {error}".partition("\n")[0][:300]
                faults.append((str(number), why))
                tell("damaged_checkpoint", number, why)
                continue
            for later in self.steps():
                if later > number:
                    self._set_aside(later, number)
                    tell("abandoned_checkpoint", later, f"the run goes on from step {number}")
            last = meta.get("last") and Seen(_decoded(meta["last"]["before"]), meta["last"]["crc32"])
            return state, {**meta, "position": _decoded(meta["position"]), "last": last}
        if faults:
            raise ResumeError(
                f"None of the checkpoints in {self.directory} can be read.",
                facts=faults,
                suggestion="To begin anew, name another directory, or move this one away.",
            )
        return None

    def close(self) -> None:
        """End the writer and give the directory free."""
        self._writer.close()
        os.close(self._lock)

    def _meta(self, number: int) -> Mapping[str, Any]:
        stored = self._writer.restore(
            self.directory / str(number), args=ocp.args.Composite(meta=ocp.args.JsonRestore())
        )["meta"]
        if zlib.crc32(stored["body"].encode()) != stored["crc32"]:
            raise CheckpointError("the digest of the meta is not the one that was written")
        meta = json.loads(stored["body"])
        if meta["format"] > FORMAT:
            facts = (("this stepc reads", f"format {FORMAT}"), ("saved", f"format {meta['format']}"))
            raise ResumeError(f"The checkpoint of step {number} is of a newer stepc.", facts=facts)
        return meta

    def _state(self, number: int, target: Any, meta: Mapping[str, Any]) -> Any:  # Any: a state
        bare = _bare_leaves(target)
        shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) for leaf in bare]
        wanted = dict(zip(_names(bare), shapes, strict=True))
        restored = self._writer.restore(
            self.directory / str(number),
            args=ocp.args.Composite(
                state=ocp.args.PyTreeRestore(wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted))
            ),
        )["state"]
        leaves = [restored[name] for name in wanted]
        for (path, _, _, _, written), leaf in zip(meta["leaves"], leaves, strict=True):
            if (read := _digest(leaf)) != written:
                raise CheckpointError(f"the digest of {path} is {read}, and {written} was written")
        old, structure = jax.tree.flatten(target)
        return copy(jax.tree.unflatten(structure, [_clothed(*pair) for pair in zip(leaves, old, strict=True)]))

    def _set_aside(self, number: int, instead: int) -> None:
        path = self.directory / str(number)
        if path.exists():
            folder = self.directory / ABANDONED
            folder.mkdir(exist_ok=True)
            names = (folder / f"{number}-for-{instead}-{attempt}" for attempt in count(1))
            path.rename(next(name for name in names if not name.exists()))

    def _failure(self, error: Exception, number: int) -> CheckpointError:
        free = shutil.disk_usage(self.directory).free if self.directory.is_dir() else 0
        facts = (
            ("not saved", f"step {number}"),
            ("directory", str(self.directory)),
            ("free", f"{free:,} bytes"),
            ("whole", ", ".join(map(str, self.steps())) or "none" if self.directory.is_dir() else "none"),
        )
        what = f"Step {number} could not be saved: {type(error).__name__}: {error}"
        return CheckpointError(what.partition("\n")[0], step=number, facts=facts)


def _locked(directory: Path) -> int:
    """Make the directory and take its lock; the system gives it free when the process ends, however it ends."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        facts = (("directory", str(directory)), ("reason", f"{error.strerror} (errno {error.errno})"))
        raise CheckpointError("The directory of the checkpoints cannot be used.", facts=facts) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(lock, 1000).decode(errors="replace")
        os.close(lock)
        facts = (("directory", str(directory)), ("held by", holder))
        raise CheckpointError("Another run saves in this directory.", facts=facts) from None
    os.ftruncate(lock, 0)
    os.write(lock, f"process {os.getpid()} on {socket.gethostname()}, since {time.ctime()}".encode())
    return lock


def _check_saveable(state: Any) -> None:  # Any: a state
    faults = [
        (path, f"expected at least one number, got {leaf.dtype}{list(leaf.shape)}")
        for path, leaf in leaves_by_path(state)
        if leaf.size == 0
    ]
    if faults:
        raise CheckpointError("This state cannot be saved: Orbax does not write arrays without numbers.", facts=faults)


def _check_fits(meta: Mapping[str, Any], target: Any) -> None:  # Any: a state
    saved = {path: f"{dtype}{shape}{impl}" for path, shape, dtype, impl, _ in meta["leaves"]}
    wanted = {path: f"{dtype}{shape}{impl}" for path, shape, dtype, impl in _rows(target)}
    facts = [
        (path, f"saved {saved.get(path, 'nothing')}, the state has {wanted.get(path, 'nothing')}")
        for path in [*wanted, *(one for one in saved if one not in wanted)]
        if saved.get(path) != wanted.get(path)
    ]
    if facts:
        raise ResumeError(f"The checkpoint of step {meta['step']} is of another state.", facts=facts)


def _rows(state: Any) -> list[tuple[str, list[int], str, str]]:  # Any: a state
    return [
        (path, list(leaf.shape), str(leaf.dtype), f" {jax.random.key_impl(leaf)}" if _is_key(leaf) else "")
        for path, leaf in leaves_by_path(state)
    ]


def _is_key(leaf: Any) -> bool:  # Any: an array
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _bare_leaves(state: Any) -> list[jax.Array]:  # Any: a state
    return [jax.random.key_data(leaf) if _is_key(leaf) else leaf for leaf in jax.tree.leaves(state)]


def _clothed(bare: jax.Array, like: Any) -> jax.Array:  # Any: an array, or a typed key
    return jax.random.wrap_key_data(bare, impl=jax.random.key_impl(like)) if _is_key(like) else bare


def _names(leaves: list[jax.Array]) -> list[str]:
    return [f"leaf_{number:05}" for number in range(len(leaves))]


def _digest(leaf: jax.Array) -> int:
    return zlib.crc32(np.asarray(leaf).tobytes())


def _encoded(position: Any, number: int) -> Any:  # Any: where the data stands
    if isinstance(position, bytes):
        return {"bytes": base64.b64encode(position).decode()}
    try:
        json.dumps(position, allow_nan=False)
    except (TypeError, ValueError) as error:
        what = "The position of the data, `get_state()`, is neither bytes nor what JSON can hold."
        raise CheckpointError(what, step=number, facts=(("position", repr(position)),)) from error
    return {"json": position}


def _decoded(stored: Mapping[str, Any]) -> Any:  # Any: where the data stands
    return base64.b64decode(stored["bytes"]) if "bytes" in stored else stored["json"]
