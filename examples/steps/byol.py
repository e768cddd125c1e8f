"""BYOL: a network predicts what a moving average of itself, the teacher, makes of another view of the same row.

`reads="ema"` hands the loss the average as it is before the step. The views are drawn with one key per row.
"""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import stepc as sc

Tree: TypeAlias = Any  # Any: nested dicts of arrays
INPUTS, HIDDEN, PROJECTED = 16, 32, 8


def perceptron() -> nn.Sequential:
    return nn.Sequential([nn.Dense(HIDDEN), nn.relu, nn.Dense(PROJECTED)])


def apply(params: Tree, x: jax.Array) -> Tree:
    return perceptron().apply(params, x)


def init(key: jax.Array) -> Tree:
    keys = jax.random.split(key)
    encoder = perceptron().init(keys[0], np.zeros((1, INPUTS), np.float32))
    return {"encoder": encoder, "predictor": perceptron().init(keys[1], np.zeros((1, PROJECTED), np.float32))}


def loss(params: Tree, rows: Tree, keys: jax.Array, *, ema: Tree) -> jax.Array:
    noise = jax.vmap(lambda key: jax.random.normal(key, (2, INPUTS)))(keys)
    first, second = rows["x"] + 0.3 * noise[:, 0], rows["x"] + 0.3 * noise[:, 1]

    def distance(one: jax.Array, other: jax.Array) -> jax.Array:
        predicted = apply(params["predictor"], apply(params["encoder"], one))
        return 2 - 2 * optax.cosine_similarity(predicted, apply(ema["encoder"], other))

    return jnp.mean(distance(first, second) + distance(second, first))


def pipeline(k: int = 4) -> sc.Pipeline:
    gradient = sc.accumulate(k) @ sc.shard(sc.dp("data")) @ sc.grad(loss, rng="example", reads="ema")
    return sc.ema(0.99) @ sc.update(optax.sgd(0.1, momentum=0.9)) @ gradient


def batch(num_rows: int = 64) -> Tree:
    return {"x": np.random.default_rng(0).normal(size=(num_rows, INPUTS)).astype(np.float32)}


if __name__ == "__main__":
    step = sc.compile(pipeline(), mesh=jax.make_mesh((len(jax.devices()),), ("data",)))
    state = step.init(init(jax.random.key(0)))
    for _ in range(10):
        state, metrics = step(state, batch())
        print(f"step {state.step}: loss {metrics['loss']:.4f}")
