"""Checks of the fields of transforms, made when a transform is made. All faults have the same form."""

import math

import jax.numpy as jnp
import numpy as np

from stepc.errors import FieldTypeError, FieldValueError


def positive_integer(transform: str, field: str, value: object) -> int:
    """`value`, if it is a whole number of at least 1; a bool is not a number of anything."""
    facts = (("field", field), ("expected", "a positive integer"), ("got", repr(value)))
    if isinstance(value, bool) or not isinstance(value, int):
        raise FieldTypeError(f"`{transform}({value!r})`: {field} is not an integer.", facts=facts)
    if value < 1:
        raise FieldValueError(f"`{transform}({value!r})`: {field} is not positive.", facts=facts)
    return value


def finite_number(transform: str, field: str, value: object, *, positive: bool) -> float:
    """`value` as a float, if it is a finite real number, above 0 if `positive`."""
    expected = "a positive finite number" if positive else "a finite number"
    facts = (("field", field), ("expected", expected), ("got", repr(value)))
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise FieldTypeError(f"`{transform}({value!r})`: {field} is not a number.", facts=facts)
    if not math.isfinite(value) or (positive and value <= 0):
        raise FieldValueError(f"`{transform}({value!r})`: {field} is not {expected}.", facts=facts)
    return float(value)


def boolean(transform: str, field: str, value: object) -> bool:
    """`value`, if it is True or False."""
    if not isinstance(value, bool):
        facts = (("field", field), ("expected", "True or False"), ("got", repr(value)))
        raise FieldTypeError(f"`{transform}({field}={value!r})`: {field} is not a claim.", facts=facts)
    return value


def floating_dtype(transform: str, field: str, value: object, *, optional: bool = True) -> np.dtype | None:
    """`value` as a dtype, if it is a floating-point one; None stays None if that is allowed."""
    if value is None and optional:
        return None
    facts = (("field", field), ("expected", "a floating-point dtype, such as jnp.bfloat16"), ("got", repr(value)))
    try:
        dtype = jnp.dtype(value)  # pyright: ignore[reportCallIssue, reportArgumentType]
    except TypeError:
        raise FieldTypeError(f"`{transform}`: {field} is not a dtype.", facts=facts) from None
    if value is None or not jnp.issubdtype(dtype, jnp.floating):
        raise FieldValueError(f"`{transform}`: {field} is not a floating-point dtype.", facts=facts)
    return dtype


def axis_name(transform: str, field: str, value: object) -> str:
    """`value`, if it is the name of a mesh axis: a string that is not empty."""
    facts = (("field", field), ("expected", "the name of a mesh axis"), ("got", repr(value)))
    if not isinstance(value, str):
        raise FieldTypeError(f"`{transform}({value!r})`: {field} is not a string.", facts=facts)
    if not value:
        raise FieldValueError(f"`{transform}({value!r})`: {field} is empty.", facts=facts)
    return value
