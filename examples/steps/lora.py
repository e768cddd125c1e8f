"""LoRA: a network of Flax NNX that is frozen, with adapters of low rank beside its kernels that are trained.

With `zero=3` the frozen kernels are sharded too: a device keeps its part of them, and they are gathered once a step.
"""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import stepc as sc

Tree: TypeAlias = Any  # Any: a state of NNX, or a dict of arrays
WIDTH, RANK, LAYERS = 32, 4, 2


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([nnx.LoRALinear(WIDTH, WIDTH, lora_rank=RANK, rngs=rngs) for _ in range(LAYERS)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = x + nnx.gelu(layer(x))
        return x


GRAPH = nnx.graphdef(nnx.eval_shape(lambda: Network(nnx.Rngs(0))))


def init(key: jax.Array) -> Tree:
    return nnx.state(Network(nnx.Rngs(key)))


def loss(params: Tree, rows: Tree) -> jax.Array:
    return jnp.mean((nnx.merge(GRAPH, params)(rows["x"]) - rows["y"]) ** 2)


def pipeline(k: int = 4) -> sc.Pipeline:
    gradient = sc.accumulate(k) @ sc.shard(sc.dp("data", zero=3)) @ sc.grad(loss, wrt="**/lora/**")
    return sc.update(optax.adamw(1e-3)) @ sc.clip(1.0) @ gradient


def batch(num_rows: int = 64) -> Tree:
    random = np.random.default_rng(0)
    return {name: random.normal(size=(num_rows, WIDTH)).astype(np.float32) for name in ("x", "y")}


if __name__ == "__main__":
    step = sc.compile(pipeline(), mesh=jax.make_mesh((len(jax.devices()),), ("data",)))
    state = step.init(init(jax.random.key(0)))
    for _ in range(10):
        state, metrics = step(state, batch())
        print(f"step {state.step}: loss {metrics['loss']:.4f}")
    trained = len(jax.tree.leaves(state.trained))
    print(f"{trained} of {len(jax.tree.leaves(state.params))} leaves are trained")
