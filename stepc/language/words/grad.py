"""`grad`: where every pipeline begins, on its right: the gradient of a loss."""

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any, ClassVar

import jax

from stepc.core.nodes import Differentiate
from stepc.errors import FieldTypeError
from stepc.language.kinds import Kind, Rows
from stepc.language.meaning import Fn, Gradient
from stepc.language.pipeline import Transform
from stepc.language.source import Quoted, quoted_argument
from stepc.language.state import State


@dataclass(frozen=True, repr=False)
class Grad(Transform):
    """The value and the gradient of a loss on the rows it is given."""

    takes: ClassVar = None
    gives: ClassVar = Kind.GRADIENT
    loss: Quoted

    def __post_init__(self) -> None:
        if not callable(self.loss.value) or isinstance(self.loss.value, Transform):
            facts = (("expected", "a function of (params, rows)"), ("got", type(self.loss.value).__name__))
            raise FieldTypeError(f"`grad({self.loss!r})`: loss is not a function.", facts=facts)

    def meaning(self, inner: Fn) -> Fn:
        def apply(state: State, rows: Rows) -> Gradient:
            value, grads = jax.value_and_grad(self.loss.value)(state.params, rows)
            return Gradient(grads, {"loss": value})

        return Fn(inner.init, apply, inner.axes)

    def expand(self) -> tuple[Differentiate, ...]:
        return (Differentiate(self.loss.value, written=repr(self)),)


def grad(loss: Callable[..., Any]) -> Grad:
    """Take the value and the gradient of a loss, on the rows it is given.

    Meaning: jax.value_and_grad(loss)(params, rows).
    Why: a step begins with a gradient; what the loss is given, and how its parts are averaged, stands on the left.

    Args:
      loss: `loss(params, rows)` returns a scalar, a mean over the rows it is given. Any pytrees, any model library.
    Shapes: `rows` is the batch with fewer rows; the gradient has the shapes and dtypes of `params`.
    Units: per example, if the loss is a mean over examples.
    Type: loss -> gradient; adds the metric `loss`
    Errors: FieldTypeError if `loss` is no function; at the first call, LossError if it does not return a floating
      scalar. Its own exceptions pass through, with a note.
    A loss that couples rows (a contrast, batch statistics) sees the rows of its own cell alone.
    Example:
      >>> grad(loss)
      grad(loss)

    Source: `jax.value_and_grad`.
    """
    otherwise = loss.__name__ if isinstance(loss, FunctionType) else type(loss).__name__
    return Grad(quoted_argument(loss, position=0, keyword="loss", otherwise=otherwise))
