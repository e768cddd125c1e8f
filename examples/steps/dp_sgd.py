"""Differentially private SGD: the gradient of every row is clipped, and noise is added to their mean.

Each transform does one thing, and their order is the definition: clip one row, average rows, devices and microbatches,
add noise once. A row with a NaN counts as zero, so that it cannot show in the result.
"""

from typing import Any, TypeAlias

import equinox as eqx
import jax
import numpy as np
import optax

import stepc as sc

Tree: TypeAlias = Any  # Any: a model of Equinox, or a dict of arrays
INPUTS, CLASSES, MAX_NORM, NOISE_MULTIPLIER = 8, 3, 0.5, 1.0


def model(key: jax.Array) -> eqx.nn.MLP:
    return eqx.nn.MLP(INPUTS, CLASSES, width_size=16, depth=1, key=key)


STATIC = eqx.filter(model(jax.random.key(0)), eqx.is_inexact_array, inverse=True)


def init(key: jax.Array) -> Tree:
    return eqx.filter(model(key), eqx.is_inexact_array)


def loss(params: Tree, rows: Tree) -> jax.Array:
    logits = jax.vmap(eqx.combine(params, STATIC))(rows["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, rows["label"]).mean()


def pipeline(k: int = 4, num_rows: int = 64) -> sc.Pipeline:
    private = sc.rows() @ sc.clip(MAX_NORM, nonfinite="zero") @ sc.grad(loss)
    noise = sc.noise(NOISE_MULTIPLIER * MAX_NORM / num_rows)
    return sc.update(optax.sgd(0.5)) @ noise @ sc.accumulate(k) @ sc.shard(sc.dp("data")) @ private


def batch(num_rows: int = 64) -> Tree:
    random = np.random.default_rng(0)
    labels = random.integers(CLASSES, size=num_rows).astype(np.int32)
    return {"x": random.normal(size=(num_rows, INPUTS)).astype(np.float32), "label": labels}


if __name__ == "__main__":
    step = sc.compile(pipeline(), mesh=jax.make_mesh((len(jax.devices()),), ("data",)))
    state = step.init(init(jax.random.key(0)))
    for _ in range(10):
        state, metrics = step(state, batch())
        print(f"step {state.step}: loss {metrics['loss']:.4f}")
