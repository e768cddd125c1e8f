"""The naive evaluator of core programs, by loops over nodes. It shares no control flow with the reference.

The reference slices batches. The evaluator never does: it passes on the *numbers* of rows, and takes the rows from the
whole batch only where the loss is computed.
"""

from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, TypeAlias, assert_never

import jax
import jax.numpy as jnp
import numpy as np
import optax

from stepc._core.nodes import (
    DifferentiateNode,
    FollowNode,
    GuardNode,
    InScan,
    MapNode,
    MeanNode,
    OverMesh,
    Program,
    RepeatNode,
    RescaleNode,
    ScaleNode,
    UnderVmap,
    UpdateNode,
    named,
)
from stepc._language.semantics import draw_tag, narrowed
from stepc._language.terms import (
    LossOutcome,
    Mean,
    Metric,
    Sums,
    accumulation_dtype,
    combine_metrics,
    divide_by_count,
    loss_outcome,
    metric_value,
    power_of_two,
    sum_arrays,
    sum_of_squares,
)

Tree: TypeAlias = Any  # any pytree of arrays


@dataclass(frozen=True)
class EvaluationState:
    """Everything that a program reads and changes, besides the batch.

    Args:
      step: the number of steps made.
      rng: a typed key.
      model_state: the model's own state, if the loss has one.
      slots: what the nodes of a program keep, by the names that `named` gives them.
    """

    params: Tree
    opt_state: Tree
    step: Any = 0  # Any: a number, or an array
    rng: Any = None  # Any: a typed key
    model_state: Tree = None
    slots: dict[str, Any] = field(default_factory=dict)  # Any: by node


@dataclass(frozen=True)
class _SummedGradient:
    """A gradient before division: for each term the sum of its gradients and of its counts; the metrics likewise."""

    terms: tuple[tuple[Tree, Any], ...]  # Any: a number, or an array
    metrics: dict[str, Metric]
    model_state: Tree

    def value(self) -> Tree:
        """Every term divided by its count, and added up, in float32 at least."""
        means = [
            jax.tree.map(lambda leaf, count=count: divide_by_count(leaf, count), total) for total, count in self.terms
        ]
        return jax.tree.map(lambda *terms: sum_arrays(terms), *means)

    def reported(self) -> dict[str, Any]:  # Any: arrays
        """The metrics, as numbers."""
        return {name: metric_value(metric) for name, metric in self.metrics.items()}

    def linear(self, function: Any) -> "_SummedGradient":  # Any: of a leaf
        """The function of every leaf of every sum."""
        return replace(self, terms=tuple((jax.tree.map(function, total), count) for total, count in self.terms))


def evaluate(program: Program, state: EvaluationState, batch: Tree) -> tuple[EvaluationState, dict[str, Any]]:
    """One dispatch of a whole program: the state after it, and the metrics."""
    match program:
        case (RepeatNode(size), *rest):
            each = []
            for j in range(size):
                state, metrics = _one_step(tuple(rest), state, jax.tree.map(lambda leaf, j=j: leaf[j], batch))
                each.append(metrics)
            return state, jax.tree.map(lambda *values: jnp.stack(values), *each)
        case _:
            return _one_step(program, state, batch)


def gradient(program: Program, state: EvaluationState, batch: Tree) -> tuple[Tree, dict[str, Any]]:
    """The gradient that a program without an update computes from a batch, and its metrics."""
    summed = _gradient_of_rows(program, state, batch, np.arange(len(jax.tree.leaves(batch)[0])))
    return summed.value(), summed.reported()


def _one_step(program: Program, state: EvaluationState, batch: Tree) -> tuple[EvaluationState, dict[str, Any]]:
    names = {id(node): name for name, node in named(program).items()}
    place = next(n for n, node in enumerate(program) if isinstance(node, UpdateNode))
    outer, update, inner = program[:place], program[place], program[place + 1 :]
    guards = [node for node in outer if isinstance(node, GuardNode)]
    scales = [node for node in inner if isinstance(node, RescaleNode)]
    summed = _gradient_of_rows(inner, state, batch, np.arange(len(jax.tree.leaves(batch)[0])))
    grads, metrics = narrowed(summed.value(), state.params), summed.reported()
    squares = sum_arrays([sum_of_squares(leaf) for leaf in jax.tree.leaves(grads)])
    finite = bool(jnp.isfinite(metrics["loss"])), bool(jnp.isfinite(squares))
    happens = all(finite) if guards else finite[1] or not scales
    slots = dict(state.slots)
    for node in scales:
        name = names[id(node)]
        metrics[name] = jax.tree.leaves(slots[name])[0]
        slots[name] = node.advance(slots[name], *map(jnp.asarray, finite), *node.arguments)
    if happens:
        optimizer = optax.with_extra_args_support(update.optimizer)  # pyright: ignore[reportAttributeAccessIssue]
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, value=metrics["loss"], grad=grads)
        params = optax.apply_updates(state.params, updates)
        for node in outer:
            if isinstance(node, FollowNode):
                slots[names[id(node)]] = node.advance(slots[names[id(node)]], params, *node.arguments)
        state = replace(state, params=params, opt_state=opt_state, step=state.step + 1, model_state=summed.model_state)
    for node in guards:
        name, count = names[id(node)], 0 if happens else 1
        total, consecutive = slots[name]
        slots[name] = type(slots[name])(total + count, (consecutive + count) * count)
        metrics["skipped"] = jnp.asarray(count, jnp.int32)
    return replace(state, slots=slots), metrics


