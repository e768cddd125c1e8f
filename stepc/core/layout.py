"""Where things lie that a mean over space speaks about. It changes no number, so no law and no reader asks for it."""

from dataclasses import dataclass
from typing import TypeAlias

# One entry for each dimension, as in a jax PartitionSpec: the mesh axes that it lies along, or None.
Spec: TypeAlias = tuple[str | tuple[str, ...] | None, ...]
Rules: TypeAlias = tuple[tuple[str, Spec], ...]


@dataclass(frozen=True)
class Layout:
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


def shown(spec: Spec) -> str:
    """A spec as it is written in source."""
    return f"P({', '.join(_entry(one) for one in spec)})"


def _entry(entry: str | tuple[str, ...] | None) -> str:
    if isinstance(entry, tuple):
        return f"({', '.join(map(_entry, entry))}{',' if len(entry) == 1 else ''})"
    return "None" if entry is None else f'"{entry}"'
