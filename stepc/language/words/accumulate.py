"""`accumulate`: a mean over time."""

from dataclasses import dataclass
from typing import ClassVar

import jax

from stepc.core.nodes import Mean, Time
from stepc.language.fields import positive_integer
from stepc.language.kinds import Kind, Rows
from stepc.language.meaning import Fn, Gradient, mean_of
from stepc.language.pipeline import Transform
from stepc.language.state import State


@dataclass(frozen=True, repr=False)
class Accumulate(Transform):
    """The mean over `k` microbatches, one after another."""

    takes: ClassVar = Kind.GRADIENT
    gives: ClassVar = Kind.GRADIENT
    k: int

    def __post_init__(self) -> None:
        positive_integer("accumulate", "k", self.k)

    def meaning(self, inner: Fn) -> Fn:
        def apply(state: State, rows: Rows) -> Gradient:
            parts = [jax.tree.map(lambda leaf, j=j: leaf[j :: self.k], rows) for j in range(self.k)]
            return mean_of([inner.apply(state, part) for part in parts])

        return Fn(inner.init, apply, inner.axes)

    def expand(self) -> tuple[Mean, ...]:
        return (Mean(Time(self.k), written=repr(self)),)


def accumulate(k: int) -> Accumulate:
    """Average the gradient over `k` microbatches, one after another.

    Meaning: mean(inner(params, rows[j::k]) for j in range(k)).
    Why: the activations of one microbatch instead of those of the whole batch, for the same gradient.

    Args:
      k: number of microbatches, a positive integer. The batch size must be a multiple of `k`.
    Shapes: every batch leaf `[batch, ...]`; the gradient has the shapes of `params`.
    Units: the gradient is per example (a mean), not a sum.
    Type: gradient -> gradient
    Errors: FieldTypeError, FieldValueError for a bad `k`; PipelineTypeError if the stage on its right gives no
      gradient; BatchError if the batch does not divide.
    Equal to the whole batch only if the loss is a mean over examples; batch statistics see each part alone.
    A word on its right that is not linear (`clip`) acts on each microbatch.
    Example:
      >>> accumulate(4) @ grad(loss)
      accumulate(4) @ grad(loss)

    Source: ours; the strided split is that of MaxText and axlearn, it keeps every device busy.
    """
    return Accumulate(k)
