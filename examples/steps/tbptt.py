"""Truncated backpropagation through time: the hidden states go on from segment to segment, each row with its own.

With the rule "rows" they are split and sharded as the batch is, and no device ever sends one to another.
"""

from typing import Any, TypeAlias

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

import stepc as sc

Tree: TypeAlias = Any  # Any: nested dicts of arrays
VOCAB, HIDDEN, LENGTH = 16, 16, 6


def network(tokens: jax.Array, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
    x = hk.Embed(VOCAB, HIDDEN)(tokens)
    x, hidden = hk.dynamic_unroll(hk.GRU(HIDDEN), x, hidden, time_major=False)
    return hk.Linear(VOCAB)(x), hidden


MODEL = hk.without_apply_rng(hk.transform(network))


def init(key: jax.Array, num_rows: int = 64) -> tuple[Tree, Tree]:
    params = MODEL.init(key, np.zeros((1, LENGTH), np.int32), np.zeros((1, HIDDEN), np.float32))
    return params, {"hidden": np.zeros((num_rows, HIDDEN), np.float32)}


def loss(params: Tree, rows: Tree, carried: Tree) -> tuple[jax.Array, Tree]:
    hidden = jnp.where(rows["begins"][:, None], 0, carried["hidden"])  # a new text begins in this row
    logits, hidden = MODEL.apply(params, rows["tokens"][:, :-1], hidden)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, rows["tokens"][:, 1:])
    return nll.mean(), {"hidden": hidden}


def pipeline(k: int = 4) -> sc.Pipeline:
    gradient = sc.accumulate(k) @ sc.shard(sc.dp("data")) @ sc.grad(loss, model_state={"hidden": "rows"})
    return sc.update(optax.adam(1e-3)) @ sc.clip(1.0) @ gradient


def batch(num_rows: int = 64) -> Tree:
    random = np.random.default_rng(0)
    tokens = random.integers(VOCAB, size=(num_rows, LENGTH)).astype(np.int32)
    return {"tokens": tokens, "begins": random.random(num_rows) < 0.1}


if __name__ == "__main__":
    step = sc.compile(pipeline(), mesh=jax.make_mesh((len(jax.devices()),), ("data",)))
    params, hidden = init(jax.random.key(0))
    state = step.init(params, model_state=hidden)
    for _ in range(10):
        state, metrics = step(state, batch())
        print(f"step {state.step}: loss {metrics['loss']:.4f}")
