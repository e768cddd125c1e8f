"""Whether the copies of a state that lie on several devices are the same, to the last bit. Knows no process."""

import json
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from stepc._distributed.coordination import FailureBroadcast, FailureCause, KeyValueStore, listen, poll
from stepc._language.state import leaves_by_path
from stepc._runner.checkpoint_store import GroupCommit
from stepc._runner.data import BatchSpec, DataItem, DataReader, EndOfData, Read, ReadFailure
from stepc._runner.signals import SignalWatch
from stepc.errors import (
    BatchError,
    BuildError,
    CheckpointError,
    ConfigError,
    DataError,
    DeviceError,
    NonFiniteError,
    PeerError,
    StepcError,
    StepError,
)

SPREAD = 2654435761  # an odd number near 2**32 times the golden ratio: neighbours get weights that are far apart


def replica_digests(state: Any) -> dict[str, list[int]]:  # Any: a state
    """For each leaf that is whole on every device, by path: its digest on each device of this process.

    Meaning: the sum of bits times an odd weight of their place, modulo 2**32: whatever one number is changed to, it
      is another sum.
    Units: it reads the state once, on the devices; nothing but the digests leaves them.
    Leaves that are spread over devices are left out: no other device has the same part.
    """
    found = [
        (path, [_digest(shard.data) for shard in bare.addressable_shards])
        for path, leaf in leaves_by_path(state)
        if (bare := _bare(leaf)).sharding.is_fully_replicated
    ]
    return {path: [int(np.asarray(one)) for one in row] for path, row in found}


def _bare(leaf: Any) -> jax.Array:  # Any: an array, or a typed key
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


@jax.jit
def _digest(leaf: jax.Array) -> jax.Array:
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    width = jnp.dtype(f"uint{8 * min(leaf.dtype.itemsize, 4)}")
    bits = jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32).reshape(-1)
    weights = jax.lax.iota(jnp.uint32, bits.size) * jnp.uint32(SPREAD) | jnp.uint32(1)
    return jnp.sum(bits * weights, dtype=jnp.uint32)


PULSE_SECONDS = 0.4
WAITS = "waiting for the others"
SILENT = 3  # after so many pulses that did not come, a process counts as gone


class HeartbeatRecord(NamedTuple):
    """What a process says of itself: how often it has, at which step it is, what it does and for how long."""

    number: int
    step: int
    phase: str
    seconds: float


class Heartbeat:
    """A thread that writes, some times a second, what this process does and since when.

    Args:
      place: where on the board.
    """

    def __init__(self, board: KeyValueStore, place: str) -> None:
        self.board, self.place = board, place
        self.phase, self.step, self._since = "start", 0, time.monotonic()
        self._num = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="stepc-pulse", daemon=True)
        self._thread.start()

    def at(self, phase: str, step: int) -> None:
        """Note what this process does now."""
        self.phase, self.step, self._since = phase, step, time.monotonic()

    def silent(self) -> int | None:
        """The process whose pulse has stopped, if one has; looks as long as that takes to see."""
        before = self._numbers()
        time.sleep(PULSE_SECONDS * SILENT)
        after = self._numbers()
        return next((process for process in before if before[process] == after[process]), None)

    def slowest(self) -> tuple[int, int, str]:
        """The process that the others wait for: its number, its step, and what it does, since when."""
        if (gone := self.silent()) is not None:
            was = self._read(gone)
            return gone, was.step, f"it was at {was.phase!r}, and has not been heard of since"
        told = {process: self._read(process) for process in range(self.board.num)}
        number = min(told, key=lambda one: (told[one].phase == WAITS, told[one].step, -told[one].seconds))
        found = told[number]
        return number, found.step, f"it has been at {found.phase!r} for {found.seconds:.1f} s"

    def close(self) -> None:
        """End the thread."""
        self._end.set()
        self._thread.join(PULSE_SECONDS * SILENT)

    def _beat(self) -> None:
        while True:
            self._num += 1
            seconds = time.monotonic() - self._since
            told = HeartbeatRecord(self._num, self.step, self.phase, seconds)
            self.board.put(f"{self.place}/{self.board.me}", json.dumps(told), again=True)
            if self._end.wait(PULSE_SECONDS):
                return

    def _numbers(self) -> dict[int, int]:
        return {process: self._read(process).number for process in range(self.board.num)}

    def _read(self, process: int) -> HeartbeatRecord:
        told = self.board.peek(f"{self.place}/{process}")
        return HeartbeatRecord(0, 0, "start", 0.0) if told is None else HeartbeatRecord(*json.loads(told))


ENDS, BREAKS, IS_DEAD, IS_FINAL = 1, 2, 4, 8  # what a process has instead of a batch, as bits
HEARD_SECONDS = 0.3  # what another process said before it left is here by then
# What the libraries of collectives call themselves in their errors; jax has no class for a peer that is gone.
COLLECTIVES = ("gloo", "nccl", "connection closed by peer", "connection reset")