def _gradient_of_rows(
    program: Program, state: EvaluationState, batch: Tree, rows: np.ndarray, factor: Any = 1.0
) -> _SummedGradient:  # Any: what the loss is multiplied by
    node, inner = program[0], program[1:]
    match node:
        case DifferentiateNode():
            return _differentiated(node, state, batch, rows, factor)
        case MeanNode():
            return _averaged(node, inner, state, batch, rows, factor)
        case ScaleNode(by):
            return _gradient_of_rows(inner, state, batch, rows, factor).linear(lambda leaf: leaf * by)
        case RescaleNode():
            by = jax.tree.leaves(state.slots[_name(program, node)])[0]
            return _gradient_of_rows(inner, state, batch, rows, factor * by).linear(lambda leaf: leaf / by)
        case MapNode():
            summed = _gradient_of_rows(inner, state, batch, rows, factor)
            value = summed.value()
            key = (_key(state, draw_tag(_name(program, node)), rows[0]),) if node.draws else ()
            measured, before = node.measured(value)
            grads, after = node.applied(value, measured, *key)
            added = {name: Mean(metric, 1) for name, metric in {**before, **after}.items()}
            return replace(summed, terms=((_widened(grads), 1),), metrics={**summed.metrics, **added})
        case UpdateNode() | FollowNode() | GuardNode() | RepeatNode():
            raise ValueError(f"`{node}` must be outside the gradient, and appear once")
        case _:
            assert_never(node)


def _differentiated(
    node: DifferentiateNode, state: EvaluationState, batch: Tree, rows: np.ndarray, factor: Any
) -> _SummedGradient:
    microbatch = jax.tree.map(lambda leaf: leaf[rows], batch)
    keys = ()
    if node.rng is not None:
        drawn = [_key(state, row) for row in (rows if node.rng == "example" else rows[:1])]
        keys = (jnp.stack(drawn) if node.rng == "example" else drawn[0],)

    def outcome(params: Tree) -> LossOutcome:
        model_state = (state.model_state,) if node.model_state else ()
        returned = node.function(params, microbatch, *keys, *model_state)
        return loss_outcome(returned, has_aux=node.has_aux, model_state=node.model_state)

    found = outcome(state.params)
    terms = []
    for number, term in enumerate(found.terms):
        unit = power_of_two(term.count)
        by = factor / unit
        grads = jax.grad(lambda params, number=number, by=by: outcome(params).terms[number].total * by)(state.params)
        terms.append((jax.tree.map(lambda leaf, unit=unit: leaf * unit, _widened(grads)), term.count))
    return _SummedGradient(tuple(terms), {"loss": Sums(found.terms), **found.metrics}, found.model_state)


def _averaged(
    mean: MeanNode, inner: Program, state: EvaluationState, batch: Tree, rows: np.ndarray, factor: Any
) -> _SummedGradient:
    parts: list[_SummedGradient] = []
    for part in _split(mean, rows):
        parts.append(_gradient_of_rows(inner, state, batch, part, factor))
        if isinstance(mean.place, InScan):
            state = replace(state, model_state=parts[-1].model_state)

    def add(one: Any, two: Any) -> Any:
        dtype = mean.dtype or one.dtype
        return one.astype(dtype) + two.astype(dtype)

    def both(one: _SummedGradient, two: _SummedGradient) -> _SummedGradient:
        pairs = zip(one.terms, two.terms, strict=True)
        terms = tuple((jax.tree.map(add, a[0], b[0]), a[1] + b[1]) for a, b in pairs)
        metrics = {name: combine_metrics(one.metrics[name], two.metrics[name]) for name in one.metrics}
        return _SummedGradient(terms, metrics, None)

    model_states = [part.model_state for part in parts]
    model_state = model_states[-1] if isinstance(mean.place, InScan) else _mean(model_states)
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
    return jax.tree.map(lambda *leaves: (sum_arrays(leaves) / len(leaves)).astype(leaves[0].dtype), *trees)


def _widened(grads: Tree) -> Tree:
    return jax.tree.map(lambda leaf: leaf.astype(accumulation_dtype(leaf.dtype)), grads)


def _name(program: Program, node: Any) -> str:  # Any: a node with a name
    # By identity, since two equal nodes have two names. Nodes on the left do not change the names on the right.
    return next(name for name, one in named(program).items() if one is node)


def _key(state: EvaluationState, *numbers: Any) -> Any:  # Any: integers; a typed key
    return reduce(jax.random.fold_in, numbers, jax.random.fold_in(state.rng, state.step))
