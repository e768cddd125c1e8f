"""Which axis of each value of a jaxpr carries the rows of a batch, and so whether a loss takes each row alone.

Every value is one of four things: the same whatever the rows are; an array with a row at each place of one axis; a sum
over rows; or the first operation that makes it none of these. It knows primitives by name, and no transform. What it
does not know it says; "each row alone" is proved, for the number of rows that the loss was traced with.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

from stepc._jax import scan_counts

_LIBRARY, _JAX, _STEPC = (
    f"{folder}/" for folder in (Path(jax.__file__).parents[1], Path(jax.__file__).parent, Path(__file__).parents[1])
)
_SCANNED = -1  # the axis of rows inside a scan that takes one row at a time


@dataclass(frozen=True)
class RowUse:
    """What a loss, or another function of rows, does with the rows that it is given.

    Args:
      kind: "alone", a mean over rows; "sum", a sum over them; "constant", it depends on no row; "single", traced with
        one row; "encoder", the encoder of a head, which takes each row alone; "encoder mean", one that adds up means;
        else what it is not known to be alone for: "couples", "ratio", "weight", "place", "draws", "unknown".
      primitive: the first operation of jax for which it is none of the first three.
      line: the user's line of that operation.
    """

    kind: str
    primitive: str = ""
    line: str = ""

    @property
    def depends_on_split(self) -> bool:
        """Whether parts of the batch are known to give another gradient than the whole."""
        return self.kind not in ("alone", "constant", "single", "encoder", "unknown")

    def __str__(self) -> str:
        at = f"`{self.primitive}`{self.line and f' at {self.line}'}"
        match self.kind:
            case "alone":
                return "each row alone"
            case "single":
                return "given one row at a time, so it can couple none; of several rows it may be another loss"
            case "constant":
                return "depends on no row"
            case "encoder":
                return "each row alone, and the head is given the whole batch"
            case "encoder mean":
                return (
                    "adds up means over rows in an `sc.Sum`, which grows with the number of parts; "
                    "`sc.Mean(total, count)` does not"
                )
            case "sum":
                return "each row alone, and sums them: a mean of such sums is smaller the more parts there are"
            case "couples":
                return f"couples rows: {at} takes several of them together, so parts have another loss than the whole"
            case "ratio":
                return (
                    f"couples rows: {at} divides a sum over rows by another, and a mean of ratios is no ratio of sums; "
                    "`sc.Mean(total, count)` is"
                )
            case "weight":
                return f"weighs rows by the split: {at} adds to a sum over rows what does not grow with them"
            case "place":
                return f"depends on the place of a row in its part: {at}"
            case "draws":
                return f"draws for each part, not for each row: {at}"
            case _:
                return f"not known: {at}"


@dataclass(frozen=True)
class Same:
    """The same whatever the rows are.

    Args:
      varies: the axes along which its elements may differ.
      number: that of every element, if it is known.
      is_drawn: whether it is drawn from a key.
      counts: the axis along which it is 0, 1, 2, ...
    """

    varies: frozenset[int] = frozenset()
    number: float | None = None
    is_drawn: bool = False
    counts: int | None = None


@dataclass(frozen=True)
class Rows:
    """Along `axis`, element `(b * rows + r) * after + a` depends on row `r` only, for each row in the same way.

    `is_scaled`: by a number that may be that of the rows; a sum of it may then be a mean.
    """

    axis: int
    before: int = 1
    after: int = 1
    is_scaled: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class Total:
    """A sum of terms that depend on one row each.

    Args:
      degree: 1 for a sum, 0 for a mean: how often it is not yet divided by the number of rows; None if not known.
      elements: how many more elements each row has in it, until it is divided by that; None if not known.
      is_scaled: whether it was multiplied by a number that may be the inverse of that of the rows.
    """

    degree: int | None = 1
    elements: int | None = 1
    is_scaled: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class Columns:
    """Index vectors whose columns are values of their own: what `x[jnp.arange(n), y]` gathers by."""

    parts: tuple["Value", ...]
    otherwise: "Same | Rows | RowUse"


Value: TypeAlias = Same | Rows | Total | Columns | RowUse
_OF_SUMS = ("sums", "weight")  # faults of values that depend on sums over rows, and on rows in no other way


def row_uses(traced: ClosedJaxpr, *, of_rows: Sequence[bool], num_rows: int) -> list[Value]:
    """What every output of a jaxpr is of the rows.

    Args:
      traced: what `jax.make_jaxpr` returned.
      of_rows: for each input, whether its first axis has the rows. All others are the same for all rows.
      num_rows: two at least. With one row, a row and a sum over rows are the same.
    An output that is not `Same` may depend on the rows.
    """
    inputs = [Rows(0) if rows else _any(var.aval) for rows, var in zip(of_rows, traced.jaxpr.invars, strict=True)]
    return _Reader(num_rows).outputs(traced.jaxpr, inputs, "")


def loss_row_use(values: Sequence[Value], counts: Sequence[float | None], num_rows: int) -> RowUse:
    """What a loss does with its rows.

    Args:
      values: of each total, then of each count that the rows decide.
      counts: for each total, its count; None where the rows decide it.
      num_rows: as of `row_uses`.
    """
    reader, dynamic = _Reader(num_rows), iter(values[len(counts) :])
    terms = [
        reader.quotient(total, Same(number=count) if count is not None else next(dynamic))
        for total, count in zip(values, counts, strict=False)
    ]
    value = reduce(reader.added, terms)
    match value:
        case Same():
            return RowUse("constant")
        case Total(degree=0):
            return RowUse("alone")
        case Total(degree=1, is_scaled=False):
            return RowUse("sum")
        case RowUse(kind="sums"):
            return replace(value, kind="couples")
        case RowUse():
            return value
        case Columns() | Rows() | Total():
            return RowUse("unknown", "div")


def encoder_row_use(values: Sequence[Value], kinds: Sequence[str], num_rows: int) -> RowUse:
    """What an encoder does with its rows: whether what it makes of the whole batch depends on the split.

    Args:
      values: of each leaf with rows, then of each sum; a mean is two of them.
      kinds: of each leaf, as of `EncodedTree`.
      num_rows: as of `row_uses`.
    """
    reader, num_leaves = _Reader(num_rows), sum(kind == "rows" for kind in kinds)
    leaves, sums = values[:num_leaves], iter(values[num_leaves:])
    uses = [_use_of_leaf(value) for value in leaves]
    for kind in kinds:
        match kind:
            case "sum":
                uses.append(_use_of_sum(next(sums)))
            case "mean":
                use = loss_row_use([reader.quotient(next(sums), next(sums))], [1.0], num_rows)
                uses.append(RowUse("encoder") if use.kind in ("alone", "constant") else use)
            case _:
                pass
    return next((use for use in uses if use.kind != "encoder"), RowUse("encoder"))


def _use_of_leaf(value: Value) -> RowUse:
    match value:
        case Same() | Rows(axis=0, before=1, after=1):
            return RowUse("encoder")
        case RowUse(kind="sums"):
            return replace(value, kind="couples")
        case RowUse():
            return value
        case Columns() | Rows() | Total():
            return RowUse("unknown", "concatenate")


def _use_of_sum(value: Value) -> RowUse:
    match value:
        case Total(degree=1, is_scaled=False):
            return RowUse("encoder")
        case Total(degree=0) | Same():
            return RowUse("encoder mean")
        case RowUse(kind="sums"):
            return replace(value, kind="couples")
        case RowUse():
            return value
        case Columns() | Rows() | Total():
            return RowUse("unknown", "reduce_sum")


def user_line(equation: Any) -> str:  # Any: a jax.extend.core.JaxprEqn
    """The innermost line of the loss that is in no installed package, or else outside jax; empty if there is none."""
    try:
        frames = equation.source_info.traceback.frames
    except AttributeError:  # this jax keeps no traceback
        return ""
    names = [frame.file_name for frame in frames]
    inside = next((number for number, name in enumerate(names) if name.startswith(_STEPC)), len(frames))
    outside_jax = [frame for frame in frames[:inside] if not frame.file_name.startswith(_JAX)]
    own = [frame for frame in outside_jax if not frame.file_name.startswith(_LIBRARY)]
    return next((f"{Path(frame.file_name).name}:{frame.line_num}" for frame in (*own, *outside_jax)), "")


def _any(aval: Any) -> Same:  # Any: an abstract value of jax
    """Whatever does not depend on the rows."""
    return Same(frozenset(axis for axis, size in enumerate(getattr(aval, "shape", ())) if size != 1))


@dataclass
class _Equation:
    """An equation, its operands as values, and the line that is named for it."""

    name: str
    params: dict[str, Any]
    shapes: list[tuple[int, ...]]
    results: list[Any]  # Any: abstract values
    outer_line: str
    raw: Any = field(repr=False)  # Any: a jax.extend.core.JaxprEqn

    @property
    def line(self) -> str:
        return self.outer_line or user_line(self.raw)

    def fault(self, kind: str) -> RowUse:
        return RowUse(kind, self.name, self.line)


class _Reader:
    """Reads a jaxpr from top to bottom.

    Args:
      num_rows: the number of rows.
      is_gradient: whether it is the jaxpr of a gradient, which is not differentiated again.
    """

    def __init__(self, num_rows: int, *, is_gradient: bool = False) -> None:
        self.num_rows = num_rows
        self.is_gradient = is_gradient

    def outputs(self, jaxpr: Jaxpr, inputs: Sequence[Value], line: str) -> list[Value]:
        """The values of its outputs.

        Args:
          line: the line that stands for all equations; empty if each has its own.
        """
        known: dict[Any, Value] = {var: _any(var.aval) for var in jaxpr.constvars}
        known |= dict(zip(jaxpr.invars, inputs, strict=True))

        def value(atom: Any) -> Value:  # Any: a variable or a literal
            if not isinstance(atom, Literal):
                return known[atom]
            return Same(number=_number(atom.val)) if not jnp.shape(atom.val) else _any(atom.aval)

        for raw in jaxpr.eqns:
            operands = [value(atom) for atom in raw.invars]
            equation = _Equation(
                raw.primitive.name,
                raw.params,
                [tuple(getattr(atom.aval, "shape", ())) for atom in raw.invars],
                [var.aval for var in raw.outvars],
                line,
                raw,
            )
            results = self._results(equation, operands)
            known |= dict(zip(raw.outvars, results, strict=True))
        return [value(atom) for atom in jaxpr.outvars]

    def _results(self, equation: _Equation, operands: list[Value]) -> list[Value]:
        if equation.name in _WITH_JAXPRS:
            return _WITH_JAXPRS[equation.name](self, equation, operands)
        if not (equation.name == "gather" and isinstance(operands[1], Columns)):
            operands = [one.otherwise if isinstance(one, Columns) else one for one in operands]
        if found := _worst(one for one in operands if not isinstance(one, Columns)):
            # A ratio of sums has a remedy of its own.
            is_of_sums = all(
                isinstance(one, Total | Same) or (isinstance(one, RowUse) and one.kind in _OF_SUMS) for one in operands
            )
            if equation.name == "div" and is_of_sums and not isinstance(operands[1], Same):
                found = equation.fault("ratio")
            return [found] * len(equation.results)
        rule = _RULES.get(equation.name)
        if rule is not None:
            try:
                result = rule(self, equation, operands)
            except (AttributeError, IndexError, KeyError, ValueError):  # another jax, with other parameters
                return [equation.fault("unknown")] * len(equation.results)
            return result if isinstance(result, list) else [result] * len(equation.results)
        if all(isinstance(one, Same) for one in operands):
            is_drawn = equation.name.startswith("random_") or any(one.is_drawn for one in _constants(operands))
            scanned = _scanned(operands)
            return [replace(_with(_any(aval), scanned), is_drawn=is_drawn) for aval in equation.results]
        return [equation.fault("unknown")] * len(equation.results)

    # Values that are added, multiplied, joined.

    def added(self, one: Value, two: Value, equation: _Equation | None = None) -> Value:
        """Their sum."""
        fault = equation.fault if equation else lambda kind: RowUse(kind, "add")
        if found := _worst((one, two)):
            return found
        match one, two:
            case (Same(number=0), other) | (other, Same(number=0)) if not isinstance(other, Same):
                return other
            case Total(), Total():
                if one.degree != two.degree and None not in (one.degree, two.degree):
                    return fault("weight")
                return Total(
                    None if None in (one.degree, two.degree) else one.degree,
                    one.elements if one.elements == two.elements else None,
                    one.is_scaled or two.is_scaled,
                )
            case (Total() as total, Same() as other) | (Same() as other, Total() as total):
                if _SCANNED in other.varies:
                    return fault("place")
                return fault("weight") if total.degree else total
            case _:
                return self.together((one, two), fault)

    def together(self, values: Iterable[Value], fault: Callable[[str], RowUse]) -> Value:
        """Any function of their elements, one by one."""
        values = list(values)
        if found := _worst(values):
            return found
        rows = {one for one in values if isinstance(one, Rows)}
        if any(isinstance(one, Total) for one in values):
            return fault("couples" if rows else "sums")
        if len(rows) > 1:
            return fault("couples")
        if not rows:
            return _with(Same(is_drawn=any(one.is_drawn for one in _constants(values))), _varies(values))
        (row,) = rows
        for one in _constants(values):
            if row.axis in one.varies:
                return fault("draws" if one.is_drawn else "place")
        return replace(row, is_scaled=any(isinstance(one, Rows) and one.is_scaled for one in values))

    def joined(self, one: Value, two: Value, fault: Callable[[str], RowUse]) -> Value:
        """Either of them."""
        if one == two or isinstance(one, RowUse):
            return one
        if isinstance(two, RowUse):
            return two
        if isinstance(one, Total) or isinstance(two, Total):
            found = self.added(one, two)
            return found if not isinstance(found, RowUse) else fault("couples" if found.kind == "sums" else found.kind)
        return self.together((one, two), fault)

    def quotient(self, total: Value, count: Value, equation: _Equation | None = None) -> Value:
        """`total / count`: of a loss and its count, or of an equation."""
        fault = equation.fault if equation else lambda kind: RowUse(kind, "div")
        if found := _worst((total, count)):
            return found
        match total, count:
            case Total(), Same(number=None):
                return total
            case Total(), Same(number=number):
                return self._divided(total, number or 0.0)
            case (Total() | Same(), Total()) if equation is not None:
                return fault("ratio" if isinstance(total, Total) else "sums")
            case Total(), Total() if None not in (total.degree, count.degree):
                return Total(0) if total.degree == count.degree else fault("weight")
            case Total(), Total():
                return Total(None)
            case Same(number=0), Total():
                return total
            case Same(), Total():
                return fault("weight")
            case _:
                return self.together((total, count), fault)

    def _divided(self, total: Total, number: float) -> Total:
        """A sum over rows, divided by a number: is it that of the rows?"""
        rows, elements = self.num_rows, total.elements
        if total.degree == 1 and number and not number % rows:
            if elements is not None and number == rows * elements:
                return replace(total, degree=0, elements=1)
            if elements is not None and number == rows and elements % rows:
                return replace(total, degree=0)
            if number != elements or number == rows:
                return replace(total, degree=None)
        return replace(total, elements=1) if number == elements else total

    def _may_be_rows(self, number: float) -> bool:
        """Whether it may be the number of rows, or the inverse, times something."""
        if not 1e-30 < abs(number) < 1e30:
            return False
        larger = max(abs(number), 1 / abs(number))
        return round(larger) % self.num_rows == 0 and math.isclose(larger, round(larger), rel_tol=1e-5)

    def scaled(self, value: Value, factors: list[Value]) -> Value:
        """The product of these, or their quotient."""
        if isinstance(value, Rows) and any(one.number and self._may_be_rows(one.number) for one in _constants(factors)):
            return replace(value, is_scaled=True)
        return value

    def product(self, equation: _Equation, operands: list[Value]) -> Value:
        match operands:
            case [Total() as total, Same() as factor] | [Same() as factor, Total() as total]:
                if _SCANNED in factor.varies:
                    return equation.fault("place")
                if factor.number is None or factor.number == 0:
                    return total
                if total.elements and math.isclose(factor.number * total.elements, 1, rel_tol=1e-5):
                    total = replace(total, elements=1)
                if not self._may_be_rows(factor.number):
                    return total
                # `0.5 * jnp.sum(x)` of two rows is not taken for a mean: a mean is divided.
                return replace(total, is_scaled=True) if abs(factor.number) < 1 else replace(total, degree=None)
            case [Total(), Total()]:
                return equation.fault("sums")
            case _:
                return self.together(operands, equation.fault)


def _number(value: Any) -> float | None:  # Any: a scalar of any dtype
    try:
        return float(value)
    except (TypeError, ValueError):  # a key, or a complex number
        return None


def _worst(values: Iterable[Value]) -> RowUse | None:
    """The fault among them that says most; None if there is none."""
    faults = [one for one in values if isinstance(one, RowUse)]
    return min(faults, key=lambda one: _SEVERITY.index(one.kind), default=None)


_SEVERITY = ("ratio", "couples", "sums", "weight", "draws", "place", "unknown")


def _constants(values: Iterable[Value]) -> list[Same]:
    return [one for one in values if isinstance(one, Same)]


def _varies(values: Iterable[Value]) -> frozenset[int]:
    return frozenset(axis for one in _constants(values) for axis in one.varies)


def _scanned(values: Iterable[Value]) -> frozenset[int]:
    return _varies(values) & {_SCANNED}


def _with(value: Same, axes: frozenset[int]) -> Same:
    return replace(value, varies=value.varies | axes)


def _without_axes(value: Value) -> Value:
    """As far as it depends on the scanned axis."""
    return replace(value, varies=value.varies & {_SCANNED}) if isinstance(value, Same) else value


def _moved(value: Value, axes: Callable[[int], int | None], fault: Callable[[str], RowUse], *, lost: str) -> Value:
    """The value once its axes have moved: None for an axis that is not whole any more."""

    def new(axis: int) -> int | None:
        return axis if axis == _SCANNED else axes(axis)

    match value:
        case Rows(axis):
            place = new(axis)
            return fault(lost) if place is None else replace(value, axis=place)
        case Same(varies=varies):
            places = (new(axis) for axis in varies)
            counts = None if value.counts is None else new(value.counts)
            return replace(value, varies=frozenset(place for place in places if place is not None), counts=counts)
        case _:
            return value


# One rule for each primitive, or for each group of them.


def _elementwise(reader: _Reader, equation: _Equation, operands: list[Value]) -> Value:
    fold = _FOLDS.get(equation.name)
    numbers = [one.number for one in operands if isinstance(one, Same) and one.number is not None]
    if fold and len(numbers) == len(operands):
        try:
            return Same(number=float(fold(*numbers)))
        except (ArithmeticError, ValueError):
            return Same()
    match equation.name, operands:
        case "lt", [Same(counts=int()), Same(number=0)]:
            return Same(number=0.0)  # an index is not negative
        case _:
            return reader.together(operands, equation.fault)


_FOLDS: dict[str, Callable[..., float]] = {
    "add": lambda one, two: one + two,
    "sub": lambda one, two: one - two,
    "mul": lambda one, two: one * two,
    "div": lambda one, two: one / two,
    "max": max,
    "min": min,
    "neg": lambda one: -one,
    "gt": lambda one, two: one > two,
    "ge": lambda one, two: one >= two,
    "lt": lambda one, two: one < two,
    "le": lambda one, two: one <= two,
    "eq": lambda one, two: one == two,
    "ne": lambda one, two: one != two,
}


def _linear(reader: _Reader, equation: _Equation, operands: list[Value]) -> Value | list[Value]:
    """Operations of one operand, or of several side by side, that keep sums."""
    return [*operands] if len(operands) == len(equation.results) else equation.fault("unknown")


def _convert(reader: _Reader, equation: _Equation, operands: list[Value]) -> Value:
    value, is_float = operands[0], jnp.issubdtype(equation.params["new_dtype"], jnp.inexact)
    if is_float or isinstance(value, Rows):
        return value
    if isinstance(value, Total):
        return equation.fault("sums")
    is_whole = isinstance(value, Same) and value.number is not None and value.number.is_integer()
    return replace(value, number=value.number if is_whole else None) if isinstance(value, Same) else value


def _negative(reader: _Reader, equation: _Equation, operands: list[Value]) -> Value:
    return operands[0] if isinstance(operands[0], Total) else _elementwise(reader, equation, operands)


def _add(reader: _Reader, equation: _Equation, operands: list[Value]) -> Value:
    if any(isinstance(one, Total) for one in operands):
        return reader.added(operands[0], operands[1], equation)
    return _elementwise(reader, equation, operands)


def _mul(reader: _Reader, equation: _Equation, operands: list[Value]) -> Value:
    if any(isinstance(one, Total) for one in operands):
        if any(isinstance(one, Rows) for one in operands):
            return equation.fault("couples")
        return reader.product(equation, operands)
    return reader.scaled(_elementwise(reader, equation, operands), operands)


def _div(reader: _Reader, equation: _Equation, operands: list[Value]) -> Value:
    if any(isinstance(one, Total) for one in operands):
        if any(isinstance(one, Rows) for one in operands):
            return equation.fault("couples")
        return reader.quotient(operands[0], operands[1], equation)
    return reader.scaled(_elementwise(reader, equation, operands), operands)


def _select(reader: _Reader, equation: _Equation, operands: list[Value]) -> Value:
    which, *cases = operands
    if isinstance(which, Same) and which.number is not None:
        return cases[int(which.number)]
    if any(isinstance(one, Total) for one in cases) and isinstance(which, Same):
        if _SCANNED in which.varies:
            return equation.fault("place")
        return reduce(lambda one, two: reader.joined(one, two, equation.fault), cases)
    return reader.together(operands, equation.fault)


def _broadcast(reader: _Reader, equation: _Equation, operands: list[Value]) -> Value:
    places = [int(axis) for axis in equation.params["broadcast_dimensions"]]
    return _moved(operands[0], lambda axis: places[axis], equation.fault, lost="unknown")


def _reshape(reader: _Reader, equation: _Equation, operands: list[Value]) -> Value:
    before, after = equation.shapes[0], tuple(equation.results[0].shape)
    if equation.params.get("dimensions") is not None:
        return equation.fault("unknown") if not isinstance(operands[0], Same | Total) else operands[0]
    return _reshaped(reader, equation, operands[0], before, after)


def _reshaped(
    reader: _Reader, equation: _Equation, value: Value, before: tuple[int, ...], after: tuple[int, ...]
) -> Value:
    match value:
        case Rows(axis=axis) if axis != _SCANNED:
            stride = math.prod(before[axis + 1 :]) * value.after
            for place, size in enumerate(after):
                inner = math.prod(after[place + 1 :])
                step = stride * reader.num_rows
                if size > 1 and stride % inner == 0 and (inner * size) % step == 0:
                    return replace(value, axis=place, before=inner * size // step, after=stride // inner)
            return equation.fault("unknown")
        case Same():
            if not value.varies - {_SCANNED}:
                return value
            ends = {math.prod(before[axis:]): axis for axis in range(len(before)) if before[axis] != 1}
            varies = {_SCANNED} & value.varies
            counts = None
            for place, size in enumerate(after):
                outer = math.prod(after[place:])
                same = ends.get(outer)
                if same is not None and before[same] == size:  # this axis as it was
                    varies |= {place} if same in value.varies else frozenset()
                    counts = place if same == value.counts else counts
                elif size != 1:
                    varies |= {place}
            return Same(frozenset(varies), value.number, value.is_drawn, counts)
        case _:
            return value


def _squeeze(reader: _Reader, equation: _Equation, operands: list[Value]) -> Value:
    return _reshaped(reader, equation, operands[0], equation.shapes[0], tuple(equation.results[0].shape))


def _transpose(reader: _Reader, equation: _Equation, operands: list[Value]) -> Value:
    return _moved(operands[0], list(equation.params["permutation"]).index, equation.fault, lost="unknown")


def _along(*names: str) -> Callable[[_Reader, _Equation, list[Value]], Value]:
    """A rule for what mixes the elements along the axes that a parameter names, and keeps shapes."""

    def rule(reader: _Reader, equation: _Equation, operands: list[Value]) -> Value:
        axes: list[int] = []
        for name in names:
            entry = equation.params.get(name, ())
            axes += [int(axis) for axis in (entry if isinstance(entry, tuple | list) else (entry,))]
        value = reader.together([one for one in operands if not isinstance(one, Total)], equation.fault)
        if any(isinstance(one, Total) for one in operands):
            return operands[0] if equation.name in ("rev", "cumsum") else equation.fault("sums")
        if isinstance(value, Rows) and value.axis in axes:
            return equation.fault("couples")
        # A cumulative sum of ones counts.
        return _with(value, frozenset(axes)) if isinstance(value, Same) and "cum" in equation.name else value

    return rule


def _top_k(reader: _Reader, equation: _Equation, operands: list[Value]) -> Value:
    axis = int(equation.params.get("axis", len(equation.shapes[0]) - 1)) % len(equation.shapes[0])
    match operands[0]:
        case Rows(axis=rows) if rows == axis:
            return equation.fault("couples")
        case Total():
            return equation.fault("sums")
        case value:
            return Same(value.varies | {axis}, is_drawn=value.is_drawn) if isinstance(value, Same) else value


def _reduce(reader: _Reader, equation: _Equation, operands: list[Value]) -> Value:
    axes = [int(axis) for axis in equation.params["axes"]]
    value, shape = operands[0], equation.shapes[0]
    size = math.prod(shape[axis] for axis in axes)

    def place(axis: int) -> int | None:
        return None if axis in axes else axis - sum(one < axis for one in axes)

    is_sum = equation.name == "reduce_sum"
    match value:
        case Rows(axis=axis) if axis in axes:
            total = Total(1, size // reader.num_rows, value.is_scaled)
            return total if is_sum else equation.fault("couples")
        case Total() if is_sum:
            return replace(value, elements=None if value.elements is None else value.elements * size)
        case Total():
            return equation.fault("sums")
        case Same(number=float() as number) if is_sum:
            return Same(number=number * size)
        case _:
            moved = _moved(value, place, equation.fault, lost="couples")
            return replace(moved, number=None, counts=None) if isinstance(moved, Same) else moved


def _slice(reader: _Reader, equation: _Equation, operands: list[Value]) -> Value:
    value, before, after = operands[0], equation.shapes[0], equation.results[0].shape
    if any(not isinstance(one, Same) or _SCANNED in one.varies for one in operands[1:]):
        return reader.together(
            [value, *operands[1:]] if not any(isinstance(one, Total) for one in operands) else operands, equation.fault
        )
    strides = equation.params.get("strides")
    if isinstance(value, Rows) and value.axis != _SCANNED:
        is_whole = before[value.axis] == after[value.axis] and (strides is None or strides[value.axis] == 1)
        return value if is_whole else equation.fault("place")
    return replace(value, counts=None) if isinstance(value, Same) else value


def _split(reader: _Reader, equation: _Equation, operands: list[Value]) -> Value:
    value = operands[0]
    if isinstance(value, Rows) and value.axis == equation.params["axis"]:
        return equation.fault("place")
    return replace(value, counts=None) if isinstance(value, Same) else value


def _update_slice(reader: _Reader, equation: _Equation, operands: list[Value]) -> Value:
    operand, update, *starts = operands
    if any(not isinstance(one, Same) or _SCANNED in one.varies for one in starts):
        return equation.fault("unknown")
    if any(isinstance(one, Total) for one in (operand, update)):
        return reader.joined(operand, update, equation.fault)
    value = reader.together((operand, update), equation.fault)
    if isinstance(value, Rows) and value.axis != _SCANNED:
        return value if equation.shapes[0][value.axis] == equation.shapes[1][value.axis] else equation.fault("place")
    return _any(equation.results[0]) if isinstance(value, Same) else value


def _pad(reader: _Reader, equation: _Equation, operands: list[Value]) -> Value:
    value, fill = operands
    if isinstance(value, Total):
        return reader.joined(value, fill, equation.fault)
    result = reader.together((value, fill), equation.fault)
    if isinstance(result, Rows) and result.axis != _SCANNED:
        return result if tuple(equation.params["padding_config"][result.axis]) == (0, 0, 0) else equation.fault("place")
    padded = frozenset(axis for axis, each in enumerate(equation.params["padding_config"]) if tuple(each) != (0, 0, 0))
    return _with(result, padded) if isinstance(result, Same) else result


def _concatenate(reader: _Reader, equation: _Equation, operands: list[Value]) -> Value:
    axis = int(equation.params["dimension"])  # a library may give an integer of numpy
    if any(isinstance(one, Total) for one in operands):
        return reduce(lambda one, two: reader.joined(one, two, equation.fault), operands)
    value = reader.together(operands, equation.fault)
    if isinstance(value, Rows) and value.axis == axis and len(operands) > 1:
        return equation.fault("place")
    if isinstance(value, Same) and len(operands) > 1:
        value = _with(value, frozenset({axis}))
    is_index = axis == len(equation.shapes[0]) - 1 and all(shape[axis] == 1 for shape in equation.shapes)
    if is_index and any(isinstance(one, Same) and one.counts == 0 for one in operands):
        is_known = isinstance(value, Same | Rows)
        return Columns(tuple(operands), value if is_known else equation.fault("unknown"))
    return value


def _iota(reader: _Reader, equation: _Equation, operands: list[Value]) -> Value:
    axis = int(equation.params["dimension"])  # a library may give an integer of numpy
    return Same(frozenset({axis}) if equation.results[0].shape[axis] != 1 else frozenset(), counts=axis)


def _dot(reader: _Reader, equation: _Equation, operands: list[Value]) -> Value:
    contracted, batched = equation.params["dimension_numbers"]
    num_axes = [len(shape) for shape in equation.shapes]
    free = [
        [axis for axis in range(num) if axis not in (*contracted[side], *batched[side])]
        for side, num in enumerate(num_axes)
    ]

    def place(side: int, axis: int) -> int | None:
        if axis in batched[side]:
            return list(batched[side]).index(axis)
        if axis in free[side]:
            return len(batched[0]) + (len(free[0]) if side else 0) + free[side].index(axis)
        return None

    def partner(side: int, axis: int) -> int | None:
        """The axis of the other operand that is paired with this one."""
        for pair in (contracted, batched):
            if axis in pair[side]:
                return int(pair[1 - side][list(pair[side]).index(axis)])
        return None

    if any(isinstance(one, Total) for one in operands):
        if any(isinstance(one, Rows) for one in operands):
            return equation.fault("couples")
        size = math.prod(equation.shapes[0][axis] for axis in contracted[0])
        result = reader.product(equation, operands)
        return replace(result, elements=None) if isinstance(result, Total) and size > 1 else result
    rows = [(side, one) for side, one in enumerate(operands) if isinstance(one, Rows)]
    if not rows:
        moved = [
            _moved(one, lambda axis, side=side: place(side, axis), equation.fault, lost="unknown")
            for side, one in enumerate(operands)
        ]
        return Same(_varies(moved), is_drawn=any(one.is_drawn for one in _constants(operands)))
    side, row = rows[0]
    if row.axis == _SCANNED:
        return reader.together(operands, equation.fault)  # the scanned axis is no axis of an operand
    other, pair = operands[1 - side], partner(side, row.axis)
    if len(rows) == 2 and not (isinstance(other, Rows) and pair == other.axis and replace(other, axis=row.axis) == row):
        return equation.fault("couples")
    if isinstance(other, Same) and (pair in other.varies or _SCANNED in other.varies):
        return equation.fault("draws" if other.is_drawn else "place")
    new = place(side, row.axis)
    if new is not None:
        return replace(row, axis=new)
    size = math.prod(equation.shapes[0][axis] for axis in contracted[0])
    return Total(1, size // reader.num_rows, any(isinstance(one, Rows) and one.is_scaled for one in operands))


def _convolution(reader: _Reader, equation: _Equation, operands: list[Value]) -> Value:
    numbers, (image, kernel) = equation.params["dimension_numbers"], operands
    match image, kernel:
        case Rows(axis=axis), Same() if axis == _SCANNED:
            return reader.together((image, _without_axes(kernel)), equation.fault)
        case Rows(axis=axis), Same() if axis == numbers.lhs_spec[0] and equation.params["batch_group_count"] == 1:
            return replace(image, axis=numbers.out_spec[0])
        case Rows(axis=axis), Same() if axis != numbers.lhs_spec[1]:
            return equation.fault("couples")
        case (Total() as total, Same()) | (Same(), Total() as total):
            return replace(total, elements=None)
        case Same(), Same():
            return _with(_any(equation.results[0]), _scanned(operands))
        case _:
            return equation.fault("unknown")


def _window(reader: _Reader, equation: _Equation, operands: list[Value]) -> Value:
    value = operands[0]
    if isinstance(value, Rows) and value.axis != _SCANNED:
        sizes = equation.params["window_dimensions"], equation.params["window_strides"]
        is_whole = all(one[value.axis] == 1 for one in sizes) and equation.params["padding"][value.axis] == (0, 0)
        return value if is_whole else equation.fault("couples")
    if isinstance(value, Total):
        return replace(value, elements=None) if "sum" in equation.name else equation.fault("sums")
    return _with(_any(equation.results[0]), _scanned(operands))


def _gather(reader: _Reader, equation: _Equation, operands: list[Value]) -> Value:
    array, indices = operands
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    num_axes = len(equation.results[0].shape)
    batch = [axis for axis in range(num_axes) if axis not in numbers.offset_dims]
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    kept = [axis for axis in range(len(sizes)) if axis not in gone]
    paired = dict(zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True))
    if isinstance(indices, Columns):
        # x[arange(n), y]: the column for the axis of the rows is the row's own place.
        columns = dict(zip(numbers.start_index_map, indices.parts, strict=True))
        own = [axis for axis, one in columns.items() if isinstance(one, Same) and one.counts == 0]
        others = reader.together((one for axis, one in columns.items() if axis not in own), equation.fault)
        has_own = others == Rows(0) or (isinstance(others, Same) and 0 not in others.varies)
        if [array] == [Rows(axis) for axis in own] and has_own and own[0] in numbers.collapsed_slice_dims:
            return Rows(batch[0])
        return _gather(reader, equation, [array, indices.otherwise])
    if found := _worst((array, indices)):
        return found
    if any(isinstance(one, Rows) and one.axis == _SCANNED for one in operands):
        return reader.together(map(_without_axes, operands), equation.fault)
    match array, indices:
        case Same(), Same():
            return _with(
                replace(_any(equation.results[0]), is_drawn=array.is_drawn or indices.is_drawn), _scanned(operands)
            )
        case Same(), Rows(axis=axis) if axis < len(equation.shapes[1]) - 1:
            if any(index == axis and one in array.varies for one, index in paired.items()):
                return equation.fault("place")
            return equation.fault("place") if _SCANNED in array.varies else replace(indices, axis=batch[axis])
        case Rows(axis=axis), Same():
            if _SCANNED in indices.varies:
                return equation.fault("place")
            if axis in paired:
                index = paired[axis]
                return equation.fault("place") if index in indices.varies else replace(array, axis=batch[index])
            if axis in kept and sizes[axis] == equation.shapes[0][axis]:
                return replace(array, axis=numbers.offset_dims[kept.index(axis)])
            return equation.fault("place")
        case Rows(axis=axis), Rows() if (
            paired.get(axis) == indices.axis and replace(array, axis=indices.axis) == indices
        ):
            return replace(indices, axis=batch[indices.axis])
        case Total(), Same():
            return replace(array, elements=None)
        case Total(), _:
            return equation.fault("couples")
        case Same(), Total():
            return equation.fault("sums")
        case _:
            return equation.fault("couples")


def _scatter(reader: _Reader, equation: _Equation, operands: list[Value]) -> Value:
    numbers = equation.params["dimension_numbers"]
    num_updates = len(equation.shapes[2])
    batch = [axis for axis in range(num_updates) if axis not in numbers.update_window_dims]
    gone = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    window = [axis for axis in range(len(equation.shapes[0])) if axis not in gone]
    if all(isinstance(one, Same) for one in operands):
        return _with(_any(equation.results[0]), _scanned(operands))
    if any(isinstance(one, Total) or (isinstance(one, Rows) and one.axis == _SCANNED) for one in operands):
        return equation.fault("unknown")
    places: set[tuple[int | None, int, int]] = set()
    for kind, one in zip(("array", "indices", "updates"), operands, strict=True):
        if not isinstance(one, Rows):
            continue
        paired = {
            index: axis
            for axis, index in zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True)
        }
        if kind == "array":
            place = one.axis
        elif kind == "indices":
            place = paired.get(one.axis)
        elif one.axis in numbers.update_window_dims:
            place = window[list(numbers.update_window_dims).index(one.axis)]
        else:
            place = paired.get(batch.index(one.axis))
        places.add((place, one.before, one.after))
    (place, before, after), *others = places
    if others or place is None:
        return equation.fault("unknown")
    pairs = dict(zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True))
    is_whole = place in pairs or (
        place in window
        and place not in numbers.scatter_dims_to_operand_dims
        and equation.shapes[2][numbers.update_window_dims[window.index(place)]] == equation.shapes[0][place]
    )
    axes = {
        "array": place,
        "indices": pairs.get(place),
        "updates": batch[pairs[place]] if place in pairs else (
            numbers.update_window_dims[window.index(place)] if place in window else None
        ),
    }  # fmt: skip
    for kind, one in zip(axes, operands, strict=True):
        if isinstance(one, Same) and (_SCANNED in one.varies or axes[kind] in one.varies):
            return equation.fault("place")
    return Rows(place, before, after) if is_whole else equation.fault("unknown")


def _random_bits(reader: _Reader, equation: _Equation, operands: list[Value]) -> Value:
    """Keys come first in the shape of what they draw; so a key of one row draws for that row."""
    key = operands[0]
    if not isinstance(key, Same):
        return key if isinstance(key, Rows) else equation.fault("unknown")
    return replace(_with(_any(equation.results[0]), _scanned(operands)), is_drawn=True)


def _linear_algebra(reader: _Reader, equation: _Equation, operands: list[Value]) -> Value:
    """Of matrices along the last two axes."""
    value = reader.together(operands, equation.fault)
    if isinstance(value, Rows):
        return value if value.axis < len(equation.shapes[0]) - 2 else equation.fault("couples")
    return [_with(_any(aval), _scanned(operands)) for aval in equation.results] if isinstance(value, Same) else value  # pyright: ignore[reportReturnType]


def _fft(reader: _Reader, equation: _Equation, operands: list[Value]) -> Value:
    value, last = operands[0], len(equation.params["fft_lengths"])
    if isinstance(value, Rows):
        return value if value.axis < len(equation.shapes[0]) - last else equation.fault("couples")
    return value if isinstance(value, Total) else _with(_any(equation.results[0]), _scanned(operands))


def _collective(reader: _Reader, equation: _Equation, operands: list[Value]) -> Value | list[Value]:
    """Over mesh axes that no rows are split over: element by element, unless it moves an axis."""
    names = ("all_gather_dimension", "scatter_dimension", "split_axis", "concat_axis")
    axes = [equation.params[name] for name in names if name in equation.params]
    for one in operands:
        if isinstance(one, Rows) and (one.axis in axes or (axes and not equation.params.get("tiled"))):
            return equation.fault("unknown")
    if any(isinstance(one, Total) for one in operands):
        return equation.fault("unknown") if not equation.name.startswith("psum") else [
            replace(one, elements=None) if isinstance(one, Total) else one for one in operands
        ]  # fmt: skip
    return [
        _with(_any(aval), _scanned(operands)) if isinstance(one, Same) else one
        for one, aval in zip(operands, equation.results, strict=True)
    ]


# What has a jaxpr inside.


def _call(reader: _Reader, equation: _Equation, operands: list[Value]) -> list[Value]:
    jaxpr = _called(equation)
    # A function of jax is traced once for all that call it, so its equations keep the lines of the first.
    return reader.outputs(jaxpr, operands, equation.line if is_of_jax(jaxpr) else equation.outer_line)


def _called(equation: _Equation) -> Jaxpr:
    inner = equation.params["jaxpr"] if "jaxpr" in equation.params else equation.params["call_jaxpr"]
    return inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner


def is_of_jax(jaxpr: Jaxpr) -> bool:
    """Whether it is that of a function of jax itself."""
    try:
        return (jaxpr.debug_info.func_filename or "").startswith(_JAX)
    except AttributeError:  # this jax does not say whose function it is
        return False


def _custom(reader: _Reader, equation: _Equation, operands: list[Value]) -> list[Value]:
    """A function with a derivative of its own: what that makes of the rows counts too."""
    results = _call(reader, equation, operands)
    # The rules of jax itself (`relu`, `logsumexp`) are the derivatives of what they are for.
    is_exact = is_of_jax(_called(equation))
    if is_exact or reader.is_gradient or not any(isinstance(one, Rows | Total) for one in results):
        return results
    is_alone = _derivative_is_alone(reader.num_rows, equation, operands, results)
    return results if is_alone else [equation.fault("unknown")] * len(results)


def _derivative_is_alone(num_rows: int, equation: _Equation, operands: list[Value], results: list[Value]) -> bool:
    """Whether the gradient with respect to a row is that row's alone, and to anything else a sum over rows."""
    by_atom = {
        atom: value for atom, value in zip(equation.raw.invars, operands, strict=True) if not isinstance(atom, Literal)
    }
    inputs = {atom: value for atom, value in by_atom.items() if jnp.issubdtype(atom.aval.dtype, jnp.inexact)}
    outputs = {
        var: value
        for var, value in zip(equation.raw.outvars, results, strict=True)
        if str(var) != "_" and jnp.issubdtype(var.aval.dtype, jnp.inexact)
    }
    if not inputs or not outputs:
        return True
    if not all(isinstance(value, Rows) for value in outputs.values()):
        return False

    def pullback(given: list[Any], cotangents: list[Any]) -> list[Any]:  # Any: arrays
        values = dict(zip(by_atom, given, strict=True))

        def of_floats(floats: list[Any]) -> list[Any]:
            call = jaxpr_as_fun(ClosedJaxpr(single, ()))
            return call(*(values | dict(zip(inputs, floats, strict=True))).values())

        return jax.vjp(of_floats, [values[atom] for atom in inputs])[1](cotangents)[0]

    shapes = [[jax.ShapeDtypeStruct(one.aval.shape, one.aval.dtype) for one in each] for each in (by_atom, outputs)]
    try:
        single = _called(equation).replace(
            constvars=(), invars=list(by_atom), outvars=list(outputs), eqns=[equation.raw], effects=equation.raw.effects
        )
        traced = jax.make_jaxpr(pullback)(*shapes)
    except Exception:  # the user's own rule, whatever it raises: the gradient itself says so
        return False

    def is_alone(value: Value, gradient: Value) -> bool:
        match value, gradient:
            case Rows(axis), Same(varies=varies):
                return axis not in varies
            case Rows(), _:
                return gradient == value
            case _:
                return gradient == Same(number=0.0) or (isinstance(gradient, Total) and gradient.degree == 1)

    reader = _Reader(num_rows, is_gradient=True)
    gradients = reader.outputs(traced.jaxpr, [*by_atom.values(), *outputs.values()], equation.line)
    return all(map(is_alone, inputs.values(), gradients))


