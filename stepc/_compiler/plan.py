"""The texts that print: the plan of a step, and the shardings of a state as a table with drawings. It decides nothing.

Texts are compared with golden files, and read by people.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any, assert_never

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stepc._compiler.normalize import AppliedLaw
from stepc._compiler.rows import RowUse
from stepc._compiler.schedule import (
    Across,
    AllGather,
    AllReduce,
    Apply,
    Compute,
    Count,
    CountFirst,
    DivideByCount,
    Encode,
    Evaluate,
    Instruction,
    ModelStateLeaf,
    Multiply,
    Optimize,
    Perturb,
    ReduceModelState,
    ReduceScatter,
    RepeatSteps,
    ScanMicrobatches,
    Schedule,
    ShardGradient,
    TakeTurns,
    Unscale,
    Value,
    Vmap,
    all_instructions,
)
from stepc._compiler.search import SearchResult
from stepc._core.nodes import Program, Turn, show, trained_patterns
from stepc._core.sharding import axes_of, spec_text
from stepc._language.state import Placement, is_trained
from stepc._text import aligned_table, few_rows, indented_section
from stepc.errors import listed

_BY_LAYER = "one layer at a time where the loss scans over layers"
_MOST_SHARDS = 8  # of a dimension that is drawn shard by shard
_COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red")


@dataclass(frozen=True)
class LeafSharding:
    """One leaf of a state, and its sharding.

    Args:
      path: its keys joined by `/`.
      shape: of the whole array, as it is stored.
      dtype: of its elements.
      spec: its dimensions along the axes of the mesh.
      bytes_: of its shard on one device.
      total_bytes: of the whole array.
      mirrors: the parameter whose sharding it has, or why it mirrors none.
      unsharded: why `zero` does not shard it, though it shards others.
      memory: the kind of memory it is in, if that is not the device's own.
      own_shape: of the leaf without padding.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: PartitionSpec
    bytes_: int
    total_bytes: int
    mirrors: str = ""
    unsharded: str = ""
    memory: str = ""
    own_shape: tuple[int, ...] | None = None

    @property
    def type_text(self) -> str:
        """The dtype and the shape, without padding."""
        return f"{self.dtype}{list(self.shape if self.own_shape is None else self.own_shape)}"

    @property
    def padding(self) -> str:
        """The shape that it is padded to, in words; "" if it is not."""
        return "" if self.own_shape in (None, self.shape) else f"padded to {list(self.shape)}"

    @property
    def text(self) -> str:
        """The spec as it is written in source, or "replicated"; and the memory, if it is not the device's own."""
        spec = spec_text(tuple(self.spec)) if any(self.spec) else "replicated"
        return f"{spec} in {self.memory}" if self.memory else spec

    @property
    def note(self) -> str:
        """Why the sharding is what it is."""
        return ", ".join(filter(None, (self.padding, self.mirrors, self.unsharded)))


@dataclass(frozen=True, repr=False)
class ShardingTable:
    """The sharding of every leaf of a state: `str` is a table with drawings, `rich.print` adds colours."""

    rows: tuple[LeafSharding, ...]
    mesh: Mesh | None

    @property
    def bytes_(self) -> int:
        """The bytes of the state in the memory of one device."""
        return sum(row.bytes_ for row in self.rows if not row.memory)

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return "\n".join(self._lines({}))

    def __rich__(self) -> str:
        specs = dict.fromkeys(row.text for row in self.rows if any(row.spec))
        return "\n".join(self._lines({spec: _COLOURS[n % len(_COLOURS)] for n, spec in enumerate(specs)}))

    def _lines(self, colours: Mapping[str, str]) -> Iterator[str]:
        mesh = "a single device" if self.mesh is None else _sizes(tuple(self.mesh.shape.items()))
        yield f"state on {mesh}: {len(self.rows)} leaves, {self.bytes_:,} bytes per device{_and_host(self.rows)}"
        width = max((len(f"{row.bytes_:,} B") for row in self.rows), default=0)
        columns = few_rows(
            [(row.path, row.type_text, row.text, f"{row.bytes_:,} B".rjust(width), row.note) for row in self.rows]
        )
        for (_, _, spec, *_), line in zip(columns, aligned_table(columns), strict=True):
            if colours:  # rich reads brackets as markup
                line = line.replace("[", r"\[")
            if colour := colours.get(spec):
                line = line.replace(spec, f"[{colour}]{spec}[/{colour}]", 1)
            yield f"  {line}"
        for spec in dict.fromkeys(row.spec for row in self.rows if any(row.spec)):
            first, *others = [row for row in self.rows if row.spec == spec]
            yield ""
            yield f"  {first.path}{f' and {len(others)} more' if others else ''}: {first.text}"
            yield from (f"    {line}" for line in _drawn(first, self.mesh))


