"""Training in float16: a scale keeps small gradients from underflowing, and a step that overflows is skipped.

The first scale is too large on purpose: it is halved, and the state stays as it was, until the gradient is finite.
"""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import stepc as sc

Tree: TypeAlias = Any  # Any: nested dicts of arrays
INPUTS, HIDDEN = 16, 32


class Network(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Dense(HIDDEN)(x))
        return nn.Dense(1)(nn.relu(nn.Dense(HIDDEN)(x)))[:, 0]


def init(key: jax.Array) -> Tree:
    return Network().init(key, np.zeros((1, INPUTS), np.float32))


def loss(params: Tree, rows: Tree) -> jax.Array:
    error = Network().apply(params, rows["x"]) - rows["y"]
    return jnp.mean(error.astype(jnp.float32) ** 2)


def pipeline(k: int = 4) -> sc.Pipeline:
    gradient = sc.accumulate(k) @ sc.shard(sc.dp("data")) @ sc.grad(sc.cast(jnp.float16) @ loss)
    return sc.skip_nonfinite() @ sc.update(optax.adamw(3e-4)) @ sc.clip(1.0) @ sc.loss_scale(initial=2.0**13) @ gradient


def batch(num_rows: int = 64) -> Tree:
    x = np.random.default_rng(0).normal(size=(num_rows, INPUTS)).astype(np.float32)
    return {"x": x, "y": x.sum(axis=1)}


if __name__ == "__main__":
    step = sc.compile(pipeline(), mesh=jax.make_mesh((len(jax.devices()),), ("data",)))
    state = step.init(init(jax.random.key(0)))
    for _ in range(10):
        state, metrics = step(state, batch())
        done = "skipped" if metrics["skipped"] else f"step {state.step}"
        print(f"{done}: loss {metrics['loss']:.4f}, scale {metrics['loss_scale']:,.0f}")
