"""The smallest number of parts with which a program fits, found with few compilations; it must not know what is compiled."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import log
from typing import Any

from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var
from numpy import interp

from stepc._text import readable_bytes
from stepc.inspect.memory import Memory

_LOOPS = ("scan", "while")
_NAMES = ("reshape", "squeeze", "sharding_constraint")  # another name for what is there


def live_bytes(traced: ClosedJaxpr) -> int:
    """The most bytes that intermediate values hold at once, each equation run by itself, in order.

    Arguments are left out, and so are results: a donated argument has room for its result. The compiler fuses, reuses
    and reorders, so this is of use beside the same of another program: their ratio is about that of what they need.
    Source: ours; the walk is that of a linear scan over live ranges.
    """
    return _peak(traced.jaxpr, apart=_results(traced.jaxpr))


def _results(jaxpr: Jaxpr) -> set[Var]:
    """The results, and what they are before they are told where to lie."""
    results = {var for var in jaxpr.outvars if isinstance(var, Var)}
    for equation in reversed(jaxpr.eqns):
        if equation.primitive.name == "sharding_constraint" and results & set(equation.outvars):
            results |= {var for var in equation.invars if isinstance(var, Var)}
    return results


def _peak(jaxpr: Jaxpr, *, apart: set[Var]) -> int:
    used = [(at, equation.invars) for at, equation in enumerate(jaxpr.eqns)] + [(len(jaxpr.eqns), jaxpr.outvars)]
    last = {var: at for at, operands in used for var in operands if not isinstance(var, Literal)}
    ends: dict[int, int] = {}
    live = most = 0
    for at, equation in enumerate(jaxpr.eqns):
        named = equation.primitive.name in _NAMES
        new = [] if named else [var for var in equation.outvars if var not in apart]
        made = sum(map(_bytes, new))
        inside = max((_peak(inner, apart=set()) for inner in _inner(equation.params)), default=0)
        if equation.primitive.name in _LOOPS:  # its results take the room of what it began with; its turns need more
            most = max(most, live + max(made - ends.get(at, 0), 0) + inside)
        else:  # what a call returns is made inside of it
            most = max(most, live + max(made, inside))
        for var in new:
            if var in last:
                live += _bytes(var)
                ends[last[var]] = ends.get(last[var], 0) + _bytes(var)
        live -= ends.pop(at, 0)
    return most


def _inner(params: dict[str, Any]) -> Iterator[Jaxpr]:  # Any: whatever a primitive keeps
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            match one:
                case Jaxpr():
                    yield one
                case ClosedJaxpr():
                    yield one.jaxpr
                case _:
                    pass


def _bytes(var: Var) -> int:
    match var.aval:
        case ShapedArray() as aval:
            return aval.size * aval.dtype.itemsize
        case _:
            return 0  # a token, or a reference


# What the estimate of a program that is not compiled may be wrong by, once its neighbour is: a program whose estimate
# is beyond this is not compiled to be sure that it does not fit. The most that was seen, between neighbours, is 1.18.
_MARGIN = 1.25


@dataclass(frozen=True)
class SearchTrial:
    """One number of parts that was looked at.

    Args:
      parts: the number.
      estimated: bytes on a device that were expected, from live ranges and the programs compiled before it.
      compiled: bytes on a device as the compiler planned them; None if it was not compiled, or found no room at all.
      outcome: "fits", "too large", "refused by the compiler", or "too large by its estimate".
    """

    parts: int
    estimated: int
    compiled: int | None
    outcome: str


@dataclass(frozen=True)
class SearchResult:
    """How a number of parts was found, or not.

    Args:
      question: the transform that asked, as written.
      answer: the transform that stands in its place, as written; empty if nothing fits.
      most_bytes: what the program may hold at once, on one device.
      counts: the numbers that divide the rows of a device, rising.
      tried: what was looked at, in that order.
      chosen: the answer; None if nothing fits.
    """

    question: str
    answer: str
    most_bytes: int
    counts: tuple[int, ...]
    tried: tuple[SearchTrial, ...]
    chosen: int | None

    @property
    def compilations(self) -> int:
        """How many programs were compiled, the chosen one too."""
        return sum(one.outcome != _BY_ESTIMATE for one in self.tried)

    def __str__(self) -> str:
        many = "1 compilation" if self.compilations == 1 else f"{self.compilations} compilations"
        numbers = ", ".join(map(str, self.counts))
        found = f"{self.question} became {self.answer}" if self.answer else f"nothing fits {self.question}"
        return "\n".join((found, f"parts of a device's rows: {numbers}; {many}", *self.table()))

    def table(self) -> list[str]:
        """What was looked at, a line each, by the number of parts."""
        cells = [("k", "estimated", "compiled", f"at most {self.most_bytes:,} B")]
        for one in sorted(self.tried, key=lambda one: one.parts):
            compiled = "-" if one.compiled is None else f"{one.compiled:,} B"
            chosen = ", chosen" if one.parts == self.chosen else ""
            cells.append((str(one.parts), readable_bytes(one.estimated), compiled, f"{one.outcome}{chosen}"))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]


_FITS, _TOO_LARGE, _REFUSED, _BY_ESTIMATE = "fits", "too large", "refused by the compiler", "too large by its estimate"


@dataclass(frozen=True)
class CandidatePrograms:
    """What a search asks of the programs it chooses from.

    Args:
      counts: how many parts each has, rising.
      arguments: bytes of arguments on a device, about the same for all.
      live: of a number of parts, the bytes of intermediate values by their live ranges.
      compiled: of a number of parts, what the compiler planned; None if it found no room.
    """

    counts: Sequence[int]
    arguments: int
    live: Callable[[int], int]
    compiled: Callable[[int], Memory | None]


def find_smallest_fit(programs: CandidatePrograms, most_bytes: int) -> tuple[tuple[SearchTrial, ...], int | None]:
    """What was looked at, and the least number of parts with which the program fits; None if none does.

    Meaning: a guess by estimate, a compilation, the estimate put right by it, and so on, until the guess fits and the
      next smaller number does not: by its compilation, or by an estimate that is beyond any error that was seen.
    The more parts, the less is taken to be needed; but one part, which has no accumulator, is judged by itself.
    Source: ours.
    """
    known: dict[int, Memory | None] = {}
    tried: list[SearchTrial] = []
    live = cache(programs.live)

    def parts_of(count: int) -> tuple[float, float]:
        """What stays and what is temporary: of live bytes the share that the programs compiled so far have."""
        shares = sorted((log(one), needs.temporaries / max(live(one), 1)) for one, needs in known.items() if needs)
        if not shares:
            return float(programs.arguments), float(live(count))
        stays = next(needs.total - needs.temporaries for needs in known.values() if needs)
        share = interp(log(count), [place for place, _ in shares], [share for _, share in shares])
        return float(stays), float(share) * live(count)

    def seems_to_fit(count: int, margin: float = 1.0) -> bool:
        stays, temporary = parts_of(count)
        return stays + temporary / margin <= most_bytes

    while (count := _next(programs.counts, _fitting(known, most_bytes), seems_to_fit)) is not None:
        estimated = round(sum(parts_of(count)))
        needs = known[count] = programs.compiled(count)
        outcome = _REFUSED if needs is None else _FITS if needs.total <= most_bytes else _TOO_LARGE
        tried.append(SearchTrial(count, estimated, None if needs is None else needs.total, outcome))
    chosen = min((count for count, fits in _fitting(known, most_bytes).items() if fits), default=None)
    below = [count for count in programs.counts if chosen is not None and count < chosen]
    if below and below[-1] not in known:
        tried.append(SearchTrial(below[-1], round(sum(parts_of(below[-1]))), None, _BY_ESTIMATE))
    return tuple(tried), chosen


def _fitting(known: dict[int, Memory | None], most_bytes: int) -> dict[int, bool]:
    return {count: needs is not None and needs.total <= most_bytes for count, needs in known.items()}


def _next(counts: Sequence[int], fits: dict[int, bool], seems_to_fit: Callable[..., bool]) -> int | None:
    """The number of parts to compile next; None if no compilation is needed any more."""
    high = min((count for count, fit in fits.items() if fit), default=counts[-1] + 1)
    low = max((count for count, fit in fits.items() if not fit and count < high), default=0)
    left = [count for count in counts if low < count < high]
    if left and left[0] == 1 and seems_to_fit(1):
        return 1
    guess = bisect_left(left, True, key=seems_to_fit)
    if guess < len(left):
        return left[guess]
    # Nothing that is left seems to fit. The largest is the last hope; below one that fits, the neighbour may.
    if left and (not any(fits.values()) or seems_to_fit(left[-1], _MARGIN)):
        return left[-1]
    # One part is judged by itself; and before it is said that nothing fits, whatever may fit is tried.
    rest = (1,) if any(fits.values()) else counts
    return next((one for one in rest if one < high and one not in fits and seems_to_fit(one, _MARGIN)), None)
