"""Where batches come from: how they are read, ahead or not, checked, padded and copied; their position and fingerprint.

It knows no step: it gives batches, or failures as values in their place, and a policy decides what happens next.
"""

import base64
import queue
import reprlib
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, NamedTuple, Protocol, TypeAlias, assert_never, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from stepc._jax import in_this_context
from stepc._language.kinds import Batch
from stepc._language.padding import pad_batch
from stepc._language.state import as_arrays, is_numeric, is_typed_key, key_data, leaf_crc32, leaves_by_path, path_of
from stepc.errors import BatchError, CheckpointError, DataError, ResumeError

ALIGNMENT = 64  # bytes: a host array at a multiple of it jax takes without a copy, on a CPU
SMALL = 1 << 16  # bytes: below it jax's own copy costs no more than an aligned place
POLL_SECONDS = 0.02  # how soon a wait for a batch notices that the run is over
LEAVE_SECONDS = 1.0  # how long to wait for the reading thread to end
NUMBERS = "biufcMmSU"  # the kinds of numpy dtypes whose bytes a position may hold
MISSING, MASK = "nothing", "mask"


@runtime_checkable
class Positioned(Protocol):
    """An iterator with a position, as those of Grain have: after `set_state` it gives the same next batch."""

    def get_state(self) -> Any: ...  # Any: what `encode_position` takes, of the iterator's choice

    def set_state(self, state: Any, /) -> None: ...


class DataItem(NamedTuple):
    """A batch, with the position of the data after and before it; or a hole, the place of a batch that was left out.

    Args:
      spec: the signature of the batch as it was read; one object for all batches of one signature.
    """

    batch: Batch
    after: Any = None  # Any: see Positioned
    is_hole: bool = False
    before: Any = None  # Any: see Positioned
    spec: "BatchSpec | None" = None


@dataclass(frozen=True)
class LeftOut:
    """The place of a short batch that is dropped; of a full one, where that of another process is dropped.

    Args:
      process: the process with the short batch; None if there is one process.
    """

    process: int | None = None


class DataTimeout(TimeoutError):
    """No batch arrived in time. The read goes on: nothing can end a thread."""


@dataclass(frozen=True)
class ReadFailure:
    """A read that failed.

    Args:
      place: the number of reads so far, this one included.
      given: the number of batches given so far.
      is_dead: the iterator ended with the failure.
      is_final: the same read would fail again.
      held: what this process has read, when the read failed on another process.
    """

    error: Exception
    place: int
    given: int
    is_dead: bool = False
    is_final: bool = False
    held: DataItem | LeftOut | None = None

    def refusal(self, *, is_retry: bool) -> str | None:
        """Why a policy cannot go on; None if it can."""
        if isinstance(self.error, DataTimeout):
            return "the read is still running"
        if self.is_dead:
            return "the data has ended"
        return "another read would give the same batch" if self.is_final and is_retry else None


@dataclass(frozen=True)
class EndOfData:
    """The iterator ended without a failure, or the run is over."""


@dataclass(frozen=True)
class ReaderError:
    """An exception of the reading thread that is not an `Exception`; the main thread raises it."""

    error: BaseException


Read: TypeAlias = DataItem | LeftOut | ReadFailure | EndOfData


