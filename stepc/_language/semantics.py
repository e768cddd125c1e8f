"""What a transform's `reference` maps: the pair of functions `Fn`, and the values that flow between such pairs."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from stepc._core.nodes import unique_name
from stepc._language.encoded import Encoded
from stepc._language.kinds import Batch, BatchRows, Grads, Metrics, Params
from stepc._language.model_state import ModelStateResult
from stepc._language.state import State
from stepc._language.terms import (
    Mean,
    Metric,
    combine_metrics,
    divide_by_count,
    metric_value,
    sum_arrays,
    sum_of_squares,
    widened,
)


@dataclass(frozen=True)
class Fn:
    """The reference semantics of a stage: a pair of pure functions, and what they know of their surroundings.

    Args:
      init: fills in the stage's own part of a fresh state.
      apply: for a gradient, `(state, microbatch) -> Gradient`; for a step, `(state, batch) -> StepResult`; for a loss,
        the loss itself.
      axes: the size of every mesh axis, by name. The reference knows nothing else about the mesh.
      names: of the transforms further right that keep a slot of the state, or draw.
      head: of a loss of the whole batch; `apply` is then the encoder.
    """

    init: Callable[[State], State]
    apply: Callable[..., Any]  # Any: by kind, as above
    axes: Mapping[str, int]
    names: tuple[str, ...] = field(default=())
    head: Callable[..., Any] | None = None  # Any: (params, z) -> what a loss returns

    def fresh_name(self, name: str) -> str:
        """`name`, made different from the names further right."""
        return unique_name(name, self.names)


@dataclass(frozen=True)
class Microbatch:
    """Some rows of a batch, with their numbers in the whole batch.

    Args:
      rows: the tree of the batch, with fewer rows.
      numbers: `[rows]`, the number of each row in the whole batch, ascending.
      factor: what the loss is multiplied by before it is differentiated, for `loss_scale`; 1 without it.
    """

    rows: BatchRows
    numbers: jax.Array
    factor: Any = 1.0  # Any: a number, or an array

    def part(self, take: Callable[[Any], Any]) -> "Microbatch":  # Any: arrays
        """The microbatch of the rows that `take` selects from each leaf."""
        return replace(self, rows=jax.tree.map(take, self.rows), numbers=take(self.numbers))

    @property
    def num_rows(self) -> int:
        """The number of rows."""
        return len(self.numbers)


class GradientTerm(NamedTuple):
    """One term of a gradient: a sum over local microbatches, and the count to divide it by."""

    total: Grads
    count: Any  # Any: a number, or an array


@dataclass(frozen=True)
class EncoderCall:
    """One call of an encoder: the numbers of its rows, and what it makes of them at some trained parameters."""

    numbers: jax.Array
    encode: Callable[[Params], Encoded]


@dataclass(frozen=True)
class WholeBatchLoss:
    """A loss of the whole batch, of which some calls of the encoder are there.

    Args:
      calls: those calls.
      gradient_of: the gradient of the head of all calls.
      then: the linear functions of that gradient, in order.
    """

    calls: tuple[EncoderCall, ...]
    gradient_of: Callable[[tuple[EncoderCall, ...]], "Gradient"]
    then: tuple[Callable[[jax.Array], jax.Array], ...] = ()


@dataclass(frozen=True)
class Gradient:
    """What flows between gradient transforms: a ratio of sums, until a transform that is not linear makes it a value.

    That of a loss of the whole batch is a set of rows until then: their encoder is called, and nothing is
    differentiated before all of them are there.

    Args:
      terms: for each term of the loss, the sum of its gradients, in float32 at least, and of its counts.
      metrics: what is reported, as sums.
      model_state: what the calls so far made of the model state; None without `grad(loss, model_state=...)`.
      advances: for a slot, its value after the step as a function of (loss is finite, gradient is finite). It applies
        to skipped steps too.
      whole: a loss of the whole batch that is not differentiated yet; there are no terms then.
    """

    terms: tuple[GradientTerm, ...]
    metrics: Mapping[str, Metric]
    model_state: ModelStateResult | None = None
    advances: Mapping[str, Callable[[bool, bool], Any]] = field(default_factory=dict)  # Any: a slot
    whole: WholeBatchLoss | None = None

    @property
    def evaluated(self) -> "Gradient":
        """The same gradient; that of a loss of the whole batch is computed now, of the rows that are there."""
        if self.whole is None:
            return self
        found = self.whole.gradient_of(self.whole.calls)
        for function in self.whole.then:
            found = found.linear(function)
        return replace(self, terms=found.terms, metrics={**found.metrics, **self.metrics}, whole=None)

    @property
    def value(self) -> Grads:
        """Every term divided by its own count, and added up, in float32 at least."""
        terms = self.evaluated.terms
        means = [jax.tree.map(lambda leaf, count=count: divide_by_count(leaf, count), total) for total, count in terms]
        return jax.tree.map(lambda *terms: sum_arrays(terms), *means)

    @property
    def reported(self) -> Metrics:
        """The metrics, as numbers."""
        return {name: metric_value(metric) for name, metric in self.evaluated.metrics.items()}

    def map(self, function: Callable[..., tuple[Grads, Metrics]], *arguments: object) -> "Gradient":
        """Apply a function that is not linear: `function(value, *arguments)` returns a gradient, and metrics to add."""
        of = self.evaluated
        grads, added = function(of.value, *arguments)
        terms = (GradientTerm(jax.tree.map(widened, grads), 1),)
        return replace(of, terms=terms, metrics={**of.metrics, **{name: Mean(x, 1) for name, x in added.items()}})

    def linear(self, function: Callable[[jax.Array], jax.Array]) -> "Gradient":
        """Apply a linear function to every leaf of every sum."""
        if self.whole is not None:
            return replace(self, whole=replace(self.whole, then=(*self.whole.then, function)))
        terms = tuple(GradientTerm(jax.tree.map(function, total), count) for total, count in self.terms)
        return replace(self, terms=terms)


class StepResult(NamedTuple):
    """What flows between step transforms: the outcome of a step, made or skipped.

    Args:
      state: after the step.
      metrics: as they are reported.
      is_finite: whether the loss and the norm of the gradient are.
      happened: whether the step was made; if not, the parameters and whatever follows them stay as they were.
      always: the slots that advance with every step, skipped or not.
    """

    state: State
    metrics: Metrics
    is_finite: bool
    happened: bool
    always: dict[str, Any]  # Any: by transform


def whole_batch(batch: Batch) -> Microbatch:
    """A batch as a single microbatch."""
    return Microbatch(batch, jnp.arange(jax.tree.leaves(batch)[0].shape[0]))


def sum_gradients(parts: Sequence[Gradient], *, dtype: str | None = None) -> Gradient:
    """Add up the terms and metrics of the parts, from left to right. The caller combines the model states.

    Args:
      dtype: the additions are made in it; None for the dtype of the parts.
    """

    def add(one: jax.Array, two: jax.Array) -> jax.Array:
        return one.astype(dtype or one.dtype) + two.astype(dtype or two.dtype)

    def both(one: Gradient, two: Gradient) -> Gradient:
        pairs = zip(one.terms, two.terms, strict=True)
        terms = tuple(GradientTerm(jax.tree.map(add, a.total, b.total), a.count + b.count) for a, b in pairs)
        metrics = {name: combine_metrics(metric, two.metrics[name]) for name, metric in one.metrics.items()}
        whole = one.whole
        if whole is not None and two.whole is not None:
            whole = replace(whole, calls=(*whole.calls, *two.whole.calls))
        return Gradient(terms, metrics, None, two.advances, whole)

    return reduce(both, parts)


def narrowed(grads: Grads, params: Params) -> Grads:
    """The gradient in the dtypes of the parameters, as an optimizer takes it.

    Between the transforms it is wider, so that no number overflows or underflows float16 that the next one scales back.
    """
    return jax.tree.map(lambda grad, like: grad if grad.dtype == like.dtype else grad.astype(like.dtype), grads, params)


def key_of(state: State, *numbers: Any) -> Any:  # Any: integers; a typed key
    """The key for these numbers in this step: folded from (seed, step, *numbers)."""
    return reduce(jax.random.fold_in, numbers, jax.random.fold_in(state.rng, state.step))


def draw_tag(name: str) -> int:
    """The number that separates the draws of a transform from those of rows; no row number is as large."""
    return zlib.crc32(name.encode()) | 2**31


def is_finite(tree: Any) -> bool:  # Any: a gradient
    """Whether the norm over all leaves is finite."""
    return bool(jnp.isfinite(sum_arrays([sum_of_squares(leaf) for leaf in jax.tree.leaves(tree)])))