@dataclass(frozen=True)
class PlannedCollective:
    """One collective that the schedule asks for.

    `executions` counts per step, or per dispatch under `repeat`; what an optimizer evaluates, per evaluation.
    """

    kind: str
    axes: tuple[str, ...]
    executions: int
    in_loop: bool
    reason: str
    per: str = "step"


@dataclass(frozen=True)
class Plan:
    """What the compiler decided.

    Args:
      pipeline: the pipeline as it was written.
      mesh: axis sizes by name, in the order of the mesh; empty for a single device.
      core: the core program before any law.
      laws: every law that was applied, with the program before and after it.
      schedule: the instructions, in order.
      rows: the mesh axes that the rows of a batch are sharded over.
      leaves: every leaf of the state; all of them are donated.
      notes: what the sharding costs where that may surprise.
      model_state: the leaves of the model state, with their rules.
      accumulator: for each parameter, the shape of its gradient on one device while microbatches are summed.
      search: how `accumulate(memory=...)` found its k; None if the pipeline states every number.
      losses: each loss as written, and what it does with the rows that it is given; none where the batch is not split.
      reordered: how many convolutions in loops are computed channels last, where the loss or its gradient has others.
    """

    pipeline: str
    mesh: tuple[tuple[str, int], ...]
    core: Program
    laws: tuple[AppliedLaw, ...]
    schedule: Schedule
    rows: tuple[str, ...]
    leaves: tuple[LeafSharding, ...]
    notes: tuple[str, ...] = ()
    model_state: tuple[ModelStateLeaf, ...] = ()
    accumulator: tuple[tuple[int, ...], ...] = ()
    search: SearchResult | None = None
    losses: tuple[tuple[str, RowUse], ...] = ()
    reordered: int = 0

    @property
    def normal(self) -> Program:
        """The core program after all laws."""
        return self.laws[-1].after if self.laws else self.core

    @property
    def frozen(self) -> tuple[LeafSharding, ...]:
        """The parameters that are not trained."""
        wrt = trained_patterns(self.core)
        params = [(leaf.path.partition("/"), leaf) for leaf in self.leaves]
        return tuple(leaf for (field, _, path), leaf in params if field == "params" and not is_trained(path, wrt))

    @property
    def loop_length(self) -> int:
        """The number of microbatches that the loops scan over; 1 without a loop."""
        return max(_loop_lengths(self.schedule, 1))

    @property
    def collectives(self) -> tuple[PlannedCollective, ...]:
        """Every collective, with its place and the reason for it."""
        return tuple(_collectives(self.schedule, 1))

    def __str__(self) -> str:
        return "\n\n".join(indented_section(title, lines) for title, lines in self._sections())

    def _sections(self) -> Iterator[tuple[str, list[str]]]:
        yield f"plan of {self.pipeline}", []
        yield "mesh", [_sizes(self.mesh) or "none: a single device"]
        if self.search is not None:
            yield "search", str(self.search).splitlines()
        programs = [(f"{one.law.name}: {one.law.formula}", show(one.after)) for one in self.laws]
        yield "normal form", aligned_table([("as written", show(self.core)), *programs])
        if self.laws:
            laws = dict.fromkeys(one.law for one in self.laws)
            yield "laws", aligned_table([(law.name, law.reason, f"holds for {law.condition}") for law in laws])
        is_repeated = any(isinstance(one, RepeatSteps) for one in self.schedule)
        yield f"schedule of one {'dispatch' if is_repeated else 'step'}", list(_lines(self.schedule))
        no_collectives = "none in the schedule; XLA inserts its own" if self.rows else "none"
        yield "collectives", aligned_table(map(_row, self.collectives)) or [no_collectives]
        yield "batch", [f"rows sharded over {', '.join(self.rows)}" if self.rows else "replicated"]
        of_losses = [f"{written}: {use}" for written, use in self.losses]
        if self.reordered:
            what = f"{self.reordered} convolution{'s' if self.reordered > 1 else ''} in a loop"
            of_losses.append(f"{what}, computed channels last: XLA's CPU backend computes no other order fast there")
        if of_losses:
            yield "loss", of_losses
        if frozen := self.frozen:
            size = f"{sum(leaf.total_bytes for leaf in frozen):,} bytes"
            what = f"{len(frozen)} {'leaf' if len(frozen) == 1 else 'leaves'}, {size}"
            yield "frozen", [f"{what}: no gradient, no reduction, no optimizer state; handed through in place"]
        if self.notes:
            yield "sharding", list(self.notes)
        total, local = sum(leaf.total_bytes for leaf in self.leaves), ShardingTable(self.leaves, None).bytes_
        host = _and_host(self.leaves)
        size = f"{total:,} bytes" + (f" ({local:,} per device{host})" if local != total else "")
        leaves = few_rows(list(map(_leaf, self.leaves)))
        yield f"state: {len(self.leaves)} leaves, {size}, all donated", aligned_table(leaves)
        if self.model_state:
            yield "model state", aligned_table(map(_model_state, self.model_state))


