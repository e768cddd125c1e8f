"""A run on one process or on several: what they agree on before each step, and how one failure ends all of them.

`SingleProcess` and `ProcessGroup` answer the same questions, so that the trainer does not ask how many there are.
Several processes exchange a heartbeat, and compare their replicas of the state when asked to.
"""

import json
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from stepc._distributed.coordination import FailureBroadcast, FailureCause, KeyValueStore, listen, poll, poll_digest
from stepc._language.kinds import HostMetrics
from stepc._language.state import key_data, leaves_by_path
from stepc._runner.data import BatchSpec, DataItem, DataReader, EndOfData, LeftOut, Read, ReadFailure
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
    RejectedError,
    StepcError,
    StepError,
    first_line,
)

HEARTBEAT_SECONDS = 0.4
MISSED_BEATS = 3  # a process that misses so many heartbeats counts as gone
GONE_SECONDS = 10.0  # a process that was killed while the others wait for a disk; jax itself ends them after 30
WAITING = "waiting for the others"
RECEIVED_SECONDS = 0.3  # the store delivers within this time what another process broadcast before it ended
BARRIER_SECONDS = 0.02  # how often a barrier looks for the others
ENDS, FAILS, IS_DEAD, IS_FINAL, SHORT = 1, 2, 4, 8, 16  # the bits that a process polls in place of a batch
# What libraries of collectives call themselves in their errors; jax has no exception class for a lost process.
COLLECTIVES = ("gloo", "nccl", "connection closed by peer", "connection reset")
SPREAD = 2654435761  # odd, near 2**32 over the golden ratio: the weights of neighbours are far apart


class SingleProcess:
    """A run on one process, which has nobody to agree with."""

    are_many = False
    is_first = True
    commit: "GroupCommit | None" = None

    def at(self, phase: str, step: int) -> None:
        """Note what this process is doing now."""

    def clock(self) -> float:
        """The time in seconds, the same on all processes."""
        return time.monotonic()

    def agreed(self, found: Read, number: int, signals: SignalWatch) -> Read:
        """What all processes do, given what this one has read."""
        return found

    def has_none(self, feed: DataReader) -> bool:
        """Whether a run that made no step had no batch."""
        return feed.source.num_given == 0

    def numbers(self, mine: int) -> list[int]:
        """The number of each process."""
        return [mine]

    def verdict(self, mine: str | None) -> str | None:
        """Why a step is not wanted, by this process or another; None if all want it."""
        return mine

    def raise_on_all(self, error: StepcError) -> NoReturn:
        """Raise an error that all processes raise."""
        raise error

    def raised(self, failure: StepError) -> StepcError:
        """The error to raise for a failure that no policy recovers from."""
        return failure

    def compare(self, state: Any, number: int) -> None:  # Any: a state
        """Raise if the replicas of the state differ. Errors: DeviceError."""
        odd = [(path, f"digests {row}") for path, row in replica_digests(state).items() if len(set(row)) > 1]
        if odd:
            what = f"After step {number} the replicas of the state differ between devices."
            raise DeviceError(what, phase="compare", step=number, state_ok=False, facts=odd[:5])

    def check_same(self, topic: str, mine: Callable[[], Mapping[str, str]]) -> None:
        """Raise if a value differs between processes. One process does not compute it: it may read the whole state."""

    def check_evaluated(self, metrics: HostMetrics) -> None:
        """Raise if an evaluation gave each process metrics of its own, of which only one would be logged."""

    def ends_all(self, error: BaseException, number: int) -> bool:
        """Whether an error ends the run on all processes, so that they can do nothing together any more."""
        return False

    def stalled(self, seconds: float) -> None:
        """Called when no step has begun for so long."""

    def close(self) -> None:
        """Called at the end of the run."""


