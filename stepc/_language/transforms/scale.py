"""`scale`: multiply the gradient by a constant."""

from dataclasses import dataclass
from typing import ClassVar

from stepc._core.nodes import ScaleNode
from stepc._language.fields import finite_number
from stepc._language.kinds import Kind
from stepc._language.pipeline import Transform
from stepc._language.semantics import Fn, Gradient, Microbatch
from stepc._language.state import State


@dataclass(frozen=True, repr=False)
class Scale(Transform):
    """Multiply the gradient by `c`."""

    takes: ClassVar = Kind.GRADIENT
    gives: ClassVar = Kind.GRADIENT
    c: float

    def __post_init__(self) -> None:
        finite_number("scale", "c", self.c, positive=False)

    def reference(self, inner: Fn) -> Fn:
        def apply(state: State, microbatch: Microbatch) -> Gradient:
            return inner.apply(state, microbatch).linear(lambda leaf: leaf * self.c)

        return Fn(inner.init, apply, inner.axes, inner.names)

    def expand(self) -> tuple[ScaleNode, ...]:
        return (ScaleNode(float(self.c), written=repr(self)),)


def scale(c: float) -> Scale:
    """Multiply the gradient by a constant.

    Meaning: c * inner(params, rows). Metrics are not scaled, and neither is the reported loss.
    Why: to weight a gradient before a transform that is not linear, or to turn descent into ascent.

    Args:
      c: a finite number; it may be negative or 0.
    Shapes: those of the gradient.
    Units: those of the gradient, times those of `c`.
    Type: gradient -> gradient
    Errors: FieldTypeError, FieldValueError for a bad `c`; PipelineTypeError if the stage on its right returns no
      gradient.
    It is linear, so the compiler moves it past every mean: it costs one multiplication a step.
    Example:
      >>> scale(0.5) @ grad(loss)
      scale(0.5) @ grad(loss)

    Source: ours.
    """
    return Scale(c)
