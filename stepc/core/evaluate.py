"""What a core program means, by naive loops over its nodes. It shares no control flow with the reference.

The reference slices batches; this reader never does: it carries the *numbers* of the rows and takes them
from the whole batch only where the loss is computed.
"""

from typing import Any, TypeAlias, assert_never

import jax
import numpy as np
import optax

from stepc.core.nodes import Differentiate, Map, Mean, Program, Scale, Space, Time, Update

Tree: TypeAlias = Any  # any pytree of arrays
Value: TypeAlias = tuple[Tree, dict[str, Any]]  # a gradient, and the metrics that travel with it


def evaluate(program: Program, params: Tree, opt_state: Tree, batch: Tree) -> tuple[Tree, Tree, dict[str, Any]]:
    """One step of a whole program: new parameters, new optimizer state, metrics."""
    match program:
        case (Update(optimizer), *rest):
            grads, metrics = gradient(tuple(rest), params, batch)
            optimizer = optax.with_extra_args_support(optimizer)
            updates, opt_state = optimizer.update(grads, opt_state, params, value=metrics["loss"], grad=grads)
            return optax.apply_updates(params, updates), opt_state, metrics
        case _:
            raise ValueError("a program that updates nothing has a gradient and no step: call `gradient`")


def gradient(program: Program, params: Tree, batch: Tree) -> Value:
    """The gradient that a program without its update computes from a batch."""
    num_rows = len(jax.tree.leaves(batch)[0])
    return _on_rows(program, params, batch, np.arange(num_rows))


def _on_rows(program: Program, params: Tree, batch: Tree, rows: np.ndarray) -> Value:
    node, inner = program[0], program[1:]
    match node:
        case Differentiate(loss):
            cell = jax.tree.map(lambda leaf: leaf[rows], batch)
            value, grads = jax.value_and_grad(loss)(params, cell)
            return grads, {"loss": value}
        case Mean():
            parts = [_on_rows(inner, params, batch, part) for part in _split(node, rows)]
            return jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]) / len(leaves), *parts)
        case Scale(factor):
            grads, metrics = _on_rows(inner, params, batch, rows)
            return jax.tree.map(lambda leaf: leaf * factor, grads), metrics
        case Map(function, arguments):
            grads, metrics = _on_rows(inner, params, batch, rows)
            grads, added = function(grads, *arguments)
            return grads, {**metrics, **added}
        case Update():
            raise ValueError("an update stands outermost, and only once")
        case _:
            assert_never(node)


def _split(mean: Mean, rows: np.ndarray) -> list[np.ndarray]:
    match mean.place:
        case Time(size):
            return list(rows.reshape(-1, size).T)
        case Space():
            return list(rows.reshape(mean.size, -1))
        case _:
            assert_never(mean.place)
