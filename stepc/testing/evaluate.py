"""What a core program means, by naive loops over its nodes. It shares no control flow with the reference.

The reference slices batches; this reader never does: it carries the *numbers* of the rows and takes them
from the whole batch only where the loss is computed.
"""

import zlib
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, TypeAlias, assert_never

import jax
import jax.numpy as jnp
import numpy as np
import optax

from stepc._core.nodes import DifferentiateNode
from stepc._core.nodes import FollowNode
from stepc._core.nodes import GuardNode
from stepc._core.nodes import InScan
from stepc._core.nodes import MapNode
from stepc._core.nodes import MeanNode
from stepc._core.nodes import OverMesh
from stepc._core.nodes import Program
from stepc._core.nodes import RepeatNode
from stepc._core.nodes import RescaleNode
from stepc._core.nodes import ScaleNode
from stepc._core.nodes import UnderVmap
from stepc._core.nodes import UpdateNode
from stepc._core.nodes import named
from stepc._language.terms import LossOutcome
from stepc._language.terms import Metric
from stepc._language.terms import Sums
from stepc._language.terms import accumulation_dtype
from stepc._language.terms import combine_metrics
from stepc._language.terms import divide_by_count
from stepc._language.terms import loss_outcome
from stepc._language.terms import metric_value
from stepc._language.terms import sum_arrays
from stepc._language.terms import sum_of_squares
from stepc._language.terms import Mean as Term

Tree: TypeAlias = Any  # any pytree of arrays


@dataclass(frozen=True)
class EvaluationState:
    """All that a program reads and changes besides the batch.

    Args:
      step: how many steps were made.
      rng: a typed key.
      model_state: the model's own state, if the loss has one.
      slots: what the nodes of a program keep, by the names that `named` gives them.
    """

    params: Tree
    opt_state: Tree
    step: Any = 0
    rng: Any = None
    model_state: Tree = None
    slots: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Flow:
    """A gradient in flight: for each term the sum of its gradients and of its counts; the metrics likewise."""

    terms: tuple[tuple[Tree, Any], ...]
    metrics: dict[str, Metric]
    model_state: Tree


def evaluate(program: Program, world: EvaluationState, batch: Tree) -> tuple[EvaluationState, dict[str, Any]]:
    """One dispatch of a whole program: the world after it, and the metrics."""
    match program:
        case (RepeatNode(size), *rest):
            told = []
            for turn in range(size):
                world, metrics = evaluate(tuple(rest), world, jax.tree.map(lambda leaf, turn=turn: leaf[turn], batch))
                told.append(metrics)
            return world, jax.tree.map(lambda *one: jnp.stack(one), *told)
        case _:
            return _one_step(program, world, batch)


def gradient(program: Program, world: EvaluationState, batch: Tree) -> tuple[Tree, dict[str, Any]]:
    """The gradient that a program without its update computes from a batch, and its metrics."""
    flow = _on_rows(program, world, batch, np.arange(len(jax.tree.leaves(batch)[0])))
    return _value(flow, world.params), _reported(flow)


def _one_step(program: Program, world: EvaluationState, batch: Tree) -> tuple[EvaluationState, dict[str, Any]]:
    names = {id(node): name for name, node in named(program).items()}
    place = next(n for n, node in enumerate(program) if isinstance(node, UpdateNode))
    outer, update, rest = program[:place], program[place], program[place + 1 :]
    flow = _on_rows(rest, world, batch, np.arange(len(jax.tree.leaves(batch)[0])))
    grads, metrics = _value(flow, world.params), _reported(flow)
    squares = sum_arrays([sum_of_squares(leaf) for leaf in jax.tree.leaves(grads)])
    fine = bool(jnp.isfinite(metrics["loss"])), bool(jnp.isfinite(squares))
    guards = [node for node in outer if isinstance(node, GuardNode)]
    scales = [node for node in rest if isinstance(node, RescaleNode)]
    happened = all(fine) if guards else fine[1] or not scales
    slots = dict(world.slots)
    for node in scales:
        metrics[names[id(node)]] = jax.tree.leaves(slots[names[id(node)]])[0]
        slots[names[id(node)]] = node.advance(slots[names[id(node)]], *map(jnp.asarray, fine), *node.arguments)
    if happened:
        optimizer = optax.with_extra_args_support(update.optimizer)  # pyright: ignore[reportAttributeAccessIssue]
        updates, opt_state = optimizer.update(grads, world.opt_state, world.params, value=metrics["loss"], grad=grads)
        params = optax.apply_updates(world.params, updates)
        for node in outer:
            if isinstance(node, FollowNode):
                slots[names[id(node)]] = node.advance(slots[names[id(node)]], params, *node.arguments)
        world = replace(world, params=params, opt_state=opt_state, step=world.step + 1, model_state=flow.model_state)
    for node in guards:
        total, in_a_row = slots[names[id(node)]]
        count = 0 if happened else 1
        slots[names[id(node)]] = type(slots[names[id(node)]])(total + count, 0 * in_a_row if happened else in_a_row + 1)
        metrics["skipped"] = jnp.asarray(count, jnp.int32)
    return replace(world, slots=slots), metrics


