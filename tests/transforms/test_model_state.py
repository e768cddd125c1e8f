"""Model state: sequential over microbatches, averaged over mesh axes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from catalogue import probe_batch, probe_params
from conftest import mesh_of

import stepc as sc
from stepc.testing import assert_equivalent

UPDATE = sc.update(optax.sgd(0.1))
DATA = sc.shard(sc.dp("data"))


def statistics(params: Any, rows: Any, model_state: Any) -> tuple[jax.Array, dict[str, Any], Any]:
    """A moving average as batch normalisation keeps it, and the number of its updates."""
    error = jnp.matmul(rows["x"], params["w"]) + params["b"] - rows["y"]
    model_state = {"mean": 0.5 * model_state["mean"] + 0.5 * jnp.mean(rows["y"]), "number": model_state["number"] + 1}
    return jnp.mean(error**2), {"seen": sc.Last(model_state["mean"])}, model_state


GRAD = sc.grad(statistics, has_aux=True, model_state=True)
FRESH = {"mean": np.zeros((), np.float32), "number": np.zeros((), np.int32)}


def model_state_after(pipeline: sc.Pipeline, devices: int, batch: Any) -> Any:
    step = sc.compile(pipeline, mesh=mesh_of(data=devices))
    state, _ = step(step.init(probe_params(), model_state=FRESH), batch)
    return jax.device_get(state.model_state)


def test_model_state_passes_through_microbatches_in_order() -> None:
    batch, mean = probe_batch(16), 0.0
    for j in range(4):
        mean = 0.5 * mean + 0.5 * batch["y"][j::4].mean()
    found = model_state_after(UPDATE @ sc.accumulate(4) @ GRAD, 1, batch)
    assert (found["mean"], found["number"]) == (np.float32(mean), 4)


@pytest.mark.parametrize("inside", [True, False])
def test_model_state_is_averaged_over_devices_where_the_axis_is_named(inside: bool) -> None:
    pipeline = UPDATE @ sc.accumulate(2) @ DATA @ GRAD if inside else UPDATE @ DATA @ sc.accumulate(2) @ GRAD
    found = model_state_after(pipeline, 4, probe_batch(16))
    assert found["number"] == 2
    parts = probe_batch(16)["y"].reshape(4, 2, 2)  # device, row, microbatch
    # The moving average is linear in what it has seen, so both orders agree.
    assert found["mean"] == np.float32((0.25 * parts[:, :, 0].mean(axis=1) + 0.5 * parts[:, :, 1].mean(axis=1)).mean())
    step = sc.compile(pipeline, mesh=mesh_of(data=4))
    rows = step.lower(step.init(probe_params(), model_state=FRESH), probe_batch(16)).plan.collectives
    assert (
        [(one.executions, one.in_loop) for one in rows] == [(2, True)] * 2 + [(1, False)]
        if inside
        else [(1, False)] * 3
    )


@pytest.mark.parametrize("devices", [1, 2])
def test_steps_with_model_state_equal_their_reference(devices: int) -> None:
    pipeline = UPDATE @ sc.accumulate(2) @ sc.clip(1.0) @ sc.accumulate(2) @ DATA @ GRAD
    step = sc.compile(pipeline, mesh=mesh_of(data=devices))
    state = step.init(probe_params(), model_state=FRESH)
    for number in range(3):
        assert_equivalent(step, state, probe_batch(16, seed=number))
        state, _ = step(state, probe_batch(16, seed=number))
    assert step.traces == 1
    assert int(state.model_state["number"]) == 12
