"""Assertions on a compiled step: it equals its reference, and it keeps its budget. They know no transform.

`chex.assert_trees_all_close` stops at the first leaf that differs, and its `rtol` is relative to each element. Here
the message names every leaf, and the tolerance is relative to the largest magnitude in a leaf, because sums in another
order are wrong by that much even where an element is near 0. Structure, shapes and dtypes of trees that should be the
same pytree are for `chex.assert_trees_all_equal_structs` and its kin.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from stepc._compiler.placement import stored_as
from stepc._compiler.rows import RowUse
from stepc._compiler.step import Step
from stepc._core.nodes import InScan, MapNode, MeanNode, Node, OverMesh, Wrap, rows_axis
from stepc._language.kinds import Batch, Kind, Metrics
from stepc._language.pipeline import Pipeline, Transform, expand_transforms, transforms_of
from stepc._language.reference import complete_transforms, fold_references
from stepc._language.semantics import Fn, Gradient, GradientTerm, Microbatch, whole_batch
from stepc._language.state import State, copied_to, describe_leaf, key_data, leaves_by_path
from stepc._language.transforms.alternate import Alternate
from stepc.errors import ConfigError, EquivalenceError, faults_in_one, leaf_text, listed
from stepc.inspect.budget import Budget

_NUM_STEPS = 3


def assert_equivalent(step: Step, state: State, batch: Batch, *, tolerance: float = 1e-5) -> None:
    """Assert that one compiled step equals its reference: parameters, optimizer state, every other leaf, every metric.

    Meaning: step(state, batch) == step.reference(state, batch), leaf by leaf.
    Why: the shortest test that your own pipeline means on your mesh what it says.

    Args:
      step: a compiled step.
      state: it is copied, not donated, so you can go on using it.
      batch: a batch that divides.
      tolerance: the largest difference, relative to the largest magnitude in the leaf; 0 for bitwise. The default is
        not 0 because the reference sums in another order, and optimizers such as Adam divide by small numbers.
    Errors: EquivalenceError with every leaf that differs, and by how much.
    A gradient is rounded relative to the whole of it, not to each of its leaves. Of a bias before a norm, whose
    gradient is 0, only rounding is left, and Adam makes a full step of that. So an element may differ by as much again
    as in the reference if `tolerance` times the largest magnitude of the gradient is added to all of it, or subtracted.
    Example:
      >>> assert_equivalent(step, state, batch)  # doctest: +SKIP

    Source: ours.
    """
    expected = step.reference(state, batch)
    got, of = step(_copied(state), batch), f"{step!r} and its reference"
    try:
        assert_equal_trees(got, expected, tolerance=tolerance, of=of)
    except EquivalenceError:
        moved = [_with_moved_gradient(step, state, batch, amount) for amount in (tolerance, -tolerance)]
        facts = tuple(("loss", f"`{loss}`: {use}") for loss, use in _dependent_losses(step, state, batch))
        assert_equal_trees(got, expected, tolerance=tolerance, of=of, facts=facts, moved=moved)


@dataclass(frozen=True)
class _Moved(Transform):
    """A source whose gradient is off by a fraction of its largest magnitude, as a reference alone."""

    takes: ClassVar = None
    gives: ClassVar = Kind.GRADIENT
    source: Transform
    fraction: float

    def reference(self, inner: Fn) -> Fn:
        fn = self.source.reference(inner)

        def apply(state: State, microbatch: Microbatch) -> Gradient:
            gradient: Gradient = fn.apply(state, microbatch)
            # An optimizer may differentiate the loss itself, so these may be tracers.
            offset = self.fraction * reduce(
                jnp.maximum, [jnp.abs(leaf).max() for leaf in jax.tree.leaves(gradient.value)]
            )
            if gradient.whole is not None:  # it has no terms yet
                return gradient.linear(lambda leaf: leaf + jnp.asarray(offset, leaf.dtype))
            first, *others = gradient.terms
            total = jax.tree.map(lambda leaf: leaf + jnp.asarray(offset * first.count, leaf.dtype), first.total)
            return replace(gradient, terms=(GradientTerm(total, first.count), *others))

        return replace(fn, apply=apply)

    def expand(self) -> tuple[Node | Wrap, ...]:
        return self.source.expand()


def _with_moved_gradient(step: Step, state: State, batch: Batch, fraction: float) -> tuple[State, Metrics]:
    """The result of the reference with a gradient that is off, in every call of the loss."""
    transforms = _moved(complete_transforms(step.reference.pipeline_for(state, batch)), fraction)
    fn = fold_references(transforms, step.reference.axes)
    with step.reference.surroundings(state, batch) as copies:
        result = fn.apply(*copies)
    return stored_as(result.state, state), result.metrics


def _moved(transforms: tuple[Transform, ...], fraction: float) -> tuple[Transform, ...]:
    *outer, source = transforms
    if isinstance(source, Alternate):
        turns = ((name, Pipeline(_moved(transforms_of(pipeline), fraction))) for name, pipeline in source.turns)
        return (*outer, replace(source, turns=tuple(turns)))
    return (*outer, _Moved(source, fraction))


def assert_split_invariant(step: Step, state: State, batch: Batch, *, tolerance: float = 1e-5) -> None:
    """Assert that the gradient and the metrics do not depend on how the batch is split.

    Meaning: the reference of the gradient equals that of the same pipeline without `accumulate` and `shard`.
    Why: `assert_equivalent` compares a step with its reference, which splits the batch too. A contrastive loss, or a
      sum in place of a mean, is another loss under `accumulate(4)`, and both agree on it.

    Args:
      step: a compiled step.
      state: it is copied, not donated, so you can go on using it.
      batch: a batch that divides.
      tolerance: the largest difference, relative to the largest magnitude in the gradient, or to that of the metric.
        The default is not 0 because the sums are taken in another order.
    Errors: EquivalenceError with the loss of both, the parameters whose gradient differs, and what may be the cause.
    `rows()` stays: it gives the loss one row at a time, whatever the split. Draws of `rng="microbatch"` and of `noise`
    below a split depend on it, so they fail. It measures one batch: a difference proves, a success does not.
    Example:
      >>> assert_split_invariant(step, state, batch)  # doctest: +SKIP

    Source: ours.
    """
    reference = step.reference
    transforms = complete_transforms(reference.pipeline_for(state, batch))
    is_stacked = rows_axis(expand_transforms(transforms)) > 0
    if isinstance(transforms[-1], Alternate):
        what = "`assert_split_invariant` measures one gradient, and each turn of `alternate` has one."
        raise ConfigError(what, suggestion="Measure the step of each turn: `sc.compile(turn)`.")
    below_update = tuple(one for one in transforms if one.gives is Kind.GRADIENT)
    splits = [position for position, one in enumerate(below_update) if _is_split(one)]
    if not splits:
        return
    unsplit = tuple(one for one in below_update if not _is_split(one))
    with reference.surroundings(state, batch) as (copied, taken):
        rows = whole_batch(jax.tree.map(lambda leaf: leaf[0] if is_stacked else leaf, taken))
        of_both = (fold_references(stages, reference.axes) for stages in (below_update, unsplit))
        got, expected = (fn.apply(copied, rows).evaluated for fn in of_both)
    expected_grads = dict(leaves_by_path(expected.value))
    largest = max((float(np.max(np.abs(leaf), initial=0.0)) for leaf in expected_grads.values()), default=0.0)
    differ = [
        (path, difference)
        for path, leaf in leaves_by_path(got.value)
        if not (difference := _largest_difference(leaf, expected_grads[path])) <= tolerance * largest
    ]
    metrics = [
        (name, f"{value:.6g} in parts, {whole:.6g} of the whole batch")
        for name, value in got.reported.items()
        if name in expected.reported
        and not abs(value - (whole := expected.reported[name])) <= tolerance * max(abs(whole), largest)
    ]
    if not differ and not metrics:
        return
    written = " @ ".join(repr(below_update[position]) for position in splits)
    inside = [repr(one) for one in below_update[splits[0] :] if any(isinstance(node, MapNode) for node in one.expand())]
    shown = listed(f"{path} by {difference:.3g}" for path, difference in differ)
    causes = [f"`{loss}`: {use}" for loss, use in _dependent_losses(step, state, batch)]
    if not causes:
        causes = ["the loss couples the rows that it is given (a contrastive loss, batch statistics)"]
        causes += ["it is not a mean over them (a sum)"]
    causes += [f"`{one}` takes the gradient of each part" for one in inside]
    gradient = [("gradient", f"differs in {shown}; its largest magnitude is {largest:.3g}")] if differ else []
    raise EquivalenceError(
        f"`{written}` changes the gradient: the mean over parts of the batch is not that of the whole batch.",
        facts=(*metrics, *gradient, ("cause", f"either {', or '.join(causes)}" if len(causes) > 1 else causes[0])),
    )


def _dependent_losses(step: Step, state: State, batch: Batch) -> list[tuple[str, RowUse]]:
    """The losses that the plan knows to depend on the split, with what they do. The step is traced already."""
    return [(loss, use) for loss, use in step.lower(state, batch).plan.losses if use.depends_on_split]


def _is_split(transform: Transform) -> bool:
    """Whether a transform splits a batch into parts of several rows, and takes the mean over them."""
    match transform.expand():
        case (MeanNode(InScan() | OverMesh()),):
            return True
        case _:
            return False


def _largest_difference(one: Any, two: Any) -> float:  # Any: arrays
    if np.array_equal(one, two, equal_nan=True):
        return 0.0
    return float(np.max(np.abs(np.asarray(one, np.float64) - np.asarray(two, np.float64)), initial=0.0))


def assert_equal_trees(
    got: Any,  # Any, twice: trees of arrays
    expected: Any,
    *,
    tolerance: float,
    of: str,
    facts: tuple[tuple[str, str], ...] = (),
    moved: Sequence[Any] = (),
) -> None:
    """Assert that two trees of arrays agree, leaf by leaf.

    Args:
      got: a tree of arrays. Leaves are matched by path, so a tuple may stand for a NamedTuple.
      expected: a tree with the same paths.
      tolerance: as in `assert_equivalent`; 0 for bitwise.
      of: what is compared, for the message.
      facts: further rows for the message.
      moved: trees like `expected`. An element may differ by as much again as all of them together differ from it.
    Errors: EquivalenceError with every leaf that differs, and by how much.
    """
    left, right = leaves_by_path(got), leaves_by_path(expected)
    missing = {path for path, _ in right} ^ {path for path, _ in left}
    if missing or len(left) != len(right):
        raise EquivalenceError(f"The leaves of {of} differ.", facts=(("only in one", listed(sorted(missing))), *facts))
    by_path = dict(right)
    others = [dict(leaves_by_path(tree)) for tree in moved]
    faults = []
    for path, leaf in left:
        one, two, *more = (
            np.asarray(key_data(leaf)) for leaf in (leaf, by_path[path], *(tree[path] for tree in others))
        )
        if fault := _difference(path, one, two, tolerance, more):
            faults.append(fault)
    if faults:
        raise EquivalenceError(faults_in_one(faults, of=of), facts=facts)


def _difference(
    path: str, got: np.ndarray, expected: np.ndarray, tolerance: float, moved: Sequence[np.ndarray] = ()
) -> str | None:
    shown = leaf_text(path, "The array")
    if (got.shape, got.dtype) != (expected.shape, expected.dtype):
        return f"{shown} is {describe_leaf(got)}, expected {describe_leaf(expected)}."
    if np.array_equal(got, expected, equal_nan=got.dtype.kind in "fc"):
        return None
    wide, found, *others = (np.asarray(one, np.float64) for one in (expected, got, *moved))
    are_equal = np.isnan(wide) & np.isnan(found)  # of the numbers, where both are NaN
    wide, found, *others = (np.where(are_equal, 0.0, one) for one in (wide, found, *others))
    differences = np.abs(found - wide)
    largest_difference, magnitude = np.max(differences), np.max(np.abs(wide))
    allowed = sum((np.abs(other - wide) for other in others), np.zeros_like(wide))
    if np.all(differences <= tolerance * magnitude + allowed):
        return None
    return f"{shown} differs by {largest_difference:.3g}; its largest magnitude is {magnitude:.3g}."


def assert_within_budget(budget: Budget, step: Step, state: State, batch: Batch) -> None:
    """Assert that a step keeps its budget, for a state and a batch or for their shapes.

    Meaning: `step.lower(state, batch).compile().check(budget, traces=step.traces)`. If the budget limits `traces`, and
      `state` has arrays, three steps run first, each on the state that the one before returned.
    Why: one line in CI pins what your own step costs, so a change shows there instead of on the bill.

    Args:
      budget: what the step may cost.
      step: a compiled step.
      state: it is copied, not donated, so you can go on using it.
      batch: a batch that divides.
    Errors: BudgetError with a table of the limits, the measured values, and the lines responsible. It is an
      AssertionError, so pytest reports it as a failure.
    Numbers of bytes change with the version of XLA; counts do so much less.
    Example:
      >>> assert_within_budget(sc.Budget(gradient_reductions=1), step, state, batch)  # doctest: +SKIP

    Source: ours.
    """
    compiled = step.lower(state, batch).compile()
    if budget.traces is not None and all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state)):
        state = _copied(state)
        for _ in range(_NUM_STEPS):
            state, _ = jax.block_until_ready(step(state, batch))
    compiled.check(budget, traces=step.traces)


def _copied(state: State) -> State:
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return copied_to(state, shardings)
