"""A critic of Equinox: its inexact arrays are the parameters, its `eqx.nn.State` is the model state.

`BatchNorm` sees the rows of each call, along the axis of a `vmap`. The spectral norm keeps the vectors of its power
iteration, which depend on the parameters alone.
"""

from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import stepc as sc

Tree: TypeAlias = Any  # Any: a model of Equinox, or a dict of arrays
INPUTS, HIDDEN = 8, 16


def critic(key: jax.Array) -> eqx.nn.Sequential:
    keys = jax.random.split(key, 3)
    hidden = eqx.nn.Linear(INPUTS, HIDDEN, use_bias=False, key=keys[0])
    norm = eqx.nn.BatchNorm(HIDDEN, axis_name="rows", mode="batch")
    out = eqx.nn.SpectralNorm(eqx.nn.Linear(HIDDEN, 1, key=keys[1]), "weight", key=keys[2])
    return eqx.nn.Sequential([hidden, norm, eqx.nn.Lambda(jax.nn.relu), out])


STATIC = eqx.filter(eqx.nn.make_with_state(critic)(jax.random.key(0))[0], eqx.is_inexact_array, inverse=True)


def init(key: jax.Array) -> tuple[Tree, eqx.nn.State]:
    model, state = eqx.nn.make_with_state(critic)(key)
    return eqx.filter(model, eqx.is_inexact_array), state


def loss(params: Tree, rows: Tree, state: eqx.nn.State) -> tuple[jax.Array, eqx.nn.State]:
    model = jax.vmap(eqx.combine(params, STATIC), axis_name="rows", in_axes=(0, None), out_axes=(0, None))
    scores, state = model(rows["x"], state)
    return jnp.mean((scores[:, 0] - rows["y"]) ** 2), state


def pipeline(k: int = 4) -> sc.Pipeline:
    data = sc.shard(sc.dp("data"))
    return sc.update(optax.sgd(0.1, momentum=0.9)) @ sc.accumulate(k) @ data @ sc.grad(loss, model_state=True)


def batch(num_rows: int = 256) -> Tree:
    x = np.random.default_rng(0).normal(size=(num_rows, INPUTS)).astype(np.float32)
    return {"x": x, "y": np.sin(x.sum(axis=1))}


if __name__ == "__main__":
    step = sc.compile(pipeline(), mesh=jax.make_mesh((len(jax.devices()),), ("data",)))
    params, model_state = init(jax.random.key(0))
    state = step.init(params, model_state=model_state)
    for _ in range(10):
        state, metrics = step(state, batch())
        print(f"step {state.step}: loss {metrics['loss']:.4f}")
