"""`epochs`: minibatches of one batch, shuffled, in one dispatch; the same rows whatever the mesh."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from catalogue import KINDS_OF_SOURCES, fits, probe_batch, probe_model_state, probe_params
from conftest import mesh_of
from jax.sharding import PartitionSpec as P

import stepc as sc
from stepc._compiler import lowering
from stepc._language.semantics import draw_tag
from stepc.testing import assert_equal_trees, assert_equivalent
from stepc.testing.probes import drawing, over_rows

SGD = sc.update(optax.sgd(0.5, momentum=0.5))
DATA = sc.shard(sc.dp("data"))
SOURCES = [name for name, source in KINDS_OF_SOURCES.items() if fits("epochs", source)]


def rows_of_steps(state: sc.State, num_rows: int, n: int, m: int) -> list[np.ndarray]:
    """The rows of each step, by hand."""
    key = jax.random.fold_in(jax.random.fold_in(state.rng, state.step), draw_tag("epochs"))
    orders = [np.asarray(jax.random.permutation(jax.random.fold_in(key, epoch), num_rows)) for epoch in range(n)]
    return [rows for order in orders for rows in np.split(order, m)]


@pytest.mark.parametrize(("devices", "k"), [(1, 1), (1, 8), (2, 3), (2, 4), (4, 2), (8, 1), (8, 3)])
def test_epochs_are_single_steps_on_the_rows_of_each(devices: int, k: int) -> None:
    inner = sc.skip_nonfinite() @ sc.ema(0.5) @ SGD @ sc.accumulate(k) @ DATA @ sc.grad(drawing, rng="example")
    single, together = (
        sc.compile(one, mesh=mesh_of(data=devices)) for one in (inner, sc.epochs(2, minibatches=3) @ inner)
    )
    batch = probe_batch(72)
    batch["y"][5] = np.nan
    state, start, seen = single.init(probe_params(), seed=7), together.init(probe_params(), seed=7), []
    for rows in rows_of_steps(start, 72, 2, 3):
        state, metrics = single(state, jax.tree.map(lambda leaf, rows=rows: leaf[rows], batch))
        seen.append(metrics)
    got, metrics = together(start, batch)
    assert_equal_trees(got, state, tolerance=0.0, of="two epochs in one dispatch and in six")
    expected = jax.tree.map(lambda *values: np.stack(values), *seen)
    assert_equal_trees(metrics, expected, tolerance=0.0, of="the metrics")
    assert sorted(np.asarray(metrics["skipped"])) == [0, 0, 0, 0, 1, 1]  # the row that is not finite, in each epoch
    assert int(got.step) == 4
    assert together.steps_per_call == 6


@pytest.mark.parametrize(("zero", "k"), [(0, 2), (1, 2), (2, 2), (3, 2), (1, 1), (0, 3), (3, 3), (2, 8)])
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_epochs_equal_their_reference(devices: int, zero: int, k: int) -> None:
    inner = SGD @ sc.clip(1.0) @ sc.accumulate(k) @ sc.shard(sc.dp("data", zero=zero))
    step = sc.compile(sc.epochs(3, minibatches=2) @ inner @ sc.grad(drawing, rng="example"), mesh=mesh_of(data=devices))
    assert_equivalent(step, step.init(probe_params(), seed=devices), probe_batch(2 * 8 * k))


@pytest.mark.parametrize("source", SOURCES)
def test_epochs_of_every_probe_equal_their_reference(source: str) -> None:
    grad = KINDS_OF_SOURCES[source]
    step = sc.compile(sc.epochs(2, minibatches=2) @ SGD @ sc.accumulate(2) @ DATA @ grad, mesh=mesh_of(data=2))
    state = step.init(probe_params(grad), model_state=probe_model_state(grad, 32))
    assert_equivalent(step, state, probe_batch(32), tolerance=1e-4)  # a mean of counts that are no powers of two


def test_each_epoch_takes_every_row_once_in_an_order_of_its_own() -> None:
    def loss(params: Any, rows: Any) -> tuple[jax.Array, Any]:
        taken = jnp.zeros(12).at[rows["number"]].add(1.0)
        return jnp.sum(params["w"] * taken) / 3, {"taken": taken}

    step = sc.compile(sc.epochs(3, minibatches=4) @ sc.update(optax.sgd(0.0)) @ sc.grad(loss, has_aux=True))
    state, first = step(step.init({"w": np.ones(12, np.float32)}), {"number": np.arange(12)})
    _, second = step(state, {"number": np.arange(12)})
    taken = np.concatenate([first["taken"], second["taken"]]).reshape(6, 4, 12)
    assert (taken.sum(axis=1) == 1).all()
    assert len({epoch.tobytes() for epoch in taken}) == 6  # no two of 6 of 12! / 3!^4 ways to deal them out


def matches(params: Any, rows: Any) -> tuple[jax.Array, Any]:
    """Whether each leaf still has what belongs to the number of its row."""
    number = rows["number"]
    drawn = jax.vmap(lambda key: jax.random.bits(key, dtype=jnp.uint32))(rows["key"])
    same = {
        "flag": rows["flag"] == (number % 3 == 0),
        "half": jax.lax.bitcast_convert_type(rows["half"], jnp.uint16) == rows["bits"],
        "small": rows["small"] == (number % 100).astype(jnp.int8)[:, None],
        "wave": rows["wave"].imag == number.astype(jnp.float32),
        "key": drawn == rows["drawn"],
    }
    return params["w"] * number.mean(), {name: sc.Sum(jnp.sum(one)) for name, one in same.items()}


@pytest.mark.parametrize("devices", [1, 8])
def test_rows_keep_their_bits_in_every_dtype(devices: int) -> None:
    number = np.arange(32)
    keys = jax.vmap(jax.random.key)(number)
    half = jnp.where(number % 2, jnp.nan, -0.0).astype(jnp.bfloat16)
    batch = {
        "number": number, "flag": number % 3 == 0, "half": half, "key": keys,
        "bits": np.asarray(half).view(np.uint16), "small": np.stack([number % 100] * 5, axis=1).astype(np.int8),
        "wave": (1 + 1j * number).astype(np.complex64),
        "drawn": jax.vmap(lambda key: jax.random.bits(key, dtype=jnp.uint32))(keys),
    }  # fmt: skip
    pipeline = sc.epochs(2, minibatches=2) @ SGD @ DATA @ sc.grad(matches, has_aux=True)
    step = sc.compile(pipeline, mesh=mesh_of(data=devices))
    _, metrics = step(step.init({"w": np.float32(1.0)}), batch)
    for name in ("flag", "half", "small", "wave", "key"):
        assert np.asarray(metrics[name]).max() == (80 if name == "small" else 16), name
        assert np.asarray(metrics[name]).min() == (80 if name == "small" else 16), name


def wide(params: Any, rows: Any) -> jax.Array:
    return jnp.mean((rows["x"] @ params["w"] - rows["y"]) ** 2)


def wide_batch(num_rows: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {
        "x": draw.normal(size=(num_rows, 64)).astype(np.float32),
        "y": draw.normal(size=num_rows).astype(np.float32),
    }


@pytest.mark.parametrize("devices", [1, 8])
def test_epochs_hold_one_minibatch_besides_the_batch(devices: int) -> None:
    step = sc.compile(sc.epochs(4, minibatches=8) @ SGD @ DATA @ sc.grad(wide), mesh=mesh_of(data=devices))
    batch = wide_batch(8192)
    program = step.lower(step.init({"w": np.zeros(64, np.float32)}), batch).compile()
    minibatch = sum(leaf.nbytes for leaf in batch.values()) // 8
    order = 8192 * 4
    # On a mesh a minibatch is held as it is sent, as it is received and, an eighth of it, as it is taken; sorting keys
    # and row numbers takes four arrays like `order`.
    assert program.memory().temporaries < (2.2 if devices > 1 else 1.1) * minibatch + 5 * order
    assert all(leaf.donated and leaf.aliased for leaf in program.donated())


def test_plan_says_what_the_shuffle_costs_and_the_executable_agrees() -> None:
    step = sc.compile(sc.epochs(2, minibatches=4) @ SGD @ sc.accumulate(2) @ DATA @ sc.grad(wide), mesh=mesh_of(data=8))
    state, batch = step.init({"w": np.zeros(64, np.float32)}), wide_batch(256)
    lowered = step.lower(state, batch)
    (planned,) = [one for one in lowered.plan.collectives if one.kind == "all-to-all"]
    assert (planned.executions, planned.per, planned.in_loop, planned.axes) == (8, "dispatch", True, ("data",))
    rows = [one for one in lowered.compile().collectives() if one.kind == "all-to-all"]
    assert {(one.executions, one.axes) for one in rows} == {(8, ("data",))}
    assert all("epochs(2, minibatches=4)" in one.source for one in rows)
    sent = sum(one.bytes for one in rows)
    assert sent == 64 * 65 * 4  # a minibatch: 64 rows of 65 numbers
    assert any(f"{sent:,} B" in note for note in lowered.plan.notes)
    lowered.compile().check(sc.Budget(gradient_reductions=8))


@pytest.mark.parametrize("mode", ["manual", "auto"])
def test_rows_are_exchanged_among_devices_that_shard_columns_too(mode: str) -> None:
    rules = sc.dp(("replica", "data"), batch={"x": P(("replica", "data"), "model")})
    mesh = mesh_of(data=2, model=2, replica=2)
    inner = SGD @ sc.accumulate(2) @ sc.shard(rules, mode=mode) @ sc.grad(wide)
    step = sc.compile(sc.epochs(2, minibatches=2) @ inner, mesh=mesh)
    assert_equivalent(step, step.init({"w": np.zeros(64, np.float32)}), wide_batch(64))


def unshuffled(instruction: Any, batch: Any, numbers: jax.Array, region: Any) -> Any:
    return lowering_take_rows(instruction, batch, jnp.sort(numbers), region)


def of_the_first(instruction: Any, batch: Any, numbers: jax.Array, region: Any) -> Any:
    return lowering_take_rows(instruction, batch, numbers * 0 + numbers[0], region)


def of_neighbours(instruction: Any, batch: Any, numbers: jax.Array, region: Any) -> Any:
    return lowering_take_rows(instruction, batch, jnp.roll(numbers, 1), region)


lowering_take_rows = lowering.take_rows


@pytest.mark.parametrize("wrong", [unshuffled, of_the_first, of_neighbours])
def test_wrong_rows_are_caught(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering, "take_rows", wrong)
    pipeline = sc.epochs(2, minibatches=2) @ SGD @ sc.accumulate(2) @ DATA @ KINDS_OF_SOURCES["every_probe"]
    step = sc.compile(pipeline, mesh=mesh_of(data=2))
    with pytest.raises(sc.EquivalenceError):
        assert_equivalent(step, step.init(probe_params()), probe_batch(32))


def test_function_of_epochs_is_their_call_also_under_vmap() -> None:
    step = sc.compile(sc.epochs(2, minibatches=2) @ SGD @ DATA @ sc.grad(over_rows), mesh=mesh_of(data=2))
    states = [step.init(probe_params(), seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    after, _ = jax.jit(jax.vmap(step.function, in_axes=(0, None)))(stacked, probe_batch(32))
    for number, state in enumerate(states):
        expected, _ = step(state, probe_batch(32))
        got = jax.tree.map(lambda leaf, number=number: leaf[number], after)
        assert_equal_trees(got.params, expected.params, tolerance=1e-6, of="a member")  # sums in another order


class Kept:
    """A logger that keeps the losses by step."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}

    def log(self, metrics: dict[str, float], step: int) -> None:
        if "loss" in metrics:
            self.losses[step] = metrics["loss"]


