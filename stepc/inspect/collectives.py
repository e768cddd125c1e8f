"""What a compiled program sends between devices, how often, and from which line of the source."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import overload

import jax
import numpy as np

from stepc._units import readable
from stepc.inspect.cost import flops_of
from stepc.inspect.hlo import Computation, Instruction, Module, Shape, parse, text_of
from stepc.inspect.loops import Execution, executions

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)


# These take no time of their own: they name parts of what is there, or wait.
_FREE = ("bitcast", "constant", "get-tuple-element", "parameter", "tuple", "opt-barrier", "after-all")


@dataclass(frozen=True)
class Between:
    """What is scheduled between a start and its done.

    Attributes:
      instructions: the names of the instructions that do work.
      flops: of their matrix products and convolutions; None if a loop of unknown length is among them.
    """

    instructions: tuple[str, ...]
    flops: int | None

    def __str__(self) -> str:
        if not self.instructions:
            return "nothing"
        many = f"{len(self.instructions)} instruction{'s' if len(self.instructions) > 1 else ''}"
        return f"{many}, {'unknown' if self.flops is None else f'{self.flops:,}'} flops"


@dataclass(frozen=True)
class Collective:
    """One exchange between devices, as it stands in the compiled program.

    Attributes:
      kind: HLO's name for it, without `-start`: "all-reduce", "reduce-scatter", "all-gather", ...
      bytes: the full array of one execution on one device, without padding: all that an all-reduce,
        reduce-scatter, all-to-all or permute is given; all that an all-gather returns. Of a
        ragged-all-to-all, the whole input buffer. It is not the traffic on the wire.
      axes: the mesh axes along which the devices of a group differ; `()` if no mesh is known.
      executions: how often it runs while the program runs once; None if a loop hides that.
      in_loop: whether it stands in a loop, at any depth.
      conditional: whether it stands in a branch; `executions` is then the most that can be.
      asynchronous: whether the program starts it and waits for it later.
      source: "file.py:123 (op_name)", or what the metadata knows of that.
      payload: the arrays that `bytes` adds up.
      name: of the instruction, in HLO.
      group_size: how many devices exchange with each other.
      loops: the loops around it, the outermost first, with their turns: ("microbatches/while x4",).
      between: of an asynchronous one, what is scheduled between its start and its done; None if that is not known.
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
    between: Between | None = None


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
        head = ("kind", "size", "axes", "executions", "in loop", "meanwhile", "source")
        table = [head, *map(_cells, self.rows)]
        if all(row.between is None for row in self.rows):
            table = [(*cells[:5], cells[6]) for cells in table]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ("  ".join(map(str.ljust, cells, widths)).rstrip() for cells in table)
        return "\n".join(lines)

    @property
    def in_loops(self) -> "Collectives":
        """Those that stand in a loop, at any depth."""
        return Collectives(tuple(row for row in self.rows if row.in_loop))

    @property
    def executed_bytes(self) -> int:
        """The sum of bytes * executions. A branch counts as if it were always taken.

        Errors: ValueError if some row has an unknown number of executions. A sum that left it out would
        pass for a bound, which it is not.
        """
        unknown = [f"  {row.kind}  {readable(row.bytes)}  {row.source}" for row in self.rows if row.executions is None]
        if unknown:
            raise ValueError("\n".join(["It is unknown how often these collectives run:", "", *unknown]))
        return sum(row.bytes * row.executions for row in self.rows if row.executions is not None)

    def over(self, axis: str) -> "Collectives":
        """Those that exchange values along this mesh axis, alone or with others."""
        return Collectives(tuple(row for row in self.rows if axis in row.axes))


