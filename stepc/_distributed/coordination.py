"""A notice board that all processes of a job see: what one writes, the others read. It knows no arrays."""

import atexit
import json
import logging
import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import TracebackType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stepc._jax import Client, membership
from stepc.errors import Facts, PeerError

PATIENCE_SECONDS = 300.0  # how long the others may take to come to the same place: they load data, they compile
ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # where an object lies in memory: no two processes agree on that
SHOWN = 8  # how many differences a message lists


@dataclass(frozen=True, eq=False)  # there is one in a process
class KeyValueStore:
    """The store of texts of a job.

    Args:
      me: the number of this process.
      num: how many there are.
    """

    client: Client
    me: int
    num: int
    _asked: Counter[str] = field(default_factory=Counter)

    def put(self, key: str, text: str, *, again: bool = False) -> bool:
        """Write; whether it was written. What is there stays, unless it is to be written `again`."""
        try:
            self.client.key_value_set(key, text, again)
        except jax.errors.JaxRuntimeError:  # it exists, or the store is gone
            return False
        return True

    def read(self, key: str, *, seconds: float = PATIENCE_SECONDS) -> str | None:
        """Wait for what another process writes; None if it does not, or the store is gone."""
        try:
            return self.client.blocking_key_value_get(key, int(seconds * 1000))
        except jax.errors.JaxRuntimeError:
            return None

    def peek(self, key: str) -> str | None:
        """What is written, if it is."""
        try:
            return self.client.key_value_try_get(key)
        except jax.errors.JaxRuntimeError:
            return None

    def number(self, topic: str) -> int:
        """How often this was asked for: all processes come to the same places in the same order."""
        self._asked[topic] += 1
        return self._asked[topic]

    def differences(self, topic: str, mine: Mapping[str, str], *, among: Sequence[int] | None = None) -> Facts:
        """Rows of (name, text) for what is not the same on all processes; the same rows on each.

        Args:
          topic: what is compared; all come here for the same topics in the same order.
          among: the processes that come here; by default all.
        Errors: PeerError if one does not come.
        The first of them reads what each wrote and writes what differs: so each text is read once.
        """
        everyone = list(range(self.num) if among is None else among)
        place = f"stepc/{topic}/{'-'.join(map(str, everyone))}/{self.number(f'{topic} {everyone}')}"
        self.put(f"{place}/{self.me}", json.dumps({name: ADDRESS.sub("", text) for name, text in mine.items()}))
        if self.me == everyone[0]:
            told = {process: self.read(f"{place}/{process}") for process in everyone}
            self.put(f"{place}/verdict", json.dumps(_verdict(told)))
        verdict = self.read(f"{place}/verdict", seconds=PATIENCE_SECONDS * 2)
        missing, rows = ([everyone[0]], []) if verdict is None else json.loads(verdict)
        if missing:
            what = f"Process {missing[0]} did not come to compare its {topic} with the others."
            raise PeerError(what, process=missing[0], phase="compare")
        return tuple((name, text) for name, text in rows)


def _verdict(told: Mapping[int, str | None]) -> tuple[list[int], list[tuple[str, str]]]:
    """Who did not come, and what differs."""
    missing = [process for process, text in told.items() if text is None]
    if missing:
        return missing, []
    each = {process: json.loads(text or "") for process, text in told.items()}
    first, *others = each
    rows = []
    for name in dict.fromkeys(name for one in each.values() for name in one):
        here = each[first].get(name, "nothing")
        odd = next((process for process in others if each[process].get(name, "nothing") != here), None)
        if odd is not None:
            rows.append((name, f"process {first}: {here}; process {odd}: {each[odd].get(name, 'nothing')}"))
    left = [("and", f"{len(rows) - SHOWN} more")] if len(rows) > SHOWN else []
    return [], rows[:SHOWN] + left


@cache
def _board(client: Client, me: int, num: int) -> KeyValueStore:
    return KeyValueStore(client, me, num)


def key_value_store() -> KeyValueStore | None:
    """The board of this job; None if it has one process."""
    joined = membership()
    return None if joined is None or joined[2] == 1 else _board(*joined)


def poll(words: tuple[int, ...], among: tuple[int, ...]) -> np.ndarray:
    """One row of int32 for each process, in the order of `among`; all of them must call this.

    Why: what a host alone knows (its data has ended, a signal came) must be known to all before the next step: a
      process that leaves a step out on its own lets the others wait for ever. On two processes of one machine it takes
      0.3 ms.
    Errors: PeerError if one of them is gone.
    It runs on CPU devices where there are any, so that it does not wait for the steps that an accelerator has to do.
    """
    gathered, mine, shape = _gatherer(among, len(words))
    row = jax.device_put(np.asarray(words, np.int32)[None], mine)
    try:
        return np.asarray(gathered(row, shape))
    except (ValueError, RuntimeError) as error:  # both are met: what gloo raises is a builtin ValueError
        what = f"The processes could not agree: {type(error).__name__}: {error}".partition("\n")[0]
        raise PeerError(what, phase="agree") from error


