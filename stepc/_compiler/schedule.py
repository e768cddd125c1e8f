"""The schedule of one step: what is computed, in which order, and where each reduction is. `lowering` follows it.

The rule that places every reduction: a gradient has pending reductions. A mean over mesh axes adds a pending
reduction over them; linear nodes pass it on, through loops as well; the first node that is not linear needs the
value, so the reduction takes place there. A reduction is inside a loop only where the order of the transforms
demands it.

Sharding does not change the rule. It rewrites the finished schedule: an all-reduce becomes a reduce-scatter, and
parameters are gathered where they are used. The sum is the same; who holds which shard of it is not.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from math import prod
from typing import TypeAlias, assert_never

from stepc._compiler.rows import RowUse
from stepc._compiler.sharding import BoundRules
from stepc._core.nodes import (
    AlternateNode,
    DifferentiateNode,
    FollowNode,
    GuardNode,
    InScan,
    MapNode,
    MeanNode,
    Node,
    OverMesh,
    PerturbNode,
    Program,
    RepeatNode,
    RescaleNode,
    ScaleNode,
    Turn,
    UnderVmap,
    UpdateNode,
    named,
    turns_of,
)
from stepc._core.sharding import Spec, axes_of
from stepc._language.encoded import EncodedTree
from stepc._language.optimizers import evaluates_loss
from stepc.errors import ConfigError, leaf_text, listed


@dataclass(frozen=True)
class ModelStateLeaf:
    """One leaf of the model state, and what becomes of it.

    Args:
      rule: one of `RULES`.
      reduction: how the results of parts are combined, such as "mean in float32"; None if all have the same, or rows of
        their own.
      turn: in a plan, the turn that has this rule, where there are several.
    """

    path: str
    rule: str
    reduction: str | None
    turn: str = ""

    @property
    def cost(self) -> str:
        """The rule, and what it costs, as plans print it."""
        free = {
            "rows": "each row keeps its own",
            "constant": "read only",
            "key": "folded for each call, advanced once a step",
        }
        return f"{self.rule}: {self.reduction or free.get(self.rule, 'passes as it is')}"


@dataclass(frozen=True)
class HeadStructure:
    """What the head of a loss of the whole batch is given.

    Args:
      tree: the structure of what the encoder returns.
      reads: the paths of the parameters that the head depends on.
      rows: by dtype, the bytes of the leaves with rows, for the whole batch: one gather each.
      sums: the dtypes of the sums over rows: one reduction each.
      has_counts: whether the value of the head is a sum of terms that are divided by counts of the batch.
    """

    tree: EncodedTree
    reads: tuple[str, ...]
    rows: tuple[tuple[str, int], ...]
    sums: tuple[str, ...]
    has_counts: bool = False


@dataclass(frozen=True)
class LossStructure:
    """What a loss returns, as far as the schedule depends on it.

    Args:
      counts: for each term of its value, the count of one local microbatch; None where the rows decide it.
      separate_metrics: "max", "min" and "whole numbers", where a metric is one: they are not summed with the gradient.
      has_last: whether a metric is a `Last`.
      model_state: the leaves of the model state.
      row_use: what it does with the rows that it is given; None where the batch is not split.
      head: of a loss of the whole batch, what its head is given.
      stacks: the paths of the parameters that a scan takes one slice of at a time.
      outside: of each parameter that none takes so, the dtypes that it is used in, by name.
      names_mesh: whether it names a mesh, or axes of one, in a sharding constraint or a `shard_map`.
      named_axes: the axes that it names there, or in a collective.
      has_convolutions: whether it computes a convolution.
    """

    counts: tuple[float | None, ...] = (1.0,)
    separate_metrics: tuple[str, ...] = ()
    has_last: bool = False
    model_state: tuple[ModelStateLeaf, ...] = ()
    row_use: RowUse | None = None
    head: HeadStructure | None = None
    stacks: tuple[str, ...] = ()
    outside: tuple[tuple[str, tuple[str, ...]], ...] = ()
    names_mesh: bool = False
    named_axes: frozenset[str] = frozenset()
    has_convolutions: bool = False

    @property
    def has_keys(self) -> bool:
        """Whether a leaf of the model state is a key, which is folded with the position of the first row."""
        return any(leaf.rule == "key" for leaf in self.model_state)

    @property
    def counts_first(self) -> bool:
        """Whether the terms have different counts: one accumulated gradient cannot be divided by several."""
        return len(self.counts) > 1


@dataclass(frozen=True)
class Compute:
    """Compute the loss and its gradient on one local microbatch.

    Args:
      counts_first: whether each term is divided by its own total count before the gradient is taken.
      rescaled: whether the loss is multiplied by a scale before the gradient is taken.
      count: what one call of the loss counts; 1 unless the loss is a `Mean` with a static count, or one part of a loss
        of the whole batch: then all calls together count 1.
      layered: the mesh axes that parameters are sharded over, if the loss gathers them one layer at a time.
      dtype: in which their gradient is then reduced; None for its own, or float32 if that is wider.
      written: the transforms that ask the loss to gather, as written.
      reports: whether the metrics of the loss are kept.
      pulls_back: of a loss of the whole batch: whether the encoder alone is differentiated, with the cotangents that
        the head gives it.
    """

    node: DifferentiateNode
    counts_first: bool = False
    rescaled: bool = False
    count: float | Fraction = 1.0
    layered: tuple[str, ...] = ()
    dtype: str | None = None
    written: str = ""
    reports: bool = True
    pulls_back: bool = False


@dataclass(frozen=True)
class Encode:
    """Compute what the encoder makes of one local microbatch, and no gradient."""

    node: DifferentiateNode


@dataclass(frozen=True)
class Count:
    """Compute the counts of the terms of the loss on one local microbatch, and nothing else of the loss."""

    node: DifferentiateNode


@dataclass(frozen=True)
class Value:
    """Compute the loss on one local microbatch, and no gradient."""

    node: DifferentiateNode
    count: float | Fraction = 1.0


@dataclass(frozen=True)
class CountFirst:
    """Add up the counts in a pass of their own, before the pass that divides by them."""

    body: "Schedule"


@dataclass(frozen=True)
class Across:
    """Compute a loss of the whole batch, in two passes over its rows.

    The first pass encodes every local microbatch. What comes of them is gathered over the mesh, and the head of it is
    differentiated once, on every device alike. The second pass encodes each microbatch again, and pulls back the
    cotangents of its rows.

    Args:
      head: what the head is given.
      first: encodes.
      second: adds up the gradient; if only the value is wanted, at most the reduction of the model state.
      axes: the mesh axes to gather over.
      rescaled: whether the loss is multiplied by a scale before the gradient is taken.
      reports: whether the metrics of the head are kept.
      gather: gathers the parameters for the head, if it is not given gathered ones.
    """

    node: DifferentiateNode
    head: HeadStructure
    first: "Schedule"
    second: "Schedule"
    axes: tuple[str, ...] = ()
    num_devices: int = 1
    rescaled: bool = False
    reports: bool = True
    gather: "AllGather | None" = None
    written: str = ""

    @property
    def gives_gradient(self) -> bool:
        """Whether there is a second pass that takes a gradient."""
        return not all(isinstance(one, ReduceModelState) for one in self.second)


@dataclass(frozen=True)
class ScanMicrobatches:
    """Run the body once per microbatch and add up the gradients in `dtype`: one `lax.scan`."""

    size: int
    body: "Schedule"
    dtype: str | None = None


@dataclass(frozen=True)
class Vmap:
    """Run the body on every row, side by side, and add up the results."""

    body: "Schedule"
    written: str = ""


@dataclass(frozen=True)
class AllReduce:
    """Reduce the gradient and its metrics over `axes`, in one collective but for the separate metrics.

    Args:
      separate_metrics: the kinds of metrics that take a collective each.
      scattered: the axes over which a `ReduceScatter` has summed the sharded leaves of the gradient already.
      dtype: in which the gradient is reduced; None for its own.
      written: the transforms that ask for it, as written; so in the collectives below.
    """

    axes: tuple[str, ...]
    num_devices: int
    reason: str
    separate_metrics: tuple[str, ...] = ()
    scattered: tuple[str, ...] = ()
    dtype: str | None = None
    written: str = ""


@dataclass(frozen=True)
class ReduceScatter:
    """Reduce the sharded leaves of the gradient over some axes: each device receives its own shard of the sum.

    Replicated leaves and metrics are left to the `AllReduce` after it.
    """

    axes: tuple[str, ...]
    num_devices: int
    reason: str
    dtype: str | None = None
    written: str = ""


@dataclass(frozen=True)
class ShardGradient:
    """Shard the gradient over some axes that are left to XLA, which reduces it to its shards."""

    axes: tuple[str, ...]
    num_devices: int
    reason: str
    written: str = ""


@dataclass(frozen=True)
class AllGather:
    """Gather the parameters that are sharded over some axes.

    `is_outside`: those alone that no scan over layers takes, in the dtypes that the loss uses, beside their shards.
    """

    axes: tuple[str, ...]
    num_devices: int
    reason: str
    written: str = ""
    is_outside: bool = False


@dataclass(frozen=True)
class ReduceModelState:
    """Reduce the model state over `axes`, those leaves that have one of the rules: one collective per kind.

    `"sequential"` leaves are reduced as soon as they are there, since the next microbatch starts from them; the others
    once a step.
    """

    axes: tuple[str, ...]
    num_devices: int
    reason: str
    rules: tuple[str, ...]
    leaves: tuple[ModelStateLeaf, ...]
    written: str = ""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The reductions, in words."""
        return tuple(sorted({why for leaf in self.leaves if (why := leaf.reduction) and leaf.rule in self.rules}))


