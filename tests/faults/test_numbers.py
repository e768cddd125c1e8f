"""Numbers that are not finite: 34 to 41."""

import re
from typing import Any

import jax
import numpy as np
import pytest
from faults.plan import FaultPlan, Remembering, batch_of, by_a_plain_loop, digest, fresh, step

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


class Skips:
    """A step that leaves the state as it was, as `skip_nonfinite` makes one."""

    def __init__(self, limit: int) -> None:
        self.skip_limit = limit

    def __call__(self, state: Any, batch: Any) -> Any:
        kept = jax.tree.map(jax.numpy.copy, state)
        state, metrics = step()(state, batch)
        is_bad = not np.isfinite(float(metrics["loss"]))
        return (kept if is_bad else state), {**metrics, "skipped": jax.numpy.int32(is_bad)}


@fault("36", "a step that skips NaN in the program", "counted, the state bitwise that of a run without the batches")
def test_step_that_skips_is_counted() -> None:
    run = sc.run(Skips(3), fresh(), FaultPlan({4: "nan", 5: "nan"}).batches(8))
    assert (run.steps, run.skipped, run.failures) == (8, 2, {})
    assert digest(run.state) == digest(by_a_plain_loop([1, 2, 3, 6, 7, 8]))


@fault("37", "as many skips in the program, in a row, as skip_nonfinite allows", "NonFiniteError; the state is intact")
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_step_that_skips_too_often_raises(on_error: str) -> None:
    with pytest.raises(sc.NonFiniteError) as raised:
        sc.run(Skips(2), fresh(), FaultPlan({4: "nan", 6: "nan", 7: "nan"}).batches(9), on_error=on_error)
    assert (raised.value.step, raised.value.state_ok) == (7, True)


class Seeing:
    """A step that says what it saw, as a compiled one does."""

    def __call__(self, state: Any, batch: Any) -> Any:
        raise AssertionError("a step that can be watched is watched")

    def watched(self, state: Any, batch: Any) -> Any:
        state, metrics = step()(state, batch)
        return state, {"loss": jax.numpy.float32(1.0)}, Sight(metrics["grad_norm"])


class Sight:
    def __init__(self, norm: jax.Array) -> None:
        self.finite = jax.numpy.isfinite(norm)

    def describe(self) -> list[tuple[str, str]]:
        return [("gradient", "not finite in w (1 of 1 leaves)")]


@fault("35", "a gradient that is not finite under a finite loss, from a step that is watched", "named by its leaf")
def test_gradient_that_is_not_finite_is_named() -> None:
    with pytest.raises(sc.NonFiniteError) as raised:
        sc.run(Seeing(), fresh(), FaultPlan({4: "nan"}).batches(9))
    assert raised.value.step == 4
    assert "gradient  not finite in w (1 of 1 leaves)" in str(raised.value)


@fault("41", "NaN at the step that is to be saved", "nothing that is not finite is saved; the one before stays")
def test_step_that_is_not_finite_is_never_saved(tmp_path: Any) -> None:
    with pytest.raises(sc.NonFiniteError):
        run_with({6: "nan"}, checkpoint=sc.Checkpoints(tmp_path, every=2))
    assert {one.name for one in tmp_path.iterdir() if one.name.isdecimal()} == {"2", "4"}


def test_step_that_repeats_logs_each_of_its_steps() -> None:
    class Twice:
        steps_per_call = 2

        def __call__(self, state: Any, batch: Any) -> Any:
            state, first = step()(state, batch)
            state, second = step()(state, batch)
            return state, {name: jax.numpy.stack([first[name], second[name]]) for name in first}

    logger = Remembering()
    run = sc.run(Twice(), fresh(), FaultPlan().batches(3), loggers=[logger], log_every=1, steps=6)
    assert [number for number, _ in logger.told] == [1, 2, 3, 4, 5, 6]
    assert run.steps == int(run.state.step) == 6


def test_rollback_that_drops_every_batch_is_a_normal_end() -> None:
    run = run_with({4: "nan"}, num=4, on_error="rollback")
    assert (run.ended, run.steps, digest(run.state)) == ("data", 0, digest(fresh()))
