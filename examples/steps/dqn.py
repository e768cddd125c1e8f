"""DQN: a target network that is copied from the parameters every few steps, `ema(0.0, every=n)`, and read by the loss.

The next action is chosen by the parameters and valued by the target network (double Q-learning).
"""

from typing import Any, TypeAlias

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

import stepc as sc

Tree: TypeAlias = Any  # Any: nested dicts of arrays
OBSERVED, ACTIONS, EVERY = 6, 3, 2


def network(observation: jax.Array) -> jax.Array:
    return hk.nets.MLP([32, 32, ACTIONS])(observation)


Q = hk.without_apply_rng(hk.transform(network))


def init(key: jax.Array) -> Tree:
    return Q.init(key, np.zeros((1, OBSERVED), np.float32))


def loss(params: Tree, rows: Tree, *, ema: Tree) -> jax.Array:
    def value_of(action: jax.Array, values: jax.Array) -> jax.Array:
        return jnp.take_along_axis(values, action[:, None], axis=1)[:, 0]

    best = Q.apply(params, rows["next"]).argmax(axis=1)
    target = rows["reward"] + rows["discount"] * value_of(best, Q.apply(ema, rows["next"]))
    return optax.huber_loss(value_of(rows["action"], Q.apply(params, rows["now"])), target).mean()


def pipeline(k: int = 4) -> sc.Pipeline:
    gradient = sc.accumulate(k) @ sc.shard(sc.dp("data")) @ sc.grad(loss, reads="ema")
    return sc.ema(0.0, every=EVERY) @ sc.update(optax.adam(1e-3)) @ sc.clip(10.0) @ gradient


def batch(num_rows: int = 64) -> Tree:
    random = np.random.default_rng(0)
    now, after = random.normal(size=(2, num_rows, OBSERVED)).astype(np.float32)
    ends = random.random(num_rows) < 0.1
    action = random.integers(ACTIONS, size=num_rows).astype(np.int32)
    return {"now": now, "action": action, "reward": now[:, 0], "next": after, "discount": np.float32(0.9 * ~ends)}


if __name__ == "__main__":
    step = sc.compile(pipeline(), mesh=jax.make_mesh((len(jax.devices()),), ("data",)))
    state = step.init(init(jax.random.key(0)))
    for _ in range(10):
        state, metrics = step(state, batch())
        print(f"step {state.step}: loss {metrics['loss']:.4f}")
