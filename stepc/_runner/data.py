"""What a batch looks like: the first is held against each later one, and host arrays are copied. Knows no iterator."""

import base64
import json
import queue
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple, Protocol, TypeAlias, assert_never, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from stepc._language.kinds import Batch
from stepc._language.padding import pad_batch
from stepc._language.state import leaves_by_path
from stepc.errors import BatchError, CheckpointError, DataError, ResumeError

MISSING, MASK = "nothing", "mask"


@dataclass(frozen=True)
class BatchSpec:
    """The structure of a batch, and for each leaf where it is, its shape and its dtype.

    Args:
      forms: the class, the shape and the dtype of each leaf: what a step has time to compare.
      is_narrowed: whether a host leaf has a dtype that jax does not compute in, so that its numbers may not fit.
    """

    structure: Any  # Any: the type of a tree's structure is jax's own
    leaves: tuple[tuple[str, tuple[int, ...], str], ...]
    paths: tuple[str, ...]
    forms: tuple[tuple[type, tuple[int, ...], Any], ...] = ()  # Any: a dtype
    is_narrowed: bool = False

    def rows(self) -> dict[str, str]:
        """Each leaf as it is printed, by path."""
        return {
            path: f"{lies} {dtype}{list(shape)}"
            for path, (lies, shape, dtype) in zip(self.paths, self.leaves, strict=True)
        }


def checked(batch: Batch, first: BatchSpec | None, saved: dict[str, str] | None = None) -> BatchSpec:
    """The spec of a batch, which must be that of the first; and that one's rows what they were before a resume.

    Errors: BatchError with every fault: path, expected, got.
    """
    leaves, structure = jax.tree.flatten(batch)
    if first is None or structure != first.structure or not _have_forms(leaves, first.forms):
        first = _compared(batch, first, saved)
    if first.is_narrowed:
        _refuse("This batch holds numbers that do not fit where jax puts them.", _too_large(batch))
    return first


def _have_forms(leaves: list[Any], forms: tuple[tuple[type, tuple[int, ...], Any], ...]) -> bool:  # Any: as above
    for leaf, (kind, shape, dtype) in zip(leaves, forms, strict=True):
        if type(leaf) is not kind or leaf.shape != shape or leaf.dtype != dtype:
            return False
    return True


def _compared(batch: Batch, first: BatchSpec | None, saved: dict[str, str] | None) -> BatchSpec:
    """What `checked` does for the first batch, and for one that is not quite like it: an array of another class."""
    leaves, structure = jax.tree.flatten(batch)
    rows = tuple([_row(leaf) for leaf in leaves])
    if first is not None and first.leaves == rows and first.structure == structure:
        return first
    spec = BatchSpec(structure, rows, tuple(path for path, _ in leaves_by_path(batch)))
    if first is not None:
        _refuse("This batch is not like the first one.", _unfit(batch) or _differences(spec, first))
    _refuse("This batch cannot be trained on.", _unfit(batch))
    _refuse("This batch is not like those before the checkpoint.", _changes(spec.rows(), saved or spec.rows()))
    return replace(
        spec,
        forms=tuple((type(leaf), leaf.shape, leaf.dtype) for leaf in leaves),
        is_narrowed=any(type(leaf) is np.ndarray and leaf.dtype != _canonical(leaf.dtype) for leaf in leaves),
    )


def is_short(batch: Batch, first: BatchSpec | None) -> bool:
    """Whether a batch is like the first one, with fewer rows."""
    leaves, structure = jax.tree.flatten(batch)
    if first is None or structure != first.structure:
        return False
    rows = [_row(leaf) for leaf in leaves]
    return all(
        (lies, shape[1:], dtype) == (old_lies, old_shape[1:], old_dtype) and shape[:1] < old_shape[:1]
        for (lies, shape, dtype), (old_lies, old_shape, old_dtype) in zip(rows, first.leaves, strict=True)
    )


def padded(batch: Batch, first: BatchSpec) -> Batch:
    """A short batch with as many rows as the first: copies of its first row, with zeros in the leaf "mask"."""
    filled, is_real = pad_batch(batch, first.leaves[0][1][0])
    mask = filled[MASK]
    mask[~is_real] = 0
    return jax.tree.map(lambda leaf, like: jnp.asarray(leaf) if isinstance(like, jax.Array) else leaf, filled, batch)