def notes_of_stacks(stacks: Sequence[str], leaves: Sequence[LeafSharding], mesh: Mesh | None) -> tuple[str, ...]:
    """The stacks of layers that `tp` shards along their layers, so that XLA gathers them for the scan over layers.

    Args:
      stacks: the paths of the parameters that the loss scans over.
    """
    by_path = {leaf.path: leaf for leaf in leaves}
    found = [leaf for path in stacks if (leaf := by_path[f"params/{path}"]).spec and leaf.spec[0] is not None]
    if mesh is None or not found:
        return ()
    whole = [leaf.bytes_ * prod(mesh.shape[axis] for axis in axes_of(leaf.spec[:1])) for leaf in found]
    over = ", ".join(dict.fromkeys(axis for leaf in found for axis in axes_of(leaf.spec[:1])))
    named = listed(f"`{leaf.path.partition('/')[2]}`" for leaf in found)
    return (
        f"the loss scans over layers of {named}, along the dimension that {over} shards: XLA gathers {sum(whole):,} B "
        f"over {over} for the forward scan, and again for the backward; shard another dimension",
    )


def notes_of_padding(leaves: Sequence[LeafSharding]) -> tuple[str, ...]:
    """What is padded, and how much larger the state is for it."""
    found = [leaf for leaf in leaves if leaf.padding]
    if not found:
        return ()
    params = [leaf for leaf in found if leaf.path.partition("/")[0] == "params"]
    named = listed(f"`{leaf.path.partition('/')[2]}` {_padded_dimensions(leaf)}" for leaf in params)
    # The mean over devices: all the padding of a leaf is at the end of its last shards.
    sizes = (leaf.bytes_ * (1 - prod(leaf.own_shape or ()) / prod(leaf.shape)) for leaf in found)
    what = f"{len(found)} leaves of the state take" if len(found) > 1 else "it takes"
    return (f"padded: {named}; {what} {round(sum(sizes)):,} B more on each device",)


def _padded_dimensions(leaf: LeafSharding) -> str:
    triples = zip(leaf.own_shape or (), leaf.shape, leaf.spec, strict=False)
    return " and ".join(
        f"from {own:,} to {stored:,} along {', '.join(axes_of((entry,)))}"
        for own, stored, entry in triples
        if own != stored
    )