@dataclass(frozen=True)
class Multiply:
    """Multiply the gradient, not its metrics, by a constant."""

    factor: float


@dataclass(frozen=True)
class Unscale:
    """Divide the gradient by the scale that the loss was multiplied by."""

    node: RescaleNode


@dataclass(frozen=True)
class DivideByCount:
    """Divide the sum, once: the gradient becomes a value.

    Args:
      by: "microbatches", the number of calls of the loss times what each counts; "count", a count that was added up
        with the gradient; or "nothing", if each term was divided before its gradient was taken.
      microbatches: the number of calls times what each counts.
      vmapped: whether each row was a call of its own, so that the number of rows is a factor besides.
    """

    by: str = "microbatches"
    microbatches: float = 1.0
    vmapped: bool = False


@dataclass(frozen=True)
class Apply:
    """Apply a function that needs the value of the gradient.

    Args:
      name: what its key is folded from, if it draws.
      reduced_axes: the mesh axes that the gradient is reduced over already; one draw spans them.
    """

    node: MapNode
    name: str | None = None
    reduced_axes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evaluate:
    """The loss of the whole batch as a function of the parameters, for an optimizer that asks for it.

    It is what the step computes, of the same rows, keys and model state, without the transforms that change gradients.

    Args:
      value: computes the loss.
      gradient: computes the loss and its gradient, wherever the optimizer differentiates.
      gather: gathers the parameters before either, if each device updates a shard of them.
    """

    value: "Schedule"
    gradient: "Schedule"
    gather: AllGather | None = None