def check_mask(batch: Batch) -> None:
    """Refuse a batch without a mask: rows that fill it up would weigh as much as the others.

    Errors: BatchError.
    """
    if not (isinstance(batch, dict) and isinstance(batch.get(MASK), np.ndarray | jax.Array)):
        got = ", ".join(map(str, batch)) if isinstance(batch, dict) else type(batch).__name__
        raise BatchError(
            "Short batches cannot be filled up: this batch has no mask.",
            facts=[("expected", 'a dict with an array "mask"'), ("got", got)],
            suggestion="Give each row a 1 in a leaf 'mask', weighed by `sc.Mean((nll * mask).sum(), mask.sum())`.",
        )


def copied(batch: Batch) -> Batch:
    """The batch with its host arrays in memory of our own, in the dtypes that jax computes in.

    On CPU, jax may read a numpy buffer long after it was given it, also through `jnp.array`: a loader that uses its
    buffer again would change a batch in flight.
    """
    leaves, structure = jax.tree.flatten(batch)
    return structure.unflatten(
        [np.array(leaf, _canonical(leaf.dtype)) if isinstance(leaf, np.ndarray) else leaf for leaf in leaves]
    )


def _row(leaf: Any) -> tuple[str, tuple[int, ...], str]:  # Any: a leaf of a user's tree
    match leaf:
        case jax.Array():
            return "device", leaf.shape, leaf.dtype.name
        case np.memmap():
            return "host", leaf.shape, leaf.dtype.name
        case np.ndarray() | np.generic():
            return "host" if type(leaf) is np.ndarray else type(leaf).__name__, leaf.shape, leaf.dtype.name
        case _:
            return type(leaf).__name__, (), "object"


def _unfit(batch: Batch) -> list[tuple[str, str]]:
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch, is_leaf=lambda one: one is None):
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "batch"
        lies, shape, dtype = _row(leaf)
        if lies not in ("host", "device"):
            found.append((name, f"expected a numpy or jax array, got {type(leaf).__name__}"))
        elif not (jnp.issubdtype(leaf.dtype, np.number) or leaf.dtype == np.bool_ or _is_key(leaf)):
            found.append((name, f"expected numbers, got {dtype}{list(shape)}"))
        elif shape[:1] == (0,):
            found.append((name, f"expected rows, got {dtype}{list(shape)}"))
    return found if found or jax.tree.leaves(batch) else [("batch", "expected arrays, got none")]


def _is_key(leaf: Any) -> bool:  # Any: an array of jax or numpy
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _differences(spec: BatchSpec, first: BatchSpec) -> list[tuple[str, str]]:
    found = _changes(spec.rows(), first.rows())
    return found or [("structure", f"expected {first.structure}, got {spec.structure}")]


def _changes(now: dict[str, str], before: dict[str, str]) -> list[tuple[str, str]]:
    return [
        (path or "batch", f"expected {before.get(path, MISSING)}, got {now.get(path, MISSING)}")
        for path in [*before, *(one for one in now if one not in before)]
        if before.get(path) != now.get(path)
    ]


def _too_large(batch: Batch) -> list[tuple[str, str]]:
    found = []
    for path, leaf in leaves_by_path(batch):
        if not isinstance(leaf, np.ndarray) or leaf.dtype.kind not in "iu" or leaf.dtype == _canonical(leaf.dtype):
            continue
        holds = np.iinfo(_canonical(leaf.dtype))
        if leaf.min() < holds.min or leaf.max() > holds.max:
            found.append((path, f"expected {holds.dtype}, from {holds.min} to {holds.max}, got {_span(leaf)}"))
    return found


def _span(leaf: np.ndarray) -> str:
    return f"{leaf.dtype}, from {leaf.min()} to {leaf.max()}"


def _canonical(dtype: Any) -> Any:  # Any: a dtype of numpy
    return _canonical_where(dtype, jax.config.jax_enable_x64)  # pyright: ignore[reportAttributeAccessIssue]


