"""The instructions of a schedule: what a step does, in the order in which it does it. Values only, no decisions."""

from dataclasses import dataclass
from typing import TypeAlias

from stepc.core.nodes import Differentiate, Follow, Guard, Map, Repeat, Rescale, Update


@dataclass(frozen=True)
class Signature:
    """What a loss returns, as far as the order of work depends on it.

    Args:
      counts: for each term of its value, the number it counts in every cell, or None where the rows decide.
      apart: "max", "min" and "whole numbers", where a metric is one: they do not ride in the sum of the gradient.
      has_last: whether a metric is the last of its kind.
      carried: the types of the numbers that it carries.
    """

    counts: tuple[float | None, ...] = (1.0,)
    apart: tuple[str, ...] = ()
    has_last: bool = False
    carried: tuple[str, ...] = ()

    @property
    def counts_first(self) -> bool:
        """Whether one accumulated gradient cannot be divided after the sum, since its terms have different counts."""
        return len(self.counts) > 1


@dataclass(frozen=True)
class Compute:
    """The loss and its gradient on the rows at hand.

    Args:
      counts_first: whether each term is divided by its own count before the gradient is taken.
      rescaled: whether the loss is multiplied by a scale before that.
      count: what the loss counts on every cell; 1 unless it is a `Mean` with a number for its count.
    """

    node: Differentiate
    counts_first: bool = False
    rescaled: bool = False
    count: float = 1.0


@dataclass(frozen=True)
class Count:
    """The counts of the terms of the loss on the rows at hand; nothing else of it."""

    node: Differentiate


@dataclass(frozen=True)
class CountFirst:
    """A pass that adds up the counts, before the one that needs them."""

    body: "Schedule"


@dataclass(frozen=True)
class Loop:
    """The body once per microbatch, its results added up in `dtype`: one `lax.scan`."""

    size: int
    body: "Schedule"
    dtype: str | None = None


@dataclass(frozen=True)
class Vectorise:
    """The body on every row side by side, its results added up: `vmap`."""

    body: "Schedule"


@dataclass(frozen=True)
class Reduce:
    """Pay the debt: add up over the devices along `axes`. Metrics `apart` are reductions of their own.

    Args:
      scattered: an axis over which the gradient is added up already, but for leaves that do not lie in parts.
      dtype: in which the gradient is added up; None for its own.
    """

    axes: tuple[str, ...]
    num_devices: int
    reason: str
    apart: tuple[str, ...] = ()
    scattered: str | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class Scatter:
    """Pay the debt along one axis in parts: each device adds up its own part of the gradient, of metrics nothing.

    Leaves that do not lie in parts are left to the `Reduce` that comes after it.
    """

    axis: str
    num_devices: int
    reason: str
    dtype: str | None = None


@dataclass(frozen=True)
class Gather:
    """Make parameters whole that lie in parts along an axis."""

    axis: str
    num_devices: int
    reason: str


@dataclass(frozen=True)
class AverageCarry:
    """The mean of the model's own state over the devices along `axes`, as soon as it is there: one for each type."""

    axes: tuple[str, ...]
    num_devices: int
    reason: str
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class Multiply:
    """Multiply the gradient, not its metrics, by a constant."""

    factor: float


@dataclass(frozen=True)
class Unscale:
    """Divide the gradient by the scale that the loss was multiplied by."""

    node: Rescale


@dataclass(frozen=True)
class Settle:
    """The gradient becomes a value: divided once by what was added up, in the dtypes of the parameters.

    Args:
      by: "cells", how often the loss was called, times what it counts each time; "count", a count that was added up
        with it; or "nothing", if each term was divided before its gradient was taken.
      cells: how often the loss was called, times what it counts.
      lanes: whether each row was a cell, so that the number is that of the rows besides.
    """

    by: str = "cells"
    cells: float = 1.0
    lanes: bool = False


@dataclass(frozen=True)
class Apply:
    """A function of the gradient that needs its value.

    Args:
      name: from which its draws come, if it draws.
      summed: the mesh axes that are added up already; the cell that it draws for spans them.
    """

    node: Map
    name: str | None = None
    summed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Optimize:
    """The optimizer, and all that happens with a step or not at all.

    Args:
      follows: slots that follow the parameters, by name.
      guard: who skips a step that is not finite, by name.
      rescale: who adapts the scale of the loss, by name.
      gather: what makes the new parameters whole again, if each device makes a part of them only.
    """

    node: Update
    follows: tuple[tuple[str, Follow], ...] = ()
    guard: tuple[str, Guard] | None = None
    rescale: tuple[str, Rescale] | None = None
    gather: Gather | None = None


@dataclass(frozen=True)
class Again:
    """Whole steps, one after another in one dispatch: a `lax.scan` over the first axis of the batch."""

    node: Repeat
    body: "Schedule"


Instruction: TypeAlias = (
    Compute | Count | CountFirst | Loop | Vectorise | Gather | Scatter | Reduce | AverageCarry | Multiply | Unscale
    | Settle | Apply | Optimize | Again
)  # fmt: skip
Schedule: TypeAlias = tuple[Instruction, ...]


def everything(body: Schedule) -> Schedule:
    """Every instruction, those inside others too."""
    inner = (everything(one.body) for one in body if isinstance(one, Loop | Vectorise | CountFirst | Again))
    return (*body, *(one for part in inner for one in part))
