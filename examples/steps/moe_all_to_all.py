"""A mixture of experts that are sharded over the axis of the rows: each row is sent to two of them, and back.

A loss that moves rows between devices is a function of all of them, hence `mode="auto"`. No gradient of an expert is
reduced over that axis.
"""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

import stepc as sc

Tree: TypeAlias = dict[str, Any]  # Any: arrays, and trees of them
WIDTH, HIDDEN, EXPERTS, CHOSEN = 16, 32, 8, 2


def init(key: jax.Array) -> Tree:
    shapes = {"gate": (EXPERTS, WIDTH, HIDDEN), "up": (EXPERTS, WIDTH, HIDDEN), "down": (EXPERTS, HIDDEN, WIDTH)}
    keys = dict(zip(shapes, jax.random.split(key, 3), strict=True))
    experts = {name: jax.random.normal(keys[name], shape) / shape[1] ** 0.5 for name, shape in shapes.items()}
    return {"router": jax.random.normal(key, (WIDTH, EXPERTS)), "experts": experts}


def mixture(x: jax.Array, router: jax.Array, experts: Tree) -> jax.Array:
    """What the experts make of the rows of one device, which has a part of the experts."""
    scores, chosen = jax.lax.top_k(x @ router, CHOSEN)
    weights = jnp.einsum("nc,nce->ne", jax.nn.softmax(scores), jax.nn.one_hot(chosen, EXPERTS))
    sent = jnp.einsum("ne,ni->eni", (weights > 0).astype(x.dtype), x)  # room for every row at every expert
    there = jax.lax.all_to_all(sent, "data", 0, 1, tiled=True)
    gated = jax.nn.silu(there @ experts["gate"]) * (there @ experts["up"])
    back = jax.lax.all_to_all(gated @ experts["down"], "data", 1, 0, tiled=True)
    return jnp.einsum("ne,eni->ni", weights, back)


def loss(params: Tree, rows: Tree) -> jax.Array:
    moved = jax.shard_map(mixture, in_specs=(P("data"), P(), P("data")), out_specs=P("data"))
    return jnp.mean((moved(rows["x"], params["router"], params["experts"]) - rows["y"]) ** 2)


def pipeline(k: int = 4) -> sc.Pipeline:
    sharded = sc.shard(sc.dp("data"), sc.tp({"experts/*": P("data")}, default=P()), mode="auto")
    return sc.update(optax.adamw(1e-2)) @ sc.clip(1.0) @ sc.accumulate(k) @ sharded @ sc.grad(loss)


def batch(num_rows: int = 64) -> Tree:
    random = np.random.default_rng(0)
    return {name: random.normal(size=(num_rows, WIDTH)).astype(np.float32) for name in ("x", "y")}


if __name__ == "__main__":
    step = sc.compile(pipeline(), mesh=jax.make_mesh((len(jax.devices()),), ("data",)))
    state = step.init(init(jax.random.key(0)))
    for _ in range(10):
        state, metrics = step(state, batch())
        print(f"step {state.step}: loss {metrics['loss']:.4f}")
