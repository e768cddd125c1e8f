"""`tune` measures a step for every number of microbatches. It chooses nothing: the number is written by the user."""

import importlib
import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from stepc._compiler.autotune import dividing_counts, planned_memory, replace_request
from stepc._compiler.stages import Compiled
from stepc._compiler.step import Step, compile
from stepc._compiler.validation import check_batch
from stepc._language.kinds import Batch
from stepc._language.pipeline import Pipeline, Transform, transforms_of
from stepc._language.state import State, as_arrays, is_typed_key, key_impl_of
from stepc._text import aligned_table, readable_bytes, readable_seconds
from stepc._units import bytes_of
from stepc.errors import ConfigError, FieldTypeError

LEAST_SECONDS = 0.05  # of a sample: as many calls as that takes
MOST_CALLS = 50


@dataclass(frozen=True)
class Tuned:
    """A step with one number of microbatches.

    Args:
      k: the number of microbatches.
      seconds: the median time of a step; None if it was not run.
      low: the shortest of all rounds.
      high: the longest.
      temporaries: bytes on one device, as the compiler planned them; None if it found no room.
      total: with arguments, results and code.
      collectives: how many a step executes; None if a loop has no known trip count.
      fits: whether `total` is within the limit.
    """

    k: int
    seconds: float | None
    low: float | None
    high: float | None
    temporaries: int | None
    total: int | None
    collectives: int | None
    fits: bool


@dataclass(frozen=True)
class Tuning:
    """What `tune` has measured, which prints as a table.

    Args:
      written: the transform that splits the batch, as it is written now.
      rows: one for each k, rising.
      memory: the limit, in bytes on one device; None without one.
      rounds: how many times each k was measured.
    """

    written: str
    rows: tuple[Tuned, ...]
    memory: int | None
    rounds: int

    @property
    def best(self) -> Tuned | None:
        """The fastest that fits; None if none was run."""
        timed = [(one.seconds, one) for one in self.rows if one.fits and one.seconds is not None]
        return min(timed, key=lambda pair: pair[0], default=(0.0, None))[1]

    @property
    def as_fast(self) -> tuple[int, ...]:
        """The other k that fit, and were in some round as fast as the best in its slowest: within the noise."""
        best = self.best
        if best is None or best.high is None:
            return ()
        return tuple(
            one.k for one in self.rows if one.fits and one is not best and one.low is not None and one.low <= best.high
        )

    def __str__(self) -> str:
        head = ("k", "median", "fastest to slowest", "temporaries", "in all", "collectives", "")
        lines = aligned_table([head, *map(self._cells, self.rows)])
        return "\n".join((f"{self.written}, {self.rounds} rounds", *lines, self.verdict))

    @property
    def verdict(self) -> str:
        """What the table says, in a sentence."""
        limit = "" if self.memory is None else f" within {readable_bytes(self.memory)}"
        best = self.best
        if best is None:
            fits = any(one.fits for one in self.rows)
            return "nothing was run" if fits else f"no k fits{limit}"
        others = ", ".join(map(str, self.as_fast))
        close = f"; no slower within the spread: {others}" if others else ""
        return f"the fastest{limit} is k = {best.k}{close}"

    def _cells(self, one: Tuned) -> Sequence[str]:
        def seconds(value: float | None) -> str:
            return "-" if value is None else readable_seconds(value)

        def size(value: int | None) -> str:
            return "-" if value is None else readable_bytes(value)

        spread = "-" if one.low is None else f"{seconds(one.low)} to {seconds(one.high)}"
        collectives = "unknown" if one.collectives is None else f"{one.collectives:,}"
        note = "" if one.fits else "no room" if one.total is None else "too large"
        return (str(one.k), seconds(one.seconds), spread, size(one.temporaries), size(one.total), collectives, note)

    def picture(self, path: str | Path) -> Path:
        """Write a plot of times and temporaries over k. Errors: ConfigError without matplotlib."""
        if importlib.util.find_spec("matplotlib") is None:
            remedy = "Install it with: pip install 'stepc[demo]'"
            raise ConfigError("The picture needs matplotlib.", suggestion=remedy)
        # Imported by name, here and not at the top: `import stepc` must not need it.
        figures = importlib.import_module("matplotlib.figure")
        canvases = importlib.import_module("matplotlib.backends.backend_agg")
        figure = figures.Figure(figsize=(7, 5), dpi=120, layout="constrained")
        canvases.FigureCanvasAgg(figure)
        above, below = figure.subplots(2, sharex=True)
        sizes = [(one.k, one.temporaries / 1e6) for one in self.rows if one.temporaries is not None]
        timed = [
            (one.k, 1e3 * one.seconds, 1e3 * one.low, 1e3 * one.high)
            for one in self.rows
            if one.seconds is not None and one.low is not None and one.high is not None
        ]
        above.plot([k for k, *_ in timed], [middle for _, middle, _, _ in timed], marker="o")
        above.vlines([k for k, *_ in timed], [low for *_, low, _ in timed], [high for *_, high in timed])
        above.set(ylabel="ms a step", title=self.verdict, xscale="log")
        below.plot([k for k, _ in sizes], [size for _, size in sizes], marker="o")
        below.set(ylabel="MB of temporaries", xlabel="k", ylim=(0, None))
        ks = [one.k for one in self.rows]
        below.set_xticks(ks, map(str, ks))
        below.minorticks_off()
        for axes in (above, below):
            axes.grid(alpha=0.25)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        return path


