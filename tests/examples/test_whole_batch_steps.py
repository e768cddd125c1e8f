"""The example steps with a loss of the whole batch, each compared with the same step by hand in plain JAX."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import mesh_of

import stepc as sc
from examples.steps import clip_two_towers, moe


def clip_by_hand(params: Any, rows: Any) -> jax.Array:
    image, text = (jnp.tanh(rows[name] @ params[name]) for name in ("image", "text"))
    image, text = (z / jnp.sqrt(jnp.sum(z * z, axis=1, keepdims=True)) for z in (image, text))
    logits = image @ text.T / jnp.exp(params["log_temperature"])
    right = jnp.diagonal(logits)
    return jnp.mean(jax.nn.logsumexp(logits, axis=0) + jax.nn.logsumexp(logits, axis=1) - 2 * right) / 2


def moe_by_hand(params: Any, rows: Any) -> jax.Array:
    gates = jax.nn.softmax(rows["x"] @ params["router"])
    chosen = jax.nn.one_hot(jnp.argmax(gates, axis=1), moe.EXPERTS)
    predicted = jnp.einsum("ni,eij,ne->nj", rows["x"], params["experts"], gates * chosen)
    balance = moe.EXPERTS * jnp.sum(chosen.mean(axis=0) * gates.mean(axis=0))
    return jnp.mean((predicted - rows["y"]) ** 2) + 0.01 * balance


EXAMPLES: dict[str, tuple[Any, Any]] = {"clip_two_towers": (clip_two_towers, clip_by_hand), "moe": (moe, moe_by_hand)}


@pytest.mark.parametrize(("k", "devices"), [(1, 1), (4, 1), (1, 8), (4, 8)])
@pytest.mark.parametrize("name", EXAMPLES)
def test_example_equals_the_step_of_the_whole_batch_by_hand(name: str, k: int, devices: int) -> None:
    example, loss_by_hand = EXAMPLES[name]
    params, batch = example.init(jax.random.key(0)), example.batch()
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    opt_state = optimizer.init(params)
    step = sc.compile(example.pipeline(k=k), mesh=mesh_of(data=devices))
    state = step.init(params)
    for _ in range(3):
        loss, grads = jax.jit(jax.value_and_grad(loss_by_hand))(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        state, metrics = step(state, batch)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    for (path, got), want in zip(
        jax.tree_util.tree_leaves_with_path(state.params), jax.tree.leaves(params), strict=True
    ):
        # Sums in another order; 4e-7 was seen.
        assert np.max(np.abs(got - want)) <= 1e-6 * np.max(np.abs(want)), path
