"""`clip` against optax and by hand: the ladder cannot see that a definition itself is wrong."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import mesh_of

import stepc as sc
from stepc._language.transforms.clip import clip_to_norm

GRADS = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}  # norm 5


def test_clip_above_the_norm_changes_nothing() -> None:
    clipped, added = clip_to_norm(GRADS, 5.0)
    assert added["grad_norm"] == 5.0
    chex.assert_trees_all_equal(clipped, GRADS)


def test_clip_below_the_norm_scales_to_it() -> None:
    clipped, added = clip_to_norm(GRADS, 2.5)
    assert added["grad_norm"] == 5.0
    chex.assert_trees_all_equal(clipped, {"a": jnp.array([1.5, 0.0]), "b": jnp.array([[2.0]])})


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 5.0, 100.0])
def test_clip_agrees_with_optax(max_norm: float) -> None:
    tx = optax.clip_by_global_norm(max_norm)
    expected, _ = tx.update(GRADS, tx.init(GRADS))
    clipped, _ = clip_to_norm(GRADS, max_norm)
    # The two divide and multiply in another order: one rounding apart.
    chex.assert_trees_all_close(clipped, expected, rtol=1e-6)


def test_clip_of_half_precision_takes_its_sum_of_squares_in_float32() -> None:
    grads = {"a": jnp.full((1024,), 256.0, jnp.float16)}  # 256² overflows float16
    clipped, added = clip_to_norm(grads, 1.0)
    assert added["grad_norm"] == 8192.0
    assert clipped["a"].dtype == jnp.float16
    assert np.array_equal(clipped["a"], np.full(1024, 1 / 32, np.float16))


def test_clip_of_zero_is_zero_and_of_nan_is_nan() -> None:
    zero, added = clip_to_norm({"a": jnp.zeros(2)}, 1.0)
    assert added["grad_norm"] == 0.0
    assert np.array_equal(zero["a"], [0.0, 0.0])
    nan, _ = clip_to_norm({"a": jnp.array([np.nan, 1.0]), "b": jnp.ones(1)}, 1.0)
    assert np.isnan(nan["a"]).all()
    assert np.isnan(nan["b"]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])  # the square of the last is infinite
def test_clip_with_zero_drops_a_gradient_whose_norm_is_not_finite(bad: float) -> None:
    zero, added = clip_to_norm({"a": jnp.array([bad, 1.0]), "b": jnp.ones(1)}, 1.0, "zero")
    assert np.array_equal(zero["a"], [0.0, 0.0])
    assert np.array_equal(zero["b"], [0.0])
    assert not np.isfinite(added["grad_norm"])


@pytest.mark.parametrize("k", [1, 2])
def test_row_with_a_nan_moves_a_private_mean_by_at_most_its_bound(k: int) -> None:
    def loss(params: dict[str, jax.Array], rows: dict[str, jax.Array]) -> jax.Array:
        return jnp.mean(rows["x"] @ params["w"])

    batch = {"x": np.tile(np.array([3.0, 4.0], np.float32), (8, 1))}  # the gradient of each row is [3, 4], its norm 5
    batch["x"][5, 1] = np.nan
    inner = sc.accumulate(k) @ sc.shard(sc.dp("data")) @ sc.rows() @ sc.clip(1.0, nonfinite="zero") @ sc.grad(loss)
    step = sc.compile(sc.update(optax.sgd(1.0)) @ inner, mesh=mesh_of(data=2))
    state = step.init({"w": np.zeros(2, np.float32)})
    expected, _ = step.reference(state, batch)
    state, _ = step(state, batch)
    # Seven rows of [0.6, 0.8] and one of zeros. A float32 quotient is rounded once, and seven of them are added.
    np.testing.assert_allclose(state.params["w"], -7 / 8 * np.array([0.6, 0.8]), rtol=1e-6)
    np.testing.assert_allclose(expected.params["w"], state.params["w"], rtol=1e-6)


def test_skip_nonfinite_makes_the_step_whose_gradient_zero_mended() -> None:
    def loss(params: dict[str, jax.Array], rows: dict[str, jax.Array]) -> jax.Array:
        return jnp.mean(rows["x"] * jnp.sqrt(jnp.abs(params["w"])))  # its derivative at 0 is not finite

    inner = sc.update(optax.sgd(1.0)) @ sc.clip(1.0, nonfinite="zero") @ sc.grad(loss)
    step = sc.compile(sc.skip_nonfinite() @ inner)
    state = step.init({"w": np.float32(0.0)})
    expected, _ = step.reference(state, {"x": np.ones(4, np.float32)})
    state, metrics = step(state, {"x": np.ones(4, np.float32)})
    assert int(metrics["skipped"]) == 0
    assert int(state.step) == int(expected.step) == 1
    assert float(state.params["w"]) == 0.0
