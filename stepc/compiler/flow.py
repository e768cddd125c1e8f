"""What flows from one instruction of a schedule to the next, and what adds up in it. It knows no loop and no mesh."""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from stepc.compiler import tally
from stepc.compiler.check import check_gradient
from stepc.compiler.instructions import Compute, Settle
from stepc.compiler.loss import Call, counts_of, keys_of
from stepc.compiler.tally import Tallies, tallied
from stepc.core.nodes import Differentiate, Map
from stepc.core.terms import Outcome, Sums, is_static, merged, ratio, total_of, wide
from stepc.language.kinds import Grads, Params, Rows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cell:
    """Some rows, and their numbers in the whole batch where anything asks for them."""

    rows: Rows
    numbers: Any  # Any: int32 `[rows]`, or None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Given:
    """What every cell of a step is given besides its rows.

    Args:
      params: the parameters.
      carry: the model's own state, or None.
      key: the key of this step, or None.
      scale: by which the loss is multiplied, or None.
      start: the number of the first row on this device; None outside of the devices, where all rows are.
      width: how many rows a device has.
      counts: of each term of the loss the count over the whole sum, where they are counted first.
      parts: the number of cells in that sum.
    """

    params: Params
    carry: Any  # Any: a tree of the user's
    key: Any  # Any: a typed key
    scale: Any  # Any: a scalar
    start: Any  # Any: an int32 scalar
    counts: Any = None  # Any: a tuple of scalars
    parts: int = field(default=1, metadata={"static": True})
    width: int = field(default=0, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Flow:
    """A gradient in the making, and what travels with it.

    Args:
      metrics: what is reported. It stands first: in a scan's carry, scalars after the gradient cost XLA's buffer
        assignment half a megabyte on the demo's GPT (measured, jax 0.10.2 on CPU).
      grads: a sum, in float32 at least; after `Settle` a value in the dtypes of the parameters.
      carry: the model's own state after the rows so far.
      finite: `[cells]`, whether the loss of each cell is.
      count: the number that the sum is to be divided by, if all cells count alike.
    """

    metrics: Tallies
    grads: Grads
    carry: Any  # Any: a tree of the user's
    finite: Any  # Any: a bool array
    count: float = field(default=1.0, metadata={"static": True})


def computed(instruction: Compute, call: Call, cell: Cell, given: Given) -> Flow:
    """The loss and its gradient on one cell."""
    node = instruction.node
    keys = None if node.rng is None else keys_of(node, given.key, cell.numbers)

    def scaled(params: Params) -> tuple[jax.Array, Outcome]:
        outcome = call(params, cell.rows, keys, given.carry)
        terms = merged(outcome.terms)
        total = _total(terms, given) if instruction.counts_first else terms[0].total
        return total * given.scale if instruction.rescaled else total, outcome

    (_, outcome), grads = jax.value_and_grad(scaled, has_aux=True)(given.params)
    sums = jax.tree.map(lambda leaf: leaf.astype(wide(leaf.dtype)), grads)
    finite = jnp.isfinite(total_of([term.total for term in outcome.terms]))[None]
    metrics = {"loss": tallied(Sums(outcome.terms)), **{name: tallied(one) for name, one in outcome.metrics.items()}}
    return Flow(metrics, sums, outcome.carry, finite, instruction.count)


def counted(node: Differentiate, cell: Cell, given: Given) -> Flow:
    """The counts of one cell, as a flow of nothing else."""
    keys = None if node.rng is None else keys_of(node, given.key, cell.numbers)
    counts = counts_of(node, given.params, given.carry, cell.rows, keys)
    return Flow({str(n): (tally.Tally(one, None, "sum"),) for n, one in enumerate(counts)}, (), None, jnp.ones(1, bool))


def settled(instruction: Settle, flow: Flow, params: Params) -> Flow:
    """The sum becomes a value."""

    def divided(count: Any) -> Grads:  # Any: a number, or a scalar
        return flow.grads if count is None else jax.tree.map(lambda leaf: ratio(leaf, count), flow.grads)

    match instruction.by:
        case "nothing":
            value = divided(None)
        case "count":
            value = divided(next(one.count for one in flow.metrics["loss"] if one.count is not None))
        case _:
            value = divided(None if flow.count == 1 else flow.count)
    return replace(flow, grads=jax.tree.map(lambda like, leaf: leaf.astype(like.dtype), params, value), count=1.0)


def opened(grads: Grads, added: dict[str, jax.Array], flow: Flow) -> Flow:
    """A value becomes a sum of one part again, with metrics of its own."""
    sums = jax.tree.map(lambda leaf: leaf.astype(wide(leaf.dtype)), grads)
    metrics = {name: (tally.Tally(jnp.asarray(value), None, "mean", 1.0),) for name, value in added.items()}
    return replace(flow, grads=sums, metrics={**flow.metrics, **metrics})


def added(total: Flow, flow: Flow, dtype: str | None) -> Flow:
    """One more part, in the type of the sum. Carry and flags are the loop's own matter."""
    narrow = flow.grads if dtype is None else jax.tree.map(lambda leaf: leaf.astype(dtype), flow.grads)
    return replace(
        total, metrics=tally.added(total.metrics, flow.metrics), grads=jax.tree.map(jnp.add, total.grads, narrow)
    )


def none_yet(shapes: Flow, dtype: str | None) -> Flow:
    """What is there before the first part."""
    zeros = jax.tree.map(lambda one: jnp.zeros(one.shape, dtype or one.dtype), shapes.grads)
    return Flow(tally.none_yet(shapes.metrics), zeros, None, None, shapes.count)


def over_lanes(flow: Flow, num_lanes: int) -> Flow:
    """Added up over a first axis; the carry is averaged."""
    return Flow(
        tally.times(tally.over_lanes(flow.metrics), num_lanes),
        jax.tree.map(lambda leaf: leaf.sum(axis=0, dtype=leaf.dtype), flow.grads),
        jax.tree.map(lambda leaf: (leaf.sum(axis=0) / num_lanes).astype(leaf.dtype), flow.carry),
        flow.finite.all(axis=0),
        flow.count * num_lanes,
    )


def times(flow: Flow, size: int) -> Flow:
    """Where `size` parts were added up."""
    return replace(flow, metrics=tally.times(flow.metrics, size), count=flow.count * size)


def _total(terms: tuple[Any, ...], given: Given) -> jax.Array:
    """Each term divided by its count over the whole sum, and added up."""
    found = iter(given.counts)
    wholes = [given.parts * term.count if is_static(term.count) else next(found) for term in terms]
    parts = [ratio(term.total, whole) for term, whole in zip(terms, wholes, strict=True)]
    return total_of(parts)


def applied(node: Map, grads: Grads, value: Any, keys: tuple[Any, ...]) -> tuple[Grads, dict[str, Any]]:
    """What a word makes of a gradient, which is one, and its metrics. Any: what it measured; typed keys; scalars."""
    returned = node.applied(grads, value, *keys)
    check_gradient(node.written, returned, grads)
    return returned
