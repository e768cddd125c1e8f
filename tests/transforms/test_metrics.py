"""Metrics are reduced over microbatches and devices as declared."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from catalogue import SOURCES, probe_batch, probe_params
from conftest import mesh_of

import stepc as sc

UPDATE = sc.update(optax.sgd(0.5))
DATA = sc.shard(sc.dp("data"))


def expected_metrics(batch: Any, k: int, devices: int) -> dict[str, float]:
    params = probe_params()
    error = batch["x"] @ params["w"] + params["b"] - batch["y"]
    last = np.arange(len(error)).reshape(devices, -1)[-1][k - 1 :: k][-1]  # the last row of the last local microbatch
    return {
        "plain": error.mean(), "mean": error.sum() / (batch["y"] > 0).sum(), "sum": error.sum(),
        "num": (batch["y"] > 0).sum(), "max": error.max(), "min": batch["y"].min(), "last": error[last],
    }  # fmt: skip


@pytest.mark.parametrize(("k", "devices"), [(1, 1), (4, 1), (1, 4), (4, 8), (2, 2)])
def test_metrics_are_reduced_as_declared(k: int, devices: int) -> None:
    batch = probe_batch(64)
    for pipeline in (
        UPDATE @ sc.accumulate(k) @ DATA @ SOURCES["measuring"],
        UPDATE @ sc.accumulate(k) @ sc.clip(1.0) @ DATA @ SOURCES["measuring"],
    ):
        step = sc.compile(pipeline, mesh=mesh_of(data=devices))
        _, metrics = step(step.init(probe_params()), batch)
        for name, value in expected_metrics(batch, k, devices).items():
            assert float(metrics[name]) == np.float32(value), name
        assert metrics["num"].dtype == jnp.int32


def test_sums_share_the_reduction_of_the_gradient_and_extremes_do_not() -> None:
    def loss(params: Any, rows: Any) -> tuple[jax.Array, dict[str, Any]]:
        error = jnp.matmul(rows["x"], params["w"]) + params["b"] - rows["y"]
        sums = {"mean": sc.Mean(jnp.sum(error), jnp.sum(rows["y"] > 0)), "sum": sc.Sum(jnp.sum(error))}
        return jnp.mean(error**2), {**sums, "last": sc.Last(error[-1]), "plain": jnp.mean(error)}

    for source, number in ((sc.grad(loss, has_aux=True), 1), (SOURCES["measuring"], 4)):
        step = sc.compile(UPDATE @ sc.accumulate(4) @ DATA @ source, mesh=mesh_of(data=8))
        lowered = step.lower(step.init(probe_params()), probe_batch(64))
        rows = lowered.compile().collectives()
        # Besides the gradient: a maximum, a minimum, and a sum of integers, which stays an integer.
        assert len(rows) == number
        assert all(not row.in_loop for row in rows)
    assert sum("not a sum in the dtype of the gradient" in one.reason for one in lowered.plan.collectives) == 3
