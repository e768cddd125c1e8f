"""What the processes of a job tell each other: a key-value store, a poll of small integers, and the failure broadcast.

It knows no arrays but those of the poll. `jax.experimental.multihost_utils` does not replace it, as fault tests show:
`assert_equal` shows a process its own value and all values concatenated, without names (rows 76 and 77 ask for both
sides, by path); `process_allgather` waits for the steps that an accelerator has in its queue, and lets gloo's
ValueError through (73); `reached_preemption_sync_point` handles SIGTERM only, and agrees on a later step in a thread of
its own (78: SIGINT and SIGTERM, at the same step; 79: the end of data). `live_devices` waits, as a barrier without a
timeout, for each process that is alive but stuck (75).
"""

import atexit
import json
import logging
import os
import re
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import TracebackType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stepc._forks import undo_in_children
from stepc._jax import Client, membership
from stepc.errors import Facts, PeerError, first_line

WAIT_SECONDS = 300.0  # how long the others may take to arrive at the same place: they load data, they compile
ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # the memory address of an object, which differs between processes
MAX_SHOWN = 8  # differences listed in a message

GRACE_SECONDS = 1.0  # how long the main thread has to notice a failure: it is between steps, or stuck in a collective
LINGER_SECONDS = 1.4  # how long process 0, which serves the store, stays so that the others can read it
LEAVE_SECONDS = 30.0  # how long a program may take to end once `run` has raised
LISTEN_SECONDS = 86400.0  # the longest single wait for a failure; then the thread waits again
ENDED = ""  # what a process that ends in order writes to its own key

_LOG = logging.getLogger("stepc")


@dataclass(frozen=True, eq=False)  # one per process, compared by identity
class KeyValueStore:
    """Short texts that all processes of a job can write and read.

    Args:
      me: the index of this process.
      num: the number of processes.
    """

    client: Client
    me: int
    num: int
    _counts: Counter[str] = field(default_factory=Counter)

    def put(self, key: str, text: str, *, overwrite: bool = False) -> bool:
        """Write a text; whether it was written. An existing one is kept without `overwrite`."""
        try:
            self.client.key_value_set(key, text, overwrite)
        except jax.errors.JaxRuntimeError:  # the key exists, or the store is gone
            return False
        return True

    def read(self, key: str, *, seconds: float = WAIT_SECONDS) -> str | None:
        """Wait for a text; None if it does not come, or the store is gone."""
        try:
            return self.client.blocking_key_value_get(key, int(seconds * 1000))
        except jax.errors.JaxRuntimeError:
            return None

    def peek(self, key: str) -> str | None:
        """The text, if there is one by now."""
        try:
            return self.client.key_value_try_get(key)
        except jax.errors.JaxRuntimeError:
            return None

    def number(self, topic: str) -> int:
        """How often this process has asked for this topic. All processes ask in the same order, so keys match."""
        self._counts[topic] += 1
        return self._counts[topic]

    def differences(self, topic: str, mine: Mapping[str, str], *, among: Sequence[int] | None = None) -> Facts:
        """Rows of (name, both values) for what differs between the processes; the same rows on each.

        Args:
          topic: what is compared; all processes compare the same topics in the same order.
          among: the processes that take part; by default all.
        Errors: PeerError if one does not take part in time.
        The first process reads all values and writes the verdict, so that each value is read once.
        """
        processes = list(range(self.num) if among is None else among)
        prefix = f"stepc/{topic}/{'-'.join(map(str, processes))}/{self.number(f'{topic} {processes}')}"
        self.put(f"{prefix}/{self.me}", json.dumps({name: ADDRESS.sub("", text) for name, text in mine.items()}))
        if self.me == processes[0]:
            texts = {process: self.read(f"{prefix}/{process}") for process in processes}
            self.put(f"{prefix}/verdict", json.dumps(_verdict(texts)))
        verdict = self.read(f"{prefix}/verdict", seconds=WAIT_SECONDS * 2)
        missing, rows = ([processes[0]], []) if verdict is None else json.loads(verdict)
        if missing:
            what = f"Process {missing[0]} did not compare its {topic} with the others in time."
            raise PeerError(what, process=missing[0], phase="compare")
        return tuple((name, text) for name, text in rows)


