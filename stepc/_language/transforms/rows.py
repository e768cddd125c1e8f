"""`rows`: a mean over single rows, side by side."""

from dataclasses import dataclass, replace
from typing import ClassVar

from stepc._core.nodes import MeanNode, UnderVmap
from stepc._language.kinds import Kind
from stepc._language.model_state import over_parts
from stepc._language.pipeline import Transform
from stepc._language.semantics import Fn, Gradient, Microbatch, sum_gradients
from stepc._language.state import State


@dataclass(frozen=True, repr=False)
class Rows(Transform):
    """The mean over single rows."""

    takes: ClassVar = Kind.GRADIENT
    gives: ClassVar = Kind.GRADIENT

    def reference(self, inner: Fn) -> Fn:
        def apply(state: State, microbatch: Microbatch) -> Gradient:
            singles = (microbatch.part(lambda leaf, j=j: leaf[j : j + 1]) for j in range(microbatch.num_rows))
            parts = [inner.apply(state, single) for single in singles]
            result = over_parts([part.model_state for part in parts], one_after_another=False)
            return replace(sum_gradients(parts), model_state=result)

        return Fn(inner.init, apply, inner.axes, inner.names)

    def expand(self) -> tuple[MeanNode, ...]:
        return (MeanNode(UnderVmap(), written=repr(self)),)


def rows() -> Rows:
    """Average the gradient over single rows, side by side: the transforms on its right see one row at a time.

    Meaning: mean(inner(params, rows[j:j + 1]) for j in range(number of rows)).
    Why: per-example gradients, for transforms that are not linear. `rows() @ clip(c, nonfinite="zero")` bounds what any
      one example adds, as DP-SGD requires: `noise(s) @ accumulate(k) @ shard(dp) @ rows() @ clip(c, nonfinite="zero") @
      grad(loss)`. Without "zero", one row with a NaN makes the mean NaN.

    Shapes: the stage on its right sees batch leaves `[1, ...]`.
    Units: the gradient is per example (a mean), not a sum.
    Type: gradient -> gradient
    Errors: PipelineTypeError if the stage on its right returns no gradient; ConfigError at `compile` if a transform on
      its right splits the rows again.
    The gradients of all rows of a microbatch exist at once: as many copies of the parameters as there are rows. Use
    `accumulate` on its left to make microbatches smaller.
    Example:
      >>> rows() @ clip(1.0) @ grad(loss)
      rows() @ clip(1.0) @ grad(loss)

    Source: Abadi et al., "Deep Learning with Differential Privacy", 2016, https://arxiv.org/abs/1607.00133; `jax.vmap`.
    """
    return Rows()
