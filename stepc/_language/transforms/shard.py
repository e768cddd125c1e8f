"""`shard`: a mean over space, and where things lie."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import prod
from typing import ClassVar

from stepc._core.nodes import MeanNode, OverMesh
from stepc._core.sharding import ShardingRules
from stepc._language.kinds import Kind
from stepc._language.pipeline import Transform
from stepc._language.semantics import Fn, Gradient, Microbatch, mean_model_states, sum_gradients
from stepc._language.sharding import DataParallel, TensorParallel
from stepc._language.state import State
from stepc.errors import FieldTypeError, FieldValueError

MODES = ("manual", "auto")


@dataclass(frozen=True, repr=False)
class Shard(Transform):
    """The mean over the parts of a batch that lie along mesh axes, and where things lie."""

    takes: ClassVar = Kind.GRADIENT
    gives: ClassVar = Kind.GRADIENT
    rules: tuple[DataParallel | TensorParallel, ...]
    mode: str = field(default="manual", kw_only=True)

    def __post_init__(self) -> None:
        for rule in self.rules or (None,):
            if not isinstance(rule, DataParallel | TensorParallel):
                facts = (("expected", "dp(axis) or tp(rules)"), ("got", repr(rule)))
                suggestion = f'Write `shard(dp("{rule}"))`.' if isinstance(rule, str) else None
                raise FieldTypeError("`shard` takes a rule.", facts=facts, suggestion=suggestion)
        if len({type(rule) for rule in self.rules}) < len(self.rules):
            facts = (("expected", "one dp and one tp at most"), ("got", ", ".join(map(repr, self.rules))))
            raise FieldValueError("`shard` takes one rule of a kind; compose two transforms for two.", facts=facts)
        if self.mode not in MODES:
            facts = (("field", "mode"), ("expected", " or ".join(map(repr, MODES))), ("got", repr(self.mode)))
            raise FieldValueError(f"`shard(mode={self.mode!r})` is no mode.", facts=facts)
        rows = self._rows()
        if self.mode == "auto" and (rows is None or rows.zero or rows.reduce_dtype is not None):
            facts = (("expected", "dp(axis) without zero and reduce_dtype"), ("got", repr(rows)))
            raise FieldValueError("`shard(mode='auto')` leaves the sum of the gradient to XLA.", facts=facts)

    def reference(self, inner: Fn) -> Fn:
        size = prod(inner.axes[axis] for axis in self._averaged())

        def apply(state: State, cell: Microbatch) -> Gradient:
            width = cell.num_rows // size
            cells = [cell.part(lambda leaf, j=j: leaf[j * width : (j + 1) * width]) for j in range(size)]
            parts = [inner.apply(state, one) for one in cells]
            return replace(sum_gradients(parts), model_state=mean_model_states(parts))

        return Fn(inner.init, apply if self._averaged() else inner.apply, inner.axes, inner.names)

    def expand(self) -> tuple[MeanNode, ...]:
        layout = ShardingRules()
        for rule in self.rules:
            match rule:
                case DataParallel(axes, zero, gather, dtype, batch):
                    name = None if dtype is None else dtype.name
                    automatic = axes if self.mode == "auto" else ()
                    layout = replace(
                        layout, zero=zero, gather=gather, reduce_dtype=name, batch=batch, automatic=automatic
                    )
                case TensorParallel(rules, default):
                    layout = replace(layout, params=rules, default=default)
        return (MeanNode(OverMesh(self._averaged(), layout=layout), written=repr(self)),)

    def _averaged(self) -> tuple[str, ...]:
        """The axes that the mean is taken over."""
        rows = self._rows()
        return () if rows is None or self.mode == "auto" else rows.axes

    def _rows(self) -> DataParallel | None:
        return next((rule for rule in self.rules if isinstance(rule, DataParallel)), None)

    def _arguments(self) -> Iterator[str]:
        yield from map(repr, self.rules)
        if self.mode != "manual":
            yield f'mode="{self.mode}"'


def shard(*rules: DataParallel | TensorParallel, mode: str = "manual") -> Shard:
    """Average the gradient over the parts of a batch that lie along mesh axes, and say where things lie.

    Meaning: mean(inner(params, rows[j * B // n : (j + 1) * B // n]) for j in range(n)), n the size of the axes of
      `dp`; without `dp`, or with `mode="auto"`, inner itself.
    Why: n devices compute side by side; they exchange one reduction a step, whatever stands in time.

    Args:
      rules: `dp(axis)`, `tp(patterns)`, or both. The mesh is an argument of `compile`, so the same pipeline runs on one
        device or many.
      mode: "manual", the compiler places the one reduction of the gradient itself; "auto", the loss is given the rows
        of all devices at once and XLA partitions it and places reductions: at least one a microbatch, for losses that
        cannot stand in a region that is manual over the axis. It is then no mean over parts: a loss that depends on
        which rows share a cell sees the whole microbatch.
    Shapes: every batch leaf `[batch, ...]`; the gradient has the shapes of `params`.
    Units: the gradient is per example (a mean), not a sum.
    Type: gradient -> gradient
    Errors: FieldTypeError, FieldValueError if `rules` are no rules; ShardingError at `compile` if they do not fit the
      mesh, or at `init` if they do not fit the parameters; BatchError if the batch does not divide.
    A loss may not name an axis of `dp` itself (`lax.pmean(..., "data")`): in the reference there is no such axis.
    Example:
      >>> shard(dp("data")) @ grad(loss)
      shard(dp("data")) @ grad(loss)

    Source: ours; the lowering is manual over the axes, so the reduction is placed and not hoped for.
    """
    return Shard(rules, mode=mode)
