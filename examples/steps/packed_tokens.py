"""A language model on packed sequences: several texts a row, none of which attends to another, and a z-loss.

The first term is a mean over predicted tokens, the second over all tokens but padding. Their numbers differ from row to
row, so each is an `sc.Mean`, divided once by its own count of the whole batch, for any k and mesh.
"""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import stepc as sc

Tree: TypeAlias = Any  # Any: nested dicts of arrays
VOCAB, WIDTH, LENGTH = 32, 16, 12


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, tokens: jax.Array, texts: jax.Array) -> jax.Array:
        mask = nn.combine_masks(nn.make_causal_mask(tokens), nn.make_attention_mask(texts, texts, jnp.equal))
        x = nn.Embed(VOCAB, WIDTH)(tokens)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, use_bias=False)(nn.LayerNorm()(x), mask=mask)
        x = x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(2 * WIDTH)(nn.LayerNorm()(x))))
        return nn.Dense(VOCAB)(x)


def init(key: jax.Array) -> Tree:
    return Decoder().init(key, *np.zeros((2, 1, LENGTH), np.int32))


def loss(params: Tree, rows: Tree) -> Any:  # Any: a sum of `sc.Mean`
    tokens, texts = rows["tokens"], rows["texts"]  # text 0 is padding
    logits: Tree = Decoder().apply(params, tokens, texts)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
    within = (texts[:, 1:] == texts[:, :-1]) & (texts[:, 1:] > 0)
    log_z, real = jax.nn.logsumexp(logits, axis=-1), texts > 0
    return sc.Mean((nll * within).sum(), within.sum()) + 1e-4 * sc.Mean((log_z**2 * real).sum(), real.sum())


def pipeline(k: int = 4) -> sc.Pipeline:
    return sc.update(optax.adamw(1e-3)) @ sc.clip(1.0) @ sc.accumulate(k) @ sc.shard(sc.dp("data")) @ sc.grad(loss)


def batch(num_rows: int = 64) -> Tree:
    random = np.random.default_rng(0)
    ends = np.sort(random.integers(1, LENGTH + 1, size=(num_rows, 3)), axis=1)  # of three texts; padding after the last
    texts = (np.arange(LENGTH) < ends[..., None]).sum(axis=1).astype(np.int32)
    return {"tokens": random.integers(VOCAB, size=(num_rows, LENGTH)).astype(np.int32), "texts": texts}


if __name__ == "__main__":
    step = sc.compile(pipeline(), mesh=jax.make_mesh((len(jax.devices()),), ("data",)))
    state = step.init(init(jax.random.key(0)))
    for _ in range(10):
        state, metrics = step(state, batch())
        print(f"step {state.step}: loss {metrics['loss']:.4f}")
