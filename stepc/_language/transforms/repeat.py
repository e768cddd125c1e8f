"""`repeat`: several steps in one dispatch."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from stepc._core.nodes import RepeatNode
from stepc._language.fields import positive_integer
from stepc._language.kinds import Batch, Kind
from stepc._language.pipeline import Transform
from stepc._language.semantics import Fn, StepResult
from stepc._language.state import State


@dataclass(frozen=True, repr=False)
class Repeat(Transform):
    """`n` steps in one dispatch."""

    takes: ClassVar = Kind.STEP
    gives: ClassVar = Kind.STEP
    position: ClassVar = "outermost"
    n: int

    def __post_init__(self) -> None:
        positive_integer("repeat", "n", self.n)

    def reference(self, inner: Fn) -> Fn:
        def apply(state: State, batch: Batch) -> StepResult:
            results: list[StepResult] = []
            for j in range(self.n):
                results.append(inner.apply(state, jax.tree.map(lambda leaf, j=j: leaf[j], batch)))
                state = results[-1].state
            metrics = jax.tree.map(lambda *values: jnp.stack(values), *[one.metrics for one in results])
            return results[-1]._replace(metrics=metrics)

        return Fn(inner.init, apply, inner.axes, inner.names)

    def expand(self) -> tuple[RepeatNode, ...]:
        return (RepeatNode(self.n, written=repr(self)),)


def repeat(n: int) -> Repeat:
    """Make `n` steps in one dispatch, each on its own batch.

    Meaning: for j in range(n): state, metrics[j] = step(state, batch[j]).
    Why: a dispatch costs tens of microseconds, which is more than a step of a tiny model.

    Args:
      n: number of steps, a positive integer.
    Shapes: every batch leaf is `[n, batch, ...]`; every metric is `[n]`.
    Units: `state.step` counts steps, not dispatches.
    Type: step -> step
    Errors: FieldTypeError, FieldValueError for a bad `n`; PipelineTypeError if the stage on its right returns no step;
      ConfigError at `compile` if it is not the outermost transform; BatchError if the first axis is not `n`.
    It gains nothing if a step takes longer than its dispatch. `run` checks for errors, signals and limits between
    dispatches only, up to `n` steps late.
    Example:
      >>> repeat(32) @ update(optax.sgd(0.1)) @ grad(loss)
      repeat(32) @ update(optax.sgd(0.1)) @ grad(loss)

    Source: ours; "steps per execution" in Keras and others.
    """
    return Repeat(n)