def _fixed_point(
    reader: _Reader, equation: _Equation, carry: list[Value], step: Callable[[list[Value]], list[Value]]
) -> list[Value]:
    """The carry of a loop: what it is before any number of iterations."""
    for _ in range(4 * len(carry) + 4):
        after = step(carry)
        joined = [reader.joined(one, two, equation.fault) for one, two in zip(carry, after, strict=True)]
        if joined == carry:
            return carry
        carry = joined
    return [equation.fault("unknown")] * len(carry)


def _scan(reader: _Reader, equation: _Equation, operands: list[Value]) -> list[Value]:
    num_consts, num_carry = scan_counts(equation.params)
    consts, carry = operands[:num_consts], operands[num_consts : num_consts + num_carry]
    xs, jaxpr = operands[num_consts + num_carry :], equation.params["jaxpr"].jaxpr
    takes_rows = any(isinstance(one, Rows) and one.axis == 0 for one in xs)
    is_nested = _scanned(operands) or any(isinstance(one, Rows) and one.axis == _SCANNED for one in operands)
    if takes_rows and (is_nested or any(isinstance(one, Rows) and one.axis == 0 and one != Rows(0) for one in xs)):
        return [equation.fault("unknown")] * len(equation.results)

    def element(value: Value) -> Value:
        match value:
            case Rows(axis=axis) if axis != _SCANNED:
                return replace(value, axis=axis - 1)  # 0 - 1 is the scanned axis
            case Same(varies=varies):
                new = frozenset(axis - 1 for axis in varies if axis > 0) | (varies & {_SCANNED})
                return replace(value, varies=new | ({_SCANNED} if takes_rows and 0 in varies else set()), counts=None)
            case _:
                return value

    def stacked(value: Value) -> Value:
        match value:
            case Rows(axis=axis) if takes_rows or axis != _SCANNED:
                return replace(value, axis=axis + 1)
            case Same(varies=varies):
                outer = varies & {_SCANNED} if not takes_rows else set()
                return Same(frozenset({0, *(axis + 1 for axis in varies if axis >= 0), *outer}), None, value.is_drawn)
            case _:
                return value

    def carried(value: Value) -> Value:
        """In a scan over rows, a carry that depends on a row brings it to the others."""
        return equation.fault("unknown") if takes_rows and value == Rows(_SCANNED) else value

    def numbered(value: Value) -> Value:
        """In a scan over rows, whatever else is carried may be another thing for each of them."""
        return _with(value, frozenset({_SCANNED})) if takes_rows and isinstance(value, Same) else value

    def body(before: list[Value]) -> list[Value]:
        return reader.outputs(jaxpr, [*consts, *before, *map(element, xs)], equation.outer_line)

    def after(before: list[Value]) -> list[Value]:
        return list(map(carried, body(before)[:num_carry]))

    before = _fixed_point(reader, equation, carry, after)
    if takes_rows:
        before = _fixed_point(
            reader, equation, list(map(numbered, before)), lambda one: list(map(numbered, after(one)))
        )
    results = body(before)
    last = [
        replace(one, varies=one.varies - {_SCANNED}) if takes_rows and isinstance(one, Same) else one for one in before
    ]
    return [*last, *map(stacked, results[num_carry:])]