def test_run_logs_each_step_and_resumes_between_dispatches(tmp_path: Path) -> None:
    pipeline = sc.epochs(2, minibatches=2) @ SGD @ sc.accumulate(2) @ sc.grad(drawing, rng="example")
    batches = [probe_batch(16, seed=number) for number in range(4)]

    def run(steps: int, batches: list[Any], saved: str) -> tuple[sc.State, dict[int, float]]:
        step, kept = sc.compile(pipeline), Kept()
        checkpoint = sc.Checkpoints(tmp_path / saved, every=4)
        done = sc.run(
            step, step.init(probe_params()), batches, steps=steps, log_every=1, checkpoint=checkpoint, loggers=[kept]
        )
        return done.state, kept.losses

    whole, losses = run(16, batches, "whole")
    _, first = run(8, batches[:2], "parts")
    resumed, second = run(16, batches[2:], "parts")  # a list has no position to come back to
    assert_equal_trees(resumed, whole, tolerance=0.0, of="a run and one that was resumed")
    assert list(losses) == list(range(1, 17))
    assert losses == {**first, **second}


def test_report_of_a_step_that_is_not_finite_counts_the_numbers_of_the_whole_batch() -> None:
    step = sc.compile(sc.epochs(2, minibatches=2) @ SGD @ sc.grad(over_rows))
    batch = probe_batch(8)
    batch["y"][3] = np.nan
    with pytest.raises(sc.NonFiniteError) as caught:
        sc.run(step, step.init(probe_params()), [batch])
    assert "1 of 8 numbers are not finite in y" in str(caught.value)
    assert caught.value.step in (1, 2)