class ProcessGroup:
    """A run on several processes, each of which makes every step.

    Before each step they poll once: who has a batch, whose data failed, who received a signal. That costs 0.3 ms on two
    processes of one machine and leaves the step itself unchanged. An error that ends one process is broadcast, and
    ends all of them.
    """

    are_many = True

    def __init__(self, store: KeyValueStore, failures: FailureBroadcast) -> None:
        self.store, self.failures = store, failures
        self.processes = tuple(range(store.num))
        self.is_first = store.me == 0
        self.prefix = f"stepc/run/{store.number('run')}"
        self.heartbeat = Heartbeat(store, f"{self.prefix}/heartbeat")
        self.commit = GroupCommit(store, failures, self.prefix, self._poll, self.heartbeat)
        self._num_polls, self._began, self._tenths = 0, time.monotonic(), 0
        self._num_verdicts = 0
        self._spec_digest: tuple[BatchSpec | None, int] = (None, 0)
        self._raised_by_all: BaseException | None = None

    def at(self, phase: str, step: int) -> None:
        self.heartbeat.at(phase, step)

    def clock(self) -> float:
        """The clock of process 0 as of the last poll: what is due by time is due on all processes at once."""
        return self._tenths / 10

    def agreed(self, found: Read, number: int, signals: SignalWatch) -> Read:
        """If one process receives a signal, runs out of data or fails to read, all of them do at the same step."""
        self._num_polls += 1
        if isinstance(found, ReadFailure):
            text = first_line(found.error)
            self.store.put(f"{self.prefix}/read/{self._num_polls}/{self.store.me}", text)
        self.at(WAITING, number)
        tenths = int((time.monotonic() - self._began) * 10)
        is_saving = self.commit.is_busy_here()
        polled = self._poll((_bits(found), signals.received or 0, self._digest_of(found), tenths, is_saving))
        self.at("step", number + 1)
        bits, received, digests = polled[:, 0], polled[:, 1], polled[:, 2]
        self._tenths, self.commit.is_busy = int(polled[0, 3]), bool(polled[:, 4].any())
        if received.any():
            signals.received = int(received[received != 0][0])
            return EndOfData()
        all_bits = int(np.bitwise_or.reduce(bits))
        if all_bits & FAILS:
            is_dead, is_final = bool(all_bits & IS_DEAD), bool(all_bits & IS_FINAL)
            if isinstance(found, ReadFailure):
                return ReadFailure(found.error, self._num_polls, number, is_dead, is_final)
            process = int(np.flatnonzero(bits & FAILS)[0])
            text = self.store.read(f"{self.prefix}/read/{self._num_polls}/{process}", seconds=5) or "the data failed"
            error = PeerError(f"Process {process} failed: {text}", process=process, step=number + 1, phase="data")
            held = found if isinstance(found, DataItem | LeftOut) else None
            return ReadFailure(error, self._num_polls, number, is_dead, is_final, held)
        if all_bits & ENDS:
            return EndOfData()
        if all_bits & SHORT:
            return LeftOut(int(np.flatnonzero(bits & SHORT)[0]))
        if (digests != digests[0]).any():
            spec = found.spec if isinstance(found, DataItem) else None
            facts = self.store.differences("batch", {} if spec is None else spec.rows())
            error = BatchError("The batches of the processes have different signatures.", facts=facts)
            return ReadFailure(error, self._num_polls, number, is_final=True)
        return found

    def has_none(self, feed: DataReader) -> bool:
        """Always: the process without a batch keeps all others from making a step."""
        return True

    def numbers(self, mine: int) -> list[int]:
        return self._poll((mine,))[:, 0].tolist()

    def verdict(self, mine: str | None) -> str | None:
        """If one process rejects a step, all of them do: each with its own reason, or else with that of another."""
        self._num_verdicts += 1
        key = f"{self.prefix}/verdict/{self._num_verdicts}"
        if mine:
            self.store.put(f"{key}/{self.store.me}", str(mine))
        if not any(rejecting := self.numbers(int(bool(mine)))):
            return None
        process = rejecting.index(1)
        return mine or f"process {process}: {self.store.read(f'{key}/{process}', seconds=5)}"

    def raise_on_all(self, error: StepcError) -> NoReturn:
        self._raised_by_all = error
        raise error

    def raised(self, failure: StepError) -> StepcError:
        """Failed data is a PeerError on the other processes, and so is a lost process; the rest stays as it is."""
        cause = failure.__cause__
        is_by_all = cause is not None and cause is self._raised_by_all
        if isinstance(failure, DataError | NonFiniteError | RejectedError) or is_by_all:
            self._raised_by_all = cause if isinstance(cause, PeerError) else failure
            return self._raised_by_all
        if isinstance(failure, DeviceError | BuildError) and (peer := self._lost_process(failure)) is not None:
            peer.__cause__ = failure
            return peer
        return failure

    def compare(self, state: Any, number: int) -> None:  # Any: a state
        """Errors: PeerError on all processes, with the leaves whose replicas differ."""
        mine = replica_digests(state)
        low, high = (poll_digest(repr([pick(row) for row in mine.values()])) for pick in (min, max))
        polled = self._poll((low, high))
        if (polled == polled[0, 0]).all():
            return
        rows = {path: ", ".join(f"{one:08x}" for one in dict.fromkeys(row)) for path, row in mine.items()}
        facts = self.store.differences("state", rows) or [("devices", "the replicas within one process differ")]
        what = f"After step {number} the replicas of the state differ between processes."
        self.raise_on_all(PeerError(what, step=number, phase="compare", facts=facts))

    def check_same(self, topic: str, mine: Callable[[], Mapping[str, str]]) -> None:
        """Errors: ConfigError on all processes, with both values."""
        if facts := self.store.differences(topic, mine()):
            self.raise_on_all(ConfigError(f"The processes do not agree on the {topic} of the run.", facts=facts))

    def check_evaluated(self, metrics: HostMetrics) -> None:
        """Errors: ConfigError on all processes, with both values."""
        mine = {name: repr(np.asarray(value).tolist()) for name, value in metrics.items()}
        polled = self._poll((poll_digest(repr(mine)),))
        if (polled == polled[0, 0]).all():
            return
        what = "Each process has metrics of its own, so `evaluate` has seen the rows of one process alone."
        remedy = "Either evaluate by a step, or place the rows of all processes in `evaluate`: `step.put(batch)`."
        facts = self.store.differences("evaluation", mine)
        self.raise_on_all(ConfigError(what, facts=facts, suggestion=remedy))

    def ends_all(self, error: BaseException, number: int) -> bool:
        """Broadcasts an error of this process alone. One that all raise together ends each of them in its own time."""
        if error is self._raised_by_all or isinstance(error, CheckpointError):
            return False
        match error:
            case SystemExit(code=int(code)):
                exit_code = code
            case KeyboardInterrupt():
                exit_code = 130
            case _:
                exit_code = 1
        text = first_line(error)
        step, phase = number + 1, self.heartbeat.phase
        match error:
            case PeerError():
                step, phase = error.step or step, error.phase
            case StepError():
                step, phase = error.step, error.phase
            case _:
                pass
        self.failures.fail(FailureCause(self.store.me, step, phase, text, self.store.me), exit_code=exit_code)
        return True

    def stalled(self, seconds: float) -> None:
        """Name the process that the others wait for, and end all. If process 0 hangs, so does the store it serves."""
        found: list[tuple[int, int, str]] = []
        search = threading.Thread(target=lambda: found.append(self.heartbeat.slowest()), daemon=True)
        search.start()
        search.join(HEARTBEAT_SECONDS * (MISSED_BEATS + 1))
        if not found:
            text = "it does not answer"
            self.failures.end_now(FailureCause(0, self.heartbeat.step, "stalled", text, self.store.me))
        process, step, text = found[0]
        text = f"{text}; no step has begun for {seconds:.1f} s, and the others wait for it"
        self.failures.send(FailureCause(process, step, "stalled", text, self.store.me))

    def close(self) -> None:
        self.heartbeat.close()

    def _poll(self, numbers: tuple[int, ...]) -> np.ndarray:
        if (cause := self.failures.received()) is not None:
            raise cause.error()
        try:
            return poll(numbers, self.processes)
        except PeerError as error:
            raise self._lost_process(error) or error from error.__cause__

    def _lost_process(self, error: StepcError) -> PeerError | None:
        """Which process made a collective fail; None if it was not a collective."""
        if (cause := self.failures.received(seconds=RECEIVED_SECONDS)) is not None:
            return cause.error()
        text = str(error).lower()
        if not isinstance(error, PeerError) and not any(name in text for name in COLLECTIVES):
            return None
        lost = self.heartbeat.silent()
        who = "Another process" if lost is None else f"Process {lost}"
        what = f"{who} is gone: it crashed or was killed, without an error message."
        return PeerError(what, process=lost, step=self.heartbeat.step, phase="collective")

    def _digest_of(self, found: Read) -> int:
        """A number that stands for the signature of the batch; computed once, since the signature rarely changes."""
        spec = found.spec if isinstance(found, DataItem) else None
        if spec is not self._spec_digest[0]:
            self._spec_digest = (spec, poll_digest(repr(spec)))
        return self._spec_digest[1] if isinstance(found, DataItem) and not found.is_hole else 0


