"""`accumulate`: a mean over time."""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from stepc.core.nodes import Mean, Time
from stepc.language.fields import floating_dtype, positive_integer
from stepc.language.kinds import Kind
from stepc.language.meaning import Cell, Fn, Gradient, added_up
from stepc.language.pipeline import Transform
from stepc.language.state import State


@dataclass(frozen=True, repr=False)
class Accumulate(Transform):
    """The mean over `k` microbatches."""

    takes: ClassVar = Kind.GRADIENT
    gives: ClassVar = Kind.GRADIENT
    k: int
    dtype: np.dtype | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        positive_integer("accumulate", "k", self.k)
        object.__setattr__(self, "dtype", floating_dtype("accumulate", "dtype", self.dtype))

    def meaning(self, inner: Fn) -> Fn:
        def apply(state: State, cell: Cell) -> Gradient:
            parts: list[Gradient] = []
            for j in range(self.k):
                parts.append(inner.apply(state, cell.part(lambda leaf, j=j: leaf[j :: self.k])))
                state = replace(state, carry=parts[-1].carry)
            return replace(added_up(parts, dtype=self._name), carry=state.carry)

        return Fn(inner.init, apply, inner.axes, inner.names)

    def expand(self) -> tuple[Mean, ...]:
        return (Mean(Time(self.k), self._name, written=repr(self)),)

    @property
    def _name(self) -> str | None:
        return None if self.dtype is None else self.dtype.name


def accumulate(k: int, *, dtype: Any = None) -> Accumulate:  # Any: whatever numpy takes for a dtype
    """Average the gradient over `k` microbatches, one after another.

    Meaning: mean(inner(params, rows[j::k]) for j in range(k)).
    Why: the activations of one microbatch instead of those of the whole batch, for the same gradient.

    Args:
      k: number of microbatches, a positive integer. The batch size must be a multiple of `k`.
      dtype: in which gradients are added up, and reduced over devices; float32 without it, or theirs if that is wider.
        `jnp.bfloat16` halves the accumulator and the bytes of the reduction, and rounds at every addition.
    Shapes: every batch leaf `[batch, ...]`; the gradient has the shapes of `params`.
    Units: the gradient is per example (a mean), not a sum.
    Type: gradient -> gradient
    Errors: FieldTypeError, FieldValueError for a bad `k` or `dtype`; PipelineTypeError if the stage on its right gives
      no gradient; BatchError if the batch does not divide.
    Equal to the whole batch only if the loss is a mean over examples, or `sc.Mean` terms; batch statistics see each
    part alone. A word on its right that is not linear (`clip`) acts on each microbatch.
    Example:
      >>> accumulate(4) @ grad(loss)
      accumulate(4) @ grad(loss)

    Source: ours; the strided split is that of MaxText and axlearn, it keeps every device busy.
    """
    return Accumulate(k, dtype=dtype)