def _verdict(texts: Mapping[int, str | None]) -> tuple[list[int], list[tuple[str, str]]]:
    """The processes that wrote nothing, and what differs."""
    missing = [process for process, text in texts.items() if text is None]
    if missing:
        return missing, []
    values = {process: json.loads(text or "") for process, text in texts.items()}
    first, *others = values
    rows = []
    for name in dict.fromkeys(name for named in values.values() for name in named):
        expected = values[first].get(name, "nothing")
        odd = next((process for process in others if values[process].get(name, "nothing") != expected), None)
        if odd is not None:
            got = values[odd].get(name, "nothing")
            rows.append((name, f"process {first}: {expected}; process {odd}: {got}"))
    more = [("and", f"{len(rows) - MAX_SHOWN} more")] if len(rows) > MAX_SHOWN else []
    return [], rows[:MAX_SHOWN] + more


def key_value_store() -> KeyValueStore | None:
    """The store of this job; None if the job has one process."""
    joined = membership()
    return None if joined is None or joined[2] == 1 else _store(*joined)


@cache
def _store(client: Client, me: int, num: int) -> KeyValueStore:
    return KeyValueStore(client, me, num)


def poll(numbers: tuple[int, ...], among: tuple[int, ...]) -> np.ndarray:
    """The numbers of every process: one row of int32 each, in the order of `among`. All of them must call this.

    Why: what one host alone knows (its data has ended, a signal came) must be known to all before the next step,
      since a process that leaves out a step on its own keeps the others waiting for ever. It takes 0.3 ms on two
      processes of one machine.
    Errors: PeerError if one of them is gone.
    It runs on CPU devices where there are any, so as not to wait for the steps that an accelerator has in its queue.
    """
    gather, mine, shape = _gather(among, len(numbers))
    row = jax.device_put(np.asarray(numbers, np.int32)[None], mine)
    try:
        return np.asarray(gather(row, shape))
    except (ValueError, RuntimeError) as error:  # gloo raises a builtin ValueError, jax a RuntimeError
        raise PeerError(f"The processes could not agree: {first_line(error)}", phase="agree") from error


def poll_digest(text: str) -> int:
    """A number to poll in place of a text: its CRC-32 without the last bit, so that it fits into int32."""
    return zlib.crc32(text.encode()) >> 1


