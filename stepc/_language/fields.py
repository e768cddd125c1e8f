"""Checks of a transform's fields, made when the transform is. It knows no transform: every fault has the same form."""

import math
from collections.abc import Sequence
from typing import TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from stepc.errors import FieldTypeError, FieldValueError


def is_positive_integer(value: object) -> TypeGuard[int]:
    """Whether `value` counts something: an int of at least 1, and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def positive_integer(transform: str, field: str, value: object) -> int:
    """`value`, if it is an int of at least 1; a bool counts nothing."""
    if is_positive_integer(value):
        return value
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    raise (_value_error if is_integer else _type_error)(transform, field, "a positive integer", value)


def finite_number(transform: str, field: str, value: object, *, positive: bool) -> float:
    """`value` as a float, if it is a finite real number, and above 0 if `positive`."""
    expected = "a positive finite number" if positive else "a finite number"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _type_error(transform, field, expected, value)
    if not math.isfinite(value) or (positive and value <= 0):
        raise _value_error(transform, field, expected, value)
    return float(value)


def boolean(transform: str, field: str, value: object) -> bool:
    """`value`, if it is True or False."""
    if not isinstance(value, bool):
        raise _type_error(transform, field, "True or False", value)
    return value


def floating_dtype(
    transform: str, field: str, value: object, *, optional: bool = True, sums: bool = False
) -> np.dtype | None:
    """`value` as a dtype, if it is a floating-point one; None stays None if `optional`.

    One for `sums` needs the range of float32: a sum over many parts overflows float16 where their mean does not.
    """
    if value is None and optional:
        return None
    expected = f"a floating-point dtype{' with the range of float32' if sums else ''}, such as jnp.bfloat16"
    try:
        dtype = jnp.dtype(value)  # pyright: ignore[reportCallIssue, reportArgumentType]
    except TypeError:
        raise _type_error(transform, field, expected, value) from None
    is_floating = value is not None and jnp.issubdtype(dtype, jnp.floating)
    if not is_floating or (sums and jnp.finfo(dtype).nexp < jnp.finfo(jnp.float32).nexp):
        raise _value_error(transform, field, expected, value)
    return dtype


def axis_name(transform: str, field: str, value: object) -> str:
    """`value`, if it is the name of a mesh axis: a string that is not empty."""
    if not isinstance(value, str):
        raise _type_error(transform, field, "the name of a mesh axis", value)
    if not value:
        raise _value_error(transform, field, "the name of a mesh axis", value)
    return value


def path_patterns(transform: str, field: str, value: object) -> tuple[str, ...]:
    """`value` as a tuple of path patterns, if it is one pattern or a tuple of them."""
    given: tuple[object, ...] = value if isinstance(value, tuple) else (value,)
    patterns = tuple(pattern for pattern in given if isinstance(pattern, str))
    expected = "a path pattern, such as 'head/**', or a tuple of them"
    if len(patterns) < len(given):
        raise _type_error(transform, field, expected, value)
    if not patterns or not all(patterns):
        raise _value_error(transform, field, expected, value)
    return patterns


def state_names(transform: str, field: str, value: object) -> tuple[str, ...]:
    """`value` as a tuple of names of values of the state, each once, if it is one name or a tuple of them."""
    given: tuple[object, ...] = value if isinstance(value, tuple) else (value,)
    names = tuple(name for name in given if isinstance(name, str))
    expected = "the name of a slot, such as 'ema', or 'step', or a tuple of them, each once"
    if len(names) < len(given):
        raise _type_error(transform, field, expected, value)
    if len(set(names)) < len(names) or not all(name.isidentifier() for name in names):
        raise _value_error(transform, field, expected, value)
    return names


def one_of(name: str, value: object, choices: Sequence[object]) -> None:
    """Refuse a value that is not one of the choices; `name` says what they are, such as "gather mode"."""
    if not any(value == choice and type(value) is type(choice) for choice in choices):
        *first, last = map(repr, choices)
        is_type = any(type(value) is type(choice) for choice in choices)
        kind = FieldValueError if is_type else FieldTypeError
        raise kind(f"Unknown {name} {value!r}: expected {', '.join(first)} or {last}.")


def _type_error(transform: str, field: str, expected: str, value: object) -> FieldTypeError:
    suggestion = None
    if isinstance(value, np.number | np.ndarray | jax.Array) and not value.ndim:
        suggestion = f"Write `{value.item()!r}`: fields are numbers of Python."
    facts = (("got", repr(value)),)
    return FieldTypeError(f"`{transform}`: {field} must be {expected}.", facts=facts, suggestion=suggestion)


def _value_error(transform: str, field: str, expected: str, value: object) -> FieldValueError:
    return FieldValueError(f"`{transform}`: {field} must be {expected}.", facts=(("got", repr(value)),))