def notes_of_matrices(
    update: Instruction,
    trained: Sequence[tuple[str, Any]],  # Any: the shape of a leaf
    placement: Placement,
    in_parts: Mapping[int, int],
    shared: Collection[int],
) -> tuple[str, ...]:
    """What becomes of the matrices that an optimizer multiplies.

    Args:
      update: the last instruction of a turn.
      in_parts: as `matrices_in_parts` finds it.
      shared: as `matrices_shared` finds it.
    """
    matrices = {path for path, place in placement if place.is_matrix}
    if not isinstance(update, Optimize):
        return ()
    found: dict[str, list[int]] = {}
    for place, (path, _) in enumerate(trained):
        if f"params/{path}" in matrices:
            kind = "shared" if place in shared else {None: "whole", 0: "moved", -1: "gathered"}[in_parts.get(place)]
            found.setdefault(kind, []).append(place)

    def size(kind: str) -> str:
        return f"{sum(trained[place][1].size * trained[place][1].dtype.itemsize for place in found[kind]):,} B"

    become = {
        "whole": lambda: "each device has whole ones",
        "shared": lambda: (
            f"an all-to-all of {size('shared')} gives each device some, whole, and another takes them back"
        ),
        "moved": lambda: f"an all-to-all of {size('moved')} gives each device whole ones, and another takes them back",
        "gathered": lambda: f"{size('gathered')} are gathered once a step, and every device computes all of it",
    }
    names = {kind: listed(f"`{trained[place][0]}`" for place in places) for kind, places in found.items()}
    return tuple(f"`{update.node.written}` multiplies matrices of {names[kind]}: {become[kind]()}" for kind in names)


def notes_of_offload(leaves: Sequence[LeafSharding]) -> tuple[str, ...]:
    """What a state in the memory of the host costs."""
    sizes = [leaf.bytes_ for leaf in leaves if leaf.memory]
    if not sizes:
        return ()
    what = f"{len(sizes)} {'leaf' if len(sizes) == 1 else 'leaves'} of the state, {sum(sizes):,} B per device"
    return (f"{what}, in the memory of the host: a call moves what it uses to the device, and what it changes back",)


def _and_host(leaves: Sequence[LeafSharding]) -> str:
    """The bytes of the state that one device keeps in the memory of the host, if any."""
    in_host = sum(leaf.bytes_ for leaf in leaves if leaf.memory)
    return f", {in_host:,} in {next(leaf.memory for leaf in leaves if leaf.memory)}" if in_host else ""


def _sizes(mesh: tuple[tuple[str, int], ...]) -> str:
    return ", ".join(f"{name}={size}" for name, size in mesh)


def _row(one: PlannedCollective) -> tuple[str, ...]:
    times = f"{one.executions} per {one.per}, {'in the loop' if one.in_loop else 'outside any loop'}"
    return (one.kind, f"over {', '.join(one.axes)}", times, one.reason)


def _leaf(leaf: LeafSharding) -> tuple[str, ...]:
    what = "; ".join(filter(None, (leaf.padding, leaf.unsharded)))
    why = f" ({leaf.bytes_:,} B; {what})" if what else ""
    return (leaf.path, leaf.type_text, f"{leaf.text}{why}")


def _model_state(leaf: ModelStateLeaf) -> tuple[str, ...]:
    return (*([leaf.turn] if leaf.turn else []), leaf.path, leaf.cost)


def _lines(schedule: Schedule, depth: int = 0, unit: str = "local microbatch") -> Iterator[str]:
    """The schedule, indented by loop. `unit` is what one call of the loss sees."""
    for position, one in enumerate(schedule):
        if line := _line(one, schedule[:position], unit):
            yield "  " * depth + line
        match one:
            case Vmap(body):
                yield from _lines(body, depth + 1, "row")
            case ScanMicrobatches(body=body) | CountFirst(body) | RepeatSteps(body=body):
                yield from _lines(body, depth + 1, unit)
            case Perturb(here=here, to_value=to_value, there=there):
                yield from _lines((*here, *to_value), depth + 1, unit)
                yield "  " * depth + "at the moved parameters"
                yield from _lines(there, depth + 1, unit)
            case Across(first=first, second=second):
                yield from _lines(first, depth + 1, unit)
                yield from ("  " * (depth + 1) + line for line in _head_lines(one))
                yield from _lines(second, depth + 1, unit)
            case TakeTurns(turns):
                for turn, body in turns:
                    yield "  " * depth + _turn(turn)
                    yield from _lines(body, depth + 1, unit)
                if after := _after_turns(one):
                    yield "  " * depth + after
            case Optimize(evaluate=Evaluate() as evaluate):
                for per, body in _evaluations(evaluate):
                    yield "  " * (depth + 1) + f"every {per} that the optimizer asks for"
                    yield from _lines(body, depth + 2, unit)
            case _:
                pass


