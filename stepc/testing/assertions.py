"""Is a compiled step equal to its meaning? The answer names every leaf that is not."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stepc._compiler.step import Step
from stepc._language.kinds import Batch
from stepc._language.state import State
from stepc._language.state import leaves_by_path
from stepc.errors import EquivalenceError
from stepc.errors import faults_in_one
from stepc.inspect.budget import Budget


def assert_equivalent(step: Step, state: State, batch: Batch, *, tolerance: float = 1e-5) -> None:
    """Assert that one compiled step equals its reference: parameters, optimizer state, every leaf, every metric.

    Meaning: step(state, batch) == step.reference(state, batch), leaf by leaf.
    Why: the shortest test that a pipeline of your own means what it says on your mesh.

    Args:
      step: a compiled step.
      state: it is copied, not donated: it stays alive.
      batch: a batch that divides.
      tolerance: largest difference, relative to the largest magnitude in the leaf; 0 for bitwise. Sums are taken in
        another order than in the reference, and optimizers such as Adam divide by small numbers: hence not 0.
    Errors: EquivalenceError with every leaf that differs, and by how much.
    Example:
      >>> assert_equivalent(step, state, batch)  # doctest: +SKIP

    Source: ours.
    """
    expected = step.reference(state, batch)
    copied = jax.tree.map(jnp.copy, state)
    got = step(jax.device_put(copied, jax.tree.map(lambda leaf: leaf.sharding, state)), batch)
    assert_equal_trees(got, expected, tolerance=tolerance, of=f"{step!r} and its reference")


def assert_equal_trees(got: Any, expected: Any, *, tolerance: float, of: str) -> None:
    """Assert that two trees of arrays agree, leaf by leaf; EquivalenceError with every leaf that does not."""
    left, right = leaves_by_path(got), leaves_by_path(expected)
    paths = [path for path, _ in left], [path for path, _ in right]
    if paths[0] != paths[1]:
        raise EquivalenceError(f"Other leaves in {of}: {sorted(set(paths[0]) ^ set(paths[1]))}.")
    pairs = ((path, _numbers(one), _numbers(two)) for (path, one), (_, two) in zip(left, right, strict=True))
    faults = [fault for path, one, two in pairs if (fault := _difference(path, one, two, tolerance))]
    if faults:
        raise EquivalenceError(faults_in_one(faults, of=of))


def _numbers(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def _difference(path: str, got: np.ndarray, expected: np.ndarray, tolerance: float) -> str | None:
    if (got.shape, got.dtype) != (expected.shape, expected.dtype):
        return f"`{path}` is {got.dtype}{list(got.shape)}, expected {expected.dtype}{list(expected.shape)}."
    if np.array_equal(got, expected, equal_nan=got.dtype.kind in "fc"):
        return None
    apart = np.max(np.abs(np.asarray(got, np.float64) - np.asarray(expected, np.float64)))
    size = np.max(np.abs(np.asarray(expected, np.float64)))
    if apart <= tolerance * size:
        return None
    return f"`{path}` differs by {apart:.3g}, where the largest magnitude is {size:.3g}."


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