@dataclass(frozen=True)
class Perturb:
    """Compute a gradient at parameters that are found from the gradient at these.

    Args:
      here: adds up the gradient at the parameters themselves, with the metrics and the model state that are kept.
      to_value: makes a value of it, by which the parameters are moved.
      there: adds up the gradient at the moved parameters.
    """

    node: PerturbNode
    here: "Schedule"
    to_value: "Schedule"
    there: "Schedule"


@dataclass(frozen=True)
class Optimize:
    """Run the optimizer, and everything that happens with a step or not at all.

    Args:
      evaluate: the loss of the whole batch, if the optimizer takes `value_fn` or `obj_fn`.
      follows: the slots that follow the parameters, by name.
      guard: the node that skips a step that is not finite, by name.
      rescale: the node that adapts the scale of the loss, by name.
      gather: gathers the new parameters, if each device computes a shard of them only.
    """

    node: UpdateNode
    evaluate: Evaluate | None = None
    follows: tuple[tuple[str, FollowNode], ...] = ()
    guard: tuple[str, GuardNode] | None = None
    rescale: tuple[str, RescaleNode] | None = None
    gather: AllGather | None = None


@dataclass(frozen=True)
class TakeTurns:
    """Run the steps of several turns one after another, then everything that happens with the whole or not at all.

    Args:
      turns: each with its schedule.
      follows: the slots that follow all trained parameters, by name.
      guard: the node that skips the whole if any turn is not finite, by name.
    """

    turns: tuple[tuple[Turn, "Schedule"], ...]
    follows: tuple[tuple[str, FollowNode], ...] = ()
    guard: tuple[str, GuardNode] | None = None


@dataclass(frozen=True)
class RepeatSteps:
    """Run complete steps one after another in one dispatch: a `lax.scan`.

    Args:
      axes: the mesh axes over which the rows of a minibatch are exchanged; none if each step has a batch of its own.
      num_devices: the number of devices along them.
    """

    node: RepeatNode
    body: "Schedule"
    axes: tuple[str, ...] = ()
    num_devices: int = 1


Instruction: TypeAlias = (
    Compute | Encode | Count | Value | CountFirst | Across | ScanMicrobatches | Vmap | AllGather | ReduceScatter
    | ShardGradient | AllReduce | ReduceModelState | Multiply | Unscale | DivideByCount | Apply | Perturb | Optimize
    | TakeTurns | RepeatSteps
)  # fmt: skip
Schedule: TypeAlias = tuple[Instruction, ...]


def make_schedule(program: Program, structures: tuple[LossStructure, ...], rules: BoundRules) -> Schedule:
    """The schedule of a program in normal form, sharded as the rules say; a structure for the loss of each turn."""
    match program:
        case (RepeatNode() as node, *rest):
            sizes = dict(rules.sizes)
            axes = () if node.minibatches is None else tuple(axis for axis in rules.rows if sizes[axis] > 1)
            body = make_schedule(tuple(rest), structures, rules)
            return (RepeatSteps(node, body, axes, prod(sizes[axis] for axis in axes)),)
        case (*outer, AlternateNode(turns)):
            bodies = tuple(
                (turn, make_schedule(turn.program, (structure,), rules))
                for turn, structure in zip(turns, structures, strict=True)
            )
            names = {id(node): name for name, node in named(program).items()}
            return (TakeTurns(bodies, *_outside(tuple(outer), names)),)
        case _:
            (structure,) = structures
            return _shard(_replicated_schedule(program, structure), rules)


def schedules_of_turns(schedule: Schedule) -> tuple[Schedule, ...]:
    """The schedule of each turn of a dispatch; that of its step as the only one, if it has no turns."""
    match schedule:
        case (RepeatSteps(body=body),):
            return schedules_of_turns(body)
        case (TakeTurns(turns),):
            return tuple(body for _, body in turns)
        case _:
            return (schedule,)


