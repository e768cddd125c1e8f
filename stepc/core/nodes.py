"""The core language: what every pipeline becomes before anything is decided. It knows no word, and no jax.

A program is a tuple of nodes, outermost first, as a pipeline is read. Every node but the last maps what
stands on its right; the last one computes a gradient from rows.

    program  ::=  update? node* differentiate
    node     ::=  mean[place] | scale(c) | map(f)
    place    ::=  time k | space axes
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

# What the user wrote; kept for messages and plans, never compared.
Written = str


@dataclass(frozen=True)
class Time:
    """Parts one after another: row `i` goes to part `i mod size`."""

    size: int

    def __str__(self) -> str:
        return f"time {self.size}"


@dataclass(frozen=True)
class Space:
    """Parts side by side along mesh axes, the first one outermost: row `i` of `B` goes to part `i // (B / size)`.

    The size belongs to a mesh, so it is None until the program is bound to one.
    """

    axes: tuple[str, ...]
    size: int | None = None

    def __str__(self) -> str:
        return " ".join((*self.axes, *([str(self.size)] if self.size is not None else [])))


@dataclass(frozen=True)
class Differentiate:
    """The value and the gradient of a loss on the rows it is given."""

    loss: Callable[..., Any]  # Any: a loss takes the user's own trees
    written: Written = field(default="grad", compare=False)

    def __str__(self) -> str:
        return self.written


@dataclass(frozen=True)
class Mean:
    """The mean over equal parts of the rows. Linear."""

    place: Time | Space
    written: Written = field(default="mean", compare=False)

    def __str__(self) -> str:
        return f"mean[{self.place}]"

    @property
    def size(self) -> int:
        if self.place.size is None:
            raise ValueError(f"{self} is not bound to a mesh: its size is not known")
        return self.place.size


@dataclass(frozen=True)
class Scale:
    """Multiply the gradient by a constant. Linear. The loss is only reported, so it stays as it is."""

    factor: float
    written: Written = field(default="scale", compare=False)

    def __str__(self) -> str:
        return f"scale({self.factor})"


@dataclass(frozen=True)
class Map:
    """A function of the gradient that is not linear: it needs the value, so every sum must be paid before it.

    `function(grads, *arguments)` returns the new gradient and the metrics named in `adds`, all scalars.
    A module-level function and a tuple, not a closure: so two equal words expand to equal nodes.
    """

    function: Callable[..., Any]  # Any: (grads, *arguments) -> (grads, dict of scalars)
    arguments: tuple[object, ...] = ()
    adds: tuple[str, ...] = ()
    written: Written = field(default="map", compare=False)

    def __str__(self) -> str:
        return self.written


@dataclass(frozen=True)
class Update:
    """One step of an optimizer: the gradient becomes new parameters and a new optimizer state."""

    optimizer: Any  # Any: an optax GradientTransformation; the core imports no library
    written: Written = field(default="update", compare=False)

    def __str__(self) -> str:
        return self.written


Node = Differentiate | Mean | Scale | Map | Update
Program = tuple[Node, ...]


def show(program: Program) -> str:
    """The program as a formula, read as in mathematics: the rightmost acts first."""
    return " . ".join(str(node) for node in program)
