"""The later stages of a step as values, as in `jax.stages`: Lowered and Compiled. They answer, they decide nothing."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from stepc import inspect, report
from stepc.compiler.breakdown import broken_down
from stepc.compiler.measures import gradient_reductions
from stepc.compiler.plan import Plan
from stepc.inspect.budget import Measure
from stepc.inspect.donation import DonatedLeaf


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
        return broken_down(inspect.memory(self.executable), self.plan, self.executable)

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

    def known(self, device: str | None = None) -> report.Known:
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
