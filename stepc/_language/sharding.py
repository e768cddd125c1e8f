"""`dp` and `tp`, the rules that `shard` takes: which axes shard the rows and the parameters. It knows no mesh."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from jax.sharding import PartitionSpec

from stepc._core.sharding import Entry, Rules, Spec, entry_text, spec_text
from stepc._language.fields import axis_name, boolean, floating_dtype, one_of
from stepc._language.state import leaves_by_path
from stepc.errors import FieldTypeError, FieldValueError

GATHERS: Final = ("step", "microbatch", "layer", ("layer", "step"))
OFFLOADS: Final = (None, "optimizer")


@dataclass(frozen=True)
class DataParallel:
    """Rows sharded along mesh axes; with `zero`, the state sharded along the innermost of them, or along several."""

    axes: tuple[str, ...]
    zero: int = 0
    zero_axes: tuple[str, ...] = ()
    gather: str | tuple[str, str] = "step"
    offload: str | None = None
    reduce_dtype: np.dtype | None = None
    batch: Rules = ()

    def __repr__(self) -> str:
        given = [_strings_text(self.axes)]
        given += [f"zero={self.zero}"] if self.zero else []
        given += [f"zero_axes={_strings_text(self.zero_axes)}"] if self.zero_axes else []
        gather = (self.gather,) if isinstance(self.gather, str) else self.gather
        given += [f"gather={_strings_text(gather)}"] if self.gather != "step" else []
        given += [f'offload="{self.offload}"'] if self.offload is not None else []
        given += [f"reduce_dtype=jnp.{self.reduce_dtype.name}"] if self.reduce_dtype is not None else []
        given += [f"batch={_rules_text(self.batch)}"] if self.batch else []
        return f"dp({', '.join(given)})"


@dataclass(frozen=True)
class LogicalRules:
    """Mesh axes for the names that a model library gives the dimensions of parameters."""

    rules: tuple[tuple[str, Entry], ...]
    names: Rules = ()

    def __repr__(self) -> str:
        rules = ", ".join(f'"{name}": {entry_text(entry)}' for name, entry in self.rules)
        names = f", names={_rules_text(self.names)}" if self.names else ""
        return f"logical({{{rules}}}{names})"


@dataclass(frozen=True)
class TensorParallel:
    """Parameters sharded along mesh axes, by path pattern and by the names of their dimensions."""

    rules: Rules
    logical: LogicalRules | None = None
    default: Spec | None = None
    pad: bool = False

    def __repr__(self) -> str:
        given = [] if self.logical is not None and not self.rules else [_rules_text(self.rules)]
        given += [] if self.logical is None else [repr(self.logical)]
        given += [] if self.default is None else [f"default={spec_text(self.default)}"]
        given += ["pad=True"] if self.pad else []
        return f"tp({', '.join(given)})"


def dp(
    axis: str | tuple[str, ...],
    *,
    zero: int = 0,
    zero_axes: str | tuple[str, ...] | None = None,
    gather: str | tuple[str, str] = "step",
    offload: str | None = None,
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
        `zero_axes` changes that.
      zero: 0, everything is replicated; 1, the optimizer state is sharded: one reduce-scatter of the gradient and one
        all-gather of the parameters a step; 2, the accumulator too: a reduce-scatter a microbatch; 3, the parameters
        too: an all-gather before the loss. With `shard(..., mode="auto")` XLA reduces once a microbatch at every level,
        and the accumulator is sharded at every level.
      zero_axes: along which of the axes `zero` shards, the last ones in their order; None for the last alone. All of
        them take the least memory; more devices exchange shards then, over slower links where the outer axes have such.
      gather: with `zero=3`, when the parameters are gathered. "step": once a step. "microbatch": once a microbatch,
        with a sharded accumulator, which takes less memory and more traffic. "layer": one layer at a time where the
        loss is a `lax.scan` over stacked layers, and again for the gradient: the least memory and the most traffic.
        ("layer", "step") does so with those layers, and gathers the other parameters, such as embeddings, once a step
        instead of once a microbatch: it holds them, and scatters their gradient once a microbatch, as the others'.
      offload: "optimizer" keeps the optimizer state in pinned memory of the host, scalars apart. A call moves it to the
        device for the update and back, once in each direction: at the price of that traffic, the state of the optimizer
        takes no memory of the device but for the update. None keeps it on the device.
      reduce_dtype: a floating-point dtype in which gradients are added up over devices; None for the dtype of the sum,
        float32 or wider. `jnp.bfloat16` halves the traffic, and rounds each device's sum to 8 bits; float16 is refused,
        since sums overflow it. Not with `shard(..., mode="auto")`, where XLA reduces before anything can convert.
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
    along = () if zero_axes is None else zero_axes if isinstance(zero_axes, tuple) else (zero_axes,)
    along = tuple(axis_name("dp", "zero_axes", one) for one in along)
    if zero_axes is not None and (not along or axes[-len(along) :] != along or not zero):
        facts = (("axes", _strings_text(axes)), ("zero", str(zero)), ("got", repr(zero_axes)))
        text = _strings_text(axes)
        raise FieldValueError(
            "`dp`: zero_axes must be the last of its axes, in their order, and goes with `zero`.",
            facts=facts,
            suggestion=f"`dp({text}, zero={zero or 1}, zero_axes={text})` shards along all of them.",
        )
    along = () if along == axes[-1:] else along
    one_of("offload", offload, OFFLOADS)
    dtype = floating_dtype("dp", "reduce_dtype", reduce_dtype, sums=True)
    return DataParallel(
        axes, zero, along, gather, offload, dtype, () if batch is None else _rules("dp", "batch", batch)
    )


def tp(
    *rules: Mapping[str, PartitionSpec] | LogicalRules, default: PartitionSpec | None = None, pad: bool = False
) -> TensorParallel:
    """Tensor parallelism: parameters are sharded along mesh axes, by path pattern or by the names of their dimensions.

    Meaning: the identity. What mirrors the parameters (moments, moving averages) is sharded as they are, and XLA
      partitions the loss along these axes.
    Why: for a model too large for one device; and the sharding of the whole model is one table.

    Args:
      rules: for a pattern, a `jax.sharding.PartitionSpec`. A path is its keys joined by `/`; `*` matches anything
        within a key, `**` across keys. The first pattern that matches applies. Or `logical(...)`, which reads the names
        that a model library gives dimensions. Or both: a pattern decides before a name does.
      default: the spec of a parameter that no rule places, `P()` for replicated; None if each must be placed.
      pad: True pads a dimension that does not divide by its axes to the next size that does, in the state alone: in
        `state.params` and in all that mirrors it. Loss, gradient and optimizer, `step.reference` and checkpoints have
        the sizes that you gave `init`. The padding is NaN, so that whatever reads it by mistake shows it;
        `state.unpadded()` has none. False refuses such a dimension.
    Errors: FieldTypeError, FieldValueError for a bad field; ShardingError at `compile` or `init`, before anything is
      compiled, with all faults: a rule that matches nothing, a parameter that no rule matches, an axis that the mesh
      lacks, that is used twice or that shards the rows, too few dimensions, a dimension that does not divide, a name
      that has no rule.
    With `shard(..., mode="auto")` a rule may name an axis that shards the rows: experts, whose rows the loss sends to
    them and back in an all-to-all. Their gradient is then not reduced over that axis, and `zero` shards the others.
    Example:
      >>> tp({"**/qkv": P(None, "model")}, default=P())
      tp({"**/qkv": P(None, "model")}, default=P())
      >>> tp(logical({"embed": None, "mlp": "model"}), default=P())
      tp(logical({"embed": None, "mlp": "model"}), default=P())

    Source: Shoeybi et al., "Megatron-LM", 2019, arxiv.org/abs/1909.08053; patterns are ours.
    """
    tables = [one for one in rules if not isinstance(one, LogicalRules)]
    by_name = [one for one in rules if isinstance(one, LogicalRules)]
    if len(tables) > 1 or len(by_name) > 1:
        facts = (("expected", "one dict and one logical(...)"), ("got", ", ".join(map(repr, rules))))
        raise FieldValueError("`tp` takes one table of each kind.", facts=facts, suggestion="Join the tables.")
    checked = _rules("tp", "rules", tables[0]) if tables else ()
    if not checked and not by_name and default is None:
        raise FieldValueError(
            "`tp` needs a rule or a default.", facts=(("such as", '{"**/kernel": P(None, "model")}'),)
        )
    default_spec = None if default is None else _spec("tp", "default", default)
    return TensorParallel(checked, by_name[0] if by_name else None, default_spec, boolean("tp", "pad", pad))


def logical(
    rules: Mapping[str, str | tuple[str, ...] | None],
    *,
    names: Any = None,  # Any: a tree of PartitionSpecs
) -> LogicalRules:
    """Read the names that a model library gives the dimensions of parameters: for each name, mesh axes.

    Meaning: a dimension is sharded along the axes of its name; it changes no number.
    Why: the model says once what its dimensions are, and each mesh needs one short table.

    Args:
      rules: for the name of a dimension, the mesh axis that shards it, several, or None for none. Parameters carry
        names where Flax gives them: `nn.with_partitioning` and `nn.with_logical_partitioning` of Linen,
        `nnx.with_partitioning` and `out_sharding` of NNX. A name that is a mesh axis already needs a rule too:
        `{"model": "model"}`.
      names: the names of parameters that carry none: a tree of PartitionSpecs, such as
        `nn.get_partition_spec(variables)["params"]`, or a dict of them by path pattern.
    Errors: FieldTypeError, FieldValueError for a bad field; ShardingError at `compile` or `init`, with all faults: a
      name without a rule, a rule whose name no parameter has, and what `tp` refuses.
    `init` takes Linen's boxes off: state and loss have the arrays themselves, as after `nn.unbox`. What a library says
    of meshes itself (`nn.logical_axis_rules`, `sharding_rules`) is not read.
    Example:
      >>> tp(logical({"embed": None, "mlp": "model"}))
      tp(logical({"embed": None, "mlp": "model"}))

    Source: Flax, https://flax.readthedocs.io, "Scale up Flax modules on multiple devices".
    """
    what = "`logical`: rules must be a dict from the names of dimensions to mesh axes."
    if not isinstance(rules, Mapping):
        is_pairs = isinstance(rules, tuple | list) and all(isinstance(one, tuple) and len(one) == 2 for one in rules)
        suggestion = f"Write `logical({dict(rules)!r})`." if is_pairs else None
        raise FieldTypeError(what, facts=(("got", repr(rules)),), suggestion=suggestion)
    if not rules:
        raise FieldValueError("`logical` needs a rule.", facts=(("such as", '{"embed": None, "mlp": "model"}'),))
    for name, entry in rules.items():
        if not isinstance(name, str):
            raise FieldTypeError(what, facts=(("got", repr(rules)),))
        for axis in entry if isinstance(entry, tuple) else (entry,):
            if axis is not None:
                axis_name("logical", f"rules[{name!r}]", axis)
    specs = [] if names is None else leaves_by_path(names)
    given = tuple((path, _spec("logical", f"names[{path!r}]", spec)) for path, spec in specs)
    return LogicalRules(tuple(rules.items()), given)


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


def _strings_text(strings: tuple[str, ...]) -> str:
    """As Python writes one of them, or a tuple of several."""
    quoted = ", ".join(f'"{one}"' for one in strings)
    return quoted if len(strings) == 1 else f"({quoted})"


def _rules_text(rules: Rules) -> str:
    return "{" + ", ".join(f'"{pattern}": {spec_text(spec)}' for pattern, spec in rules) + "}"
