"""What a compiled program sends between devices, how often, and which line of the source asked for it."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import overload

import jax
import numpy as np

from stepc._text import aligned_table, readable_bytes
from stepc.inspect.cost import instruction_flops
from stepc.inspect.hlo import Computation, Instruction, Module, Shape, parse, text_of
from stepc.inspect.loops import ExecutionCount, executions

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)


@dataclass(frozen=True)
class Overlap:
    """What is scheduled between the start of an asynchronous collective and its done.

    Attributes:
      instructions: the names of the instructions that do work.
      flops: of their matrix products and convolutions; None if one is in a loop of unknown trip count.
    """

    instructions: tuple[str, ...]
    flops: int | None

    def __str__(self) -> str:
        if not self.instructions:
            return "nothing"
        count = f"{len(self.instructions)} instruction{'s' if len(self.instructions) > 1 else ''}"
        return f"{count}, {'unknown' if self.flops is None else f'{self.flops:,}'} flops"


@dataclass(frozen=True)
class Collective:
    """One collective of the compiled program.

    Attributes:
      kind: HLO's name for it, without `-start`: "all-reduce", "reduce-scatter", "all-gather", ...
      bytes: the size of the full array of one execution on one device, without padding: the input of an all-reduce,
        reduce-scatter, all-to-all or permute; the output of an all-gather; the whole input buffer of a
        ragged-all-to-all. It is not the traffic on the wire.
      axes: the mesh axes along which the devices of a group differ; `()` if no mesh is known.
      executions: how often it runs while the program runs once, trip counts multiplied; None if a loop on the way has
        no known trip count.
      in_loop: whether it runs in a loop, at any depth.
      conditional: whether it runs in a branch; `executions` is then an upper bound.
      asynchronous: whether the program starts it and waits for it later.
      source: "train.py:41 (op_name)", the user's own line; or the transform that asked for it, as written and with its
        line; or what else the metadata has. Never a file of stepc.
      parameters: the paths of the parameters whose values or gradients it carries, as a step of stepc names them:
        "layers/*/w x12, head"; "" where none are known. A `?` stands for a character that compiled text cannot have.
      payload: the arrays that `bytes` adds up.
      name: the name of the instruction in HLO.
      group_size: how many devices take part in one group.
      loops: the loops around it with their trip counts, outermost first: ("microbatches/while x4",).
      overlap: what is scheduled while an asynchronous one runs; None if that is unknown.
    """

    kind: str
    bytes: int
    axes: tuple[str, ...]
    executions: int | None
    in_loop: bool
    conditional: bool
    asynchronous: bool
    source: str
    payload: tuple[Shape, ...] = ()
    name: str = ""
    group_size: int = 1
    loops: tuple[str, ...] = ()
    overlap: Overlap | None = None
    parameters: str = ""


@dataclass(frozen=True)
class Collectives(Sequence[Collective]):
    """The collectives of a program, in the order of its text. `print` shows them as a table."""

    rows: tuple[Collective, ...]

    @overload
    def __getitem__(self, index: int) -> Collective: ...
    @overload
    def __getitem__(self, index: slice) -> "Collectives": ...
    def __getitem__(self, index: int | slice) -> "Collective | Collectives":
        return self.rows[index] if isinstance(index, int) else Collectives(self.rows[index])

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        if not self.rows:
            return "no collectives"
        header = ("kind", "size", "axes", "executions", "in loop", "overlaps with", "parameters", "source")
        table = [header, *map(_cells, self.rows)]
        optional = {5: any(row.overlap is not None for row in self.rows), 6: any(row.parameters for row in self.rows)}
        shown = [[cell for column, cell in enumerate(cells) if optional.get(column, True)] for cells in table]
        return "\n".join(aligned_table(shown))

    @property
    def in_loops(self) -> "Collectives":
        """Those that run in a loop, at any depth."""
        return Collectives(tuple(row for row in self.rows if row.in_loop))

    @property
    def executed_bytes(self) -> int:
        """The sum of bytes * executions. A branch counts as if it were always taken.

        Errors: ValueError if some row has an unknown number of executions: a sum without it would be no bound.
        """
        unknown = [
            f"  {row.kind}  {readable_bytes(row.bytes)}  {row.source}" for row in self.rows if row.executions is None
        ]
        if unknown:
            raise ValueError("\n".join(["It is unknown how often these collectives run:", "", *unknown]))
        return sum(row.bytes * row.executions for row in self.rows if row.executions is not None)

    def over(self, axis: str) -> "Collectives":
        """Those that communicate along this mesh axis, alone or with others."""
        return Collectives(tuple(row for row in self.rows if axis in row.axes))


def collectives(compiled: jax.stages.Compiled | str, mesh: jax.sharding.Mesh | None = None) -> Collectives:
    """List what a compiled program sends between devices.

    Meaning: one row for each collective of the optimised HLO; a start and its done are one row.
    Why: only the compiled program shows whether a step reduces its gradient once, or once a microbatch.

    Args:
      compiled: what `jax.jit(f).lower(...).compile()` returns, or its `as_text()`.
      mesh: names the axes. By default the mesh of the executable's own shardings, if they share one; the rows of a
        text then have no axes.
    Units:  bytes on one device, for one execution.
    Errors: ValueError if the backend prints no HLO, or if the size of the mesh is not that of the program.
    A row that XLA cannot trace to a line has the name of the operation as its source, or nothing.
    Example:
      >>> print(collectives(jax.jit(lambda x: 2 * x).lower(1.0).compile()))
      no collectives

    Source: ours.
    """
    module = parse(text_of(compiled))
    if mesh is not None and mesh.size != module.num_devices:
        raise ValueError(f"The program is for {module.num_devices} devices; the mesh has {mesh.size}.")
    if mesh is None and not isinstance(compiled, str):
        mesh = _own_mesh(compiled, module.num_devices)
    known = executions(module)
    continued, starts = _asynchronous(module)
    rows = (
        _row(module, computation, instruction, known[computation.name], mesh, starts.get(computation.name))
        for computation in module.computations.values()
        if computation.name not in continued
        for instruction in computation.instructions.values()
        if instruction.opcode.removesuffix("-start") in KINDS
    )
    return Collectives(tuple(rows))


def groups(module: Module, instruction: Instruction) -> tuple[tuple[int, ...], ...]:
    """List the groups of devices that communicate, as positions in the program's device order.

    Meaning: `replica_groups` in any of its notations; a permute has one group for each pair.
    Why: XLA writes the same groups in four ways.

    Args:
      module: the program, which knows the number of devices; `replica_groups={}` means all of them.
      instruction: a collective.
    Errors: ValueError for an unknown notation of `replica_groups`.
    The numbers are taken for partition numbers, as they are in every program with one replica.
    Source: XLA, replica_group.cc and mesh_and_axis.cc, https://github.com/openxla/xla.
    """
    attributes = instruction.attributes
    if pairs := _PAIRS.search(attributes):
        return _listed(pairs[1])
    if explicit := _EXPLICIT.search(attributes):
        return _listed(explicit[1])
    if iota := _IOTA.search(attributes):
        return _rows(_iota(iota[2]).reshape(_sizes(iota[1])))
    if mesh := _MESH.search(attributes):
        return _mesh_groups(mesh[1], mesh[2], mesh[3])
    if "replica_groups=" in attributes and not re.search(r"replica_groups=\{\s*\}", attributes):
        raise ValueError(f"`{instruction.name}` has replica groups in an unknown notation: {attributes[:200]}")
    return (tuple(range(module.num_devices)),)


def axes_of(grouped: tuple[tuple[int, ...], ...], mesh: jax.sharding.Mesh) -> tuple[str, ...]:
    """Name the mesh axes whose coordinate differs between two members of some group."""
    largest = max((member for group in grouped for member in group), default=0)
    if largest >= mesh.size:
        raise ValueError(f"The program uses device {largest}; the mesh has {mesh.size} devices, numbered from 0.")
    # The numbers are positions in `mesh.devices.flat`, not device ids: on a mesh of reversed or permuted devices,
    # jax 0.10.2 prints the same groups as on the mesh in order (tests/inspect/test_collectives.py).
    varies = [False] * len(mesh.axis_names)
    for group in grouped:
        coordinates = np.unravel_index(np.asarray(group, dtype=np.int64), mesh.devices.shape)
        varies = [old or np.unique(new).size > 1 for old, new in zip(varies, coordinates, strict=True)]
    return tuple(name for name, varied in zip(mesh.axis_names, varies, strict=True) if varied)


def _own_mesh(compiled: jax.stages.Compiled, num_devices: int) -> jax.sharding.Mesh | None:
    """The mesh of the executable's shardings, if there is exactly one."""
    shardings = jax.tree.leaves((compiled.input_shardings, compiled.output_shardings))
    named = [sharding for sharding in shardings if isinstance(sharding, jax.sharding.NamedSharding)]
    meshes = {sharding.mesh for sharding in named if isinstance(sharding.mesh, jax.sharding.Mesh)}
    meshes = {mesh for mesh in meshes if mesh.size == num_devices}
    return meshes.pop() if len(meshes) == 1 else None