def _while(reader: _Reader, equation: _Equation, operands: list[Value]) -> list[Value]:
    num_cond, num_body = equation.params["cond_nconsts"], equation.params["body_nconsts"]
    cond_consts, body_consts = operands[:num_cond], operands[num_cond : num_cond + num_body]
    body, cond = equation.params["body_jaxpr"].jaxpr, equation.params["cond_jaxpr"].jaxpr

    def step(carry: list[Value]) -> list[Value]:
        return reader.outputs(body, [*body_consts, *carry], equation.outer_line)

    carry = _fixed_point(reader, equation, operands[num_cond + num_body :], step)
    (goes_on,) = reader.outputs(cond, [*cond_consts, *carry], equation.outer_line)
    if isinstance(goes_on, Same) and _SCANNED not in goes_on.varies:
        return carry
    if goes_on == Rows(_SCANNED):
        return [reader.joined(one, goes_on, equation.fault) for one in carry]
    return [equation.fault("unknown")] * len(carry)


def _cond(reader: _Reader, equation: _Equation, operands: list[Value]) -> list[Value]:
    which, *arguments = operands
    each = [reader.outputs(branch.jaxpr, arguments, equation.outer_line) for branch in equation.params["branches"]]
    if isinstance(which, Same) and which.number is not None and 0 <= which.number < len(each):
        return each[int(which.number)]
    joined = [
        reduce(lambda one, two: reader.joined(one, two, equation.fault), results) for results in zip(*each, strict=True)
    ]
    joined = [replace(one, number=None, counts=None) if isinstance(one, Same) else one for one in joined]
    match which:
        case Same(varies=varies) if _SCANNED not in varies:
            return joined
        case Same() | Rows(axis=-1):
            chooser = which if isinstance(which, Rows) else Same(frozenset({_SCANNED}))
            return [reader.joined(one, chooser, equation.fault) for one in joined]
        case RowUse():
            return [which] * len(joined)
        case _:
            return [equation.fault("couples")] * len(joined)