def collectives(compiled: jax.stages.Compiled | str, mesh: jax.sharding.Mesh | None = None) -> Collectives:
    """List what a compiled program sends between devices.

    Meaning: one row for each collective of the optimised HLO; a start and its done are one.
    Why: whether a step reduces its gradient once or once a microbatch stands here, and only here.

    Args:
      compiled: what `jax.jit(f).lower(...).compile()` returns, or its `as_text()`.
      mesh: gives the axes their names. Without it, the mesh of the executable's own shardings is used, if
        they share one; a text has none, and its rows have no axes.
    Units:  bytes on one device, for one execution.
    Errors: ValueError if the backend prints no HLO, or if the mesh has another size than the program.
    Rows that XLA could not trace to a line keep the name of the operation, or nothing.
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


def _row(
    module: Module,
    computation: Computation,
    instruction: Instruction,
    execution: Execution,
    mesh: jax.sharding.Mesh | None,
    start: tuple[Computation, Instruction] | None,
) -> Collective:
    kind = instruction.opcode.removesuffix("-start")
    # libtpu prints a reduce-scatter as a fusion of an all-reduce and a slice, and says so in the name.
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
        payload=payload,
        name=instruction.name,
        group_size=max(map(len, grouped)),
        loops=execution.loops,
        between=between(module, *(start or (computation, instruction))) if is_asynchronous else None,
    )


def _asynchronous(module: Module) -> tuple[set[str], dict[str, tuple[Computation, Instruction]]]:
    """The computations that only go on with what a start began, and of each that a start runs, that start."""
    continued: set[str] = set()
    starts: dict[str, tuple[Computation, Instruction]] = {}
    for computation in module.computations.values():
        for instruction in computation.instructions.values():
            called = [call.computation for call in instruction.calls]
            if continues(instruction):
                continued.update(called)
            elif instruction.opcode.endswith("-start") or "async-collective-start" in instruction.name:
                starts.update((name, (computation, instruction)) for name in called)
    return continued, starts


def _payload(kind: str, computation: Computation, instruction: Instruction) -> tuple[Shape, ...]:
    """The arrays whose bytes count."""
    given = [computation.instructions[name].shapes for name in instruction.operands]
    leaves = tuple(leaf for shapes in given for leaf in shapes)
    if kind == "ragged-all-to-all":  # the rest are the output buffer, the offsets and the sizes
        return given[0]
    if kind != "all-gather":
        return leaves
    if instruction.opcode == kind:
        return instruction.shapes
    # A start returns what it was given, then its results, then what the backend needs to wait for it.
    return instruction.shapes[len(leaves) : 2 * len(leaves)]


def _own_mesh(compiled: jax.stages.Compiled, num_devices: int) -> jax.sharding.Mesh | None:
    """The mesh of the executable's shardings, if there is exactly one."""
    shardings = jax.tree.leaves((compiled.input_shardings, compiled.output_shardings))
    named = [sharding for sharding in shardings if isinstance(sharding, jax.sharding.NamedSharding)]
    meshes = {sharding.mesh for sharding in named if isinstance(sharding.mesh, jax.sharding.Mesh)}
    meshes = {mesh for mesh in meshes if mesh.size == num_devices}
    return meshes.pop() if len(meshes) == 1 else None


def _cells(row: Collective) -> tuple[str, ...]:
    executed = "unknown" if row.executions is None else str(row.executions)
    return (
        f"{row.kind} (async)" if row.asynchronous else row.kind,
        readable(row.bytes),
        ", ".join(row.axes) or "-",
        f"at most {executed}" if row.conditional and row.executions is not None else executed,
        (" > ".join(row.loops) or "yes") if row.in_loop else "no",
        "-" if row.between is None else str(row.between),
        row.source or "-",
    )


_EXPLICIT = re.compile(r"replica_groups=\{(\s*\{[\d,\s{}]*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:,\s*device_ids=\(([^{]*)\))?\s*\{([^}]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{([\d,\s{}]*)\}")
_AXIS = re.compile(r"'?([\w.\-]+)'?=(\d+)")
_AXIS_REFERENCE = re.compile(r"'?([\w.\-]+)'?(?::\((\d+)\)(\d+))?")


