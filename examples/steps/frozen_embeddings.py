"""A classifier of texts on frozen embeddings in bfloat16. All other parameters are trained, in float32."""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

import stepc as sc

Tree: TypeAlias = dict[str, Any]  # Any: arrays, and trees of them
VOCAB, WIDTH, LENGTH, CLASSES = 256, 32, 12, 4
TRAINED = ("mix/**", "head/**")


def init(key: jax.Array) -> Tree:
    keys = jax.random.split(key, 3)
    return {
        "embed": jax.random.normal(keys[0], (VOCAB, WIDTH), jnp.bfloat16),
        "mix": {"kernel": jax.random.normal(keys[1], (WIDTH, WIDTH)) / WIDTH**0.5, "bias": jnp.zeros(WIDTH)},
        "head": {"kernel": jax.random.normal(keys[2], (WIDTH, CLASSES)) / WIDTH**0.5},
    }


def loss(params: Tree, rows: Tree) -> jax.Array:
    words = params["embed"][rows["tokens"]].astype(jnp.float32)
    hidden = jnp.tanh(words.mean(axis=1) @ params["mix"]["kernel"] + params["mix"]["bias"][None])
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ params["head"]["kernel"], rows["label"]).mean()


def pipeline(k: int = 4) -> sc.Pipeline:
    gradient = sc.accumulate(k) @ sc.shard(sc.dp("data")) @ sc.grad(loss, wrt=TRAINED)
    return sc.ema(0.9) @ sc.update(optax.adamw(1e-2)) @ sc.clip(1.0) @ gradient


def batch(num_rows: int = 64) -> Tree:
    random = np.random.default_rng(0)
    tokens = random.integers(VOCAB, size=(num_rows, LENGTH)).astype(np.int32)
    return {"tokens": tokens, "label": random.integers(CLASSES, size=num_rows).astype(np.int32)}


if __name__ == "__main__":
    mesh = jax.make_mesh((len(jax.devices()),), ("data",))
    step = sc.compile(pipeline(), mesh=mesh)
    state = step.init(init(jax.random.key(0)))
    for _ in range(10):
        state, metrics = step(state, batch())
        print(f"step {state.step}: loss {metrics['loss']:.4f}")
    # The average has None in the place of the embeddings: they are those of the parameters.
    averaged = jax.tree.map(
        lambda average, own: own if average is None else average,
        state.slots["ema"], state.params, is_leaf=lambda one: one is None,
    )  # fmt: skip
    print(f"the average: loss {loss(averaged, batch()):.4f}")
