"""What a compiled program may cost, and whether it stays within that. It knows executables, not pipelines."""

import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias

import jax

from stepc._text import aligned_table, readable_bytes
from stepc._units import bytes_of
from stepc.errors import BudgetError, ConfigError, FieldTypeError, FieldValueError, did_you_mean
from stepc.inspect.collectives import Collective, Collectives, collectives
from stepc.inspect.cost import cost
from stepc.inspect.memory import memory

Size: TypeAlias = int | str
_MAX_LINES = 5


@dataclass(frozen=True, repr=False)
class Budget:
    """Limit what a compiled step may cost. A field that is left out sets no limit.

    Meaning: each number is an upper limit; `donated=True` requires that the new state reuses every buffer of the old.
    Why: a change that adds a reduction to the loop, or a copy of the parameters, then fails the build.

    Args:
      gradient_reductions: how often each element of the gradient is reduced in a step, over the mesh axes that the
        plan reduces over: reduced elements * executions / elements of the gradient, rounded up. Scalars do not
        count. A program may split its one reduction into several by size: that is still 1.
      collectives: executions of collectives of any kind in a step, trip counts multiplied.
      collectives_in_loops: those of them in a loop.
      collective_bytes: bytes * executions, over all collectives, on one device.
      argument_bytes: state and batch, on one device.
      temp_bytes: what the program needs besides its arguments and results, on one device.
      total_bytes: everything it holds at once, on one device.
      flops: of matrix products and convolutions, on one device, loops multiplied out.
      traces: how often the step is traced.
      donated: True if every donated leaf of the state must be reused for the new state.
    Units:  a number of bytes, or a string such as "12MiB" or "1.5 GB".
    Errors: FieldTypeError or FieldValueError for a value that is not a limit; ConfigError for `donated=False`, which
      limits nothing.
    Time cannot be limited: the text of a program does not show it.
    Example:
      >>> Budget(gradient_reductions=1, collectives_in_loops=0, temp_bytes="2GiB")
      Budget(gradient_reductions=1, collectives_in_loops=0, temp_bytes='2GiB')

    Source: ours.
    """

    gradient_reductions: int | None = None
    collectives: int | None = None
    collectives_in_loops: int | None = None
    collective_bytes: Size | None = None
    argument_bytes: Size | None = None
    temp_bytes: Size | None = None
    total_bytes: Size | None = None
    flops: int | None = None
    traces: int | None = None
    donated: bool | None = None

    def __post_init__(self) -> None:
        for name, value in self.limits.items():
            if name == "donated":
                if value is not True:
                    raise ConfigError(f"donated={value!r} limits nothing.", suggestion="Write True, or leave it out.")
            elif name.endswith("bytes"):
                bytes_of(name, value)
            else:
                _check_count(name, value)

    def __repr__(self) -> str:
        return f"Budget({', '.join(f'{name}={value!r}' for name, value in self.limits.items())})"

    @property
    def limits(self) -> dict[str, Size | bool]:
        """The limits that are set, as written."""
        return {one.name: value for one in fields(self) if (value := self.__dict__[one.name]) is not None}

    @classmethod
    def from_toml(cls, path: str | Path) -> "Budget":
        """Read a budget from a TOML file whose keys are the fields.

        Errors: ConfigError if the file cannot be read, is not TOML, or has a key that is not a field.
        """
        try:
            table = tomllib.loads(Path(path).read_text())
        except OSError as error:
            raise ConfigError(f"The budget {path} cannot be read: {error.strerror}.") from error
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"The budget {path} is not TOML: {error}.") from error
        known = [one.name for one in fields(cls)]
        unknown = [name for name in table if name not in known]
        if unknown:
            facts = [(name, did_you_mean(name, known) or "not a field of Budget") for name in unknown]
            raise ConfigError(f"The budget {path} has unknown keys.", facts=facts)
        return cls(**table)


def _check_count(name: str, value: object) -> None:
    facts = (("field", name), ("expected", "an integer of at least 0"), ("got", repr(value)))
    if isinstance(value, bool) or not isinstance(value, int):
        raise FieldTypeError(f"{name}={value!r} is not an integer.", facts=facts)
    if value < 0:
        raise FieldValueError(f"{name}={value!r} is negative.", facts=facts)


@dataclass(frozen=True)
class Measurement:
    """What a program has of one limited quantity: a number, None if it is unknown, and the lines responsible."""

    value: int | None
    lines: tuple[str, ...] = ()


