"""How what a loss returns adds up over cells: the terms of its value, and its metrics.

A cell is the rows that one call of a loss is given. Whatever the loss returns is kept as sums until the last cell has
been added, and divided once. Arithmetic only: this file knows no transform, no loop and no mesh.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

Number: TypeAlias = Any  # a scalar: an array, a numpy number, an int or a float
# Counts that are the same in every cell, whatever its rows hold.
STATIC = (int, float, np.number)


class AbstractTerms(ABC):
    """What adds and multiplies as terms do: `Mean`, and the sums and multiples of them."""

    __array_ufunc__ = None  # numpy leaves `number * Mean` to us

    @property
    @abstractmethod
    def terms(self) -> tuple["Mean", ...]:
        """The terms, in the order in which they were written."""

    def __add__(self, other: Any) -> "Sums":
        return Sums((*self.terms, *terms_of(other)))

    def __radd__(self, other: Any) -> "Sums":
        return Sums((*terms_of(other), *self.terms))

    def __mul__(self, factor: Number) -> "Sums":
        if isinstance(factor, AbstractTerms):
            raise TypeError("two means do not multiply: a loss is a sum of terms, each with a count of its own")
        return Sums(tuple(Mean(term.total * factor, term.count) for term in self.terms))

    __rmul__ = __mul__

    def __truediv__(self, divisor: Number) -> "Sums":
        if isinstance(divisor, AbstractTerms):
            raise TypeError("two means do not divide: a loss is a sum of terms, each with a count of its own")
        return Sums(tuple(Mean(term.total / divisor, term.count) for term in self.terms))

    def __neg__(self) -> "Sums":
        return self * -1.0

    def __sub__(self, other: Any) -> "Sums":
        return self + Sums(terms_of(other)) * -1.0

    def __rsub__(self, other: Any) -> "Sums":
        return -self + other


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mean(AbstractTerms):
    """A total and the count that it is to be divided by, once, after the last cell.

    Meaning: over any cells, sum(total) / sum(count), and the gradient of that; 0 where the counts add up to 0.
    Why: a mean over tokens is right only if it is divided by all tokens of the batch: the mean of the means of its
      microbatches is another number as soon as their lengths differ.

    Args:
      total: a floating-point scalar, a sum over the rows of the cell, such as `(nll * mask).sum()`.
      count: how much it counts: a scalar such as `mask.sum()`, or a number. It may not depend on the parameters.
    Errors: LossError at the first call if the count depends on the parameters, or if either is not a scalar.
    Sums and multiples of means are losses too, and each term keeps its own count:
      `Mean(nll, tokens) + 0.01 * Mean(balance, layers) + 1e-4 * z`; a plain scalar is a term that counts 1 a cell.
    A total that is not finite stays so, also where the count is 0: write `(nll * mask).sum()` so that it is 0 there.
    Example:
      >>> Mean(total=6.0, count=3)
      Mean(total=6.0, count=3)

    Source: ours; sums before the division as in MaxText, for every term instead of one.
    """

    total: Number
    count: Number

    @property
    def terms(self) -> tuple["Mean", ...]:
        return (self,)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sums(AbstractTerms):
    """A sum of terms. Written with `+`, `-` and `*`, not by name."""

    each: tuple[Mean, ...]

    @property
    def terms(self) -> tuple[Mean, ...]:
        return self.each


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sum:
    """A metric that is added up over microbatches and devices.

    Args:
      value: a scalar.
    Example:
      >>> Sum(3)
      Sum(value=3)
    """

    value: Number


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Max:
    """A metric of which the largest over microbatches and devices is kept. Over devices it is a reduction of its own.

    Args:
      value: a scalar.
    Example:
      >>> Max(3)
      Max(value=3)
    """

    value: Number


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Min:
    """A metric of which the smallest over microbatches and devices is kept. Over devices it is a reduction of its own.

    Args:
      value: a scalar.
    Example:
      >>> Min(3)
      Min(value=3)
    """

    value: Number


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Last:
    """A metric of which the last one is kept: of the last microbatch, on the last device.

    Args:
      value: a scalar.
    Example:
      >>> Last(3)
      Last(value=3)
    """

    value: Number


Metric: TypeAlias = AbstractTerms | Sum | Max | Min | Last


class LossOutcome(NamedTuple):
    """What one call of a loss gives: the terms of its value, its metrics, its model_state."""

    terms: tuple[Mean, ...]
    metrics: dict[str, Metric]
    model_state: Any  # Any: a tree of the user's; None if there is none


def loss_outcome(returned: Any, *, has_aux: bool, model_state: bool) -> LossOutcome:
    """Take apart what a loss returned: `value`, `(value, metrics)`, `(value, model_state)` or `(value, metrics, model_state)`."""
    value, *rest = returned if has_aux or model_state else (returned,)
    metrics = dict(rest[0]) if has_aux else {}
    kept = {name: _summed(one if isinstance(one, Metric) else Mean(one, 1)) for name, one in metrics.items()}
    return LossOutcome(tuple(map(_wide_term, terms_of(value))), kept, rest[-1] if model_state else None)


def terms_of(value: Any) -> tuple[Mean, ...]:
    """The terms of a loss; a scalar is one that counts 1."""
    return value.terms if isinstance(value, AbstractTerms) else (Mean(value, 1),)


def is_static(count: Number) -> bool:
    """Whether a count is the same number in every cell, known before anything runs."""
    return isinstance(count, STATIC)


def merge_terms(terms: tuple[Mean, ...]) -> tuple[Mean, ...]:
    """Terms with the same count as one term: a/n + b/n = (a + b)/n. A count that is 0 everywhere leaves nothing."""
    kept = _joined(tuple(term for term in terms if not (is_static(term.count) and term.count == 0)))
    if sum(is_static(term.count) for term in kept) > 1:
        kept = _joined(tuple(Mean(one.total / one.count, 1) if is_static(one.count) else one for one in kept))
    return kept or (Mean(jnp.zeros_like(terms[0].total), 1),)


def _joined(terms: tuple[Mean, ...]) -> tuple[Mean, ...]:
    kept: list[Mean] = []
    for term in terms:
        same = next((n for n, one in enumerate(kept) if _is_same(one.count, term.count)), None)
        if same is None:
            kept.append(term)
        else:
            kept[same] = Mean(kept[same].total + term.total, term.count)
    return tuple(kept)


def combine_metrics(first: Metric, second: Metric) -> Metric:
    """Two cells, or two groups of cells, the first one before the second."""
    match first, second:
        case Mean(), Mean():
            return Mean(first.total + second.total, first.count + second.count)
        case Sums(), Sums():
            pairs = zip(first.terms, second.terms, strict=True)
            return Sums(tuple(Mean(one.total + two.total, one.count + two.count) for one, two in pairs))
        case Sum(), Sum():
            return Sum(first.value + second.value)
        case Max(), Max():
            return Max(jnp.maximum(first.value, second.value))
        case Min(), Min():
            return Min(jnp.minimum(first.value, second.value))
        case Last(), Last():
            return second
        case _:
            raise TypeError(f"{first} and {second} are metrics of two kinds")


def metric_value(metric: Metric) -> jax.Array:
    """What is reported once all cells are added."""
    match metric:
        case AbstractTerms():
            values = [divide_by_count(term.total, term.count) for term in metric.terms]
            return sum_arrays(values)
        case Sum(value) | Max(value) | Min(value) | Last(value):
            return jnp.asarray(value)


def sum_arrays(parts: Sequence[Any]) -> Any:  # Any: arrays
    """The parts added up, one after another."""
    return reduce(add, parts)


def divide_by_count(total: Any, count: Number) -> jax.Array:
    """`total / count`, and 0 where the count is 0; divided in float32 at least."""
    total = jnp.asarray(total)
    total = total.astype(accumulation_dtype(total.dtype))
    if is_static(count):
        return total / count if count else jnp.zeros_like(total)
    count = jnp.asarray(count).astype(total.dtype)
    return jnp.where(count == 0, jnp.zeros_like(total), total / jnp.where(count == 0, jnp.ones_like(count), count))


def sum_of_squares(leaf: jax.Array) -> jax.Array:
    """Of one leaf of a gradient, in float32 at least. It is finite if and only if the leaf has a norm that is.

    That is what a finite gradient means here. To ask each number of a large leaf took seven times as long on a CPU, and
    a temporary of a quarter of its size (XLA of jaxlib 0.10.2).
    """
    return jnp.sum(jnp.square(leaf.astype(accumulation_dtype(leaf.dtype))))


def accumulation_dtype(dtype: Any) -> Any:
    """The type in which numbers of this type are added up: float32 at least for floats, int32 for what counts."""
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.promote_types(dtype, jnp.float32)
    return jnp.promote_types(dtype, jnp.int32)


def _summed(metric: Metric) -> Metric:
    """In the types in which it is added up. Counts are float32, so that they ride in the gradient's own reduction."""
    match metric:
        case Mean():
            return _wide_term(metric)
        case Sums():
            return Sums(tuple(_wide_term(term) for term in metric.terms))
        case Sum(value) | Max(value) | Min(value) | Last(value):
            value = jnp.asarray(value)
            return type(metric)(value.astype(accumulation_dtype(value.dtype)))
        case _:
            raise TypeError(f"{metric!r} is no metric")


def _wide_term(term: Mean) -> Mean:
    total = jnp.asarray(term.total)
    total = total.astype(jnp.promote_types(accumulation_dtype(total.dtype), jnp.float32))
    return Mean(total, term.count if is_static(term.count) else jnp.asarray(term.count).astype(total.dtype))


def _is_same(count: Number, other: Number) -> bool:
    return count is other or (is_static(count) and is_static(other) and count == other)
