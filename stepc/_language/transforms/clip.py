"""`clip`: bound the global norm of the gradient."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from stepc._core.nodes import MapNode
from stepc._language.fields import finite_number, one_of
from stepc._language.kinds import Grads, Kind, Metrics
from stepc._language.pipeline import Transform
from stepc._language.semantics import Fn, Gradient, Microbatch
from stepc._language.state import State
from stepc._language.terms import squares_of, sum_arrays

NONFINITE = ("nan", "zero")  # what becomes of a gradient whose norm is not finite


@dataclass(frozen=True, repr=False)
class Clip(Transform):
    """Scale the gradient down to a global norm of at most `max_norm`."""

    takes: ClassVar = Kind.GRADIENT
    gives: ClassVar = Kind.GRADIENT
    max_norm: float
    nonfinite: str = field(default="nan", kw_only=True)

    def __post_init__(self) -> None:
        finite_number("clip", "max_norm", self.max_norm, positive=True)
        one_of("nonfinite", self.nonfinite, NONFINITE)

    def reference(self, inner: Fn) -> Fn:
        def apply(state: State, microbatch: Microbatch) -> Gradient:
            return inner.apply(state, microbatch).map(clip_to_norm, self.max_norm, self.nonfinite)

        return Fn(inner.init, apply, inner.axes, inner.names)

    def expand(self) -> tuple[MapNode, ...]:
        return (
            MapNode(
                multiply,
                (self.max_norm, self.nonfinite),
                keeps_finite=self.nonfinite == "nan",
                keeps_zeros=True,
                measure=clipping_factor,
                reads="squares",
                written=repr(self),
            ),
        )


def clip_to_norm(grads: Grads, max_norm: float, nonfinite: str = "nan") -> tuple[Grads, Metrics]:
    """The gradient times min(1, max_norm / norm), and its norm before.

    A norm that is not finite makes the gradient NaN in every leaf, or zero.
    """
    factor, added = clipping_factor(squares_of(grads), max_norm, nonfinite)
    return multiply(grads, factor, max_norm, nonfinite), added


def clipping_factor(squares: Any, max_norm: float, _: str) -> tuple[jax.Array, Metrics]:  # Any: a tree like Grads
    """From the sums of squares: what to multiply the gradient by, NaN if its norm is not finite; and its norm."""
    norm = jnp.sqrt(sum_arrays(jax.tree.leaves(squares)))
    # An infinite norm would give a factor of 0: an update of zero, and nobody would see why.
    finite = jnp.where(jnp.isfinite(norm), norm, jnp.nan)
    return jnp.where(norm <= max_norm, jnp.ones_like(norm), max_norm / finite), {"grad_norm": norm}


def multiply(grads: Grads, factor: jax.Array, _: float, nonfinite: str) -> Grads:
    """The gradient times the factor."""
    if nonfinite == "nan":
        return jax.tree.map(lambda leaf: jax.lax.mul(leaf, factor.astype(leaf.dtype)), grads)
    is_finite = jnp.isfinite(factor)  # a selection: zero times NaN is NaN
    return jax.tree.map(lambda leaf: jnp.where(is_finite, leaf * factor.astype(leaf.dtype), 0), grads)


def clip(max_norm: float, *, nonfinite: str = "nan") -> Clip:
    """Scale the gradient down to a global norm of at most `max_norm`.

    Meaning: g * min(1, max_norm / norm(g)), where norm(g) is the root of the sum of squares over all leaves.
    Why: one bad batch cannot throw the parameters far away.

    Args:
      max_norm: the largest norm that passes unchanged; a positive finite number.
      nonfinite: what becomes of a gradient whose norm is not finite. "nan" makes every leaf NaN, so that nobody
        overlooks it; "zero" makes every leaf zero, which bounds what a row can add to a private mean: `rows() @ clip(c,
        nonfinite="zero")`.
    Shapes: those of the gradient.
    Units: those of the gradient.
    Type: gradient -> gradient; adds the metric `grad_norm`, the norm before clipping
    Errors: FieldTypeError, FieldValueError for a bad `max_norm` or `nonfinite`; PipelineTypeError if the stage on its
      right returns no gradient.
    It is not linear, so its position matters: `clip(c) @ accumulate(k)` clips the average once, `accumulate(k) @
    clip(c)` clips each microbatch, and to the right of `shard` it clips each device's part. The loss is
    reported unchanged, even that of a row whose gradient "zero" drops.
    Example:
      >>> clip(1.0) @ accumulate(4) @ grad(loss)
      clip(1.0) @ accumulate(4) @ grad(loss)

    Source: Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural networks", 2013,
      https://arxiv.org/abs/1211.5063.
    """
    return Clip(max_norm, nonfinite=nonfinite)
