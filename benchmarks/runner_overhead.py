"""What does `sc.run` add to a step, against a bare loop over the same compiled step?

The bare loop is what one writes by hand: it takes the next batch, calls the step, waits for the loss of the step two
before (a loop must bound what is in flight), and reads every tenth loss as a float. `run` does the same with a window
of two; it also copies host batches, compares each with the first, watches signals, reads the flag of each step, and
counts failures. Then come, one after another and together: loggers every ten steps (`Console` without a terminal,
`JSONL`), checkpoints, and snapshots every ten steps, which only a policy that continues after a failure on a device
needs.

A time is taken between two requests for a batch, well inside a run, so compiling, starting and ending are not counted.
It spans ten steps, so that each time contains one logged step. Of the times of a run the lower quartile counts, because
other load can only add to a time. The verdict is by wall time of all protections together: the median over the rounds
of what they add. Processor time of all threads is printed too. The cost of a save is measured separately, by whole
runs: it is due once in minutes, not once in steps. One device, sgd.
"""

import io
import logging
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measuring import (
    CPU_SECONDS,
    Spread,
    Taken,
    arguments,
    begin,
    difference,
    finish,
    interleaved,
    show,
    spreads,
)
from rich.console import Console as Terminal

import stepc as sc
from stepc._runner.pending import copy_state

TARGET_MICROSECONDS, TARGET_RATIO = 20.0, 0.01
BLOCK = 10  # steps
WARM_UP = 20  # steps before the clock starts; as many are left when it stops
SECONDS_BETWEEN_SAVES = 60.0

BARE, ALL = "a bare loop", "all, and snapshots"


def loss(params: Any, batch: Any) -> jax.Array:
    return jnp.mean((jnp.tanh(batch["x"] @ params["in"]) @ params["out"] - batch["y"]) ** 2)


def bare(step: sc.Step, state: sc.State, batches: Iterator[Any]) -> None:
    """The loop that one writes by hand."""
    flight: deque[Any] = deque()
    for number, batch in enumerate(batches):
        state, metrics = step(state, batch)
        flight.append(metrics["loss"])
        if len(flight) > 2:
            oldest = flight.popleft()
            if number % 10 == 0:
                float(oldest)
            else:
                oldest.block_until_ready()
    jax.block_until_ready(state)


class Batches:
    """The same batch `num` times, from an iterator with a state that records the time every ten batches."""

    def __init__(self, batch: Any, num: int) -> None:
        self.batch, self.num, self.given = batch, num, 0
        self.marks: list[tuple[float, float]] = []

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if (self.given - WARM_UP) % BLOCK == 0 and 0 <= self.given - WARM_UP <= self.num:
            self.marks.append((time.perf_counter(), time.process_time()))
        if self.given == self.num + 2 * WARM_UP:
            raise StopIteration
        self.given += 1
        return self.batch

    def get_state(self) -> dict[str, int]:
        return {"given": self.given}

    def set_state(self, state: Mapping[str, int]) -> None:
        self.given = state["given"]


