"""A new head on a frozen encoder, and then the last layer of the encoder too.

`step.init(params, like=state)` goes on where the first step ended: the moments of the head, the step and the key stay.
"""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

import stepc as sc

Tree: TypeAlias = dict[str, Any]  # Any: arrays, and trees of them
WIDTH, CLASSES = 32, 8


def init(key: jax.Array) -> Tree:
    keys = jax.random.split(key, 3)
    layers = [{"kernel": jax.random.normal(one, (WIDTH, WIDTH)) / WIDTH**0.5} for one in keys[:2]]
    return {"encoder": layers, "head": {"kernel": jnp.zeros((WIDTH, CLASSES)), "bias": jnp.zeros(CLASSES)}}


def loss(params: Tree, rows: Tree) -> jax.Array:
    x = rows["x"]
    for layer in params["encoder"]:
        x = jnp.tanh(x @ layer["kernel"])
    logits = x @ params["head"]["kernel"] + params["head"]["bias"][None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, rows["label"]).mean()


def pipeline(wrt: str | tuple[str, ...] = "head/**", k: int = 4) -> sc.Pipeline:
    data = sc.shard(sc.dp("data"))
    return sc.update(optax.adamw(1e-2)) @ sc.clip(1.0) @ sc.accumulate(k) @ data @ sc.grad(loss, wrt=wrt)


def batch(num_rows: int = 64) -> Tree:
    random = np.random.default_rng(0)
    labels = random.integers(CLASSES, size=num_rows)
    return {"x": random.normal(size=(num_rows, WIDTH)).astype(np.float32), "label": labels.astype(np.int32)}


if __name__ == "__main__":
    mesh = jax.make_mesh((len(jax.devices()),), ("data",))
    step = sc.compile(pipeline(), mesh=mesh)
    state = step.init(init(jax.random.key(0)))
    for _ in range(10):
        state, metrics = step(state, batch())
        print(f"the head alone, step {state.step}: loss {metrics['loss']:.4f}")
    step = sc.compile(pipeline(("head/**", "encoder/1/**")), mesh=mesh)
    state = step.init(state.params, like=state)
    for _ in range(10):
        state, metrics = step(state, batch())
        print(f"and the last layer, step {state.step}: loss {metrics['loss']:.4f}")