class SingleProcess:
    """A run of one process: it decides for itself."""

    are_many = False
    is_first = True
    commit: GroupCommit | None = None

    def at(self, phase: str, step: int) -> None:
        """Note what is done now."""

    def clock(self) -> float:
        """Seconds."""
        return time.monotonic()

    def agreed(self, found: Read, number: int, spec: BatchSpec | None, signals: SignalWatch) -> Read:
        """What is done with what was read."""
        return found

    def has_none(self, feed: DataReader) -> bool:
        """Whether a run that made no step had no batch."""
        return feed.source.num_given == 0

    def raised(self, failure: StepError) -> StepcError:
        """What to raise for a failure that no policy goes on from."""
        return failure

    def compare(self, state: Any, number: int) -> None:  # Any: a state
        """Refuse a state whose copies differ. Errors: DeviceError."""
        odd = [(path, f"digests {row}") for path, row in replica_digests(state).items() if len(set(row)) > 1]
        if odd:
            what = f"After step {number} the copies of the state on the devices differ."
            raise DeviceError(what, phase="compare", step=number, state_ok=False, facts=odd[:5])

    def check_same(self, topic: str, mine: Callable[[], Mapping[str, str]]) -> None:
        """Refuse what is not the same everywhere. What that is, is not asked here: it may read the whole state."""

    def ends_all(self, error: BaseException, number: int) -> bool:
        """Whether an error has ended the run on all processes, so that nothing can be done together any more."""
        return False

    def stalled(self, seconds: float) -> None:
        """What is done when no step was begun for so long."""

    def close(self) -> None:
        """The run is over."""