Peers: TypeAlias = SingleProcess | ProcessGroup


def peers_for(state: Any) -> Peers:  # Any: a state
    """The processes that a state spans; a process whose state is its own trains by itself."""
    if all(leaf.is_fully_addressable for leaf in jax.tree.leaves(state)):
        return SingleProcess()
    failures = listen()
    if failures is None:
        raise ConfigError(
            "The state spans several processes, which have not found each other.",
            suggestion="Call `sc.init_distributed()` first.",
        )
    return ProcessGroup(failures.store, failures)


def _bits(found: Read) -> int:
    match found:
        case DataItem():
            return 0
        case LeftOut():
            return SHORT
        case EndOfData():
            return ENDS
        case ReadFailure():
            return FAILS | IS_DEAD * found.is_dead | IS_FINAL * found.is_final


class GroupCommit:
    """Lets all processes of a run commit a checkpoint, or none of them.

    Args:
      prefix: of its keys.
      poll: the numbers of all processes. Errors: PeerError that names the process that is gone.
    `is_busy` says whether a save is in flight on any process, as of the last poll before a step.
    """

    def __init__(
        self,
        store: KeyValueStore,
        failures: FailureBroadcast,
        prefix: str,
        poll: Callable[[tuple[int, ...]], np.ndarray],
        heartbeat: "Heartbeat",
    ) -> None:
        self.store, self.failures, self.prefix, self.poll, self.heartbeat = store, failures, prefix, poll, heartbeat
        self.is_first = store.me == 0
        self.is_busy = False
        self.is_busy_here: Callable[[], bool] = lambda: False
        self._attempt = 0

    def begin(self) -> None:
        """Called on all processes when a save begins."""
        self._attempt += 1
        self.is_busy = True

    def agree(self, failure: str | None) -> str | None:
        """Wait for all processes; the failure of one of them, or None.

        Args:
          failure: why this process cannot save, or None.
        """
        if failure is not None:
            self.store.put(self._failure_key, f"process {self.store.me}: {failure}")
        failed = self.poll((int(failure is not None),))
        return self.store.read(self._failure_key, seconds=5) if failed.any() else None

    def gather(self, step: int, mine: Any) -> Any:  # Any: a JSON value
        """The value that process 0 saves for all: its own, or {"each": [...]} if they differ. The others get theirs."""
        prefix, text = f"{self.prefix}/save/{self._attempt}/{step}", json.dumps(mine)
        self.store.put(f"{prefix}/{self.store.me}", text)
        if not self.is_first:
            return mine
        each = self._read_all(prefix, list(range(self.store.num)), math.inf)
        return mine if all(one == text for one in each) else {"each": [json.loads(one) for one in each]}

    def barrier(self, *, key: str, timeout_ms: int) -> None:
        """Wait for all processes; Orbax calls this, in its own thread.

        Why: jax's own barrier waits out its timeout for a process that has failed to write, or is gone.
        Errors: OSError with the failure of another process; TimeoutError.
        """
        prefix = f"{self.prefix}/barrier/{self._attempt}/{key}"
        self.store.put(f"{prefix}/{self.store.me}", "here")
        self._read_all(prefix, list(range(self.store.num)) if self.is_first else ["all"], timeout_ms / 1000)
        if self.is_first:
            self.store.put(f"{prefix}/all", "here")

    def _read_all(self, prefix: str, names: Sequence[int | str], seconds: float) -> list[str]:
        """The texts under these names, when all of them are there. Errors: those of `barrier`."""
        until, texts = time.monotonic() + seconds, dict[int | str, str]()
        alive = LivingProcesses(self.heartbeat)
        while missing := [name for name in names if name not in texts]:
            texts |= {name: text for name in missing if (text := self.store.peek(f"{prefix}/{name}")) is not None}
            if (failure := self.store.peek(self._failure_key)) is not None:
                raise OSError(failure)
            if (cause := self.failures.received()) is not None or self.failures.exit_code is not None:
                raise OSError("the run has ended" if cause is None else cause.text)
            if (gone := alive.gone()) is not None:
                raise OSError(f"process {gone} is gone")
            if len(texts) < len(names):
                if time.monotonic() > until:
                    raise TimeoutError(f"processes that did not write in time: {', '.join(map(str, missing))}")
                time.sleep(BARRIER_SECONDS)
        return [texts[name] for name in names]

    @property
    def _failure_key(self) -> str:
        return f"{self.prefix}/failed/{self._attempt}"


