"""What the processes of a run say to each other while they save: all of them commit a checkpoint, or none."""

import fcntl
import json
import os
import shutil
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from itertools import count
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from stepc._distributed.coordination import FailureBroadcast, KeyValueStore, poll
from stepc._runner.checkpoint import bare_leaves, check_fits, check_saveable, digest, names_of, rows_of, with_key_type
from stepc._runner.data import DataFingerprint, decode_position, encode_position
from stepc._runner.pending import copy_state
from stepc.errors import CheckpointError, ResumeError

LOOK_SECONDS = 0.02


class GroupCommit:
    """The saves of one run.

    Args:
      place: where on the board.
    `is_busy` is whether a save is under way on any process, as of the last poll before a step.
    """

    def __init__(self, board: KeyValueStore, alarm: FailureBroadcast, place: str) -> None:
        self.board, self.alarm, self.place = board, alarm, place
        self.is_first = board.me == 0
        self.is_busy = False
        self.is_busy_here: Callable[[], bool] = lambda: False
        self._attempt = 0

    def begin(self) -> None:
        """A save begins, on all processes."""
        self._attempt += 1
        self.is_busy = True

    def fail(self, text: str) -> None:
        """This process cannot save: no other is to wait for it."""
        self.board.put(self._failed, f"process {self.board.me}: {text}")

    def agree(self, text: str | None) -> str | None:
        """Once all are at the same place: why it failed, on whichever process; None if it failed on none.

        Args:
          text: why it failed here.
        """
        if text is not None:
            self.fail(text)
        failed = poll((int(text is not None),), tuple(range(self.board.num)))
        return self.board.read(self._failed, seconds=5) if failed.any() else None

    def everyone(self, number: int, mine: str) -> list[str]:
        """What each process has to say of a step, for process 0; the others get their own alone."""
        here = f"{self.place}/save/{self._attempt}/{number}"
        self.board.put(f"{here}/{self.board.me}", mine)
        if not self.is_first:
            return [mine]
        return [self.board.read(f"{here}/{process}", seconds=60) or mine for process in range(self.board.num)]

    def barrier(self, *, key: str, timeout_ms: int) -> None:
        """Wait until all are here; it is Orbax that calls this, from its own thread.

        Why: jax's own barrier waits its whole time for a process that has failed to write, or is gone.
        Errors: OSError with what failed on another process; TimeoutError.
        """
        here, until = f"{self.place}/barrier/{self._attempt}/{key}", time.monotonic() + timeout_ms / 1000
        self.board.put(f"{here}/{self.board.me}", "here")
        missing = list(range(self.board.num)) if self.is_first else ["all"]
        while missing:
            missing = [one for one in missing if self.board.peek(f"{here}/{one}") is None]
            if (text := self.board.peek(self._failed)) is not None:
                raise OSError(text)
            if (cause := self.alarm.heard()) is not None or self.alarm.exit_code is not None:
                raise OSError("the run has ended" if cause is None else cause.text)
            if missing and time.monotonic() > until:
                raise TimeoutError(f"the processes {missing} did not write their part in time")
            time.sleep(LOOK_SECONDS if missing else 0)
        if self.is_first:
            self.board.put(f"{here}/all", "here")

    @property
    def _failed(self) -> str:
        return f"{self.place}/failed/{self._attempt}"


FORMAT = 1
TEMPORARY = ".orbax-checkpoint-tmp"
ABANDONED, DELETING, LOCK = "abandoned", ".deleting", "lock"


