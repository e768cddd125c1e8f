"""What a run has to do with the other processes of its job: one decision everywhere, and one end. Knows no step."""

import threading
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import numpy as np

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
from stepc.processes.alarm import Alarm, Cause, listen
from stepc.processes.board import Board
from stepc.processes.poll import poll
from stepc.runner.batches import Spec
from stepc.runner.commit import Commit
from stepc.runner.digests import digests
from stepc.runner.feed import Broken, End, Feed, Item, Read
from stepc.runner.pulse import PULSE_SECONDS, SILENT, WAITS, Pulse
from stepc.runner.signals import Signals

ENDS, BREAKS, IS_DEAD, IS_FINAL = 1, 2, 4, 8  # what a process has instead of a batch, as bits
HEARD_SECONDS = 0.3  # what another process said before it left is here by then
# What the libraries of collectives call themselves in their errors; jax has no class for a peer that is gone.
COLLECTIVES = ("gloo", "nccl", "connection closed by peer", "connection reset")


class Alone:
    """A run of one process: it decides for itself."""

    are_many = False
    is_first = True
    commit: Commit | None = None

    def at(self, phase: str, step: int) -> None:
        """Note what is done now."""

    def clock(self) -> float:
        """Seconds."""
        return time.monotonic()

    def agreed(self, found: Read, number: int, spec: Spec | None, signals: Signals) -> Read:
        """What is done with what was read."""
        return found

    def has_none(self, feed: Feed) -> bool:
        """Whether a run that made no step had no batch."""
        return feed.source.num_given == 0

    def raised(self, failure: StepError) -> StepcError:
        """What to raise for a failure that no policy goes on from."""
        return failure

    def compare(self, state: Any, number: int) -> None:  # Any: a state
        """Refuse a state whose copies differ. Errors: DeviceError."""
        odd = [(path, f"digests {row}") for path, row in digests(state).items() if len(set(row)) > 1]
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


class Together:
    """A run on several processes, each of which makes every step.

    Before each step they poll, once: who has a batch, whose data failed, who got a signal. The poll costs 0.3 ms on two
    processes of one machine; the step itself stays as it is, and any step will do. Whatever ends one process alone
    is written where all see it, and ends them all.
    """

    are_many = True

    def __init__(self, board: Board, alarm: Alarm) -> None:
        self.board, self.alarm = board, alarm
        self.everyone = tuple(range(board.num))
        self.is_first = board.me == 0
        self.place = f"stepc/run/{board.number('run')}"
        self.pulse = Pulse(board, f"{self.place}/pulse")
        self.commit = Commit(board, alarm, self.place)
        self._round, self._began, self._now = 0, time.monotonic(), 0
        self._form: tuple[Spec | None, int] = (None, 0)
        self._shared: BaseException | None = None

    def at(self, phase: str, step: int) -> None:
        self.pulse.at(phase, step)

    def clock(self) -> float:
        """That of process 0, as of the last poll: what is due by the clock is due on all at once."""
        return self._now / 10

    def agreed(self, found: Read, number: int, spec: Spec | None, signals: Signals) -> Read:
        """What all do: a signal anywhere or an end anywhere ends the run, a failed read anywhere is one of all."""
        self._round += 1
        kind = _kind_of(found)
        if isinstance(found, Broken):
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
            return End()
        if kinds & BREAKS:
            return self._broken(found, told[:, 0], kinds, number)
        if kinds & ENDS:
            return End()
        if (told[:, 2] != told[0, 2]).any():
            facts = self.board.differences("batch", {} if spec is None else spec.rows())
            error = BatchError("The processes do not have rows that fit together.", facts=facts)
            return Broken(error, self._round, number, is_final=True)
        return found

    def has_none(self, feed: Feed) -> bool:
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
        mine = digests(state)
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
        self.alarm.ring(Cause(self.board.me, step, phase, text, self.board.me), exit_code=exit_code)
        return True

    def stalled(self, seconds: float) -> None:
        """Name the process that the others wait for, and end all; process 0 keeps the board, which then is silent."""
        found: list[tuple[int, int, str]] = []
        asking = threading.Thread(target=lambda: found.append(self.pulse.slowest()), daemon=True)
        asking.start()
        asking.join(PULSE_SECONDS * (SILENT + 1))
        if not found:
            self.alarm.end(Cause(0, self.pulse.step, "stalled", "it does not answer", self.board.me))
        process, step, text = found[0]
        text = f"{text}; no step was begun for {seconds:.1f} s, and the others wait for it"
        self.alarm.stop(Cause(process, step, "stalled", text, self.board.me))

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

    def _broken(self, found: Read, kinds: np.ndarray, all_kinds: int, number: int) -> Broken:
        is_dead, is_final = bool(all_kinds & IS_DEAD), bool(all_kinds & IS_FINAL)
        if isinstance(found, Broken):
            return Broken(found.error, self._round, number, is_dead, is_final)
        process = int(np.flatnonzero(kinds & BREAKS)[0])
        text = self.board.read(f"{self.place}/broken/{self._round}/{process}", seconds=5) or "the data failed"
        error = PeerError(f"Process {process} failed: {text}", process=process, step=number + 1, phase="data")
        return Broken(error, self._round, number, is_dead, is_final, found if isinstance(found, Item) else None)

    def _form_of(self, found: Read, spec: Spec | None) -> int:
        """A number that stands for the form of the rows; made once, as the form stays."""
        if spec is not self._form[0]:
            self._form = (spec, zlib.crc32(repr(spec).encode()) >> 1)
        return self._form[1] if isinstance(found, Item) and not found.is_hole else 0


Peers: TypeAlias = Alone | Together


def _kind_of(found: Read) -> int:
    match found:
        case Item():
            return 0
        case End():
            return ENDS
        case Broken():
            return BREAKS | IS_DEAD * found.is_dead | IS_FINAL * found.is_final


def peers_of(state: Any) -> Peers:  # Any: a state
    """The processes that a state lies on. A state of this process alone is trained by it alone."""
    if all(leaf.is_fully_addressable for leaf in jax.tree.leaves(state)):
        return Alone()
    alarm = listen()
    if alarm is None:
        raise ConfigError("The state lies on several processes, and they have not found each other.")
    return Together(alarm.board, alarm)
