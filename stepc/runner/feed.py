"""Where batches come from: read, checked, copied, and read ahead. A failed read keeps its place. Knows no step."""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

from stepc.errors import BatchError, DataError
from stepc.language.kinds import Batch
from stepc.runner.batches import Spec, check_mask, checked, copied, is_short, padded

POLL_SECONDS = 0.02  # how soon a wait for a batch notices that the run is to end
LEAVE_SECONDS = 1.0  # how long a reading thread may take to leave


@runtime_checkable
class Positioned(Protocol):
    """An iterator that knows where it is, as those of Grain do: `set_state` leads to the same next batch."""

    def get_state(self) -> Any: ...  # Any: what JSON can hold, or bytes; it is the iterator's own

    def set_state(self, state: Any, /) -> None: ...


class Item(NamedTuple):
    """A batch, and where the data stands after and before it. Without a batch: the place of one that was left out."""

    batch: Batch
    after: Any = None  # Any: see Positioned
    is_hole: bool = False
    before: Any = None  # Any: see Positioned


class Hung(TimeoutError):
    """A batch did not come in the time that was given; whatever reads it cannot be ended."""


@dataclass(frozen=True)
class Broken:
    """A read that failed, when `given` batches had been given and one had been asked for `place` times.

    Args:
      is_dead: the data has ended with it.
      is_final: to read again would give the same.
      held: the batch that this process had, when the read of another one failed.
    """

    error: Exception
    place: int
    given: int
    is_dead: bool = False
    is_final: bool = False
    held: Item | None = None

    def refusal(self, *, is_retry: bool) -> str | None:
        """Why a policy cannot go on after it; None if it can."""
        if isinstance(self.error, Hung):
            return "the read goes on still"
        if self.is_dead:
            return "the data has ended"
        return "the same batch would be refused again" if self.is_final and is_retry else None


@dataclass(frozen=True)
class End:
    """The data has ended as data ends, or the run is to end."""


@dataclass(frozen=True)
class Raised:
    """What a reading thread met that is no `Exception`; the thread of the run raises it."""

    error: BaseException


Read: TypeAlias = Item | Broken | End


@dataclass
class Source:
    """One read after another, each a value: a failure is one too, so that it keeps its place behind what came before.

    Args:
      place: moves a batch to devices, or leaves it on the host.
      short: "raise", or "drop" or "pad" for batches that are like the first with fewer rows.
    """

    data: Iterable[Batch]
    place: Callable[[Batch], Batch] = lambda batch: batch
    short: str = "raise"
    spec: Spec | None = None
    num_reads: int = 0
    num_given: int = 0
    num_dropped: int = 0
    batches: Iterator[Batch] = field(init=False)
    position: Callable[[], Any] = field(init=False)  # Any: see Positioned
    failed: Exception | None = None
    before: Any = None  # Any: see Positioned
    saved_rows: dict[str, str] | None = None  # how a batch looked before a resume

    def __post_init__(self) -> None:
        self.batches = iter(self.data)
        # Asked once: to ask whether an iterator has the methods takes as long as a small step.
        self.position = position_reader(self.batches)

    def read(self, reading: Callable[[], AbstractContextManager[object]] = nullcontext) -> Read:
        """The next batch, checked, copied and placed. `reading` is entered while the user's own code runs."""
        while True:
            self.num_reads += 1
            try:
                with reading():
                    self.before = self.position()
                    batch = next(self.batches)
                    after = self.position()
            except StopIteration:
                return End() if self.failed is None else self._broken(self.failed, is_dead=True)
            except Exception as error:  # whatever the data raises; what is done about it is for a policy to say
                self.failed = error
                return self._broken(error)
            self.failed = None
            if self.short == "drop" and is_short(batch, self.spec):
                self.num_dropped += 1
                continue
            try:
                if self.short == "pad":
                    check_mask(batch)
                    batch = padded(batch, self.spec) if self.spec and is_short(batch, self.spec) else batch
                self.spec = checked(batch, self.spec, self.saved_rows)
                item = Item(self.place(copied(batch)), after, before=self.before)
            except Exception as error:  # BatchError, or whatever the user's `place` raises
                return self._broken(error)
            self.num_given += 1
            return item

    def _broken(self, error: Exception, *, is_dead: bool = False) -> Broken:
        return Broken(error, self.num_reads, self.num_given, is_dead, isinstance(error, BatchError))

    def go_to(self, position: Any) -> None:  # Any: see Positioned
        """Let the next batch be the one that followed when the data stood there, if it can."""
        match self.batches:
            case Positioned() if position is not None:
                self.batches.set_state(position)
                self.failed = None
            case _:
                pass


