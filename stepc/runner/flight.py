"""Steps that were given to the devices and are not done: how to call a step, and how to wait for what it made."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from stepc.errors import BuildError, DeviceError, NonFiniteError, StepError
from stepc.language.kinds import Batch, Metrics
from stepc.language.state import leaves_by_path
from stepc.runner.feed import Item


@runtime_checkable
class Watch(Protocol):
    """What a step saw of numbers that are not finite; arrays that are never donated."""

    finite: Any  # Any: a bool array, one for each step of a call: whether loss and gradient are, or it was skipped

    def describe(self) -> list[tuple[str, str]]:
        """Rows of (label, text) that name microbatches and leaves."""
        ...


@runtime_checkable
class Runnable(Protocol):
    """A compiled step, or its reference."""

    def __call__(self, state: Any, batch: Batch, /) -> tuple[Any, Metrics]:  # Any: a state, whatever it is made of
        """One step."""
        ...


@runtime_checkable
class Watched(Protocol):
    """A step that can say what it saw."""

    def watched(self, state: Any, batch: Batch, /) -> tuple[Any, Metrics, Watch]: ...  # Any: as above


@runtime_checkable
class Skipping(Protocol):
    """A step that can leave the state as it was; None if it does not."""

    @property
    def skip_limit(self) -> int | None: ...


@runtime_checkable
class Repeating(Protocol):
    """A step that makes several steps in a call."""

    @property
    def steps_per_call(self) -> int: ...


@runtime_checkable
class Placing(Protocol):
    """A step that can put a batch on the devices as it takes it; of many processes' rows it makes one."""

    def put(self, batch: Batch, /) -> Batch: ...


@runtime_checkable
class Lowers(Protocol):
    """A step that can say what is compiled for a state and a batch."""

    @property
    def mesh(self) -> Mesh | None: ...

    def lower(self, state: Any, batch: Batch, /) -> Any: ...  # Any: a state; a Lowered


Call: TypeAlias = Callable[[Any, Batch], tuple[Any, Metrics, Watch | None]]  # Any: a state


def call_of(step: Runnable) -> Call:
    """One call of a step, with what it saw if it can say."""
    match step:
        case Watched():
            return step.watched
        case _:
            return lambda state, batch: (*step(state, batch), None)


def skip_limit_of(step: object) -> int | None:
    """How many skips in a row the step allows; None if it skips nothing."""
    match step:
        case Skipping():
            return step.skip_limit
        case _:
            return None


def steps_per_call_of(step: object) -> int:
    """How many steps one call makes."""
    match step:
        case Repeating():
            return step.steps_per_call
        case _:
            return 1


class Flying(NamedTuple):
    """A call that was made: its first step, what it was given, and its own outputs, which no later step donates."""

    first: int
    item: Item
    metrics: Metrics
    watch: Watch | None


def place_of(step: object, *, is_ahead: bool, many: bool) -> Callable[[Batch], Batch]:
    """Where batches go that are read: what is read ahead, and the rows of many processes, to the devices."""
    match step:
        case Placing() if is_ahead or many:
            return step.put
        case _:
            return lambda batch: batch


def mesh_of(step: object) -> str:
    """The mesh of a step, as it is printed."""
    match step:
        case Lowers(mesh=Mesh() as mesh):
            return str(dict(mesh.shape))
        case Lowers():
            return "none: one device"
        case _:
            return "unknown"


@dataclass(frozen=True)
class Landed:
    """What a call did: for each of its steps whether it is finite, and whether it was skipped."""

    is_finite: np.ndarray
    is_skipped: np.ndarray


