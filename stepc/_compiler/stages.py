"""What the memory of a compiled step is for: parameters, optimizer state, batch, accumulator, activations."""

from collections import Counter
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from stepc import inspect, report
from stepc._compiler.plan import Plan, PlannedLeaf
from stepc.inspect.budget import Measure, reductions_of
from stepc.inspect.collectives import Collectives
from stepc.inspect.donation import DonatedLeaf
from stepc.inspect.hlo import Computation, Module, Shape, parse, text_of
from stepc.inspect.memory import Memory, MemoryPart

_NAMES = {"params": "parameters", "opt_state": "optimizer state"}
_REST_OF_STATE, _BATCH, _PADDING = "rest of the state", "batch", "padding"
_ACCUMULATOR, _ACTIVATIONS = "accumulator", "activations and the rest"


def memory_breakdown(needs: Memory, plan: Plan, executable: jax.stages.Compiled) -> Memory:
    """Say what arguments and temporaries are for.

    The sizes of arguments are those of their shards; what the device needs beyond them is padding. The accumulator is
    read from the loop that carries an array for each parameter; it is left out where no such loop is found.
    """
    lying = input_shardings(executable, 0)
    sizes: Counter[str] = Counter()
    for leaf, sharding in zip(plan.leaves, lying, strict=True):
        if sharding is not None:
            sizes[_NAMES.get(leaf.path.partition("/")[0], _REST_OF_STATE)] += _shard_bytes(leaf, sharding)
    sizes[_BATCH] = sum(_bytes_of_batch(executable))
    padding = needs.arguments - sum(sizes.values())
    arguments = [MemoryPart("arguments", name, bytes_) for name, bytes_ in sizes.items() if bytes_]
    if padding > 0:
        arguments.append(MemoryPart("arguments", _PADDING, padding))
    return replace(needs, parts=(*arguments, *_temporaries(needs, plan, executable)))


def _temporaries(needs: Memory, plan: Plan, executable: jax.stages.Compiled) -> tuple[MemoryPart, ...]:
    found = accumulator_bytes(executable, list(plan.accumulator)) if plan.loop_length > 1 else 0
    accumulated = min(found, needs.temporaries)
    parts = ((_ACCUMULATOR, accumulated), (_ACTIVATIONS, needs.temporaries - accumulated))
    return tuple(MemoryPart("temporaries", name, bytes_) for name, bytes_ in parts if bytes_)


def accumulator_bytes(executable: jax.stages.Compiled | str, shapes: list[tuple[int, ...]]) -> int:
    """The bytes that the outermost loop carries in main memory for arrays of these shapes; 0 if none carries all."""
    module = parse(text_of(executable))
    return _carried(module, module.computations[module.entry], shapes)


def _carried(module: Module, computation: Computation, shapes: list[tuple[int, ...]]) -> int:
    for instruction in computation.instructions.values():
        if instruction.opcode == "while" and (found := _matched(instruction.shapes, shapes)):
            return sum(shape.bytes for shape in found if shape.space == 0)
        for call in instruction.calls:
            if call.computation in module.computations and instruction.opcode in ("call", "while", "conditional"):
                inner = _carried(module, module.computations[call.computation], shapes)
                if inner:
                    return inner
    return 0


def _matched(carried: tuple[Shape, ...], shapes: list[tuple[int, ...]]) -> list[Shape]:
    """One carried array for each shape, floating, or nothing."""
    left, found = list(carried), []
    for dims in shapes:
        match = next((shape for shape in left if shape.dims == dims and shape.dtype[0] in "fb"), None)
        if match is None:
            return []
        left.remove(match)
        found.append(match)
    return found


def _shard_bytes(leaf: PlannedLeaf, sharding: jax.sharding.Sharding) -> int:
    if not prod(leaf.shape):
        return 0
    return leaf.bytes_ * prod(sharding.shard_shape(leaf.shape)) // prod(leaf.shape)


def _bytes_of_batch(executable: jax.stages.Compiled) -> list[int]:
    leaves = jax.tree.leaves(executable.args_info[0][1])
    return [
        prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, sharding in zip(leaves, input_shardings(executable, 1), strict=True)
        if sharding is not None
    ]


def input_shardings(executable: jax.stages.Compiled, argument: int) -> list[jax.sharding.Sharding | None]:
    """How each leaf of an argument lies; None of one that the program does not use, and so is not given."""
    tree = jax.tree.structure(executable.args_info[0][argument])
    return tree.flatten_up_to(executable.input_shardings[0][argument])


# Of the state, what a step reduces: its gradient has the shapes of the parameters, and a model_state is averaged.
_REDUCED = ("params", "model_state")


def gradient_reductions(plan: Plan, executable: jax.stages.Compiled, rows: Collectives) -> Measure:
    """How often each element of the gradient is reduced, over whichever axis of the plan it is most often."""
    axes = tuple({axis: None for one in plan.collectives for axis in one.axes})
    sizes = [
        _elements(leaf, sharding, axes)
        for leaf, sharding in zip(plan.leaves, input_shardings(executable, 0), strict=True)
        if sharding is not None and leaf.path.partition("/")[0] in _REDUCED
    ]
    elements = sum(size for size in sizes if size > 1)
    # Along each axis for itself: what is summed in parts is summed along one axis, and then along the others.
    along = [reductions_of(rows, axes=(axis,), elements=max(elements, 1)) for axis in axes]
    unknown = [one for one in along if one.value is None]
    return max(unknown or along, key=lambda one: one.value or 0, default=Measure(0))


