"""One call of a step: what `run` asks of a step, waiting for its result, and copies of the state to come back to."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from stepc._distributed.coordination import ADDRESS
from stepc._language.kinds import Batch, HostMetrics, Metrics
from stepc._language.state import leaves_by_path
from stepc._runner.data import DataItem
from stepc._runner.events import on_host
from stepc.errors import BuildError, DeviceError, NonFiniteError, RejectedError, StepError, did_you_mean

_SHOWN = ("loss", "grad_norm", "loss_scale")  # the metrics by which a step shows that it is not finite
GUARDED = "Disallowed "  # how jax begins the error of a transfer guard, which has no class of its own


@runtime_checkable
class Runnable(Protocol):
    """What `run` runs: a compiled step, its reference, or any function of a state and a batch."""

    def __call__(self, state: Any, batch: Batch, /) -> tuple[Any, Metrics]:  # Any: a state, whatever it is made of
        """One step."""
        ...


@runtime_checkable
class StepDiagnostics(Protocol):
    """What a compiled step saw of numbers that are not finite, in arrays that are never donated."""

    finite: Any  # Any: a bool array, one for each step of a call: loss and gradient are finite, or the step was skipped

    def describe(self) -> list[tuple[str, str]]:
        """Rows of (label, text) that name microbatches and leaves."""
        ...


@runtime_checkable
class CompiledStep(Protocol):
    """What `run` makes use of in a compiled step, beyond calling it."""

    retrace_reason: str

    @property
    def traces(self) -> int: ...

    @property
    def mesh(self) -> Mesh | None: ...

    @property
    def steps_per_call(self) -> int: ...

    @property
    def rows_axis(self) -> int:
        """The axis of the leaves of a batch that counts rows; 1 if each step of a call takes a batch of its own."""
        ...

    @property
    def skip_limit(self) -> int | None:
        """How many steps in a row the program may skip; None if it skips none."""
        ...

    def settings(self) -> Sequence[tuple[str, Mapping[str, str]]]:
        """The parts of what it trains, each as it prints, with the numbers that it does not print."""
        ...

    def __call__(self, state: Any, batch: Batch, /) -> tuple[Any, Metrics]: ...  # Any: a state

    def step_with_diagnostics(
        self, state: Any, batch: Batch, /
    ) -> tuple[Any, Metrics, StepDiagnostics | None]:  # Any: as above
        """A call, with its diagnostics."""
        ...

    def put(self, batch: Batch, /) -> Batch:
        """The batch on the devices; on several processes, the global batch of the rows that each has."""
        ...

    def lower(self, state: Any, batch: Batch, /) -> Any:  # Any: a state; a Lowered
        """What is compiled for a state and a batch."""
        ...


@runtime_checkable
class SkippingStep(Protocol):
    """A reference, which says as a compiled step does how many steps in a row it may skip."""

    @property
    def skip_limit(self) -> int | None: ...


@dataclass(frozen=True)
class PlainStep:
    """A reference, or a function of the user's own: all that `run` can do with it is call it."""

    function: Runnable
    skip_limit: int | None = None
    mesh: None = None
    steps_per_call: int = 1
    rows_axis: int = 0

    def __repr__(self) -> str:
        return repr(self.function)

    def settings(self) -> Sequence[tuple[str, Mapping[str, str]]]:
        return [(ADDRESS.sub("", repr(self.function)), {})]

    def step_with_diagnostics(self, state: Any, batch: Batch, /) -> tuple[Any, Metrics, None]:  # Any: a state
        return *self.function(state, batch), None

    def put(self, batch: Batch, /) -> Batch:
        return batch


AnyStep: TypeAlias = CompiledStep | PlainStep


def as_step(step: Runnable) -> AnyStep:
    """A compiled step as it is, anything else as a plain one."""
    match step:
        case CompiledStep():
            return step
        case SkippingStep(skip_limit=int(limit)):
            return PlainStep(step, limit)
        case _:
            return PlainStep(step)


class PendingStep(NamedTuple):
    """A dispatched call: its first step, its input, and those of its outputs that no later step donates."""

    first: int
    item: DataItem
    metrics: Metrics
    diagnostics: StepDiagnostics | None


@dataclass(frozen=True)
class StepStatus:
    """What became of a call: for each of its steps, whether it is finite and whether the program skipped it."""

    is_finite: np.ndarray
    is_skipped: np.ndarray


