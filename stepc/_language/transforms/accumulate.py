"""`accumulate`: a mean over microbatches, in a scan."""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from stepc._core.nodes import InScan, MeanNode
from stepc._language.fields import floating_dtype, positive_integer
from stepc._language.kinds import Kind
from stepc._language.model_state import handed_on, over_parts
from stepc._language.pipeline import AutotuneRequest, Transform
from stepc._language.semantics import Fn, Gradient, Microbatch, sum_gradients
from stepc._language.state import State
from stepc._units import bytes_of
from stepc.errors import ConfigError, FieldTypeError


@dataclass(frozen=True, repr=False)
class Accumulate(Transform):
    """The mean over `k` microbatches; with `memory` instead, the compiler picks `k`."""

    takes: ClassVar = Kind.GRADIENT
    gives: ClassVar = Kind.GRADIENT
    k: int | None = None
    memory: int | str | None = field(default=None, kw_only=True)
    dtype: np.dtype | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if (self.k is None) == (self.memory is None):
            got = "neither" if self.k is None else "both"
            raise FieldTypeError("`accumulate` takes either k or memory.", facts=(("got", got),))
        if self.k is not None:
            positive_integer("accumulate", "k", self.k)
        else:
            bytes_of("memory", self.memory)
        object.__setattr__(self, "dtype", floating_dtype("accumulate", "dtype", self.dtype, sums=True))

    def autotune_request(self) -> AutotuneRequest | None:
        if self.memory is None:
            return None
        return AutotuneRequest(bytes_of("memory", self.memory), self.with_parts)

    def with_parts(self, num: int) -> "Accumulate":
        return Accumulate(num, dtype=self.dtype)

    def reference(self, inner: Fn) -> Fn:
        k = self._known_k()

        def apply(state: State, microbatch: Microbatch) -> Gradient:
            parts: list[Gradient] = []
            for j in range(k):
                parts.append(inner.apply(state, microbatch.part(lambda leaf, j=j: leaf[j::k])))
                state = replace(state, model_state=handed_on(state.model_state, parts[-1].model_state))
            result = over_parts([part.model_state for part in parts], one_after_another=True)
            return replace(sum_gradients(parts, dtype=self._dtype_name), model_state=result)

        return Fn(inner.init, apply, inner.axes, inner.names)

    def expand(self) -> tuple[MeanNode, ...]:
        return (MeanNode(InScan(self._known_k()), self._dtype_name, written=repr(self)),)

    def _known_k(self) -> int:
        if self.k is None:
            raise ConfigError(
                f"`{self!r}` has no k yet: a compiled step picks it, for the batch it is given.",
                suggestion="Write `accumulate(k)`, or call `step.reference(state, batch)`.",
            )
        return self.k

    @property
    def _dtype_name(self) -> str | None:
        return None if self.dtype is None else self.dtype.name


def accumulate(
    k: int | None = None, *, memory: int | str | None = None, dtype: Any = None
) -> Accumulate:  # Any: whatever numpy takes for a dtype
    """Average the gradient over `k` microbatches, one after another.

    Meaning: mean(inner(params, rows[j::k]) for j in range(k)).
    Why: the same gradient, with the activations of one microbatch in memory instead of those of the whole batch.

    Args:
      k: number of microbatches, a positive integer. The batch size must be a multiple of `k`.
      memory: instead of `k`, what the compiled step may hold at once on one device: arguments, results, temporaries
        and code. `accumulate(memory="12GiB")` picks k for you when the step first meets a batch of some signature: the
        smallest that divides the rows of a device and fits, by what the compiler planned for a few candidates.
        `step.lower(state, batch).plan` shows the search. At most one transform of a pipeline may use it.
      dtype: in which gradients are added up, and reduced over devices; None for float32, or theirs if that is wider.
        `jnp.bfloat16` halves the accumulator and the bytes of the reduction, and rounds at every addition; float16 is
        refused, since sums overflow it.
    Shapes: every batch leaf `[batch, ...]`; the gradient has the shapes of `params`.
    Units: the gradient is per example (a mean), not a sum; `memory` is a number of bytes, or a text such as "12GiB".
    Type: gradient -> gradient
    Errors: FieldTypeError, FieldValueError for a bad `k`, `memory` or `dtype`; PipelineTypeError if the stage on its
      right returns no gradient; BatchError if the batch does not divide; at the first call, BudgetError if no k fits
      `memory`, with what each one needs.
    Equal to the whole batch only if the loss is a mean over examples, or `sc.Mean` terms; batch statistics see each
    microbatch alone. A transform on its right that is not linear (`clip`) acts on each microbatch. With these, and with
    `grad(loss, rng="microbatch")`, the numbers depend on k: then write k, since the one that `memory` picks may change
    with the compiler and the device.
    Example:
      >>> accumulate(4) @ grad(loss)
      accumulate(4) @ grad(loss)
      >>> accumulate(memory="12GiB") @ grad(loss)
      accumulate(memory="12GiB") @ grad(loss)

    Source: ours; the strided split is that of MaxText and axlearn, and keeps every device busy.
    """
    return Accumulate(k, memory=memory, dtype=dtype)
