"""What a mean over mesh axes says about sharding. It changes no number, so neither laws nor the evaluator read it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

# One entry per dimension, as in a jax PartitionSpec: the mesh axes that shard it, or None.
Entry: TypeAlias = str | tuple[str, ...] | None
Spec: TypeAlias = tuple[Entry, ...]
Rules: TypeAlias = tuple[tuple[str, Spec], ...]


@dataclass(frozen=True)
class ShardingRules:
    """How parameters, optimizer state, accumulator and batch are sharded.

    Args:
      zero: what is sharded along axes of the mean: 0, nothing; 1, the optimizer state; 2, the accumulator
        too; 3, the parameters too.
      zero_axes: which of them, the outermost first; the innermost alone, if none are named.
      gather: "step", "microbatch" or "layer": how often sharded parameters are gathered.
      outside: "microbatch" or "step": with "layer", how often those are that no scan over layers takes.
      offload: "optimizer", if the optimizer state is kept in the memory of the host; "" for nothing.
      reduce_dtype: in which gradients are added up over devices, by name; None for the dtype they are accumulated in.
      params: for a path pattern, how parameters are sharded along other axes; the first pattern that matches applies.
      logical: for the name of a dimension, the mesh axes that shard it; None if names are not read.
      names: for a path pattern, the names of the dimensions of parameters that carry none themselves.
      default: the spec of a parameter that neither places; None if every parameter must be placed.
      pad: whether a dimension of a parameter that its axes do not divide is padded.
      batch: for a path pattern, how a leaf of the batch is sharded along all axes.
      automatic: axes that shard the rows without a mean over them: XLA partitions the loss.
    """

    zero: int = 0
    zero_axes: tuple[str, ...] = ()
    gather: str = "step"
    outside: str = "microbatch"
    offload: str = ""
    reduce_dtype: str | None = None
    params: Rules = ()
    logical: tuple[tuple[str, Entry], ...] | None = None
    names: Rules = ()
    default: Spec | None = None
    pad: bool = False
    batch: Rules = ()
    automatic: tuple[str, ...] = ()


def axes_of(spec: Iterable[Entry]) -> list[str]:
    """Every axis that a spec names, in order."""
    return [axis for entry in spec for axis in (entry if isinstance(entry, tuple) else (entry,)) if axis is not None]


def normalized_spec(spec: Iterable[Entry]) -> Spec:
    """The spec as jax writes those of results. One spelling for one spec, or jit compiles twice."""
    entries = [entry[0] if isinstance(entry, tuple) and len(entry) == 1 else entry or None for entry in spec]
    while entries and entries[-1] is None:
        entries.pop()
    return tuple(entries)


def sharded_spec(spec: Spec, dimension: int, axes: tuple[str, ...]) -> Spec:
    """The spec with `dimension` sharded along `axes`; unchanged without any, or for a negative dimension."""
    if not axes or dimension < 0:
        return spec
    full = (*spec, *([None] * (dimension + 1 - len(spec))))
    return (*full[:dimension], axes[0] if len(axes) == 1 else axes, *full[dimension + 1 :])


def spec_text(spec: Spec) -> str:
    """The spec as source code."""
    return f"P({', '.join(map(entry_text, spec))})"


def entry_text(entry: Entry) -> str:
    """One entry as source code."""
    if isinstance(entry, tuple):
        return f"({', '.join(map(entry_text, entry))}{',' if len(entry) == 1 else ''})"
    return "None" if entry is None else f'"{entry}"'