def test_short_rollout_is_padded() -> None:
    def masked(params: Any, rows: Any) -> sc.Mean:
        error = rows["x"] @ params["w"] + params["b"] - rows["y"]
        return sc.Mean(jnp.sum(rows["mask"] * error**2), jnp.sum(rows["mask"]))

    step = sc.compile(sc.epochs(2, minibatches=2) @ SGD @ sc.grad(masked))
    batches = [{**probe_batch(rows), "mask": np.ones(rows, np.float32)} for rows in (8, 5)]
    done = sc.run(step, step.init(probe_params()), sc.Data(batches, short_batches="pad"))
    assert done.steps == 8
    assert step.traces == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(done.state.params))


def test_memory_of_epochs_counts_the_rows_of_a_minibatch() -> None:
    step = sc.compile(sc.epochs(2, minibatches=4) @ SGD @ sc.accumulate(memory="1GiB") @ sc.grad(over_rows))
    search = step.lower(step.init(probe_params()), probe_batch(32)).plan.search
    assert search is not None
    assert search.counts == (1, 2, 4, 8)


def test_single_repeat_takes_a_leading_axis() -> None:
    step = sc.compile(sc.repeat(1) @ SGD @ DATA @ sc.grad(over_rows), mesh=mesh_of(data=2))
    batch = jax.tree.map(lambda leaf: leaf[None], probe_batch(16))
    assert step.rows_axis == 1
    assert_equivalent(step, step.init(probe_params()), batch)


def test_split_invariance_of_epochs_measures_the_whole_batch() -> None:
    step = sc.compile(sc.epochs(2, minibatches=2) @ SGD @ sc.accumulate(2) @ sc.grad(over_rows))
    sc.testing.assert_split_invariant(step, replace(step.init(probe_params())), probe_batch(16))
