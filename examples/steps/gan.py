"""A GAN: a critic in every step and a generator in every second, with optimizers of their own, in one program."""

from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

import stepc as sc

Tree: TypeAlias = dict[str, Any]  # Any: arrays, and trees of them
NOISE, HIDDEN, WIDTH = 4, 32, 2


def init(key: jax.Array) -> Tree:
    shapes = {"g": [(NOISE, HIDDEN), (HIDDEN, WIDTH)], "d": [(WIDTH, HIDDEN), (HIDDEN, 1)]}
    normal = jax.nn.initializers.lecun_normal()
    return {name: [normal(jax.random.fold_in(key, sum(one)), one) for one in shapes[name]] for name in shapes}


def apply(layers: list[jax.Array], x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ layers[0]) @ layers[1]


def fakes(params: Tree, keys: jax.Array) -> jax.Array:
    """A point for each row, from noise of its own key."""
    return apply(params["g"], jax.vmap(partial(jax.random.normal, shape=(NOISE,)))(keys))


def critic_loss(params: Tree, rows: Tree, keys: jax.Array) -> tuple[jax.Array, Tree]:
    real, fake = apply(params["d"], rows["x"]), apply(params["d"], fakes(params, keys))
    loss = jnp.mean(jax.nn.softplus(-real) + jax.nn.softplus(fake))
    return loss, {"right": jnp.mean(real > 0) / 2 + jnp.mean(fake < 0) / 2}


def generator_loss(params: Tree, rows: Tree, keys: jax.Array) -> jax.Array:
    return jnp.mean(jax.nn.softplus(-apply(params["d"], fakes(params, keys))))


def pipeline(k: int = 2) -> sc.Pipeline:
    shared = sc.accumulate(k) @ sc.shard(sc.dp("data"))
    d = sc.update(optax.adam(2e-3, b1=0.5)) @ shared @ sc.grad(critic_loss, wrt="d/**", rng="example", has_aux=True)
    g = sc.update(optax.adam(1e-3, b1=0.5)) @ shared @ sc.grad(generator_loss, wrt="g/**", rng="example")
    return sc.skip_nonfinite() @ sc.ema(0.99) @ sc.alternate(d=d, g=g, every={"g": 2})


def batch(num_rows: int = 64, seed: int = 0) -> Tree:
    angle = np.random.default_rng(seed).uniform(0, 2 * np.pi, size=num_rows)  # of points on a circle
    return {"x": np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)}


if __name__ == "__main__":
    step = sc.compile(pipeline(), mesh=jax.make_mesh((len(jax.devices()),), ("data",)))
    state = step.init(init(jax.random.key(0)))
    for number in range(200):
        state, metrics = step(state, batch(seed=number))
        if state.step % 20 == 0:
            print(f"step {state.step}: loss {metrics['loss']:.4f}, the critic is right in {metrics['d/right']:.0%}")