def _asynchronous(module: Module) -> tuple[set[str], dict[str, tuple[Computation, Instruction]]]:
    """The computations that only continue what a start began; and, for each that a start runs, where that start is."""
    continued: set[str] = set()
    starts: dict[str, tuple[Computation, Instruction]] = {}
    for computation in module.computations.values():
        for instruction in computation.instructions.values():
            called = [call.computation for call in instruction.calls]
            if _continues(instruction):
                continued.update(called)
            elif instruction.opcode.endswith("-start") or "async-collective-start" in instruction.name:
                starts.update((name, (computation, instruction)) for name in called)
    return continued, starts


def _continues(instruction: Instruction) -> bool:
    """Whether this is a later part of an asynchronous TPU fusion, whose start contains the same collective."""
    if instruction.opcode != "fusion":
        return False
    names = " ".join([instruction.name, *(call.computation for call in instruction.calls)]).replace("_", "-")
    return "async-collective" in names and "start" not in names


def _row(
    module: Module,
    computation: Computation,
    instruction: Instruction,
    execution: ExecutionCount,
    mesh: jax.sharding.Mesh | None,
    start: tuple[Computation, Instruction] | None,
) -> Collective:
    kind = instruction.opcode.removesuffix("-start")
    # libtpu prints a reduce-scatter as a fusion of an all-reduce and a slice; only the fusion's name shows it.
    if kind == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    # On a GPU, a start may still be synchronous.
    is_synchronous = re.search(r'"is_sync\\?":\s*true', instruction.attributes) is not None
    is_start = instruction.opcode.endswith("-start") and not is_synchronous
    is_asynchronous = execution.asynchronous or is_start
    grouped = groups(module, instruction)
    payload = _payload(kind, computation, instruction)
    return Collective(
        kind=kind,
        bytes=sum(shape.bytes for shape in payload),
        axes=() if mesh is None else axes_of(grouped, mesh),
        executions=execution.count,
        in_loop=execution.in_loop,
        conditional=execution.conditional,
        asynchronous=is_asynchronous,
        source=module.source(instruction),
        parameters=module.parameters(instruction),
        payload=payload,
        name=instruction.name,
        group_size=max(map(len, grouped)),
        loops=execution.loops,
        overlap=_overlap(module, *(start or (computation, instruction))) if is_asynchronous else None,
    )


