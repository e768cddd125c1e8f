"""`loss_scale`: keep small gradients out of the underflow of float16."""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp

from stepc._core.nodes import RescaleNode
from stepc._language.fields import boolean, finite_number, positive_integer
from stepc._language.kinds import Kind
from stepc._language.pipeline import Transform
from stepc._language.semantics import Fn, Gradient, Microbatch
from stepc._language.state import State
from stepc._language.terms import Mean as MeanOf

SMALLEST, LARGEST = 2.0**-14, 2.0**24


class LossScaleState(NamedTuple):
    """The scale, and how many steps in a row were finite since it last changed."""

    scale: Any  # Any, twice: a float32 and an int32 scalar, or their shapes
    steps: Any


@dataclass(frozen=True, repr=False)
class LossScale(Transform):
    """The loss times a scale, the gradient divided by it."""

    takes: ClassVar = Kind.GRADIENT
    gives: ClassVar = Kind.GRADIENT
    stands: ClassVar = "once"
    dynamic: bool = True
    initial: float = field(default=2.0**15, kw_only=True)
    interval: int = field(default=2000, kw_only=True)

    def __post_init__(self) -> None:
        boolean("loss_scale", "dynamic", self.dynamic)
        finite_number("loss_scale", "initial", self.initial, positive=True)
        positive_integer("loss_scale", "interval", self.interval)

    def reference(self, inner: Fn) -> Fn:
        name = inner.fresh_name("loss_scale")

        def init(state: State) -> State:
            state = inner.init(state)
            return replace(state, slots={**state.slots, name: fresh(self.initial)})

        def apply(state: State, cell: Microbatch) -> Gradient:
            scale = state.slots[name].scale
            found = inner.apply(state, replace(cell, factor=cell.factor * scale)).linear(lambda leaf: leaf / scale)
            metrics = {**found.metrics, name: MeanOf(scale, 1)}

            def after(loss_is_finite: Any, gradient_is_finite: Any) -> LossScaleState:
                slot = state.slots[name]
                return advanced(slot, jnp.asarray(loss_is_finite), jnp.asarray(gradient_is_finite), *self._numbers)

            return replace(found, metrics=metrics, advances={**found.advances, name: after})

        return Fn(init, apply, inner.axes, (*inner.names, name))

    def expand(self) -> tuple[RescaleNode, ...]:
        return (RescaleNode(fresh, advanced, self._numbers, written=repr(self)),)

    @property
    def _numbers(self) -> tuple[float, bool, int]:
        return self.initial, self.dynamic, self.interval


def fresh(initial: float, *_: object) -> LossScaleState:
    """The scale of a fresh state."""
    return LossScaleState(jnp.asarray(initial, jnp.float32), jnp.zeros((), jnp.int32))


def advanced(
    slot: LossScaleState, loss_is_finite: Any, gradient_is_finite: Any, _: float, dynamic: bool, interval: int
) -> LossScaleState:
    """The scale after a step: half after an overflow, double after `interval` finite steps in a row."""
    if not dynamic:
        return slot
    overflowed = loss_is_finite & ~gradient_is_finite
    steps = jnp.where(gradient_is_finite, slot.steps + 1, jnp.where(overflowed, 0, slot.steps))
    grows = steps >= interval
    scale = jnp.where(overflowed, jnp.maximum(slot.scale / 2, SMALLEST), slot.scale)
    scale = jnp.where(grows, jnp.minimum(slot.scale * 2, LARGEST), scale)
    return LossScaleState(scale, jnp.where(grows, 0, steps))


def loss_scale(dynamic: bool = True, *, initial: float = 2.0**15, interval: int = 2000) -> LossScale:
    """Multiply the loss by a scale before its gradient is taken, and divide the gradient by it.

    Meaning: g / s, with g the gradient of s * loss. A step whose gradient is not finite is not made; if its loss is
      finite, the scale overflowed: s becomes s / 2. After `interval` finite steps in a row s becomes 2 s. `run` raises
      NonFiniteError for an overflow at the smallest scale, 2 ** -14: it would make no further step.
    Why: in float16 small gradients become 0; times a power of two they do not, and nothing else changes. bfloat16 has
      the range of float32 and needs no scale.

    Args:
      dynamic: False keeps the scale at `initial`; steps that overflow are not made either way.
      initial: the first scale, a positive finite number; a power of two rounds nothing.
      interval: how many finite steps in a row double the scale.
    Shapes: those of the gradient. The state keeps `slots["loss_scale"]`: the scale, and the steps since it changed.
    Units: those of the gradient.
    Type: gradient -> gradient; adds the metric `loss_scale`, the scale that was used
    Errors: FieldTypeError, FieldValueError for bad fields; PipelineTypeError if the stage on its right gives no
      gradient; ConfigError at `compile` if it stands twice.
    Linear in the gradient, so the reduction is not moved by it. A transform on its right sees the scaled gradient: write
    `clip` on its left. A loss that is itself not finite is no matter of the scale, and leaves it as it is.
    Example:
      >>> clip(1.0) @ loss_scale() @ grad(cast(jnp.float16) @ loss)
      clip(1.0) @ loss_scale() @ grad(cast(jnp.float16) @ loss)

    Source: Micikevicius et al., "Mixed Precision Training", 2018, https://arxiv.org/abs/1710.03740.
    """
    return LossScale(dynamic, initial=initial, interval=interval)
