"""L-BFGS with a line search: every evaluation is the loss of the whole batch, in k microbatches on all devices."""

from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import stepc as sc

Tree: TypeAlias = Any  # Any: a model of Equinox, or a dict of arrays
INPUTS = 6


def init(key: jax.Array) -> eqx.nn.Linear:
    return eqx.nn.Linear(INPUTS, "scalar", key=key)  # all its leaves are arrays


def loss(model: eqx.nn.Linear, rows: Tree) -> jax.Array:
    logits = jax.vmap(model)(rows["x"])
    return optax.sigmoid_binary_cross_entropy(logits, rows["label"]).mean() + 1e-2 * jnp.sum(model.weight**2)


def pipeline(k: int = 4) -> sc.Pipeline:
    return sc.update(optax.lbfgs()) @ sc.accumulate(k) @ sc.shard(sc.dp("data")) @ sc.grad(loss)


def batch(num_rows: int = 64) -> Tree:
    x = np.random.default_rng(0).normal(size=(num_rows, INPUTS)).astype(np.float32)
    return {"x": x, "label": np.float32(x[:, 0] + np.sin(x[:, 1:]).sum(axis=1) > 0)}


if __name__ == "__main__":
    step = sc.compile(pipeline(), mesh=jax.make_mesh((len(jax.devices()),), ("data",)))
    state = step.init(init(jax.random.key(0)))
    for _ in range(10):
        state, metrics = step(state, batch())
        print(f"step {state.step}: loss {metrics['loss']:.4f}")