def groups(module: Module, instruction: Instruction) -> tuple[tuple[int, ...], ...]:
    """List the devices that exchange values, as positions in the program's device order.

    Meaning: `replica_groups` in any of its spellings; a permute has one group per pair that it joins.
    Why: XLA writes the same groups in four ways.

    Args:
      module: the program, which says how many devices there are; `replica_groups={}` means all of them.
      instruction: a collective.
    Errors: ValueError if `replica_groups` is spelled in a way that is not known here.
    The numbers are read as partition numbers, which is what they are in every program of one replica.
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
        raise ValueError(f"`{instruction.name}` has replica groups of an unknown form: {attributes[:200]}")
    return (tuple(range(module.num_devices)),)


def axes_of(grouped: tuple[tuple[int, ...], ...], mesh: jax.sharding.Mesh) -> tuple[str, ...]:
    """Name the mesh axes whose coordinate differs between two members of some group."""
    largest = max((member for group in grouped for member in group), default=0)
    if largest >= mesh.size:
        raise ValueError(f"The program uses device {largest}; the mesh has {mesh.size} devices, from 0.")
    # The numbers are positions in `mesh.devices.flat`, not device ids: on a mesh of reversed or permuted
    # devices, jax 0.10.2 prints the same groups as on the mesh in order (tests/inspect/test_collectives.py).
    varies = [False] * len(mesh.axis_names)
    for group in grouped:
        coordinates = np.unravel_index(np.asarray(group, dtype=np.int64), mesh.devices.shape)
        varies = [old or np.unique(new).size > 1 for old, new in zip(varies, coordinates, strict=True)]
    return tuple(name for name, varied in zip(mesh.axis_names, varies, strict=True) if varied)


def _listed(text: str) -> tuple[tuple[int, ...], ...]:
    """`{0,2},{1,3}`"""
    return tuple(_sizes(group) for group in re.findall(r"\{([\d,\s]*)\}", text) if group.strip())


def _iota(text: str) -> np.ndarray:
    """`[4,2]T(1,0)`: count up, shape so, transpose so, and lay flat."""
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
        # `:(before)size` names a digit of the coordinate; the more significant ones take `before` values.
        size = int(size or sizes[name])
        stride = sizes[name] // (int(before or 1) * size)
        kept[axis] -= coordinates[axis] // stride % size * stride
    key = np.ravel_multi_index(tuple(kept), tuple(sizes.values()))
    return _rows(devices[key == value] for value in np.unique(key))


def _rows(table: Iterable[np.ndarray]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(member) for member in row) for row in table)


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))


def continues(instruction: Instruction) -> bool:
    """Whether this is a later part of an asynchronous TPU fusion, whose start holds the same collective."""
    if instruction.opcode != "fusion":
        return False
    names = " ".join([instruction.name, *(call.computation for call in instruction.calls)]).replace("_", "-")
    return "async-collective" in names and "start" not in names


def between(module: Module, computation: Computation, start: Instruction) -> Between | None:
    """List what stands between a start and its done in the order of the text; None if no done is found.

    Meaning: the instructions after `start` and before the last one that waits for it.
    Why: a collective is hidden only by what is scheduled while it runs; a pair with nothing between hides nothing.

    Args:
      computation: where `start` stands. Its text is in the order of execution if the program is scheduled, as
        compiled programs are.
    Source: ours.
    """
    following = list(computation.instructions.values())
    following = following[following.index(start) + 1 :]
    waiting, end = {start.name}, None
    for at, instruction in enumerate(following):
        if not waiting & set(instruction.operands):
            continue
        if instruction.opcode.endswith(("-done", "-update")) or continues(instruction):
            end = at
        if (
            instruction.opcode.endswith("-update")
            or instruction.opcode == "get-tuple-element"
            or continues(instruction)
        ):
            waiting.add(instruction.name)
    if end is None:
        return None
    # The middle part of a TPU fusion is work itself: it computes while the collective runs.
    work = [each for each in following[:end] if _works(each)]
    counts = [flops_of(module, computation, each) for each in work]
    known = [count for count in counts if count is not None]
    return Between(tuple(each.name for each in work), sum(known) if len(known) == len(counts) else None)


def _works(instruction: Instruction) -> bool:
    return instruction.opcode not in _FREE and not instruction.opcode.endswith(("-start", "-done", "-update"))
