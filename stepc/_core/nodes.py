"""The core language: the form that every pipeline takes before it is compiled. It knows no transform, and no jax.

A program is a tuple of nodes, outermost first, in the order of the pipeline. Every node but the last maps what its
right neighbour gives; the last one computes a gradient from rows.

    program  ::=  repeat? (guard | follow)* (alternate | update? node* differentiate)
    node     ::=  mean[place] | scale(c) | map(f) | rescale | perturb(f)
    place    ::=  scan k | mesh axes | vmap
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from stepc._core.sharding import ShardingRules

# (path pattern, name of a rule) pairs; the first pattern that matches applies.
Rules = tuple[tuple[str, str], ...]
# What the user wrote; kept for messages and plans, never compared.
Written = str


@dataclass(frozen=True)
class InScan:
    """Parts one after another: row `i` goes to part `i mod size`."""

    size: int

    def __str__(self) -> str:
        return f"scan {self.size}"


@dataclass(frozen=True)
class OverMesh:
    """Parts on the devices along mesh axes, the first axis outermost: row `i` of `B` goes to part `i // (B / size)`.

    The mesh gives the size, so it is None until the program is bound to one. The compiler takes the sharding rules out
    when it binds; a bound program has none.
    """

    axes: tuple[str, ...]
    size: int | None = None
    layout: ShardingRules = ShardingRules()

    def __str__(self) -> str:
        return " ".join(("mesh", *self.axes, *([str(self.size)] if self.size is not None else [])))


@dataclass(frozen=True)
class UnderVmap:
    """Every row is a part of its own, side by side on one device. The batch gives their number."""

    size: None = None

    def __str__(self) -> str:
        return "vmap"


@dataclass(frozen=True)
class Wrap:
    """A transformation of the loss, applied before it is differentiated: `function(loss, *arguments)` is a loss.

    A module-level function and a tuple instead of a closure, because equal transforms must expand to equal wraps.
    `check(trained, *arguments)` refuses trained parameters that the transformation cannot take. With a `head` the
    function on its right is no loss but an encoder, and the loss is the head of what that makes of the whole batch.
    `computes_in` is the dtype, by name, that the loss computes in because of it.
    """

    function: Callable[..., Callable[..., Any]]  # Any: a loss takes the user's own trees
    arguments: tuple[object, ...] = ()
    check: Callable[..., None] = lambda *_: None
    head: Callable[..., Any] | None = None  # Any: (params, z) -> what a loss returns
    computes_in: str | None = None
    written: Written = field(default="wrap", compare=False)


@dataclass(frozen=True)
class DifferentiateNode:
    """The value and the gradient of a loss, on the rows it is given.

    Args:
      loss: the user's own function.
      wraps: the transformations of the loss, outermost first.
      has_aux: whether the loss returns metrics beside its value.
      rng: "example" for one key per row, "microbatch" for one key per call of the loss, None for none.
      model_state: the rules of the model state by path pattern, () for the default ones; None if the loss takes none.
      wrt: path patterns of the parameters that are trained; the gradient has those leaves alone.
      reads: the values of the state before the step that the loss takes by keyword: slots by name, and "step".
      head: of a loss of the whole batch, the function of what the loss, which is then an encoder, makes of every row.
        A field and no node: the head is differentiated where the sum over the rows becomes a value, which is where a
        pending reduction takes place anyway, and every law moves it with the means that it waits for.
    """

    loss: Callable[..., Any]  # Any: a loss takes the user's own trees
    wraps: tuple[Wrap, ...] = ()
    has_aux: bool = False
    rng: str | None = None
    model_state: Rules | None = None
    wrt: tuple[str, ...] = ("**",)
    reads: tuple[str, ...] = ()
    head: Callable[..., Any] | None = None  # Any: (params, z) -> what a loss returns
    written: Written = field(default="grad", compare=False)

    def __str__(self) -> str:
        return self.written

    @property
    def function(self) -> Callable[..., Any]:
        """The loss in its wraps; the encoder, if there is a head."""
        function = self.loss
        for wrap in reversed(self.wraps):
            function = wrap.function(function, *wrap.arguments)
        return function

    def check(self, trained: Any) -> None:  # Any: a tree of the user's
        """Refuse trained parameters that a transformation of the loss cannot take."""
        for wrap in self.wraps:
            wrap.check(trained, *wrap.arguments)


@dataclass(frozen=True)
class MeanNode:
    """The mean over equal parts of the rows. Linear.

    Args:
      place: where the parts are computed: in a scan, over mesh axes, or under vmap.
      dtype: of the accumulator of a scan, by name; None for float32, or the dtype of the gradient if that is wider.
    """

    place: InScan | OverMesh | UnderVmap
    dtype: str | None = None
    written: Written = field(default="mean", compare=False)

    def __str__(self) -> str:
        return f"mean[{self.place}{', ' + self.dtype if self.dtype else ''}]"

    @property
    def size(self) -> int:
        if self.place.size is None:
            raise ValueError(f"{self} has no size yet: the mesh gives that of `mesh`, and the batch that of `vmap`")
        return self.place.size


@dataclass(frozen=True)
class ScaleNode:
    """Multiply the gradient by a constant. Linear. The loss is only reported, so it is not scaled."""

    factor: float
    written: Written = field(default="scale", compare=False)

    def __str__(self) -> str:
        return f"scale({self.factor})"


@dataclass(frozen=True)
class MapNode:
    """A function of the gradient that is not linear: it needs the reduced gradient, so no reduction may be pending.

    Args:
      function: `function(grads, *arguments)` returns the new gradient, and metrics to add, by name.
      arguments: the rest of its arguments. A module-level function and a tuple instead of a closure, because equal
        transforms must expand to equal nodes.
      draws: the function takes a key, `function(grads, key, *arguments)`, folded from the seed, the step, the local
        microbatch and the name of the node.
      keeps_finite: the norm of the new gradient is finite if and only if that of the old one is.
      measure: what the function needs of the whole gradient, apart from what it does to each element:
        `measure(grads, *arguments)` returns a value and the metrics, `function(grads, value, *arguments)` the gradient.
      keeps_zeros: zeros that are appended to a leaf stay zeros, and change nothing else.
      reads: what the measurement takes: the gradient; "params", the parameters too: `measure(grads, params,
        *arguments)`; or "squares", the sum of squares of each leaf of the gradient, which a step takes anyway:
        `measure(squares, *arguments)`.
    """

    function: Callable[..., Any]  # Any: (grads, *arguments) -> (grads, dict of arrays)
    arguments: tuple[object, ...] = ()
    draws: bool = False
    keeps_finite: bool = False
    keeps_zeros: bool = False
    measure: Callable[..., Any] | None = None  # Any: (grads, *arguments) -> (value, dict of arrays)
    reads: Literal["gradient", "params", "squares"] = "gradient"
    name: str = "map"
    written: Written = field(default="map", compare=False)

    def __str__(self) -> str:
        return self.written

    def measured(
        self,
        grads: Any,  # Any, here and below: trees of arrays, and arrays
        params: Any,
        squares: Callable[[], Any],
    ) -> tuple[Any, dict[str, Any]]:
        """The value that `measure` takes of the whole gradient, and the metrics; nothing without `measure`."""
        if self.measure is None:
            return None, {}
        match self.reads:
            case "gradient":
                return self.measure(grads, *self.arguments)
            case "params":
                return self.measure(grads, params, *self.arguments)
            case "squares":
                return self.measure(squares(), *self.arguments)

    def applied(self, grads: Any, value: Any, *key: Any) -> Any:  # Any: as above; checked by the caller
        """The new gradient, given the measured value; and the metrics, if there was no `measure`."""
        if self.measure is None:
            return self.function(grads, *key, *self.arguments)
        return self.function(grads, value, *key, *self.arguments), {}


@dataclass(frozen=True)
class PerturbNode:
    """The gradient on its right at other parameters: `function(params, grads, *arguments)`, from the gradient at these.

    The gradient on its right is computed twice. No other node evaluates it away from the state's own parameters; a map
    gets the gradient once, and too late. The metrics and the model state are those at the state's own parameters.
    """

    function: Callable[..., Any]  # Any: (params, grads, *arguments) -> params
    arguments: tuple[object, ...] = ()
    written: Written = field(default="perturb", compare=False)

    def __str__(self) -> str:
        return self.written


@dataclass(frozen=True)
class RescaleNode:
    """Multiply the loss by a number kept in the state, and divide the gradient by it: only rounding changes.

    `advance(slot, loss_is_finite, gradient_is_finite)` is the slot after a step; its first leaf is the number.
    """

    initial: Callable[..., Any]  # Any: (*arguments) -> the slot
    advance: Callable[..., Any]  # Any: (slot, bool, bool, *arguments) -> the slot
    arguments: tuple[object, ...] = ()
    name: str = "loss_scale"
    written: Written = field(default="rescale", compare=False)

    def __str__(self) -> str:
        return self.written


@dataclass(frozen=True)
class UpdateNode:
    """One step of an optimizer: from the gradient to new parameters and a new optimizer state."""

    optimizer: Any  # Any: an optax GradientTransformation; the core imports no library
    written: Written = field(default="update", compare=False)

    def __str__(self) -> str:
        return self.written


@dataclass(frozen=True)
class FollowNode:
    """A slot of the state that follows the parameters.

    `initial(params)`, then `advance(slot, params, step, *arguments)`: `params` and `step` are those after the step.
    """

    initial: Callable[..., Any]  # Any: trees of the user
    advance: Callable[..., Any]  # Any: trees of the user
    arguments: tuple[object, ...] = ()
    name: str = "follow"
    written: Written = field(default="follow", compare=False)

    def __str__(self) -> str:
        return self.written


@dataclass(frozen=True)
class GuardNode:
    """Skip a step whose loss or gradient is not finite: the state stays as it was, but for the count of skips."""

    limit: int | None
    name: str = "skip_nonfinite"
    written: Written = field(default="guard", compare=False)

    def __str__(self) -> str:
        return self.written


@dataclass(frozen=True)
class RepeatNode:
    """Several steps in one dispatch, one after another.

    Args:
      size: the number of steps.
      minibatches: None if each step takes a batch of its own, along a leading axis. Else all take rows of one batch, in
        epochs of so many steps: an epoch permutes the rows, and deals them out to its steps.
    """

    size: int
    minibatches: int | None = None
    written: Written = field(default="repeat", compare=False)

    def __str__(self) -> str:
        return self.written


@dataclass(frozen=True)
class Turn:
    """One of several steps on one state and one batch.

    Args:
      name: under which the state keeps what is its own.
      program: a complete program, `follow* update node* differentiate`.
      every: it is made in each step whose number, from 1 on, is a multiple of this.
    """

    name: str
    program: "Program"
    every: int = 1

    def __str__(self) -> str:
        often = f" every {self.every}" if self.every > 1 else ""
        return f"{self.name}{often}: {show(self.program)}"

    @property
    def loss(self) -> DifferentiateNode:
        """The node of its loss."""
        return loss_of(self.program)


@dataclass(frozen=True)
class AlternateNode:
    """Several steps, one after another, on one state and one batch: each has a loss and an optimizer of its own.

    Every other program has one update, from one gradient; a second optimizer for other parameters, by another loss that
    sees what the first has changed, is no function of that gradient.
    """

    turns: tuple[Turn, ...]
    written: Written = field(default="alternate", compare=False)

    def __str__(self) -> str:
        return f"alternate({', '.join(map(str, self.turns))})"


Node = (
    DifferentiateNode | MeanNode | ScaleNode | MapNode | PerturbNode | RescaleNode | UpdateNode | FollowNode | GuardNode
    | RepeatNode | AlternateNode
)  # fmt: skip
Program = tuple[Node, ...]


def show(program: Program) -> str:
    """The program as a formula, read as in mathematics: the rightmost node acts first."""
    return " . ".join(str(node) for node in program)


def turns_of(program: Program) -> tuple[Turn, ...]:
    """The turns of a program; if it has none, the program itself as the only one, without a name."""
    return next((node.turns for node in program if isinstance(node, AlternateNode)), (Turn("", program),))


def loss_of(program: Program) -> DifferentiateNode:
    """The node of the loss of a complete program."""
    return next(node for node in program if isinstance(node, DifferentiateNode))


def trained_patterns(program: Program) -> tuple[str, ...]:
    """Path patterns of the parameters that any of its turns trains."""
    return tuple(dict.fromkeys(pattern for turn in turns_of(program) for pattern in turn.loss.wrt))


def slot_name(turn: str, name: str) -> str:
    """Under which name a state keeps what a node of a turn keeps; the turn of a program without turns has no name."""
    return f"{turn}/{name}" if turn else name


def rows_axis(program: Program) -> int:
    """The axis of the leaves of a batch that counts rows: 1 where each of several steps takes a batch of its own."""
    return sum(isinstance(node, RepeatNode) and node.minibatches is None for node in program)


def num_minibatches(program: Program) -> int:
    """How many steps share the rows of a batch: 1 if each step takes all of its rows."""
    return next((node.minibatches or 1 for node in program if isinstance(node, RepeatNode)), 1)


def named(program: Program) -> dict[str, MapNode | RescaleNode | FollowNode | GuardNode]:
    """The nodes that keep a slot of the state, or draw, by unique name: the second `ema` is `ema_2`."""
    found: dict[str, MapNode | RescaleNode | FollowNode | GuardNode] = {}
    for node in reversed(program):
        match node:
            case RescaleNode() | FollowNode() | GuardNode() | MapNode(draws=True):
                found[unique_name(node.name, tuple(found))] = node
            case _:
                pass
    return found


def unique_name(name: str, taken: tuple[str, ...]) -> str:
    """`name`, with the first suffix from `_2` on that is not taken, if it is taken itself."""
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name}_{number}"
    return found