class HeartbeatRecord(NamedTuple):
    """One heartbeat of a process: its number, and the step and phase the process is in, and for how long."""

    number: int
    step: int
    phase: str
    seconds: float


class Heartbeat:
    """A thread that writes to the key-value store, every 0.4 s, what this process does and for how long.

    Args:
      prefix: of its keys.
    """

    def __init__(self, store: KeyValueStore, prefix: str) -> None:
        self.store, self.prefix = store, prefix
        self.phase, self.step, self._since = "start", 0, time.monotonic()
        self._num = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="stepc-heartbeat", daemon=True)
        self._thread.start()

    def at(self, phase: str, step: int) -> None:
        """Note what this process does now."""
        self.phase, self.step, self._since = phase, step, time.monotonic()

    def silent(self) -> int | None:
        """A process whose heartbeat has stopped, if there is one. It takes three beats to tell."""
        before = self.numbers()
        time.sleep(HEARTBEAT_SECONDS * MISSED_BEATS)
        after = self.numbers()
        return next((process for process in before if before[process] == after[process]), None)

    def slowest(self) -> tuple[int, int, str]:
        """The process that the others wait for, the step it is at, and what it does and for how long."""
        if (gone := self.silent()) is not None:
            last = self._read(gone)
            return gone, last.step, f"its heartbeat stopped in phase {last.phase!r}"
        records = {process: self._read(process) for process in range(self.store.num)}
        process = min(records, key=lambda p: (records[p].phase == WAITING, records[p].step, -records[p].seconds))
        record = records[process]
        return process, record.step, f"it has been in phase {record.phase!r} for {record.seconds:.1f} s"

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join(HEARTBEAT_SECONDS * MISSED_BEATS)

    def _beat(self) -> None:
        while True:
            self._num += 1
            record = HeartbeatRecord(self._num, self.step, self.phase, time.monotonic() - self._since)
            self.store.put(f"{self.prefix}/{self.store.me}", json.dumps(record), overwrite=True)
            if self._stop.wait(HEARTBEAT_SECONDS):
                return

    def numbers(self) -> dict[int, int]:
        """The number of the last heartbeat of each process."""
        return {process: self._read(process).number for process in range(self.store.num)}

    def _read(self, process: int) -> HeartbeatRecord:
        text = self.store.peek(f"{self.prefix}/{process}")
        return HeartbeatRecord(0, 0, "start", 0.0) if text is None else HeartbeatRecord(*json.loads(text))