def _payload(kind: str, computation: Computation, instruction: Instruction) -> tuple[Shape, ...]:
    """The arrays whose bytes count."""
    operands = [computation.instructions[name].shapes for name in instruction.operands]
    leaves = tuple(leaf for shapes in operands for leaf in shapes)
    if kind == "ragged-all-to-all":  # the other operands are the output buffer, the offsets and the sizes
        return operands[0]
    if kind != "all-gather":
        return leaves
    if instruction.opcode == kind:
        return instruction.shapes
    # A start returns its operands, then its results, then what the backend needs to wait for it.
    return instruction.shapes[len(leaves) : 2 * len(leaves)]


# These take no time: they name a part of a value, or wait.
_FREE = ("bitcast", "constant", "get-tuple-element", "parameter", "tuple", "opt-barrier", "after-all")


def _overlap(module: Module, computation: Computation, start: Instruction) -> Overlap | None:
    """What is scheduled between `start` and the last instruction that waits for it; None if none does.

    A collective is hidden only by what is scheduled while it runs. The text of a computation is in the order of
    execution, because a compiled program is scheduled.
    """
    following = list(computation.instructions.values())
    following = following[following.index(start) + 1 :]
    waiting, end = {start.name}, None
    for at, instruction in enumerate(following):
        if not waiting & set(instruction.operands):
            continue
        continues = _continues(instruction)
        if continues or instruction.opcode.endswith(("-done", "-update")):
            end = at
        if continues or instruction.opcode.endswith("-update") or instruction.opcode == "get-tuple-element":
            waiting.add(instruction.name)
    if end is None:
        return None
    # The middle part of a TPU fusion counts as work: it computes while the collective runs.
    work = [
        each
        for each in following[:end]
        if each.opcode not in _FREE and not each.opcode.endswith(("-start", "-done", "-update"))
    ]
    counts = [instruction_flops(module, computation, each) for each in work]
    known = [count for count in counts if count is not None]
    return Overlap(tuple(each.name for each in work), sum(known) if len(known) == len(counts) else None)


