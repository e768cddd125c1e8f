"""What do all protections of `sc.run` cost, against a bare loop over the same compiled step?

One device, sgd. A bare loop keeps two steps in flight too, for it must bound them somehow. `run` copies host batches,
holds them against the first, settles each step and logs every tenth; with snapshots it copies the state as well.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measuring import arguments, begin, finish, show

import stepc as sc

TARGET_MICROSECONDS, TARGET_RATIO = 50.0, 0.01


def loss(params: Any, batch: Any) -> jax.Array:
    return jnp.mean((jnp.tanh(batch["x"] @ params["in"]) @ params["out"] - batch["y"]) ** 2)


def bare(step: sc.Step, state: sc.State, batches: list[Any]) -> None:
    """The loop that one would write by hand."""
    flight: deque[Any] = deque()
    for batch in batches:
        state, metrics = step(state, batch)
        flight.append(metrics["loss"])
        if len(flight) > 2:
            jax.block_until_ready(flight.popleft())
    jax.block_until_ready(state)


def measure(width: int, *, rounds: int, num: int) -> dict[str, Any]:
    """Microseconds a step of each way, interleaved."""
    random = np.random.default_rng(0)
    params = {"in": np.float32(random.normal(size=(32, width))), "out": np.float32(random.normal(size=(width, 1)))}
    batch = {"x": np.float32(random.normal(size=(64, 32))), "y": np.float32(random.normal(size=(64, 1)))}
    step = sc.compile(sc.update(optax.sgd(1e-4)) @ sc.clip(1.0) @ sc.grad(loss))
    batches = [batch] * num
    ways: dict[str, Callable[[], object]] = {
        "bare": lambda: bare(step, step.init(params), batches),
        "run": lambda: sc.run(step, step.init(params), batches),
        "run with snapshots": lambda: sc.run(step, step.init(params), batches, on_error="rollback"),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if number:  # the first round compiles
                taken[name].append((time.perf_counter() - began) / num * 1e6)
    return {"width": width, "microseconds": {name: statistics.median(times) for name, times in taken.items()}}


def main() -> None:
    parser = arguments(__doc__, rounds=9)
    options = parser.parse_args()
    rounds, num = (2, 50) if options.quick else (options.rounds, 400)
    setting = begin("the overhead of `sc.run` against a bare loop")
    results = [measure(width, rounds=rounds, num=num) for width in (16, 2048, 8192)]
    rows = [("width", "bare, us", "run, us", "more, us", "with snapshots, more, us", "target")]
    for found in results:
        bare_us, run_us, kept_us = found["microseconds"].values()
        allowed = max(TARGET_MICROSECONDS, TARGET_RATIO * bare_us)
        met = "met" if run_us - bare_us <= allowed else "MISSED"
        cells = [bare_us, run_us, run_us - bare_us, kept_us - bare_us]
        rows.append((str(found["width"]), *(f"{one:.1f}" for one in cells), f"<= {allowed:.0f} {met}"))
    show(f"microseconds a step, {num} steps, medians of {rounds} rounds", rows)
    finish("runner_overhead", setting, results, quick=options.quick, save=options.save)


if __name__ == "__main__":
    main()