@cache  # jax takes as long to say it as numpy to copy a small array
def _canonical_where(dtype: Any, is_x64: bool) -> Any:  # Any: as above
    return jax.dtypes.canonicalize_dtype(dtype)


def _refuse(what: str, faults: list[tuple[str, str]]) -> None:
    if faults:
        raise BatchError(what, facts=faults)


def encode_position(position: Any, number: int) -> Any:  # Any: where the data stands
    """What JSON can hold. Errors: CheckpointError if it cannot."""
    if isinstance(position, bytes):
        return {"bytes": base64.b64encode(position).decode()}
    try:
        json.dumps(position, allow_nan=False)
    except (TypeError, ValueError) as error:
        what = "The position of the data, `get_state()`, is neither bytes nor what JSON can hold."
        raise CheckpointError(what, step=number, facts=(("position", repr(position)),)) from error
    return {"json": position}


def decode_position(stored: Mapping[str, Any], *, is_same: bool) -> Any:  # Any: where the data stands
    """The position of this process; None if each had its own, and there are not as many now."""
    if "each" in stored:
        return decode_position(stored["each"][jax.process_index()], is_same=True) if is_same else None
    return base64.b64decode(stored["bytes"]) if "bytes" in stored else stored["json"]


POLL_SECONDS = 0.02  # how soon a wait for a batch notices that the run is to end
LEAVE_SECONDS = 1.0  # how long a reading thread may take to leave


@runtime_checkable
class Positioned(Protocol):
    """An iterator that knows where it is, as those of Grain do: `set_state` leads to the same next batch."""

    def get_state(self) -> Any: ...  # Any: what JSON can hold, or bytes; it is the iterator's own

    def set_state(self, state: Any, /) -> None: ...


class DataItem(NamedTuple):
    """A batch, and where the data stands after and before it. Without a batch: the place of one that was left out."""

    batch: Batch
    after: Any = None  # Any: see Positioned
    is_hole: bool = False
    before: Any = None  # Any: see Positioned


class DataTimeout(TimeoutError):
    """A batch did not come in the time that was given; whatever reads it cannot be ended."""


@dataclass(frozen=True)
class ReadFailure:
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
    held: DataItem | None = None

    def refusal(self, *, is_retry: bool) -> str | None:
        """Why a policy cannot go on after it; None if it can."""
        if isinstance(self.error, DataTimeout):
            return "the read goes on still"
        if self.is_dead:
            return "the data has ended"
        return "the same batch would be refused again" if self.is_final and is_retry else None


@dataclass(frozen=True)
class EndOfData:
    """The data has ended as data ends, or the run is to end."""


@dataclass(frozen=True)
class ReaderError:
    """What a reading thread met that is no `Exception`; the thread of the run raises it."""

    error: BaseException


Read: TypeAlias = DataItem | ReadFailure | EndOfData


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
    spec: BatchSpec | None = None
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
                return EndOfData() if self.failed is None else self._broken(self.failed, is_dead=True)
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
                item = DataItem(self.place(copied(batch)), after, before=self.before)
            except Exception as error:  # BatchError, or whatever the user's `place` raises
                return self._broken(error)
            self.num_given += 1
            return item

    def _broken(self, error: Exception, *, is_dead: bool = False) -> ReadFailure:
        return ReadFailure(error, self.num_reads, self.num_given, is_dead, isinstance(error, BatchError))

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


class DataReader:
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
        self.again: deque[DataItem] = deque()
        self._broken: ReadFailure | None = None
        self._num_ahead, self._seconds = num_ahead, seconds
        self._ready: queue.Queue[Read | ReaderError] = queue.Queue(max(num_ahead, 1))
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def read(self) -> Read:
        """The next read. A failed one comes again until `retry` or `skip`."""
        if self.again:
            return self.again.popleft()
        if self._broken is not None:
            return self._broken
        found = self._read_ahead() if self._num_ahead else self.source.read(self.reading)
        self._broken = found if isinstance(found, ReadFailure) else None
        return found

    def skip(self) -> None:
        """Go on after the read that failed."""
        self._broken = None

    def retry(self, found: Read) -> None:
        """Go back to where the read that failed began, if the data can; or give again what was held."""
        self._broken = None
        match found:
            case ReadFailure(held=DataItem() as held):
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
                    hung = DataTimeout(f"no batch came in {self._seconds:g} s")
                    return ReadFailure(hung, self.source.num_reads, self.source.num_given, is_dead=True)
                continue
            if not isinstance(found, DataItem):  # the thread has ended
                self._thread = None
            if isinstance(found, ReaderError):
                raise found.error
            return found
        return EndOfData()

    def _work(self, ready: "queue.Queue[Read | ReaderError]", stop: threading.Event) -> None:
        while not stop.is_set():
            try:
                found = self.source.read()
            except BaseException as error:  # SystemExit and the like: a thread that ends unseen would be a hang
                found = ReaderError(error)
            while not stop.is_set():
                try:
                    ready.put(found, timeout=POLL_SECONDS)
                    break
                except queue.Full:
                    continue
            if not isinstance(found, DataItem):
                return