def _head_lines(one: Across) -> Iterator[str]:
    """What happens between the two passes of a loss of the whole batch."""
    over = f"over {', '.join(one.axes)} ({one.num_devices} devices)"
    if one.axes and one.head.rows:
        yield f"all-gather of z {over}, {_sizes_of_rows(one)}: the head needs the rows of the whole batch"
    if one.axes and one.head.sums:
        yield f"all-reduce of the sums in z {over}: the head needs those of the whole batch"
    if one.gather is not None and (line := _line(one.gather, (), "")):
        yield line
    reads = f" and of {listed(one.head.reads)}, which it reads" if one.head.reads else ""
    how = (
        f"{'value and gradient' if one.gives_gradient else 'value'} once{', on every device alike' if one.axes else ''}"
    )
    yield f"head: {how}, of z{reads}"


def _sizes_of_rows(one: Across) -> str:
    return " and ".join(f"{size:,} B of {dtype}" for dtype, size in one.head.rows)


def _turn(turn: Turn) -> str:
    often = f", in each step whose number is a multiple of {turn.every}" if turn.every > 1 else ""
    return f"turn {turn.name}{often}"


def _after_turns(turns: TakeTurns) -> str:
    """What happens with all turns or not at all."""
    text = ", then ".join(node.written for _, node in turns.follows)
    if turns.guard is None:
        return text
    kept = f"otherwise the state before the first, of which a copy is kept (`{turns.guard[1].written}`)"
    return f"{text or 'the new state'}, if every turn is finite; {kept}"


def _evaluations(evaluate: Evaluate) -> tuple[tuple[str, Schedule], ...]:
    """What each evaluation of the loss of the whole batch runs."""
    gather = () if evaluate.gather is None else (evaluate.gather,)
    return ("value of the loss", (*gather, *evaluate.value)), ("gradient of the loss", (*gather, *evaluate.gradient))


def _line(one: Instruction, before: Schedule, unit: str) -> str | None:
    match one:
        case Compute(node, pulls_back=True, layered=layered):
            how = (
                f"; gathers parameters and scatters their gradient over {', '.join(layered)}, {_BY_LAYER}"
                if layered
                else ""
            )
            return f"{node.written}: encodes one {unit} again, and pulls back the cotangents of its rows{how}"
        case Encode(node):
            return f"{node.written}: encodes one {unit}, without a gradient"
        case Across(node):
            return f"two passes: the head of `{node.written}` needs what the encoder makes of the whole batch"
        case Compute(node, counts_first, rescaled, layered=layered):
            how = ", each term divided by its count" if counts_first else ""
            how += ", times the loss scale" if rescaled else ""
            how += (
                f"; gathers parameters and scatters their gradient over {', '.join(layered)}, {_BY_LAYER}"
                if layered
                else ""
            )
            return f"{node.written}: value and gradient of one {unit}{how}"
        case Value(node):
            return f"{node.written}: value of one {unit}"
        case Count(node):
            return f"{node.written}: only the counts of one {unit}"
        case CountFirst():
            return "count first: the terms have different counts, which divide them before their gradients are summed"
        case ScanMicrobatches(size, body, dtype):
            joins = any(isinstance(one, Encode) for one in all_instructions(body))
            what = "join" if joins else f"sum{_in(dtype)}"
            return f"scan {size} microbatches and {what}: microbatch j has the rows i with i mod {size} = j"
        case Vmap():
            return "vmap over the rows and sum"
        case AllReduce(axes, num_devices, reason, apart, scattered, dtype):
            shards = [axis for axis in axes if axis not in scattered]
            what = "" if not scattered else " of metrics and replicated leaves"
            also = f", and of shards over {', '.join(shards)}" if scattered and shards else ""
            also += f", then {' and '.join(apart)} of metrics" if apart else ""
            return f"all-reduce{what} over {', '.join(axes)} ({num_devices} devices){_in(dtype)}{also}: {reason}"
        case ReduceScatter(axes, num_devices, reason, dtype):
            return f"reduce-scatter over {', '.join(axes)} ({num_devices} devices){_in(dtype)}: {reason}"
        case ShardGradient(axes, num_devices, reason):
            return f"reduce the gradient to shards over {', '.join(axes)} ({num_devices} devices), by XLA: {reason}"
        case AllGather(axes, num_devices, reason):
            return f"all-gather of parameters over {', '.join(axes)} ({num_devices} devices): {reason}"
        case ReduceModelState(axes, num_devices, reason):
            kinds = ", ".join(one.kinds)
            return f"all-reduce of the model state over {', '.join(axes)} ({num_devices} devices), {kinds}: {reason}"
        case Multiply(factor):
            return f"multiply by {factor}"
        case Unscale(node):
            return f"divide by the loss scale of `{node.written}`"
        case DivideByCount():
            return _divisor(one, before)
        case Apply(node):
            return node.written
        case Perturb(node):
            return f"{node.written}: moves the parameters by the gradient at the parameters themselves"
        case Optimize(node, _, follows, guard, rescale, gather):
            text = ", then ".join((node.written, *(node.written for _, node in follows)))
            if guard is not None:
                text += f", if the loss and the gradient are finite; otherwise the state is kept (`{guard[1].written}`)"
            elif rescale is not None:
                text += f", if the gradient is finite; otherwise the state is kept (`{rescale[1].written}`)"
            return text if gather is None else f"{text}; then {_line(gather, (), unit)}"
        case TakeTurns():
            return None
        case RepeatSteps(node, _, axes, num_devices):
            if node.minibatches is None:
                return f"scan {node.size} steps (`{node.written}`)"
            over = f" by an all-to-all over {', '.join(axes)} ({num_devices} devices)" if axes else ""
            numbers = f"{node.size // node.minibatches} epochs of {node.minibatches} steps"
            return f"scan {numbers} (`{node.written}`): each epoch shuffles the rows, each step takes a minibatch{over}"
        case _:
            assert_never(one)