class Work:
    """A step, its state and its data, and the time between two of its batches."""

    def __init__(self, width: int, *, num: int) -> None:
        random = np.random.default_rng(0)
        inner, outer = random.normal(size=(32, width)), random.normal(size=(width, 1))
        self.step = sc.compile(sc.update(optax.sgd(1e-4)) @ sc.clip(1.0) @ sc.grad(loss))
        self.state = self.step.init({"in": np.float32(inner), "out": np.float32(outer)})
        x, y = random.normal(size=(64, 32)), random.normal(size=(64, 1))
        self.batch = {"x": np.float32(x), "y": np.float32(y)}
        self.num = num

    def sample(self, way: "Way", *, whole: bool = False) -> Callable[[], Taken]:
        def taken() -> Taken:
            batches = Batches(self.batch, self.num)
            way(self, batches)
            seconds, cpu_seconds = zip(*batches.marks, strict=True)
            blocks = [(after - before) / BLOCK for before, after in pairwise(seconds)]
            quiet = statistics.quantiles(blocks, n=4, method="inclusive")[0]
            mean = (seconds[-1] - seconds[0]) / self.num
            return Taken(mean if whole else quiet, (cpu_seconds[-1] - cpu_seconds[0]) / self.num)

        return taken

    def bare(self, batches: Batches) -> None:
        bare(self.step, copy_state(self.state), batches)

    def run(self, batches: Batches, *, logs: bool = False, saves: int | None = None, **options: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            if saves is not None:
                options["checkpoint"] = sc.Checkpoints(Path(folder, "kept"), every=saves, every_seconds=1e6)
            if not logs:
                sc.run(self.step, self.state, batches, **options)
                return
            with (
                sc.Console(terminal=Terminal(file=io.StringIO(), force_terminal=False)) as console,
                sc.JSONL(Path(folder, "metrics.jsonl")) as lines,
            ):
                sc.run(self.step, self.state, batches, loggers=[console, lines], **options)


Way: TypeAlias = Callable[[Work, Batches], object]


def measure(width: int, *, rounds: int, num: int) -> dict[str, Any]:
    """For each variant, microseconds per step and the difference to a bare loop; and milliseconds per save."""
    work, never = Work(width, num=num), 10**9
    ways: dict[str, Way] = {
        BARE: Work.bare,
        "run": lambda work, data: work.run(data),
        "run, loggers": lambda work, data: work.run(data, logs=True),
        "run, checkpoints": lambda work, data: work.run(data, saves=never),
        "all but snapshots": lambda work, data: work.run(data, logs=True, saves=never),
        ALL: lambda work, data: work.run(data, logs=True, saves=never, on_error="rollback"),
    }
    samples = {name: work.sample(way) for name, way in ways.items()}
    samples["saving"] = work.sample(lambda work, data: work.run(data, saves=num), whole=True)
    samples["not saving"] = work.sample(ways["run, checkpoints"], whole=True)
    taken = interleaved(samples, rounds=rounds)
    save = difference(taken, "saving", "not saving")
    save = Spread(*(one * num for one in (save.median, save.low, save.high)))
    taken = {name: taken[name] for name in ways}
    least = {name: min(one.seconds for one in many) for name, many in taken.items()}
    return {
        "width": width,
        "a step": spreads(taken),
        "fastest": least,
        "more": {name: difference(taken, name, BARE) for name in taken},
        "more, processors": {name: difference(taken, name, BARE, CPU_SECONDS) for name in taken},
        "a save": save,
    }


def show_width(found: dict[str, Any]) -> None:
    """One table per width, with the verdict."""
    step, save = found["a step"], found["a save"]
    allowed = max(TARGET_MICROSECONDS, TARGET_RATIO * step[BARE].median * 1e6)
    each = save.median / SECONDS_BETWEEN_SAVES * step[BARE].median  # a step's part of a save a minute
    rows = [("", "a step, us", "more, us", "more of processors, us", "target", "fastest, us")]
    for name, one in step.items():
        more, cpu = (found[column][name] for column in ("more", "more, processors"))
        cost = (more.median + each) * 1e6
        target = f"<= {allowed:.0f} {'met' if cost <= allowed else 'MISSED'}" if name == ALL else ""
        rows.append(
            (
                name,
                one.shown(1e6, 1),
                more.shown(1e6, 1),
                cpu.shown(1e6, 1),
                target,
                f"{found['fastest'][name] * 1e6:.1f}",
            )
        )
    show(f"width {found['width']}: medians and quartiles of the rounds", rows)
    every = f"once in {SECONDS_BETWEEN_SAVES:.0f} s that is {each * 1e6:.3f} us a step"
    print(f"  a save takes the loop {save.shown(1e3, 1)} ms; {every}\n", flush=True)


def main() -> None:
    parser = arguments(__doc__, rounds=15)
    options = parser.parse_args()
    rounds, num = (2, 30) if options.quick else (options.rounds, 100)
    setting = begin("the overhead of `sc.run` against a bare loop")
    logging.getLogger("stepc").setLevel(logging.ERROR)  # that a save is slow where they are priced, is no news
    results = []
    for width in (16, 2048):
        results.append(measure(width, rounds=rounds, num=num))
        show_width(results[-1])
    finish("runner_overhead", setting, results, quick=options.quick, save=options.save)


if __name__ == "__main__":
    main()
