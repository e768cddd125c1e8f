"""`clip`: bound the global norm of the gradient."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from stepc.core.nodes import Map
from stepc.language.fields import finite_number
from stepc.language.kinds import Grads, Kind, Metrics, Rows
from stepc.language.meaning import Fn, Gradient
from stepc.language.pipeline import Transform
from stepc.language.state import State


@dataclass(frozen=True, repr=False)
class Clip(Transform):
    """Scale the gradient to a global norm of at most `max_norm`."""

    takes: ClassVar = Kind.GRADIENT
    gives: ClassVar = Kind.GRADIENT
    max_norm: float

    def __post_init__(self) -> None:
        finite_number("clip", "max_norm", self.max_norm, positive=True)

    def meaning(self, inner: Fn) -> Fn:
        def apply(state: State, rows: Rows) -> Gradient:
            grads, metrics = inner.apply(state, rows)
            clipped, added = clip_to_norm(grads, self.max_norm)
            return Gradient(clipped, {**metrics, **added})

        return Fn(inner.init, apply, inner.axes)

    def expand(self) -> tuple[Map, ...]:
        return (Map(clip_to_norm, (self.max_norm,), adds=("grad_norm",), written=repr(self)),)


def clip_to_norm(grads: Grads, max_norm: float) -> tuple[Grads, Metrics]:
    """The gradient times min(1, max_norm / norm), and its norm before. Sums of squares are taken in float32."""
    squares = [
        jnp.sum(jnp.square(leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)))) for leaf in jax.tree.leaves(grads)
    ]
    norm = jnp.sqrt(sum(squares[1:], squares[0]))
    factor = jnp.where(norm > max_norm, max_norm / norm, jnp.ones_like(norm))
    return jax.tree.map(lambda leaf: leaf * factor.astype(leaf.dtype), grads), {"grad_norm": norm}


def clip(max_norm: float) -> Clip:
    """Scale the gradient to a global norm of at most `max_norm`.

    Meaning: g * min(1, max_norm / norm(g)), norm(g) the root of the sum of all squares of all leaves.
    Why: one bad batch cannot throw the parameters far away.

    Args:
      max_norm: the largest norm that passes unchanged; a positive finite number.
    Shapes: those of the gradient.
    Units: of the gradient.
    Type: gradient -> gradient; adds the metric `grad_norm`, the norm before clipping
    Errors: FieldTypeError, FieldValueError for a bad `max_norm`; PipelineTypeError if the stage on its right gives
      no gradient.
    Not linear, so its place matters: `clip(c) @ accumulate(k)` clips the average once, `accumulate(k) @ clip(c)`
    clips each microbatch, and to the right of `shard` each device's part. A gradient that is not finite stays so.
    Example:
      >>> clip(1.0) @ accumulate(4) @ grad(loss)
      clip(1.0) @ accumulate(4) @ grad(loss)

    Source: Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural networks", 2013,
      https://arxiv.org/abs/1211.5063.
    """
    return Clip(max_norm)
