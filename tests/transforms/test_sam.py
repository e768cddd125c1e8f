"""`sam` by hand: where the gradient is taken, in both orders with a mean, and what is reported."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import mesh_of

import stepc as sc
from stepc._language.transforms.sam import move_along
from stepc.testing import assert_equivalent

RHO, RATE, ROWS = 0.25, 0.5, 16
PARAMS = {"w": jnp.asarray(np.random.default_rng(1).normal(size=(3, 2)), jnp.float32), "b": jnp.zeros(2)}
BATCH = {
    "x": jnp.asarray(np.random.default_rng(2).normal(size=(ROWS, 3)), jnp.float32),
    "y": jnp.asarray(np.random.default_rng(3).normal(size=(ROWS, 2)), jnp.float32),
}


def loss(params: Any, rows: Any) -> jax.Array:
    return jnp.mean((jnp.tanh(rows["x"] @ params["w"] + params["b"][None]) - rows["y"]) ** 2)


def sam_gradient(params: Any, rows: Any, of: Any) -> Any:
    """At the parameters that `of` names: the rows whose gradient they are moved along."""
    grads = jax.grad(loss)(params, of)
    norm = optax.tree.norm(grads)
    return jax.grad(loss)(jax.tree.map(lambda leaf, grad: leaf + RHO * grad / norm, params, grads), rows)


def descended(grads: Any) -> Any:
    return jax.tree.map(lambda leaf, grad: leaf - RATE * grad, PARAMS, grads)


def stepped(middle: Any, *, mesh: Any = None) -> tuple[Any, Any]:
    step = sc.compile(sc.update(optax.sgd(RATE)) @ middle @ sc.grad(loss), mesh=mesh)
    state, metrics = step(step.init(PARAMS), BATCH)
    return jax.device_get((state.params, metrics))


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("devices", [1, 2, 8])
def test_sam_outside_of_the_means_moves_along_the_gradient_of_the_whole_batch(k: int, devices: int) -> None:
    if ROWS % (k * devices):
        pytest.skip("the batch does not divide")
    mesh = mesh_of(data=devices)
    params, metrics = stepped(sc.sam(RHO) @ sc.accumulate(k) @ sc.shard(sc.dp("data")), mesh=mesh)
    expected = descended(sam_gradient(PARAMS, BATCH, of=BATCH))
    chex.assert_trees_all_close(params, expected, rtol=1e-5, atol=1e-6)  # sums in another order
    assert metrics["loss"] == pytest.approx(float(loss(PARAMS, BATCH)), rel=1e-6)  # not that of the moved parameters


def test_sam_inside_of_a_scan_moves_for_each_microbatch() -> None:
    params, metrics = stepped(sc.accumulate(4) @ sc.sam(RHO))
    parts = [jax.tree.map(lambda leaf, j=j: leaf[j::4], BATCH) for j in range(4)]
    each = [sam_gradient(PARAMS, part, of=part) for part in parts]
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 4, *each)
    chex.assert_trees_all_close(params, descended(mean), rtol=1e-5, atol=1e-6)  # sums in another order
    assert metrics["loss"] == pytest.approx(float(loss(PARAMS, BATCH)), rel=1e-6)


def test_sam_inside_of_shard_moves_on_each_device_and_reduces_once() -> None:
    mesh = mesh_of(data=4)
    step = sc.compile(sc.update(optax.sgd(RATE)) @ sc.shard(sc.dp("data")) @ sc.sam(RHO) @ sc.grad(loss), mesh=mesh)
    state = step.init(PARAMS)
    reductions = [one for one in step.lower(state, BATCH).compile().collectives() if one.kind == "all-reduce"]
    assert len(reductions) == 1
    parts = [jax.tree.map(lambda leaf, d=d: leaf[4 * d : 4 * d + 4], BATCH) for d in range(4)]
    each = [sam_gradient(PARAMS, part, of=part) for part in parts]
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 4, *each)
    state, _ = step(state, BATCH)
    chex.assert_trees_all_close(jax.device_get(state.params), descended(mean), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("gather", ["step", "microbatch", "layer"])
@pytest.mark.parametrize("order", ["outside", "inside"])
def test_sam_of_sharded_parameters_equals_its_reference(zero: int, gather: str, order: str) -> None:
    if zero < 3 and gather != "step":
        pytest.skip("parameters are gathered with zero=3 only")
    rules, scan = sc.shard(sc.dp("data", zero=zero, gather=gather)), sc.accumulate(2)
    middle = sc.sam(RHO) @ scan @ rules if order == "outside" else scan @ sc.sam(RHO) @ rules
    step = sc.compile(sc.update(optax.adam(RATE)) @ middle @ sc.grad(loss), mesh=mesh_of(data=2))
    assert_equivalent(step, step.init(PARAMS), BATCH)


def test_sam_equals_that_of_optax_over_two_of_its_steps() -> None:
    params, _ = stepped(sc.sam(RHO))
    tx = optax.contrib.sam(
        optax.sgd(RATE), optax.chain(optax.contrib.normalize(), optax.sgd(RHO)), sync_period=2, opaque_mode=False
    )
    there, opt_state = PARAMS, tx.init(PARAMS)
    for _ in range(2):
        updates, opt_state = tx.update(jax.grad(loss)(there, BATCH), opt_state, there)
        there = optax.apply_updates(there, updates)
    chex.assert_trees_all_close(params, there, rtol=1e-5, atol=1e-6)  # there the parameters are moved forth and back


def test_sam_with_terms_divides_each_gradient_by_the_counts_of_its_own_rows() -> None:
    def token_loss(params: Any, rows: Any) -> Any:
        mask = (rows["x"][:, 0] > 0).astype(jnp.float32)
        each = jnp.mean((jnp.tanh(rows["x"] @ params["w"] + params["b"][None]) - rows["y"]) ** 2, axis=1)
        return sc.Mean(jnp.sum(each * mask), mask.sum()) + 0.5 * sc.Mean(jnp.sum(each**2), ROWS)

    for middle in (sc.sam(RHO) @ sc.accumulate(4), sc.accumulate(4) @ sc.sam(RHO)):
        step = sc.compile(sc.update(optax.sgd(RATE)) @ middle @ sc.grad(token_loss))
        assert_equivalent(step, step.init(PARAMS), BATCH)


@pytest.mark.parametrize("rule", ["sequential", "average"])
@pytest.mark.parametrize(
    "middle",
    [
        sc.sam(RHO),
        sc.sam(RHO) @ sc.shard(sc.dp("data")),
        sc.shard(sc.dp("data")) @ sc.sam(RHO),
        sc.sam(RHO) @ sc.accumulate(1) @ sc.shard(sc.dp("data")),
    ],
    ids=str,
)
def test_sam_keeps_the_model_state_of_the_parameters_themselves(middle: Any, rule: str) -> None:
    def with_state(params: Any, rows: Any, state: Any) -> tuple[jax.Array, Any]:
        hidden = rows["x"] @ params["w"]
        return loss(params, rows), {"mean": 0.5 * state["mean"] + 0.5 * hidden.mean(axis=0)}

    fn = sc.grad(with_state, model_state={"mean": rule})
    step = sc.compile(sc.update(optax.sgd(RATE)) @ middle @ fn, mesh=mesh_of(data=2))
    state, _ = step(step.init(PARAMS, model_state={"mean": jnp.zeros(2)}), BATCH)
    expected = 0.5 * (BATCH["x"] @ PARAMS["w"]).mean(axis=0)
    chex.assert_trees_all_close(jax.device_get(state.model_state), {"mean": expected}, rtol=1e-5, atol=1e-6)


def test_sam_draws_the_same_in_both_passes() -> None:
    def noisy(params: Any, rows: Any, keys: Any) -> jax.Array:
        noise = jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
        return loss(params, {**rows, "x": rows["x"] + noise})

    step = sc.compile(sc.update(optax.sgd(RATE)) @ sc.sam(RHO) @ sc.accumulate(2) @ sc.grad(noisy, rng="example"))
    state = step.init(PARAMS, seed=5)
    assert_equivalent(step, state, BATCH)
    key = jax.random.fold_in(state.rng, 0)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(ROWS))
    noise = jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
    drawn = {**BATCH, "x": BATCH["x"] + noise}
    params = jax.device_get(step(state, BATCH)[0].params)
    chex.assert_trees_all_close(params, descended(sam_gradient(PARAMS, drawn, of=drawn)), rtol=1e-5, atol=1e-6)


def test_gradient_of_zero_moves_nothing_and_one_with_a_nan_makes_all_nan() -> None:
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    chex.assert_trees_all_equal(move_along(PARAMS, zero, RHO), PARAMS)
    nan = move_along(PARAMS, {**zero, "b": jnp.array([np.nan, 0.0])}, RHO)
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(nan))


def test_half_precision_parameters_are_moved_by_a_norm_in_float32() -> None:
    params = {"a": jnp.zeros(1024, jnp.float16)}
    moved = move_along(params, {"a": jnp.full(1024, 256.0, jnp.float16)}, 32.0)  # 256² overflows float16
    assert moved["a"].dtype == jnp.float16
    assert np.array_equal(moved["a"], np.ones(1024, np.float16))


def test_step_that_is_not_finite_is_skipped() -> None:
    step = sc.compile(sc.skip_nonfinite() @ sc.update(optax.sgd(RATE)) @ sc.sam(RHO) @ sc.grad(loss))
    batch = {**BATCH, "x": BATCH["x"].at[3, 0].set(np.nan)}
    state, metrics = step(step.init(PARAMS), batch)
    assert int(metrics["skipped"]) == 1
    chex.assert_trees_all_equal(jax.device_get(state.params), jax.device_get(PARAMS))


@pytest.mark.parametrize("zero", [0, 3])
def test_sam_moves_what_is_trained_alone(zero: int) -> None:
    """The norm is that of the trained leaves, and the frozen ones stay where they are."""
    params = {**PARAMS, "b": jnp.asarray([0.5, -0.25])}
    middle = sc.sam(RHO) @ sc.accumulate(2) @ sc.shard(sc.dp("data", zero=zero))
    step = sc.compile(sc.update(optax.sgd(RATE)) @ middle @ sc.grad(loss, wrt="w"), mesh=mesh_of(data=2))
    state = step.init(params)
    assert_equivalent(step, state, BATCH)
    after = jax.device_get(step(state, BATCH)[0].params)

    def of_w(w: Any) -> jax.Array:
        return loss({**params, "w": w}, BATCH)

    grad = jax.grad(of_w)(params["w"])
    expected = params["w"] - RATE * jax.grad(of_w)(params["w"] + RHO * grad / jnp.linalg.norm(grad))
    chex.assert_trees_all_close(after, {"w": expected, "b": params["b"]}, rtol=1e-5, atol=1e-6)
