"""`shard`: a mean over mesh axes, and the sharding of the state."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import prod
from typing import ClassVar, assert_never

from stepc._core.nodes import MeanNode, OverMesh
from stepc._core.sharding import ShardingRules
from stepc._language.fields import one_of
from stepc._language.kinds import Kind
from stepc._language.model_state import over_parts
from stepc._language.pipeline import Transform
from stepc._language.semantics import Fn, Gradient, Microbatch, sum_gradients
from stepc._language.sharding import DataParallel, TensorParallel
from stepc._language.state import State
from stepc.errors import FieldTypeError, FieldValueError

MODES = ("manual", "auto")


@dataclass(frozen=True, repr=False)
class Shard(Transform):
    """The mean over the parts of a batch along mesh axes, and how the state is sharded."""

    takes: ClassVar = Kind.GRADIENT
    gives: ClassVar = Kind.GRADIENT
    rules: tuple[DataParallel | TensorParallel, ...]
    mode: str = field(default="manual", kw_only=True)

    def __post_init__(self) -> None:
        for rule in self.rules or (None,):
            if not isinstance(rule, DataParallel | TensorParallel):
                facts = (("expected", "dp(axis) or tp(rules)"), ("got", repr(rule) if self.rules else "nothing"))
                suggestion = f'Write `shard(dp("{rule}"))`.' if isinstance(rule, str) else None
                raise FieldTypeError("`shard` takes rules.", facts=facts, suggestion=suggestion)
        if len({type(rule) for rule in self.rules}) < len(self.rules):
            facts = (("expected", "at most one dp and one tp"), ("got", ", ".join(map(repr, self.rules))))
            suggestion = "Compose two `shard` transforms."
            raise FieldValueError("`shard` takes one rule of each kind.", facts=facts, suggestion=suggestion)
        one_of("shard mode", self.mode, MODES)
        data = self._data_parallel
        if self.mode == "auto" and data is None:
            raise FieldValueError("`shard(mode='auto')` needs `dp(axis)`.", facts=(("got", repr(self.rules[0])),))
        if self.mode == "auto" and data is not None and data.reduce_dtype is not None:
            # XLA reduces right after the product that sums over rows, and moves no conversion in front of it on CPU.
            what = (
                "`shard(mode='auto')` leaves the reduction to XLA, which sums in the dtype that the loss computes in."
            )
            facts = (("expected", "dp(axis) without reduce_dtype"), ("got", repr(data)))
            suggestion = f"`cast(jnp.{data.reduce_dtype.name})` on the loss computes its gradient in that dtype."
            raise FieldValueError(what, facts=facts, suggestion=suggestion)

    def reference(self, inner: Fn) -> Fn:
        if not self._mean_axes:
            return inner
        size = prod(inner.axes[axis] for axis in self._mean_axes)

        def apply(state: State, microbatch: Microbatch) -> Gradient:
            width = microbatch.num_rows // size
            parts = []
            for j in range(size):
                part = microbatch.part(lambda leaf, j=j: leaf[j * width : (j + 1) * width])
                parts.append(inner.apply(state, part))
            result = over_parts([part.model_state for part in parts], one_after_another=False)
            return replace(sum_gradients(parts), model_state=result)

        return Fn(inner.init, apply, inner.axes, inner.names)

    def expand(self) -> tuple[MeanNode, ...]:
        rules = ShardingRules()
        for rule in self.rules:
            match rule:
                case DataParallel(axes, zero, zero_axes, gather, offload, dtype, batch):
                    reduce_dtype = None if dtype is None else dtype.name
                    automatic = axes if self.mode == "auto" else ()
                    gather, outside = (gather, "microbatch") if isinstance(gather, str) else gather
                    rules = replace(
                        rules, zero=zero, zero_axes=zero_axes, gather=gather, outside=outside, offload=offload or "",
                        reduce_dtype=reduce_dtype, batch=batch, automatic=automatic,
                    )  # fmt: skip
                case TensorParallel(params, logical, default, pad):
                    rules = replace(rules, params=params, default=default, pad=pad)
                    if logical is not None:
                        rules = replace(rules, logical=logical.rules, names=logical.names)
                case _:
                    assert_never(rule)
        return (MeanNode(OverMesh(self._mean_axes, layout=rules), written=repr(self)),)

    @property
    def _mean_axes(self) -> tuple[str, ...]:
        """The axes that the mean is taken over."""
        data = self._data_parallel
        return () if data is None or self.mode == "auto" else data.axes

    @property
    def _data_parallel(self) -> DataParallel | None:
        return next((rule for rule in self.rules if isinstance(rule, DataParallel)), None)

    def _arguments(self) -> Iterator[str]:
        yield from map(repr, self.rules)
        if self.mode != "manual":
            yield f'mode="{self.mode}"'


def shard(*rules: DataParallel | TensorParallel, mode: str = "manual") -> Shard:
    """Average the gradient over the parts of a batch along mesh axes, and say how the state is sharded.

    Meaning: mean(inner(params, rows[j * B // n : (j + 1) * B // n]) for j in range(n)), n the size of the axes of
      `dp`; without `dp`, or with `mode="auto"`, inner itself.
    Why: n devices compute side by side, and reduce the gradient once a step, however many microbatches there are.

    Args:
      rules: `dp(axis)`, `tp(patterns)`, or both. The mesh is an argument of `compile`, so the same pipeline runs on one
        device or on many.
      mode: "manual": the compiler places the one reduction of the gradient itself. "auto": the loss is called once for
        the rows of all devices, and XLA partitions it and places the reductions, at least one a microbatch. That is
        for losses that cannot be in a region that is manual over the axis, such as those that exchange rows along it,
        and rules of `tp` may then name it. It is not a mean over parts: a loss that depends on which rows share a call
        sees the whole microbatch.
    Shapes: every batch leaf `[batch, ...]`; the gradient has the shapes of `params`.
    Units: the gradient is per example (a mean), not a sum.
    Type: gradient -> gradient
    Errors: FieldTypeError, FieldValueError if `rules` are not rules; ShardingError at `compile` if they do not fit the
      mesh, or at `init` if they do not fit the parameters; BatchError if the batch does not divide.
    A loss may not name an axis of `dp` itself (`lax.pmean(..., "data")`): the reference has no such axis. It may name
    the others, and with `mode="auto"` all of them in a `shard_map`.
    Example:
      >>> shard(dp("data")) @ grad(loss)
      shard(dp("data")) @ grad(loss)

    Source: ours; the lowering is manual over the axes, so the compiler decides where the reduction is, not XLA.
    """
    return Shard(rules, mode=mode)
