"""Counts the Python functions that a warm step calls, as JSON.

It is a process of its own: the checks of types in the tests call more. What jax calls itself is left out: it differs
from version to version.
"""

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import stepc as sc

JAX = str(Path(jax.__file__).parent)
WARM, COUNTED = 10, 50  # steps


class Calls(Counter[str]):
    """How often each function is called, by file and name."""

    @contextmanager
    def counted(self) -> Generator[None]:
        sys.setprofile(self.see)
        try:
            yield
        finally:
            sys.setprofile(None)

    def see(self, frame: FrameType, event: str, _: object) -> None:
        if event == "call" and not (_is_of_jax(frame) and _is_of_jax(frame.f_back)):
            self[f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}"] += 1

    def of_one_step(self) -> dict[str, float]:
        return {name: number / COUNTED for name, number in self.most_common()}


def _is_of_jax(frame: FrameType | None) -> bool:
    return frame is None or frame.f_code.co_filename.startswith(JAX)


class Batches:
    """One host batch again and again, from an iterator with a position, which counts the steps between two of them."""

    def __init__(self, calls: Calls) -> None:
        self.calls, self.given, self.batch = calls, 0, batch()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self.given += 1
        if self.given == WARM:
            sys.setprofile(self.calls.see)
        if self.given == WARM + COUNTED:
            sys.setprofile(None)
        if self.given == 2 * WARM + COUNTED:
            raise StopIteration
        return self.batch

    def get_state(self) -> dict[str, int]:
        return {"given": self.given}

    def set_state(self, state: dict[str, int]) -> None:
        self.given = state["given"]


def loss(params: Any, rows: Any) -> jax.Array:
    return jnp.mean((rows["x"] @ params["w"] - rows["y"]) ** 2)


def batch() -> dict[str, np.ndarray]:
    return {"x": np.ones((8, 4), np.float32), "y": np.ones((8, 1), np.float32)}


def step_and_state(mesh: Mesh | None = None) -> tuple[sc.Step, sc.State]:
    gradient = sc.grad(loss) if mesh is None else sc.shard(sc.dp("data")) @ sc.grad(loss)
    step = sc.compile(sc.update(optax.sgd(0.1)) @ gradient, mesh=mesh)
    return step, step.init({"w": np.ones((4, 1), np.float32)})


def of_call(devices: int | None) -> Calls:
    """Those of a call, on a mesh with a batch that the user has put there."""
    mesh = None if devices is None else jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    step, state = step_and_state(mesh)
    rows: Any = batch() if mesh is None else jax.device_put(batch(), NamedSharding(mesh, PartitionSpec("data")))
    calls = Calls()
    for _ in range(WARM):
        state, _ = step(state, rows)
    with calls.counted():
        for _ in range(COUNTED):
            state, _ = step(state, rows)
    return calls


def of_run(**options: Any) -> Calls:
    """Those of a step of `run`."""
    step, state = step_and_state()
    calls = Calls()
    sc.run(step, state, Batches(calls), **options)
    return calls


def main() -> None:
    measured: dict[str, Callable[[], Calls]] = {
        "call": lambda: of_call(None),
        "call on a mesh of one device": lambda: of_call(1),
        "call on a mesh of two devices": lambda: of_call(2),
        "run": of_run,
    }
    found = {name: count().of_one_step() for name, count in measured.items()}
    with tempfile.TemporaryDirectory() as folder, sc.JSONL(Path(folder, "metrics.jsonl")) as logger:
        keep = sc.Checkpoints(Path(folder, "kept"), every=10**9, every_seconds=1e6)
        found["run with all"] = of_run(loggers=[logger], checkpoint=keep, on_error="rollback").of_one_step()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
