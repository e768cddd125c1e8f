"""Rules of `shard`: where the parts of a batch lie, and where parameters and optimizer state lie."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from stepc._core.sharding import Rules, Spec, spec_text
from stepc._language.fields import axis_name, floating_dtype
from stepc.errors import FieldTypeError, FieldValueError

GATHERS: Final = ("step", "microbatch", "layer")


@dataclass(frozen=True)
class DataParallel:
    """Rows along mesh axes; of the innermost one, with `zero`, what lies in parts along it."""

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
        given += [f"batch={_shown(self.batch)}"] if self.batch else []
        return f"dp({', '.join(given)})"


@dataclass(frozen=True)
class TensorParallel:
    """Parameters along mesh axes, by the pattern of their paths."""

    rules: Rules
    default: Spec | None = None

    def __repr__(self) -> str:
        default = "" if self.default is None else f", default={spec_text(self.default)}"
        return f"tp({_shown(self.rules)}{default})"


def dp(
    axis: str | tuple[str, ...],
    *,
    zero: int = 0,
    gather: str = "step",
    reduce_dtype: Any = None,  # Any: whatever jnp.dtype takes
    batch: Mapping[str, PartitionSpec] | None = None,
) -> DataParallel:
    """Data parallelism: each device of a mesh axis computes its own rows.

    Meaning: rows [j B/n, (j + 1) B/n) belong to device j of the n devices along `axis`. Nothing else here changes what
      a step means, only where things lie and what devices say to each other.
    Why: n devices share the rows of a batch. With `zero=0` they exchange one all-reduce of the gradient a step, and
      each holds everything; the higher `zero`, the less each holds.

    Args:
      axis: the name of a mesh axis, or several, the outermost first. The batch size must be a multiple of their sizes.
        With `zero`, things lie in parts along the last one and are repeated along the others (hybrid sharding): the
        gradient is summed in parts along the last one first, and then only a part of it along the others.
      zero: 0, everything is whole on every device; 1, the optimizer state lies in parts: one reduce-scatter of the
        gradient and one all-gather of the parameters a step; 2, the accumulator too: a reduce-scatter a microbatch;
        3, the parameters too: an all-gather before the loss.
      gather: with `zero=3`, whether parameters are made whole once a "step"; or once a "microbatch", with the
        accumulator in parts: less memory for more traffic; or a "layer" at a time where the loss is a `lax.scan` over
        stacked layers, for the gradient again: the least memory, and the most traffic.
      reduce_dtype: a floating-point dtype in which gradients are added up over devices; None for the dtype of the sum,
        float32 or wider. `jnp.bfloat16` halves the traffic, and rounds each device's sum to 8 bits.
      batch: for patterns of paths, how leaves of the batch lie, rows included: `{"tokens": P("data", "seq")}`. Axes
        that the pipeline takes no mean over stay automatic.
    A leaf of which no dimension divides by the size of the axis stays whole, and the plan says so; nothing is padded.
    Errors: FieldTypeError, FieldValueError for a bad field; ShardingError at `compile` if the mesh has no such axis.
    Example:
      >>> dp("data", zero=1)
      dp("data", zero=1)

    Source: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", 2020,
      arxiv.org/abs/1910.02054; the layout of rows is that of `jax.sharding.NamedSharding(mesh, PartitionSpec(axis))`.
    """
    axes = tuple(axis_name("dp", "axis", one) for one in (axis if isinstance(axis, tuple) else (axis,)))
    if not axes or len(set(axes)) < len(axes):
        facts = (("expected", "at least one axis, each once"), ("got", repr(axis)))
        raise FieldValueError("`dp` takes mesh axes, each once.", facts=facts)
    if isinstance(zero, bool) or not isinstance(zero, int) or not 0 <= zero <= 3:
        facts = (("field", "zero"), ("expected", "0, 1, 2 or 3"), ("got", repr(zero)))
        raise FieldValueError(f"`dp(zero={zero!r})` is no level.", facts=facts)
    if gather not in GATHERS:
        facts = (("field", "gather"), ("expected", " or ".join(map(repr, GATHERS))), ("got", repr(gather)))
        raise FieldValueError(f"`dp(gather={gather!r})` is no time to gather.", facts=facts)
    if gather != "step" and zero < 3:
        facts = (("field", "gather"), ("got", f"{gather!r} with zero={zero}"))
        raise FieldValueError("Only with `zero=3` are parameters gathered before the loss.", facts=facts)
    dtype = floating_dtype("dp", "reduce_dtype", reduce_dtype)
    return DataParallel(axes, zero, gather, None if dtype is None else jnp.dtype(dtype), _rules("dp", "batch", batch))


def tp(rules: Mapping[str, PartitionSpec], *, default: PartitionSpec | None = None) -> TensorParallel:
    """Tensor parallelism: parameters lie along mesh axes, by the pattern of their paths.

    Meaning: none. It says where parameters lie, and what mirrors them (moments, moving averages) lies as they do; XLA
      partitions the loss along these axes.
    Why: a model too wide for a device; and one table for all that a reader wants to know of its layout.

    Args:
      rules: for a pattern, a `jax.sharding.PartitionSpec`. A path is its keys joined by `/`; `*` stands for anything
        within a key, `**` across keys. The first pattern that matches holds.
      default: how a parameter lies that no pattern matches, `P()` for whole; None if there is to be no such parameter.
    Errors: FieldTypeError, FieldValueError for a bad field; ShardingError at `compile` or `init`, before anything is
      compiled and all at once: a rule that matches nothing, a parameter that no rule matches, an axis that the mesh
      lacks or that is used twice or that rows lie along, too few dimensions, a dimension that does not divide.
    Example:
      >>> tp({"**/qkv": P(None, "model")}, default=P())
      tp({"**/qkv": P(None, "model")}, default=P())

    Source: Shoeybi et al., "Megatron-LM", 2019, arxiv.org/abs/1909.08053; patterns are ours.
    """
    found = _rules("tp", "rules", rules)
    if not found and default is None:
        raise FieldValueError("`tp` has no rules.", facts=(("expected", 'such as {"**/kernel": P(None, "model")}'),))
    return TensorParallel(found, None if default is None else _spec("tp", "default", default))


def _rules(transform: str, field: str, rules: object) -> Rules:
    if rules is None and transform == "dp":
        return ()
    if not isinstance(rules, Mapping):
        facts = (("field", field), ("expected", "a dict of patterns to PartitionSpec"), ("got", repr(rules)))
        raise FieldTypeError(f"`{transform}`: {field} is not a dict.", facts=facts)
    for pattern in rules:
        if not isinstance(pattern, str) or not pattern:
            facts = (("field", field), ("expected", "a pattern of paths, such as '**/kernel'"), ("got", repr(pattern)))
            raise FieldTypeError(f"`{transform}`: a rule has no pattern.", facts=facts)
    return tuple((pattern, _spec(transform, f"{field}[{pattern!r}]", spec)) for pattern, spec in rules.items())


def _spec(transform: str, field: str, spec: object) -> Spec:
    if not isinstance(spec, PartitionSpec):
        expected = "a jax.sharding.PartitionSpec, such as P(None, 'model')"
        facts = (("field", field), ("expected", expected), ("got", repr(spec)))
        raise FieldTypeError(f"`{transform}`: a rule is no PartitionSpec.", facts=facts)
    for entry in spec:
        for axis in entry if isinstance(entry, tuple) else (entry,):
            if axis is not None:
                axis_name(transform, field, axis)
    return tuple(spec)


def _shown(rules: Rules) -> str:
    return "{" + ", ".join(f'"{pattern}": {spec_text(spec)}' for pattern, spec in rules) + "}"
