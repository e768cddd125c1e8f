"""Numbers that are not finite: 34 to 41."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from faults.plan import FaultPlan, Remembering, batch_of, by_a_plain_loop, digest, fresh, loss, step

import stepc as sc

fault = pytest.mark.fault


def run_with(faults: dict[int, str], num: int = 12, **options: Any) -> sc.Run:
    plan = FaultPlan(faults)
    return sc.run(step(), fresh(), plan.batches(num), **options)


@fault("34", "NaN in the batch of step 4, policy raise", "NonFiniteError of step 4, not 5; logged once, before")
@pytest.mark.parametrize("window", [0, 1, 2, 8])
def test_nan_is_raised_by_its_own_step(window: int) -> None:
    logger = Remembering()
    with pytest.raises(sc.NonFiniteError) as raised:
        run_with({4: "nan"}, buffers=sc.Buffers(in_flight=window), loggers=[logger], log_every=1)
    error = raised.value
    assert (error.step, error.phase, error.state_ok) == (4, "wait", False)
    assert re.search("loss +nan", str(error))
    assert re.search("microbatches +0 ", str(error))
    assert re.search("gradient +not finite in w", str(error))
    assert logger.names().count("failure") == 1
    assert [number for number, _ in logger.told] == [1, 2, 3]


@fault("35", "a loss that overflows to infinity", "NonFiniteError of that step")
def test_infinity_is_not_finite() -> None:
    huge = batch_of(3)
    huge["y"] = np.full_like(huge["y"], 3e38)
    with pytest.raises(sc.NonFiniteError) as raised:
        sc.run(step(), fresh(), [batch_of(1), batch_of(2), huge, batch_of(4)])
    assert raised.value.step == 3


@fault("36", "NaN in two batches, policy skip", "the state of a run without them, bitwise; both counted")
@pytest.mark.parametrize("window", [0, 2, 5])
@pytest.mark.parametrize("snapshot_every", [1, 3, 10])
def test_skip_nan_equals_a_run_without_the_batch(window: int, snapshot_every: int) -> None:
    logger = Remembering()
    run = run_with(
        {4: "nan", 9: "nan"},
        on_error={"nonfinite": sc.Skip(limit=1)},
        buffers=sc.Buffers(window, snapshot_every),
        loggers=[logger],
        log_every=1,
    )
    assert digest(run.state) == digest(by_a_plain_loop([1, 2, 3, 5, 6, 7, 8, 10, 11, 12]))
    assert (run.steps, run.skipped, run.failures) == (12, 2, {"nonfinite": 2})
    assert [number for number, _ in logger.told] == [1, 2, 3, 5, 6, 7, 8, 10, 11, 12]


@fault("37", "three NaN in a row with Skip(limit=2)", "NonFiniteError of the third, which says so")
def test_skip_more_in_a_row_than_its_limit_raises() -> None:
    with pytest.raises(sc.NonFiniteError) as raised:
        run_with({3: "nan", 5: "nan", 6: "nan", 7: "nan"}, on_error={"nonfinite": sc.Skip(limit=2)})
    assert raised.value.step == 7
    assert raised.value.__notes__ == ["stepc: 3 in a row are more than Skip(limit=2, ratio=None) allows"]


@fault("37", "three NaN of ten with Skip(ratio=0.02)", "NonFiniteError of the third, which says so")
def test_skip_more_than_its_ratio_raises() -> None:
    with pytest.raises(sc.NonFiniteError) as raised:
        run_with({3: "nan", 5: "nan", 8: "nan"}, on_error={"nonfinite": sc.Skip(ratio=0.02)})
    assert raised.value.step == 8
    assert "3 of the last 100" in raised.value.__notes__[0]


@fault("38", 'NaN at step 8, Rollback(data="skip") to a snapshot', "the batches since are dropped; bitwise so")
@pytest.mark.parametrize("window", [0, 2])
def test_rollback_skips_the_batches_since_the_snapshot(window: int) -> None:
    run = run_with({8: "nan"}, on_error={"nonfinite": sc.Rollback()}, buffers=sc.Buffers(window, snapshot_every=3))
    assert digest(run.state) == digest(by_a_plain_loop([1, 2, 3, 4, 5, 6, 9, 10, 11, 12]))
    assert (run.steps, run.rollbacks, run.failures) == (10, 1, {"nonfinite": 1})


@fault("38", "a fault after as many rollbacks as are allowed", "the fault is raised")
def test_rollback_beyond_its_limit_raises() -> None:
    with pytest.raises(sc.NonFiniteError) as raised:
        run_with(
            {4: "nan", 8: "nan"}, on_error={"nonfinite": sc.Rollback(limit=1)}, buffers=sc.Buffers(snapshot_every=2)
        )
    assert "is used up" in raised.value.__notes__[0]


@fault("39", 'the same NaN again under Rollback(data="replay")', "NonFiniteError at the second, called deterministic")
def test_replay_of_a_nan_is_called_deterministic() -> None:
    with pytest.raises(sc.NonFiniteError) as raised:
        run_with({5: "nan"}, on_error={"nonfinite": sc.Rollback(limit=9, data="replay")})
    assert raised.value.step == 5
    assert raised.value.__notes__ == ["stepc: deterministic: the same step failed twice"]


def skipping(limit: int) -> sc.Step:
    optimizer = sc.update(optax.adam(0.05)) @ sc.clip(10.0)
    return sc.compile(sc.skip_nonfinite(limit=limit) @ optimizer @ sc.grad(loss))


@fault("36", "a step that skips NaN in the program", "counted, the state bitwise that of a run without the batches")
def test_step_that_skips_is_counted() -> None:
    made = skipping(3)
    start = made.init({"w": np.zeros(3, np.float32)}, seed=7)
    run = sc.run(made, start, FaultPlan({4: "nan", 5: "nan"}).batches(8))
    assert (run.steps, run.skipped, run.failures) == (8, 2, {})
    without = sc.run(made, start, [batch_of(number) for number in (1, 2, 3, 6, 7, 8)])
    assert digest(run.state.params) == digest(without.state.params)
    assert digest(run.state.opt_state) == digest(without.state.opt_state)


@fault("37", "as many skips in the program, in a row, as skip_nonfinite allows", "NonFiniteError; the state is intact")
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_step_that_skips_too_often_raises(on_error: str) -> None:
    made = skipping(2)
    start = made.init({"w": np.zeros(3, np.float32)}, seed=7)
    with pytest.raises(sc.NonFiniteError, match="nor was the one before it: skip_nonfinite") as raised:
        sc.run(made, start, FaultPlan({4: "nan", 6: "nan", 7: "nan"}).batches(9), on_error=on_error)
    assert (raised.value.step, raised.value.state_ok) == (7, True)


def rooted(params: Any, batch: Any) -> jax.Array:
    """A finite loss whose gradient is infinite where a batch is zero."""
    return jnp.sqrt(jnp.abs(batch["x"] @ params["w"]).sum()) + 0 * jnp.mean(batch["y"])


@fault("35", "a gradient that is not finite under a finite loss", "named by its leaf")
def test_gradient_that_is_not_finite_is_named() -> None:
    made = sc.compile(sc.update(optax.sgd(0.01)) @ sc.grad(rooted))
    batches = [batch_of(number) for number in range(1, 10)]
    batches[3]["x"] = np.zeros_like(batches[3]["x"])
    with pytest.raises(sc.NonFiniteError) as raised:
        sc.run(made, made.init({"w": np.ones(3, np.float32)}), batches)
    assert raised.value.step == 4
    assert "loss           0.0" in str(raised.value)
    assert "gradient       not finite in w (1 of 1 leaves)" in str(raised.value)


@fault("41", "NaN at the step that is to be saved", "nothing that is not finite is saved; the one before stays")
def test_step_that_is_not_finite_is_never_saved(tmp_path: Any) -> None:
    with pytest.raises(sc.NonFiniteError):
        run_with({6: "nan"}, checkpoint=sc.Checkpoints(tmp_path, every=2))
    assert {one.name for one in tmp_path.iterdir() if one.name.isdecimal()} == {"2", "4"}


def test_step_that_repeats_logs_each_of_its_steps() -> None:
    twice = sc.compile(sc.repeat(2) @ sc.update(optax.adam(0.05)) @ sc.grad(loss))
    batches = [jax.tree.map(lambda *leaves: np.stack(leaves), batch_of(n), batch_of(n + 1)) for n in (1, 3, 5)]
    logger = Remembering()
    run = sc.run(twice, twice.init({"w": np.zeros(3, np.float32)}), batches, loggers=[logger], log_every=1, steps=6)
    assert [number for number, _ in logger.told] == [1, 2, 3, 4, 5, 6]
    assert run.steps == int(run.state.step) == 6


def test_rollback_that_drops_every_batch_is_a_normal_end() -> None:
    run = run_with({4: "nan"}, num=4, on_error="rollback")
    assert (run.ended, run.steps, digest(run.state)) == ("data", 0, digest(fresh()))


def test_metric_called_skipped_is_the_users_own() -> None:
    def own(state: Any, batch: Any) -> Any:
        state, metrics = step()(state, batch)
        return state, {**metrics, "skipped": metrics["loss"] * 0 + 1}

    with pytest.raises(sc.NonFiniteError) as raised:
        sc.run(own, fresh(), FaultPlan({3: "nan"}).batches(5))
    assert (raised.value.step, raised.value.state_ok) == (3, False)
    fine = sc.run(own, fresh(), FaultPlan().batches(5))
    assert (fine.steps, fine.skipped, fine.metrics["skipped"]) == (5, 0, 1.0)


def test_reference_that_skips_is_believed() -> None:
    skipping = sc.compile(sc.skip_nonfinite() @ sc.update(optax.adam(0.05)) @ sc.grad(loss))
    state = skipping.init({"w": np.zeros(3, np.float32)})
    for one in (skipping, skipping.reference):
        run = sc.run(one, state, FaultPlan({3: "nan"}).batches(5))
        assert (run.steps, run.skipped, np.isfinite(run.state.params["w"]).all()) == (5, 1, True)