def position_reader(batches: object) -> Callable[[], Any]:  # Any: see Positioned
    """How to ask where the data stands; None, if it cannot say."""
    match batches:
        case Positioned():
            return batches.get_state
        case _:
            return lambda: None


class Feed:
    """What is to be read again, then what the source gives, read by a thread if that is to be ahead.

    Args:
      num_ahead: how many batches are read ahead; 0 reads when a batch is asked for, in the thread of the run.
      seconds: how long a batch that is read ahead is waited for; None for as long as it takes.
      is_over: whether the run is to end; then no batch is waited for.
      reading: entered while the user's code reads in the thread of the run.
    """

    def __init__(
        self,
        source: Source,
        *,
        num_ahead: int,
        seconds: float | None = None,
        is_over: Callable[[], bool],
        reading: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self.source, self.is_over, self.reading = source, is_over, reading
        self.again: deque[Item] = deque()
        self._broken: Broken | None = None
        self._num_ahead, self._seconds = num_ahead, seconds
        self._ready: queue.Queue[Read | Raised] = queue.Queue(max(num_ahead, 1))
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def read(self) -> Read:
        """The next read. A failed one comes again until `retry` or `skip`."""
        if self.again:
            return self.again.popleft()
        if self._broken is not None:
            return self._broken
        found = self._read_ahead() if self._num_ahead else self.source.read(self.reading)
        self._broken = found if isinstance(found, Broken) else None
        return found

    def skip(self) -> None:
        """Go on after the read that failed."""
        self._broken = None

    def retry(self, found: Read) -> None:
        """Go back to where the read that failed began, if the data can; or give again what was held."""
        self._broken = None
        match found:
            case Broken(held=Item() as held):
                self.again.appendleft(held)
            case _:
                self.source.go_to(self.source.before)

    def go_to(self, position: Any) -> None:  # Any: see Positioned
        """Let the next batch be the one that followed when the data stood there."""
        self.close()
        self.again.clear()
        self._broken = None
        self.source.go_to(position)

    def close(self) -> None:
        """Stop reading ahead, and drop what was read. A read that hangs is left alone: a thread cannot be ended."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join(LEAVE_SECONDS)
            self._thread = None
        self._ready = queue.Queue(max(self._num_ahead, 1))

    def _read_ahead(self) -> Read:
        if self._thread is None:
            self._stop = threading.Event()
            self._thread = threading.Thread(
                target=self._work, args=(self._ready, self._stop), name="stepc-data", daemon=True
            )
            self._thread.start()
        began = time.monotonic()
        while not self.is_over():
            try:
                found = self._ready.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if self._seconds is not None and time.monotonic() - began > self._seconds:
                    hung = Hung(f"no batch came in {self._seconds:g} s")
                    return Broken(hung, self.source.num_reads, self.source.num_given, is_dead=True)
                continue
            if not isinstance(found, Item):  # the thread has ended
                self._thread = None
            if isinstance(found, Raised):
                raise found.error
            return found
        return End()

    def _work(self, ready: "queue.Queue[Read | Raised]", stop: threading.Event) -> None:
        while not stop.is_set():
            try:
                found = self.source.read()
            except BaseException as error:  # SystemExit and the like: a thread that ends unseen would be a hang
                found = Raised(error)
            while not stop.is_set():
                try:
                    ready.put(found, timeout=POLL_SECONDS)
                    break
                except queue.Full:
                    continue
            if not isinstance(found, Item):
                return


def data_failure(broken: Broken, step: int) -> DataError:
    """What to raise for a read that failed before a step."""
    error = broken.error
    facts, suggestion = [("read", str(broken.place))], None
    what = f"The data failed before step {step}: {type(error).__name__}: {error}"
    if broken.is_dead and not isinstance(error, Hung):
        what = f"The data ended after it failed, before step {step}: {type(error).__name__}: {error}"
        suggestion = "A generator cannot go on after an error: raise none in it, or write an iterator class."
    return DataError(what, phase="data", step=step, state_ok=True, facts=facts, suggestion=suggestion)
