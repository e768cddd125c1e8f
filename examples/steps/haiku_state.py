"""A network of Haiku with batch statistics, which keep averages and a count of whole numbers, as the model state."""

from typing import Any, TypeAlias

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

import stepc as sc

Tree: TypeAlias = Any  # Any: nested dicts of arrays
INPUTS, HIDDEN = 16, 32


def network(x: jax.Array, is_training: bool) -> jax.Array:
    x = hk.Linear(HIDDEN, with_bias=False)(x)
    x = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9)(x, is_training)
    return hk.Linear(1)(jax.nn.relu(x))[:, 0]


MODEL = hk.without_apply_rng(hk.transform_with_state(network))


def init(key: jax.Array) -> tuple[Tree, Tree]:
    return MODEL.init(key, np.zeros((1, INPUTS), np.float32), is_training=True)


def loss(params: Tree, rows: Tree, state: Tree) -> tuple[jax.Array, Tree]:
    predicted, state = MODEL.apply(params, state, rows["x"], is_training=True)
    return jnp.mean((predicted - rows["y"]) ** 2), state


def pipeline(k: int = 4) -> sc.Pipeline:
    gradient = sc.accumulate(k) @ sc.shard(sc.dp("data")) @ sc.grad(loss, model_state=True)
    return sc.update(optax.sgd(0.1, momentum=0.9)) @ sc.clip(1.0) @ gradient


def batch(num_rows: int = 256) -> Tree:
    x = np.random.default_rng(0).normal(size=(num_rows, INPUTS)).astype(np.float32)
    return {"x": x, "y": np.tanh(x.sum(axis=1))}


if __name__ == "__main__":
    step = sc.compile(pipeline(), mesh=jax.make_mesh((len(jax.devices()),), ("data",)))
    params, model_state = init(jax.random.key(0))
    state = step.init(params, model_state=model_state)
    for _ in range(10):
        state, metrics = step(state, batch())
        print(f"step {state.step}: loss {metrics['loss']:.4f}")
    predicted, _ = MODEL.apply(state.params, state.model_state, batch()["x"], is_training=False)
    print(f"with the averages: loss {np.mean((predicted - batch()['y']) ** 2):.4f}")