@dataclass(frozen=True)
class _PendingSum:
    """A schedule so far, whose result is a sum, and what is pending before the sum is a value.

    Args:
      structure: what the loss returns.
      schedule: the instructions so far.
      axes: the mesh axes of the pending reduction.
      written: the transforms that it comes from, as written.
      num_devices: the number of devices along them.
      microbatches: the number of local microbatches in the sum, without `vmap`.
      vmapped: whether each row is one of its own.
      factor: the pending multiplication.
      rescale: the node whose scale is to be divided by.
      counts: what the sum is to be divided by: the counts of the loss, or 1 once there is a value.
      reduced_axes: the mesh axes that the sum is reduced over, or will be.
      encoder: of a loss of the whole batch whose rows are still being joined.
    """

    structure: LossStructure
    schedule: Schedule = ()
    axes: tuple[str, ...] = ()
    written: str = ""
    num_devices: int = 1
    microbatches: int = 1
    vmapped: bool = False
    factor: float = 1.0
    rescale: RescaleNode | None = None
    counts: tuple[float | None, ...] = (1.0,)
    reduced_axes: tuple[str, ...] = ()
    encoder: Compute | None = None

    def then(self, instruction: Instruction) -> "_PendingSum":
        return replace(self, schedule=(*self.schedule, instruction))

    def as_value(self, reason: str) -> "_PendingSum":
        """The pending reduction takes place, then, once, the division. Nothing is pending after it."""
        complete = self.complete()
        before, after = complete.around_value(reason)
        return _PendingSum(self.structure, (*before, *complete.schedule, *after), reduced_axes=self.reduced_axes)

    def complete(self) -> "_PendingSum":
        """The same, where no more rows follow: a loss of the whole batch is computed here.

        One call alone has all rows, and is differentiated at once.
        """
        if self.encoder is None or self.structure.head is None:
            return self
        if self.microbatches == 1:
            return replace(self, encoder=None)
        part = Fraction(1, self.microbatches)
        across = Across(
            self.encoder.node,
            self.structure.head,
            first=_encoding(self.schedule),
            second=_replaced(self.schedule, lambda one: replace(one, count=part, rescaled=False, pulls_back=True)),
            axes=self.axes,
            num_devices=self.num_devices,
            rescaled=self.encoder.rescaled,
            written=" @ ".join(filter(None, (self.written, self.encoder.node.written))),
        )
        return replace(self, schedule=(across,), microbatches=1, encoder=None)

    def around_value(self, reason: str) -> tuple[Schedule, Schedule]:
        """What comes before and after the schedule to make a value of its sum."""
        before: list[Instruction] = []
        after: list[Instruction] = []
        if self.axes:
            separate = self.structure.separate_metrics
            after.append(AllReduce(self.axes, self.num_devices, reason, separate, written=self.written))
        if len(self.counts) > 1:
            why = "its terms have counts of their own"
            reduction = AllReduce(self.axes, self.num_devices, why, written=self.written)
            before.append(CountFirst((*_counting(self.schedule), *((reduction,) if self.axes else ()))))
        if self.factor != 1.0:
            after.append(Multiply(self.factor))
        if self.rescale is not None:
            after.append(Unscale(self.rescale))
        match self.counts:
            case (None,):
                after.append(DivideByCount("count"))
            case (count,):
                after.append(DivideByCount("microbatches", self.microbatches * (count or 0.0), self.vmapped))
            case _:
                after.append(DivideByCount("nothing"))
        return tuple(before), tuple(after)


def _replicated_schedule(program: Program, structure: LossStructure) -> Schedule:
    names = {id(node): name for name, node in named(program).items()}
    pending = _PendingSum(structure, counts=structure.counts)
    for position in reversed(range(len(program))):
        pending = _add_node(pending, program[position], program[:position], names)
        if isinstance(node := program[position], UpdateNode):
            # The nodes on the left of the update are fields of its instruction.
            *inner, optimize = _reduce_model_state(pending.schedule, program, structure)
            if isinstance(optimize, Optimize) and evaluates_loss(node.optimizer):
                optimize = replace(optimize, evaluate=_evaluation(program[position + 1 :], structure, node))
            return (*inner, optimize)
    raise ValueError("a program without an update makes no step")


def _reduce_model_state(schedule: Schedule, program: Program, structure: LossStructure) -> Schedule:
    """With the reduction of the leaves that no microbatch waits for: once a step, right after the last microbatch."""
    means = [node for node in program if isinstance(node, MeanNode) and isinstance(node.place, OverMesh)]
    rules = ("average", "max", "sum")
    leaves = tuple(leaf for leaf in structure.model_state if leaf.rule in rules and leaf.reduction)
    if not means or not leaves:
        return schedule
    axes = tuple(axis for node in means if isinstance(node.place, OverMesh) for axis in node.place.axes)
    written = " @ ".join(node.written for node in means)
    reason = "model state whose rule takes one reduction a step"
    one = ReduceModelState(axes, prod(node.size for node in means), reason, rules, leaves, written)
    calls = Compute | Across | ScanMicrobatches | Vmap | Perturb
    last = next(n for n, one in enumerate(schedule) if isinstance(one, calls))
    return (*schedule[: last + 1], one, *schedule[last + 1 :])


def _add_node(pending: _PendingSum, node: Node, outer: Program, names: dict[int, str]) -> _PendingSum:
    match node:
        case DifferentiateNode():
            rescaled = any(isinstance(one, RescaleNode) for one in outer)
            count = pending.counts[0] if len(pending.counts) == 1 else None
            compute = Compute(node, pending.structure.counts_first, rescaled, count or 1.0)
            return replace(pending.then(compute), encoder=None if node.head is None else compute)
        case MeanNode():
            return _add_mean(pending, node)
        case ScaleNode(factor):
            return replace(pending, factor=pending.factor * factor)
        case RescaleNode():
            return replace(pending, rescale=node)
        case MapNode():
            name = names[id(node)] if node.draws else None
            return pending.as_value(_why_reduced(node, outer)).then(Apply(node, name, pending.reduced_axes))
        case PerturbNode():
            pending = pending.complete()
            before, to_value = pending.around_value(_why_reduced(node, outer))
            # The model state that is kept is that of the first pass, so the second need not reduce its own.
            there = _without_model_state(pending.schedule)
            return replace(pending, schedule=(Perturb(node, (*before, *pending.schedule), to_value, there),))
        case UpdateNode():
            value = pending.as_value(f"`{node.written}` needs the reduced gradient")
            return value.then(_optimize(node, value.schedule, outer, names))
        case FollowNode() | GuardNode() | RepeatNode() | AlternateNode():
            raise ValueError(f"`{node}` stands on the left of the update")
        case _:
            assert_never(node)