def wait_for_step(pending: PendingStep, *, may_skip: bool) -> StepStatus | None:
    """Wait for a call. None if all its steps are finite and none was skipped: one flag says that.

    Args:
      may_skip: whether the step has `skip_nonfinite`; else a metric "skipped" is the user's own.
    Errors: DeviceError. To wait for each call's own outputs, in order, is what gives a late error to the step that
      failed: jax would raise it from whatever is read next.
    """
    diagnostics, metrics = pending.diagnostics, pending.metrics
    try:
        if diagnostics is not None:
            flags = np.asarray(diagnostics.finite)
            if flags.all() if flags.ndim else flags:  # `all` of one flag takes ten times as long as the flag
                return None
        losses = np.asarray(metrics["loss"])
        finite = np.isfinite(losses.astype(np.float64)) if diagnostics is None else np.asarray(diagnostics.finite)
        skipped = np.asarray(metrics["skipped"]) if may_skip else np.zeros_like(losses, bool)
    except Exception as error:  # jax raises several classes for a program that failed, ValueError among them
        raise step_failure(error, "wait", pending.first, state_ok=False) from error
    return StepStatus(finite.reshape(-1), skipped.reshape(-1) != 0)


def step_failure(error: Exception, phase: str, step: int, *, state_ok: bool) -> StepError:
    """What to raise from an exception of a step: its class and text say little, the phase says what failed."""
    if isinstance(error, jax.errors.JaxRuntimeError) and GUARDED in str(error):
        what = f"Step {step} was stopped by `jax.transfer_guard`: {error}"
        remedy = None
        if "host-to-device" in str(error):
            remedy = "`run` puts batches on the devices itself with `sc.Data(loader, place=step.put)`."
        return StepError(what, phase=phase, step=step, state_ok=state_ok, suggestion=remedy)
    kind, what = (BuildError, "could not be built") if phase == "build" else (DeviceError, "failed on the device")
    return kind(f"Step {step} {what}: {type(error).__name__}: {error}", phase=phase, step=step, state_ok=state_ok)


def nonfinite_failure(
    pending: PendingStep, step: int, row: int, *, rows_axis: int, state_ok: bool, why: str = ""
) -> NonFiniteError:
    """What to raise for a step whose loss or gradient is not finite.

    Args:
      row: which of the steps of its call it is.
      rows_axis: that of the step.
    """
    metrics = on_host(pending.metrics, row)
    shown = [name for one in _SHOWN for name in metrics if name.rpartition("/")[2] == one]  # of turns, `critic/loss`
    facts = [(name, f"{metrics[name]}") for name in shown]
    facts += _nonfinite_batch_leaves(pending.item.batch, row if rows_axis else None)
    if (diagnostics := pending.diagnostics) is not None:
        if np.ndim(diagnostics.finite):
            diagnostics = jax.tree.map(lambda leaf: leaf[row], diagnostics)  # of the steps in one call, this one
        facts += diagnostics.describe()
    return NonFiniteError(f"Step {step} is not finite{why}.", phase="wait", step=step, state_ok=state_ok, facts=facts)


def _nonfinite_batch_leaves(batch: Batch, row: int | None) -> list[tuple[str, str]]:
    """How many numbers are not finite in which leaf of the batch.

    Args:
      row: which of the batches that are stacked for one call.
    """
    facts = []
    for path, leaf in leaves_by_path(batch):
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and (isinstance(leaf, np.ndarray) or leaf.is_fully_addressable):
            numbers = np.asarray(leaf if row is None else leaf[row])
            if num := int((~np.isfinite(numbers)).sum()):
                facts.append(("batch", f"{num} of {numbers.size:,} numbers are not finite in {path or 'the batch'}"))
    return facts or [("batch", "every number is finite")]


RejectIf: TypeAlias = Callable[[Mapping[str, Any]], str | None]  # Any: floats, or arrays of numpy


def check_verdict(
    reject_if: RejectIf, metrics: Metrics, *, row: int, step: int, agreed: Callable[[str | None], str | None]
) -> None:
    """Ask `reject_if` about a finished step.

    Args:
      agreed: what all processes say, given what this one says.
    Errors: RejectedError with the reason it gives; StepError from what it raises.
    """
    numbers: HostMetrics = on_host(metrics, row)
    try:
        why = reject_if(numbers)
    except Exception as error:  # whatever a user's function raises: it is raised from
        what = f"`reject_if` failed at step {step}: {type(error).__name__}: {error}"
        raise StepError(what, phase="reject_if", step=step, state_ok=True) from error
    if why := agreed(why):
        facts = [
            (name, f"{number:g}" if isinstance(number, float) else str(number)) for name, number in numbers.items()
        ]
        raise RejectedError(
            f"Step {step} is rejected: {why}", phase="reject_if", step=step, state_ok=False, facts=facts
        )


