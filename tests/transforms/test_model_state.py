"""Model state by rules."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from catalogue import SOURCES, probe_batch, probe_model_state, probe_params
from conftest import mesh_of
from flax import linen, nnx

import stepc as sc
from stepc._language.state import is_typed_key, key_data, leaves_by_path
from stepc.errors import EquivalenceError
from stepc.testing import assert_equal_trees, assert_equivalent

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
    assert [(one.executions, one.in_loop) for one in rows] == [(2, True), (1, False)] if inside else [(1, False)] * 2


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


def state_after(
    loss: Any, model_state: Any, *, devices: int, k: int = 1, rules: Any = True, rows: int = 48, **options: Any
) -> tuple[Any, Any]:
    """The model state and the metrics after one step, which equals its reference."""
    pipeline = UPDATE @ sc.accumulate(k) @ sc.shard(sc.dp("data", **options)) @ sc.grad(loss, model_state=rules)
    step = sc.compile(pipeline, mesh=mesh_of(data=devices))
    state = step.init(probe_params(), model_state=model_state)
    assert_equivalent(step, state, probe_batch(rows))
    state, metrics = step(state, probe_batch(rows))
    return jax.device_get(state.model_state), metrics


def value(params: Any, rows: Any) -> jax.Array:
    return jnp.mean((jnp.matmul(rows["x"], params["w"]) + params["b"] - rows["y"]) ** 2)


def unchanged(params: Any, rows: Any, model_state: Any) -> tuple[jax.Array, Any]:
    return value(params, rows), model_state


@pytest.mark.parametrize(("devices", "k"), [(1, 3), (2, 1), (8, 1), (8, 3)])
def test_leaves_handed_through_unchanged_pass_whatever_their_dtype(k: int, devices: int) -> None:
    given = {
        "int8": np.array([100, -100, 64, 7], np.int8),
        "uint8": np.array([200, 255], np.uint8),
        "int16": np.array([20000, -32768], np.int16),
        "int32": np.array([2**29 + 1, 2**31 - 1], np.int32),
        "uint32": np.array([2**32 - 1], np.uint32),
        "bool": np.array([True, False]),
        "float16": np.array([60000.0], np.float16),
        "float32": np.array([3e38, 0.1], np.float32),
    }
    found, _ = state_after(unchanged, given, devices=devices, k=k)
    for name, leaf in given.items():
        assert found[name].dtype == leaf.dtype
        assert np.array_equal(found[name], leaf), name


@pytest.mark.parametrize("devices", [2, 8])
def test_mean_of_large_floats_over_devices_does_not_overflow(devices: int) -> None:
    def loss(params: Any, rows: Any, model_state: Any) -> tuple[jax.Array, Any]:
        nothing = jnp.sum(rows["y"]) * 0.0  # it depends on the rows, so every device has its own
        return value(params, rows), jax.tree.map(lambda leaf: leaf + nothing.astype(leaf.dtype), model_state)

    given = {"half": np.array([60000.0, -65504.0], np.float16), "single": np.array([3e38], np.float32)}
    found, _ = state_after(loss, given, devices=devices)
    assert np.array_equal(found["half"], given["half"])
    np.testing.assert_allclose(found["single"], given["single"], rtol=1e-6)  # three eighths of it are rounded


@pytest.mark.parametrize(("devices", "k", "zero"), [(1, 3, 0), (2, 2, 1), (8, 1, 2), (8, 3, 3)])
def test_rows_keep_their_own_state_whatever_the_split_is(devices: int, k: int, zero: int) -> None:
    def loss(params: Any, rows: Any, model_state: Any) -> tuple[jax.Array, Any]:
        hidden = 0.5 * model_state["hidden"] + rows["x"]
        return value(params, {"x": hidden, "y": rows["y"]}), {"hidden": hidden, "seen": model_state["seen"] + 1}

    given = {"hidden": np.arange(48 * 3, dtype=np.float32).reshape(48, 3), "seen": np.zeros(48, np.int8)}
    found, metrics = state_after(loss, given, devices=devices, k=k, rules={"*": "rows"}, zero=zero)
    assert np.array_equal(found["hidden"], 0.5 * given["hidden"] + probe_batch(48)["x"])
    assert np.array_equal(found["seen"], np.ones(48))
    expected = value(probe_params(), {"x": found["hidden"], "y": probe_batch(48)["y"]})
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)  # the sum is taken in another order


def test_counter_in_a_scan_over_layers_passes_beside_what_depends_on_the_rows() -> None:
    def loss(params: Any, rows: Any, model_state: Any) -> tuple[jax.Array, Any]:
        def layer(x: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
            new = {"count": layer["count"] + 1, "mean": 0.5 * layer["mean"] + 0.5 * jnp.mean(x)}
            return jax.nn.relu(jax.jit(jnp.sin)(x)) - new["mean"], new

        x, model_state = jax.lax.scan(jax.checkpoint(layer), rows["x"], model_state)
        return value(params, {"x": x, "y": rows["y"]}), model_state

    given = {"count": np.array([1, 2], np.int8), "mean": np.zeros(2, np.float32)}
    found, _ = state_after(loss, given, devices=2, k=2, rows=8)
    assert found["count"].tolist() == [3, 4]


def test_leaf_with_as_many_features_as_the_batch_has_rows_is_no_state_by_rows() -> None:
    def loss(params: Any, rows: Any, model_state: Any) -> tuple[jax.Array, Any]:
        return value(params, rows), {"mean": 0.5 * model_state["mean"] + 0.5 * jnp.mean(rows["x"], axis=0)}

    found, _ = state_after(loss, {"mean": np.zeros(3, np.float32)}, devices=1, rows=3)
    np.testing.assert_allclose(found["mean"], 0.5 * probe_batch(3)["x"].mean(axis=0), rtol=1e-6)  # thirds are rounded


def test_error_of_a_loss_passes_through_whatever_the_size_of_its_model_state() -> None:
    def loss(params: Any, rows: Any, model_state: Any) -> tuple[jax.Array, Any]:
        return value(params, {"x": rows["mistyped"], "y": rows["y"]}), model_state

    step = sc.compile(UPDATE @ sc.grad(loss, model_state=True))
    with pytest.raises(KeyError, match="mistyped"):
        step(step.init(probe_params(), model_state={"mean": np.zeros(8, np.float32)}), probe_batch(8))


def test_rows_are_sharded_as_the_batch_is_and_cost_no_collective() -> None:
    pipeline = UPDATE @ sc.accumulate(2) @ DATA @ sc.grad(unchanged, model_state={"hidden": "rows"})
    step = sc.compile(pipeline, mesh=mesh_of(data=4))
    state = step.init(probe_params(), model_state={"hidden": np.zeros((16, 3), np.float32)})
    assert {shard.data.shape for shard in state.model_state["hidden"].addressable_shards} == {(4, 3)}
    assert len(step.lower(state, probe_batch(16)).compile().collectives()) == 1


@pytest.mark.parametrize(("devices", "k"), [(1, 4), (8, 2)])
def test_average_depends_neither_on_k_nor_on_the_mesh(devices: int, k: int) -> None:
    def loss(params: Any, rows: Any, model_state: Any) -> tuple[jax.Array, Any]:
        return value(params, rows), {"code": 0.75 * model_state["code"] + 0.25 * jnp.mean(rows["x"], axis=0)}

    given = {"code": np.array([8.0, -4.0, 0.0], np.float32)}
    found, _ = state_after(loss, given, devices=devices, k=k, rules={"code": "average"}, rows=64)
    assert np.array_equal(found["code"], 0.75 * given["code"] + 0.25 * probe_batch(64)["x"].mean(axis=0))


@pytest.mark.parametrize(("devices", "k"), [(1, 3), (8, 1), (8, 2)])
def test_sum_and_max_count_every_row_once(devices: int, k: int) -> None:
    def loss(params: Any, rows: Any, model_state: Any) -> tuple[jax.Array, Any]:
        counted = jnp.sum(rows["y"] > 0)
        return value(params, rows), {
            "int8": model_state["int8"] + counted.astype(jnp.int8),
            "int32": model_state["int32"] - counted,
            "uint32": model_state["uint32"] + counted.astype(jnp.uint32),
            "half": model_state["half"] + counted.astype(jnp.float16),
            "largest": jnp.maximum(model_state["largest"], jnp.max(jnp.abs(rows["x"]), axis=0)),
            "any": model_state["any"] | jnp.any(rows["x"] > 2, axis=0),
        }

    given = {
        "int8": np.array(-100, np.int8),
        "int32": np.array(2**31 - 1, np.int32),
        "uint32": np.array([2**31 - 3, 65535], np.uint32),
        "half": np.array(2.0, np.float16),
        "largest": np.array([0.0, 2.5, 9.0], np.float32),
        "any": np.array([True, False, False]),
    }
    rules = {"largest": "max", "any": "max", "*": "sum"}
    found, metrics = state_after(loss, given, devices=devices, k=k, rules=rules)
    batch = probe_batch(48)
    number = int((batch["y"] > 0).sum())
    assert found["int8"] == -100 + number
    assert found["int32"] == 2**31 - 1 - number
    assert found["uint32"].tolist() == [2**31 - 3 + number, 65535 + number]
    assert found["half"] == 2 + number
    assert np.array_equal(found["largest"], np.maximum(given["largest"], np.abs(batch["x"]).max(axis=0)))
    assert np.array_equal(found["any"], given["any"] | (batch["x"] > 2).any(axis=0))
    assert np.isfinite(metrics["loss"])


@pytest.mark.parametrize(
    ("dtype", "devices"), [(np.int8, 1), (np.uint8, 8), (np.int16, 8), (np.int32, 8), (np.uint32, 1), (np.float16, 8)]
)
def test_sum_that_does_not_fit_makes_the_step_not_finite(devices: int, dtype: Any) -> None:
    """Each part adds a tenth of what the dtype holds: one part fits, and the sixteen of them do not."""
    largest = float(jnp.finfo(dtype).max) if dtype == np.float16 else np.iinfo(dtype).max

    def loss(params: Any, rows: Any, model_state: Any) -> tuple[jax.Array, Any]:
        return value(params, rows), {"n": model_state["n"] + jnp.asarray(largest // 10, dtype)}

    pipeline = UPDATE @ sc.accumulate(2) @ DATA @ sc.accumulate(8 // devices) @ sc.grad(loss, model_state={"n": "sum"})
    step = sc.compile(sc.skip_nonfinite() @ pipeline, mesh=mesh_of(data=devices))
    state = step.init(probe_params(), model_state={"n": np.array(1, dtype)})
    assert_equivalent(step, state, probe_batch(16))
    state, metrics = step(state, probe_batch(16))
    assert np.isnan(metrics["loss"])
    assert (state.model_state["n"], metrics["skipped"]) == (1, 1)


def test_constant_is_read_and_costs_no_reduction() -> None:
    def loss(params: Any, rows: Any, model_state: Any) -> tuple[jax.Array, Any]:
        return value(params, {**rows, "x": rows["x"] * model_state["basis"].astype(jnp.float32)}), model_state

    pipeline = (
        sc.skip_nonfinite()
        @ UPDATE
        @ sc.accumulate(2)
        @ DATA
        @ sc.grad(sc.cast(jnp.float32) @ sc.remat() @ loss, model_state={"basis": "constant"})
    )
    step = sc.compile(pipeline, mesh=mesh_of(data=4))
    state = step.init(probe_params(), model_state={"basis": np.array([[1, 2, 3]], np.float16)})
    assert_equivalent(step, state, probe_batch(16))
    compiled = step.lower(state, probe_batch(16)).compile()
    assert len(compiled.collectives()) == 1
    assert all(row.aliased for row in compiled.donated() if row.path == "model_state/basis")


def test_key_differs_for_each_part_and_advances_once_a_step() -> None:
    def loss(params: Any, rows: Any, model_state: Any) -> tuple[jax.Array, dict[str, Any], Any]:
        drawn = jax.random.randint(model_state["key"], (), 0, 2**20)
        return value(params, rows), {"drawn": sc.Sum(drawn)}, model_state

    key = jax.random.key(5)
    pipeline = UPDATE @ sc.accumulate(2) @ DATA @ sc.grad(loss, has_aux=True, model_state=True)
    step = sc.compile(pipeline, mesh=mesh_of(data=2))
    state, metrics = step(step.init(probe_params(), model_state={"key": key}), probe_batch(16))
    # Device d begins at row 8 d, and microbatch j at the j-th of its rows.
    places = [0, 1, 8, 9]
    drawn = [int(jax.random.randint(jax.random.fold_in(key, place), (), 0, 2**20)) for place in places]
    assert len(set(drawn)) == 4
    assert int(metrics["drawn"]) == sum(drawn)
    new = state.model_state["key"]
    assert not np.array_equal(jax.random.key_data(new), jax.random.key_data(key))
    _, again = step(state, probe_batch(16))
    assert int(again["drawn"]) != sum(drawn)


OTHERS = {
    "alone": lambda source: sc.accumulate(2) @ DATA @ source,
    "three": lambda source: sc.accumulate(3) @ DATA @ source,
    "zero": lambda source: sc.accumulate(2) @ sc.shard(sc.dp("data", zero=3, gather="microbatch")) @ source,
    "rows": lambda source: sc.accumulate(2) @ DATA @ sc.rows() @ sc.clip(1.0) @ source,
    "clip": lambda source: DATA @ sc.accumulate(2) @ sc.clip(1.0) @ sc.accumulate(2) @ source,
    "loss_scale": lambda source: sc.loss_scale() @ sc.accumulate(2) @ DATA @ source,
    "auto": lambda source: sc.accumulate(2) @ sc.shard(sc.dp("data"), mode="auto") @ source,
}


@pytest.mark.parametrize(
    ("name", "devices"),
    [("alone", 8), ("three", 2), ("zero", 8), ("rows", 2), ("clip", 4), ("clip", 1), ("loss_scale", 2), ("auto", 2)],
)
def test_every_rule_equals_its_reference_among_others(devices: int, name: str) -> None:
    source = SOURCES["recurrent"]
    loss: Any = source.loss.value  # pyright: ignore[reportAttributeAccessIssue]
    source = sc.grad(sc.cast(jnp.float32) @ sc.remat() @ loss, model_state=source.model_state)
    pipeline = sc.repeat(2) @ sc.skip_nonfinite() @ sc.ema(0.5) @ UPDATE @ OTHERS[name](source)
    step = sc.compile(pipeline, mesh=mesh_of(data=devices))
    state = step.init(probe_params(), model_state=probe_model_state(SOURCES["recurrent"], 48))
    batch = jax.tree.map(lambda *leaves: np.stack(leaves), probe_batch(48), probe_batch(48, seed=1))
    # Thirds, and sums in another order; a wrong rule is off by more.
    assert_equivalent(step, state, batch, tolerance=1e-4)
    state, _ = step(state, batch)
    state, _ = step(state, batch)
    assert step.traces == 1


@pytest.mark.parametrize(
    ("leaf", "wrong"),
    [("code", "sequential"), ("largest", "average"), ("tokens", "max"), ("mean", "average"), ("key", "constant")],
)
def test_another_rule_in_the_place_of_one_is_caught(leaf: str, wrong: str) -> None:
    source = SOURCES["recurrent"]
    loss: Any = source.loss.value  # pyright: ignore[reportAttributeAccessIssue]
    right = dict(source.model_state.by_pattern if source.model_state is not None else ())
    results = []
    for rules in (right, {**right, leaf: wrong}):
        step = sc.compile(UPDATE @ sc.accumulate(2) @ DATA @ sc.grad(loss, model_state=rules), mesh=mesh_of(data=2))
        state = step.init(probe_params(), model_state=probe_model_state(source, 16))
        results.append(step(state, probe_batch(16))[0].model_state)
    with pytest.raises(EquivalenceError, match=f"`{leaf}` differs"):
        assert_equal_trees(results[1], results[0], tolerance=1e-5, of="both rules")


def test_state_by_rows_is_saved_and_resumed(tmp_path: Path) -> None:
    source = SOURCES["recurrent"]
    step = sc.compile(UPDATE @ sc.accumulate(2) @ DATA @ source, mesh=mesh_of(data=4))

    def fresh() -> sc.State:
        return step.init(probe_params(), model_state=probe_model_state(source, 16))

    batches = [probe_batch(16, seed=number) for number in range(4)]
    whole = sc.run(step, fresh(), batches)
    keep = sc.Checkpoints(tmp_path, every=1)
    sc.run(step, fresh(), batches[:2], checkpoint=keep)
    resumed = sc.run(step, fresh(), batches[2:], checkpoint=keep)
    assert resumed.steps == 4
    assert_equal_trees(
        resumed.state.model_state, whole.state.model_state, tolerance=0.0, of="a resumed run and a whole"
    )
    assert resumed.state.model_state["hidden"].sharding == fresh().model_state["hidden"].sharding


class Classifier(nnx.Module):
    """Dropout and batch normalisation: the model state is statistics, typed keys, and their counters."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden, self.out = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 1, rngs=rngs)
        self.norm, self.dropout = nnx.BatchNorm(4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        with jax.numpy_rank_promotion("allow"):
            return self.out(self.dropout(nnx.relu(self.norm(self.hidden(x)))))[:, 0]


@pytest.mark.parametrize(("devices", "k"), [(1, 1), (4, 2)])
def test_nnx_with_dropout_and_batch_norm_trains_end_to_end(devices: int, k: int) -> None:
    graph, params, rest = nnx.split(Classifier(nnx.Rngs(0)), nnx.Param, ...)

    def loss(params: Any, rows: Any, rest: Any) -> tuple[jax.Array, Any]:
        model = nnx.merge(graph, params, rest)
        error = jnp.mean((model(rows["x"]) - rows["y"]) ** 2)
        return error, nnx.state(model, nnx.Not(nnx.Param))

    pipeline = sc.update(optax.adam(0.05)) @ sc.accumulate(k) @ DATA @ sc.grad(loss, model_state=True)
    step = sc.compile(pipeline, mesh=mesh_of(data=devices))
    state, batch = step.init(params, model_state=rest), probe_batch(16)
    # Adam divides by roots of small numbers, and a bias before a norm has a gradient that is rounding alone.
    _, rows = step.reference(state, batch)
    before = {path: np.asarray(key_data(leaf)) for path, leaf in leaves_by_path(state.model_state)}
    losses = []
    for _ in range(20):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses[0], rows["loss"], rtol=1e-5)
    after = dict(leaves_by_path(state.model_state))
    assert {path for path, leaf in after.items() if is_typed_key(leaf)} == {path for path in after if "/key/" in path}
    for path, leaf in after.items():
        if is_typed_key(leaf):
            assert not np.array_equal(key_data(leaf), before[path])
        elif "count" in path:
            assert int(leaf) == int(before[path]) + 20 * k  # a draw in each microbatch
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert step.traces == 1


