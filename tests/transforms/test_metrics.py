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


@pytest.mark.parametrize(("k", "devices"), [(4, 1), (1, 4), (4, 2)])
@pytest.mark.parametrize(
    ("dtype", "each"),
    [(np.int32, 2**30 + 3), (np.int32, -(2**30) - 3), (np.int32, 2**26 + 7), (np.uint32, 2**29 + 5), (np.uint8, 200)],
    ids=str,
)
def test_sum_of_whole_numbers_is_exact_and_ends_at_the_largest_instead_of_wrapping(
    dtype: type[np.integer], each: int, k: int, devices: int
) -> None:
    """Four of 2**30 were 0."""

    def loss(params: Any, rows: Any) -> tuple[jax.Array, dict[str, Any]]:
        number = jnp.asarray(each, dtype)
        return jnp.mean(rows["y"] * params["b"]), {"sum": sc.Sum(number), "max": sc.Max(number)}

    step = sc.compile(UPDATE @ sc.accumulate(k) @ DATA @ sc.grad(loss, has_aux=True), mesh=mesh_of(data=devices))
    batch = probe_batch(16)
    state = step.init(probe_params())
    limits = np.iinfo(np.uint32 if dtype is np.uint32 else np.int32)
    for metrics in (step.reference(state, batch)[1], step(state, batch)[1]):
        assert int(metrics["sum"]) == min(max(k * devices * each, limits.min), limits.max)
        assert metrics["sum"].dtype == limits.dtype
        assert int(metrics["max"]) == each


def test_sums_of_whole_numbers_of_both_signs_are_exact_where_they_overflow_on_the_way() -> None:
    def loss(params: Any, rows: Any) -> tuple[jax.Array, dict[str, Any]]:
        return jnp.mean(rows["y"] * params["b"]), {"sum": sc.Sum((rows["y"][0] * 2**30).astype(jnp.int32))}

    step = sc.compile(UPDATE @ sc.accumulate(8) @ sc.grad(loss, has_aux=True))
    batch = {**probe_batch(8), "y": np.array([1, 1, 1, 1, -1, -1, -1, 1], np.float32)}  # 4, then 1, then 2 times 2**30
    state = step.init(probe_params())
    for metrics in (step.reference(state, batch)[1], step(state, batch)[1]):
        assert int(metrics["sum"]) == 2**31 - 1
    batch["y"][-1] = 0.0
    for metrics in (step.reference(step.init(probe_params()), batch)[1], step(step.init(probe_params()), batch)[1]):
        assert int(metrics["sum"]) == 2**30


def test_counts_are_exact_to_two_to_the_twenty_fourth_and_rounded_beyond() -> None:
    """Counts share the reduction of the gradient, in float32: one part in 2**24 for each addition, never stuck."""

    def loss(params: Any, rows: Any) -> sc.Mean:
        count = rows["y"].sum().astype(jnp.int32)
        return sc.Mean(params["b"] * count.astype(jnp.float32), count)

    step = sc.compile(UPDATE @ sc.accumulate(2) @ sc.grad(loss))
    for each, tolerance in [(2.0**23, 0.0), (2.0**23 + 1, 2.0**-23), (2.0**28 + 96, 2.0**-23)]:
        batch = {**probe_batch(2), "y": np.array([each, each - 1 if tolerance else each], np.float32)}
        state = step.init({"w": np.zeros(3, np.float32), "b": np.array(3.0, np.float32)})
        for metrics in (step.reference(state, batch)[1], step(state, batch)[1]):
            assert abs(float(metrics["loss"]) - 3.0) <= 3.0 * tolerance


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