def _elements(leaf: PlannedLeaf, sharding: jax.sharding.Sharding, axes: tuple[str, ...]) -> int:
    """The elements of a leaf of the gradient before it is reduced: whole along `axes`, split along all others."""
    return prod(leaf.shape) // _parts(sharding, axes)


def _parts(sharding: jax.sharding.Sharding, axes: tuple[str, ...]) -> int:
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
        return 1
    named = [axis for entry in sharding.spec for axis in ((entry,) if isinstance(entry, str) else entry or ())]
    return prod(sharding.mesh.shape[axis] for axis in named if axis not in axes)


@dataclass(frozen=True)
class Lowered:
    """A step that is traced and lowered, not yet compiled: `jax.stages.Lowered` and the plan.

    Args:
      traced: the `jax.stages.Traced` below it.
      plan: everything that was decided.
      mesh: the mesh it is for.
    """

    traced: jax.stages.Traced
    plan: Plan
    mesh: Mesh | None

    def jaxpr(self) -> Any:  # Any: a jax.extend.core.ClosedJaxpr, whose import takes 27 ms
        """The step as jax sees it."""
        return self.traced.jaxpr

    def stablehlo(self) -> str:
        """The text that is handed to XLA."""
        return self.traced.lower().as_text()

    def compile(self) -> "Compiled":
        """Compile it; the step itself will not compile again for these shapes."""
        lowered = self.traced.lower()
        asked = tuple(info.donated for info in jax.tree.leaves(lowered.args_info[0][0]))
        return Compiled(lowered.compile(), self.plan, self.mesh, asked)


@dataclass(frozen=True, repr=False)
class Compiled:
    """A compiled step, and questions about it.

    Args:
      executable: the `jax.stages.Compiled` below it.
      plan: everything that was decided.
      mesh: the mesh it is for.
      asked: of each leaf of the state, in order, whether its donation was asked for.
    """

    executable: jax.stages.Compiled
    plan: Plan
    mesh: Mesh | None
    asked: tuple[bool, ...]

    def __repr__(self) -> str:
        mesh = "" if self.mesh is None else f", mesh={dict(self.mesh.shape)}"
        return f"Compiled({self.plan.pipeline}{mesh})"

    def hlo(self) -> str:
        """The optimised program, as XLA prints it."""
        text = self.executable.as_text()
        if text is None:
            raise ValueError("this backend does not print its programs")
        return text

    def collectives(self) -> inspect.Collectives:
        """Every collective: kind, bytes, mesh axes, executions a step, in a loop or not, source."""
        return inspect.collectives(self.executable, self.mesh)

    def memory(self) -> inspect.Memory:
        """Bytes per device, as the compiler planned them, and what they are for."""
        return memory_breakdown(inspect.memory(self.executable), self.plan, self.executable)

    def cost(self) -> inspect.Cost:
        """Operations and bytes moved per device and step, loops counted."""
        return inspect.cost(self.executable)

    def roofline(self, device: str) -> inspect.Roofline | None:
        """The least time of a step on a named device, an estimate; None if a loop does not say how often it turns."""
        return inspect.roofline(self.cost(), self.memory(), self.collectives(), device)

    def donated(self) -> tuple[DonatedLeaf, ...]:
        """Every leaf of the state, and whether its buffer is used again for the new state."""
        # Every leaf of the state is returned, so jax drops none of them: their numbers are their positions.
        aliased = inspect.aliases(self.executable)
        paths = [leaf.path for leaf in self.plan.leaves]
        return tuple(
            DonatedLeaf(path, asked, number in aliased)
            for number, (path, asked) in enumerate(zip(paths, self.asked, strict=True))
        )

    def check(self, budget: inspect.Budget, *, traces: int | None = None) -> None:
        """Hold the step to a budget.

        Args:
          traces: how often the step was traced, `step.traces`; needed if the budget promises it.
        Errors: BudgetError with a table of what was promised, what is, and the lines responsible.
        """
        lost = tuple(leaf.path for leaf in self.donated() if leaf.donated and not leaf.aliased)
        known = {
            "donated": Measure(len(lost), tuple(f"{path} is copied" for path in lost)),
            "gradient_reductions": gradient_reductions(self.plan, self.executable, self.collectives()),
            **({} if traces is None else {"traces": Measure(traces)}),
        }
        inspect.check(budget, self.executable, self.mesh, known=known)

    def known(self, device: str | None = None) -> report.ProgramFacts:
        """All there is to know of the step, as one value; times are drawn for `device`, such as "tpu:v5e"."""
        return report.known_of_step(self.plan, self.executable, self.mesh, self.memory(), self.donated(), device)

    def explain(self, device: str | None = None) -> str:
        """The pipeline, the laws, the plan, collectives, memory, cost, donation, as text."""
        return report.text(self.known(device))

    def report(self, path: str | Path, device: str | None = None) -> Path:
        """Write all of it, with pictures and the HLO, as one page that needs no network."""
        return report.write(self.known(device), path)

    def _repr_html_(self) -> str:
        return report.fragment(self.known())
