"""`epochs`: several epochs of minibatches of one batch, in one dispatch."""

from dataclasses import dataclass, field
from typing import ClassVar

import jax
import jax.numpy as jnp

from stepc._core.nodes import RepeatNode
from stepc._language.fields import positive_integer
from stepc._language.kinds import Batch, Kind
from stepc._language.pipeline import Transform
from stepc._language.semantics import Fn, StepResult, draw_tag, key_of
from stepc._language.state import State


@dataclass(frozen=True, repr=False)
class Epochs(Transform):
    """`n` epochs over one batch, of `minibatches` steps each."""

    takes: ClassVar = Kind.STEP
    gives: ClassVar = Kind.STEP
    position: ClassVar = "outermost"
    n: int
    minibatches: int = field(kw_only=True)

    def __post_init__(self) -> None:
        positive_integer("epochs", "n", self.n)
        positive_integer("epochs", "minibatches", self.minibatches)

    def reference(self, inner: Fn) -> Fn:
        def apply(state: State, batch: Batch) -> StepResult:
            start, num_rows, results = state, len(jax.tree.leaves(batch)[0]), list[StepResult]()
            for epoch in range(self.n):
                order = jax.random.permutation(key_of(start, draw_tag("epochs"), epoch), num_rows)
                for rows in jnp.split(order, self.minibatches):
                    results.append(inner.apply(state, jax.tree.map(lambda leaf, rows=rows: leaf[rows], batch)))
                    state = results[-1].state
            metrics = jax.tree.map(lambda *values: jnp.stack(values), *[one.metrics for one in results])
            return results[-1]._replace(metrics=metrics)

        return Fn(inner.init, apply, inner.axes, inner.names)

    def expand(self) -> tuple[RepeatNode, ...]:
        return (RepeatNode(self.n * self.minibatches, self.minibatches, written=repr(self)),)


def epochs(n: int, *, minibatches: int) -> Epochs:
    """Make `n` epochs over one batch in one dispatch: each shuffles its rows, and makes a step of every minibatch.

    Meaning: for e in range(n): for rows in split(permutation(key(seed, step, e), B), minibatches):
      state, metrics[...] = step(state, batch[rows]). `step` is that before the first epoch; the permutation is of all
      rows, so it depends neither on k nor on the mesh.
    Why: PPO and its like learn several times from one rollout. The batch stays where it is, once; a step gathers the
      rows of its minibatch.

    Args:
      n: number of epochs, a positive integer.
      minibatches: number of steps in an epoch, a positive integer. The batch size must be a multiple of it, and the
        minibatch of what the transforms on the right split it into.
    Shapes: every batch leaf is `[batch, ...]`; every metric is `[n * minibatches]`.
    Units: `state.step` counts steps, not epochs.
    Type: step -> step
    Errors: FieldTypeError, FieldValueError for a bad field; PipelineTypeError if the stage on its right returns no
      step; ConfigError at `compile` if it is not the outermost transform, and at `init` for model state by rows, since
      a shuffled row has another place in every epoch; BatchError if the batch does not divide.
    On a mesh a minibatch has rows from every device: each step begins with an all-to-all of the rows of a minibatch.
    `run` checks for errors, signals and limits between dispatches only.
    Example:
      >>> epochs(4, minibatches=8) @ update(optax.adam(3e-4)) @ clip(0.5) @ grad(loss)
      epochs(4, minibatches=8) @ update(optax.adam(3e-4)) @ clip(0.5) @ grad(loss)

    Source: Schulman et al., "Proximal Policy Optimization Algorithms", 2017, arxiv.org/abs/1707.06347.
    """
    return Epochs(n, minibatches=minibatches)