class CheckpointStore:
    """A directory of numbered checkpoints, each whole or not there.

    Meaning: `<directory>/<step>/state` and `/meta`; the meta names every leaf with shape, dtype and CRC-32, and has a
      CRC-32 of its own. What was left behind stands in `<directory>/abandoned/`.
    Errors: CheckpointError if the directory cannot be used, is in use, or the state cannot be saved.
    """

    def __init__(
        self, directory: Path, *, keep: int, timeout_seconds: float, state: Any, commit: GroupCommit | None = None
    ) -> None:  # Any: a state
        self.directory = directory.absolute()
        self.keep, self.timeout_seconds = keep, timeout_seconds
        self.commit = commit
        self._is_first = commit is None or commit.is_first  # the one that moves and deletes
        check_saveable(state)
        self._lock = self._locked()
        for left in self.directory.iterdir() if self._is_first else ():  # what a killed process wrote or deleted
            if TEMPORARY in left.name or left.name.endswith(DELETING):
                shutil.rmtree(left, ignore_errors=True)
        # Directories are made in the call: where that fails in Orbax's own thread, others wait for it, without an end
        # that Python could see, and the process hangs at its exit for 20 minutes.
        barrier = None if commit is None else commit.barrier
        made_at_once = ocp.AsyncOptions(barrier_sync_fn=barrier, create_directories_asynchronously=False)
        items = ocp.CompositeCheckpointHandler(
            "state", "meta", composite_options=ocp.CompositeOptions(async_options=made_at_once)
        )
        self._writer = ocp.AsyncCheckpointer(items, async_options=made_at_once)
        self._begun = -1
        self._hangs = False
        if commit is not None:
            commit.is_busy_here = self._is_busy_here

    def _locked(self) -> int | None:
        """The lock, which process 0 takes for all; when this returns the directory is there."""
        try:
            lock, text = _locked(self.directory) if self._is_first else None, None
        except CheckpointError as error:
            if self.commit is not None:
                self.commit.agree(str(error))
            raise
        if self.commit is not None and (text := self.commit.agree(None)) is not None:
            raise CheckpointError(f"The directory of the checkpoints cannot be used: {text}")
        return lock

    def save(self, number: int, state: Any, meta: Mapping[str, Any]) -> None:  # Any: a state; what JSON can hold
        """Begin to save; the state may be donated when this returns."""
        if self.commit is not None:
            self.commit.begin()
        with self._agreed(number):
            self._check_is_ours()
            self._set_aside(number, number)
        with self._agreed(number):
            # A copy: to read the live state on the host would leave a view of it, and a donation then does nothing.
            leaves = bare_leaves(copy_state(state))
            last: DataFingerprint | None = None if self.commit is not None else meta["last"]
            body = {
                **meta,
                "format": FORMAT,
                "position": self._positions(meta["position"], number),
                "last": last and {"before": encode_position(last.before, number), "crc32": last.crc32},
                "processes": jax.process_count(),
                "versions": {"jax": jax.__version__, "orbax": ocp.__version__},
                "leaves": [[*row, digest(leaf)] for row, leaf in zip(rows_of(state), leaves, strict=True)],
            }
            text = json.dumps(body)
            args = ocp.args.Composite(
                state=ocp.args.PyTreeSave(dict(zip(names_of(leaves), leaves, strict=True))),
                meta=ocp.args.JsonSave({"body": text, "crc32": zlib.crc32(text.encode())}),
            )
            self._in_time(lambda: self._writer.save(self.directory / str(number), args=args))
        self._begun = number

    def wait(self) -> None:
        """Until the checkpoint that was begun is committed; then the oldest are deleted."""
        with self._agreed(self._begun):
            self._in_time(self._writer.wait_until_finished)
            if not (self.directory / str(self._begun)).is_dir():
                raise FileNotFoundError("it is not there after it was written")
        for old in self.steps()[self.keep :] if self._is_first else ():
            doomed = self.directory / f"{old}{DELETING}"
            (self.directory / str(old)).rename(doomed)  # first, so that a half-deleted one is never taken for a whole
            shutil.rmtree(doomed, ignore_errors=True)

    def is_busy(self) -> bool:
        """Whether a save is under way, on any process."""
        return self._is_busy_here() if self.commit is None else self.commit.is_busy

    def _is_busy_here(self) -> bool:
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
                check_fits(meta, target)
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
            same = meta.get("processes", 1) == jax.process_count()  # else each has other rows, and another place
            if not same and "each" in meta["position"]:
                tell("resume_not_exact", number, f"{meta['processes']} processes, each at another place of its data")
            batch = meta["batch"] if same else {}
            last = meta.get("last") and DataFingerprint(
                decode_position(meta["last"]["before"], is_same=True), meta["last"]["crc32"]
            )
            position = decode_position(meta["position"], is_same=same)
            return state, {**meta, "batch": batch, "position": position, "last": last if same else None}
        if faults:
            raise ResumeError(
                f"None of the checkpoints in {self.directory} can be read.",
                facts=faults,
                suggestion="To begin anew, name another directory, or move this one away.",
            )
        return None

    def close(self) -> None:
        """End the writer and give the directory free; while a save hangs it stays taken, until the process ends."""
        if self._hangs:
            return
        with nullcontext() if self.commit is None else suppress(OSError):  # what a run that has ended left unsaved
            self._writer.close()
        if self._lock is not None:
            os.close(self._lock)

    @contextmanager
    def _agreed(self, number: int) -> Iterator[None]:
        """What fails in here fails as a save; and on all processes, if it does on one."""
        error, text = None, None
        try:
            yield
        except Exception as raised:  # Orbax and its storage raise many classes, bare Exception among them
            error, text = raised, f"{type(raised).__name__}: {raised}".partition("\n")[0]
        told = text if self.commit is None else self.commit.agree(text)
        if told is None:
            return
        if error is None:
            with suppress(Exception):  # what it says, the other process has said
                self._writer.wait_until_finished()
            raise self._failure(OSError(told), number)
        raise error if isinstance(error, CheckpointError) else self._failure(error, number) from error

    def _positions(self, position: Any, number: int) -> Any:  # Any: where the data stands
        mine = encode_position(position, number)
        if self.commit is None:
            return mine
        each = [json.loads(one) for one in self.commit.everyone(number, json.dumps(mine))]
        return mine if all(one == mine for one in each) else {"each": each}

    def _check_is_ours(self) -> None:
        """Orbax makes a directory that is gone anew; nobody would hear that the checkpoints, and the lock, are lost."""
        if self._lock is None:
            return
        try:
            is_ours = os.path.samestat(os.fstat(self._lock), (self.directory / LOCK).stat())
        except OSError:
            is_ours = False
        if not is_ours:
            raise FileNotFoundError("the directory is not the one that the run began with: its lock is gone")

    def _in_time(self, act: Callable[[], object]) -> None:
        """Do it in a thread that may be left alone: what waits for a disk cannot be interrupted."""
        failures: list[Exception] = []

        def work() -> None:
            try:
                act()
            except Exception as error:  # it is raised again below
                failures.append(error)

        thread = threading.Thread(target=work, name="stepc-save", daemon=True)
        thread.start()
        thread.join(self.timeout_seconds)
        self._hangs = thread.is_alive()
        if self._hangs:
            raise TimeoutError(f"it did not end within {self.timeout_seconds} s; its thread still waits for the disk")
        if failures:
            raise failures[0]

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
        bare = bare_leaves(target)
        shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) for leaf in bare]
        wanted = dict(zip(names_of(bare), shapes, strict=True))
        restored = self._writer.restore(
            self.directory / str(number),
            args=ocp.args.Composite(
                state=ocp.args.PyTreeRestore(wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted))
            ),
        )["state"]
        leaves = [restored[name] for name in wanted]
        for (path, _, _, _, written), leaf in zip(meta["leaves"], leaves, strict=True):
            if (read := digest(leaf)) != written:
                raise CheckpointError(f"the digest of {path} is {read}, and {written} was written")
        old, structure = jax.tree.flatten(target)
        return copy_state(
            jax.tree.unflatten(structure, [with_key_type(*pair) for pair in zip(leaves, old, strict=True)])
        )

    def _set_aside(self, number: int, instead: int) -> None:
        path = self.directory / str(number)
        if path.exists() and self._is_first:
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