@dataclass(frozen=True)
class BatchSpec:
    """The signature of a batch: its structure, and for each leaf whether it is on the host, its shape and its dtype.

    Args:
      leaf_types: class, shape and dtype of each leaf: the comparison that is cheap enough for every step.
      host_dtypes: for each leaf on the host the dtype that jax computes in, None for one on a device.
      is_narrowed: whether jax converts a host leaf to a narrower dtype, in which its numbers may not fit.
    """

    structure: Any  # Any: jax's tree structure has no public type
    leaves: tuple[tuple[str, tuple[int, ...], str], ...]
    paths: tuple[str, ...]
    leaf_types: tuple[tuple[type, tuple[int, ...], Any], ...] = ()  # Any: a dtype
    host_dtypes: tuple[Any, ...] = ()  # Any: a dtype, or None
    is_narrowed: bool = False

    def has_types(self, leaves: list[Any], structure: Any) -> bool:  # Any: leaves of a user's tree; as above
        """Whether these are the leaves of a batch whose arrays are of the same classes too."""
        if structure != self.structure:
            return False
        for leaf, (kind, shape, dtype) in zip(leaves, self.leaf_types, strict=True):
            if type(leaf) is not kind or leaf.shape != shape or leaf.dtype != dtype:
                return False
        return True

    def copied(self, leaves: list[Any]) -> list[Any]:  # Any, twice: arrays
        """The leaves of a batch, those on the host in memory of our own and in the dtypes that jax computes in.

        On CPU, jax may read a numpy buffer long after it was passed, even to `jnp.array`: a loader that reuses its
        buffer would change a batch in flight. An array that nobody can write to is taken as it is.
        """
        pairs = zip(leaves, self.host_dtypes, strict=True)
        return [leaf if dtype is None else _kept(leaf, dtype) for leaf, dtype in pairs]

    def num_rows(self) -> int:
        """The rows of the first leaf that has any."""
        return next((shape[0] for _, shape, _ in self.leaves if shape), 0)

    def rows(self) -> dict[str, str]:
        """Each leaf as it is printed, by path."""
        return {
            path: f"{location} {dtype}{list(shape)}"
            for path, (location, shape, dtype) in zip(self.paths, self.leaves, strict=True)
        }


@dataclass
class Source:
    """Reads one batch after another. A failure is a value too, so that it keeps its place among the batches.

    Args:
      place: moves a batch to the devices, or leaves it on the host.
      short: "raise", "drop" or "pad" for a batch that has an earlier one's signature but fewer rows.
      has_many: whether batches may differ in shape.
      specs: the signatures so far, each once.
      last: that of the last batch.
      is_reading: whether a read has begun and not ended; after a signal the iterator stands anywhere within it.
    """

    data: Iterable[Batch]
    place: Callable[[Batch], Batch] = lambda batch: batch
    short: str = "raise"
    has_many: bool = False
    specs: list[BatchSpec] = field(default_factory=list)
    last: BatchSpec | None = None
    num_reads: int = 0
    num_given: int = 0
    batches: Iterator[Batch] = field(init=False)
    position: Callable[[], Any] = field(init=False)  # Any: see Positioned
    failed: Exception | None = None
    before: Any = None  # Any: see Positioned
    is_reading: bool = False
    saved_rows: dict[str, str] | None = None  # `BatchSpec.rows` of the run that is resumed

    def __post_init__(self) -> None:
        self.batches = iter(self.data)
        # Looked up once: to ask whether an iterator has the methods takes as long as a small step.
        match self.batches:
            case Positioned() as positioned:
                self.position = lambda: copy_of_position(positioned.get_state())  # it may be an object that changes
            case _:
                self.position = lambda: None

    def read(self, reading: Callable[[], AbstractContextManager[object]] = nullcontext) -> Read:
        """The next batch, checked, copied and placed. The user's iterator runs inside the context `reading()`."""
        self.num_reads += 1
        try:
            with reading():
                self.before = self.position()
                self.is_reading = True
                batch = next(self.batches)
                after = self.position()
        except StopIteration:
            self.is_reading = False
            return EndOfData() if self.failed is None else self._failure(self.failed, is_dead=True)
        except Exception as error:  # whatever the user's iterator raises; a policy decides
            self.is_reading, self.failed = False, error
            return self._failure(error)
        self.is_reading, self.failed = False, None
        try:
            leaves, structure = jax.tree.flatten(batch)
            spec = self.last
            if spec is None or not spec.has_types(leaves, structure):
                batch = as_arrays(batch)
                if self.short == "drop" and self._longer_than(batch) is not None:
                    return LeftOut()
                if self.short == "pad":
                    check_mask(batch)
                    longer = self._longer_than(batch)
                    batch = batch if longer is None else padded(batch, longer)
                spec = self.last = self._signature_of(batch)
                leaves, structure = jax.tree.flatten(batch)
            elif spec.is_narrowed:
                check_range(leaves, spec)
            batch = self.place(structure.unflatten(spec.copied(leaves)))
            item = DataItem(batch, after, before=self.before, spec=spec)
        except Exception as error:  # BatchError, or whatever the user's `place` raises
            return self._failure(error)
        self.num_given += 1
        return item

    @property
    def spec(self) -> BatchSpec | None:
        """The signature of the first batch."""
        return self.specs[0] if self.specs else None

    def _longer_than(self, batch: Batch) -> BatchSpec | None:
        """The signature that a short batch can be filled up to; of several, the one with the fewest rows."""
        return min((one for one in self.specs if is_short(batch, one)), key=BatchSpec.num_rows, default=None)

    def _signature_of(self, batch: Batch) -> BatchSpec:
        """The one of the signatures that a batch has; a new one if it may have one. Errors: BatchError."""
        alike = next((one for one in self.specs if has_signature(batch, one)), None) if self.has_many else self.spec
        spec = checked(batch, alike, None if self.has_many and self.specs else self.saved_rows, any_shape=self.has_many)
        if spec is not alike:
            if self.spec is not None and alike is None:
                check_kinds(spec, self.spec)
            self.specs = [one for one in self.specs if one is not alike] + [spec]
        return spec

    @property
    def is_shared(self) -> bool:
        """Whether the iterator is the user's own, which the next run may go on with, and not one of this run."""
        return self.batches is self.data

    def go_to(self, position: Any) -> None:  # Any: see Positioned
        """Set the position of the data, if it has one."""
        match self.batches:
            case Positioned() if position is not None:
                self.batches.set_state(copy_of_position(position))  # it may become one that changes
                self.failed, self.is_reading = None, False
            case _:
                pass

    def _failure(self, error: Exception, *, is_dead: bool = False) -> ReadFailure:
        return ReadFailure(error, self.num_reads, self.num_given, is_dead, isinstance(error, BatchError))


