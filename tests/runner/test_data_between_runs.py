"""Between runs: an iterator stands where the last finished step leaves it, or the run says what is lost."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults.plan import FaultPlan, Remembering, batch_of, by_a_plain_loop, digest, fresh, iterate, step

import stepc as sc

PREFETCH = pytest.mark.parametrize("prefetch", [0, 1, 4])


def numbers(count: int) -> list[int]:
    return list(range(1, count + 1))


@PREFETCH
@pytest.mark.parametrize("has_position", [True, False])
def test_runs_of_three_steps_on_one_iterator_train_on_every_batch(has_position: bool, prefetch: int) -> None:
    batches = FaultPlan().batches(20)
    data, state, stands, logger = batches if has_position else iterate(batches), fresh(), [], Remembering()
    for steps in (3, 3, 3):
        state = sc.run(step(), state, sc.Data(data, prefetch=prefetch), steps=steps, loggers=[logger]).state
        stands.append(batches.given)
    assert stands == [3, 6, 9]
    assert digest(state) == digest(by_a_plain_loop(numbers(9)))
    assert "batches_lost" not in logger.names()


def ends_by_signal(at: int) -> Any:
    return [(at, lambda *about: os.kill(os.getpid(), signal.SIGTERM))]


def fails(at: int) -> Any:
    def fail(*about: Any) -> None:
        raise OSError("the hook has failed")

    return [(at, fail)]


def ends_early(data: Any, hooks: Any, logger: Any, **options: Any) -> sc.Run:
    with pytest.raises((sc.Preempted, sc.StepError)) as raised:
        sc.run(step(), fresh(), data, hooks=hooks, loggers=[logger], **options)
    run = raised.value.__dict__["run"]
    assert isinstance(run, sc.Run)
    return run


@PREFETCH
@pytest.mark.parametrize("hooks", [ends_by_signal(5), fails(5)], ids=["signal", "error"])
def test_run_that_ends_early_gives_back_what_it_read_ahead(hooks: Any, prefetch: int) -> None:
    batches, logger = FaultPlan().batches(20), Remembering()
    run = ends_early(sc.Data(batches, prefetch=prefetch), hooks, logger)
    assert (run.steps, batches.given) == (5, 5)
    assert "batches_lost" not in logger.names()
    state = sc.run(step(), run.state, sc.Data(batches, prefetch=prefetch)).state
    assert digest(state) == digest(by_a_plain_loop(numbers(20)))


@pytest.mark.parametrize("on_error", ["raise", "retry"])
@PREFETCH
def test_step_that_fails_on_the_device_gives_back_its_batch(prefetch: int, on_error: str) -> None:
    plan = FaultPlan({7: "device_always"})
    batches, policy = plan.batches(20), {"device": sc.Retry(1, wait_seconds=0) if on_error == "retry" else sc.Raise()}
    with pytest.raises(sc.DeviceError) as raised:
        sc.run(
            plan, fresh(), sc.Data(batches, prefetch=prefetch), on_error=policy, buffers=sc.Buffers(snapshot_every=5)
        )
    run = raised.value.run
    assert run is not None and (run.state is None) == (on_error == "raise")
    assert batches.given == run.steps == (6 if on_error == "raise" else 5)
    if run.state is not None:
        plan.faults = {}
        state = sc.run(step(), run.state, batches).state
        assert digest(state) == digest(by_a_plain_loop(numbers(20)))


@PREFETCH
def test_step_that_cannot_be_built_gives_back_its_batch(prefetch: int) -> None:
    plan = FaultPlan({4: "call"})
    batches = plan.batches(8)
    with pytest.raises(sc.BuildError) as raised:
        sc.run(plan, fresh(), sc.Data(batches, prefetch=prefetch))
    assert raised.value.run is not None and (raised.value.run.steps, batches.given) == (3, 3)


@PREFETCH
def test_batch_that_is_refused_is_consumed(prefetch: int) -> None:
    batches = FaultPlan().batches(8)
    bad, read = {**batch_of(3), "y": np.zeros(4)}, batches.plan.batch
    batches.plan.batch = lambda number: bad if number == 3 else read(number)
    with pytest.raises(sc.DataError) as raised:
        sc.run(step(), fresh(), sc.Data(batches, prefetch=prefetch))
    assert raised.value.run is not None and (raised.value.run.steps, batches.given) == (2, 3)
    state = sc.run(step(), raised.value.run.state, sc.Data(batches, prefetch=prefetch)).state
    assert digest(state) == digest(by_a_plain_loop([1, 2, 4, 5, 6, 7, 8]))


class Counting:
    """It counts a batch before it has it, and a signal comes in between, once."""

    def __init__(self) -> None:
        self.given, self.is_due = 0, True

    def __iter__(self) -> "Counting":
        return self

    def __next__(self) -> Any:
        if self.given == 12:
            raise StopIteration
        self.given += 1
        if self.given == 5 and self.is_due:
            self.is_due = False
            os.kill(os.getpid(), signal.SIGTERM)
        return batch_of(self.given)

    def get_state(self) -> dict[str, int]:
        return {"given": self.given}

    def set_state(self, state: dict[str, int]) -> None:
        self.given = state["given"]


@pytest.mark.parametrize("prefetch", [0, 3])
def test_read_that_a_signal_breaks_off_is_repeated(prefetch: int) -> None:
    data = Counting()
    with pytest.raises(sc.Preempted) as raised:
        sc.run(step(), fresh(), sc.Data(data, prefetch=prefetch))
    assert raised.value.run.steps == data.given
    state = sc.run(step(), raised.value.run.state, data).state
    assert digest(state) == digest(by_a_plain_loop(numbers(12)))


@pytest.mark.parametrize("hooks", [ends_by_signal(5), fails(5)], ids=["signal", "error"])
def test_batches_that_a_generator_has_lost_are_counted(hooks: Any) -> None:
    batches, logger = FaultPlan().batches(20), Remembering()
    run = ends_early(sc.Data(iterate(batches), prefetch=4), hooks, logger)
    (lost,) = [(facts, at) for name, facts, at in logger.events if name == "batches_lost"]
    assert lost == ({"batches": str(batches.given - 5), "why": "the data has no `set_state(state)`"}, run.steps)
    assert 5 < batches.given


def test_position_that_is_refused_is_told() -> None:
    batches, logger = FaultPlan().batches(20), Remembering()

    def refuse(state: Any) -> None:
        raise ValueError("closed")

    batches.set_state = refuse
    ends_early(sc.Data(batches, prefetch=4), fails(5), logger)
    (facts,) = [facts for name, facts, _ in logger.events if name == "batches_lost"]
    assert facts["why"] == "`set_state` failed: ValueError: closed"
    assert int(facts["batches"]) == batches.given - 5 > 0


def test_read_that_hangs_is_told() -> None:
    is_free, logger = threading.Event(), Remembering()

    def hangs() -> Iterator[Any]:
        yield from map(batch_of, numbers(3))
        os.kill(os.getpid(), signal.SIGTERM)
        is_free.wait(300)

    ends_early(sc.Data(hangs(), prefetch=4), [], logger)
    is_free.set()
    (facts,) = [facts for name, facts, _ in logger.events if name == "batches_lost"]
    assert facts["why"] == "its read is still running, and gives one more"


def test_data_that_is_read_anew_loses_nothing() -> None:
    logger = Remembering()
    ends_early(sc.Data([batch_of(number) for number in numbers(20)], prefetch=4), fails(5), logger)
    assert "batches_lost" not in logger.names()


@PREFETCH
def test_checkpoint_after_a_batch_that_was_left_out_does_not_read_it_again(prefetch: int, tmp_path: Path) -> None:
    plan = FaultPlan({5: "nan"})
    for steps in (5, 10):
        run = sc.run(
            step(), fresh(), sc.Data(plan.batches(20), prefetch=prefetch), steps=steps, on_error="skip",
            checkpoint=sc.Checkpoints(tmp_path, every=5),
        )  # fmt: skip
    assert digest(run.state) == digest(by_a_plain_loop([1, 2, 3, 4, 6, 7, 8, 9, 10]))
