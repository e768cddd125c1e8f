"""How long does it take to the first loss, against the same step by hand?

From `compile` to the first loss, with empty caches: make the step, make its state, call it once, read the loss. By
hand: `jax.jit` of the optimizer's `init` and of the step. The traces of the loss are counted. Models: the demo's GPT,
and 500 parameters of a loss that is cheap, so that only their number matters.

Then the demo starts in child processes, first with an empty compilation cache and then with what the first start left
there: the time from the start of the process to the first step in its metrics.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from by_hand import by_hand
from measuring import (
    CPU_SECONDS,
    HERE,
    Taken,
    arguments,
    begin,
    finish,
    interleaved,
    ratio,
    show,
    spreads,
    timed,
    verdict,
)
from models import Loss, Model, adamw, small_gpt

import stepc as sc
from examples.gpt.model import Size

K, MAX_NORM = 4, 1.0
RATIO, WARM_SECONDS = 1.05, 5.0  # targets
KEEP_ALL = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}  # as `make demo` sets it
POLL_SECONDS = 0.01
DEMO = Size(layers=4, width=64, heads=4, context=128)


def many_leaves(num: int) -> Model:
    """As many parameters, and a loss that reads each once."""

    def make_loss() -> Loss:
        return lambda params, batch: batch["x"].mean() * sum(jnp.square(leaf).sum() for leaf in params.values())

    params = {f"leaf_{number:03}": np.ones(8, np.float32) for number in range(num)}
    return Model(f"{num} leaves", make_loss, params, {"x": np.ones((8, 4), np.float32)})


def counted(loss: Loss) -> tuple[Loss, list[int]]:
    """The loss, and a list that grows with every trace of it."""
    traces: list[int] = []

    def counting(params: Any, batch: Any) -> jax.Array:
        traces.append(1)
        return loss(params, batch)

    return counting, traces


def with_stepc(loss: Loss, params: Any, batch: Any) -> Any:
    """The first loss."""
    step = sc.compile(sc.update(adamw()) @ sc.clip(MAX_NORM) @ sc.accumulate(K) @ sc.grad(loss))
    _, metrics = step(step.init(params), batch)
    return float(metrics["loss"])


def with_jax(loss: Loss, params: Any, batch: Any) -> Any:
    """The first loss."""
    init, step = by_hand(loss, K, adamw())
    state = jax.jit(lambda params: jax.tree.map(jnp.copy, (params, init(params))))(params)
    _, metrics = step(state, batch)
    return float(metrics["loss"])


def measure(model: Model, *, rounds: int) -> dict[str, Any]:
    """Both, in interleaved rounds."""
    batch, traces = jax.tree.map(jnp.asarray, model.batch), {}

    def sample(name: str, first: Callable[[Loss, Any, Any], Any]) -> Callable[[], Taken]:
        def taken() -> Taken:
            loss, traces[name] = counted(model.make_loss())
            jax.clear_caches()  # as in a fresh process
            return timed(lambda: first(loss, model.params, batch))

        return taken

    taken = interleaved({"stepc": sample("stepc", with_stepc), "by hand": sample("by hand", with_jax)}, rounds=rounds)
    return {
        "model": model.name,
        "seconds": spreads(taken),
        "ratio": ratio(taken, "stepc", "by hand"),
        "cpu_ratio": ratio(taken, "stepc", "by hand", CPU_SECONDS),
        "traces_of_the_loss": {name: len(one) for name, one in traces.items()},
    }


def start_of_demo(cache: Path, *words: str) -> Taken:
    """The time from the start of the process to its first step; the demo is then interrupted."""
    with tempfile.TemporaryDirectory() as directory:
        metrics = Path(directory) / "metrics.jsonl"
        command = (sys.executable, "-m", "examples.gpt", "--out", directory, *words)
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache), **KEEP_ALL}
        began = time.perf_counter()
        demo = subprocess.Popen(
            command, cwd=HERE.parent, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            while not has_first_step(metrics):
                if demo.poll() is not None:
                    raise RuntimeError(f"the demo ended with exit code {demo.returncode} before its first step")
                time.sleep(POLL_SECONDS)
            return Taken(time.perf_counter() - began, cpu_seconds(demo.pid))
        finally:
            demo.send_signal(signal.SIGINT)
            demo.wait()


def cpu_seconds(pid: int) -> float:
    """Processor time of a process that runs, of all its threads."""
    _, _, fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")
    user, system = fields.split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def has_first_step(metrics: Path) -> bool:
    """Whether a step is logged."""
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return any('"loss"' in line for line in lines)


def starts(rounds: int, *words: str) -> dict[str, list[Taken]]:
    """Starts with an empty cache, each followed by one with a warm cache."""
    found: dict[str, list[Taken]] = {"empty": [], "warm": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            for name in found:
                found[name].append(start_of_demo(Path(cache), *words))
    return found


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--starts", type=int, default=3, help="starts of the demo (default: %(default)s)")
    options = parser.parse_args()
    rounds, num_starts = (1, 1) if options.quick else (options.rounds, options.starts)
    jax.config.update("jax_enable_compilation_cache", False)
    setting = begin("the time to the first loss: stepc against by hand; the demo with a warm compilation cache")
    size = Size(layers=1, width=16, heads=2, context=16) if options.quick else DEMO
    found = [
        measure(model, rounds=rounds) for model in (small_gpt(size, rows=16), many_leaves(20 if options.quick else 500))
    ]
    rows = [("", "stepc, s", "by hand, s", "ratio", "ratio, CPU", "target", "traces of the loss, each")]
    for one in found:
        ours, theirs = (one["seconds"][name].shown() for name in ("stepc", "by hand"))
        traces = ", ".join(map(str, one["traces_of_the_loss"].values()))
        quotients = one["ratio"].shown(1.0, 3), one["cpu_ratio"].shown(1.0, 3)
        rows.append((one["model"], ours, theirs, *quotients, verdict(one["cpu_ratio"].median, RATIO), traces))
    show("from `compile` to the first loss; median (quartiles)", rows)
    small = ("--layers=1", "--width=16", "--heads=2", "--context=16", "--text-bytes=200000") if options.quick else ()
    taken = starts(num_starts, *small)
    seconds, processor = spreads(taken), spreads(taken, CPU_SECONDS)
    cells = [("compilation cache", "s", "CPU s", "target")]
    for name, spread in seconds.items():
        met = verdict(spread.median, WARM_SECONDS) if name == "warm" else "-"
        cells.append((name, spread.shown(), processor[name].shown(), met))
    show("from the start of the demo's process to its first step; median (quartiles)", cells)
    results = {"first_loss": found, "demo_seconds": seconds, "demo_cpu_seconds": processor}
    finish("first_step", setting, results, quick=options.quick, save=options.save)


if __name__ == "__main__":
    main()
