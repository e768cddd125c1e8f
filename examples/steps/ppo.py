"""PPO: four epochs of four minibatches over each rollout, in one dispatch, on a bandit that shows what it pays for."""

from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

import stepc as sc

Tree: TypeAlias = dict[str, Any]  # Any: arrays, and trees of them
WIDTH, HIDDEN, ACTIONS = 8, 32, 4


def init(key: jax.Array) -> Tree:
    keys = iter(jax.random.split(key, 3))
    sizes = {"hidden": (WIDTH, HIDDEN), "policy": (HIDDEN, ACTIONS), "value": (HIDDEN, 1)}
    return {name: jax.random.normal(next(keys), size) / size[0] ** 0.5 for name, size in sizes.items()}


def outputs(params: Tree, seen: jax.Array) -> tuple[jax.Array, jax.Array]:
    hidden = jnp.tanh(seen @ params["hidden"])
    return jax.nn.log_softmax(hidden @ params["policy"]), (hidden @ params["value"])[:, 0]


@partial(jax.jit, static_argnames="num_rows")
def rollout(params: Tree, key: jax.Array, num_rows: int = 256) -> Tree:
    """What is seen, what is done, and the reward: 1 for the action that the first columns pay for."""
    keys = jax.random.split(key)
    seen = jax.random.normal(keys[0], (num_rows, WIDTH))
    log_probs, values = outputs(params, seen)
    action = jax.random.categorical(keys[1], log_probs)
    reward = (action == jnp.argmax(seen[:, :ACTIONS], axis=1)).astype(jnp.float32)
    taken = jnp.take_along_axis(log_probs, action[:, None], axis=1)[:, 0]
    return {"seen": seen, "action": action, "log_prob": taken, "advantage": reward - values, "reward": reward}


def loss(params: Tree, rows: Tree) -> tuple[jax.Array, Tree]:
    log_probs, values = outputs(params, rows["seen"])
    ratio = jnp.exp(jnp.take_along_axis(log_probs, rows["action"][:, None], axis=1)[:, 0] - rows["log_prob"])
    gain = jnp.minimum(ratio * rows["advantage"], jnp.clip(ratio, 0.8, 1.2) * rows["advantage"])
    entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=1)
    error = (values - rows["reward"]) ** 2
    return jnp.mean(0.5 * error - gain - 0.01 * entropy), {"entropy": jnp.mean(entropy)}


def pipeline(k: int = 1) -> sc.Pipeline:
    gradient = sc.clip(0.5) @ sc.accumulate(k) @ sc.shard(sc.dp("data")) @ sc.grad(loss, has_aux=True)
    return sc.epochs(4, minibatches=4) @ sc.update(optax.adam(3e-3)) @ gradient


if __name__ == "__main__":
    step = sc.compile(pipeline(), mesh=jax.make_mesh((len(jax.devices()),), ("data",)))
    state = step.init(init(jax.random.key(0)))
    for key in jax.random.split(jax.random.key(1), 20):
        seen = rollout(state.params, key)
        state, metrics = step(state, seen)
        print(f"step {state.step}: reward {seen['reward'].mean():.3f}, loss {metrics['loss'][-1]:.4f}")
