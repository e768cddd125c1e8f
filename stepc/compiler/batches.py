"""How a batch lies on a mesh, and moving it there. It knows no state and runs no program."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stepc.compiler.check import check_batch
from stepc.compiler.decision import Decision, shape_of
from stepc.compiler.layout import specs_of_batch
from stepc.compiler.many import Rows, check_program, checked_whole, processes_of, whole
from stepc.compiler.placing import put
from stepc.language.kinds import Batch
from stepc.language.state import leaves_by_path


@dataclass(frozen=True)
class Batches:
    """The batches of a step.

    Args:
      mesh: a mesh of Auto axes, or None for a single device.
      decision: what was decided of the pipeline.
    """

    mesh: Mesh | None
    decision: Decision

    @cached_property
    def lying(self) -> NamedSharding | None:
        """How every leaf lies; None if that depends on the leaf, or on a single device."""
        if self.mesh is None or self._by_leaf:
            return None
        leading = [None] if self.decision.repeats > 1 else []
        return NamedSharding(self.mesh, PartitionSpec(*leading, self.decision.rows))

    @property
    def options(self) -> dict[str, Any]:  # Any: what `jax.jit` takes
        """What the program is told of where its arguments lie."""
        return {} if self.lying is None else {"in_shardings": (None, self.lying)}

    @cached_property
    def _by_leaf(self) -> bool:
        return bool(self.decision.laid.layout.batch or self.decision.laid.layout.automatic)

    def shardings(self, batch: Batch) -> Any:  # Any: the batch's tree, of shardings or None
        """How each leaf of a batch lies. Errors: ShardingError with every rule of `dp(batch=...)` that does not fit."""
        if self.mesh is None or not self._by_leaf:
            return jax.tree.map(lambda _: self.lying, batch)
        leaves = leaves_by_path(batch)
        specs = specs_of_batch(self.decision.laid, leaves, int(self.decision.repeats > 1))
        tree = jax.tree.structure(batch)
        return tree.unflatten([NamedSharding(self.mesh, PartitionSpec(*specs[path])) for path, _ in leaves])

    def shapes(self, batch: Batch) -> Batch:
        """The batch as shapes that lie so; host arrays lie nowhere, as jax traces them and device arrays apart."""

        def shape(leaf: Any, lying: NamedSharding | None) -> jax.ShapeDtypeStruct:
            lies = isinstance(leaf, jax.Array) or self._by_leaf
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=lying if lies else None)

        leaves, tree = jax.tree.flatten(batch)
        lying = jax.tree.leaves(self.shardings(batch), is_leaf=lambda one: one is None)
        return tree.unflatten(list(map(shape, leaves, lying)))

    def placed(self, batch: Batch) -> Batch:
        """The batch, moved if it does not lie as the program takes it. The only loop of a call.

        On several processes host arrays are the rows of this one.
        """
        if processes_of(self.mesh):
            return self._placed_by_all(batch)
        if self.mesh is not None and self._by_leaf:
            check_batch(batch, self.decision.core, shapes_too=False)
            return put(batch, self.shardings(batch))
        lying = self.lying
        for leaf in jax.tree.leaves(batch):
            if type(leaf) is np.ndarray:
                continue
            if not isinstance(leaf, jax.Array):
                check_batch(batch, self.decision.core, shapes_too=False)
            elif lying is not None and leaf.sharding != lying:
                return put(batch, lying)
        return batch

    def check(self, batch: Batch) -> None:
        """Say what is wrong with a batch that a call failed on; on several processes that was said of the whole."""
        if not processes_of(self.mesh):
            check_batch(batch, self.decision.core, shapes_too=False)

    def compare(self, program: Any, state: Any, batch: Batch) -> None:  # Any: a jitted function; a state
        """Let several processes compare their programs, once for a form of batch."""
        check_program(program, self._compared, state, batch, self.mesh)

    def put(self, batch: Batch) -> Batch:
        """The batch on the devices; that the rows of several processes fit together is left to be checked."""
        if processes_of(self.mesh):
            return whole(batch, self._rows, self.decision.core)
        return jax.device_put(batch, None if self.mesh is None else self.shardings(batch))

    def _placed_by_all(self, batch: Batch) -> Batch:
        for _, leaf in leaves_by_path(batch):
            if not isinstance(leaf, np.ndarray | jax.Array):
                check_batch(batch, self.decision.core, shapes_too=False)
            elif isinstance(leaf, np.ndarray) or leaf.is_fully_addressable:
                return checked_whole(batch, self._rows, self.decision.core)
        return whole(batch, self._rows, self.decision.core)

    @cached_property
    def _compared(self) -> set[str]:
        return set()

    @cached_property
    def _rows(self) -> Rows:
        if self.mesh is None:
            raise ValueError("several processes have a mesh")
        return Rows(self.mesh, self.decision.rows, int(self.decision.repeats > 1), self.shardings)


def bare(tree: Any) -> Any:
    """Shapes and dtypes, and nothing of where they lie."""
    return jax.tree.map(shape_of, tree)