def _in(dtype: str | None) -> str:
    return f" in {dtype}" if dtype else ""


def _divisor(one: DivideByCount, before: Schedule) -> str | None:
    match one.by:
        case "count":
            return "divide by the count that was summed with it"
        case "microbatches" if one.microbatches != 1 or one.vmapped:
            microbatches, devices = _num_summed(before)
            each = one.microbatches / (microbatches * devices)
            factors = [f"{microbatches} microbatches"] if microbatches > 1 else []
            factors += [f"{devices} devices"] if devices > 1 else []
            factors += [f"{each:g} counted by each"] if each != 1 else []
            factors += ["the rows of each"] if one.vmapped else []
            number = " × ".join(
                [*([f"{one.microbatches:g}"] if one.microbatches != 1 else []), *(["rows"] if one.vmapped else [])]
            )
            return f"divide by {number}: {' × '.join(factors)}"
        case _:
            return None


def _num_summed(schedule: Schedule) -> tuple[int, int]:
    """The microbatches and the devices in a sum, since a transform last took its value."""
    microbatches = devices = 1
    for one in schedule:
        match one:
            case ScanMicrobatches(size, body):
                inner = _num_summed(body)
                microbatches, devices = microbatches * size * inner[0], devices * inner[1]
            case AllReduce(num_devices=num_devices):
                devices *= num_devices
            case Perturb(there=there) | Across(second=there):
                inner = _num_summed(there)
                microbatches, devices = microbatches * inner[0], devices * inner[1]
            case Apply():
                microbatches = devices = 1
            case _:
                pass
    return microbatches, devices


def _loop_lengths(schedule: Schedule, times: int) -> Iterator[int]:
    yield times
    for one in schedule:
        match one:
            case ScanMicrobatches(size, body):
                yield from _loop_lengths(body, times * size)
            case Vmap(body) | RepeatSteps(_, body) | Perturb(there=body) | Across(second=body):
                yield from _loop_lengths(body, times)
            case TakeTurns(turns):
                for _, body in turns:
                    yield from _loop_lengths(body, times)
            case _:
                pass


