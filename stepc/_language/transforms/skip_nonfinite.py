"""`skip_nonfinite`: a step that is not finite did not happen."""

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
    stands: ClassVar = "once"
    limit: int = field(default=10, kw_only=True)

    def __post_init__(self) -> None:
        positive_integer("skip_nonfinite", "limit", self.limit)

    def reference(self, inner: Fn) -> Fn:
        name = inner.fresh_name("skip_nonfinite")

        def init(state: State) -> State:
            state = inner.init(state)
            return replace(state, slots={**state.slots, name: SkipCounts(jnp.int32(0), jnp.int32(0))})

        def apply(state: State, batch: Batch) -> StepResult:
            made, before = inner.apply(state, batch), state.slots[name]
            skipped = 0 if made.is_finite else 1
            counted = SkipCounts(before.total + skipped, (before.consecutive + skipped) * skipped)
            kept = made.state if made.is_finite else replace(state, slots={**state.slots, **made.always})
            kept = replace(kept, slots={**kept.slots, name: counted})
            metrics = {**made.metrics, "skipped": jnp.int32(skipped)}
            return made._replace(state=kept, metrics=metrics, happened=made.is_finite)

        return Fn(init, apply, inner.axes, (*inner.names, name))

    def expand(self) -> tuple[GuardNode, ...]:
        return (GuardNode(self.limit, written=repr(self)),)


def skip_nonfinite(*, limit: int = 10) -> SkipNonfinite:
    """Leave every leaf of the state as it was, if the loss or the gradient of a step is not finite, and count it.

    Meaning: the step, if its loss and the norm of its gradient are finite; else the state it was given. Decided after
      the reduction, so every device decides alike.
    Why: one bad batch writes NaN into the parameters, the moments and the averages, for ever.

    Args:
      limit: how many skips in a row raise NonFiniteError from `run`; a positive integer.
    Shapes: the state keeps `slots["skip_nonfinite"]`: the number of skips in all, and in a row.
    Units: steps.
    Type: step -> step; adds the metric `skipped`, 1 for a step that was skipped and else 0
    Errors: FieldTypeError, FieldValueError for a bad `limit`; PipelineTypeError if the stage on its right gives no
      step; ConfigError at `compile` if it stands twice. A program cannot raise: `limit` is read by `run`.
    Bitwise: parameters, optimizer state and its count, the step counter and so the keys of the next step, the averages,
    the model_state: as if the batch had not been there. Transforms on its left see no step either. Two slots do move: its own, and
    the scale of `loss_scale` where the loss is finite and the gradient overflowed, or it could never recover.
    Example:
      >>> skip_nonfinite(limit=3) @ update(optax.adamw(3e-4)) @ grad(loss)
      skip_nonfinite(limit=3) @ update(optax.adamw(3e-4)) @ grad(loss)

    Source: ours; optax's `apply_if_finite` applies the NaN after a number of tries.
    """
    return SkipNonfinite(limit=limit)
