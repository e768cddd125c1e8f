"""Calling a step, waiting for it in order, and copying its state."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from stepc._language.kinds import Batch, Metrics
from stepc._language.state import leaves_by_path
from stepc._runner.data import DataItem
from stepc._runner.events import floats_of
from stepc.errors import (
    BuildError,
    DeviceError,
    NonFiniteError,
    StepError,
)


@runtime_checkable
class StepDiagnostics(Protocol):
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
class DiagnosableStep(Protocol):
    """A step that can say what it saw."""

    def watched(self, state: Any, batch: Batch, /) -> tuple[Any, Metrics, StepDiagnostics]: ...  # Any: as above


@runtime_checkable
class SkippingStep(Protocol):
    """A step that can leave the state as it was; None if it does not."""

    @property
    def skip_limit(self) -> int | None: ...


@runtime_checkable
class RepeatingStep(Protocol):
    """A step that makes several steps in a call."""

    @property
    def steps_per_call(self) -> int: ...


@runtime_checkable
class PlacingStep(Protocol):
    """A step that can put a batch on the devices as it takes it; of many processes' rows it makes one."""

    def put(self, batch: Batch, /) -> Batch: ...


@runtime_checkable
class LoweringStep(Protocol):
    """A step that can say what is compiled for a state and a batch."""

    @property
    def mesh(self) -> Mesh | None: ...

    def lower(self, state: Any, batch: Batch, /) -> Any: ...  # Any: a state; a Lowered


Call: TypeAlias = Callable[[Any, Batch], tuple[Any, Metrics, StepDiagnostics | None]]  # Any: a state


def call_of(step: Runnable) -> Call:
    """One call of a step, with what it saw if it can say."""
    match step:
        case DiagnosableStep():
            return step.watched
        case _:
            return lambda state, batch: (*step(state, batch), None)


def skip_limit_of(step: object) -> int | None:
    """How many skips in a row the step allows; None if it skips nothing."""
    match step:
        case SkippingStep():
            return step.skip_limit
        case _:
            return None


def steps_per_call_of(step: object) -> int:
    """How many steps one call makes."""
    match step:
        case RepeatingStep():
            return step.steps_per_call
        case _:
            return 1


class PendingStep(NamedTuple):
    """A call that was made: its first step, what it was given, and its own outputs, which no later step donates."""

    first: int
    item: DataItem
    metrics: Metrics
    watch: StepDiagnostics | None


def batch_placer(step: object, *, is_ahead: bool, many: bool) -> Callable[[Batch], Batch]:
    """Where batches go that are read: what is read ahead, and the rows of many processes, to the devices."""
    match step:
        case PlacingStep() if is_ahead or many:
            return step.put
        case _:
            return lambda batch: batch


def mesh_of(step: object) -> str:
    """The mesh of a step, as it is printed."""
    match step:
        case LoweringStep(mesh=Mesh() as mesh):
            return str(dict(mesh.shape))
        case LoweringStep():
            return "none: one device"
        case _:
            return "unknown"


@dataclass(frozen=True)
class StepStatus:
    """What a call did: for each of its steps whether it is finite, and whether it was skipped."""

    is_finite: np.ndarray
    is_skipped: np.ndarray


def wait_for_step(flying: PendingStep) -> StepStatus | None:
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
        raise step_failure(error, "settle", flying.first, state_ok=False) from error
    return StepStatus(finite.reshape(-1), skipped.reshape(-1) != 0)


def step_failure(error: Exception, phase: str, step: int, *, state_ok: bool) -> StepError:
    """What to raise from an exception of a step. Class and text of the original say little; the phase says it."""
    kind = BuildError if phase == "build" else DeviceError
    doing = "could not be built" if phase == "build" else "failed on the device"
    return kind(f"Step {step} {doing}: {type(error).__name__}: {error}", phase=phase, step=step, state_ok=state_ok)


def nonfinite_failure(flying: PendingStep, step: int, row: int, *, state_ok: bool, why: str = "") -> NonFiniteError:
    """What to raise for a step whose loss or gradient is not finite."""
    metrics = {name: np.asarray(value).reshape(-1)[row] for name, value in flying.metrics.items()}
    facts = [(name, f"{float(metrics[name])}") for name in ("loss", "grad_norm", "loss_scale") if name in metrics]
    facts += nonfinite_batch_leaves(flying.item.batch, row if np.ndim(flying.metrics["loss"]) else None)
    watch = flying.watch
    if watch is not None and np.ndim(watch.finite):
        watch = jax.tree.map(lambda leaf: leaf[row], watch)  # of several steps in one call, this one
    seen = [] if watch is None else watch.describe()
    what = f"Step {step} is not finite{why}."
    return NonFiniteError(what, phase="settle", step=step, state_ok=state_ok, facts=[*facts, *seen])


def nonfinite_batch_leaves(batch: Batch, row: int | None) -> list[tuple[str, str]]:
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


@jax.jit
def copy_state(state: Any) -> Any:  # Any: a state, whatever it is made of
    """New buffers for every leaf, lying as they lay. `device_put` would alias them, and a donation delete both."""
    return jax.tree.map(jnp.copy, state)


@dataclass
class Snapshot:
    """The state after a settled step.

    Args:
      state: a copy; it is copied again when it is used.
      number: that step.
      after: where the data stood after it.
      kept: what was given to the step since, in order.
      steps_per_call: how many numbers each of them takes.
    """

    state: Any  # Any: a state
    number: int
    after: Any  # Any: the position of the data
    steps_per_call: int
    kept: list[DataItem] = field(default_factory=list)

    def replay(self, leave_out: int | None) -> list[DataItem]:
        """All that was given since, with a hole where the call with the step `leave_out` was."""
        place = -1 if leave_out is None else self.place_of(leave_out)
        return [
            DataItem(None, item.after, is_hole=True) if number == place else item
            for number, item in enumerate(self.kept)
        ]

    def place_of(self, step: int) -> int:
        """Which of the kept calls made a step."""
        return (step - self.number - 1) // self.steps_per_call

    def price(self) -> str:
        """What it costs to keep, in words."""
        bytes_ = sum(leaf.nbytes for leaf in jax.tree.leaves(self.state) if isinstance(leaf, jax.Array))
        return f"{bytes_:,} bytes for a copy of the state"


Bad: TypeAlias = Callable[[Mapping[str, float]], str | None]


def check_verdict(bad: Bad, metrics: Metrics, *, row: int, step: int) -> None:
    """Ask about a step that has settled.

    Errors: NonFiniteError with what `bad` says, so that the same policies govern it; StepError from what it raises.
    """
    numbers = floats_of(metrics, row)
    try:
        why = bad(numbers)
    except Exception as error:  # whatever a user's function raises: it is raised from
        what = f"`bad` failed at step {step}: {type(error).__name__}: {error}"
        raise StepError(what, phase="bad", step=step, state_ok=True) from error
    if why:
        facts = [(name, f"{number:g}") for name, number in numbers.items()]
        raise NonFiniteError(f"Step {step} is bad: {why}", phase="settle", step=step, state_ok=False, facts=facts)