def _evaluation(inner: Program, structure: LossStructure, node: UpdateNode) -> Evaluate:
    """The means of a program and their loss, apart from all that changes the gradient and leaves the loss alone.

    Errors: ConfigError for a head whose terms are divided by counts of several parts: its derivative is not theirs.
    """
    pending, taken_by = _PendingSum(replace(structure, separate_metrics=()), counts=structure.counts), ""
    for one in reversed(inner):
        match one:
            case MeanNode() if taken_by:
                raise ConfigError(
                    f"`{node.written}` evaluates the loss of the whole batch, which is not the mean of the parts that "
                    f"`{taken_by}` takes: the terms of the head have counts of their own.",
                    suggestion=f"Write `{taken_by}` to the left of `{one.written}`.",
                )
            case MeanNode() | DifferentiateNode():
                pending = _add_node(pending, one, (), {})
            case MapNode() | PerturbNode():  # it takes a value, so a head is given the rows up to here
                has_counts = structure.head is not None and structure.head.has_counts
                pending, taken_by = pending.complete(), taken_by or one.written * has_counts
            case _:
                pass
    pending = pending.complete()
    silent = _replaced(
        pending.schedule, lambda one: replace(one, reports=False), lambda across: replace(across, reports=False)
    )
    pending = replace(pending, schedule=silent)
    reason = f"`{node.written}` evaluates the loss of the whole batch"
    reduction = (AllReduce(pending.axes, pending.num_devices, reason, written=pending.written),) if pending.axes else ()
    pending = replace(pending, schedule=_without_model_state(pending.schedule))
    value = _replaced(pending.schedule, lambda one: Value(one.node, one.count), _value_alone)
    return Evaluate((*value, *reduction), pending.as_value(reason).schedule)


def _value_alone(across: Across) -> Across:
    """Without the second pass, but for the reduction of a model state that the next microbatch reads."""
    return replace(across, second=tuple(one for one in across.second if isinstance(one, ReduceModelState)))


def _add_mean(pending: _PendingSum, node: MeanNode) -> _PendingSum:
    match node.place:
        case InScan(size):
            scan = ScanMicrobatches(size, pending.schedule, node.dtype)
            return replace(pending, schedule=(scan,), microbatches=pending.microbatches * size)
        case UnderVmap():
            return replace(pending, schedule=(Vmap(pending.schedule, node.written),), vmapped=True)
        case OverMesh(axes):
            leaves = pending.structure.model_state
            if any(leaf.rule == "sequential" and leaf.reduction for leaf in leaves):
                reason = f"`{node.written}` averages the model's own state"
                pending = pending.then(ReduceModelState(axes, node.size, reason, ("sequential",), leaves, node.written))
            return replace(
                pending,
                axes=(*axes, *pending.axes),
                written=" @ ".join(filter(None, (node.written, pending.written))),
                num_devices=pending.num_devices * node.size,
                microbatches=pending.microbatches * node.size,
                reduced_axes=(*axes, *pending.reduced_axes),
            )
        case _:
            assert_never(node.place)


def _why_reduced(node: MapNode | PerturbNode, outer: Program) -> str:
    reason = f"`{node.written}` is not linear: it needs the reduced gradient"
    scans = [one.written for one in outer if isinstance(one, MeanNode) and isinstance(one.place, InScan)]
    if not scans:
        return reason
    return f"{reason}, and it stands inside `{'`, `'.join(scans)}`: once a microbatch"


def _counting(body: Schedule) -> Schedule:
    """The same loops over the same rows, for the counts alone."""
    counted: list[Instruction] = []
    for one in body:
        match one:
            case Compute(node):
                counted.append(Count(node))
            case ScanMicrobatches(size, inner):
                counted.append(ScanMicrobatches(size, _counting(inner)))
            case Vmap(inner, written):
                counted.append(Vmap(_counting(inner), written))
            case Perturb(there=inner):
                counted.extend(_counting(inner))
            case _:
                pass
    return tuple(counted)


def _encoding(body: Schedule) -> Schedule:
    """The same loops over the same rows, for what the encoder makes of them. Its last model state is not needed."""
    encoded: list[Instruction] = []
    for one in body:
        match one:
            case Compute(node):
                encoded.append(Encode(node))
            case ScanMicrobatches(size, inner):
                states = tuple(each for each in inner if isinstance(each, ReduceModelState))
                encoded.append(ScanMicrobatches(size, (*_encoding(inner), *states)))
            case _:
                pass
    return tuple(encoded)


def _replaced(
    body: Schedule,
    replacement: Callable[[Compute], Instruction],
    of_across: Callable[[Across], Across] = lambda across: across,
) -> Schedule:
    """The same loops, with something else in place of the gradient of a local microbatch, or of a whole batch."""
    made: list[Instruction] = []
    for one in body:
        match one:
            case Compute():
                made.append(replacement(one))
            case ScanMicrobatches(body=inner) | Vmap(inner):
                made.append(replace(one, body=_replaced(inner, replacement, of_across)))
            case Across():
                across = of_across(one)
                made.append(replace(across, second=_replaced(across.second, replacement, of_across)))
            case _:
                made.append(one)
    return tuple(made)


def _without_model_state(body: Schedule) -> Schedule:
    """The same instructions without the last reduction of a model state that nobody keeps.

    One in a loop stays: the next microbatch reads what it makes.
    """
    return tuple(
        replace(one, second=_without_model_state(one.second)) if isinstance(one, Across) else one
        for one in body
        if not isinstance(one, ReduceModelState)
    )


def _optimize(node: UpdateNode, inner: Schedule, outer: Program, names: dict[int, str]) -> Optimize:
    unscaled = (one.node for one in all_instructions(inner) if isinstance(one, Unscale))
    rescale = next(((names[id(one)], one) for one in unscaled), None)
    return Optimize(node, None, *_outside(outer, names), rescale)