def check_metrics(
    metrics: object,
    *,
    step: int,
    num_steps: int,
    taken: Callable[[Iterable[str]], Iterable[tuple[str, str]]],
    best: str | None = None,
    state_ok: bool = False,
) -> None:
    """Refuse metrics that are not a dict of arrays with a scalar loss, or that a logger could not tell from its own.

    Args:
      taken: the names among these that a logger uses itself, each with the reason.
      best: the one by which `Checkpoints` decide; None if they do not, or by an evaluation.
      state_ok: whether the state is alive, since the step has not run yet.
    Errors: BuildError.
    """
    faults: list[tuple[str, str]] = []
    if not isinstance(metrics, dict):
        faults.append(("metrics", f"expected a dict, got {type(metrics).__name__}"))
    else:
        stacked = () if num_steps == 1 else (num_steps,)
        shapes = {name: np.shape(value) for name, value in metrics.items()}
        if shapes.get("loss", stacked) != stacked:
            faults.append(("loss", f"expected shape {stacked}, got {shapes['loss']}"))
        faults += [
            (name, f"expected an axis of {num_steps} steps first, got shape {shape}")
            for name, shape in shapes.items()
            if name != "loss" and shape[: len(stacked)] != stacked
        ]
        faults += [] if "loss" in metrics else [("loss", "expected a metric of this name, got none")]
    what = f"Step {step} must return a state and a dict of metrics, with a scalar loss."
    if not faults and isinstance(metrics, dict) and (faults := list(taken(metrics))):
        what = f"Step {step} returns a metric under a name that a logger uses itself."
    remedy = None
    if not faults and isinstance(metrics, dict) and best is not None and best not in metrics:
        what = f"Step {step} returns no metric {best!r}, by which `Checkpoints(best=…)` decides."
        faults, remedy = [("metrics", ", ".join(metrics))], did_you_mean(best, metrics)
    if faults:
        raise BuildError(what, phase="build", step=step, state_ok=state_ok, facts=faults, suggestion=remedy)


def changed_names(before: Iterable[str], after: Iterable[str]) -> str:
    """Which names of metrics are gone, and which are new, in words."""
    old, new = set(before), set(after)
    changes = {"gone": old - new, "new": new - old}
    return "; ".join(f"{what}: {', '.join(sorted(names))}" for what, names in changes.items() if names)


def deleted_leaves(state: Any) -> list[str]:  # Any: a state
    """The paths of the leaves whose buffers are deleted."""
    return [path for path, leaf in leaves_by_path(state) if isinstance(leaf, jax.Array) and leaf.is_deleted()]


@jax.jit
def copy_state(state: Any) -> Any:  # Any: a state, whatever it is made of
    """New buffers for every leaf, sharded the same. `device_put` would alias them, and a donation delete both."""
    return jax.tree.map(jnp.copy, state)


@dataclass
class Snapshot:
    """A copy of the state after a finished step, and the batches since.

    Args:
      state: the copy; it is copied again when it is used.
      step: that step.
      position: where the data stood after it.
      steps_per_call: how many steps each of the batches since makes.
      items: what was given to the step since, in order.
    """

    state: Any  # Any: a state
    step: int
    position: Any  # Any: the position of the data
    steps_per_call: int
    items: list[DataItem] = field(default_factory=list)

    def replay(self, leave_out: int | None) -> list[DataItem]:
        """All batches since, with a hole in place of the call that made the step `leave_out`."""
        hole = None if leave_out is None else self.index_of(leave_out)
        return [
            item._replace(batch=None, is_hole=True) if index == hole else item for index, item in enumerate(self.items)
        ]

    def items_after(self, step: int) -> list[DataItem]:
        """The batches after the call that made `step`."""
        return self.items[self.index_of(step) + 1 :]

    def index_of(self, step: int) -> int:
        """Which of the calls since made `step`."""
        return (step - self.step - 1) // self.steps_per_call

    def cost(self) -> str:
        """What it costs to keep, in words."""
        bytes_ = sum(leaf.nbytes for leaf in jax.tree.leaves(self.state) if isinstance(leaf, jax.Array))
        return f"{bytes_:,} bytes for a copy of the state"