@dataclass
class LivingProcesses:
    """Finds, while this process waits in a thread, another one whose heartbeat has stopped."""

    heartbeat: Heartbeat
    _seen: dict[int, int] = field(default_factory=dict)
    _since: dict[int, float] = field(default_factory=dict)
    _asked_at: float = -math.inf

    def gone(self) -> int | None:
        """A process whose heartbeat has stopped for `GONE_SECONDS`; it asks the store once in a heartbeat."""
        now = time.monotonic()
        if now - self._asked_at < HEARTBEAT_SECONDS:
            return None
        self._asked_at = now
        for process, number in self.heartbeat.numbers().items():
            if self._seen.get(process) != number:
                self._seen[process], self._since[process] = number, now
        return next((process for process, since in self._since.items() if now - since > GONE_SECONDS), None)


def replica_digests(state: Any) -> dict[str, list[int]]:  # Any: a state
    """For each replicated leaf, by path: the digest of its replica on each device of this process.

    Meaning: the sum of the bits times odd weights of their position, modulo 2**32. Whatever a single number changes
      to, the sum changes.
    Why: a CRC-32 would copy the state to the host; this reads it once on the devices, and only the digests leave them.
    Sharded leaves are left out: no other device has the same shard.
    """
    digests = [
        (path, [_replica_digest(shard.data) for shard in array.addressable_shards])
        for path, leaf in leaves_by_path(state)
        if (array := key_data(leaf)).sharding.is_fully_replicated
    ]
    return {path: [int(np.asarray(one)) for one in row] for path, row in digests}


@jax.jit
def _replica_digest(array: jax.Array) -> jax.Array:
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    width = jnp.dtype(f"uint{8 * min(array.dtype.itemsize, 4)}")
    bits = jax.lax.bitcast_convert_type(array, width).astype(jnp.uint32).reshape(-1)
    weights = jax.lax.iota(jnp.uint32, bits.size) * jnp.uint32(SPREAD) | jnp.uint32(1)
    return jnp.sum(bits * weights, dtype=jnp.uint32)
