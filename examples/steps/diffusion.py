"""A diffusion model: every row has its own time and noise, drawn with `rng="example"`: the same for any k and mesh."""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import stepc as sc

Tree: TypeAlias = Any  # Any: nested dicts of arrays
SIZE, HIDDEN = 8, 32


class Denoiser(nn.Module):
    @nn.compact
    def __call__(self, noisy: jax.Array, time: jax.Array) -> jax.Array:
        phases = time[:, None] * (2.0 ** np.arange(4, dtype=np.float32))[None]
        x = jnp.concatenate([noisy, jnp.sin(phases), jnp.cos(phases)], axis=1)
        for _ in range(2):
            x = nn.silu(nn.Dense(HIDDEN)(x))
        return nn.Dense(SIZE)(x)


def init(key: jax.Array) -> Tree:
    return Denoiser().init(key, np.zeros((1, SIZE), np.float32), np.zeros(1, np.float32))


def loss(params: Tree, rows: Tree, keys: jax.Array) -> jax.Array:
    def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        keys = jax.random.split(key)
        return jax.random.uniform(keys[0]), jax.random.normal(keys[1], (SIZE,))

    time, noise = jax.vmap(draw)(keys)
    angle = time[:, None] * jnp.pi / 2
    noisy = jnp.cos(angle) * rows["x"] + jnp.sin(angle) * noise
    predicted: Tree = Denoiser().apply(params, noisy, time)
    return jnp.mean((predicted - noise) ** 2)


def pipeline(k: int = 4) -> sc.Pipeline:
    gradient = sc.accumulate(k) @ sc.shard(sc.dp("data")) @ sc.grad(loss, rng="example")
    return sc.ema(0.99) @ sc.update(optax.adamw(1e-3)) @ sc.clip(1.0) @ gradient


def batch(num_rows: int = 64) -> Tree:
    return {"x": np.tanh(np.random.default_rng(0).normal(size=(num_rows, SIZE))).astype(np.float32)}


if __name__ == "__main__":
    step = sc.compile(pipeline(), mesh=jax.make_mesh((len(jax.devices()),), ("data",)))
    state = step.init(init(jax.random.key(0)))
    for _ in range(10):
        state, metrics = step(state, batch())
        print(f"step {state.step}: loss {metrics['loss']:.4f}")