@cache
def _gatherer(
    among: tuple[int, ...], length: int
) -> tuple[Callable[[jax.Array, tuple[int, int]], jax.Array], Any, tuple[int, int]]:  # Any: a device
    devices = _devices()
    firsts = [next(one for one in devices if one.process_index == process) for process in among]
    mesh = Mesh(np.asarray(firsts), ("process",))
    rows = NamedSharding(mesh, PartitionSpec("process"))
    spread = jax.jit(lambda one: one, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def gathered(row: jax.Array, shape: tuple[int, int]) -> jax.Array:
        return spread(jax.make_array_from_single_device_arrays(shape, rows, [row]))

    mine = next(one for one in firsts if one.process_index == jax.process_index())
    return gathered, mine, (len(among), length)


def _devices() -> list[Any]:  # Any: devices; jax has no public type for them
    try:
        return jax.devices("cpu")
    except RuntimeError:  # this jax was told to use an accelerator alone
        return jax.devices()


_LOG = logging.getLogger("stepc")
GRACE_SECONDS = 1.0  # how long the main thread may take to notice: it is between steps, or stuck in a collective
HEARD_SECONDS = 1.4  # how long process 0, which keeps the board, stays for the others to read it
LEAVE_SECONDS = 30.0  # how long a program may take to end, once `run` has told it by an exception
LISTEN_SECONDS = 86400.0  # then it listens anew
OVER = ""  # written to its own key by a process that ends in order


@dataclass(frozen=True)
class FailureCause:
    """Why the job ends: which process, at which step and in which phase, and the text of its error."""

    process: int
    step: int | None
    phase: str
    text: str
    by: int  # the process that says so

    def error(self) -> PeerError:
        """What the other processes raise."""
        what = f"Process {self.process} failed: {self.text}"
        return PeerError(what, process=self.process, step=self.step, phase=self.phase)


@dataclass
class FailureBroadcast:
    """Of one process: hears what the others say, and says what ends this one."""

    board: KeyValueStore
    cause: FailureCause | None = None
    exit_code: int | None = None
    _rung_at: float = 0.0
    _heard: threading.Event = field(default_factory=threading.Event)
    _answered: threading.Event = field(default_factory=threading.Event)
    _is_over: bool = False
    _thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._listen, name="stepc-alarm", daemon=True)
        self._thread.start()
        atexit.register(self._leave)
        self._hook, sys.excepthook = sys.excepthook, self._uncaught

    def ring(self, cause: FailureCause, *, exit_code: int = 1) -> None:
        """End all processes: the first cause is the one that is told."""
        self._answered.set()
        if self.exit_code is None:
            self.exit_code, self._rung_at = exit_code, time.monotonic()
            self.stop(cause)

    def stop(self, cause: FailureCause) -> None:
        """End all processes, this one too, wherever its main thread is stuck."""
        for process in range(self.board.num):
            self.board.put(_key(process), json.dumps(cause.__dict__))

    def heard(self, *, seconds: float = 0.0) -> FailureCause | None:
        """What ended another process, if one did; waits for so long to hear it."""
        if self._heard.wait(seconds) or self._heard.is_set():
            return self.cause
        return None

    def _listen(self) -> None:
        told = self._hear()
        if told in (None, OVER) or self._is_over:
            return
        cause = FailureCause(**json.loads(told or ""))
        if cause.by == self.board.me and self._answered.is_set():
            return
        self.cause, self._rung_at = cause, time.monotonic()
        self._heard.set()
        _LOG.error("process %d failed at step %s (%s): %s", cause.process, cause.step, cause.phase, cause.text)
        if cause.by == self.board.me:  # its main thread is stuck, and process 0 keeps the board for the others
            time.sleep(HEARD_SECONDS if self.board.me == 0 else 0.0)
        elif self._answered.wait(GRACE_SECONDS):
            time.sleep(LEAVE_SECONDS)
        if not self._is_over:
            self.end(cause)

    def _hear(self) -> str | None:
        """What is written for this process, however long that takes; None if the board is gone."""
        while True:
            began = time.monotonic()
            told = self.board.read(_key(self.board.me), seconds=LISTEN_SECONDS)
            if told is not None or time.monotonic() - began < LISTEN_SECONDS / 2:
                return told

    def end(self, cause: FailureCause) -> None:
        """End this process alone, now."""
        _end(f"stepc.errors.PeerError: {cause.error()}\n", self.exit_code or 1)

    def _uncaught(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        self._hook(kind, error, trace)
        self.note(error, exit_code=130 if issubclass(kind, KeyboardInterrupt) else 1)

    def note(self, error: BaseException, *, exit_code: int = 1) -> None:
        """End all processes for an exception that no `run` has told of."""
        if self.exit_code is None:
            text = f"{type(error).__name__}: {error}".partition("\n")[0]
            self.ring(FailureCause(self.board.me, None, "outside of `run`", text, self.board.me), exit_code=exit_code)

    def _leave(self) -> None:
        """At the end of the process. atexit calls this before jax's own clean-up, which waits for the others."""
        if self.exit_code is None:
            self._is_over = True
            self.board.put(_key(self.board.me), OVER)
            self._thread.join(GRACE_SECONDS)
            return
        if self.board.me == 0:
            time.sleep(max(0.0, self._rung_at + HEARD_SECONDS - time.monotonic()))
        _end("", self.exit_code)


@contextmanager
def ending_all() -> Iterator[None]:
    """Let an error that leaves this end all processes, for a program that turns its errors into an exit code."""
    try:
        yield
    except Exception as error:  # it is raised again
        if (alarm := listen()) is not None:
            alarm.note(error)
        raise


def _end(last_words: str, code: int) -> None:
    sys.stderr.write(last_words)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    logging.shutdown()
    os._exit(code)


def _key(process: int) -> str:
    return f"stepc/alarm/{process}"


@cache
def _alarm(found: KeyValueStore) -> FailureBroadcast:
    return FailureBroadcast(found)


def listen() -> FailureBroadcast | None:
    """The alarm of this process, which hears from now on; None if the job has one process."""
    found = key_value_store()
    return None if found is None else _alarm(found)
