"""What a program is promised to cost, and whether it does; it knows executables, not pipelines."""

import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias

import jax

from stepc._units import bytes_of, readable
from stepc.errors import BudgetError, ConfigError, FieldTypeError, FieldValueError, did_you_mean
from stepc.inspect.collectives import Collective, Collectives, collectives
from stepc.inspect.memory import Memory, cost, memory

Size: TypeAlias = int | str
_MOST_LINES = 5


@dataclass(frozen=True, repr=False)
class Budget:
    """Promise what a compiled step costs at most. What is left out is not promised.

    Meaning: each number is a most; `donated=True` says that every leaf of the state is written over.
    Why: a change that adds a reduction to the loop, or a copy of the parameters, then fails the build.

    Args:
      gradient_reductions: how often each element of the gradient is reduced in a step, over the mesh axes that the
        plan reduces over: reduced elements * executions / elements of the gradient, rounded up. Scalars are left
        out. A program may split its one reduction into a few by size: that is still 1.
      collectives: executions of collectives in a step, of any kind, trip counts multiplied.
      collectives_in_loops: the part of them that stands in a loop.
      collective_bytes: bytes * executions, over all collectives, on one device.
      argument_bytes: of state and batch, on one device.
      temp_bytes: what the program needs besides its arguments and results, on one device.
      total_bytes: all that it holds at once, on one device.
      flops: of matrix products and convolutions, on one device, loops multiplied out.
      traces: how often the step was traced.
      donated: whether every leaf of the state that was donated is used again for the new state.
    Units:  bytes are a number, or a text such as "12MiB" or "1.5 GB".
    Errors: FieldTypeError or FieldValueError for a number that is no bound; ConfigError for `donated=False`, which
      would promise nothing.
    What a program costs in time is not promised: no text shows it.
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
        for name, value in self.promised.items():
            if name == "donated":
                if value is not True:
                    raise ConfigError(f"donated={value!r} promises nothing.", suggestion="Write True, or leave it out.")
            elif name.endswith("bytes"):
                bytes_of(name, value)
            else:
                _check_count(name, value)

    def __repr__(self) -> str:
        return f"Budget({', '.join(f'{name}={value!r}' for name, value in self.promised.items())})"

    @property
    def promised(self) -> dict[str, Size | bool]:
        """The promises that are made, as they were written."""
        return {one.name: value for one in fields(self) if (value := self.__dict__[one.name]) is not None}

    @classmethod
    def from_toml(cls, path: str | Path) -> "Budget":
        """Read a budget from a TOML file, whose keys are the fields.

        Errors: ConfigError if there is no such file, it is not TOML, or a key is not a field.
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
            facts = [(name, did_you_mean(name, known) or "not a promise") for name in unknown]
            raise ConfigError(f"The budget {path} promises what cannot be promised.", facts=facts)
        return cls(**table)


def _check_count(name: str, value: object) -> None:
    facts = (("field", name), ("expected", "a whole number of at least 0"), ("got", repr(value)))
    if isinstance(value, bool) or not isinstance(value, int):
        raise FieldTypeError(f"{name}={value!r} is not a whole number.", facts=facts)
    if value < 0:
        raise FieldValueError(f"{name}={value!r} is negative.", facts=facts)


@dataclass(frozen=True)
class Measure:
    """What a program really has of one promise: a number, None if it is unknown, and the lines responsible."""

    value: int | None
    lines: tuple[str, ...] = ()


def check(
    budget: Budget,
    compiled: jax.stages.Compiled,
    mesh: jax.sharding.Mesh | None = None,
    *,
    known: Mapping[str, Measure] = MappingProxyType({}),
) -> None:
    """Hold a compiled program to a budget.

    Meaning: every promise is at most what was promised; what is unknown breaks its promise.
    Why: one call that fails the build, with the lines responsible.

    Args:
      compiled: what `jax.jit(f).lower(...).compile()` returns.
      mesh: as in `collectives`.
      known: measures of what no executable knows: `traces`, `donated`, `gradient_reductions`.
    Errors: BudgetError with a table of all promises, the broken ones first; ConfigError for a promise that nobody
      measured.
    Source: ours.
    """
    measures = {**_measures(compiled, mesh), **known}
    unmeasured = [name for name in budget.promised if name not in measures]
    if unmeasured:
        raise ConfigError(
            f"Nobody here can tell {' and '.join(f'`{name}`' for name in unmeasured)}, which the budget promises.",
            facts=[(name, _TOLD_BY[name]) for name in unmeasured],
        )
    rows = [_Row.of(name, promised, measures[name]) for name, promised in budget.promised.items()]
    broken = tuple(row.name for row in rows if row.is_broken)
    if broken:
        many = f"{len(broken)} of {len(rows)} promises are" if len(rows) > 1 else "The promise is"
        raise BudgetError(f"{many} broken.", where=_table(rows), broken=broken)