def _collectives(schedule: Schedule, times: int) -> Iterator[PlannedCollective]:
    def planned(kind: str, axes: tuple[str, ...], reason: str) -> PlannedCollective:
        return PlannedCollective(kind, axes, times, times > 1, reason)

    for one in schedule:
        match one:
            case ScanMicrobatches(size, body):
                yield from _collectives(body, times * size)
            case TakeTurns(turns):
                for turn, body in turns:
                    often = f" every {turn.every} steps" if turn.every > 1 else ""
                    for inner in _collectives(body, times):
                        yield replace(inner, reason=f"{turn.name}{often}: {inner.reason}")
            case RepeatSteps(node, body, axes):
                if axes:
                    reason = f"`{node.written}` takes the rows of a minibatch from all devices"
                    yield PlannedCollective("all-to-all", axes, times * node.size, True, reason, "dispatch")
                for inner in _collectives(body, times * node.size):
                    yield replace(inner, per="dispatch") if inner.per == "step" else inner
            case Optimize(evaluate=Evaluate() as evaluate):
                for per, body in _evaluations(evaluate):
                    yield from (replace(inner, per=per) for inner in _collectives(body, 1))
                if one.gather is not None:
                    yield planned("all-gather", one.gather.axes, one.gather.reason)
            case CountFirst(body) | Vmap(body):
                yield from _collectives(body, times)
            case Perturb(here=here, to_value=to_value, there=there):
                for body in (here, to_value, there):
                    yield from _collectives(body, times)
            case Across(first=first, second=second, axes=axes, gather=gather):
                yield from _collectives(first, times)
                for dtype, size in one.head.rows if axes else ():
                    why = f"z, {size:,} B of {dtype}: the head needs the rows of the whole batch"
                    yield planned("all-gather", axes, why)
                for dtype in one.head.sums if axes else ():
                    yield planned("all-reduce", axes, f"sums in z, {dtype}: the head needs those of the whole batch")
                yield from _collectives(() if gather is None else (gather,), times)
                yield from _collectives(second, times)
            case Compute(layered=(_, *_) as axes):
                yield planned("all-gather", axes, f"parameters, {_BY_LAYER}")
                yield planned("reduce-scatter", axes, f"their gradient, {_BY_LAYER}")
            case ReduceScatter(axes, _, reason) | ShardGradient(axes, _, reason):
                yield planned("reduce-scatter", axes, reason)
            case AllGather(axes, _, reason) | Optimize(gather=AllGather(axes, _, reason)):
                yield planned("all-gather", axes, reason)
            case AllReduce(axes, _, reason, apart):
                yield planned("all-reduce", axes, reason)
                for kind in apart:
                    yield planned("all-reduce", axes, f"{kind} of metrics: not a sum in the dtype of the gradient")
            case ReduceModelState(axes, _, reason):
                for kind in one.kinds:
                    yield planned("all-reduce", axes, f"{reason}, {kind}")
            case _:
                pass


def _drawn(row: LeafSharding, mesh: Mesh | None) -> Iterator[str]:
    """The leaf cut into its shards, each with the ids of the devices that hold it."""
    if mesh is None:
        return
    cut = [dim for dim, entry in enumerate(row.spec) if entry is not None]
    shards = [prod(mesh.shape[axis] for axis in axes_of((row.spec[dim],))) for dim in cut]
    if len(cut) > 2 or max(shards) > _MOST_SHARDS:
        yield " × ".join(f"{number} shards of dimension {dim}" for dim, number in zip(cut, shards, strict=True))
        return
    devices: dict[tuple[int, ...], list[int]] = {}
    for device, index in NamedSharding(mesh, row.spec).devices_indices_map(row.shape).items():
        starts = zip(cut, shards, strict=True)
        shard = tuple((index[dim].start or 0) * number // row.shape[dim] for dim, number in starts)
        devices.setdefault(shard, []).append(device.id)
    heights, widths = (shards[0], shards[1]) if len(cut) == 2 else (1, shards[0])
    cells = {
        (top, left): ",".join(map(str, sorted(devices[(top, left) if len(cut) == 2 else (left,)])))
        for top, left in product(range(heights), range(widths))
    }
    width = max(map(len, cells.values())) + 2
    bar = "─" * width
    yield f"┌{'┬'.join([bar] * widths)}┐"
    for top in range(heights):
        if top:
            yield f"├{'┼'.join([bar] * widths)}┤"
        yield f"│{'│'.join(cells[top, left].center(width) for left in range(widths))}│"
    yield f"└{'┴'.join([bar] * widths)}┘"
