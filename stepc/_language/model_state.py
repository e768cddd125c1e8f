"""Model state by rules: what each call of a loss is given of it, and how the calls' results become the next one.

Arithmetic of leaves, and the reading of it that the reference follows. It knows no transform, no loop and no mesh.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add, and_
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stepc._language.fields import one_of
from stepc._language.state import is_typed_key, leaves_by_path, path_matches
from stepc._language.terms import accumulation_dtype
from stepc.errors import FieldTypeError, LossError

SUMMED = ("average", "max", "sum")  # over all calls, each of which starts from the step's own start
MEANS = ("sequential", "average")
RULES = ("sequential", "average", "rows", "constant", "max", "sum", "key")
# Flax's collection of leaves whose gradient is their next value, such as the ranges and scales of fp8.
OVERWRITTEN = "_overwrite_with_gradient"
# Folded into a typed key to advance it once a step; no row number is as large.
ADVANCE = 2**31


@dataclass(frozen=True, repr=False)
class ModelStateRules:
    """Rules by path pattern; what none matches has the default rule of its dtype. It prints as it was written."""

    by_pattern: tuple[tuple[str, str], ...] = ()

    def __repr__(self) -> str:
        listed = ", ".join(f'"{pattern}": "{rule}"' for pattern, rule in self.by_pattern)
        return f"{{{listed}}}" if listed else "True"


def model_state_rules(value: object) -> ModelStateRules | None:
    """What `grad(model_state=...)` was given, checked. Errors: FieldTypeError, FieldValueError."""
    match value:
        case None | False:
            return None
        case True:
            return ModelStateRules()
        case ModelStateRules():
            return value
        case Mapping() if value:
            for pattern, rule in value.items():
                if not isinstance(pattern, str) or not pattern:
                    what = "`grad`: a key of model_state must be a path pattern, such as '**/hidden'."
                    raise FieldTypeError(what, facts=(("got", repr(pattern)),))
                one_of(f"rule of model_state[{pattern!r}]", rule, RULES)
            return ModelStateRules(tuple(value.items()))
        case _:
            expected = ("expected", 'True, or a dict from path patterns to rules, such as {"hidden": "rows"}')
            raise FieldTypeError("`grad`: model_state is no set of rules.", facts=(expected, ("got", repr(value))))


def explicit_rule(by_pattern: tuple[tuple[str, str], ...], path: str) -> str | None:
    """The rule of the first pattern that matches a path; None if none does."""
    return next((rule for pattern, rule in by_pattern if path_matches(pattern, path)), None)


def rules_by_leaf(by_pattern: tuple[tuple[str, str], ...], model_state: Any) -> tuple[str, ...]:  # Any: the model's own
    """The rule of each leaf of a model state, in the order of its leaves."""
    return tuple(
        explicit_rule(by_pattern, path) or _default_rule(path, leaf) for path, leaf in leaves_by_path(model_state)
    )


def _default_rule(path: str, leaf: Any) -> str:  # Any: an array, or its shape
    if is_overwritten(path):
        return "max"
    return "key" if is_typed_key(jnp.asarray(leaf) if np.isscalar(leaf) else leaf) else "sequential"


def is_overwritten(path: str) -> bool:
    """Whether the gradient of a leaf is its next value."""
    return OVERWRITTEN in path.split("/")


def overwritten_leaves(model_state: Any) -> list[Any]:  # Any: the model's own tree; arrays
    """The leaves whose gradient is their next value."""
    return [leaf for path, leaf in leaves_by_path(model_state) if is_overwritten(path)]


def overwrite(model_state: Any, by: Sequence[Any]) -> Any:  # Any: the model's own tree; arrays
    """The model state with those leaves replaced."""
    new = iter(by)
    leaves = [next(new) if is_overwritten(path) else leaf for path, leaf in leaves_by_path(model_state)]
    return jax.tree.structure(model_state).unflatten(leaves)


def fold_key(keys: Any, number: Any) -> Any:  # Any: typed keys of any shape; an integer
    """Every key, folded with the number."""
    folded = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys.reshape(-1), number)
    return folded.reshape(keys.shape)


def wide_result(rule: str, before: Any, after: Any) -> Any:  # Any: leaves; None where the result does not count
    """What one call of the loss contributes: as wide as it must be to be added up."""
    match rule:
        case "constant" | "key":
            return None
        case "average":
            return after.astype(accumulation_dtype(after.dtype))
        case "sum":
            return sum_terms(after) - sum_terms(before)
        case _:
            return after


def sum_terms(leaf: Any) -> Any:  # Any: arrays
    """A leaf as `"sum"` adds it: floats in float32 at least, whole numbers as `[bytes, ...]`: nothing overflows.

    A byte in int32 leaves room for millions of calls. There is no wider integer in jax without x64.
    """
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf.astype(accumulation_dtype(leaf.dtype))
    wide = leaf.astype(jnp.int32) if jnp.iinfo(leaf.dtype).bits < 32 else leaf
    last = _num_bytes(leaf.dtype) - 1
    digits = [(wide >> (8 * place)) & 255 for place in range(last)] + [wide >> (8 * last)]
    return jnp.stack([digit.astype(jnp.int32) for digit in digits])


def from_sum_terms(terms: Any, dtype: Any) -> tuple[Any, Any]:  # Any: arrays; a dtype of numpy
    """The inverse of `sum_terms`, and whether the value fits the dtype."""
    if jnp.issubdtype(dtype, jnp.floating):
        value = terms.astype(dtype)
        return value, jnp.all(jnp.isfinite(value) | ~jnp.isfinite(terms))
    last, info = _num_bytes(dtype) - 1, jnp.iinfo(dtype)
    digits, carry = [], jnp.zeros_like(terms[0])
    for place in range(last):
        digit = terms[place] + carry
        digits.append(digit & 255)
        carry = digit >> 8
    top = terms[last] + carry
    fits = jnp.all((top >= int(info.min) >> (8 * last)) & (top <= int(info.max) >> (8 * last)))
    wide = dtype if info.bits >= 32 else jnp.int32
    value = reduce(add, [digit.astype(wide) << (8 * place) for place, digit in enumerate([*digits, top])])
    return value.astype(dtype), fits


def _num_bytes(dtype: Any) -> int:  # Any: a dtype of numpy
    return max(1, jnp.iinfo(dtype).bits // 8)


def part_of_mean(leaf: Any, size: int) -> Any:  # Any: arrays
    """What one of `size` equal parts adds to their mean, in float32 at least. The sum of these cannot overflow."""
    return leaf.astype(accumulation_dtype(leaf.dtype)) / size


def start_of_sum(rule: str, like: Any) -> Any:  # Any: arrays; `like` may be a shape
    """What results are added to, for a rule of `SUMMED`."""
    if rule != "max":
        return jnp.zeros(like.shape, like.dtype)
    if like.dtype == bool:
        return jnp.zeros(like.shape, bool)
    is_floating = jnp.issubdtype(like.dtype, jnp.floating)
    return jnp.full(like.shape, -jnp.inf if is_floating else jnp.iinfo(like.dtype).min, like.dtype)


def add_results(rule: str, total: Any, one: Any, size: int) -> Any:  # Any: arrays
    """The total and one more of `size` equal parts, for a rule of `SUMMED`."""
    match rule:
        case "average":
            return total + part_of_mean(one, size)
        case "max":
            return jnp.maximum(total, one)
        case _:
            return total + one


def next_leaf(rule: str, before: Any, result: Any) -> tuple[Any, Any]:  # Any: leaves; whether the value fits the dtype
    """A leaf after the step, given the result over all calls; and whether it fits its dtype."""
    match rule:
        case "constant":
            return before, True
        case "key":
            return fold_key(before, ADVANCE), True
        case "average":
            return result.astype(before.dtype), True
        case "sum":
            return from_sum_terms(sum_terms(before) + result, before.dtype)
        case _:
            return result, True


def next_leaves(
    rules: Sequence[str], before: Sequence[Any], results: Sequence[Any]
) -> tuple[tuple[Any, ...], Any]:  # Any: arrays; a bool, or one on the device
    """All leaves after the step; and whether every sum fits its dtype, True if there is none."""
    made = [next_leaf(*triple) for triple in zip(rules, before, results, strict=True)]
    return tuple(leaf for leaf, _ in made), reduce(and_, [fits for _, fits in made if fits is not True], True)


@dataclass(frozen=True)
class ModelStateResult:
    """What some calls of the loss made of the model state: how the reference adds it up.

    Args:
      paths: of the leaves.
      rules: of the leaves.
      leaves: the result of each leaf, wide; of "rows", the rows of these calls; None for "constant" and "key".
      numbers: of those rows in the whole batch.
    """

    paths: tuple[str, ...]
    rules: tuple[str, ...]
    leaves: tuple[Any, ...]  # Any: arrays
    numbers: Any  # Any: an array


def given_model_state(by_pattern: tuple[tuple[str, str], ...], model_state: Any, numbers: Any) -> Any:  # Any: trees
    """What a call of the loss for these rows is given: their rows, and keys folded with the first number."""
    leaves, tree = jax.tree.flatten(model_state)
    given: list[Any] = []
    for rule, leaf in zip(rules_by_leaf(by_pattern, model_state), leaves, strict=True):
        match rule:
            case "rows":
                given.append(leaf[numbers])
            case "key":
                given.append(fold_key(leaf, numbers[0]))
            case _:
                given.append(leaf)
    return tree.unflatten(given)


def result_of_call(
    by_pattern: tuple[tuple[str, str], ...], before: Any, after: Any, numbers: Any
) -> ModelStateResult:  # Any: trees of the model's own; an array
    """The result of one call, from what it was given and what it returned."""
    rules, paths = rules_by_leaf(by_pattern, before), tuple(path for path, _ in leaves_by_path(before))
    pairs = zip(rules, jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    leaves = tuple(wide_result(rule, old, jnp.asarray(new)) for rule, old, new in pairs)
    return ModelStateResult(paths, rules, leaves, numbers)


def handed_on(model_state: Any, result: ModelStateResult | None) -> Any:  # Any: the model's own tree
    """What the next part of a scan starts from: the last one's result where the rule is "sequential"."""
    if result is None:
        return model_state
    leaves, tree = jax.tree.flatten(model_state)
    triples = zip(result.rules, leaves, result.leaves, strict=True)
    return tree.unflatten([new if rule == "sequential" else old for rule, old, new in triples])


