"""`clip` against optax and by hand: the ladder cannot see that a definition itself is wrong."""

import chex
import jax.numpy as jnp
import numpy as np
import optax
import pytest

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
    nan, _ = clip_to_norm({"a": jnp.array([np.nan, 1.0])}, 1.0)
    assert np.isnan(nan["a"][0])
