"""A data set of Hugging Face `datasets` as data: a run that resumes reads the batches that were to come, bitwise.

A `Dataset` gives any row by its index, and its shuffle depends on the seed alone. So the number of the next batch is
the position. This is not for a streaming `IterableDataset`, which has no index.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from datasets import Dataset

import stepc as sc

BATCH_SIZE = 8


def loss(params: Any, rows: Any) -> jax.Array:
    return jnp.mean((rows["x"] @ params["w"] - rows["y"]) ** 2)


class Epochs:
    """The batches of a data set, each epoch in another order. The rows of a short last batch are left out."""

    def __init__(self, rows: Dataset, *, seed: int) -> None:
        self.rows = rows.with_format("numpy")
        self.seed = seed
        self.number = 0
        self.shuffled: tuple[int, Dataset] | None = None  # an epoch, and its rows in order

    def __iter__(self) -> "Epochs":
        return self

    def __next__(self) -> Any:
        epoch, place = divmod(self.number, len(self.rows) // BATCH_SIZE)
        if self.shuffled is None or self.shuffled[0] != epoch:
            self.shuffled = epoch, self.rows.shuffle(seed=self.seed + epoch)
        self.number += 1
        return self.shuffled[1][place * BATCH_SIZE : (place + 1) * BATCH_SIZE]

    def get_state(self) -> int:
        return self.number

    def set_state(self, state: int) -> None:
        self.number = state


def main(directory: Path, *, steps: int) -> sc.Run:
    x = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    rows = Dataset.from_dict({"x": x, "y": x.sum(axis=1)})  # or `load_dataset(…)`

    step = sc.compile(sc.update(optax.adam(1e-2)) @ sc.accumulate(2) @ sc.grad(loss))
    keep = sc.Checkpoints(directory, every=5, exact_resume=True)
    data = sc.Data(Epochs(rows, seed=1), prefetch=2)
    return sc.run(step, step.init({"w": jnp.zeros(4)}), data, steps=steps, checkpoint=keep)


if __name__ == "__main__":
    run = main(Path("runs/hf_datasets"), steps=40)
    print(run.steps, run.metrics)
