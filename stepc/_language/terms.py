"""How the results of a loss add up over its calls: the terms of its value, and its metrics. Arithmetic only.

What a loss returns for each local microbatch is kept as sums until the last one has been added, and divided once.
Nothing here knows a transform, a loop or a mesh.
"""

import math
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
# Counts that are the same for every local microbatch, whatever its rows hold.
STATIC = (int, float, np.number)


class AbstractTerms(ABC):
    """What adds and multiplies as terms do: `Mean`, and sums and multiples of it."""

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
            raise TypeError("cannot multiply two means: a loss is a sum of terms, each with its own count")
        return Sums(tuple(Mean(term.total * factor, term.count) for term in self.terms))

    __rmul__ = __mul__

    def __truediv__(self, divisor: Number) -> "Sums":
        if isinstance(divisor, AbstractTerms):
            raise TypeError("cannot divide two means: a loss is a sum of terms, each with its own count")
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
    """A total and a count, divided once, after the totals and counts of all local microbatches have been added.

    Meaning: over any split, sum(total) / sum(count), and the gradient of that; 0 where the counts add up to 0.
    Why: a mean over tokens must be divided by all tokens of the batch. The mean of the microbatches' means is another
      number as soon as their lengths differ.

    Args:
      total: a floating-point scalar, a sum over the rows that the loss is given, such as `(nll * mask).sum()`.
      count: a scalar such as `mask.sum()`, or a number. It may not depend on the parameters.
    Errors: LossError at the first call if the count depends on the parameters, or if either is not a scalar.
    Sums and multiples of means are losses too, and each term keeps its own count:
      `Mean(nll, tokens) + 0.01 * Mean(balance, layers) + 1e-4 * z`. A plain scalar is a term whose count is 1 per call.
    A total that is not finite stays so, even where the count is 0: mask inside the sum, as in `(nll * mask).sum()`.
    Example:
      >>> Mean(total=6.0, count=3)
      Mean(total=6.0, count=3)

    Source: ours; MaxText sums before it divides, for one term.
    """

    total: Number
    count: Number

    @property
    def terms(self) -> tuple["Mean", ...]:
        return (self,)

    @property
    def value(self) -> jax.Array:
        """The total divided by the count; 0 where the count is 0. For the head of `across`, which is given both."""
        return divide_by_count(self.total, self.count)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sums(AbstractTerms):
    """A sum of terms, made by `+`, `-` and `*`."""

    each: tuple[Mean, ...]

    @property
    def terms(self) -> tuple[Mean, ...]:
        return self.each


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sum:
    """A metric that is added up over microbatches and devices.

    Args:
      value: a scalar. Whole numbers are added exactly; a sum that is too large for int32 (2,147,483,647) is reported as
        the largest int32, and never wraps. With `jax_enable_x64`, int64 has room for it: pass it as int64.
    Example:
      >>> Sum(3)
      Sum(value=3)
    """

    value: Number


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Max:
    """A metric whose maximum over microbatches and devices is reported. Over devices that is a reduction of its own.

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
    """A metric whose minimum over microbatches and devices is reported. Over devices that is a reduction of its own.

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
    """A metric whose last value is reported: that of the last microbatch, on the last device.

    Args:
      value: a scalar.
    Example:
      >>> Last(3)
      Last(value=3)
    """

    value: Number


Metric: TypeAlias = AbstractTerms | Sum | Max | Min | Last


class LossOutcome(NamedTuple):
    """What one call of a loss gives: the terms of its value, its metrics, its model state."""

    terms: tuple[Mean, ...]
    metrics: dict[str, Metric]
    model_state: Any  # Any: the model's own tree; None if there is none


def loss_outcome(returned: Any, *, has_aux: bool, model_state: bool) -> LossOutcome:  # Any: whatever a loss returns
    """Take apart what a loss returned: the value, then metrics if `has_aux`, then model state if `model_state`."""
    value, *rest = returned if has_aux or model_state else (returned,)
    metrics = dict(rest[0]) if has_aux else {}
    widened = {name: _wide_metric(one if isinstance(one, Metric) else Mean(one, 1)) for name, one in metrics.items()}
    return LossOutcome(tuple(map(_wide_term, terms_of(value))), widened, rest[-1] if model_state else None)


def terms_of(value: Any) -> tuple[Mean, ...]:  # Any: terms, or a scalar
    """The terms of a loss; a scalar is one whose count is 1."""
    return value.terms if isinstance(value, AbstractTerms) else (Mean(value, 1),)


def is_static(count: Number) -> bool:
    """Whether a count is the same number for every local microbatch, known at trace time."""
    return isinstance(count, STATIC)


def merge_terms(terms: tuple[Mean, ...]) -> tuple[Mean, ...]:
    """Merge the terms that share a count: a/n + b/n = (a + b)/n. Terms whose count is always 0 are dropped."""
    merged = _merge_equal_counts(tuple(term for term in terms if not (is_static(term.count) and term.count == 0)))
    if sum(is_static(term.count) for term in merged) > 1:
        merged = _merge_equal_counts(
            tuple(Mean(term.total / term.count, 1) if is_static(term.count) else term for term in merged)
        )
    return merged or (Mean(jnp.zeros_like(terms[0].total), 1),)


def _merge_equal_counts(terms: tuple[Mean, ...]) -> tuple[Mean, ...]:
    merged: list[Mean] = []
    for term in terms:
        equal = (
            one.count is term.count or (is_static(one.count) and is_static(term.count) and one.count == term.count)
            for one in merged
        )
        same = next((n for n, is_equal in enumerate(equal) if is_equal), None)
        if same is None:
            merged.append(term)
        else:
            merged[same] = Mean(merged[same].total + term.total, term.count)
    return tuple(merged)


