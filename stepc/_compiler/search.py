"""The smallest k with which a program fits, found with few compilations. It must not know what is compiled."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from math import log

from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var
from numpy import interp

from stepc._compiler.layers import programs_in
from stepc._text import aligned_table, readable_bytes
from stepc.inspect.memory import Memory

_FITS, _TOO_LARGE, _REFUSED, _BY_ESTIMATE = "fits", "too large", "refused by the compiler", "too large by its estimate"

# An estimate, scaled by a neighbour that was compiled, may be wrong by this factor: a program whose estimate exceeds
# the limit by more is not compiled. The largest error observed between neighbours is 1.18.
_MARGIN = 1.25


@dataclass(frozen=True)
class CandidatePrograms:
    """The programs that a search chooses from.

    Args:
      counts: the number of microbatches k of each, rising.
      arguments: bytes of arguments per device, about the same for all.
      live: for a k, the bytes of intermediate values by their live ranges.
      compiled: for a k, the memory that the compiler planned; None if it found no room.
    """

    counts: Sequence[int]
    arguments: int
    live: Callable[[int], int]
    compiled: Callable[[int], Memory | None]


@dataclass(frozen=True)
class SearchTrial:
    """One k that was considered.

    Args:
      k: the number of microbatches.
      estimated: bytes per device that were expected, from live ranges and the programs compiled before.
      compiled: bytes per device that the compiler planned; None if it was not compiled, or found no room.
      outcome: "fits", "too large", "refused by the compiler", or "too large by its estimate".
    """

    k: int
    estimated: int
    compiled: int | None
    outcome: str


@dataclass(frozen=True)
class SearchResult:
    """How k was found, or not.

    Args:
      request: the transform that asked for a k, as written.
      tuned: the transform that replaces it, as written; empty if nothing fits.
      most_bytes: the limit, in bytes per device.
      counts: the divisors of the rows per device, rising.
      tried: what was considered, in that order.
      chosen: the k; None if nothing fits.
    """

    request: str
    tuned: str
    most_bytes: int
    counts: tuple[int, ...]
    tried: tuple[SearchTrial, ...]
    chosen: int | None

    @property
    def compilations(self) -> int:
        """The number of programs compiled, the chosen one included."""
        return sum(one.outcome != _BY_ESTIMATE for one in self.tried)

    def __str__(self) -> str:
        programs = "1 program" if self.compilations == 1 else f"{self.compilations} programs"
        result = f"{self.request} became {self.tuned}" if self.tuned else f"nothing fits {self.request}"
        candidates = f"k divides the rows per device: {', '.join(map(str, self.counts))}; {programs} compiled"
        return "\n".join((result, candidates, *self.table()))

    def table(self) -> list[str]:
        """One line for each k that was considered."""
        rows = [("k", "estimated", "compiled", f"limit {self.most_bytes:,} B")]
        for one in sorted(self.tried, key=lambda one: one.k):
            compiled = "-" if one.compiled is None else f"{one.compiled:,} B"
            chosen = ", chosen" if one.k == self.chosen else ""
            rows.append((str(one.k), readable_bytes(one.estimated), compiled, f"{one.outcome}{chosen}"))
        return aligned_table(rows)


def find_smallest_fit(programs: CandidatePrograms, most_bytes: int) -> tuple[tuple[SearchTrial, ...], int | None]:
    """The smallest k with which the program fits, None if none does; and what was considered.

    Meaning: estimate, compile the best guess, correct the estimate by it, and repeat until the guess fits and the next
      smaller k does not: it was compiled, or its estimate exceeds the limit by more than any observed error.
    A larger k is taken to need less memory; but k = 1 has no accumulator, and is judged apart.
    Source: ours.
    """
    known: dict[int, Memory | None] = {}
    tried: list[SearchTrial] = []
    live = cache(programs.live)

    def expected(k: int) -> tuple[float, float]:
        """Permanent and temporary bytes; the latter from the share of live bytes that compiled programs had."""
        shares = sorted((log(one), needs.temporaries / max(live(one), 1)) for one, needs in known.items() if needs)
        if not shares:
            return float(programs.arguments), float(live(k))
        permanent = next(needs.total - needs.temporaries for needs in known.values() if needs)
        share = interp(log(k), [at for at, _ in shares], [share for _, share in shares])
        return float(permanent), float(share) * live(k)

    def seems_to_fit(k: int, margin: float = 1.0) -> bool:
        permanent, temporary = expected(k)
        return permanent + temporary / margin <= most_bytes

    def fits() -> dict[int, bool]:
        return {k: needs is not None and needs.total <= most_bytes for k, needs in known.items()}

    while (k := _next(programs.counts, fits(), seems_to_fit)) is not None:
        estimated = round(sum(expected(k)))
        needs = known[k] = programs.compiled(k)
        outcome = _REFUSED if needs is None else _FITS if needs.total <= most_bytes else _TOO_LARGE
        tried.append(SearchTrial(k, estimated, None if needs is None else needs.total, outcome))
    chosen = min((k for k, fit in fits().items() if fit), default=None)
    below = [k for k in programs.counts if chosen is not None and k < chosen]
    if below and below[-1] not in known:
        tried.append(SearchTrial(below[-1], round(sum(expected(below[-1]))), None, _BY_ESTIMATE))
    return tuple(tried), chosen


def _next(counts: Sequence[int], fits: dict[int, bool], seems_to_fit: Callable[..., bool]) -> int | None:
    """The k to compile next; None if the answer is known."""
    high = min((k for k, fit in fits.items() if fit), default=counts[-1] + 1)
    low = max((k for k, fit in fits.items() if not fit and k < high), default=0)
    left = [k for k in counts if low < k < high]
    if left and left[0] == 1 and seems_to_fit(1):
        return 1
    guess = bisect_left(left, True, key=seems_to_fit)
    if guess < len(left):
        return left[guess]
    # Nothing that is left seems to fit. If nothing has fitted, the largest k is the last hope; otherwise the neighbour
    # of the smallest that fitted may fit too.
    if left and (not any(fits.values()) or seems_to_fit(left[-1], _MARGIN)):
        return left[-1]
    # k = 1 is judged apart. Before the search gives up, it tries whatever may fit.
    rest = (1,) if any(fits.values()) else counts
    return next((k for k in rest if k < high and k not in fits and seems_to_fit(k, _MARGIN)), None)


_LOOPS = ("scan", "while")
_RENAMES = ("reshape", "squeeze", "sharding_constraint")  # their results share the buffer of their operand


def live_bytes(traced: ClosedJaxpr) -> int:
    """The peak bytes of intermediate values, if each equation runs by itself, in order.

    Arguments and results do not count: a donated argument makes room for its result. The compiler fuses, reuses and
    reorders, so the number is useful only beside that of another program: their ratio is about that of their needs.
    Source: ours; a linear scan over live ranges.
    """
    results = {var for var in traced.jaxpr.outvars if isinstance(var, Var)}
    for equation in reversed(traced.jaxpr.eqns):
        # What a result is before a constraint shards it is that result, and before a selection of what is known.
        is_same = equation.primitive.name == "sharding_constraint"
        is_same |= equation.primitive.name == "select_n" and isinstance(equation.invars[0], Literal)
        if is_same and results & set(equation.outvars):
            results |= {var for var in equation.invars if isinstance(var, Var)}
    return _peak(traced.jaxpr, uncounted=results)


def _peak(jaxpr: Jaxpr, *, uncounted: set[Var]) -> int:
    uses = [(at, equation.invars) for at, equation in enumerate(jaxpr.eqns)] + [(len(jaxpr.eqns), jaxpr.outvars)]
    last_use = {var: at for at, operands in uses for var in operands if not isinstance(var, Literal)}
    freed_at: dict[int, int] = {}
    live = peak = 0
    for at, equation in enumerate(jaxpr.eqns):
        is_rename = equation.primitive.name in _RENAMES
        new = [] if is_rename else [var for var in equation.outvars if var not in uncounted]
        made = sum(map(_bytes, new))
        inside = max((_peak(inner, uncounted=set()) for inner in programs_in(equation)), default=0)
        if equation.primitive.name in _LOOPS:  # its results reuse the initial carry; its iterations need more
            peak = max(peak, live + max(made - freed_at.get(at, 0), 0) + inside)
        else:  # the results of a call are made inside it
            peak = max(peak, live + max(made, inside))
        for var in new:
            if var in last_use:
                live += _bytes(var)
                freed_at[last_use[var]] = freed_at.get(last_use[var], 0) + _bytes(var)
        live -= freed_at.pop(at, 0)
    return peak


def _bytes(var: Var) -> int:
    match var.aval:
        case ShapedArray() as aval:
            return aval.size * aval.dtype.itemsize
        case _:
            return 0  # a token, or a reference