def _on_rows(program: Program, world: EvaluationState, batch: Tree, rows: np.ndarray, factor: Any = 1.0) -> _Flow:
    node, inner = program[0], program[1:]
    match node:
        case DifferentiateNode():
            return _differentiated(node, world, batch, rows, factor)
        case MeanNode():
            return _averaged(node, inner, world, batch, rows, factor)
        case ScaleNode(by):
            flow = _on_rows(inner, world, batch, rows, factor)
            return replace(flow, terms=_each(flow.terms, lambda leaf: leaf * by))
        case MapNode():
            flow = _on_rows(inner, world, batch, rows, factor)
            key = (_key(world, zlib.crc32(_name(program, node).encode()) | 2**31, rows[0]),) if node.draws else ()
            value, told = node.measured(_value(flow, world.params))
            grads, added = node.applied(_value(flow, world.params), value, *key)
            return replace(flow, terms=((_wide(grads), 1),), metrics={**flow.metrics, **_scalars({**told, **added})})
        case RescaleNode():
            by = jax.tree.leaves(world.slots[_name(program, node)])[0]
            flow = _on_rows(inner, world, batch, rows, factor * by)
            return replace(flow, terms=_each(flow.terms, lambda leaf: leaf / by))
        case UpdateNode() | FollowNode() | GuardNode() | RepeatNode():
            raise ValueError(f"`{node}` stands outside of the gradient, and only once")
        case _:
            assert_never(node)


def _differentiated(
    node: DifferentiateNode, world: EvaluationState, batch: Tree, rows: np.ndarray, factor: Any
) -> _Flow:
    cell = jax.tree.map(lambda leaf: leaf[rows], batch)
    keys = ()
    if node.rng is not None:
        drawn = [_key(world, row) for row in (rows if node.rng == "example" else rows[:1])]
        keys = (jnp.stack(drawn) if node.rng == "example" else drawn[0],)

    def outcome(params: Tree) -> LossOutcome:
        model_state = (world.model_state,) if node.model_state else ()
        return loss_outcome(
            node.function(params, cell, *keys, *model_state), has_aux=node.has_aux, model_state=node.model_state
        )

    found = outcome(world.params)
    terms = []
    for number, term in enumerate(found.terms):
        grads = jax.grad(lambda params, number=number: outcome(params).terms[number].total * factor)(world.params)
        terms.append((_wide(grads), term.count))
    return _Flow(tuple(terms), {"loss": Sums(found.terms), **found.metrics}, found.model_state)


def _averaged(
    mean: MeanNode, inner: Program, world: EvaluationState, batch: Tree, rows: np.ndarray, factor: Any
) -> _Flow:
    parts: list[_Flow] = []
    for part in _split(mean, rows):
        parts.append(_on_rows(inner, world, batch, part, factor))
        if isinstance(mean.place, InScan):
            world = replace(world, model_state=parts[-1].model_state)

    def add(one: Any, two: Any) -> Any:
        narrow = mean.dtype or one.dtype
        return one.astype(narrow) + two.astype(narrow)

    def both(one: _Flow, two: _Flow) -> _Flow:
        pairs = zip(one.terms, two.terms, strict=True)
        terms = tuple((jax.tree.map(add, a[0], b[0]), a[1] + b[1]) for a, b in pairs)
        return _Flow(terms, {name: combine_metrics(one.metrics[name], two.metrics[name]) for name in one.metrics}, None)

    model_state = (
        parts[-1].model_state if isinstance(mean.place, InScan) else _mean([part.model_state for part in parts])
    )
    return replace(reduce(both, parts), model_state=model_state)


def _split(mean: MeanNode, rows: np.ndarray) -> list[np.ndarray]:
    match mean.place:
        case InScan(size):
            return list(rows.reshape(-1, size).T)
        case OverMesh():
            return list(rows.reshape(mean.size, -1))
        case UnderVmap():
            return list(rows.reshape(-1, 1))
        case _:
            assert_never(mean.place)


def _mean(trees: list[Tree]) -> Tree:
    return jax.tree.map(lambda *one: (sum_arrays(one) / len(one)).astype(one[0].dtype), *trees)


def _value(flow: _Flow, params: Tree) -> Tree:
    whole = [jax.tree.map(lambda leaf, count=count: divide_by_count(leaf, count), grads) for grads, count in flow.terms]
    return jax.tree.map(lambda like, *parts: sum_arrays(parts).astype(like.dtype), params, *whole)


def _reported(flow: _Flow) -> dict[str, Any]:
    return {name: metric_value(metric) for name, metric in flow.metrics.items()}


def _each(terms: tuple[tuple[Tree, Any], ...], function: Any) -> tuple[tuple[Tree, Any], ...]:
    return tuple((jax.tree.map(function, grads), count) for grads, count in terms)


def _wide(grads: Tree) -> Tree:
    return jax.tree.map(lambda leaf: leaf.astype(accumulation_dtype(leaf.dtype)), grads)


def _scalars(added: dict[str, Any]) -> dict[str, Metric]:
    return {name: Term(value, 1) for name, value in added.items()}


def _name(program: Program, node: Any) -> str:
    # By identity: two equal nodes have two names. What stands on the left does not change the names on the right.
    return next(name for name, one in named(program).items() if one is node)


def _key(world: EvaluationState, *numbers: Any) -> Any:
    return reduce(jax.random.fold_in, numbers, jax.random.fold_in(world.rng, world.step))
