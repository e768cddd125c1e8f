"""The type of a meaning: the pair of functions that a transform defines, and what flows between them."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from stepc._core.nodes import unique_name
from stepc._language.kinds import Batch, Grads, Metrics, Params, Rows
from stepc._language.state import State
from stepc._language.terms import Mean as MeanOf
from stepc._language.terms import (
    Metric,
    accumulation_dtype,
    combine_metrics,
    divide_by_count,
    metric_value,
    sum_arrays,
    sum_of_squares,
)


@dataclass(frozen=True)
class Microbatch:
    """Some rows of a batch, their global numbers, and by how much the loss is multiplied before its gradient.

    Args:
      rows: the batch with fewer rows.
      numbers: `[rows]`, the place of each row in the whole batch, rising.
      factor: of `loss_scale`; 1 without it.
    """

    rows: Rows
    numbers: jax.Array
    factor: Any = 1.0  # Any: a number, or an array

    def part(self, take: Callable[[Any], Any]) -> "Microbatch":
        """The cell of the rows that `take` takes of each leaf."""
        return replace(self, rows=jax.tree.map(take, self.rows), numbers=take(self.numbers))

    @property
    def num_rows(self) -> int:
        """How many rows it has."""
        return len(self.numbers)


class GradientTerm(NamedTuple):
    """One term of a gradient: a sum over cells, and the count that it is to be divided by."""

    total: Grads
    count: Any  # Any: a number, or an array


@dataclass(frozen=True)
class Gradient:
    """What flows between gradient transforms: a ratio of sums, until a transform that is not linear makes it a value.

    Args:
      terms: for each term of the loss the sum of its gradients, in float32 at least, and of its counts.
      metrics: what is reported, as sums.
      params: the parameters; the value has their dtypes.
      model_state: the model's own state after the rows so far; None without `model_state=True`.
      advances: by slot, what becomes of it after the step, of (loss is finite, gradient is finite), made or not.
    """

    terms: tuple[GradientTerm, ...]
    metrics: Mapping[str, Metric]
    params: Params
    model_state: Any = None  # Any: a tree of the user's
    advances: Mapping[str, Callable[[bool, bool], Any]] = field(default_factory=dict)

    @property
    def value(self) -> Grads:
        """Every term divided by its own count, and added up."""
        whole = [
            jax.tree.map(lambda leaf, count=count: divide_by_count(leaf, count), total) for total, count in self.terms
        ]
        return jax.tree.map(lambda like, *parts: sum_arrays(parts).astype(like.dtype), self.params, *whole)

    @property
    def reported(self) -> Metrics:
        """The metrics, as numbers."""
        return {name: metric_value(metric) for name, metric in self.metrics.items()}

    def map(self, function: Callable[..., tuple[Grads, Metrics]], *arguments: object) -> "Gradient":
        """`function(value, *arguments)`, a new gradient and metrics to add: for transforms that are not linear."""
        grads, added = function(self.value, *arguments)
        terms = (GradientTerm(jax.tree.map(lambda leaf: leaf.astype(accumulation_dtype(leaf.dtype)), grads), 1),)
        return replace(self, terms=terms, metrics={**self.metrics, **{name: MeanOf(x, 1) for name, x in added.items()}})

    def linear(self, function: Callable[[jax.Array], jax.Array]) -> "Gradient":
        """The function of every leaf of every sum: for transforms that are linear."""
        return replace(
            self, terms=tuple(GradientTerm(jax.tree.map(function, total), count) for total, count in self.terms)
        )


class StepResult(NamedTuple):
    """What flows between step transforms: a step that was made, or not.

    Args:
      state: after the step.
      metrics: as they are reported.
      is_finite: whether the loss and every leaf of the gradient are.
      happened: whether the step was made; if not, parameters and all that follows them are as they were.
      always: the slots that a step advances whether it happens or not.
    """

    state: State
    metrics: Metrics
    is_finite: bool
    happened: bool
    always: dict[str, Any]  # Any: by transform


@dataclass(frozen=True)
class Fn:
    """A pair of pure functions, and what they are told of their surroundings.

    Args:
      init: fills a transform's own part of a fresh state.
      apply: of a gradient, `(state, cell) -> Gradient`; of a step, `(state, batch) -> Stepped`;
        of a loss, the loss itself.
      axes: size of every mesh axis by name; a meaning knows no more of a mesh than that.
      names: those of the transforms on the right that keep a slot of the state, or draw.
    """

    init: Callable[[State], State]
    apply: Callable[..., Any]  # Any: by kind, as above
    axes: Mapping[str, int]
    names: tuple[str, ...] = field(default=())

    def fresh_name(self, name: str) -> str:
        """`name`, told apart from the names on the right."""
        return unique_name(name, self.names)


def sum_gradients(parts: Sequence[Gradient], *, dtype: str | None = None) -> Gradient:
    """The sums of the parts, one after another, their terms and their metrics each. The model_state is the caller's matter.

    `dtype` is that of the additions; theirs without it.
    """

    def add(one: jax.Array, two: jax.Array) -> jax.Array:
        return one.astype(dtype or one.dtype) + two.astype(dtype or two.dtype)

    def both(one: Gradient, two: Gradient) -> Gradient:
        pairs = zip(one.terms, two.terms, strict=True)
        terms = tuple(GradientTerm(jax.tree.map(add, a.total, b.total), a.count + b.count) for a, b in pairs)
        metrics = {name: combine_metrics(metric, two.metrics[name]) for name, metric in one.metrics.items()}
        return Gradient(terms, metrics, one.params, None, two.advances)

    return reduce(both, parts)


def mean_model_states(parts: Sequence[Gradient]) -> Any:  # Any: a tree of the user's
    """The mean of what each part made of the model's own state, in the dtypes of that state."""
    has_model_state = [part.model_state for part in parts]
    return jax.tree.map(lambda *one: (sum_arrays(one) / len(one)).astype(one[0].dtype), *has_model_state)


def key_of(state: State, *numbers: Any) -> Any:  # Any: whole numbers; a typed key
    """The key of these numbers in this step: folded from (seed, step, *numbers)."""
    return reduce(jax.random.fold_in, numbers, jax.random.fold_in(state.rng, state.step))


def draw_tag(name: str) -> int:
    """The number that tells the draws of a transform from those of rows; no row has a number as large."""
    return zlib.crc32(name.encode()) | 2**31


def is_finite(tree: Any) -> bool:  # Any: a loss, or a gradient
    """Whether the norm of all leaves together is finite."""
    return bool(jnp.isfinite(sum_arrays([sum_of_squares(leaf) for leaf in jax.tree.leaves(tree)])))


def whole_batch(batch: Batch) -> Microbatch:
    """A batch as one cell."""
    return Microbatch(batch, jnp.arange(jax.tree.leaves(batch)[0].shape[0]))
