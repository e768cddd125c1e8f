"""A convolution network of Flax Linen with batch statistics, its collection `batch_stats`, as the model state."""

from functools import partial
from typing import Any, TypeAlias

import jax
import numpy as np
import optax
from flax import linen as nn

import stepc as sc

Tree: TypeAlias = Any  # Any: a collection of Linen, or a dict of arrays
SIZE, CLASSES = 8, 4


class Network(nn.Module):
    @nn.compact
    def __call__(self, images: jax.Array, train: bool = True) -> jax.Array:
        x = nn.Conv(8, (3, 3), use_bias=False)(images)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = nn.Conv(8, (3, 3), strides=2, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(CLASSES)(x.mean(axis=(1, 2)))


def init(key: jax.Array) -> tuple[Tree, Tree]:
    variables = Network().init(key, np.zeros((1, SIZE, SIZE, 3), np.float32))
    return variables["params"], variables["batch_stats"]


def loss(params: Tree, rows: Tree, batch_stats: Tree) -> tuple[jax.Array, Tree]:
    variables = {"params": params, "batch_stats": batch_stats}
    logits, updated = Network().apply(variables, rows["image"], mutable=["batch_stats"])
    value = optax.softmax_cross_entropy_with_integer_labels(logits, rows["label"]).mean()
    return value, updated["batch_stats"]


def pipeline(k: int = 4) -> sc.Pipeline:
    data = sc.shard(sc.dp("data"))
    return sc.update(optax.sgd(0.1, momentum=0.9)) @ sc.accumulate(k) @ data @ sc.grad(loss, model_state=True)


def batch(num_rows: int = 256) -> Tree:
    random = np.random.default_rng(0)
    labels = random.integers(CLASSES, size=num_rows).astype(np.int32)
    return {"image": random.normal(size=(num_rows, SIZE, SIZE, 3)).astype(np.float32), "label": labels}


if __name__ == "__main__":
    step = sc.compile(pipeline(), mesh=jax.make_mesh((len(jax.devices()),), ("data",)))
    params, batch_stats = init(jax.random.key(0))
    state = step.init(params, model_state=batch_stats)
    for _ in range(10):
        state, metrics = step(state, batch())
        print(f"step {state.step}: loss {metrics['loss']:.4f}")
    variables = {"params": state.params, "batch_stats": state.model_state}
    logits: Tree = jax.jit(partial(Network().apply, train=False))(variables, batch()["image"])
    print(f"accuracy with the running averages: {np.mean(np.argmax(logits, axis=1) == batch()['label']):.2f}")
