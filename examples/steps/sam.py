"""Sharpness-aware minimization of a small convolution network of Flax Linen: two gradients a step.

`sam` stands on the left of `accumulate` and `shard`, so it moves the parameters once, along the gradient of the whole
batch. On their right it would move them for every microbatch and device along its own.
"""

from typing import Any, TypeAlias

import jax
import numpy as np
import optax
from flax import linen as nn

import stepc as sc

Tree: TypeAlias = Any  # Any: nested dicts of arrays
SIZE, CLASSES = 8, 4


class Network(nn.Module):
    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = nn.gelu(nn.Conv(8, (3, 3), strides=2)(images))
        x = nn.gelu(nn.GroupNorm(num_groups=4)(nn.Conv(16, (3, 3), strides=2)(x)))
        return nn.Dense(CLASSES)(x.mean(axis=(1, 2)))


def init(key: jax.Array) -> Tree:
    return Network().init(key, np.zeros((1, SIZE, SIZE, 3), np.float32))


def loss(params: Tree, rows: Tree) -> jax.Array:
    logits: Tree = Network().apply(params, rows["image"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, rows["label"]).mean()


def pipeline(k: int = 4) -> sc.Pipeline:
    gradient = sc.accumulate(k) @ sc.shard(sc.dp("data")) @ sc.grad(loss)
    return sc.update(optax.sgd(0.1, momentum=0.9)) @ sc.sam(0.05) @ gradient


def batch(num_rows: int = 64) -> Tree:
    random = np.random.default_rng(0)
    labels = random.integers(CLASSES, size=num_rows).astype(np.int32)
    return {"image": random.normal(size=(num_rows, SIZE, SIZE, 3)).astype(np.float32), "label": labels}


if __name__ == "__main__":
    step = sc.compile(pipeline(), mesh=jax.make_mesh((len(jax.devices()),), ("data",)))
    state = step.init(init(jax.random.key(0)))
    for _ in range(10):
        state, metrics = step(state, batch())
        print(f"step {state.step}: loss {metrics['loss']:.4f}")
