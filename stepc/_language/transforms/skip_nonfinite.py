"""`skip_nonfinite`: skip a step whose loss or gradient is not finite."""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import jax.numpy as jnp

from stepc._core.nodes import GuardNode
from stepc._language.fields import positive_integer
from stepc._language.kinds import Batch, Kind
from stepc._language.pipeline import Transform
from stepc._language.semantics import Fn, StepResult
from stepc._language.state import SkipCounts, State


@dataclass(frozen=True, repr=False)
class SkipNonfinite(Transform):
    """Leave the state as it was if the loss or the gradient is not finite."""

    takes: ClassVar = Kind.STEP
    gives: ClassVar = Kind.STEP
    position: ClassVar = "once"
    limit: int = field(default=10, kw_only=True)

    def __post_init__(self) -> None:
        positive_integer("skip_nonfinite", "limit", self.limit)

    def reference(self, inner: Fn) -> Fn:
        name = inner.fresh_name("skip_nonfinite")

        def init(state: State) -> State:
            state = inner.init(state)
            return replace(state, slots={**state.slots, name: SkipCounts(jnp.int32(0), jnp.int32(0))})

        def apply(state: State, batch: Batch) -> StepResult:
            result, before = inner.apply(state, batch), state.slots[name]
            skipped = 0 if result.is_finite else 1
            counts = SkipCounts(before.total + skipped, (before.consecutive + skipped) * skipped)
            after = result.state if result.is_finite else replace(state, slots={**state.slots, **result.always})
            after = replace(after, slots={**after.slots, name: counts})
            metrics = {**result.metrics, "skipped": jnp.int32(skipped)}
            return result._replace(state=after, metrics=metrics, happened=result.is_finite)

        return Fn(init, apply, inner.axes, (*inner.names, name))

    def expand(self) -> tuple[GuardNode, ...]:
        return (GuardNode(self.limit, written=repr(self)),)


def skip_nonfinite(*, limit: int = 10) -> SkipNonfinite:
    """Leave every leaf of the state as it was if the loss or the gradient of a step is not finite, and count the skip.

    Meaning: the step, if its loss and the norm of its gradient are finite; else the state it was given. This is decided
      after the reduction, so all devices decide the same.
    Why: one bad batch would write NaN into the parameters, the moments and the averages for good.

    Args:
      limit: the number of skips in a row at which `run` raises NonFiniteError; a positive integer.
    Shapes: the state keeps `slots["skip_nonfinite"]`: the number of skips in total, and in a row.
    Units: steps.
    Type: step -> step; adds the metric `skipped`, 1 for a skipped step and 0 otherwise
    Errors: FieldTypeError, FieldValueError for a bad `limit`; PipelineTypeError if the stage on its right returns no
      step; ConfigError at `compile` if it appears twice. A program cannot raise, so it is `run` that applies `limit`.
    The state is the same, bit for bit, as without the batch: parameters, optimizer state and its count, the step
    counter and thereby the keys of the next step, the averages, the model state. Transforms on its left see no step
    either. Two slots do change: its own, and the scale of `loss_scale` if the loss is finite and the gradient
    overflowed, since it could never recover otherwise.
    Example:
      >>> skip_nonfinite(limit=3) @ update(optax.adamw(3e-4)) @ grad(loss)
      skip_nonfinite(limit=3) @ update(optax.adamw(3e-4)) @ grad(loss)

    Source: ours; optax's `apply_if_finite` applies the NaN after a number of tries.
    """
    return SkipNonfinite(limit=limit)
