"""`loss_scale`: keep small float16 gradients from underflowing."""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp

from stepc._core.nodes import RescaleNode
from stepc._language.fields import boolean, finite_number, positive_integer
from stepc._language.kinds import Kind
from stepc._language.pipeline import Transform
from stepc._language.semantics import Fn, Gradient, Microbatch
from stepc._language.state import State
from stepc._language.terms import Mean

SMALLEST, LARGEST = 2.0**-14, 2.0**24


class LossScaleState(NamedTuple):
    """The scale, and the number of consecutive finite steps since it last changed."""

    scale: Any  # Any, twice: a float32 and an int32 scalar, or their shapes
    steps: Any


@dataclass(frozen=True, repr=False)
class LossScale(Transform):
    """The loss times a scale, the gradient divided by it."""

    takes: ClassVar = Kind.GRADIENT
    gives: ClassVar = Kind.GRADIENT
    position: ClassVar = "once"
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
            return replace(state, slots={**state.slots, name: initial_scale(self.initial)})

        def apply(state: State, microbatch: Microbatch) -> Gradient:
            slot = state.slots[name]
            scaled = inner.apply(state, replace(microbatch, factor=microbatch.factor * slot.scale))
            gradient = scaled.linear(lambda leaf: leaf / slot.scale)

            def advance(loss_is_finite: Any, gradient_is_finite: Any) -> LossScaleState:
                finite = jnp.asarray(loss_is_finite), jnp.asarray(gradient_is_finite)
                return advance_scale(slot, *finite, *self._arguments_of_advance)

            return replace(
                gradient,
                metrics={**gradient.metrics, name: Mean(slot.scale, 1)},
                advances={**gradient.advances, name: advance},
            )

        return Fn(init, apply, inner.axes, (*inner.names, name))

    def expand(self) -> tuple[RescaleNode, ...]:
        return (RescaleNode(initial_scale, advance_scale, self._arguments_of_advance, written=repr(self)),)

    @property
    def _arguments_of_advance(self) -> tuple[float, bool, int]:
        return self.initial, self.dynamic, self.interval


def initial_scale(initial: float, *_: object) -> LossScaleState:
    """The scale of a fresh state."""
    return LossScaleState(jnp.asarray(initial, jnp.float32), jnp.zeros((), jnp.int32))


def advance_scale(
    slot: LossScaleState, loss_is_finite: Any, gradient_is_finite: Any, _: float, dynamic: bool, interval: int
) -> LossScaleState:
    """The scale after a step: halved after an overflow, doubled after `interval` consecutive finite steps."""
    if not dynamic:
        return slot
    overflowed = loss_is_finite & ~gradient_is_finite
    steps = jnp.where(gradient_is_finite, slot.steps + 1, jnp.where(overflowed, 0, slot.steps))
    grows = steps >= interval
    scale = jnp.where(overflowed, jnp.maximum(slot.scale / 2, SMALLEST), slot.scale)
    scale = jnp.where(grows, jnp.minimum(slot.scale * 2, LARGEST), scale)
    return LossScaleState(scale, jnp.where(grows, 0, steps))


def loss_scale(dynamic: bool = True, *, initial: float = 2.0**15, interval: int = 2000) -> LossScale:
    """Multiply the loss by a scale before it is differentiated, and divide the gradient by it.

    Meaning: g / s, where g is the gradient of s * loss. A step whose gradient is not finite is skipped; if its loss is
      finite, the scale overflowed and s becomes s / 2. After `interval` consecutive finite steps s becomes 2 s. `run`
      raises NonFiniteError for an overflow at the smallest scale, 2 ** -14, since no further step could succeed.
    Why: small gradients underflow to 0 in float16; multiplied by a power of two they do not, and nothing else changes.
      bfloat16 has the range of float32 and needs no scale.

    Args:
      dynamic: False keeps the scale at `initial`; steps that overflow are skipped either way.
      initial: the first scale, a positive finite number; a power of two causes no rounding.
      interval: the number of consecutive finite steps after which the scale doubles.
    Shapes: those of the gradient. The state keeps `slots["loss_scale"]`: the scale, and the steps since it changed.
    Units: those of the gradient.
    Type: gradient -> gradient; adds the metric `loss_scale`, the scale that was used
    Errors: FieldTypeError, FieldValueError for bad fields; PipelineTypeError if the stage on its right returns no
      gradient, or if a transform that is not linear stands on its right; ConfigError at `compile` if it appears twice.
    It is linear in the gradient, so it does not hold up a pending reduction. Transforms on its right see the scaled
    gradient, so `@` refuses one that is not linear there: write `clip` on its left. A loss that is itself not
    finite leaves the scale as it is.
    Example:
      >>> clip(1.0) @ loss_scale() @ grad(cast(jnp.float16) @ loss)
      clip(1.0) @ loss_scale() @ grad(cast(jnp.float16) @ loss)

    Source: Micikevicius et al., "Mixed Precision Training", 2018, https://arxiv.org/abs/1710.03740.
    """
    return LossScale(dynamic, initial=initial, interval=interval)
