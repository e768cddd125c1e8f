"""A variational autoencoder of Flax NNX. Its KL term warms up: the loss reads the number of steps made."""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import stepc as sc

Tree: TypeAlias = Any  # Any: a state of NNX, or a dict of arrays
INPUTS, HIDDEN, LATENT, WARM_UP = 16, 32, 4, 10


def perceptron(inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Sequential:
    return nnx.Sequential(nnx.Linear(inputs, HIDDEN, rngs=rngs), nnx.relu, nnx.Linear(HIDDEN, outputs, rngs=rngs))


class Autoencoder(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.encoder = perceptron(INPUTS, 2 * LATENT, rngs)
        self.decoder = perceptron(LATENT, INPUTS, rngs)


GRAPH = nnx.graphdef(nnx.eval_shape(lambda: Autoencoder(nnx.Rngs(0))))


def init(key: jax.Array) -> Tree:
    return nnx.state(Autoencoder(nnx.Rngs(key)))


def loss(params: Tree, rows: Tree, keys: jax.Array, *, step: jax.Array) -> tuple[jax.Array, Tree]:
    model = nnx.merge(GRAPH, params)
    mean, log_scale = jnp.split(model.encoder(rows["x"]), 2, axis=1)
    drawn = jax.vmap(lambda key: jax.random.normal(key, (LATENT,)))(keys)
    error = model.decoder(mean + jnp.exp(log_scale) * drawn) - rows["x"]
    reconstruction = jnp.mean(jnp.sum(error**2, axis=1))
    kl = jnp.mean(jnp.sum(jnp.exp(2 * log_scale) + mean**2 - 1 - 2 * log_scale, axis=1)) / 2
    return reconstruction + jnp.minimum(1.0, step / WARM_UP) * kl, {"reconstruction": reconstruction, "kl": kl}


def pipeline(k: int = 4) -> sc.Pipeline:
    gradient = sc.grad(loss, has_aux=True, rng="example", reads="step")
    return sc.update(optax.adam(1e-3)) @ sc.accumulate(k) @ sc.shard(sc.dp("data")) @ gradient


def batch(num_rows: int = 64) -> Tree:
    return {"x": np.random.default_rng(0).normal(size=(num_rows, INPUTS)).astype(np.float32)}


if __name__ == "__main__":
    step = sc.compile(pipeline(), mesh=jax.make_mesh((len(jax.devices()),), ("data",)))
    state = step.init(init(jax.random.key(0)))
    for _ in range(10):
        state, metrics = step(state, batch())
        print(f"step {state.step}: " + ", ".join(f"{name} {value:.3f}" for name, value in metrics.items()))
