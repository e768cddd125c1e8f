"""A step is held to its budget before it runs; the step itself only says when."""

from collections.abc import Callable
from typing import Any

import jax

from stepc.compiler.stages import Compiled
from stepc.inspect.budget import Budget


class Guard:
    """Check a budget once for each form of batch, and again if the step was traced anew.

    The programs it looks at are those that the step runs: jax compiles none of them twice.
    """

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self._held: set[Any] = set()  # Any: a tree structure and the forms of its leaves
        self._traces = 0

    def hold(self, batch: Any, compiled: Callable[[], Compiled], traces: Callable[[], int]) -> None:
        """Raise BudgetError before the step runs; the state is then alive."""
        leaves, tree = jax.tree.flatten(batch)
        form = (tree, tuple((leaf.shape, leaf.dtype, isinstance(leaf, jax.Array)) for leaf in leaves))
        if form in self._held and traces() == self._traces:
            return
        program = compiled()
        program.check(self.budget, traces=traces())
        self._held.add(form)
        self._traces = traces()