def over_parts(results: Sequence[ModelStateResult | None], *, one_after_another: bool) -> ModelStateResult | None:
    """The result over equal parts: in a scan, or side by side. Errors: LossError for whole numbers that then differ."""
    found = [one for one in results if one is not None]
    if not found:
        return None
    first = found[0]
    numbers = jnp.concatenate([one.numbers for one in found])
    leaves: list[Any] = []
    for place, (path, rule) in enumerate(zip(first.paths, first.rules, strict=True)):
        parts = [one.leaves[place] for one in found]
        match rule:
            case "constant" | "key":
                leaves.append(None)
            case "rows":
                leaves.append(jnp.concatenate(parts)[jnp.argsort(numbers)])
            case "average":
                leaves.append(reduce(add, [part_of_mean(part, len(parts)) for part in parts]))
            case "sum":
                leaves.append(reduce(add, parts))
            case "max":
                leaves.append(reduce(jnp.maximum, parts))
            case _:
                leaves.append(parts[-1] if one_after_another else _mean_side_by_side(path, parts))
    return ModelStateResult(first.paths, first.rules, tuple(leaves), jnp.sort(numbers))


def _mean_side_by_side(path: str, parts: list[Any]) -> Any:  # Any: arrays
    """The mean; equal parts pass as they are. Whole numbers have no mean."""
    if all(np.array_equal(part, parts[0], equal_nan=part.dtype.kind == "f") for part in parts):
        return parts[0]
    if not jnp.issubdtype(parts[0].dtype, jnp.floating):
        raise LossError(
            f"`model_state/{path}` differs between parts of the batch, and whole numbers have no mean.",
            suggestion=f'Give it a rule: `grad(loss, model_state={{"{path}": "sum"}})`, or "max", or "rows".',
        )
    return reduce(add, [part_of_mean(part, len(parts)) for part in parts]).astype(parts[0].dtype)


def next_model_state(model_state: Any, result: ModelStateResult | None) -> tuple[Any, bool]:  # Any: the model's own
    """The model state after the step, and whether every sum fits its dtype."""
    if result is None:
        return model_state, True
    leaves, tree = jax.tree.flatten(model_state)
    made, fits = next_leaves(result.rules, leaves, result.leaves)
    return tree.unflatten(made), bool(fits)
