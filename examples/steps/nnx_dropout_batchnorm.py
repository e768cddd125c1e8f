"""A classifier of Flax NNX with dropout and batch statistics, which are its model state by the default rules.

Statistics pass through the microbatches. Keys are folded with the rows of each call, and advance once a step.
"""

from typing import Any, TypeAlias

import jax
import numpy as np
import optax
from flax import nnx

import stepc as sc

Tree: TypeAlias = Any  # Any: a state of NNX, or a dict of arrays
INPUTS, HIDDEN, CLASSES = 16, 32, 4


class Classifier(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(INPUTS, HIDDEN, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(HIDDEN, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.out = nnx.Linear(HIDDEN, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(self.dropout(nnx.relu(self.norm(self.hidden(x)))))


GRAPH = nnx.graphdef(nnx.eval_shape(lambda: Classifier(nnx.Rngs(0))))


def init(key: jax.Array) -> tuple[Tree, Tree]:
    _, params, rest = nnx.split(Classifier(nnx.Rngs(key)), nnx.Param, ...)
    return params, rest


def loss(params: Tree, rows: Tree, rest: Tree) -> tuple[jax.Array, Tree]:
    model = nnx.merge(GRAPH, params, rest)
    value = optax.softmax_cross_entropy_with_integer_labels(model(rows["x"]), rows["label"]).mean()
    return value, nnx.state(model, nnx.Not(nnx.Param))


def pipeline(k: int = 4) -> sc.Pipeline:
    data = sc.shard(sc.dp("data"))
    return sc.update(optax.adamw(1e-3)) @ sc.accumulate(k) @ data @ sc.grad(loss, model_state=True)


def batch(num_rows: int = 256) -> Tree:
    x = np.random.default_rng(0).normal(size=(num_rows, INPUTS)).astype(np.float32)
    return {"x": x, "label": x[:, :CLASSES].argmax(axis=1)}


if __name__ == "__main__":
    step = sc.compile(pipeline(), mesh=jax.make_mesh((len(jax.devices()),), ("data",)))
    params, rest = init(jax.random.key(0))
    state = step.init(params, model_state=rest)
    for _ in range(10):
        state, metrics = step(state, batch())
        print(f"step {state.step}: loss {metrics['loss']:.4f}")
