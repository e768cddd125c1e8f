"""`dp` and `tp`, the rules that `shard` takes: which axes shard the rows and the parameters. It knows no mesh."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from jax.sharding import PartitionSpec

from stepc._core.sharding import Rules, Spec, spec_text
from stepc._language.fields import axis_name, floating_dtype, one_of
from stepc.errors import FieldTypeError, FieldValueError

GATHERS: Final = ("step", "microbatch", "layer")


@dataclass(frozen=True)
class DataParallel:
    """Rows sharded along mesh axes; with `zero`, the state sharded along the innermost of them."""

    axes: tuple[str, ...]
    zero: int = 0
    gather: str = "step"
    reduce_dtype: np.dtype | None = None
    batch: Rules = ()

    def __repr__(self) -> str:
        named = ", ".join(f'"{axis}"' for axis in self.axes)
        given = [named if len(self.axes) == 1 else f"({named})"]
        given += [f"zero={self.zero}"] if self.zero else []
        given += [f'gather="{self.gather}"'] if self.gather != "step" else []
        given += [f"reduce_dtype=jnp.{self.reduce_dtype.name}"] if self.reduce_dtype is not None else []
        given += [f"batch={_rules_text(self.batch)}"] if self.batch else []
        return f"dp({', '.join(given)})"


@dataclass(frozen=True)
class TensorParallel:
    """Parameters sharded along mesh axes, by path pattern."""

    rules: Rules
    default: Spec | None = None

    def __repr__(self) -> str:
        default = "" if self.default is None else f", default={spec_text(self.default)}"
        return f"tp({_rules_text(self.rules)}{default})"


def dp(
    axis: str | tuple[str, ...],
    *,
    zero: int = 0,
    gather: str = "step",
    reduce_dtype: Any = None,  # Any: whatever jnp.dtype takes
    batch: Mapping[str, PartitionSpec] | None = None,
) -> DataParallel:
    """Data parallelism: each device of a mesh axis computes its own rows.

    Meaning: rows [j B/n, (j + 1) B/n) belong to device j of the n devices along `axis`. No other argument changes what
      a step means, only its sharding and its communication.
    Why: n devices share the rows of a batch. With `zero=0` they exchange one all-reduce of the gradient a step, and the
      state is replicated; the higher `zero`, the less of it each device holds.

    Args:
      axis: the name of a mesh axis, or several, the outermost first. The batch size must be a multiple of their size.
        With `zero`, the state is sharded along the last axis and replicated along the others (hybrid sharding): the
        gradient is reduce-scattered along the last axis first, and only a shard of it is reduced along the others.
      zero: 0, everything is replicated; 1, the optimizer state is sharded: one reduce-scatter of the gradient and one
        all-gather of the parameters a step; 2, the accumulator too: a reduce-scatter a microbatch; 3, the parameters
        too: an all-gather before the loss.
      gather: with `zero=3`, when the parameters are gathered. "step": once a step. "microbatch": once a microbatch,
        with a sharded accumulator, which takes less memory and more traffic. "layer": one layer at a time where the
        loss is a `lax.scan` over stacked layers, and again for the gradient: the least memory and the most traffic.
      reduce_dtype: a floating-point dtype in which gradients are added up over devices; None for the dtype of the sum,
        float32 or wider. `jnp.bfloat16` halves the traffic, and rounds each device's sum to 8 bits; float16 is refused,
        since sums overflow it.
      batch: for path patterns, the spec of leaves of the batch, rows included: `{"tokens": P("data", "seq")}`. Axes
        that the pipeline takes no mean over stay automatic.
    A leaf without a dimension that is a multiple of the axis size is replicated, and the plan says so; nothing is
    padded.
    Errors: FieldTypeError, FieldValueError for a bad field; ShardingError at `compile` if the mesh has no such axis.
    Example:
      >>> dp("data", zero=1)
      dp("data", zero=1)

    Source: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", 2020,
      arxiv.org/abs/1910.02054; rows are split as `jax.sharding.NamedSharding(mesh, PartitionSpec(axis))` splits them.
    """
    if isinstance(axis, list):
        suggestion = f"Write `dp({axis[0]!r})`." if len(axis) == 1 else f"Write `dp({tuple(axis)!r})`."
        what = "`dp`: several axes are a tuple."
        raise FieldTypeError(what, facts=(("got", repr(axis)),), suggestion=suggestion)
    axes = tuple(axis_name("dp", "axis", one) for one in (axis if isinstance(axis, tuple) else (axis,)))
    if not axes or len(set(axes)) < len(axes):
        raise FieldValueError("`dp` needs at least one mesh axis, and takes each once.", facts=(("got", repr(axis)),))
    one_of("zero level", zero, (0, 1, 2, 3))
    one_of("gather mode", gather, GATHERS)
    if gather != "step" and zero < 3:
        raise FieldValueError(f"`dp(gather={gather!r})` needs zero=3.", facts=(("got", f"zero={zero}"),))
    dtype = floating_dtype("dp", "reduce_dtype", reduce_dtype, sums=True)
    return DataParallel(axes, zero, gather, dtype, () if batch is None else _rules("dp", "batch", batch))


def tp(rules: Mapping[str, PartitionSpec], *, default: PartitionSpec | None = None) -> TensorParallel:
    """Tensor parallelism: parameters are sharded along mesh axes, by path pattern.

    Meaning: the identity. What mirrors the parameters (moments, moving averages) is sharded as they are, and XLA
      partitions the loss along these axes.
    Why: for a model too large for one device; and the sharding of the whole model is one table.

    Args:
      rules: for a pattern, a `jax.sharding.PartitionSpec`. A path is its keys joined by `/`; `*` matches anything
        within a key, `**` across keys. The first pattern that matches applies.
      default: the spec of a parameter that no pattern matches, `P()` for replicated; None if each must match one.
    Errors: FieldTypeError, FieldValueError for a bad field; ShardingError at `compile` or `init`, before anything is
      compiled, with all faults: a rule that matches nothing, a parameter that no rule matches, an axis that the mesh
      lacks, that is used twice or that shards the rows, too few dimensions, a dimension that does not divide.
    Example:
      >>> tp({"**/qkv": P(None, "model")}, default=P())
      tp({"**/qkv": P(None, "model")}, default=P())

    Source: Shoeybi et al., "Megatron-LM", 2019, arxiv.org/abs/1909.08053; patterns are ours.
    """
    checked = _rules("tp", "rules", rules)
    if not checked and default is None:
        raise FieldValueError(
            "`tp` needs a rule or a default.", facts=(("such as", '{"**/kernel": P(None, "model")}'),)
        )
    return TensorParallel(checked, None if default is None else _spec("tp", "default", default))


def _rules(transform: str, field: str, rules: object) -> Rules:
    if not isinstance(rules, Mapping):
        what = f"`{transform}`: {field} must be a dict from path patterns to PartitionSpecs."
        raise FieldTypeError(what, facts=(("got", repr(rules)),))
    for pattern in rules:
        if not isinstance(pattern, str) or not pattern:
            what = f"`{transform}`: a key of {field} must be a path pattern, such as '**/kernel'."
            raise FieldTypeError(what, facts=(("got", repr(pattern)),))
    return tuple((pattern, _spec(transform, f"{field}[{pattern!r}]", spec)) for pattern, spec in rules.items())


def _spec(transform: str, field: str, spec: object) -> Spec:
    if not isinstance(spec, PartitionSpec):
        what = f"`{transform}`: {field} must be a jax.sharding.PartitionSpec, such as P(None, 'model')."
        raise FieldTypeError(what, facts=(("got", repr(spec)),))
    for entry in spec:
        for axis in entry if isinstance(entry, tuple) else (entry,):
            if axis is not None:
                axis_name(transform, field, axis)
    return tuple(spec)


def _rules_text(rules: Rules) -> str:
    return "{" + ", ".join(f'"{pattern}": {spec_text(spec)}' for pattern, spec in rules) + "}"
