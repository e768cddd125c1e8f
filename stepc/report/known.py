"""All there is to know of a compiled program, as one value; it must not know how it is shown."""

from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from stepc._compiler.plan import Plan
from stepc.inspect.collectives import Collectives, collectives
from stepc.inspect.donation import DonatedLeaf, donated_leaves
from stepc.inspect.hlo import text_of
from stepc.inspect.memory import Cost, Memory, cost, memory
from stepc.inspect.roofline import DEVICES, Device, Roofline, device_named, device_of, roofline
from stepc.inspect.timeline import Segment, timeline

# Where a program is for a device without a row in the table, such as a CPU.
_OTHERWISE = "tpu:v5e"


@dataclass(frozen=True)
class ProgramFacts:
    """What is known of a compiled program.

    Attributes:
      title: the pipeline as written, or the name of the program.
      plan: everything that was decided, if stepc compiled it.
      mesh: the size of each axis; empty if none is known.
      kind: what jax calls a device of the mesh.
      device: the row whose peaks times are drawn to.
      rooflines: the estimates for every device in the table; empty if a loop hides how often it turns.
      segments: the course of the program; None if a loop hides it.
      donated: every leaf of the arguments, where they can be told apart.
      hlo: the optimised text.
    """

    title: str
    plan: Plan | None
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


def known(
    compiled: jax.stages.Compiled, mesh: Mesh | None = None, *, title: str, device: str | None = None
) -> ProgramFacts:
    """Collect what is known of any compiled program, that need not have heard of stepc.

    Args:
      compiled: what `jax.jit(f).lower(...).compile()` returns.
      mesh: as in `stepc.inspect.collectives`.
      title: what to call it.
      device: whose peaks to draw times with, such as "gpu:h100"; by default the one it is compiled for, if that is in
        the table.
    Errors: ValueError if the backend prints no HLO; ConfigError for a device that is not in the table.
    """
    return _known(title, None, compiled, mesh, memory(compiled), donated_leaves(compiled), device)


def known_of_step(
    plan: Plan,
    compiled: jax.stages.Compiled,
    mesh: Mesh | None,
    needs: Memory,
    donated: tuple[DonatedLeaf, ...],
    device: str | None,
) -> ProgramFacts:
    """Collect what is known of a step that stepc compiled."""
    return _known(plan.pipeline, plan, compiled, mesh, needs, donated, device)


def _known(
    title: str,
    plan: Plan | None,
    compiled: jax.stages.Compiled,
    mesh: Mesh | None,
    needs: Memory,
    donated: tuple[DonatedLeaf, ...],
    device: str | None,
) -> ProgramFacts:
    rows, work, kind = collectives(compiled, mesh), cost(compiled), _kind(compiled, mesh)
    estimates = (roofline(work, needs, rows, name) for name in DEVICES)
    return ProgramFacts(
        title=title,
        plan=plan,
        mesh=() if mesh is None else tuple(mesh.shape.items()),
        kind=kind,
        collectives=rows,
        memory=needs,
        cost=work,
        device=device_named(device) if device else device_of(kind) or DEVICES[_OTHERWISE],
        rooflines=tuple(estimate for estimate in estimates if estimate is not None),
        segments=timeline(compiled, mesh),
        donated=donated,
        hlo=text_of(compiled),
    )


def _kind(compiled: jax.stages.Compiled, mesh: Mesh | None) -> str:
    """What jax calls the devices that it is compiled for."""
    if mesh is not None:
        return mesh.devices.flat[0].device_kind
    devices = (device for one in jax.tree.leaves(compiled.input_shardings) for device in one.device_set)
    return next((device.device_kind for device in devices), "unknown")
