"""Does a step keep its budget? The answer is a table, and a failed test."""

import jax
import jax.numpy as jnp

from stepc.compiler.step import Step
from stepc.inspect.budget import Budget
from stepc.language.kinds import Batch
from stepc.language.state import State

_NUM_STEPS = 3


def assert_within_budget(budget: Budget, step: Step, state: State, batch: Batch) -> None:
    """Assert that a step keeps its budget, for a state and a batch or for their shapes.

    Meaning: `step.lower(state, batch).compile().check(budget, traces=step.traces)`; if the budget promises
      `traces`, and `state` has arrays, three steps are run first, each on what the one before returned.
    Why: one line pins a step of your own in CI, so that a change to it shows there and not on the bill.

    Args:
      budget: what the step is promised to cost.
      step: a compiled step.
      state: it is copied, not donated: it stays alive.
      batch: a batch that divides.
    Errors: BudgetError with a table of what was promised, what is, and the lines responsible. It is an
      AssertionError, so pytest shows it as a failure.
    Numbers of bytes belong to a version of XLA; counts do so much less.
    Example:
      >>> assert_within_budget(sc.Budget(gradient_reductions=1), step, state, batch)  # doctest: +SKIP

    Source: ours.
    """
    compiled = step.lower(state, batch).compile()
    if budget.traces is not None and all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state)):
        lying = jax.tree.map(lambda leaf: leaf.sharding, state)
        state = jax.device_put(jax.tree.map(jnp.copy, state), lying)
        for _ in range(_NUM_STEPS):
            state, _ = jax.block_until_ready(step(state, batch))
    compiled.check(budget, traces=step.traces)