class DataReader:
    """Gives first the batches to be repeated, then those of a source, which a thread may read ahead.

    Args:
      num_ahead: how many batches are read ahead; 0 reads in the main thread, when a batch is asked for.
      seconds: how long to wait for a batch that is read ahead; None waits for ever.
      is_over: whether the run is over; then no wait goes on.
      reading: the context in which the user's iterator runs in the main thread.
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
        self.again: deque[DataItem | LeftOut] = deque()  # to be given before what is read next
        self._failure: ReadFailure | None = None
        self._num_ahead, self._seconds = num_ahead, seconds
        self._ahead = ReadAhead(source, num_ahead, 0)
        self._thread: threading.Thread | None = None

    def read(self, most: int | None = None) -> Read:
        """The next read. A failure is given again until `retry` or `skip`.

        Args:
          most: how many batches the run asks for at most, this one included: no more are read ahead. None for all.
        """
        if self.again:
            return self.again.popleft()
        if self._failure is not None:
            return self._failure
        found = self._take(most) if self._num_ahead else self.source.read(self.reading)
        self._failure = found if isinstance(found, ReadFailure) else None
        return found

    def skip(self) -> None:
        """Go on after the failed read."""
        self._failure = None

    def retry(self, found: Read) -> None:
        """Set the data back to where the failed read began, if it has a position; or give the held batch again."""
        self._failure = None
        match found:
            case ReadFailure(held=DataItem() | LeftOut() as held):
                self.again.appendleft(held)
            case _:
                self.source.go_to(self.source.before)

    def go_to(self, position: Any) -> None:  # Any: see Positioned
        """Set the position of the data, and drop what was read ahead."""
        self.close()
        self._ahead = ReadAhead(self.source, self._num_ahead, 0)
        self.again.clear()
        self._failure = None
        self.source.go_to(position)

    def give_back(self, unfinished: Sequence[DataItem]) -> tuple[int, str] | None:
        """Set the user's own iterator to where the finished steps leave it, so that the next run goes on from there.

        Args:
          unfinished: the batches that were given and whose steps the state does not contain, in order.
        Returns: how many batches that were read ahead are lost, and why; None if none is.
        """
        is_hung = not self.close()
        ahead = [item for item in self.again if isinstance(item, DataItem)] + self._ahead.left()
        unused = [*unfinished, *ahead]
        if not self.source.is_shared or not (unused or is_hung or self.source.is_reading):
            return None
        num = sum(not item.is_hole for item in ahead)
        if is_hung:
            return num, "its read is still running, and gives one more"
        before = next((item.before for item in unused), self.source.before)
        if before is None:
            return (num, "the data has no `set_state(state)`") if num else None
        try:
            self.source.go_to(before)
        except Exception as error:  # the iterator's own
            return num, f"`set_state` failed: {type(error).__name__}: {error}"
        return None

    def close(self) -> bool:
        """Stop reading ahead; whether that succeeded. A read that hangs is abandoned: nothing can end a thread."""
        if self._thread is not None:
            self._ahead.stop.set()
            self._thread.join(LEAVE_SECONDS)
            has_ended = not self._thread.is_alive()
            self._thread = None
            return has_ended
        return True

    def _take(self, most: int | None) -> Read:
        if self._ahead.is_used_up:
            self._ahead = ReadAhead(self.source, self._num_ahead, most)
            self._thread = threading.Thread(target=in_this_context(self._ahead.read), name="stepc-data", daemon=True)
            self._thread.start()
        began = time.monotonic()
        while not self.is_over():
            try:
                found = self._ahead.take()
            except queue.Empty:
                if self._seconds is not None and time.monotonic() - began > self._seconds:
                    error = DataTimeout(f"no batch arrived within {self._seconds:g} s")
                    return ReadFailure(error, self.source.num_reads, self.source.num_given, is_dead=True)
                continue
            if isinstance(found, ReaderError):
                raise found.error
            return found
        return EndOfData()


class ReadAhead:
    """What one thread reads ahead: so many batches, or up to the first failure or the end of the data.

    Args:
      size: how many batches it holds ready.
      most: how many it reads; None for all.
      stop: ends it after the read that is under way.
    """

    def __init__(self, source: Source, size: int, most: int | None) -> None:
        self.source, self.most = source, most
        self.stop = threading.Event()
        self._num_taken = 0
        self.is_used_up = most == 0  # all that it reads has been taken
        self._in_hand: DataItem | None = None
        self._ready: queue.Queue[Read | ReaderError] = queue.Queue(max(size, 1))

    def read(self) -> None:
        """Read until it has read enough; the thread runs this."""
        for _ in count() if self.most is None else range(self.most):
            if self.stop.is_set():
                return
            try:
                found = self.source.read()
            except BaseException as error:  # SystemExit and the like: if the thread just ended, the run would hang
                found = ReaderError(error)
            if isinstance(found, DataItem):
                self._in_hand = found
            while not self._put(found):
                if self.stop.is_set():
                    return
            self._in_hand = None
            if not isinstance(found, DataItem | LeftOut):
                return

    def _put(self, found: Read | ReaderError) -> bool:
        try:
            self._ready.put(found, timeout=POLL_SECONDS)
        except queue.Full:
            return False
        return True

    def take(self) -> Read | ReaderError:
        """The next read. Errors: queue.Empty if it does not come soon."""
        found = self._ready.get(timeout=POLL_SECONDS)
        self._num_taken += 1
        self.is_used_up = not isinstance(found, DataItem | LeftOut) or self._num_taken == self.most
        return found

    def left(self) -> list[DataItem]:
        """What it has read and nobody has taken, once its thread has ended."""
        left: list[DataItem] = []
        with suppress(queue.Empty):
            while True:
                if isinstance(found := self._ready.get_nowait(), DataItem):
                    left.append(found)
        return left if self._in_hand is None else [*left, self._in_hand]


def data_failure(failure: ReadFailure, step: int) -> DataError:
    """The error to raise for a read that failed before a step."""
    error = failure.error
    what, suggestion = f"The data failed before step {step}: {type(error).__name__}: {error}", None
    if failure.is_dead and not isinstance(error, DataTimeout):
        what = f"The data failed and then ended, before step {step}: {type(error).__name__}: {error}"
        suggestion = "A generator cannot continue after it raises: catch the error inside, or write an iterator class."
    facts = [("read", str(failure.place))]
    return DataError(what, phase="data", step=step, state_ok=True, facts=facts, suggestion=suggestion)


def checked(
    batch: Batch, first: BatchSpec | None, saved: dict[str, str] | None = None, *, any_shape: bool = False
) -> BatchSpec:
    """The signature of a batch, which must be that of the first; the first must have that of the run it resumes.

    Args:
      any_shape: whether the run that is resumed may have had other shapes.

    Errors: BatchError with every fault: path, expected, got.
    """
    leaves, structure = jax.tree.flatten(batch)
    if first is None or not first.has_types(leaves, structure):
        first = _compared(batch, first, saved, any_shape=any_shape)
    if first.is_narrowed:
        check_range(leaves, first)
    return first


def check_range(leaves: list[Any], spec: BatchSpec) -> None:  # Any: arrays
    """Refuse integers on the host that do not fit in the dtype that jax gives them. Errors: BatchError with each leaf.

    Args:
      spec: the signature of the batch.
    """
    faults: list[tuple[str, str]] = []
    for path, leaf, dtype in zip(spec.paths, leaves, spec.host_dtypes, strict=True):
        if dtype is None or leaf.dtype.kind not in "iu" or leaf.dtype == dtype:
            continue
        limits, low, high = np.iinfo(dtype), leaf.min(), leaf.max()
        if low < limits.min or high > limits.max:
            expected = f"{limits.dtype}, from {limits.min} to {limits.max}"
            faults.append((path, f"expected {expected}, got {leaf.dtype}, from {low} to {high}"))
    _raise_for("This batch holds integers that do not fit in the dtype that jax gives them.", faults)


def _kept(array: np.ndarray, dtype: Any) -> np.ndarray:  # Any: a dtype
    """An array that nobody changes: the given one if nobody can write to it, else a copy that jax need not copy."""
    if not array.flags.writeable and array.dtype == dtype and _is_constant(array):
        return array
    if array.nbytes < SMALL:
        return np.array(array, dtype)
    memory = np.empty(array.size * dtype.itemsize + ALIGNMENT, np.uint8)
    start = -memory.__array_interface__["data"][0] % ALIGNMENT
    own = memory[start : start + memory.size - ALIGNMENT].view(dtype).reshape(array.shape)
    own[...] = array
    return own


def _is_constant(array: Any) -> bool:  # Any: an array, or whatever it is a view of
    """Whether an array and all that it is a view of are read-only. What is mapped from a file may still change."""
    while isinstance(array, np.ndarray):
        if array.flags.writeable:
            return False
        if array.base is None:
            return array.flags.owndata
        array = array.base
    return isinstance(array, bytes)


def has_signature(batch: Batch, spec: BatchSpec) -> bool:
    """Whether a batch has this signature, of arrays of numpy or jax."""
    leaves, structure = jax.tree.flatten(batch)
    return structure == spec.structure and tuple(map(_described, leaves)) == spec.leaves


def check_kinds(spec: BatchSpec, first: BatchSpec) -> None:
    """Refuse a signature that differs from another one in more than its shapes. Errors: BatchError."""
    faults = _changes(_without_shape(spec.rows()), _without_shape(first.rows()))
    if not faults and spec.structure != first.structure:
        faults = [("structure", f"expected {first.structure}, got {spec.structure}")]
    _raise_for("This batch differs from the first in more than its shapes.", faults)


def is_short(batch: Batch, first: BatchSpec | None) -> bool:
    """Whether a batch has the signature of the first one, but fewer rows."""
    leaves, structure = jax.tree.flatten(batch)
    if first is None or structure != first.structure:
        return False
    return all(
        (location, shape[1:], dtype) == (first_location, first_shape[1:], first_dtype) and shape[:1] < first_shape[:1]
        for (location, shape, dtype), (first_location, first_shape, first_dtype) in zip(
            map(_described, leaves), first.leaves, strict=True
        )
    )


def check_mask(batch: Batch) -> None:
    """Raise if a batch has no mask: its padding would weigh as much as its rows.

    Errors: BatchError.
    """
    if not (isinstance(batch, dict) and isinstance(batch.get(MASK), np.ndarray | jax.Array)):
        got = ", ".join(map(str, batch)) if isinstance(batch, dict) else type(batch).__name__
        raise BatchError(
            'short_batches="pad" needs a mask, and this batch has none.',
            facts=[("expected", 'a dict with an array "mask"'), ("got", got)],
            suggestion='Add a leaf "mask", 1 for each row, and return `sc.Mean((nll * mask).sum(), mask.sum())`.',
        )


def padded(batch: Batch, first: BatchSpec) -> Batch:
    """A short batch, padded to the rows of the first with copies of its own first row whose "mask" is 0."""
    filled, is_real = pad_batch(batch, first.leaves[0][1][0])
    mask = filled[MASK]
    mask[~is_real] = 0
    return jax.tree.map(lambda leaf, like: jnp.asarray(leaf) if isinstance(like, jax.Array) else leaf, filled, batch)


def _compared(batch: Batch, first: BatchSpec | None, saved: dict[str, str] | None, *, any_shape: bool) -> BatchSpec:
    """The slow part of `checked`: for the first batch, and for one whose arrays are of another class."""
    leaves, structure = jax.tree.flatten(batch)
    described = tuple([_described(leaf) for leaf in leaves])
    if first is not None and first.leaves == described and first.structure == structure:
        return first
    spec = BatchSpec(structure, described, tuple(path for path, _ in leaves_by_path(batch)))
    faults = _not_numeric(batch)
    if first is not None:
        faults = faults or _changes(spec.rows(), first.rows())
        faults = faults or [("structure", f"expected {first.structure}, got {structure}")]
        _raise_for("The signature of this batch is not that of the first batch.", faults)
    _raise_for("A batch must be a tree of arrays of numbers, with at least one row each.", faults)
    # numpy arrays may have become arrays of jax, or the other way round: their numbers are the same.
    kept = _without_shape if any_shape else _without_place
    faults = _changes(kept(spec.rows()), kept(saved or spec.rows()))
    what = "The signature of this batch is not that of the batches before the checkpoint."
    _raise_for(what, faults, "If that is meant: Checkpoints(…, check_data=False).")
    host_dtypes = tuple(_canonical(leaf.dtype) if isinstance(leaf, np.ndarray) else None for leaf in leaves)
    return replace(
        spec,
        leaf_types=tuple((type(leaf), leaf.shape, leaf.dtype) for leaf in leaves),
        host_dtypes=host_dtypes,
        is_narrowed=any(
            dtype is not None and leaf.dtype != dtype for leaf, dtype in zip(leaves, host_dtypes, strict=True)
        ),
    )


def _described(leaf: Any) -> tuple[str, tuple[int, ...], str]:  # Any: a leaf of a user's tree
    match leaf:
        case jax.Array():
            return "device", leaf.shape, leaf.dtype.name
        case np.memmap():
            return "host", leaf.shape, leaf.dtype.name
        case np.ndarray() | np.generic():
            return "host" if type(leaf) is np.ndarray else type(leaf).__name__, leaf.shape, leaf.dtype.name
        case _:
            return type(leaf).__name__, (), "object"


def _not_numeric(batch: Batch) -> list[tuple[str, str]]:
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch, is_leaf=lambda one: one is None):
        name = path_of(path) or "batch"
        location, shape, dtype = _described(leaf)
        if location not in ("host", "device"):
            found.append((name, f"expected a numpy or jax array, got {type(leaf).__name__}"))
        elif not (is_numeric(leaf.dtype) or is_typed_key(leaf)):
            found.append((name, f"expected numbers, got {dtype}{list(shape)}"))
        elif shape[:1] == (0,):
            found.append((name, f"expected at least one row, got {dtype}{list(shape)}"))
    return found if found or jax.tree.leaves(batch) else [("batch", "expected arrays, got none")]


def _changes(now: dict[str, str], before: dict[str, str]) -> list[tuple[str, str]]:
    return [
        (path or "batch", f"expected {before.get(path, MISSING)}, got {now.get(path, MISSING)}")
        for path in [*before, *(path for path in now if path not in before)]
        if before.get(path) != now.get(path)
    ]


def _without_place(rows: Mapping[str, str]) -> dict[str, str]:
    return {path: text.removeprefix("host ").removeprefix("device ") for path, text in rows.items()}


def _without_shape(rows: Mapping[str, str]) -> dict[str, str]:
    return {path: text.partition("[")[0] for path, text in _without_place(rows).items()}


def _raise_for(what: str, faults: list[tuple[str, str]], remedy: str | None = None) -> None:
    if faults:
        raise BatchError(what, facts=faults, suggestion=remedy)


def _canonical(dtype: Any) -> Any:  # Any, twice: a dtype of numpy
    return jax.dtypes.canonicalize_dtype(dtype)


# Of these, a dict is copied in a tenth of the time of `deepcopy`, which takes as long as a small step.
_IMMUTABLE = frozenset((type(None), bool, int, float, str, bytes))


def copy_of_position(position: Any) -> Any:  # Any, twice: see Positioned
    """A position that nobody else changes."""
    if type(position) is dict and _IMMUTABLE.issuperset(map(type, position.values())):
        return position.copy()
    return position if type(position) in _IMMUTABLE else deepcopy(position)


def go_to(source: Source, position: Any, *, step: int) -> None:  # Any: see Positioned
    """Set the data to its position after a step.

    Errors: ResumeError from whatever the iterator raises.
    """
    try:
        source.go_to(position)
    except Exception as error:  # the iterator's own, IndexError and ValueError among them
        raise ResumeError(
            f"The data cannot return to its saved position: {type(error).__name__}: {error}",
            facts=[("step", str(step))],
            suggestion="Either pass the data of that run, or name another directory for the checkpoints.",
        ) from error


def encode_position(position: Any, step: int) -> Any:  # Any: see Positioned; a JSON value
    """A position as a JSON value, from which `decode_position` makes an equal one, of the same types.

    Errors: CheckpointError with the part that cannot be one.
    """
    return {"json": _encoded(position, "position", step)}


def _encoded(part: Any, path: str, step: int) -> Any:  # Any: as above
    """Plain JSON values as they are, others as {"$kind": …}. A subclass is refused: it would come back as its base."""

    def encoded(parts: Iterable[Any]) -> list[Any]:
        return [_encoded(one, f"{path}[{index}]", step) for index, one in enumerate(parts)]

    match part:
        case None | bool():
            return part
        case int() | str() if type(part) in (int, str):
            return part
        case float() if type(part) is float:
            return part if np.isfinite(part) else {"$float": repr(part)}
        case list() if type(part) is list:
            return encoded(part)
        case tuple() if type(part) is tuple:
            return {"$tuple": encoded(part)}
        case dict() if type(part) is dict:
            pairs = [(key, _encoded(value, f"{path}[{key!r}]", step)) for key, value in part.items()]
            if all(type(key) is str and not key.startswith("$") for key in part):
                return dict(pairs)
            return {"$dict": [[_encoded(key, f"{path}, key {key!r}", step), value] for key, value in pairs]}
        case bytes() if type(part) is bytes:
            return {"$bytes": base64.b64encode(part).decode()}
        case np.generic() | np.ndarray() if type(part) in (np.ndarray, part.dtype.type) and part.dtype.kind in NUMBERS:
            kind = "$array" if type(part) is np.ndarray else "$scalar"
            return {kind: [part.dtype.str, list(part.shape), base64.b64encode(part.tobytes()).decode()]}
        case _:
            what = "`get_state()` of the data must return JSON values, bytes, tuples or numpy arrays."
            raise CheckpointError(what, step=step, facts=((path, f"got {type(part).__name__}: {reprlib.repr(part)}"),))


def decode_position(stored: Mapping[str, Any], *, is_same: bool) -> Any:  # Any: see Positioned
    """The position of this process; None if each process had its own, and their number is not the same now."""
    if "each" in stored:
        return decode_position(stored["each"][jax.process_index()], is_same=True) if is_same else None
    return (
        base64.b64decode(stored["bytes"]) if "bytes" in stored else _decoded(stored["json"])
    )  # bytes: as once written


def _decoded(part: Any) -> Any:  # Any: see _encoded
    match part:
        case list():
            return [_decoded(one) for one in part]
        case {"$float": text}:
            return float(text)
        case {"$tuple": parts}:
            return tuple(_decoded(one) for one in parts)
        case {"$dict": pairs}:
            return {_decoded(key): _decoded(value) for key, value in pairs}
        case {"$bytes": text}:
            return base64.b64decode(text)
        case {"$scalar": [dtype, _, text]}:
            return np.ndarray((), dtype, bytearray(base64.b64decode(text)))[()]
        case {"$array": [dtype, shape, text]}:
            return np.ndarray(shape, dtype, bytearray(base64.b64decode(text)))
        case dict():
            return {key: _decoded(value) for key, value in part.items()}
        case _:
            return part


@dataclass(frozen=True)
class DataFingerprint:
    """The last batch before a checkpoint: the position of the data before it, and its CRC-32."""

    before: Any  # Any: see Positioned
    crc32: int


def data_fingerprint(item: DataItem | None) -> DataFingerprint | None:
    """The fingerprint of a batch; None if the data cannot return to it."""
    return None if item is None or item.before is None else DataFingerprint(item.before, _batch_crc32(item.batch))


def check_data(source: Source, last: DataFingerprint, *, after: Any, step: int, tell: Callable[[str], None]) -> None:
    """Read the last batch before a checkpoint again, compare it, and set the data to the position after it.

    Why: an iterator with another seed, order or length accepts the saved position without a word, and would give other
      batches from there on.

    Args:
      after: the position for the next step.
      step: that of the checkpoint.
      tell: called with the reason if the batch cannot be compared.
    Errors: ResumeError if the batch differs.
    """
    go_to(source, last.before, step=step)
    found = source.read()
    source.num_reads = source.num_given = 0
    go_to(source, after, step=step)
    match found:
        case DataItem():
            crc32 = _batch_crc32(found.batch)
            if crc32 != last.crc32:
                raise ResumeError(
                    "This is not the data of the checkpoint: the last batch before the checkpoint differs.",
                    facts=[("step", str(step)), ("CRC-32", f"saved {last.crc32:08x}, now {crc32:08x}")],
                    suggestion="Either pass the same data (seed, order, length), or Checkpoints(…, check_data=False).",
                )
        case EndOfData():
            tell("the data ends before that batch")  # then the run ends too, and trains on nothing else
        case ReadFailure(error=BatchError()):
            pass  # another signature: the next read says so, leaf by leaf
        case LeftOut():  # it has fewer rows than a first batch that is read again
            tell("it has fewer rows than the first batch")
        case ReadFailure():
            tell(f"{type(found.error).__name__}: {found.error}")
        case _:
            assert_never(found)


def _batch_crc32(batch: Batch) -> int:
    """The CRC-32 of the paths, dtypes, shapes and bytes of all leaves."""
    found = 0
    for path, leaf in leaves_by_path(batch):
        array = np.asarray(key_data(leaf))
        found = leaf_crc32(array, zlib.crc32(f"{path} {array.dtype}{array.shape}".encode(), found))
    return found