def _cells(row: Collective) -> tuple[str, ...]:
    executed = "unknown" if row.executions is None else str(row.executions)
    return (
        f"{row.kind} (async)" if row.asynchronous else row.kind,
        readable_bytes(row.bytes),
        ", ".join(row.axes) or "-",
        f"at most {executed}" if row.conditional and row.executions is not None else executed,
        (" > ".join(row.loops) or "yes") if row.in_loop else "no",
        "-" if row.overlap is None else str(row.overlap),
        row.parameters or "-",
        row.source or "-",
    )


_EXPLICIT = re.compile(r"replica_groups=\{(\s*\{[\d,\s{}]*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:,\s*device_ids=\(([^{]*)\))?\s*\{([^}]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{([\d,\s{}]*)\}")
_AXIS = re.compile(r"'?([\w.\-]+)'?=(\d+)")
_AXIS_REFERENCE = re.compile(r"'?([\w.\-]+)'?(?::\((\d+)\)(\d+))?")


def _listed(text: str) -> tuple[tuple[int, ...], ...]:
    """`{0,2},{1,3}`"""
    return tuple(_sizes(group) for group in re.findall(r"\{([\d,\s]*)\}", text) if group.strip())


def _iota(text: str) -> np.ndarray:
    """`[4,2]T(1,0)`: count up, reshape to [4,2], transpose by (1,0), flatten."""
    dims, _, order = text.partition("T")
    counted = np.arange(np.prod(_sizes(dims))).reshape(_sizes(dims))
    return counted.transpose(_sizes(order) if order else None).reshape(-1)


def _mesh_groups(axes: str, device_ids: str | None, varied: str) -> tuple[tuple[int, ...], ...]:
    """`mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a','b':(1)2}`; the last is the major half of `b`."""
    sizes = {name: int(size) for name, size in _AXIS.findall(axes)}
    devices = np.arange(np.prod(list(sizes.values())))
    if device_ids:
        devices = _iota(device_ids) if device_ids.startswith("[") else np.asarray(_sizes(device_ids))
    coordinates = np.indices(tuple(sizes.values())).reshape(len(sizes), -1)
    kept = coordinates.copy()
    for name, before, size in _AXIS_REFERENCE.findall(varied):
        axis = list(sizes).index(name)
        # `:(before)size` names one digit of the coordinate; the more significant digits take `before` values.
        size = int(size or sizes[name])
        stride = sizes[name] // (int(before or 1) * size)
        kept[axis] -= coordinates[axis] // stride % size * stride
    key = np.ravel_multi_index(tuple(kept), tuple(sizes.values()))
    return _rows(devices[key == value] for value in np.unique(key))


def _rows(table: Iterable[np.ndarray]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(member) for member in row) for row in table)


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))
