"""`noise`: add Gaussian noise to the gradient."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax

from stepc._core.nodes import MapNode
from stepc._language.fields import finite_number
from stepc._language.kinds import Grads, Kind, Metrics
from stepc._language.pipeline import Transform
from stepc._language.semantics import Fn, Gradient, Microbatch, draw_tag, key_of
from stepc._language.state import State
from stepc._language.terms import accumulation_dtype


@dataclass(frozen=True, repr=False)
class Noise(Transform):
    """Add Gaussian noise of a given standard deviation."""

    takes: ClassVar = Kind.GRADIENT
    gives: ClassVar = Kind.GRADIENT
    stddev: float

    def __post_init__(self) -> None:
        finite_number("noise", "stddev", self.stddev, positive=True)

    def reference(self, inner: Fn) -> Fn:
        name = inner.fresh_name("noise")

        def apply(state: State, microbatch: Microbatch) -> Gradient:
            key = key_of(state, draw_tag(name), microbatch.numbers[0])
            return inner.apply(state, microbatch).map(add_noise, key, self.stddev)

        return Fn(inner.init, apply, inner.axes, (*inner.names, name))

    def expand(self) -> tuple[MapNode, ...]:
        return (MapNode(add_noise, (self.stddev,), draws=True, keeps_finite=True, name="noise", written=repr(self)),)


def add_noise(grads: Grads, key: Any, stddev: float) -> tuple[Grads, Metrics]:  # Any: a typed key
    """The gradient plus `stddev` times standard normal numbers, each leaf with its own key."""
    leaves, tree = jax.tree.flatten(grads)

    def noisy(number: int, leaf: jax.Array) -> jax.Array:
        drawn = jax.random.normal(jax.random.fold_in(key, number), leaf.shape, accumulation_dtype(leaf.dtype))
        return leaf + (stddev * drawn).astype(leaf.dtype)

    return jax.tree.unflatten(tree, [noisy(number, leaf) for number, leaf in enumerate(leaves)]), {}


def noise(stddev: float) -> Noise:
    """Add Gaussian noise to the gradient, drawn inside the program from the state's key.

    Meaning: g + stddev * normal(key), the key folded from (seed, step, the transform, number of the first row).
    Why: differential privacy. `noise(s) @ accumulate(k) @ shard(dp) @ rows() @ clip(c, nonfinite="zero") @ grad(loss)`
      draws once a step, after the reduction, the same on every device. With `s = noise_multiplier * c / batch_size`
      that is DP-SGD.

    Args:
      stddev: of what is added to the mean gradient; a positive finite number.
    Shapes: those of the gradient.
    Units: those of the gradient.
    Type: gradient -> gradient
    Errors: FieldTypeError, FieldValueError for a bad `stddev`; PipelineTypeError if the stage on its right returns no
      gradient.
    It is not linear: pending reductions happen before it, and inside `accumulate` it draws for every microbatch. It
    does not track the privacy budget.
    Example:
      >>> noise(0.1) @ grad(loss)
      noise(0.1) @ grad(loss)

    Source: Abadi et al., "Deep Learning with Differential Privacy", 2016, https://arxiv.org/abs/1607.00133.
    """
    return Noise(stddev)