def combine_metrics(first: Metric, second: Metric) -> Metric:
    """The metric of two local microbatches, or of two groups of them, the first one before the second."""
    match first, second:
        case Mean(), Mean():
            return Mean(first.total + second.total, first.count + second.count)
        case Sums(), Sums():
            pairs = zip(first.terms, second.terms, strict=True)
            return Sums(tuple(Mean(one.total + two.total, one.count + two.count) for one, two in pairs))
        case Sum(), Sum():
            return Sum(_exact(first.value) + _exact(second.value))
        case Max(), Max():
            return Max(jnp.maximum(first.value, second.value))
        case Min(), Min():
            return Min(jnp.minimum(first.value, second.value))
        case Last(), Last():
            return second
        case _:
            raise TypeError(f"cannot combine two kinds of metric: {first} and {second}")


def metric_value(metric: Metric) -> jax.Array:
    """The number that is reported, once all local microbatches have been added."""
    match metric:
        case AbstractTerms():
            return sum_arrays([divide_by_count(term.total, term.count) for term in metric.terms])
        case Sum(np.ndarray() | np.integer() as value) if (
            value.dtype.kind in "iu"
        ):  # a sum of whole numbers, exact so far
            dtype = accumulation_dtype(value.dtype)
            limits = jnp.iinfo(dtype)
            return jnp.asarray(np.clip(value, limits.min, limits.max).astype(dtype))
        case Sum(value) | Max(value) | Min(value) | Last(value):
            return jnp.asarray(value)


def sum_arrays(parts: Sequence[Any]) -> Any:  # Any: arrays
    """The sum, from left to right."""
    return reduce(add, parts)


def divide_by_count(total: Any, count: Number) -> jax.Array:  # Any: an array or a number
    """`total / count`, in float32 at least; 0 where the count is 0."""
    total = widened(jnp.asarray(total))
    if is_static(count):
        return jax.lax.div(total, np.asarray(count, total.dtype)) if count else jnp.zeros_like(total)
    count = jnp.asarray(count).astype(total.dtype)
    return jnp.where(count == 0, jnp.zeros_like(total), total / jnp.where(count == 0, jnp.ones_like(count), count))


def power_of_two(count: Number) -> Number:
    """A power of two close to a count, 1 where the count is smaller.

    A total is differentiated after it is divided by this, and its gradient multiplied by it once that is in float32:
    the gradient of a sum over many tokens overflows float16, where that of their mean does not. Both are exact.
    """
    if is_static(count):
        return 2.0 ** round(math.log2(count)) if count >= 1 else 1.0
    count = jnp.maximum(jax.lax.stop_gradient(count), 1)
    return jax.lax.reduce_precision(count, exponent_bits=jnp.finfo(count.dtype).nexp, mantissa_bits=0)


def sum_of_squares(leaf: jax.Array) -> jax.Array:
    """Of one leaf of a gradient, in float32 at least. It is finite if and only if the norm of the leaf is.

    That is what a finite gradient means here. Testing each element of a large leaf took seven times as long on a CPU,
    and a temporary of a quarter of its size (XLA of jaxlib 0.10.2).
    """
    wide = widened(leaf)
    return jax.lax.reduce_sum(jax.lax.square(wide), tuple(range(wide.ndim)))


def squares_of(grads: Any) -> Any:  # Any, twice: trees of arrays
    """The sum of squares of each leaf."""
    return jax.tree.map(sum_of_squares, grads)


def widened(value: Any) -> Any:  # Any, twice: an array
    """An array in the dtype in which it is added up."""
    dtype = accumulation_dtype(value.dtype)
    # With nothing to convert, `astype` would take 7 microseconds of a trace for each leaf.
    return value if value.dtype == dtype else value.astype(dtype)


def accumulation_dtype(dtype: Any) -> Any:  # Any, twice: whatever numpy takes for a dtype
    """The dtype in which values of this dtype are added up: at least float32 for floats, int32 for integers."""
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.promote_types(dtype, jnp.float32)
    is_wide = np.dtype(dtype).name in ("uint32", "uint64")  # int32 does not hold them
    return jax.dtypes.canonicalize_dtype(jnp.promote_types(dtype, jnp.uint32 if is_wide else jnp.int32))


def _exact(value: Any) -> Any:  # Any, twice: an array
    """A whole number in 64 bits, which the sum of a step does not overflow."""
    if not jnp.issubdtype(value.dtype, jnp.integer):
        return value
    return np.asarray(value).astype(np.uint64 if np.dtype(value.dtype).kind == "u" else np.int64)


def _wide_metric(metric: Metric) -> Metric:
    """In its accumulation dtype. Counts are float32, because they share the reduction of the gradient."""
    match metric:
        case Mean():
            return _wide_term(metric)
        case Sums():
            return Sums(tuple(_wide_term(term) for term in metric.terms))
        case Sum(value) | Max(value) | Min(value) | Last(value):
            value = jnp.asarray(value)
            return type(metric)(value.astype(accumulation_dtype(value.dtype)))
        case _:
            raise TypeError(f"{metric!r} is not a metric")


def _wide_term(term: Mean) -> Mean:
    total = jnp.asarray(term.total)
    total = total.astype(jnp.promote_types(accumulation_dtype(total.dtype), jnp.float32))
    return Mean(total, term.count if is_static(term.count) else jnp.asarray(term.count).astype(total.dtype))
