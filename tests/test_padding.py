"""`pad_batch`: a padded batch gives the gradient of its real rows."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from catalogue import probe_batch, probe_params
from conftest import mesh_of

import stepc as sc


def masked(params: Any, rows: Any) -> sc.Mean:
    error = jnp.matmul(rows["x"], params["w"]) + params["b"] - rows["y"]
    return sc.Mean(jnp.sum(error**2 * rows["mask"]), jnp.sum(rows["mask"]))


def test_padded_batch_is_the_same_program_and_the_exact_gradient() -> None:
    pipeline = sc.update(optax.trace(0.0)) @ sc.accumulate(4) @ sc.shard(sc.dp("data")) @ sc.grad(masked)
    step = sc.compile(pipeline, mesh=mesh_of(data=4))
    for num_rows in (32, 13, 1):
        state = step.init(probe_params())
        short = probe_batch(num_rows, seed=num_rows)
        batch, mask = sc.pad_batch(short, 32)
        state, metrics = step(state, {**batch, "mask": mask})
        expected, grads = jax.value_and_grad(
            lambda params, short=short: jnp.mean((short["x"] @ params["w"] + params["b"] - short["y"]) ** 2)
        )(probe_params())
        assert abs(float(metrics["loss"] - expected)) <= 2e-6 * float(expected)
        assert np.abs(state.opt_state.trace["w"] - grads["w"]).max() <= 2e-6 * np.abs(grads["w"]).max()
    assert step.traces == 1
    assert mask.sum() == 1