def land(flying: Flying) -> Landed | None:
    """Wait for a call. None says that all its steps are finite, and so none was skipped; one flag tells that.

    Errors: DeviceError for its own failure. To wait for its own outputs, in order, is what attributes a late error: on
      a later step it would come under another name.
    """
    watch, metrics = flying.watch, flying.metrics
    try:
        if watch is not None:
            flags = np.asarray(watch.finite)
            if flags.all() if flags.ndim else flags:  # of one flag, `all` takes ten times as long as the flag
                return None
        losses = np.asarray(metrics["loss"])
        finite = np.isfinite(losses.astype(np.float64)) if watch is None else np.asarray(watch.finite)
        skipped = np.asarray(metrics["skipped"]) if "skipped" in metrics else np.zeros_like(losses, bool)
    except Exception as error:  # jax raises several classes for a program that failed, ValueError among them
        raise failed(error, "settle", flying.first, state_ok=False) from error
    return Landed(finite.reshape(-1), skipped.reshape(-1) != 0)


def failed(error: Exception, phase: str, step: int, *, state_ok: bool) -> StepError:
    """What to raise from an exception of a step. Class and text of the original say little; the phase says it."""
    kind = BuildError if phase == "build" else DeviceError
    doing = "could not be built" if phase == "build" else "failed on the device"
    return kind(f"Step {step} {doing}: {type(error).__name__}: {error}", phase=phase, step=step, state_ok=state_ok)


def not_finite(flying: Flying, step: int, row: int, *, state_ok: bool, why: str = "") -> NonFiniteError:
    """What to raise for a step whose loss or gradient is not finite."""
    metrics = {name: np.asarray(value).reshape(-1)[row] for name, value in flying.metrics.items()}
    facts = [(name, f"{float(metrics[name])}") for name in ("loss", "grad_norm", "loss_scale") if name in metrics]
    facts += not_finite_in(flying.item.batch, row if np.ndim(flying.metrics["loss"]) else None)
    watch = flying.watch
    if watch is not None and np.ndim(watch.finite):
        watch = jax.tree.map(lambda leaf: leaf[row], watch)  # of several steps in one call, this one
    seen = [] if watch is None else watch.describe()
    what = f"Step {step} is not finite{why}."
    return NonFiniteError(what, phase="settle", step=step, state_ok=state_ok, facts=[*facts, *seen])


def not_finite_in(batch: Batch, row: int | None) -> list[tuple[str, str]]:
    """Rows that say which leaves of a batch hold such numbers, and how many.

    Args:
      row: which of several batches that are stacked for one call.
    """
    found = []
    for path, leaf in leaves_by_path(batch):
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and (isinstance(leaf, np.ndarray) or leaf.is_fully_addressable):
            numbers = np.asarray(leaf if row is None else leaf[row])
            if num := int((~np.isfinite(numbers)).sum()):
                found.append(("batch", f"{num} of {numbers.size:,} numbers are not finite in {path or 'it'}"))
    return found or [("batch", "every number is finite")]


def check_metrics(metrics: object, *, step: int, num_steps: int) -> None:
    """Refuse what is no table of scalars with a loss.

    Errors: BuildError.
    """
    faults = []
    if not isinstance(metrics, dict):
        faults.append(("metrics", f"expected a dict, got {type(metrics).__name__}"))
    else:
        shape = () if num_steps == 1 else (num_steps,)
        faults += [
            (name, f"expected shape {shape}, got {np.shape(value)}")
            for name, value in metrics.items()
            if np.shape(value) != shape
        ]
        faults += [] if "loss" in metrics else [("loss", "expected a metric of this name, got none")]
    if faults:
        what = f"Step {step} does not return what a step returns: a state, and metrics that are scalars."
        raise BuildError(what, phase="build", step=step, state_ok=False, facts=faults)


def changes_of_names(before: Iterable[str], after: Iterable[str]) -> str:
    """Which names of metrics are gone, and which are new, in words."""
    old, new = set(before), set(after)
    pairs = {"gone": old - new, "new": new - old}
    return "; ".join(f"{what}: {', '.join(sorted(names))}" for what, names in pairs.items() if names)


def deleted_leaves(state: Any) -> list[str]:  # Any: a state
    """The paths of arrays that are gone."""
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if isinstance(leaf, jax.Array) and leaf.is_deleted()
    ]
