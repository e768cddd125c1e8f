"""The loop, with real steps, real signals and real faults. No mocks: a logger that fails is a logger that raises."""

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from catalogue import PROBES, probe_batch, probe_params
from conftest import mesh_of

import stepc as sc
from stepc._runner.pending import PlainStep, as_step
from stepc.testing import assert_equal_trees

PIPELINE = sc.update(optax.adam(1e-2)) @ sc.clip(1.0) @ sc.accumulate(2) @ sc.shard(sc.dp("data"))


class RecordingLogger:
    """A logger that keeps what it gets."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.logged.append((step, dict(metrics)))


class Failing:
    """A logger whose disk is full."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        raise OSError("no space left")


def step_and_state(loss: Any = PROBES["over_rows"]) -> tuple[sc.Step, sc.State]:
    step = sc.compile(PIPELINE @ sc.grad(loss), mesh=mesh_of(data=4))
    return step, step.init(probe_params())


def data(num: int) -> Iterator[dict[str, np.ndarray]]:
    return (probe_batch(16, seed=number) for number in range(num))


def alive(state: sc.State) -> bool:
    return not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_run_makes_the_steps_that_a_loop_makes() -> None:
    step, state = step_and_state()
    run = sc.run(step, state, data(7))
    _, expected = step_and_state()
    for batch in data(7):
        expected, metrics = step(expected, batch)
    assert_equal_trees(run.state, expected, tolerance=0.0, of="run and a loop")
    assert (run.steps, run.ended) == (7, "data")
    assert run.metrics == {name: float(value) for name, value in metrics.items()}


def test_run_stops_after_its_steps_and_takes_no_batch_too_many() -> None:
    step, state = step_and_state()
    batches = data(10)
    run = sc.run(step, state, batches, steps=4)
    assert (run.steps, run.ended) == (4, "steps")
    assert len(list(batches)) == 6


def test_run_runs_a_reference_as_it_runs_a_step() -> None:
    step, state = step_and_state()
    reference = step.reference
    slow = sc.run(reference, reference.init(jax.tree.map(jnp.asarray, probe_params())), data(2))
    fast = sc.run(step, state, data(2))
    assert_equal_trees(fast.state, slow.state, tolerance=1e-5, of="a step and its reference")


def test_compiled_step_is_known_as_one_and_a_function_is_not() -> None:
    step, _ = step_and_state()
    assert as_step(step) is step
    assert isinstance(as_step(step.reference), PlainStep)
    assert isinstance(as_step(lambda state, batch: step(state, batch)), PlainStep)


def test_loggers_get_the_first_every_nth_and_the_last_step() -> None:
    step, state = step_and_state()
    logger = RecordingLogger()
    run = sc.run(step, state, data(11), loggers=[logger], log_every=4)
    assert [number for number, _ in logger.logged] == [1, 4, 8, 11]
    assert logger.logged[-1][1] == run.metrics
    assert all(type(value) is float for _, metrics in logger.logged for value in metrics.values())


def test_last_step_is_logged_once() -> None:
    for steps, logged in ((1, [1]), (4, [1, 4]), (8, [1, 4, 8])):
        step, state = step_and_state()
        logger = RecordingLogger()
        sc.run(step, state, data(steps), loggers=[logger], log_every=4)
        assert [number for number, _ in logger.logged] == logged


def test_failing_logger_never_stops_training_and_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    step, state = step_and_state()
    logger = RecordingLogger()
    run = sc.run(step, state, data(5), loggers=[Failing(), logger], log_every=2)
    assert run.steps == 5
    assert run.logger_failures == {"Failing": 3}
    assert [number for number, _ in logger.logged] == [1, 2, 4, 5]
    assert "logger Failing failed at step 4: OSError: no space left" in caplog.text
    assert "logger Failing failed 3 times in a row and is left alone" in caplog.text


def test_bad_batch_is_logged_and_raised_with_its_number_and_a_live_state(caplog: pytest.LogCaptureFixture) -> None:
    step, state = step_and_state()
    with pytest.raises(sc.StepError) as raised:
        sc.run(step, state, [*data(3), probe_batch(15)])
    error = raised.value
    assert (error.step, error.phase, error.state_ok) == (4, "data", True)
    assert isinstance(error.__cause__, sc.BatchError)
    assert "The data failed before step 4" in caplog.text
    assert error.run.steps == int(error.run.state.step) == 3


def test_failing_data_is_a_data_error_and_not_an_end() -> None:
    def breaks() -> Iterator[Any]:
        yield from data(2)
        raise OSError("the disk is gone")

    step, state = step_and_state()
    with pytest.raises(sc.DataError) as raised:
        sc.run(step, state, breaks())
    assert (raised.value.step, raised.value.phase, raised.value.state_ok) == (3, "data", True)
    assert isinstance(raised.value.__cause__, OSError)


