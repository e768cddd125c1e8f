"""`sam`: the gradient at parameters that are moved along the gradient."""

from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp

from stepc._core.nodes import PerturbNode
from stepc._language.fields import finite_number
from stepc._language.kinds import Grads, Kind, Params
from stepc._language.pipeline import Transform
from stepc._language.semantics import Fn, Gradient, Microbatch
from stepc._language.state import State
from stepc._language.terms import sum_arrays, sum_of_squares


@dataclass(frozen=True, repr=False)
class Sam(Transform):
    """The inner gradient at the parameters moved by `rho` along the inner gradient."""

    takes: ClassVar = Kind.GRADIENT
    gives: ClassVar = Kind.GRADIENT
    rho: float

    def __post_init__(self) -> None:
        finite_number("sam", "rho", self.rho, positive=True)

    def reference(self, inner: Fn) -> Fn:
        def apply(state: State, microbatch: Microbatch) -> Gradient:
            here = inner.apply(state, microbatch).evaluated
            moved = move_along(state.trained, here.value, self.rho)
            there = inner.apply(state.with_trained(moved), microbatch).evaluated
            # What is reported and kept is that of the parameters themselves.
            return replace(here, terms=there.terms)

        return Fn(inner.init, apply, inner.axes, inner.names)

    def expand(self) -> tuple[PerturbNode, ...]:
        return (PerturbNode(move_along, (self.rho,), written=repr(self)),)


def move_along(params: Params, grads: Grads, rho: float) -> Params:
    """`params + rho * grads / norm(grads)` of what is trained; the same parameters where the gradient is zero."""
    norm = jnp.sqrt(sum_arrays([sum_of_squares(leaf) for leaf in jax.tree.leaves(grads)]))
    factor = jnp.where(norm == 0, 0.0, rho / jnp.where(norm == 0, 1.0, norm))  # a NaN stays one

    def moved(leaf: jax.Array, grad: jax.Array) -> jax.Array:
        return leaf + (factor * grad).astype(leaf.dtype)

    return jax.tree.map(moved, params, grads)


def sam(rho: float) -> Sam:
    """Take the gradient at the parameters moved by `rho` along the gradient: sharpness-aware minimization.

    Meaning: inner(params + rho * g / norm(g), rows), where g = inner(params, rows), and norm(g) is the root of the sum
      of squares over all leaves. Both calls see the same rows, keys and model state.
    Why: a step away from the sharpest direction leads to flatter minima, which generalize better.

    Args:
      rho: the distance by which the parameters are moved; a positive finite number, often 0.05.
    Shapes: the gradient has the shapes of `params`.
    Units: `rho` is a distance between parameters; the gradient keeps its units.
    Type: gradient -> gradient
    Errors: FieldTypeError, FieldValueError for a bad `rho`; PipelineTypeError if the stage on its right returns no
      gradient.
    The gradient on its right is computed twice, and reduced twice. It is not linear, so its position matters:
    `sam(rho) @ accumulate(k)` moves once, along the gradient of the whole batch; `accumulate(k) @ sam(rho)` moves for
    each microbatch along its own gradient ("m-SAM"), and to the right of `shard` each device moves along its own. The
    loss, the metrics and the new model state are those at the parameters themselves. A gradient of zero moves nothing.
    Example:
      >>> sam(0.05) @ accumulate(4) @ grad(loss)
      sam(0.05) @ accumulate(4) @ grad(loss)

    Source: Foret, Kleiner, Mobahi, Neyshabur, "Sharpness-Aware Minimization for Efficiently Improving Generalization",
      2021, https://arxiv.org/abs/2010.01412.
    """
    return Sam(rho)
