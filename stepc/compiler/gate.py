"""A step is held to its budget before it runs; the step itself only says when."""

from collections.abc import Callable

import jax

from stepc.compiler.forms import Form, form_of
from stepc.compiler.stages import Compiled
from stepc.inspect.budget import Budget
from stepc.language.kinds import Batch


class Gate:
    """Check a budget once for each form of batch, and again if the step was traced anew.

    The programs it looks at are those that the step runs: jax compiles none of them twice.
    """

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self._passed: set[tuple[Form, tuple[bool, ...]]] = set()
        self._traces = 0

    def hold(self, batch: Batch, compiled: Callable[[], Compiled], traces: Callable[[], int]) -> None:
        """Raise BudgetError before the step runs; the state is then alive."""
        # jax traces host arrays and device arrays apart.
        form = form_of(batch), tuple(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(batch))
        if form in self._passed and traces() == self._traces:
            return
        program = compiled()
        program.check(self.budget, traces=traces())
        self._passed.add(form)
        self._traces = traces()
