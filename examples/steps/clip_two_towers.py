"""CLIP: two towers and a learned temperature. Every image is told from every text of the batch, whatever k is.

`encode` runs over the microbatches, and only its embeddings are gathered; `head` compares all of them at once.
"""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

import stepc as sc

Tree: TypeAlias = dict[str, Any]  # Any: arrays, and trees of them
PIXELS, WORDS, WIDTH = 48, 32, 16


def init(key: jax.Array) -> Tree:
    shapes = {"image": (PIXELS, WIDTH), "text": (WORDS, WIDTH)}
    keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
    towers = {name: jax.random.normal(keys[name], shape) / shape[0] ** 0.5 for name, shape in shapes.items()}
    return {**towers, "log_temperature": jnp.log(jnp.float32(0.07))}


def encode(params: Tree, rows: Tree) -> Tree:
    towers = {name: jnp.tanh(rows[name] @ params[name]) for name in ("image", "text")}
    return {name: z / jnp.linalg.norm(z, axis=1, keepdims=True) for name, z in towers.items()}


def head(params: Tree, z: Tree) -> jax.Array:
    logits = z["image"] @ z["text"].T * jnp.exp(-params["log_temperature"])
    right = jnp.arange(len(logits))
    both = [optax.softmax_cross_entropy_with_integer_labels(one, right) for one in (logits, logits.T)]
    return jnp.mean(both[0] + both[1]) / 2


def pipeline(k: int = 4) -> sc.Pipeline:
    data = sc.shard(sc.dp("data"))
    return sc.update(optax.adamw(1e-2)) @ sc.clip(1.0) @ sc.accumulate(k) @ data @ sc.grad(sc.across(head) @ encode)


def batch(num_rows: int = 64) -> Tree:
    random = np.random.default_rng(0)
    return {
        "image": random.normal(size=(num_rows, PIXELS)).astype(np.float32),
        "text": random.normal(size=(num_rows, WORDS)).astype(np.float32),
    }


if __name__ == "__main__":
    step = sc.compile(pipeline(), mesh=jax.make_mesh((len(jax.devices()),), ("data",)))
    state = step.init(init(jax.random.key(0)))
    for _ in range(10):
        state, metrics = step(state, batch())
        print(f"step {state.step}: loss {metrics['loss']:.4f}")
