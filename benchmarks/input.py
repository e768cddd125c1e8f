"""What does reading data through `sc.run` cost, against a bare loop that puts the next batch on the device ahead?

The bare loop is what one writes by hand: it calls the step, puts the next batch on the device while the step runs, and
waits for the loss of the step two before. `run` has `sc.Data(loader, prefetch=2)`, whose thread does the same. The
loader draws rows of a table, so that reading takes time. A sample is the time between two requests for a batch, well
inside a run.

Copies are counted by addresses: of the loader's array, of what `run` hands to the device, and of the device's array.
`run` copies what a loader may write to again; an array that is read-only it takes as it is. On a CPU, JAX takes an
array that is aligned to 64 bytes without a copy.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measuring import CPU_SECONDS, Taken, arguments, begin, finish, interleaved, ratio, show, spreads, verdict

import stepc as sc

RATIO, ALIGNMENT = 1.01, 64
WARM_UP = 10  # batches before the clock starts; as many are left when it stops


def loss(params: Any, batch: Any) -> jax.Array:
    return jnp.mean((jnp.tanh(batch["x"] @ params["in"]) @ params["out"]) ** 2)


def aligned(shape: tuple[int, ...]) -> np.ndarray:
    """An array of float32 at an address that JAX takes without a copy."""
    memory = np.empty(4 * int(np.prod(shape)) + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + 4 * int(np.prod(shape))].view(np.float32).reshape(shape)


class Loader:
    """Rows of a table, drawn at random; it records the time of two requests."""

    def __init__(self, table: np.ndarray, rows: int, num: int) -> None:
        self.table, self.rows, self.num, self.given = table, rows, num, 0
        self.random = np.random.default_rng(0)
        self.marks: list[tuple[float, float]] = []

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self.given in (WARM_UP, WARM_UP + self.num):
            self.marks.append((time.perf_counter(), time.process_time()))
        if self.given == self.num + 2 * WARM_UP:
            raise StopIteration
        self.given += 1
        return {"x": self.table[self.random.integers(0, len(self.table), self.rows)]}


def bare(step: sc.Step, state: sc.State, batches: Iterator[Any]) -> None:
    """The loop that one writes by hand."""
    flight: deque[Any] = deque()
    batch = jax.device_put(next(batches))
    while batch is not None:
        state, metrics = step(state, batch)
        following = next(batches, None)
        batch = None if following is None else jax.device_put(following)
        flight.append(metrics["loss"])
        if len(flight) > 2:
            flight.popleft().block_until_ready()
    jax.block_until_ready(state)


def measure(width: int, rows: int, *, num: int, rounds: int) -> dict[str, Any]:
    """Both loops, and `run` without a thread, in interleaved rounds."""
    random = np.random.default_rng(0)
    table = random.standard_normal((4096, width)).astype(np.float32)
    params = {name: np.float32(random.standard_normal((width, width)) / width) for name in ("in", "out")}
    step = sc.compile(sc.update(optax.sgd(1e-4)) @ sc.grad(loss))
    state = step.init(params)

    def sample(loop: Callable[[Loader], object]) -> Callable[[], Taken]:
        def taken() -> Taken:
            loader = Loader(table, rows, num)
            loop(loader)
            return Taken(*((after - before) / num for before, after in zip(*loader.marks, strict=True)))

        return taken

    samples = {
        "a bare loop, device_put ahead": sample(lambda loader: bare(step, jax.tree.map(jnp.copy, state), loader))
    }
    for prefetch in (0, 2):
        samples[f"run, prefetch={prefetch}"] = sample(
            lambda loader, prefetch=prefetch: sc.run(step, state, sc.Data(loader, prefetch=prefetch))
        )
    taken = interleaved(samples, rounds=rounds)
    base = next(iter(samples))
    return {
        "model": f"width {width}, {rows} rows, {4e-6 * rows * width:.1f} MB a batch",
        "base": base,
        "seconds": spreads(taken),
        "ratio": {name: ratio(taken, name, base) for name in samples},
        "cpu_ratio": {name: ratio(taken, name, base, CPU_SECONDS) for name in samples},
    }


def copies(rows: int, width: int) -> dict[str, int]:
    """How often a batch is copied on its way to a CPU device, by the kind of array that the loader gives."""
    step = sc.compile(sc.update(optax.sgd(1e-4)) @ sc.grad(loss))
    state = step.init({name: np.zeros((width, width), np.float32) for name in ("in", "out")})

    def counted(array: Any) -> int:
        seen: list[int] = []

        def place(batch: Any) -> Any:
            placed = step.put(batch)
            seen.append((address(batch["x"]) != address(array)) + (address(placed["x"]) != address(batch["x"])))
            return placed

        sc.run(step, state, sc.Data([{"x": array}], place=place))
        return seen[0]

    ordinary, owned = np.zeros((rows, width), np.float32), aligned((rows, width))
    owned[:] = 0
    found = {"writable": counted(ordinary), "writable, aligned": counted(owned)}
    for array in (owned, owned.base):  # and what it is a view of
        array.setflags(write=False)
    return {**found, "read-only, aligned": counted(owned), "of jax": counted(jax.device_put(ordinary))}


def address(array: Any) -> int:
    """Where the numbers are."""
    return array.ctypes.data if isinstance(array, np.ndarray) else array.unsafe_buffer_pointer()


def main() -> None:
    parser = arguments(__doc__, rounds=15)
    options = parser.parse_args()
    setting = begin("reading data: run with prefetch against a bare loop with device_put ahead")
    found = []
    for width, rows, num in [(32, 64, 20)] if options.quick else [(256, 1024, 100), (64, 16384, 60)]:
        found.append(measure(width, rows, num=num, rounds=3 if options.quick else options.rounds))
        table = [("", "ms a step", "ratio", "ratio, CPU", "target")]
        for name, seconds in found[-1]["seconds"].items():
            quotient, cpu = found[-1]["ratio"][name], found[-1]["cpu_ratio"][name]
            met = verdict(quotient.median, RATIO) if name == "run, prefetch=2" else "-"
            table.append((name, seconds.shown(1e3), quotient.shown(1.0, 3), cpu.shown(1.0, 3), met))
        show(f"{found[-1]['model']}; median (quartiles)", table)
    counted = copies(1024, 256)
    show(
        "copies of a batch on its way to the device",
        [("the loader's array", "copies"), *((name, str(num)) for name, num in counted.items())],
    )
    finish("input", setting, {"loops": found, "copies": counted}, quick=options.quick, save=options.save)


if __name__ == "__main__":
    main()
