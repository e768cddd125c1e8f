"""`shard`: a mean over space, and where things lie."""

from dataclasses import dataclass, replace
from typing import ClassVar

from stepc.core.nodes import Mean, Space
from stepc.errors import FieldTypeError
from stepc.language.kinds import Kind
from stepc.language.meaning import Cell, Fn, Gradient, added_up, mean_of_carries
from stepc.language.pipeline import Transform
from stepc.language.sharding import DataParallel
from stepc.language.state import State


@dataclass(frozen=True, repr=False)
class Shard(Transform):
    """The mean over the parts of a batch that lie along a mesh axis."""

    takes: ClassVar = Kind.GRADIENT
    gives: ClassVar = Kind.GRADIENT
    rules: DataParallel

    def __post_init__(self) -> None:
        if not isinstance(self.rules, DataParallel):
            facts = (("expected", "dp(axis)"), ("got", repr(self.rules)))
            suggestion = f'Write `shard(dp("{self.rules}"))`.' if isinstance(self.rules, str) else None
            raise FieldTypeError("`shard` takes a rule.", facts=facts, suggestion=suggestion)

    def meaning(self, inner: Fn) -> Fn:
        size = inner.axes[self.rules.axis]

        def apply(state: State, cell: Cell) -> Gradient:
            width = cell.num_rows // size
            cells = [cell.part(lambda leaf, j=j: leaf[j * width : (j + 1) * width]) for j in range(size)]
            parts = [inner.apply(state, one) for one in cells]
            return replace(added_up(parts), carry=mean_of_carries(parts))

        return Fn(inner.init, apply, inner.axes, inner.names)

    def expand(self) -> tuple[Mean, ...]:
        return (Mean(Space((self.rules.axis,)), written=repr(self)),)


def shard(rules: DataParallel) -> Shard:
    """Average the gradient over the parts of a batch that lie along a mesh axis.

    Meaning: mean(inner(params, rows[j * B // n : (j + 1) * B // n]) for j in range(n)), n the size of the axis.
    Why: n devices compute side by side; they exchange one reduction a step, whatever stands in time.

    Args:
      rules: `dp(axis)`. The mesh is an argument of `compile`, so the same pipeline runs on one device or many.
    Shapes: every batch leaf `[batch, ...]`; the gradient has the shapes of `params`.
    Units: the gradient is per example (a mean), not a sum.
    Type: gradient -> gradient
    Errors: FieldTypeError if `rules` is no rule; ShardingError at `compile` if the mesh lacks the axis; BatchError
      if the batch does not divide.
    A loss may not name the axis itself (`lax.pmean(..., "data")`): in the reference there is no such axis.
    Example:
      >>> shard(dp("data")) @ grad(loss)
      shard(dp("data")) @ grad(loss)

    Source: ours; the lowering is manual over the axis, so the reduction is placed and not hoped for.
    """
    return Shard(rules)
