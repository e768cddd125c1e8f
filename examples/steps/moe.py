"""A mixture of experts whose balance is a product of two means over the batch, which no mean over microbatches gives.

`sc.Mean` in what `encode` returns is added up over all of them before `head` multiplies.
"""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

import stepc as sc

Tree: TypeAlias = dict[str, Any]  # Any: arrays, and trees of them
WIDTH, EXPERTS = 16, 4


def init(key: jax.Array) -> Tree:
    router, experts = jax.random.split(key)
    return {
        "router": jax.random.normal(router, (WIDTH, EXPERTS)),
        "experts": jax.random.normal(experts, (EXPERTS, WIDTH, WIDTH)) / WIDTH**0.5,
    }


def encode(params: Tree, rows: Tree) -> Tree:
    gates = jax.nn.softmax(rows["x"] @ params["router"])
    chosen = jax.nn.one_hot(jnp.argmax(gates, axis=1), EXPERTS)
    outputs = jnp.einsum("ni,eij->nej", rows["x"], params["experts"])
    predicted = jnp.einsum("nej,ne->nj", outputs, gates * chosen)
    num_rows = len(gates)
    return {
        "error": sc.Mean(jnp.sum((predicted - rows["y"]) ** 2), num_rows * WIDTH),
        "chosen": sc.Mean(chosen.sum(axis=0), num_rows),
        "gate": sc.Mean(gates.sum(axis=0), num_rows),
    }


def head(params: Tree, z: Tree) -> tuple[Any, Tree]:
    balance = EXPERTS * jnp.sum(z["chosen"].value * z["gate"].value)
    return z["error"] + 0.01 * balance, {"balance": balance, "load": z["chosen"].value}


def pipeline(k: int = 4) -> sc.Pipeline:
    source = sc.grad(sc.across(head) @ encode, has_aux=True)
    return sc.update(optax.adamw(1e-2)) @ sc.clip(1.0) @ sc.accumulate(k) @ sc.shard(sc.dp("data")) @ source


def batch(num_rows: int = 64) -> Tree:
    random = np.random.default_rng(0)
    return {name: random.normal(size=(num_rows, WIDTH)).astype(np.float32) for name in ("x", "y")}


if __name__ == "__main__":
    step = sc.compile(pipeline(), mesh=jax.make_mesh((len(jax.devices()),), ("data",)))
    state = step.init(init(jax.random.key(0)))
    for _ in range(10):
        state, metrics = step(state, batch())
        print(f"step {state.step}: loss {metrics['loss']:.4f}, balance {metrics['balance']:.4f}")
