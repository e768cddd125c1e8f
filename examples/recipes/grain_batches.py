"""A Grain pipeline as data: a run that resumes reads the batches that were to come, bitwise.

Grain's iterators have `get_state` and `set_state`, so they need no adapter.
"""

from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax

import stepc as sc

BATCH_SIZE = 8


def loss(params: Any, rows: Any) -> jax.Array:
    return jnp.mean((rows["x"] @ params["w"] - rows["y"]) ** 2)


def main(directory: Path, *, steps: int) -> sc.Run:
    x = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    rows = grain.MapDataset.source([{"x": row, "y": row.sum()} for row in x])
    batches = rows.shuffle(seed=1).repeat().batch(BATCH_SIZE)  # `repeat` after `shuffle`: each epoch has another order

    step = sc.compile(sc.update(optax.adam(1e-2)) @ sc.accumulate(2) @ sc.grad(loss))
    keep = sc.Checkpoints(directory, every=5, exact_resume=True)
    data = sc.Data(iter(batches.to_iter_dataset()), prefetch=2)
    return sc.run(step, step.init({"w": jnp.zeros(4)}), data, steps=steps, checkpoint=keep)


if __name__ == "__main__":
    run = main(Path("runs/grain_batches"), steps=40)
    print(run.steps, run.metrics)
