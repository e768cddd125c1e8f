"""Where things lie that a mean over space speaks about. It changes no number, so no law and no reader asks for it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

# One entry for each dimension, as in a jax PartitionSpec: the mesh axes that it lies along, or None.
Entry: TypeAlias = str | tuple[str, ...] | None
Spec: TypeAlias = tuple[Entry, ...]
Rules: TypeAlias = tuple[tuple[str, Spec], ...]


@dataclass(frozen=True)
class ShardingRules:
    """Where parameters, optimizer state, accumulator and batch lie.

    Args:
      zero: 0, nothing lies in parts along the innermost axis of the mean; 1, the optimizer state; 2, the accumulator
        too; 3, the parameters too.
      gather: "step" or "microbatch", how often parameters that lie in parts are made whole.
      reduce_dtype: in which gradients are added up over devices, by name; None for the type they are added up in.
      params: for a pattern of paths, how parameters lie along other axes; the first that matches holds.
      default: the same for what no pattern matches; None where every parameter must be matched.
      batch: for a pattern of paths, how a leaf of the batch lies along all axes.
      automatic: axes that rows lie along although no mean is taken over them: XLA partitions the loss.
    """

    zero: int = 0
    gather: str = "step"
    reduce_dtype: str | None = None
    params: Rules = ()
    default: Spec | None = None
    batch: Rules = ()
    automatic: tuple[str, ...] = ()


def axes_of(spec: Iterable[Entry]) -> list[str]:
    """Every axis that a spec names, in order."""
    return [axis for entry in spec for axis in (entry if isinstance(entry, tuple) else (entry,)) if axis is not None]


def normalized_spec(spec: Iterable[Entry]) -> Spec:
    """As jax writes the shardings of results: one spec, one spelling, one compilation."""
    entries = [entry[0] if isinstance(entry, tuple) and len(entry) == 1 else entry or None for entry in spec]
    while entries and entries[-1] is None:
        entries.pop()
    return tuple(entries)


def sharded_spec(spec: Spec, dimension: int, axis: str | None) -> Spec:
    """The spec with `axis` along this dimension; the same if there is no axis, or the leaf stays whole."""
    if axis is None or dimension < 0:
        return spec
    full = (*spec, *([None] * (dimension + 1 - len(spec))))
    return (*full[:dimension], axis, *full[dimension + 1 :])


def spec_text(spec: Spec) -> str:
    """A spec as it is written in source."""
    return f"P({', '.join(_entry(one) for one in spec)})"


def _entry(entry: Entry) -> str:
    if isinstance(entry, tuple):
        return f"({', '.join(map(_entry, entry))}{',' if len(entry) == 1 else ''})"
    return "None" if entry is None else f'"{entry}"'