def _outside(
    outer: Program, names: dict[int, str]
) -> tuple[tuple[tuple[str, FollowNode], ...], tuple[str, GuardNode] | None]:
    """The slots that follow the parameters, and the node that may skip the step."""
    follows = tuple((names[id(one)], one) for one in reversed(outer) if isinstance(one, FollowNode))
    return follows, next(((names[id(one)], one) for one in outer if isinstance(one, GuardNode)), None)


def _shard(schedule: Schedule, rules: BoundRules) -> Schedule:
    """The same schedule with gradient, optimizer state and parameters sharded as the rules say."""
    layout = rules.layout
    schedule = tuple(_reduce_in(one, layout.reduce_dtype) for one in schedule)
    if not rules.shard_axes or not layout.zero:
        return schedule
    axes = rules.shard_axes
    reductions = (one for one in all_instructions(schedule) if isinstance(one, AllReduce) and {*axes} <= {*one.axes})
    written = rules.written if layout.automatic else next(reductions).written
    gather = AllGather(axes, rules.num_parts, "the loss needs gathered parameters", written)
    schedule = tuple(_shard_evaluation(one, gather, rules) for one in schedule)
    schedule = _reduce_scattered(schedule, rules)
    if layout.zero < 3:
        gather = replace(gather, reason="each device updates its own shard of the parameters")
        return tuple(replace(one, gather=gather) if isinstance(one, Optimize) else one for one in schedule)
    if layout.gather == "step":
        return (replace(gather, reason=f"{gather.reason}: once a step"), *schedule)
    if layout.gather == "layer" and _is_linear(schedule):
        by_layer = _gather_by_layer(schedule, gather, layout.reduce_dtype)
        if layout.outside == "microbatch" or _num_iterations(schedule) == 1:
            return by_layer
        reason = "those outside of any scan over layers, once a step"
        return (replace(gather, reason=reason, is_outside=True), *by_layer)
    return _gather_by_microbatch(schedule, gather)


def _shard_evaluation(one: Instruction, gather: AllGather, rules: BoundRules) -> Instruction:
    if not isinstance(one, Optimize) or one.evaluate is None:
        return one
    # By microbatch instead of by layer: a gradient that gathers by layer has no derivative of its own.
    often = rules.layout.gather if rules.layout.gather == "step" else "microbatch"
    rules = replace(rules, layout=replace(rules.layout, gather=often))
    gradient = _shard(one.evaluate.gradient, rules)
    if rules.layout.zero < 3:
        return replace(one, evaluate=replace(one.evaluate, gradient=gradient, gather=gather))
    value = one.evaluate.value
    value = (gather, *value) if often == "step" else _gather_by_microbatch(value, gather)
    return replace(one, evaluate=Evaluate(value, gradient))


def _reduce_in(one: Instruction, dtype: str | None) -> Instruction:
    match one:
        case AllReduce():
            return replace(one, dtype=dtype)
        case ScanMicrobatches():
            return replace(one, body=tuple(_reduce_in(inner, dtype) for inner in one.body))
        case Perturb():
            here, to_value, there = (
                tuple(_reduce_in(inner, dtype) for inner in part) for part in (one.here, one.to_value, one.there)
            )
            return replace(one, here=here, to_value=to_value, there=there)
        case _:
            return one


def _reduce_scattered(schedule: Schedule, rules: BoundRules) -> Schedule:
    """The last all-reduce as a reduce-scatter to the shards, unless the gradient is reduced inside a loop.

    XLA reduces in the innermost loop by itself, so there the accumulator is sharded at every level of `zero`.
    """
    if rules.layout.automatic:
        end = _end_of_sum(schedule)
        scatter = ShardGradient(rules.shard_axes, rules.num_parts, "each device updates its own shard", rules.written)
        return (*_scatter_in_loop(schedule[:end], scatter), *schedule[end:])
    position = max((index for index, one in enumerate(schedule) if isinstance(one, AllReduce)), default=-1)
    reduction = schedule[position] if position >= 0 else None
    if not isinstance(reduction, AllReduce) or not {*rules.shard_axes} <= {*reduction.axes}:
        return schedule
    scatter = ReduceScatter(rules.shard_axes, rules.num_parts, reduction.reason, reduction.dtype, reduction.written)
    before, after = schedule[:position], (replace(reduction, scattered=rules.shard_axes), *schedule[position + 1 :])
    if rules.layout.zero == 2 or rules.layout.gather != "step":
        return (*_scatter_in_loop(before, scatter), *after)
    return (*before, scatter, *after)


def _end_of_sum(schedule: Schedule) -> int:
    """The position of the first change to the sum of the gradient."""
    ends = Multiply | Unscale | DivideByCount | Apply | Optimize
    return next((index for index, one in enumerate(schedule) if isinstance(one, ends)), len(schedule))


def _scatter_in_loop(schedule: Schedule, scatter: ReduceScatter | ShardGradient) -> Schedule:
    """Reduce-scatter in the innermost scan after which no transform needs the whole gradient, or else at the end."""
    for index, one in enumerate(schedule):
        if isinstance(one, Across):  # the first that sums
            second = _scatter_in_loop(one.second, scatter)
            return (*schedule[:index], replace(one, second=second), *schedule[index + 1 :])
        if isinstance(one, ScanMicrobatches) and not any(isinstance(later, Apply) for later in schedule[index:]):
            scatter = replace(scatter, reason="the accumulator is sharded: once a microbatch")
            return (*schedule[:index], replace(one, body=_scatter_in_loop(one.body, scatter)), *schedule[index + 1 :])
        if isinstance(one, Perturb) and not any(isinstance(later, Apply) for later in schedule[index:]):
            there = _scatter_in_loop(one.there, scatter)
            return (*schedule[:index], replace(one, there=there), *schedule[index + 1 :])
    return (*schedule, scatter)