def check(
    budget: Budget,
    compiled: jax.stages.Compiled,
    mesh: jax.sharding.Mesh | None = None,
    *,
    known: Mapping[str, Measurement] = MappingProxyType({}),
) -> None:
    """Check a compiled program against a budget.

    Meaning: every measurement is at most its limit; an unknown one exceeds it.
    Why: one call fails the build and names the lines responsible.

    Args:
      compiled: what `jax.jit(f).lower(...).compile()` returns.
      mesh: as in `collectives`.
      known: measurements that an executable cannot give: `traces`, `donated`, `gradient_reductions`.
    Errors: BudgetError with a table of all limits, those exceeded first; ConfigError for a limit without a measurement.
    Source: ours.
    """
    measured = {**_measurements(compiled, mesh), **known}
    unmeasured = [name for name in budget.limits if name not in measured]
    if unmeasured:
        raise ConfigError(
            f"The budget limits {' and '.join(f'`{name}`' for name in unmeasured)}, which cannot be measured here.",
            facts=[(name, _MEASURED_BY[name]) for name in unmeasured],
        )
    rows = [_Row.of(name, limit, measured[name]) for name, limit in budget.limits.items()]
    exceeded = tuple(row.name for row in rows if row.is_exceeded)
    if exceeded:
        count = f"{len(exceeded)} of {len(rows)} limits" if len(rows) > 1 else "The limit"
        verb = "are" if len(exceeded) > 1 else "is"
        raise BudgetError(f"{count} {verb} exceeded.", where=_table(rows), broken=exceeded)


_MEASURED_BY = {
    "traces": "counted by a step: `compiled.check(budget, traces=step.traces)`, or `sc.compile(..., budget=budget)`",
    "donated": "known of a step that stepc compiled: `step.lower(state, batch).compile().check(budget)`",
    "gradient_reductions": "known of a step that stepc compiled; for any other program, limit `collectives`",
}


def _measurements(compiled: jax.stages.Compiled, mesh: jax.sharding.Mesh | None) -> dict[str, Measurement]:
    rows, needs = collectives(compiled, mesh), memory(compiled)
    executions = _executions(rows)
    return {
        "collectives": Measurement(executions, _lines(rows)),
        "collectives_in_loops": Measurement(_executions(rows.in_loops), _lines(rows.in_loops)),
        "collective_bytes": Measurement(None if executions is None else rows.executed_bytes, _lines(rows)),
        "argument_bytes": Measurement(needs.arguments),
        "temp_bytes": Measurement(needs.temporaries),
        "total_bytes": Measurement(needs.total, tuple(" ".join(line.split()) for line in str(needs).splitlines()[:-1])),
        "flops": Measurement(cost(compiled).flops),
    }


def reductions_of(rows: Iterable[Collective], *, axes: tuple[str, ...], elements: int) -> Measurement:
    """How often each of `elements` is reduced over some of these axes. Scalars, which are metrics, do not count."""
    counted = Collectives(
        tuple(
            row
            for row in rows
            if row.kind in ("all-reduce", "reduce-scatter") and set(row.axes) & set(axes) and _elements(row)
        )
    )
    if any(row.executions is None for row in counted):
        return Measurement(None, _lines(counted))
    total = sum(_elements(row) * (row.executions or 0) for row in counted)
    # Up to 1% more is still one: a backend may join scalars and vectors into one flat buffer.
    return Measurement(-(-(total - elements // 100) // elements) if total else 0, _lines(counted))


def _elements(row: Collective) -> int:
    return sum(shape.elements for shape in row.payload if shape.elements > 1)


def _executions(rows: Collectives) -> int | None:
    counts = [row.executions for row in rows]
    return None if None in counts else sum(count for count in counts if count is not None)


def _lines(rows: Collectives) -> tuple[str, ...]:
    """The largest first."""
    ordered = sorted(rows, key=lambda row: -row.bytes * (row.executions or 1))
    return tuple(map(_line, ordered))


def _line(row: Collective) -> str:
    times = "an unknown number of times" if row.executions is None else f"{row.executions} x"
    over = f" over {', '.join(row.axes)}" if row.axes else ""
    place = " in a loop" if row.in_loop else ""
    return f"{times} {row.kind} of {readable_bytes(row.bytes)}{over}{place}: {row.source or 'unknown source'}"


@dataclass(frozen=True)
class _Row:
    """One limit and what was measured, as text."""

    name: str
    limit: str
    actual: str
    lines: tuple[str, ...]
    is_exceeded: bool

    @classmethod
    def of(cls, name: str, limit: Size | bool, measured: Measurement) -> "_Row":
        show: Callable[[int], str] = str
        highest = limit
        if name.endswith("bytes"):
            show, highest = (lambda bytes_: f"{bytes_:,} B"), bytes_of(name, limit)
        elif name == "donated":
            show, highest = (lambda missing: "every leaf" if missing == 0 else f"all but {missing}"), 0
        is_exceeded = measured.value is None or measured.value > int(highest)
        actual = "unknown" if measured.value is None else show(measured.value)
        shown = f"{limit} = {show(int(highest))}" if isinstance(limit, str) else show(int(highest))
        return cls(name, shown, actual, measured.lines if is_exceeded else (), is_exceeded)


def _table(rows: Iterable[_Row]) -> str:
    cells = [("", "limit", "actual", "responsible")]
    for row in sorted(rows, key=lambda row: not row.is_exceeded):
        shown = row.lines[:_MAX_LINES]
        hidden = len(row.lines) - len(shown)
        lines = (*shown, f"and {hidden} more") if hidden else shown
        first, *rest = lines or ("" if row.is_exceeded else "ok",)
        cells.append((row.name, row.limit, row.actual, first))
        cells.extend(("", "", "", line) for line in rest)
    return "\n".join(aligned_table(cells))
