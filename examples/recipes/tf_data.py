"""A `tf.data.Dataset` as data: a run that resumes reads the batches that were to come, bitwise.

Its numpy iterator saves and restores itself. What it saves has the shuffle buffer in it, and a run asks for it at every
batch: keep the buffer small, or the data in TFRecord files that are shuffled already.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tensorflow as tf

import stepc as sc

BATCH_SIZE = 8


def loss(params: Any, rows: Any) -> jax.Array:
    return jnp.mean((rows["x"] @ params["w"] - rows["y"]) ** 2)


class Batches:
    """The batches of a data set as numpy arrays, with a position."""

    def __init__(self, dataset: tf.data.Dataset) -> None:
        self.batches = dataset.as_numpy_iterator()

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Any:
        return next(self.batches)

    def get_state(self) -> bytes:
        return self.batches.save().numpy()

    def set_state(self, state: bytes) -> None:
        self.batches.restore(state)


def main(directory: Path, *, steps: int) -> sc.Run:
    tf.config.set_visible_devices([], "GPU")  # TensorFlow would take the memory of the GPUs
    x = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    rows = tf.data.Dataset.from_tensor_slices({"x": x, "y": x.sum(axis=1)})
    batches = rows.shuffle(16, seed=1).batch(BATCH_SIZE, drop_remainder=True).repeat()

    step = sc.compile(sc.update(optax.adam(1e-2)) @ sc.accumulate(2) @ sc.grad(loss))
    keep = sc.Checkpoints(directory, every=5, exact_resume=True)
    data = sc.Data(Batches(batches), prefetch=2)
    return sc.run(step, step.init({"w": jnp.zeros(4)}), data, steps=steps, checkpoint=keep)


if __name__ == "__main__":
    run = main(Path("runs/tf_data"), steps=40)
    print(run.steps, run.metrics)