def _is_linear(schedule: Schedule) -> bool:
    """Whether nothing but sums stands between each gradient and its reduce-scatter."""
    reductions = (index for index, one in enumerate(schedule) if isinstance(one, AllReduce))
    position = next(reductions, _end_of_sum(schedule))
    return gradient_is_sharded(schedule) and not any(
        isinstance(one, Apply | Vmap | Perturb) for one in all_instructions(schedule[:position])
    )


def _gather_by_layer(schedule: Schedule, gather: AllGather, dtype: str | None) -> Schedule:
    """The loss itself gathers its parameters and scatters their gradient; a pass that counts gathers all of them."""
    instructions: list[Instruction] = []
    for one in schedule:
        match one:
            case ReduceScatter() | ShardGradient():
                continue
            case Compute():
                instructions.append(replace(one, layered=gather.axes, dtype=dtype, written=gather.written))
            case ScanMicrobatches(_, body):
                instructions.append(replace(one, body=_gather_by_layer(body, gather, dtype)))
            case CountFirst(body):
                instructions.append(replace(one, body=_gather_by_microbatch(body, gather)))
            case Across(first=first, second=second):
                first = _gather_by_microbatch(first, gather)
                second = _gather_by_layer(second, gather, dtype)
                instructions.append(replace(one, first=first, second=second, gather=_for_head(one, gather)))
            case _:
                instructions.append(one)
    return tuple(instructions)


def _for_head(one: Across, gather: AllGather) -> AllGather | None:
    return replace(gather, reason="the head needs gathered parameters") if one.head.reads else None


def _gather_by_microbatch(schedule: Schedule, gather: AllGather) -> Schedule:
    """Gather at the beginning of the innermost scan, or of the schedule if there is none; a pass that counts, too.

    Parameters that are moved along a gradient are gathered before.
    """
    if any(isinstance(one, Perturb) for one in schedule):
        return (gather, *schedule)
    if not any(isinstance(one, ScanMicrobatches | Across) for one in schedule):
        return (gather, *schedule)
    gathered: list[Instruction] = []
    for one in schedule:
        match one:
            case ScanMicrobatches(body=body) | CountFirst(body):
                gathered.append(replace(one, body=_gather_by_microbatch(body, gather)))
            case Across(first=first, second=second):
                first, second = (_gather_by_microbatch(part, gather) if part else part for part in (first, second))
                gathered.append(replace(one, first=first, second=second, gather=_for_head(one, gather)))
            case _:
                gathered.append(one)
    return tuple(gathered)


def all_instructions(schedule: Schedule) -> Schedule:
    """Every instruction, those inside others after those beside them."""
    bodies: list[Schedule] = []
    for one in schedule:
        match one:
            case ScanMicrobatches(body=body) | Vmap(body) | CountFirst(body) | RepeatSteps(body=body):
                bodies.append(body)
            case Perturb(here=here, to_value=to_value, there=there):
                bodies += [here, to_value, there]
            case Across(first=first, second=second):
                bodies += [first, second]
            case TakeTurns(turns):
                bodies += [body for _, body in turns]
            case _:
                pass
    return (*schedule, *(inner for body in bodies for inner in all_instructions(body)))


def batch_axes(program: Program) -> tuple[str, ...]:
    """The mesh axes that rows are split over, the outermost first; every turn has the same."""
    places = [node.place for node in turns_of(program)[0].program if isinstance(node, MeanNode)]
    return tuple(axis for place in places if isinstance(place, OverMesh) for axis in place.axes)


def gathers_rows(schedule: Schedule) -> bool:
    """Whether what an encoder makes of the rows is gathered, which each device then finds by their position."""
    return any(isinstance(one, Across) and one.axes for one in all_instructions(schedule))


def draws(schedule: Schedule) -> bool:
    """Whether anything draws random numbers, and so depends on the position of a row in the batch."""
    return any(
        (isinstance(one, Apply) and one.name is not None) or (isinstance(one, Compute) and one.node.rng is not None)
        for one in all_instructions(schedule)
    )


def reduces(instruction: Instruction) -> bool:
    """Whether it holds a reduction over the mesh."""
    return any(isinstance(one, AllReduce | ReduceModelState) for one in all_instructions((instruction,)))


def gradient_is_sharded(schedule: Schedule) -> bool:
    """Whether the sum of the gradient is sharded."""
    return any(
        isinstance(one, ReduceScatter | ShardGradient) or (isinstance(one, Compute) and one.layered)
        for one in all_instructions(schedule)
    )


def accumulator_is_sharded(schedule: Schedule) -> bool:
    """Whether a scan adds up shards of the gradient."""
    return any(
        isinstance(one, ScanMicrobatches) and gradient_is_sharded(one.body) for one in all_instructions(schedule)
    )


def exchange_notes(schedule: Schedule, minibatch_bytes: int) -> tuple[str, ...]:
    """What the exchange of rows costs.

    Args:
      minibatch_bytes: the bytes of all rows of one step, sharded over automatic axes alone.
    """
    return tuple(
        f"`{one.node.written}` shuffles rows across devices: each of them sends and receives {minibatch_bytes:,} B of "
        f"rows a step, one all-to-all for each leaf of the batch"
        for one in schedule
        if isinstance(one, RepeatSteps) and one.axes
    )


