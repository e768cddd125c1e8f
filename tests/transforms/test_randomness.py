"""A key per row depends on nothing but the seed, the step and the row."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import mesh_of

import stepc as sc

DATA = sc.shard(sc.dp("data"))
ROWS = 32


def masks(params: Any, rows: Any, keys: Any) -> jax.Array:
    """A loss whose gradient is the dropout masks themselves, row by row."""
    drawn = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (7,)))(keys)
    return jnp.mean(jnp.sum(params[rows["number"]] * drawn, axis=1))


def mask_of_a_call(params: Any, rows: Any, key: Any) -> jax.Array:
    drawn = jax.random.bernoulli(key, 0.5, (rows["number"].shape[0], 7))
    return jnp.mean(jnp.sum(params[rows["number"]] * drawn, axis=1))


def dropped(params: Any, rows: Any, keys: Any) -> jax.Array:
    """A small network with dropout inside."""
    hidden = jnp.tanh(jnp.matmul(rows["x"], params["in"]))
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 0.9, hidden.shape[1:]))(keys)
    return jnp.mean(jnp.square(jnp.matmul(hidden * kept / 0.9, params["out"])[:, 0] - rows["x"][:, 0]))


def drawn(source: sc.Transform, k: int, devices: int, *, steps: int = 1, seed: int = 0) -> np.ndarray:
    pipeline = sc.update(optax.trace(0.0)) @ sc.accumulate(k) @ DATA @ source
    step = sc.compile(pipeline, mesh=mesh_of(data=devices))
    state = step.init(np.zeros((ROWS, 7), np.float32), seed=seed)
    for _ in range(steps):
        state, _ = step(state, {"number": np.arange(ROWS)})
    return np.asarray(state.opt_state.trace) * ROWS


@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize("k", [1, 4])
def test_masks_are_the_same_bits_on_every_mesh_and_for_every_k(k: int, devices: int) -> None:
    source = sc.grad(masks, rng="example")
    found = drawn(source, k, devices)
    assert set(np.unique(found)) == {0.0, 1.0}
    assert np.array_equal(found, drawn(source, 1, 1))


def test_masks_differ_between_rows_steps_and_seeds() -> None:
    source = sc.grad(masks, rng="example")
    first = drawn(source, 1, 1)
    assert len(np.unique(first, axis=0)) > ROWS // 2
    assert not np.array_equal(first, drawn(source, 1, 1, steps=2))
    assert not np.array_equal(first, drawn(source, 1, 1, seed=1))
    assert np.array_equal(first, drawn(source, 1, 1))


@pytest.mark.parametrize(("k", "devices"), [(4, 1), (1, 2), (4, 8)])
def test_step_with_dropout_gives_the_same_parameters_on_every_mesh(k: int, devices: int) -> None:
    random = np.random.default_rng(0)
    params = {"in": random.normal(size=(4, 16)), "out": random.normal(size=(16, 1))}
    params = jax.tree.map(np.float32, params)
    batch = {"x": random.normal(size=(64, 4)).astype(np.float32)}

    def trained(k: int, devices: int) -> Any:
        pipeline = sc.update(optax.sgd(0.1)) @ sc.accumulate(k) @ DATA @ sc.grad(dropped, rng="example")
        step = sc.compile(pipeline, mesh=mesh_of(data=devices))
        return jax.device_get(step(step.init(params), batch)[0].params)

    # Sums in another order.
    chex.assert_trees_all_close(trained(k, devices), trained(1, 1), rtol=0, atol=1e-6)


def test_key_per_microbatch_depends_on_k_and_differs_between_microbatches() -> None:
    source = sc.grad(mask_of_a_call, rng="microbatch")
    one, four = drawn(source, 1, 1), drawn(source, 4, 1)
    assert not np.array_equal(one, four)
    assert not np.array_equal(four[0::4], four[1::4])
    assert np.array_equal(drawn(source, 4, 2), drawn(source, 4, 2))


def test_keys_whose_draws_depend_on_their_neighbours_are_refused_per_row_only() -> None:
    key = jax.random.key(0, impl="rbg")
    step = sc.compile(sc.update(optax.sgd(0.1)) @ sc.grad(mask_of_a_call, rng="microbatch"))
    state, _ = step(step.init(np.zeros((ROWS, 7), np.float32), seed=key), {"number": np.arange(ROWS)})
    assert str(jax.random.key_impl(state.rng)) == "rbg"
    step = sc.compile(sc.update(optax.sgd(0.1)) @ sc.grad(masks, rng="example"))
    with pytest.raises(sc.LossError, match="rbg"):
        step(step.init(np.zeros((ROWS, 7), np.float32), seed=key), {"number": np.arange(ROWS)})


def test_seed_makes_the_same_keys_whatever_jax_is_set_to() -> None:
    step = sc.compile(sc.update(optax.sgd(0.1)) @ sc.grad(masks, rng="example"))
    with jax.default_prng_impl("rbg"):
        state = step.init(np.zeros((ROWS, 7), np.float32), seed=3)
    assert str(jax.random.key_impl(state.rng)) == "fry" or state.rng.dtype == jax.random.key(3).dtype
    after, _ = step(state, {"number": np.arange(ROWS)})
    assert np.array_equal(jax.random.key_data(after.rng), jax.random.key_data(jax.random.key(3)))


def test_noise_is_drawn_once_a_step_and_alike_on_every_device() -> None:
    pipeline = sc.update(optax.trace(0.0)) @ sc.noise(1.0) @ sc.accumulate(4) @ DATA @ sc.grad(masks, rng="example")
    step = sc.compile(pipeline, mesh=mesh_of(data=4))
    state, _ = step(step.init(np.zeros((ROWS, 7), np.float32)), {"number": np.arange(ROWS)})
    noise = np.asarray(state.opt_state.trace) - drawn(sc.grad(masks, rng="example"), 4, 4) / ROWS
    assert 0.8 < noise.std() < 1.2 and abs(noise.mean()) < 0.25
    shards = [np.asarray(shard.data) for shard in state.opt_state.trace.addressable_shards]
    assert all(np.array_equal(shards[0], shard) for shard in shards)
    (row,) = step.lower(state, {"number": np.arange(ROWS)}).compile().collectives()
    assert not row.in_loop
