"""Everything known about a compiled program, as one value of plain facts. It must not know how they are shown."""

from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from stepc.errors import FieldTypeError
from stepc.inspect.collectives import Collectives, collectives
from stepc.inspect.cost import Cost, cost
from stepc.inspect.donation import DonatedLeaf, donated_leaves
from stepc.inspect.hlo import text_of
from stepc.inspect.memory import Memory
from stepc.inspect.memory import memory as memory_of
from stepc.inspect.roofline import DEVICES, Device, Roofline, device_named, device_of, roofline
from stepc.inspect.timeline import Segment, timeline

# Times are drawn for this one if the program is for a device without a row in the table, such as a CPU.
_DEFAULT_DEVICE = "tpu:v5e"


@dataclass(frozen=True)
class LawFacts:
    """A law that the compiler applied, with the program before and after it."""

    name: str
    formula: str
    reason: str
    condition: str
    before: str
    after: str


@dataclass(frozen=True)
class LeafFacts:
    """One leaf of the state: its path, its type such as "float32[64, 128]", its bytes, its sharding."""

    path: str
    type: str
    bytes: int
    sharding: str


@dataclass(frozen=True)
class PlanFacts:
    """What a report shows of a plan, as text, so that a report needs no compiler.

    Attributes:
      pipeline: the pipeline as written.
      normal: the program after all laws.
      laws: the laws, in the order in which they were applied.
      leaves: the leaves of the state.
      text: the whole plan, as it prints.
    """

    pipeline: str
    normal: str
    laws: tuple[LawFacts, ...]
    leaves: tuple[LeafFacts, ...]
    text: str


@dataclass(frozen=True)
class ProgramFacts:
    """What is known about a compiled program.

    Attributes:
      title: the pipeline as written, or the name of the program.
      plan: what stepc decided; None if another compiler made the program.
      mesh: the size of each axis; empty if no mesh is known.
      kind: what JAX calls a device of the mesh.
      collectives: everything it sends between devices.
      memory: bytes on one device.
      cost: flops and bytes moved on one device.
      device: the device whose peaks times are drawn to.
      rooflines: the estimate for every device in the table; empty if a loop has no known trip count.
      segments: what it does, in order; None if a loop has no known trip count.
      donated: every leaf of the arguments; empty if JAX dropped some of them.
      hlo: the optimised text.
    """

    title: str
    plan: PlanFacts | None
    mesh: tuple[tuple[str, int], ...]
    kind: str
    collectives: Collectives
    memory: Memory
    cost: Cost
    device: Device
    rooflines: tuple[Roofline, ...]
    segments: tuple[Segment, ...] | None
    donated: tuple[DonatedLeaf, ...]
    hlo: str


def facts(
    executable: jax.stages.Compiled,
    mesh: Mesh | None = None,
    *,
    title: str,
    device: str | None = None,
    plan: PlanFacts | None = None,
    memory: Memory | None = None,
    donated: tuple[DonatedLeaf, ...] | None = None,
) -> ProgramFacts:
    """Collect what is known about any compiled program, whether or not stepc compiled it.

    Args:
      executable: what `jax.jit(f).lower(...).compile()` returns.
      mesh: as in `stepc.inspect.collectives`.
      title: what to call the program.
      device: the device whose peaks times are drawn to, such as "gpu:h100"; by default the one that the program is
        compiled for, or tpu:v5e if that is not in the table.
      plan: what a compiler decided, if it says so.
      memory: by default `stepc.inspect.memory(executable)`.
      donated: by default `stepc.inspect.donated_leaves(executable)`.
    Errors: ValueError if the backend prints no HLO; ConfigError for a device that is not in the table.
    """
    needs = memory_of(executable) if memory is None else memory
    rows, work, kind = collectives(executable, mesh), cost(executable), _device_kind(executable, mesh)
    estimates = (roofline(work, needs, rows, name) for name in DEVICES)
    return ProgramFacts(
        title=title,
        plan=plan,
        mesh=() if mesh is None else tuple(mesh.shape.items()),
        kind=kind,
        collectives=rows,
        memory=needs,
        cost=work,
        device=device_named(device) if device else device_of(kind) or DEVICES[_DEFAULT_DEVICE],
        rooflines=tuple(estimate for estimate in estimates if estimate is not None),
        segments=timeline(executable, mesh),
        donated=donated_leaves(executable) if donated is None else donated,
        hlo=text_of(executable),
    )


def check_facts(given: object) -> None:
    """Refuse what a report cannot be made of, such as the program itself. Errors: FieldTypeError."""
    if not isinstance(given, ProgramFacts):
        what = "A report is made of the facts about a program."
        facts = (("expected", "a stepc.report.ProgramFacts"), ("got", type(given).__name__))
        remedy = (
            "Either `compiled.facts()`, of a step, or `stepc.report.facts(executable, mesh, title=…)`, of any program."
        )
        raise FieldTypeError(what, facts=facts, suggestion=remedy)


def _device_kind(executable: jax.stages.Compiled, mesh: Mesh | None) -> str:
    if mesh is not None:
        return mesh.devices.flat[0].device_kind
    devices = (device for one in jax.tree.leaves(executable.input_shardings) for device in one.device_set)
    return next((device.device_kind for device in devices), "unknown")