class ProcessGroup:
    """A run on several processes, each of which makes every step.

    Before each step they poll, once: who has a batch, whose data failed, who got a signal. The poll costs 0.3 ms on two
    processes of one machine; the step itself stays as it is, and any step will do. Whatever ends one process alone
    is written where all see it, and ends them all.
    """

    are_many = True

    def __init__(self, board: KeyValueStore, alarm: FailureBroadcast) -> None:
        self.board, self.alarm = board, alarm
        self.everyone = tuple(range(board.num))
        self.is_first = board.me == 0
        self.place = f"stepc/run/{board.number('run')}"
        self.pulse = Heartbeat(board, f"{self.place}/pulse")
        self.commit = GroupCommit(board, alarm, self.place)
        self._round, self._began, self._now = 0, time.monotonic(), 0
        self._form: tuple[BatchSpec | None, int] = (None, 0)
        self._shared: BaseException | None = None

    def at(self, phase: str, step: int) -> None:
        self.pulse.at(phase, step)

    def clock(self) -> float:
        """That of process 0, as of the last poll: what is due by the clock is due on all at once."""
        return self._now / 10

    def agreed(self, found: Read, number: int, spec: BatchSpec | None, signals: SignalWatch) -> Read:
        """What all do: a signal anywhere or an end anywhere ends the run, a failed read anywhere is one of all."""
        self._round += 1
        kind = _kind_of(found)
        if isinstance(found, ReadFailure):
            text = f"{type(found.error).__name__}: {found.error}".partition("\n")[0]
            self.board.put(f"{self.place}/broken/{self._round}/{self.board.me}", text)
        self.at(WAITS, number)
        tenths = int((time.monotonic() - self._began) * 10)
        told = self._poll((kind, signals.received or 0, self._form_of(found, spec), tenths, self.commit.is_busy_here()))
        self.at("step", number + 1)
        self._now, self.commit.is_busy = int(told[0, 3]), bool(told[:, 4].any())
        kinds = int(np.bitwise_or.reduce(told[:, 0]))
        if told[:, 1].any():
            signals.received = int(told[:, 1][told[:, 1] != 0][0])
            return EndOfData()
        if kinds & BREAKS:
            return self._broken(found, told[:, 0], kinds, number)
        if kinds & ENDS:
            return EndOfData()
        if (told[:, 2] != told[0, 2]).any():
            facts = self.board.differences("batch", {} if spec is None else spec.rows())
            error = BatchError("The processes do not have rows that fit together.", facts=facts)
            return ReadFailure(error, self._round, number, is_final=True)
        return found

    def has_none(self, feed: DataReader) -> bool:
        """One that has none lets none have one."""
        return True

    def raised(self, failure: StepError) -> StepcError:
        """On the process whose data failed its own error, on the others a PeerError; a device's failure stays alone."""
        cause = failure.__cause__
        if isinstance(failure, DataError | NonFiniteError):
            self._shared = failure
            if isinstance(cause, PeerError):
                self._shared = cause
                return cause
        elif isinstance(failure, DeviceError | BuildError) and (peer := self._peer_of(failure)) is not None:
            peer.__cause__ = failure
            return peer
        return failure

    def compare(self, state: Any, number: int) -> None:  # Any: a state
        """Errors: PeerError on all, with the leaves whose copies differ."""
        mine = replica_digests(state)
        low, high = (zlib.crc32(repr([pick(row) for row in mine.values()]).encode()) >> 1 for pick in (min, max))
        told = self._poll((low, high))
        if (told == told[0, 0]).all():
            return
        rows = {path: ", ".join(f"{one:08x}" for one in dict.fromkeys(row)) for path, row in mine.items()}
        facts = self.board.differences("state", rows) or [("devices", "those of one process differ")]
        what = f"After step {number} the copies of the state differ between the processes."
        self._shared = PeerError(what, step=number, phase="compare", facts=facts)
        raise self._shared

    def check_same(self, topic: str, mine: Callable[[], Mapping[str, str]]) -> None:
        """Errors: ConfigError on all, with both sides."""
        if facts := self.board.differences(topic, mine()):
            self._shared = ConfigError(f"The processes do not agree on the {topic} of the run.", facts=facts)
            raise self._shared

    def ends_all(self, error: BaseException, number: int) -> bool:
        """Whether it has; then the others are told. What all raise together ends each in its own time."""
        if error is self._shared or isinstance(error, CheckpointError):
            return False
        match error:
            case SystemExit(code=int(code)):
                exit_code = code
            case KeyboardInterrupt():
                exit_code = 130
            case _:
                exit_code = 1
        text = f"{type(error).__name__}: {error}".partition("\n")[0]
        step, phase = number + 1, self.pulse.phase
        match error:
            case PeerError():
                step, phase = error.step or step, error.phase
            case StepError():
                step, phase = error.step, error.phase
            case _:
                pass
        self.alarm.ring(FailureCause(self.board.me, step, phase, text, self.board.me), exit_code=exit_code)
        return True

    def stalled(self, seconds: float) -> None:
        """Name the process that the others wait for, and end all; process 0 keeps the board, which then is silent."""
        found: list[tuple[int, int, str]] = []
        asking = threading.Thread(target=lambda: found.append(self.pulse.slowest()), daemon=True)
        asking.start()
        asking.join(PULSE_SECONDS * (SILENT + 1))
        if not found:
            self.alarm.end(FailureCause(0, self.pulse.step, "stalled", "it does not answer", self.board.me))
        process, step, text = found[0]
        text = f"{text}; no step was begun for {seconds:.1f} s, and the others wait for it"
        self.alarm.stop(FailureCause(process, step, "stalled", text, self.board.me))

    def close(self) -> None:
        self.pulse.close()

    def _poll(self, words: tuple[int, ...]) -> np.ndarray:
        if (cause := self.alarm.heard()) is not None:
            raise cause.error()
        try:
            return poll(words, self.everyone)
        except PeerError as error:
            raise self._peer_of(error) or error from error.__cause__

    def _peer_of(self, error: StepcError) -> PeerError | None:
        """The process that is to blame for a failed collective, if it is one."""
        if (cause := self.alarm.heard(seconds=HEARD_SECONDS)) is not None:
            return cause.error()
        text = str(error).lower()
        if not isinstance(error, PeerError) and not any(name in text for name in COLLECTIVES):
            return None
        gone = self.pulse.silent()
        what = "Another process is gone" if gone is None else f"Process {gone} is gone"
        return PeerError(
            f"{what}: it died, or was killed, and said nothing.", process=gone, step=self.pulse.step, phase="collective"
        )

    def _broken(self, found: Read, kinds: np.ndarray, all_kinds: int, number: int) -> ReadFailure:
        is_dead, is_final = bool(all_kinds & IS_DEAD), bool(all_kinds & IS_FINAL)
        if isinstance(found, ReadFailure):
            return ReadFailure(found.error, self._round, number, is_dead, is_final)
        process = int(np.flatnonzero(kinds & BREAKS)[0])
        text = self.board.read(f"{self.place}/broken/{self._round}/{process}", seconds=5) or "the data failed"
        error = PeerError(f"Process {process} failed: {text}", process=process, step=number + 1, phase="data")
        return ReadFailure(
            error, self._round, number, is_dead, is_final, found if isinstance(found, DataItem) else None
        )

    def _form_of(self, found: Read, spec: BatchSpec | None) -> int:
        """A number that stands for the form of the rows; made once, as the form stays."""
        if spec is not self._form[0]:
            self._form = (spec, zlib.crc32(repr(spec).encode()) >> 1)
        return self._form[1] if isinstance(found, DataItem) and not found.is_hole else 0


Peers: TypeAlias = SingleProcess | ProcessGroup


def _kind_of(found: Read) -> int:
    match found:
        case DataItem():
            return 0
        case EndOfData():
            return ENDS
        case ReadFailure():
            return BREAKS | IS_DEAD * found.is_dead | IS_FINAL * found.is_final


def peers_for(state: Any) -> Peers:  # Any: a state
    """The processes that a state lies on. A state of this process alone is trained by it alone."""
    if all(leaf.is_fully_addressable for leaf in jax.tree.leaves(state)):
        return SingleProcess()
    alarm = listen()
    if alarm is None:
        raise ConfigError("The state lies on several processes, and they have not found each other.")
    return ProcessGroup(alarm.board, alarm)