def sharding_notes(
    schedule: Schedule,
    rules: BoundRules,
    gradient_bytes: int,
    num_values: int,
    along_rows: tuple[str, ...],
    of_activations: tuple[str, ...],
    held_bytes: int,
) -> tuple[str, ...]:
    """What the sharding costs, where that is not what one would expect; and a cheaper choice, where there is one.

    Args:
      gradient_bytes: the bytes of the gradient that is reduced, on one device, sharded over automatic axes alone.
      num_values: how many numbers that gradient has.
      along_rows: the parameters that rules shard along an axis of the rows: their gradient is not reduced over it.
      of_activations: the axes that shard activations, and neither rows nor parameters.
      held_bytes: of parameters that are gathered beside their shards, on one device.
    """
    layout, instructions = rules.layout, all_instructions(schedule)
    iterations = _num_iterations(schedule)
    size, part = f"{gradient_bytes:,} B", f"{gradient_bytes // rules.num_parts:,} B"
    if layout.automatic:
        times = "once a step" if iterations == 1 else f"once a microbatch, {iterations} times a step"
        over = ", ".join(rules.rows)
        to_shards = f", to shards of {part}: a reduce-scatter, on CPU an all-reduce" if layout.zero else ""
        told = [f"XLA partitions the loss and sums the gradient of {size} over {over} at least {times}{to_shards}"]
        if along_rows:
            are, their = ("is", "its") if len(along_rows) == 1 else ("are", "their")
            named = listed(leaf_text(path, "the parameter") for path in along_rows)
            told.append(f"{named} {are} sharded over an axis of the rows, and {their} gradient is not reduced over it")
        return (*told, *_notes_of_gather(schedule, rules, held_bytes))
    notes = _narrower_reduction(instructions, gradient_bytes, 2 * num_values)
    if layout.zero and not gradient_is_sharded(schedule):
        why = next(
            one.reason for one in instructions if isinstance(one, AllReduce) and {*rules.shard_axes} & {*one.axes}
        )
        notes.append(f"the accumulator is replicated: {why}")
    elif iterations > 1 and (layout.zero == 2 or layout.gather != "step"):
        notes.append(
            f"the accumulator takes {part} instead of {size}, for {iterations} reduce-scatters of {size} instead of 1"
        )
    if of_activations:
        axes, times = ", ".join(of_activations), "once a step"
        if iterations > 1:
            times = f"once a microbatch, {iterations} times a step"
        if gradient_is_sharded(schedule):
            over, does, what = ", ".join(rules.shard_axes), "scatters", "its shards are"
        else:
            over, does, what = ", ".join(rules.rows), "reduces", "the sums are"
        notes.append(
            f"no parameter is sharded over {axes}: XLA adds up the gradient of {size} there {times}; where a dimension "
            f"divides, each device {does} a part of it over {over}, and {what} gathered over {axes}"
        )
    return (*notes, *_notes_of_gather(schedule, rules, held_bytes))


def _notes_of_gather(schedule: Schedule, rules: BoundRules, held_bytes: int) -> list[str]:
    if rules.layout.gather == "step" or not rules.shard_axes:
        return []
    often = f"for {_num_iterations(schedule)} all-gathers instead of 1"
    if any(isinstance(one, Compute) and one.layered for one in all_instructions(schedule)):
        notes = [f"parameters are gathered one layer at a time where the loss scans over layers, {often} and back"]
        if any(isinstance(one, AllGather) and one.is_outside for one in schedule):
            notes.append(f"those outside of that scan are held for the step: {held_bytes:,} B beside their shards")
        return notes
    return [f"gathered parameters are kept for a microbatch, not for the step, {often}"]


def notes_of_names(ignored: Mapping[str, Spec]) -> tuple[str, ...]:
    """The names that a model library gives the dimensions of parameters, by path, where no rule reads them."""
    if not ignored:
        return ()
    names = list(dict.fromkeys(name for one in ignored.values() for name in axes_of(one)))
    what = "1 parameter" if len(ignored) == 1 else f"{len(ignored)} parameters"
    quoted = [f'"{name}"' for name in names]
    rules = ", ".join([*(f"{name}: …" for name in quoted[:3]), *(["…"] if quoted[3:] else [])])
    return (
        f"the model names the dimensions of {what} ({listed(quoted)}), and no rule reads the names: "
        f"`tp(logical({{{rules}}}))` does, with a mesh axis or None for each",
    )


def _narrower_reduction(instructions: Schedule, wide: int, narrow: int) -> list[str]:
    """The choice of `reduce_dtype` where a loss that computes in bfloat16 is reduced in a wider dtype."""
    losses = [one.node for one in instructions if isinstance(one, Compute)]
    # float16 overflows in a sum over devices, so `dp` refuses it.
    is_narrow = any(wrap.computes_in == "bfloat16" for node in losses for wrap in node.wraps)
    is_wide = any(isinstance(one, AllReduce | ReduceScatter) and one.dtype is None for one in instructions)
    if not (is_narrow and is_wide) or narrow >= wide:
        return []
    return [
        f"the loss computes in bfloat16, and its gradient of {wide:,} B is reduced in float32: "
        f"`dp(…, reduce_dtype=jnp.bfloat16)` would send {narrow:,} B, rounded on each device"
    ]


def _num_iterations(schedule: Schedule) -> int:
    """How often the loops that add up the gradient run their innermost body in one pass."""
    numbers: list[int] = []
    for one in schedule:
        match one:
            case ScanMicrobatches(size, body):
                numbers.append(size * _num_iterations(body))
            case Vmap(body) | Perturb(there=body) | Across(second=body):
                numbers.append(_num_iterations(body))
            case _:
                pass
    return prod(numbers)
