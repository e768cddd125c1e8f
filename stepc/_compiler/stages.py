"""A step that is traced, then compiled, as in `jax.stages`: `Lowered` and `Compiled`, and the questions they answer."""

from collections import Counter
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from stepc import inspect, report
from stepc._compiler.collectives import Z_OF_HEAD
from stepc._compiler.plan import LeafSharding, Plan
from stepc._compiler.validation import refused_option
from stepc._core.nodes import show
from stepc._core.sharding import axes_of
from stepc.inspect.budget import Measurement, reductions_of
from stepc.inspect.collectives import Collectives
from stepc.inspect.donation import DonatedLeaf
from stepc.inspect.hlo import Computation, Module, Shape, parse, text_of
from stepc.inspect.memory import Memory, MemoryPart


@dataclass(frozen=True)
class Lowered:
    """A step that is traced, not yet compiled: a `jax.stages.Traced` and the plan.

    Args:
      traced: the `jax.stages.Traced`.
      plan: everything that was decided.
      mesh: the mesh it is for.
    """

    traced: jax.stages.Traced
    plan: Plan
    mesh: Mesh | None

    def jaxpr(self) -> Any:  # Any: a jax.extend.core.ClosedJaxpr, whose import takes 27 ms
        """The step as jax sees it."""
        return self.traced.jaxpr

    @property
    def metric_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of the metrics that a call returns."""
        metrics: dict[str, jax.ShapeDtypeStruct] = self.traced.out_info[1]
        return metrics

    def stablehlo(self) -> str:
        """The program that XLA is given."""
        return self.traced.lower().as_text()

    def compile(self) -> "Compiled":
        """Compile it; the step itself will not compile again for these shapes.

        Errors: ConfigError for one of the `compiler_options` that XLA refuses.
        """
        lowered = self.traced.lower()
        donated = tuple(info.donated for info in jax.tree.leaves(lowered.args_info[0][0]))
        try:
            executable = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if (refusal := refused_option(error)) is not None:
                raise refusal from error
            raise
        return Compiled(executable, self.plan, self.mesh, donated)


@dataclass(frozen=True, repr=False)
class Compiled:
    """A compiled step, and questions about it.

    Args:
      executable: the `jax.stages.Compiled`.
      plan: everything that was decided.
      mesh: the mesh it is for.
      requested: for each leaf of the state, in order, whether its donation was requested.
    """

    executable: jax.stages.Compiled
    plan: Plan
    mesh: Mesh | None
    requested: tuple[bool, ...]

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
        """Every collective: kind, bytes, mesh axes, executions per step, in a loop or not, source."""
        return inspect.collectives(self.executable, self.mesh)

    def memory(self) -> inspect.Memory:
        """Bytes per device, as the compiler planned them, and what they are for."""
        return memory_breakdown(inspect.memory(self.executable), self.plan, self.executable)

    def cost(self) -> inspect.Cost:
        """Operations and bytes moved per device and step, loops counted."""
        return inspect.cost(self.executable)

    def roofline(self, device: str) -> inspect.Roofline | None:
        """The least time of a step on a named device, an estimate; None if the trip count of a loop is unknown."""
        return inspect.roofline(self.cost(), self.memory(), self.collectives(), device)

    def donated(self) -> tuple[DonatedLeaf, ...]:
        """Every leaf of the state, and whether the new state reuses its buffer."""
        # A step reads every leaf of the state, so jax drops none of its arguments: number and position agree.
        aliased = inspect.aliases(self.executable)
        leaves = zip(self.plan.leaves, self.requested, strict=True)
        return tuple(
            DonatedLeaf(leaf.path, requested, number in aliased) for number, (leaf, requested) in enumerate(leaves)
        )

    def check(self, budget: inspect.Budget, *, traces: int | None = None) -> None:
        """Hold the step to a budget.

        Args:
          traces: how often the step was traced, `step.traces`; required if the budget limits it.
        Errors: BudgetError with a table of limits and measurements, and the lines responsible.
        """
        copied = tuple(leaf.path for leaf in self.donated() if leaf.donated and not leaf.aliased)
        known = {
            "donated": Measurement(len(copied), tuple(f"{path} is copied" for path in copied)),
            "gradient_reductions": gradient_reductions(self.plan, self.executable, self.collectives()),
            **({} if traces is None else {"traces": Measurement(traces)}),
        }
        inspect.check(budget, self.executable, self.mesh, known=known)

    def facts(self, device: str | None = None) -> report.ProgramFacts:
        """Everything known about the step, as one value; times are at the peaks of `device`, such as "tpu:v5e"."""
        plan = report.PlanFacts(
            pipeline=self.plan.pipeline,
            normal=show(self.plan.normal),
            laws=tuple(
                report.LawFacts(
                    one.law.name, one.law.formula, one.law.reason, one.law.condition, show(one.before), show(one.after)
                )
                for one in self.plan.laws
            ),
            leaves=tuple(
                report.LeafFacts(leaf.path, leaf.type_text, leaf.total_bytes, leaf.text) for leaf in self.plan.leaves
            ),
            text=str(self.plan),
        )
        return report.facts(
            self.executable, self.mesh, title=plan.pipeline, device=device, plan=plan, memory=self.memory(),
            donated=self.donated(),
        )  # fmt: skip

    def explain(self, device: str | None = None) -> str:
        """The pipeline, the laws, the plan, collectives, memory, cost, donation, as text."""
        return report.text(self.facts(device))

    def report(self, path: str | Path, device: str | None = None) -> Path:
        """Write everything, with pictures and the HLO, as one page that needs no network."""
        return report.write(self.facts(device), path)

    def _repr_html_(self) -> str:
        return report.fragment(self.facts())


_NAMES = {"params": "parameters", "opt_state": "optimizer state"}
_REST_OF_STATE, _BATCH, _PADDING = "rest of the state", "batch", "padding"
_ACCUMULATOR, _ACTIVATIONS = "accumulator", "activations and the rest"


def memory_breakdown(needs: Memory, plan: Plan, executable: jax.stages.Compiled) -> Memory:
    """Say what arguments and temporaries are for.

    The sizes of arguments are those of their shards; what the device needs beyond them is padding. The accumulator is
    read from the loop that carries an array for each parameter; it is left out if there is no such loop.
    """
    sizes: Counter[str] = Counter()
    for leaf, sharding in zip(plan.leaves, _input_shardings(executable, 0), strict=True):
        is_on_host = bool(leaf.memory and needs.host)  # on a CPU the two are one
        if sharding is not None and not is_on_host and (elements := prod(leaf.shape)):
            name = _NAMES.get(leaf.path.partition("/")[0], _REST_OF_STATE)
            sizes[name] += leaf.total_bytes * prod(sharding.shard_shape(leaf.shape)) // elements
    batch = zip(jax.tree.leaves(executable.args_info[0][1]), _input_shardings(executable, 1), strict=True)
    sizes[_BATCH] = sum(
        prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, sharding in batch if sharding is not None
    )
    sizes[_PADDING] = max(needs.arguments - sum(sizes.values()), 0)
    found = accumulator_bytes(executable, list(plan.accumulator)) if plan.loop_length > 1 else 0
    accumulator = min(found, needs.temporaries)
    temporaries = ((_ACCUMULATOR, accumulator), (_ACTIVATIONS, needs.temporaries - accumulator))
    parts = [MemoryPart("arguments", name, bytes_) for name, bytes_ in sizes.items() if bytes_]
    parts += [MemoryPart("temporaries", name, bytes_) for name, bytes_ in temporaries if bytes_]
    return replace(needs, parts=tuple(parts))


def accumulator_bytes(executable: jax.stages.Compiled | str, shapes: list[tuple[int, ...]]) -> int:
    """The bytes of arrays of these shapes in the carry of the outermost loop, in main memory; 0 if no carry has all."""
    module = parse(text_of(executable))
    return _carried_bytes(module, module.computations[module.entry], shapes)


def _carried_bytes(module: Module, computation: Computation, shapes: list[tuple[int, ...]]) -> int:
    for instruction in computation.instructions.values():
        if instruction.opcode == "while" and (found := _matching(instruction.shapes, shapes)):
            return sum(shape.bytes for shape in found if shape.space == 0)
        for call in instruction.calls:
            if call.computation in module.computations and instruction.opcode in ("call", "while", "conditional"):
                inner = _carried_bytes(module, module.computations[call.computation], shapes)
                if inner:
                    return inner
    return 0


def _matching(carried: tuple[Shape, ...], shapes: list[tuple[int, ...]]) -> list[Shape]:
    """One carried floating-point array for each shape; none if a shape has no array."""
    left, found = list(carried), list[Shape]()
    for dims in shapes:
        match = next((shape for shape in left if shape.dims == dims and shape.dtype[0] in "fb"), None)
        if match is None:
            return []
        left.remove(match)
        found.append(match)
    return found


# The fields of a state whose size is reduced: a gradient has the shapes of the parameters; model state is averaged.
_REDUCED = ("params", "model_state")


def gradient_reductions(plan: Plan, executable: jax.stages.Compiled, rows: Collectives) -> Measurement:
    """How often each element of the gradient is reduced, over the axis of the plan where that is most often."""
    axes = tuple({axis: None for one in plan.collectives for axis in one.axes})
    sizes = [
        _unreduced_elements(leaf, sharding, axes)
        for leaf, sharding in zip(plan.leaves, _input_shardings(executable, 0), strict=True)
        if sharding is not None and leaf.path.partition("/")[0] in _REDUCED
    ]
    elements = sum(size for size in sizes if size > 1)
    rows = Collectives(tuple(row for row in rows if not row.parameters.startswith(Z_OF_HEAD)))
    # Each axis by itself: a shard of a gradient is reduced over one axis, and then over the others.
    measures = [reductions_of(rows, axes=(axis,), elements=max(elements, 1)) for axis in axes]
    unknown = [one for one in measures if one.value is None]
    return max(unknown or measures, key=lambda one: one.value or 0, default=Measurement(0))


def _unreduced_elements(leaf: LeafSharding, sharding: jax.sharding.Sharding, axes: tuple[str, ...]) -> int:
    """The elements of a gradient leaf before it is reduced: replicated over `axes`, sharded over all others."""
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
        return prod(leaf.shape)
    return prod(leaf.shape) // prod(sharding.mesh.shape[axis] for axis in axes_of(sharding.spec) if axis not in axes)


def _input_shardings(executable: jax.stages.Compiled, argument: int) -> list[jax.sharding.Sharding | None]:
    """The sharding of each leaf of an argument; None for one that the program does not use, and so does not take."""
    tree = jax.tree.structure(executable.args_info[0][argument])
    return tree.flatten_up_to(executable.input_shardings[0][argument])