def failing_late(at: int) -> Any:
    """A loss whose program fails while it runs, at a batch that says so."""

    def check(flag: np.ndarray) -> np.ndarray:
        if flag > 0:
            raise ValueError(f"boom at {at}")
        return np.float32(0)

    def loss(params: Any, rows: Any) -> jax.Array:
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        late = jax.pure_callback(check, shape, rows["bad"].max())
        return PROBES["over_rows"](params, rows) + jax.lax.stop_gradient(late)

    return loss


@pytest.mark.parametrize("at", [1, 3, 6])
def test_late_error_is_raised_by_the_number_of_its_own_step(at: int) -> None:
    step = sc.compile(sc.update(optax.sgd(0.1)) @ sc.grad(failing_late(at)))
    batches = [
        {**probe_batch(8), "bad": np.full(8, float(number == at), np.float32)} for number in range(1, 7)
    ]  # fmt: skip
    with pytest.raises(sc.StepError) as raised:
        sc.run(step, step.init(probe_params()), batches)
    assert raised.value.step == at
    assert not raised.value.state_ok
    assert f"boom at {at}" in str(raised.value.__cause__)


class Interrupting(RecordingLogger):
    """A logger that sends this process a real Ctrl-C at some step."""

    def __init__(self, at: int, times: int = 1) -> None:
        super().__init__()
        self.at, self.times = at, times

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        super().log(metrics, step)
        if step == self.at:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)


def test_interrupt_leaves_at_a_step_boundary_with_a_live_state() -> None:
    before = signal.getsignal(signal.SIGINT)
    step, state = step_and_state()
    logger = Interrupting(at=3)
    with pytest.raises(KeyboardInterrupt) as raised:
        sc.run(step, state, data(100), loggers=[logger], log_every=1)
    assert isinstance(raised.value, sc.Interrupted)
    run = raised.value.run
    assert run.ended == "interrupted"
    assert alive(run.state)
    assert int(run.state.step) == run.steps == logger.logged[-1][0]
    assert 3 <= run.steps <= 6  # the steps in flight are finished, no other is begun
    assert signal.getsignal(signal.SIGINT) is before
    state, _ = step(run.state, probe_batch(16))
    assert int(state.step) == run.steps + 1


def test_second_interrupt_acts_at_once() -> None:
    step, state = step_and_state()
    logger = Interrupting(at=3, times=2)
    with pytest.raises(KeyboardInterrupt) as raised:
        sc.run(step, state, data(100), loggers=[logger], log_every=1)
    assert not isinstance(raised.value, sc.Interrupted)
    assert logger.logged[-1][0] == 3


def test_run_in_a_thread_leaves_the_handlers_alone() -> None:
    step, state = step_and_state()
    results: list[sc.Run] = []
    thread = threading.Thread(target=lambda: results.append(sc.run(step, state, data(3))))
    thread.start()
    thread.join()
    assert results[0].steps == 3


def test_at_most_two_steps_are_in_flight() -> None:
    dispatched: list[int] = []
    finished = RecordingLogger()
    step, state = step_and_state()

    def watching(state: sc.State, batch: Any) -> tuple[sc.State, dict[str, Any]]:
        dispatched.append(len(dispatched) + 1)
        done = finished.logged[-1][0] if finished.logged else 0
        assert dispatched[-1] - done <= 3  # two in flight, and the one that is being dispatched
        return step(state, batch)

    assert sc.run(watching, state, data(9), loggers=[finished], log_every=1).steps == 9


@pytest.mark.parametrize("every", [3, 4])
def test_snapshot_waits_for_no_step(every: int) -> None:
    in_flight: list[int] = []
    finished = RecordingLogger()
    step, state = step_and_state()

    def watching(state: sc.State, batch: Any) -> tuple[sc.State, dict[str, Any]]:
        in_flight.append(len(in_flight) - len(finished.logged))
        return step(state, batch)

    buffers = sc.Buffers(in_flight=2, snapshot_every=every)
    sc.run(watching, state, data(9), loggers=[finished], log_every=1, on_error="skip", buffers=buffers)
    assert in_flight == [0, 1, 2, 2, 2, 2, 2, 2, 2]


def test_run_of_one_batch_instead_of_batches_is_refused() -> None:
    """A dict is an iterable, of its keys."""
    step = sc.compile(sc.update(optax.sgd(0.25)) @ sc.grad(PROBES["over_rows"]))
    expected = r"got one batch: a dict of 'x', 'y'\n\n  Put it in a list: `\[batch\]`"
    with pytest.raises(sc.FieldTypeError, match=expected):
        sc.run(step, step.init(probe_params()), {name: probe_batch(8)[name] for name in ("x", "y")})
    with pytest.raises(sc.FieldTypeError, match="expected an iterable of batches"):
        sc.Data({"x": 1})  # pyright: ignore[reportArgumentType]