def tune(
    step: Step,
    state: State,
    batch: Batch,
    *,
    memory: int | str | None = None,
    ks: Sequence[int] | None = None,
    rounds: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> Tuning:
    """Measure a step for every number of microbatches that divides the rows.

    Meaning: for each k, the step with `accumulate(k)` is compiled; its temporaries and collectives are read from the
      program, and its time is the median of `rounds` samples, in which the programs take turns.
    Why: k changes the speed of a step as well as its memory, and on each device in another way.

    Args:
      step: a compiled step whose pipeline has one `accumulate`, whatever its k.
      state: a state of it, which stays alive: a copy is trained. With shapes, arrays of zeros are trained.
      batch: a batch, or its shapes.
      memory: how much a step may hold at once on one device, such as "12GiB"; a program that needs more is not run.
        None: what the transform asks for, if it is `accumulate(memory=…)`.
      ks: which k to measure; None for all.
      rounds: how often each is measured.
      clock: gives the time in seconds; for tests.
    Units: seconds of a whole step; bytes on one device.
    Errors: ConfigError if the pipeline has no `accumulate` or several, or for a k that does not divide; FieldTypeError.
    Nothing is chosen: write the number that you want. A loss that couples rows depends on k (`accumulate`). Programs of
    a topology are not run, and have no time. Where other programs use the machine, compare the spread.
    Source: ours.
    Example:
      >>> print(tune(step, state, batch, memory="12GiB"))  # doctest: +SKIP
    """
    _check_step(step)
    for name, number in (("rounds", rounds), *(("ks", k) for k in ks or ())):
        if type(number) is not int or number < 1:
            raise FieldTypeError(f"`tune({name}=…)` takes positive integers, got {number!r}.")
    transforms = transforms_of(step.pipeline)
    position, written = _splitting(transforms)
    if memory is None and (request := written.autotune_request()) is not None:
        memory = request.most_bytes
    most_bytes = None if memory is None else bytes_of("memory", memory)

    def step_of(k: int) -> Step:
        return compile(replace_request(step.pipeline, position, _with_parts(written, k)), mesh=step.mesh)

    batch = as_arrays(batch)
    core = step_of(1).normal_form.core
    check_batch(batch, core)
    counts = dividing_counts(core, batch)
    if wrong := [k for k in ks or () if k not in counts]:
        facts = [("divide", ", ".join(map(str, counts))), ("got", ", ".join(map(str, wrong)))]
        raise ConfigError(f"These k do not divide the {counts[-1]} rows of a part.", facts=facts)
    steps = {k: step_of(k) for k in ks or counts}
    is_here = step.mesh is None or set(step.mesh.devices.flat) <= set(jax.devices())
    if is_here:  # placed before anything is traced, as the calls take them
        batch = step.put(jax.tree.map(_array_like, batch))
        state = jax.tree.map(_array_like, state)
    try:
        found = {k: _program(one, state, batch) for k, one in steps.items()}
    except Exception as error:  # of the user's own loss, whatever it is: it passes through
        step.note_changes(error, state, batch)
        raise
    fits = {
        k: compiled is not None and (most_bytes is None or compiled.memory().total <= most_bytes)
        for k, compiled in found.items()
    }
    runs = {k: steps[k] for k, fit in fits.items() if fit and is_here}
    times = _times(runs, state, batch, rounds, clock)
    rows = tuple(_row(k, compiled, times.get(k), fits=fits[k]) for k, compiled in found.items())
    return Tuning(repr(written), rows, most_bytes, rounds)


def _check_step(step: object) -> None:
    if not isinstance(step, Step):
        is_pipeline = isinstance(step, Transform | Pipeline)
        remedy = "Compile it: `sc.tune(sc.compile(pipeline), state, batch)`." if is_pipeline else None
        facts = (("expected", "a compiled step"), ("got", repr(step)))
        raise FieldTypeError("`tune` measures a compiled step.", facts=facts, suggestion=remedy)


def _splitting(transforms: Sequence[Transform]) -> tuple[int, Transform]:
    """The transform that makes microbatches, and its position. Errors: ConfigError if there is not exactly one."""
    found = [(at, one) for at, one in enumerate(transforms) if one.with_parts(1) is not None]
    if len(found) == 1:
        return found[0]
    pipeline = " @ ".join(map(repr, transforms))
    if found:
        named = " and ".join(f"`{one!r}`" for _, one in found)
        raise ConfigError(f"{named} each split the batch, and `tune` varies one.", where=pipeline)
    raise ConfigError(
        "The pipeline has no `accumulate`, whose k `tune` varies.",
        where=pipeline,
        suggestion="Write `accumulate(1)` left of `shard` and `grad`.",
    )


def _with_parts(transform: Transform, k: int) -> Transform:
    made = transform.with_parts(k)
    assert made is not None
    return made


def _program(step: Step, state: State, batch: Batch) -> Compiled | None:
    """The compiled step; None if the compiler finds no room for it."""
    lowered = step.lower(state, batch)
    return None if planned_memory(lowered) is None else lowered.compile()


def _times(
    steps: dict[int, Step], state: State, batch: Batch, rounds: int, clock: Callable[[], float]
) -> dict[int, list[float]]:
    """The seconds of a step, in each round, of each of the programs, which take turns on one state."""
    calls: dict[int, int] = {}
    for k, step in steps.items():
        state = _wait(step(state, batch)[0])  # traces; the program is compiled already
        began = clock()
        state = _wait(step(state, batch)[0])
        calls[k] = min(MOST_CALLS, max(1, math.ceil(LEAST_SECONDS / max(clock() - began, 1e-6))))
    times: dict[int, list[float]] = {k: [] for k in steps}
    for number in range(rounds):
        order = list(steps)[:: 1 if number % 2 == 0 else -1]
        for k in order:
            began = clock()
            for _ in range(calls[k]):
                state = _wait(steps[k](state, batch)[0])
            times[k].append((clock() - began) / calls[k])
    return times


def _wait(state: State) -> State:
    return jax.block_until_ready(state)


def _array_like(leaf: Any) -> Any:  # Any: an array, or its shape
    """A copy of an array; zeros for a shape."""
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return jnp.copy(leaf) if isinstance(leaf, jax.Array) else leaf
    if is_typed_key(leaf):
        return jax.device_put(jax.random.key(0, impl=key_impl_of(leaf)), leaf.sharding)
    return jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)


def _row(k: int, compiled: Compiled | None, times: list[float] | None, *, fits: bool) -> Tuned:
    low, middle, high = (min(times), statistics.median(times), max(times)) if times else (None, None, None)
    if compiled is None:
        return Tuned(k, middle, low, high, None, None, None, fits)
    needs = compiled.memory()
    executions = [one.executions for one in compiled.collectives()]
    known = [one for one in executions if one is not None]
    collectives = sum(known) if len(known) == len(executions) else None
    return Tuned(k, middle, low, high, needs.temporaries, needs.total, collectives, fits)
