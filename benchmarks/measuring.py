"""Measure variants against each other and print the result. It does not know what a variant does."""

import argparse
import gc
import json
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax

Step: TypeAlias = Callable[[Any, Any], tuple[Any, Any]]  # Any: a state, a batch and metrics, of any tree
Row: TypeAlias = Sequence[str]
T = TypeVar("T")

SECONDS, CPU_SECONDS = 0, 1  # the places in a `Taken`
HERE = Path(__file__).parent
PACKAGES = ("jax", "jaxlib", "optax", "numpy")


class Taken(NamedTuple):
    """Wall time, and processor time of all threads.

    On a shared machine the second is the steadier one: waiting for a turn is not in it.
    """

    seconds: float
    cpu_seconds: float


Sample: TypeAlias = Callable[[], Taken]  # does the work once


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> "Spread":
        """Of one value, the value itself."""
        if len(values) == 1:
            return Spread(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(median, low, high)

    def shown(self, scale: float = 1.0, digits: int = 2) -> str:
        """Such as `1.02 (1.01-1.04)`."""
        median, low, high = (f"{scale * one:,.{digits}f}" for one in (self.median, self.low, self.high))
        return f"{median} ({low}-{high})"


@dataclass(frozen=True)
class Page:
    """What a script has shown, for the page that `page.py` writes: tables, and ratios to plot."""

    tables: list[tuple[str, Sequence[Row]]] = field(default_factory=list)
    ratios: list[tuple[str, Spread, float | None]] = field(default_factory=list)


SHOWN = Page()


class Repeated:
    """A donating step with its own state: a sample is the mean time of `calls` calls, waited for at the end."""

    def __init__(self, step: Step, state: Any, batch: Any, *, calls: int) -> None:
        self.step, self.state, self.batch, self.calls = step, state, batch, calls

    def __call__(self) -> Taken:
        self.state, _ = jax.block_until_ready(self.step(self.state, self.batch))  # warm caches
        taken = timed(self._call)
        return Taken(*(one / self.calls for one in taken))

    def _call(self) -> None:
        for _ in range(self.calls):
            self.state, metrics = self.step(self.state, self.batch)
        jax.block_until_ready((self.state, metrics))


def timed(work: Callable[[], object]) -> Taken:
    """Do some work once."""
    started = time.perf_counter(), time.process_time()
    _in_a_large_frame(work)
    return Taken(time.perf_counter() - started[0], time.process_time() - started[1])


def _in_a_large_frame(work: Callable[[], object]) -> None:
    work()


# CPython keeps frames in chunks of 16 KiB. A call at the end of one maps the next, and its return unmaps it. How many
# calls of a trace are there depends on how deep it begins, and changes its time by up to a half. In the chunk of a
# frame this large, none are.
_in_a_large_frame.__code__ = _in_a_large_frame.__code__.replace(co_stacksize=1 << 16)


def interleaved(samples: Mapping[str, Callable[[], T]], *, rounds: int, discarded: int = 1) -> dict[str, list[T]]:
    """Take one sample of each variant per round, in another order each round; the first rounds are discarded.

    Why: what else the machine does then falls on all variants alike.
    """
    order, taken = list(samples), {name: list[T]() for name in samples}
    shuffled = random.Random(0)
    for number in range(rounds + discarded):
        shuffled.shuffle(order)
        for name in order:
            gc.collect()
            gc.disable()
            try:
                value = samples[name]()
            finally:
                gc.enable()
            if number >= discarded:
                taken[name].append(value)
    return taken


def spreads(taken: Mapping[str, Sequence[tuple[float, ...]]], place: int = SECONDS) -> dict[str, Spread]:
    """The spread of every variant."""
    return {name: Spread.of([one[place] for one in many]) for name, many in taken.items()}


def ratio(taken: Mapping[str, Sequence[tuple[float, ...]]], over: str, under: str, place: int = SECONDS) -> Spread:
    """The ratio of two variants, round by round: a slow round slows both."""
    return Spread.of([a[place] / b[place] for a, b in zip(taken[over], taken[under], strict=True)])


def difference(taken: Mapping[str, Sequence[tuple[float, ...]]], of: str, to: str, place: int = SECONDS) -> Spread:
    """The difference of two variants, round by round."""
    return Spread.of([a[place] - b[place] for a, b in zip(taken[of], taken[to], strict=True)])


def num_instructions(text: str) -> int:
    """How many lines of HLO or StableHLO assign a value."""
    return sum(" = " in line for line in text.splitlines())


def largest_difference(found: Any, expected: Any) -> float:
    """The largest difference of two trees, each leaf's relative to the largest number in that leaf."""

    def of_leaf(one: jax.Array, other: jax.Array) -> float:
        size = float(abs(other).max())
        return float(abs(one - other).max()) / size if size else float(abs(one).max())

    first = jax.devices()[0]
    pair = jax.device_put((found, expected), first)
    return max(jax.tree.leaves(jax.tree.map(of_leaf, *pair)))


def require_equal(found: Any, expected: Any, *, name: str, tolerance: float = 1e-4) -> float:
    """Refuse to time variants that compute something else. The tolerance is for another order of summation."""
    difference = largest_difference(found, expected)
    if not difference <= tolerance:
        raise ValueError(f"{name} gives other parameters: they differ by {difference:.1e} of the largest.")
    return difference


def arguments(docstring: str | None, *, rounds: int) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help="interleaved rounds (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="small sizes and three rounds, to see that it runs")
    parser.add_argument("--save", action="store_true", help="also write the JSON line to benchmarks/results/")
    return parser


def begin(question: str) -> dict[str, Any]:
    """Print the question, and machine, versions, date, commit."""
    setting = {
        "question": question,
        "date": date.today().isoformat(),
        "commit": _commit(),
        "machine": f"{os.cpu_count()} cores, {_cpu()}",
        "platform": jax.default_backend(),
        "devices": jax.device_count(),
        "load": [round(one, 2) for one in os.getloadavg()],
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }
    print(question, "", sep="\n")
    for name, value in list(setting.items())[1:]:
        print(f"  {name:<10}{value}")
    print(flush=True)
    return setting


def show(title: str, rows: Sequence[Row]) -> None:
    """Print a table; its first row is the header."""
    SHOWN.tables.append((title, rows))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(title, "", sep="\n")
    for row in rows:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(flush=True)


def plot(label: str, spread: Spread, target: float | None = None) -> None:
    """Give the page a ratio to plot, such as the time of a step over that of the same step by hand."""
    SHOWN.ratios.append((label, spread, target))


def finish(name: str, setting: Mapping[str, Any], results: Any, *, quick: bool, save: bool) -> None:
    """Print one JSON line, and save it if asked to."""
    line = json.dumps(
        {"benchmark": name, "quick": quick, "setting": setting, "results": results, **asdict(SHOWN)},
        default=_quartiles,  # the only values in it that JSON does not know are Spreads
    )
    print(line)
    if save:
        folder = HERE / "results"
        folder.mkdir(exist_ok=True)
        (folder / f"{setting['date']}-{name}.json").write_text(line + "\n")


def verdict(value: float, target: float, *, digits: int = 2) -> str:
    """Such as `<= 1.03 met`; the value is rounded to the digits of the target."""
    return f"<= {target:.{digits}f} {'met' if round(value, digits) <= target else 'MISSED'}"


def _quartiles(spread: Spread) -> dict[str, float]:
    """More digits would be noise."""
    return {name: float(f"{value:.5g}") for name, value in asdict(spread).items()}


def _commit() -> str:
    """The commit that is checked out, marked if files differ from it."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        return f"{head} and changes" if _git("status", "--porcelain", "--", "stepc") else head
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*transforms: str) -> str:
    done = subprocess.run(("git", *transforms), cwd=HERE.parent, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
