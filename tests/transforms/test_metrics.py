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

    step = sc.compile(
        UPDATE @ sc.accumulate(k) @ DATA @ sc.grad(loss, wrt="b", has_aux=True), mesh=mesh_of(data=devices)
    )
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

    step = sc.compile(UPDATE @ sc.accumulate(8) @ sc.grad(loss, wrt="b", has_aux=True))
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

    step = sc.compile(UPDATE @ sc.accumulate(2) @ sc.grad(loss, wrt="b"))
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


def extremes(params: Any, rows: Any) -> tuple[jax.Array, dict[str, Any]]:
    loss = jnp.mean((jnp.matmul(rows["x"], params["w"]) + params["b"]) ** 2)
    return loss, {"max": sc.Max(jnp.max(rows["y"])), "min": sc.Min(jnp.min(rows["y"])), "each": sc.Max(rows["x"][0])}


@pytest.mark.parametrize("bad", [0, 5, 15])
@pytest.mark.parametrize(("k", "devices"), [(1, 1), (2, 1), (1, 4), (2, 4), (1, 8)])
def test_extreme_of_values_with_a_nan_is_nan_on_any_mesh(bad: int, k: int, devices: int) -> None:
    # XLA on CPU drops a NaN from the maximum over devices.
    step = sc.compile(UPDATE @ sc.accumulate(k) @ DATA @ sc.grad(extremes, has_aux=True), mesh=mesh_of(data=devices))
    batch = probe_batch(16)
    state = step.init(probe_params())
    _, expected = step.reference(state, batch)
    state, metrics = step(state, batch)
    for name in ("max", "min", "each"):
        assert np.array_equal(metrics[name], expected[name]), name
    assert (float(metrics["max"]), float(metrics["min"])) == (batch["y"].max(), batch["y"].min())
    batch["y"][bad] = np.nan
    _, metrics = step(state, batch)
    assert np.isnan(metrics["max"]) and np.isnan(metrics["min"])
    assert np.isfinite(metrics["loss"])


def arrays(params: Any, rows: Any) -> tuple[jax.Array, dict[str, Any]]:
    """A metric of every kind, of one and of two axes."""
    error = jnp.matmul(rows["x"], params["w"]) + params["b"] - rows["y"]
    each = error[:, None] * rows["x"]
    metrics = {
        "plain": each.mean(axis=0),
        "mean": sc.Mean(each.sum(axis=0), jnp.sum(rows["y"] > 0)),
        "mean by column": sc.Mean(each.sum(axis=0), jnp.sum(rows["x"] > 0, axis=0)),
        "two means": sc.Mean(each.sum(axis=0), error.size) + 2.0 * sc.Mean(rows["x"].sum(axis=0), error.size),
        "sum": sc.Sum(each.sum(axis=0)),
        "histogram": sc.Sum(jnp.stack([jnp.sum(rows["x"] < 0, axis=0), jnp.sum(rows["x"] >= 0, axis=0)])),
        "max": sc.Max(each.max(axis=0)),
        "min": sc.Min(rows["x"].min(axis=0)),
        "last": sc.Last(each[-1]),
    }
    return jnp.mean(error**2) * 0.5, metrics


@pytest.mark.parametrize(("k", "devices"), [(1, 1), (4, 1), (1, 4), (4, 8), (2, 2)])
@pytest.mark.parametrize("rows", [False, True])
def test_metrics_of_any_shape_are_reduced_as_declared(k: int, devices: int, rows: bool) -> None:
    batch, params = probe_batch(64), probe_params()
    source = sc.rows() @ sc.grad(arrays, has_aux=True) if rows else sc.grad(arrays, has_aux=True)
    step = sc.compile(UPDATE @ sc.clip(1.0) @ sc.accumulate(k) @ DATA @ source, mesh=mesh_of(data=devices))
    state = step.init(params)
    _, by_reference = step.reference(state, batch)
    _, metrics = step(state, batch)
    error = batch["x"] @ params["w"] + params["b"] - batch["y"]
    each, last = error[:, None] * batch["x"], np.arange(64).reshape(devices, -1)[-1][k - 1 :: k][-1]
    expected = {
        "plain": each.mean(axis=0),
        "mean": each.sum(axis=0) / (batch["y"] > 0).sum(),
        "mean by column": each.sum(axis=0) / (batch["x"] > 0).sum(axis=0),
        "two means": each.mean(axis=0) + 2 * batch["x"].mean(axis=0),
        "sum": each.sum(axis=0),
        "histogram": np.stack([(batch["x"] < 0).sum(axis=0), (batch["x"] >= 0).sum(axis=0)]),
        "max": each.max(axis=0),
        "min": batch["x"].min(axis=0),
        "last": each[last],
    }
    for name, value in expected.items():
        # Sums of whole numbers are exact; a division by 30 may be a multiplication by its reciprocal.
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(by_reference[name], value, rtol=1e-6, err_msg=name)