def data_failure(broken: ReadFailure, step: int) -> DataError:
    """What to raise for a read that failed before a step."""
    error = broken.error
    facts, suggestion = [("read", str(broken.place))], None
    what = f"The data failed before step {step}: {type(error).__name__}: {error}"
    if broken.is_dead and not isinstance(error, DataTimeout):
        what = f"The data ended after it failed, before step {step}: {type(error).__name__}: {error}"
        suggestion = "A generator cannot go on after an error: raise none in it, or write an iterator class."
    return DataError(what, phase="data", step=step, state_ok=True, facts=facts, suggestion=suggestion)


OTHER_DATA = "Either give that data (its seed, order and length), or say Checkpoints(…, check_data=False)."


@dataclass(frozen=True)
class DataFingerprint:
    """The last batch before a checkpoint: where the data stood before it, and the batch in a number."""

    before: Any  # Any: see Positioned
    crc32: int


def data_fingerprint(item: DataItem | None) -> DataFingerprint | None:
    """What to remember of a batch; None of one that cannot be found again."""
    return None if item is None or item.before is None else DataFingerprint(item.before, digest(item.batch))


def digest(batch: Batch) -> int:
    """The CRC-32 of the paths, dtypes, shapes and bytes of its leaves."""
    found = 0
    for path, leaf in leaves_by_path(batch):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        array = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
        found = zlib.crc32(array.tobytes(), zlib.crc32(f"{path} {array.dtype}{array.shape}".encode(), found))
    return found


def check_data(source: Source, last: DataFingerprint, *, after: Any, step: int, tell: Callable[[str], None]) -> None:
    """Read the last batch before a checkpoint again, then stand after it.

    Why: an iterator goes to a place it is given also with another seed, another order or another length, and would
      give other batches from there on without a transform.

    Args:
      after: where the data stands for the next step.
      step: that of the checkpoint.
      tell: hears why the batch could not be compared.
    Errors: ResumeError if it is another batch.
    """
    go_to(source, last.before, step=step)
    found = source.read()
    source.num_reads = source.num_given = 0
    go_to(source, after, step=step)
    match found:
        case DataItem():
            now = digest(found.batch)
            if now != last.crc32:
                raise ResumeError(
                    "This data is not the data of the checkpoint: the batch that led to it is another one.",
                    facts=[("step", str(step)), ("CRC-32", f"saved {last.crc32:08x}, now {now:08x}")],
                    suggestion=OTHER_DATA,
                )
        case EndOfData():
            tell("the data ends before it")  # and so will the run, with nothing trained on other data
        case ReadFailure(error=BatchError()):
            pass  # of another shape: that is said, leaf by leaf, when the next batch is read
        case ReadFailure():
            tell(f"{type(found.error).__name__}: {found.error}")
        case _:
            assert_never(found)


def go_to(source: Source, position: Any, *, step: int) -> None:  # Any: see Positioned
    """Let the data stand where it stood after a step.

    Errors: ResumeError from whatever it raises.
    """
    try:
        source.go_to(position)
    except Exception as error:  # the iterator's own, IndexError and ValueError among them
        raise ResumeError(
            f"The data cannot go back to where it stood: {type(error).__name__}: {error}",
            facts=[("step", str(step))],
            suggestion="Give the data of that run, or name another directory for the checkpoints.",
        ) from error
