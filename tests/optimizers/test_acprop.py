"""`optax.contrib.acprop` may differ from the hand-written loop by 1e-3. That is rounding, and here is why.

It divides by the root of what it estimated one step before, (g - m)². Where that gradient nearly cancels, it is mostly
rounding, and the next step is divided by rounding: sums in another order give another step.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import stepc as sc

OPTIMIZER = optax.contrib.acprop(1e-2)
NUM_ROWS = 32


def loss(params: Any, rows: Any) -> jax.Array:
    """Its gradient is the mean of the rows."""
    return jnp.mean(jnp.matmul(rows, params))


def batches(dtype: type) -> list[np.ndarray]:
    """In the first batch one column nearly cancels: its mean is 1e-6 of what it is added up from."""
    random = np.random.default_rng(0)
    first, second, third = random.uniform(0.5, 1, (3, NUM_ROWS, 4))
    first[NUM_ROWS // 2 :, 0] = 1e-6 - first[: NUM_ROWS // 2, 0]
    return [one.astype(dtype) for one in (first, second, third)]


def by_hand(batches: list[np.ndarray]) -> np.ndarray:
    params = jnp.zeros(4, batches[0].dtype)
    opt_state = OPTIMIZER.init(params)
    for batch in batches:
        updates, opt_state = OPTIMIZER.update(jax.grad(loss)(params, batch), opt_state, params)
        params = optax.apply_updates(params, updates)
    return np.asarray(params)


def by_step(batches: list[np.ndarray]) -> np.ndarray:
    step = sc.compile(sc.update(OPTIMIZER) @ sc.accumulate(4) @ sc.grad(loss))
    state = step.init(np.zeros(4, batches[0].dtype))
    for batch in batches:
        state, _ = step(state, batch)
    return np.asarray(state.params)


def difference(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.abs(one - other) / np.abs(other)


def test_only_what_cancels_differs() -> None:
    found = difference(by_step(batches(np.float32)), by_hand(batches(np.float32)))
    assert found[0] > 1e-4
    assert found[1:].max() < 1e-5


def test_the_loop_by_hand_differs_as_much_from_itself_with_the_rows_in_another_order() -> None:
    rows = batches(np.float32)
    assert difference(by_hand([one[::-1] for one in rows]), by_hand(rows))[0] > 1e-4


def test_in_double_precision_nothing_differs() -> None:
    with jax.enable_x64(True):
        found = difference(by_step(batches(np.float64)), by_hand(batches(np.float64)))
    assert found.max() < 1e-9
