"""`update` is optax's own step, extra args included, and a step and its reference agree on `init`."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from catalogue import PROBES, probe_batch, probe_params

import stepc as sc
from stepc.testing import assert_equal_trees

LOSS = PROBES["over_rows"]


def by_hand(optimizer: optax.GradientTransformation) -> Any:
    params, batch = jax.tree.map(jnp.asarray, (probe_params(), probe_batch(8)))
    value, grads = jax.value_and_grad(LOSS)(params, batch)
    tx = optax.with_extra_args_support(optimizer)
    updates, opt_state = tx.update(grads, tx.init(params), params, value=value, grad=grads)
    return optax.apply_updates(params, updates), opt_state


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(0.5, momentum=0.9),
        optax.adamw(1e-2),
        optax.contrib.reduce_on_plateau(),
        optax.polyak_sgd(),
        optax.lion(1e-3),
    ],
)
def test_update_is_the_step_of_optax(optimizer: optax.GradientTransformation) -> None:
    step = sc.compile(sc.update(optimizer) @ sc.grad(LOSS))
    state, _ = step(step.init(probe_params()), probe_batch(8))
    # One fused program rounds in another way than single operations.
    assert_equal_trees((state.params, state.opt_state), by_hand(optimizer), tolerance=1e-6, of="stepc and optax")


@pytest.mark.parametrize("seed", [0, 7, 2**40, -1])
def test_init_of_a_step_and_of_its_reference_agree(seed: int) -> None:
    step = sc.compile(sc.update(optax.adam(1e-3)) @ sc.grad(LOSS))
    params = jax.tree.map(jnp.asarray, probe_params())
    assert_equal_trees(
        step.init(params, seed=seed), step.reference.init(params, seed=seed), tolerance=0.0, of="two inits"
    )
    assert step.init(params, seed=seed).rng == jax.random.key(seed)