_TOLD_BY = {
    "traces": "counted by a step: `compiled.check(budget, traces=step.traces)`, or `sc.compile(..., budget=budget)`",
    "donated": "known of a step that stepc compiled: `step.lower(state, batch).compile().check(budget)`",
    "gradient_reductions": "known of a step that stepc compiled; of any program, promise `collectives`",
}


def _measures(compiled: jax.stages.Compiled, mesh: jax.sharding.Mesh | None) -> dict[str, Measure]:
    rows, needs = collectives(compiled, mesh), memory(compiled)
    return {
        "collectives": Measure(_executions(rows), _lines(rows)),
        "collectives_in_loops": Measure(_executions(rows.in_loops), _lines(rows.in_loops)),
        "collective_bytes": Measure(_executed_bytes(rows), _lines(rows)),
        "argument_bytes": Measure(needs.arguments),
        "temp_bytes": Measure(needs.temporaries),
        "total_bytes": Measure(needs.total, _parts(needs)),
        "flops": Measure(cost(compiled).flops),
    }


def reductions_of(rows: Iterable[Collective], *, axes: tuple[str, ...], elements: int) -> Measure:
    """How often each of `elements` is reduced over some of these axes; scalars, which are metrics, are left out."""
    reducing = Collectives(
        tuple(row for row in rows if row.kind in ("all-reduce", "reduce-scatter") and set(row.axes) & set(axes))
    )
    counted = Collectives(tuple(row for row in reducing if _elements(row)))
    if any(row.executions is None for row in counted):
        return Measure(None, _lines(counted))
    total = sum(_elements(row) * (row.executions or 0) for row in counted)
    # Up to 1 %: a backend may join scalars and vectors into one flat buffer.
    return Measure(-(-(total - elements // 100) // elements) if total else 0, _lines(counted))


def _elements(row: Collective) -> int:
    return sum(shape.elements for shape in row.payload if shape.elements > 1)


def _executions(rows: Collectives) -> int | None:
    counts = [row.executions for row in rows]
    return None if None in counts else sum(count for count in counts if count is not None)


def _executed_bytes(rows: Collectives) -> int | None:
    return None if _executions(rows) is None else rows.executed_bytes


def _lines(rows: Collectives) -> tuple[str, ...]:
    """The heaviest first."""
    ordered = sorted(rows, key=lambda row: -row.bytes * (row.executions or 1))
    return tuple(map(_line, ordered))


def _line(row: Collective) -> str:
    times = "an unknown number of times" if row.executions is None else f"{row.executions} x"
    over = f" over {', '.join(row.axes)}" if row.axes else ""
    place = " in a loop" if row.in_loop else ""
    return f"{times} {row.kind} of {readable(row.bytes)}{over}{place}: {row.source or 'no source known'}"


def _parts(needs: Memory) -> tuple[str, ...]:
    return tuple(" ".join(line.split()) for line in str(needs).splitlines()[:-1])


@dataclass(frozen=True)
class _Row:
    """One line of the table."""

    name: str
    promised: str
    really: str
    lines: tuple[str, ...]
    is_broken: bool

    @classmethod
    def of(cls, name: str, promised: Size | bool, measure: Measure) -> "_Row":
        show: Callable[[int], str] = str
        most = promised
        if name.endswith("bytes"):
            show, most = _exactly, bytes_of(name, promised)
        elif name == "donated":
            show, most = (lambda missing: "every leaf" if missing == 0 else f"all but {missing}"), 0
        is_broken = measure.value is None or measure.value > int(most)
        really = "unknown" if measure.value is None else show(measure.value)
        told = f"{promised} = {show(int(most))}" if isinstance(promised, str) else show(int(most))
        return cls(name, told, really, measure.lines if is_broken else (), is_broken)


def _exactly(bytes_: int) -> str:
    return f"{bytes_:,} B"


def _table(rows: Iterable[_Row]) -> str:
    ordered = sorted(rows, key=lambda row: not row.is_broken)
    cells = [("", "promised", "is", "responsible")]
    for row in ordered:
        shown = row.lines[:_MOST_LINES]
        more = len(row.lines) - len(shown)
        lines = (*shown, f"and {more} more") if more else shown
        first, *rest = lines or ("" if row.is_broken else "holds",)
        cells.append((row.name, row.promised, row.really, first))
        cells.extend(("", "", "", line) for line in rest)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)