@cache
def _gather(
    among: tuple[int, ...], length: int
) -> tuple[Callable[[jax.Array, tuple[int, int]], jax.Array], Any, tuple[int, int]]:  # Any: a device
    try:
        devices = jax.devices("cpu")
    except RuntimeError:  # this jax was restricted to an accelerator
        devices = jax.devices()
    firsts = [next(device for device in devices if device.process_index == process) for process in among]
    mesh = Mesh(np.asarray(firsts), ("process",))
    rows = NamedSharding(mesh, PartitionSpec("process"))
    replicate = jax.jit(lambda row: row, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def gather(row: jax.Array, shape: tuple[int, int]) -> jax.Array:
        return replicate(jax.make_array_from_single_device_arrays(shape, rows, [row]))

    mine = next(device for device in firsts if device.process_index == jax.process_index())
    return gather, mine, (len(among), length)


@dataclass(frozen=True)
class FailureCause:
    """Why the job ends: which process failed, at which step and in which phase, and the text of its error."""

    process: int
    step: int | None
    phase: str
    text: str
    by: int  # the process that broadcasts it

    def error(self) -> PeerError:
        """What the other processes raise."""
        what = f"Process {self.process} failed: {self.text}"
        return PeerError(what, process=self.process, step=self.step, phase=self.phase)


@dataclass
class FailureBroadcast:
    """Lets one failure end all processes: broadcasts that of this process, and listens for those of the others."""

    store: KeyValueStore
    cause: FailureCause | None = None
    exit_code: int | None = None
    _failed_at: float = 0.0
    _received: threading.Event = field(default_factory=threading.Event)
    _acknowledged: threading.Event = field(default_factory=threading.Event)
    _has_ended: bool = False
    _thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._listen, name="stepc-failures", daemon=True)
        self._thread.start()
        atexit.register(self._at_exit)
        self._excepthook, sys.excepthook = sys.excepthook, self._uncaught
        undo_in_children(self._forget)

    def fail(self, cause: FailureCause, *, exit_code: int = 1) -> None:
        """End all processes because this one has failed; only its first failure is broadcast."""
        self._acknowledged.set()
        if self.exit_code is None:
            self.exit_code, self._failed_at = exit_code, time.monotonic()
            self.send(cause)

    def send(self, cause: FailureCause) -> None:
        """End all processes, this one included, even if its main thread is stuck."""
        for process in range(self.store.num):
            self.store.put(_key(process), json.dumps(cause.__dict__))

    def received(self, *, seconds: float = 0.0) -> FailureCause | None:
        """Why another process failed, if one did; waits this long for an answer."""
        return self.cause if self._received.wait(seconds) else None

    def end_now(self, cause: FailureCause) -> None:
        """End this process alone, immediately."""
        _end_process(f"stepc.errors.PeerError: {cause.error()}\n", self.exit_code or 1)

    def _listen(self) -> None:
        text = self._wait_for_failure()
        if text in (None, ENDED) or self._has_ended:
            return
        cause = FailureCause(**json.loads(text or ""))
        if cause.by == self.store.me and self._acknowledged.is_set():
            return
        self.cause, self._failed_at = cause, time.monotonic()
        self._received.set()
        _LOG.error("process %d failed at step %s (%s): %s", cause.process, cause.step, cause.phase, cause.text)
        if cause.by == self.store.me:  # the main thread is stuck; process 0 serves the store, which the others need
            time.sleep(LINGER_SECONDS if self.store.me == 0 else 0.0)
        elif self._acknowledged.wait(GRACE_SECONDS):
            time.sleep(LEAVE_SECONDS)
        if not self._has_ended:
            self.end_now(cause)

    def _wait_for_failure(self) -> str | None:
        """What is written for this process, however long that takes; None if the store is gone."""
        while True:
            began = time.monotonic()
            text = self.store.read(_key(self.store.me), seconds=LISTEN_SECONDS)
            if text is not None or time.monotonic() - began < LISTEN_SECONDS / 2:
                return text

    def _uncaught(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """End all processes because of an exception outside `run`."""
        self._excepthook(kind, error, trace)
        if self.exit_code is None:
            cause = FailureCause(self.store.me, None, "outside of `run`", first_line(error), self.store.me)
            self.fail(cause, exit_code=130 if issubclass(kind, KeyboardInterrupt) else 1)

    def _forget(self) -> None:
        """In a forked child: the job must not hear of its end or of its failures."""
        atexit.unregister(self._at_exit)
        self.exit_code = 0  # so that `fail` broadcasts nothing
        if sys.excepthook == self._uncaught:
            sys.excepthook = self._excepthook

    def _at_exit(self) -> None:
        """Runs before jax's own clean-up, which waits for the other processes."""
        if self.exit_code is None:
            self._has_ended = True
            self.store.put(_key(self.store.me), ENDED)
            self._thread.join(GRACE_SECONDS)
            return
        if self.store.me == 0:
            time.sleep(max(0.0, self._failed_at + LINGER_SECONDS - time.monotonic()))
        _end_process("", self.exit_code)


def listen() -> FailureBroadcast | None:
    """The failure broadcast of this process, which listens from now on; None if the job has one process."""
    store = key_value_store()
    return None if store is None else _broadcast(store)


@cache
def _broadcast(store: KeyValueStore) -> FailureBroadcast:
    return FailureBroadcast(store)


def _end_process(last_words: str, code: int) -> None:
    sys.stderr.write(last_words)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    logging.shutdown()
    os._exit(code)


def _key(process: int) -> str:
    return f"stepc/failure/{process}"
