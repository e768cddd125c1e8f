"""One process of a job of several, for tests: `python -m processes.job CASE FOLDER` under `STEPC_…`, as `stepc launch`
sets them. It writes what it found to FOLDER/<process>.json."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from faults.plan import digest

import stepc as sc

FEATURES, ROWS = 4, 16  # rows of the batch of all processes
TRUTH = np.float32([1.0, -2.0, 0.5, 3.0])


def loss(params: Any, batch: Any) -> jax.Array:
    return ((batch["x"] @ params["w"] - batch["y"]) ** 2).mean()


def global_batch(number: int) -> dict[str, np.ndarray]:
    """Whole numbers: sums are exact, in whatever order they are made."""
    x = np.random.default_rng(number).integers(-3, 4, size=(ROWS, FEATURES)).astype(np.float32)
    return {"x": x, "y": x @ TRUTH}


def local(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The rows of this process."""
    rows = ROWS // jax.process_count()
    mine = slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)
    return {name: leaf[mine] for name, leaf in batch.items()}


def compiled(optimizer: Any = None, *, words: Callable[[Any], Any] = lambda inner: inner) -> sc.Step:
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    gradient = sc.clip(10.0) @ sc.accumulate(2) @ sc.shard(sc.dp("data")) @ sc.grad(loss)
    return sc.compile(words(sc.update(optimizer or optax.sgd(2.0**-6)) @ gradient), mesh=mesh)


def fresh(step: sc.Step, **more: Any) -> sc.State:
    return step.init({"w": np.zeros(FEATURES, np.float32)}, **{"seed": 7, **more})


def refusal(act: Callable[[], object]) -> str:
    """The class and the text of what is raised."""
    try:
        act()
    except sc.StepcError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def three_steps(step: sc.Step, *, first: int = 0) -> tuple[sc.State, Any]:
    state = fresh(step)
    metrics: Any = {}
    for number in range(first, first + 3):
        state, metrics = step(state, local(global_batch(number)))
    return state, metrics


def first_rows(batch: dict[str, np.ndarray], number: int) -> dict[str, np.ndarray]:
    return {name: leaf[:number] for name, leaf in batch.items()}


def by_hand(folder: Path) -> dict[str, Any]:
    """Steps without a runner; and what is refused on all processes, which go on together after each refusal."""
    me, step = jax.process_index(), compiled()
    other, short = compiled(optax.sgd(0.5 + me)), local(global_batch(0))
    state = fresh(step)
    refused = {
        "seed": refusal(lambda: fresh(step, seed=me)),
        "params": refusal(lambda: step.init({"w": np.full(FEATURES, me, np.float32)})),
        "program": refusal(lambda: other(fresh(other), short)),
        "pipeline": refusal(lambda: fresh(compiled(words=sc.ema(0.5) if me else sc.ema(0.25)))),
        "uneven": refusal(
            lambda: step(state, {name: leaf[: len(leaf) - 2 * (me == 1)] for name, leaf in short.items()})
        ),
        "indivisible": refusal(lambda: step(state, first_rows(short, 1))),
        "twice": refusal(sc.init_distributed),
    }
    state, metrics = three_steps(step)
    adam, _ = three_steps(compiled(optax.adam(0.1)))
    return {
        "digest": digest(state),
        "loss": float(metrics["loss"]),
        "traces": step.traces,
        "adam": np.asarray(adam.params["w"]).tolist(),
        "refused": refused if jax.process_count() > 1 else {},
    }


def nowhere(folder: Path) -> dict[str, Any]:
    for name in ("COORDINATOR", "NUM_PROCESSES", "PROCESS_ID"):
        del os.environ[f"STEPC_{name}"]
    return {"refused": refusal(sc.init_distributed)}


def alone(folder: Path) -> dict[str, Any]:
    return {"refused": refusal(lambda: sc.init_distributed("127.0.0.1:1", 2, 1, start_seconds=3))}


BEFORE = {"nowhere": nowhere, "alone": alone}
CASES = {"by_hand": by_hand}

if __name__ == "__main__":
    case, folder = sys.argv[1], Path(sys.argv[2])
    told = dict(word.split("=", 1) for word in sys.argv[3:])
    if case in BEFORE:
        found = BEFORE[case](folder, **told)
    else:
        if "STEPC_COORDINATOR" in os.environ:
            sc.init_distributed(heartbeat_seconds=10, shutdown_seconds=10)
        found = CASES[case](folder, **told)
    (folder / f"{jax.process_index()}.json").write_text(json.dumps(found))