def _shard_map(reader: _Reader, equation: _Equation, operands: list[Value]) -> list[Value]:
    """Over axes of the model; those that rows are split over may not be named in a loss."""

    def is_split(value: Value, spec: Any) -> bool:  # Any: a PartitionSpec
        return isinstance(value, Rows) and 0 <= value.axis < len(spec) and spec[value.axis] is not None

    unknown = equation.fault("unknown")
    inputs = [
        unknown if is_split(one, spec) else one for one, spec in zip(operands, equation.params["in_specs"], strict=True)
    ]
    results = _call(reader, equation, inputs)
    return [
        unknown if is_split(one, spec) else one for one, spec in zip(results, equation.params["out_specs"], strict=True)
    ]


_Rule: TypeAlias = Callable[[_Reader, _Equation, list[Value]], "Value | list[Value]"]
_ELEMENTWISE = """
    abs acos acosh and asin asinh atan atan2 atanh bessel_i0e bessel_i1e bitcast_convert_type cbrt ceil clamp clz
    complex conj cos cosh digamma eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igamma_grad_a igammac
    integer_pow is_finite le le_to lgamma log log1p logistic lt lt_to max min ne nextafter not or polygamma
    population_count pow real imag random_fold_in random_gamma random_seed regularized_incomplete_beta rem round rsqrt
    shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square tan tanh xor zeta threefry2x32
""".split()
_LINEAR = """
    copy copy_p layout_constraint name optimization_barrier pbroadcast pcast pvary reduce_precision reshard
    sharding_constraint stop_gradient
""".split()
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(_LINEAR, _linear),
    **dict.fromkeys(("add", "add_any", "sub"), _add),
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"), _along("axis")),
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or"), _reduce),
    **dict.fromkeys(("reduce_xor", "argmax", "argmin"), _reduce),
    **dict.fromkeys(("reduce_window_sum", "reduce_window_max", "reduce_window_min"), _window),
    **dict.fromkeys(("random_bits", "random_split", "random_unwrap", "random_wrap"), _random_bits),
    **dict.fromkeys(("scatter", "scatter-add", "scatter_add", "scatter_mul", "scatter_min", "scatter_max"), _scatter),
    **dict.fromkeys(("cholesky", "lu", "qr", "eigh", "svd", "triangular_solve"), _linear_algebra),
    **dict.fromkeys(("psum", "psum_invariant", "pmax", "pmin", "ppermute", "all_gather"), _collective),
    **dict.fromkeys(("reduce_scatter", "all_to_all", "all_gather_invariant"), _collective),
    "convert_element_type": _convert,
    "neg": _negative,
    "mul": _mul,
    "div": _div,
    "select_n": _select,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "expand_dims": _squeeze,
    "transpose": _transpose,
    "rev": _along("dimensions"),
    "sort": _along("dimension"),
    "top_k": _top_k,
    "slice": _slice,
    "dynamic_slice": _slice,
    "dynamic_update_slice": _update_slice,
    "split": _split,
    "pad": _pad,
    "concatenate": _concatenate,
    "iota": _iota,
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "gather": _gather,
    "fft": _fft,
}
# Whose results have the shape of their operands, and each element of them is made of the same element of each.
ELEMENTWISE = frozenset(
    name
    for name, rule in _RULES.items()
    if rule in (_elementwise, _linear, _add, _convert, _negative, _mul, _div, _select)
)
_WITH_JAXPRS: dict[str, Callable[[_Reader, _Equation, list[Value]], list[Value]]] = {
    **dict.fromkeys(("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"), _call),
    **dict.fromkeys(("custom_jvp_call", "custom_vjp_call"), _custom),
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
}
