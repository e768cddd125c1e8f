"""`skip_nonfinite`: a step that is not finite leaves every bit of the state as it was, and the report says where."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from catalogue import probe_batch, probe_params
from conftest import mesh_of

import stepc as sc
from stepc._language.state import key_data
from stepc.testing.probes import drawing, over_rows

DATA = sc.shard(sc.dp("data"))
ADAM = sc.update(optax.adam(optax.cosine_decay_schedule(1e-2, 20)))
BAD, STEPS = 7, 20
PIPELINES = {
    "plain": (sc.skip_nonfinite() @ ADAM @ sc.grad(over_rows), 1),
    "accumulate": (sc.skip_nonfinite() @ ADAM @ sc.clip(1.0) @ sc.accumulate(4) @ sc.grad(over_rows), 1),
    "mesh": (sc.skip_nonfinite() @ ADAM @ sc.clip(1.0) @ sc.accumulate(4) @ DATA @ sc.grad(over_rows), 8),
    "loss_scale": (sc.skip_nonfinite() @ ADAM @ sc.loss_scale() @ sc.accumulate(2) @ sc.grad(over_rows), 1),
    "ema_outside": (sc.ema(0.9) @ sc.skip_nonfinite() @ ADAM @ sc.accumulate(2) @ DATA @ sc.grad(over_rows), 2),
    "ema_inside": (sc.skip_nonfinite() @ sc.ema(0.9) @ ADAM @ sc.accumulate(2) @ DATA @ sc.grad(over_rows), 2),
    "dropout": (sc.skip_nonfinite() @ ADAM @ sc.accumulate(2) @ DATA @ sc.grad(drawing, rng="example"), 2),
}


def poisoned(row: int = 37, *, num_rows: int = 64) -> dict[str, np.ndarray]:
    """A batch with one NaN, in one row."""
    batch = probe_batch(num_rows, seed=BAD)
    batch["x"][row, 1] = np.nan
    return batch


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(key_data(leaf)).tobytes() for leaf in jax.tree.leaves(tree)]


def without_counts(state: sc.State) -> list[bytes]:
    slots = {name: slot for name, slot in state.slots.items() if name != "skip_nonfinite"}
    return bits((state.params, state.opt_state, state.step, state.rng, state.model_state, slots))


@pytest.mark.parametrize("name", PIPELINES)
def test_nan_in_one_row_of_step_seven_changes_no_bit_of_the_run_without_it(name: str) -> None:
    pipeline, devices = PIPELINES[name]
    step = sc.compile(pipeline, mesh=mesh_of(data=devices))
    states = []
    for with_bad in (True, False):
        state = step.init(probe_params(), seed=1)
        for number in range(1, STEPS + 1):
            if number == BAD:
                if not with_bad:
                    continue
                state, metrics = step(state, poisoned())
                assert int(metrics["skipped"]) == 1
                assert np.isnan(metrics["loss"])
            else:
                state, metrics = step(state, probe_batch(64, seed=number))
                assert int(metrics["skipped"]) == 0
        states.append(state)
    assert without_counts(states[0]) == without_counts(states[1])
    assert int(states[0].slots["skip_nonfinite"].total) == 1
    assert int(states[0].slots["skip_nonfinite"].consecutive) == 0
    assert int(states[0].step) == STEPS - 1
    assert step.traces == 1


def test_step_that_is_skipped_says_which_microbatch_which_device_and_which_leaves() -> None:
    pipeline = sc.skip_nonfinite() @ ADAM @ sc.clip(1.0) @ sc.accumulate(4) @ DATA @ sc.grad(over_rows)
    step = sc.compile(pipeline, mesh=mesh_of(data=8))
    _, _, watch = step.step_with_diagnostics(
        step.init(probe_params()), poisoned(37)
    )  # row 37 is row 5 of 8 on device 4
    assert not bool(watch.finite)
    facts = dict(watch.describe())
    assert facts["microbatches"] == "1 on device 4 (of 4, counted from 0)"
    assert facts["gradient"] == "not finite in b, w (2 of 2 leaves)"
    assert facts["gradient norm"] == "nan"
    _, _, watch = step.step_with_diagnostics(step.init(probe_params()), probe_batch(64))
    assert bool(watch.finite)
    assert dict(watch.describe())["gradient"] == "every leaf is finite"


def test_gradient_that_is_not_finite_where_the_loss_is_names_its_leaf() -> None:
    def loss(params: Any, rows: Any) -> jax.Array:
        return jnp.sqrt(jnp.sum(params["w"] * 0.0)) + jnp.mean(rows["y"]) * params["b"]  # d sqrt(0) is infinite

    step = sc.compile(sc.skip_nonfinite() @ ADAM @ sc.accumulate(2) @ sc.grad(loss))
    before = bits(step.init(probe_params()).params)
    state, metrics, watch = step.step_with_diagnostics(step.init(probe_params()), probe_batch(8))
    assert np.isfinite(metrics["loss"])
    assert int(metrics["skipped"]) == 1
    assert bits(state.params) == before
    assert dict(watch.describe())["microbatches"] == "the loss of each of the 2 is finite"
    assert dict(watch.describe())["gradient"] == "not finite in w (1 of 2 leaves)"


def test_skips_are_counted_in_total_and_in_a_row() -> None:
    step = sc.compile(sc.skip_nonfinite(limit=3) @ ADAM @ sc.grad(over_rows))
    state = step.init(probe_params())
    seen = []
    for bad in (True, True, False, True):
        state, _ = step(state, poisoned() if bad else probe_batch(64))
        seen.append(tuple(map(int, state.slots["skip_nonfinite"])))
    assert seen == [(1, 1), (2, 2), (2, 0), (3, 1)]
    assert step.skip_limit == 3


@pytest.mark.parametrize("devices", [1, 8])
def test_skipping_copies_nothing_and_keeps_every_leaf_donated(devices: int) -> None:
    inner = sc.update(optax.adamw(1e-3)) @ sc.clip(1.0) @ sc.accumulate(4) @ DATA @ sc.grad(over_rows)
    programs = []
    for pipeline in (inner, sc.skip_nonfinite() @ inner):
        step = sc.compile(pipeline, mesh=mesh_of(data=devices))
        programs.append(step.lower(step.init(probe_params()), probe_batch(64)).compile())
    plain, skipping = programs
    assert skipping.hlo().count(" copy(") <= plain.hlo().count(" copy(")
    assert all(leaf.donated and leaf.aliased for leaf in skipping.donated())
    assert [row.bytes for row in skipping.collectives()] == [row.bytes for row in plain.collectives()]


def test_loss_scale_recovers_from_an_overflow_and_ignores_a_bad_batch() -> None:
    def loss(params: Any, rows: Any) -> jax.Array:
        return jnp.mean(rows["x"] @ params["w"]).astype(jnp.float32) + params["b"].astype(jnp.float32)

    pipeline = (
        sc.update(optax.sgd(0.1)) @ sc.loss_scale(initial=2.0**17, interval=3) @ sc.grad(sc.cast(jnp.float16) @ loss)
    )
    for outer in (pipeline, sc.skip_nonfinite() @ pipeline):
        step = sc.compile(outer)
        state = step.init(probe_params())
        batch = {"x": np.ones((8, 3), np.float32)}
        before, scales, used = bits(state.params), [], []
        for number in range(6):
            state, metrics = step(state, batch)
            scales.append(float(state.slots["loss_scale"].scale))
            used.append(float(metrics["loss_scale"]))
            # 2^17 and 2^16 overflow float16 in the backward pass; 2^15 does not.
            assert (bits(state.params) == before) == (number < 2)
        assert used == [2.0**17, 2.0**16, 2.0**15, 2.0**15, 2.0**15, 2.0**16]
        assert scales == [2.0**16, 2.0**15, 2.0**15, 2.0**15, 2.0**16, 2.0**15]
        assert int(state.step) == 3
        bad = {"x": np.full((8, 3), np.nan, np.float32)}
        state, metrics = step(state, bad)
        assert float(state.slots["loss_scale"].scale) == scales[-1]
        assert int(state.step) == 3


def test_loss_scale_saves_gradients_from_underflow() -> None:
    def loss(params: Any, rows: Any) -> jax.Array:
        return jnp.mean((rows["x"] * jnp.asarray(2.0**-14, rows["x"].dtype)) @ params["w"]) * 2.0**-12

    batch, found = {"x": np.ones((8, 3), np.float32)}, []
    source = sc.grad(sc.cast(jnp.float16) @ loss, wrt="w")
    for transforms in (sc.loss_scale() @ source, source):
        step = sc.compile(sc.update(optax.trace(0.0)) @ transforms)
        state, _ = step(step.init(probe_params()), batch)
        found.append(np.asarray(state.opt_state.trace["w"]))
    assert np.array_equal(found[0], np.full(3, 2.0**-26, np.float32))
    assert np.array_equal(found[1], np.zeros(3, np.float32))


def ten(bad: set[int]) -> list[dict[str, np.ndarray]]:
    return [poisoned() if number in bad else probe_batch(64, seed=number) for number in range(1, 11)]


def test_run_without_skip_nonfinite_raises_at_the_step_that_was_not_finite_and_says_where() -> None:
    step = sc.compile(ADAM @ sc.clip(1.0) @ sc.accumulate(4) @ DATA @ sc.grad(over_rows), mesh=mesh_of(data=8))
    with pytest.raises(sc.NonFiniteError) as raised:
        sc.run(step, step.init(probe_params()), ten({4}))
    text = str(raised.value)
    assert raised.value.step == 4
    assert "1 on device 4 (of 4, counted from 0)" in text
    assert "not finite in b, w (2 of 2 leaves)" in text
    assert "loss" in text and "grad_norm" in text


def test_run_counts_skips_and_raises_when_there_are_too_many_in_a_row() -> None:
    step = sc.compile(sc.skip_nonfinite(limit=3) @ ADAM @ sc.accumulate(4) @ sc.grad(over_rows))
    run = sc.run(step, step.init(probe_params()), ten({2, 3, 5}))
    assert (run.ended, run.steps, run.skipped) == ("data", 10, 3)
    assert int(run.state.step) == 7
    with pytest.raises(sc.NonFiniteError, match="fewer than 3 in a row") as raised:
        sc.run(step, step.init(probe_params()), ten({2, 5, 6, 7, 9}))
    assert (raised.value.step, raised.value.state_ok) == (7, True)
    assert int(raised.value.run.state.step) in (4, 5)  # alive, and without any of the bad steps


def test_run_of_repeated_steps_names_the_step_within_its_dispatch() -> None:
    step = sc.compile(sc.repeat(2) @ ADAM @ sc.accumulate(4) @ sc.grad(over_rows))
    batches = ten({6})
    pairs = [jax.tree.map(lambda *x: np.stack(x), *batches[n : n + 2]) for n in range(0, 10, 2)]
    with pytest.raises(sc.NonFiniteError, match="1 \\(of 4") as raised:
        sc.run(step, step.init(probe_params()), pairs)
    assert raised.value.step == 6


def test_run_goes_on_if_only_the_loss_scale_overflowed() -> None:
    def loss(params: Any, rows: Any) -> jax.Array:
        return jnp.mean(rows["x"] @ params["w"]).astype(jnp.float32) + params["b"].astype(jnp.float32)

    step = sc.compile(ADAM @ sc.loss_scale(initial=2.0**17) @ sc.grad(sc.cast(jnp.float16) @ loss))
    run = sc.run(step, step.init(probe_params()), [{"x": np.ones((8, 3), np.float32)}] * 5)
    assert (run.steps, int(run.state.step)) == (5, 3)
