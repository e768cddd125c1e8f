"""QLoRA: a frozen base of whole numbers of 8 bits, with float adapters of low rank that are trained.

The base has no gradient, no accumulator and no optimizer state, and its bytes are never reduced.
"""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

import stepc as sc

Tree: TypeAlias = dict[str, Any]  # Any: arrays, and trees of them
WIDTH, RANK, LAYERS = 64, 4, 3


def init(key: jax.Array) -> Tree:
    """Random weights in 8 bits with a scale for each column, and adapters that begin as nothing."""
    keys = jax.random.split(key, 2)
    weights = jax.random.normal(keys[0], (LAYERS, WIDTH, WIDTH)) / WIDTH**0.5
    scale = jnp.abs(weights).max(axis=1, keepdims=True) / 127
    down = jax.random.normal(keys[1], (LAYERS, WIDTH, RANK)) / WIDTH**0.5
    return {
        "base": {"codes": jnp.round(weights / scale).astype(jnp.int8), "scale": scale},
        "lora": {"down": down, "up": jnp.zeros((LAYERS, RANK, WIDTH))},
    }


def loss(params: Tree, rows: Tree) -> jax.Array:
    def layer(x: jax.Array, of: Tree) -> tuple[jax.Array, None]:
        base = of["base"]["codes"].astype(jnp.float32) * of["base"]["scale"]
        return x + jnp.tanh(x @ base + x @ of["lora"]["down"] @ of["lora"]["up"]), None

    x, _ = jax.lax.scan(layer, rows["x"], params)
    return jnp.mean((x - rows["y"]) ** 2)


def pipeline(k: int = 4) -> sc.Pipeline:
    data = sc.shard(sc.dp("data"))
    return sc.update(optax.adamw(1e-2)) @ sc.clip(1.0) @ sc.accumulate(k) @ data @ sc.grad(loss, wrt="lora/**")


def batch(num_rows: int = 64) -> Tree:
    random = np.random.default_rng(0)
    return {name: random.normal(size=(num_rows, WIDTH)).astype(np.float32) for name in ("x", "y")}


if __name__ == "__main__":
    mesh = jax.make_mesh((len(jax.devices()),), ("data",))
    step = sc.compile(pipeline(), mesh=mesh)
    state = step.init(init(jax.random.key(0)))
    for _ in range(10):
        state, metrics = step(state, batch())
        print(f"step {state.step}: loss {metrics['loss']:.4f}")
    print(f"{len(jax.tree.leaves(state.opt_state))} leaves of optimizer state")