def test_fp8_ranges_are_assigned_the_largest_that_arrives_as_their_gradient() -> None:
    model = linen.Dense(1, dot_general_cls=linen.Fp8DotGeneral)
    variables = model.init(jax.random.key(0), jnp.ones((2, 3)))
    state_of_fp8 = {"_overwrite_with_gradient": variables["_overwrite_with_gradient"]}

    def loss(params: Any, rows: Any, fp8: Any) -> tuple[jax.Array, Any]:
        with jax.numpy_rank_promotion("allow"):
            out = model.apply({"params": params, **fp8}, rows["x"])
        return jnp.mean((jnp.asarray(out)[:, 0] - rows["y"]) ** 2), fp8

    pipeline = sc.update(optax.adamw(0.1)) @ sc.accumulate(2) @ DATA @ sc.grad(loss, model_state=True)
    step = sc.compile(pipeline, mesh=mesh_of(data=2))
    batch = probe_batch(16)
    batch["x"][9, 1] = 5.0  # on one device, in one microbatch
    state = step.init(variables["params"], model_state=state_of_fp8)
    assert_equivalent(step, state, batch, tolerance=1e-5)
    for _ in range(2):
        largest = float(jnp.max(jnp.abs(state.params["kernel"])))
        state, _ = step(state, batch)
    found = {path.rsplit("/", 1)[1]: leaf for path, leaf in leaves_by_path(state.model_state)}
    # The history holds the largest numbers of all rows, and the scale is the largest number over that of the dtype.
    assert found["input_amax_history"].max() == 5.0
    assert found["kernel_amax_history"][0] == largest
    np.testing.assert_allclose(found["input_scale"], [5.0 / 448.0], rtol=1e-6)
    with pytest.raises(sc.ConfigError, match="what arrives as the gradient of these leaves is their next value"):
        step.init(variables, model_state=state_of_fp8)
