"""Faults while a program runs, and while one is built: 24, 43 to 49."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from faults.plan import FaultPlan, Remembering, absurd, batch_of, by_a_plain_loop, digest, fresh, loss, step

import stepc as sc

fault = pytest.mark.fault
NUM = 9
ALL = list(range(1, NUM + 1))


def run_with(plan: FaultPlan, **options: Any) -> sc.Run:
    return sc.run(plan, fresh(), plan.batches(NUM), **options)


KINDS = {"device": sc.DeviceError, "callback": sc.DeviceError, "flip": sc.NonFiniteError}
WINDOWS, STEPS = (0, 1, 2, 4, 8), (1, 2, 5, 8, 9)  # 8 is right before a save
MENDING = [
    ("device", sc.Retry(2, wait_seconds=0)),
    ("device", sc.Rollback(1, data="replay")),
    ("callback", sc.Retry(2, wait_seconds=0)),
    ("callback", sc.Rollback(1, data="replay")),
    ("flip", sc.Rollback(1, data="replay")),
]


def saved_at_eight(at: int, folder: Any) -> Any:
    return sc.Checkpoints(folder, every=8) if at == 8 else None


@fault(
    "44",
    "late want of memory, a callback that raises, NaN; windows 0, 1, 2, 4, 8 × steps 1, 2, 5, 8, 9",
    "75 of 75 known by their own step; step 8 is to be saved, and is not",
)
@fault("46", "the same in the very last step", "raised from `run`")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("at", STEPS)
def test_late_fault_is_known_by_its_own_step(kind: str, window: int, at: int, tmp_path: Any) -> None:
    texts = {"device": "RESOURCE_EXHAUSTED", "callback": "does not like this number", "flip": "every number is finite"}
    with pytest.raises(KINDS[kind], match=texts[kind]) as raised:
        run_with(FaultPlan({at: kind}), buffers=sc.Buffers(window), checkpoint=saved_at_eight(at, tmp_path))
    assert (raised.value.step, raised.value.state_ok) == (at, False)
    assert raised.value.run.state is None
    assert not (tmp_path / "8").exists()


@fault("44", "the same 75, policies retry and rollback with replay", "made again from a snapshot, bitwise, 125 of 125")
@pytest.mark.parametrize("kind, policy", MENDING)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("at", STEPS)
def test_late_fault_is_made_good_bitwise(kind: str, policy: Any, window: int, at: int) -> None:
    logger, name = Remembering(), "nonfinite" if kind == "flip" else "device"
    run = run_with(
        FaultPlan({at: kind}),
        buffers=sc.Buffers(window, snapshot_every=4),
        on_error={name: policy},
        loggers=[logger],
        log_every=1,
    )
    assert digest(run.state) == digest(by_a_plain_loop(ALL))
    assert (run.steps, run.failures) == (NUM, {name: 1})
    losses: dict[int, float] = {}
    for number, metrics in logger.told:
        assert losses.setdefault(number, metrics["loss"]) == metrics["loss"]
    assert sorted(losses) == ALL


@fault("44", "two late faults in flight at once, policy skip", "both left out, bitwise")
@pytest.mark.parametrize("window", [0, 2, 8])
def test_two_late_faults_are_both_left_out(window: int) -> None:
    plan = FaultPlan({4: "device_always", 5: "device_always"})
    run = run_with(plan, buffers=sc.Buffers(window, snapshot_every=3), on_error="skip")
    assert digest(run.state) == digest(by_a_plain_loop([1, 2, 3, 6, 7, 8, 9]))
    assert (run.skipped, run.steps) == (2, NUM)


@fault("44", "a late fault in the step before a checkpoint", "it is not saved; the checkpoint before it stays")
def test_late_fault_is_never_saved(tmp_path: Any) -> None:
    with pytest.raises(sc.DeviceError):
        run_with(
            FaultPlan({6: "device"}), buffers=sc.Buffers(in_flight=8), checkpoint=sc.Checkpoints(tmp_path, every=3)
        )
    assert {one.name for one in tmp_path.iterdir() if one.name.isdecimal()} == {"3"}


@fault("47", "a fault that comes again each time, policy retry", "given up after as many times as are allowed")
def test_fault_that_stays_is_given_up() -> None:
    plan = FaultPlan({5: "device_always"})
    with pytest.raises(sc.DeviceError) as raised:
        run_with(plan, on_error={"device": sc.Retry(3, wait_seconds=0)}, buffers=sc.Buffers(snapshot_every=2))
    assert plan.happened[5] == 4
    assert raised.value.step == 5
    assert digest(raised.value.run.state) == digest(by_a_plain_loop([1, 2, 3, 4]))


def calling_back(callback: Callable[[int], object]) -> sc.Step:
    """A step whose program calls the host with the number of its batch."""

    def check(numbers: np.ndarray) -> np.ndarray:
        callback(int(numbers[0]))
        return np.float32(0)

    def calling(params: Any, batch: Any) -> jax.Array:
        zero = jax.pure_callback(check, jax.ShapeDtypeStruct((), jnp.float32), batch["n"])
        return loss(params, batch) + jax.lax.stop_gradient(zero)

    return sc.compile(sc.update(optax.sgd(0.1)) @ sc.grad(calling))


@fault("43", "a host callback that raises", "DeviceError of its step with the original text; the state is lost")
def test_callback_that_raises_is_a_device_error() -> None:
    def raises(number: int) -> None:
        if number == 5:
            raise ValueError("boom in the callback")

    calling = calling_back(raises)
    with pytest.raises(sc.DeviceError, match="boom in the callback") as raised:
        sc.run(calling, calling.init({"w": np.zeros(3, np.float32)}), FaultPlan().batches(NUM))
    assert (raised.value.step, raised.value.state_ok) == (5, False)


@fault("24", "StopIteration raised by the step", "BuildError, not an end of the data; the state is alive")
def test_stop_iteration_of_the_step_is_no_end() -> None:
    def stopping(state: Any, batch: Any) -> Any:
        if int(batch["n"][0]) == 3:
            raise StopIteration
        return step()(state, batch)

    with pytest.raises(sc.BuildError) as raised:
        sc.run(stopping, fresh(), FaultPlan().batches(NUM))
    assert (raised.value.step, raised.value.state_ok) == (3, True)
    assert digest(raised.value.run.state) == digest(by_a_plain_loop([1, 2]))


@fault("45", "a program that cannot be compiled or traced", "BuildError; the state is alive, no policy goes on")
@pytest.mark.parametrize("on_error", ["raise", "skip", "rollback"])
def test_step_that_cannot_be_built_is_a_build_error(on_error: str) -> None:
    plan = FaultPlan({4: "call"})
    with pytest.raises(sc.BuildError, match="does not like this batch") as raised:
        run_with(plan, on_error=on_error)
    assert (raised.value.step, raised.value.state_ok) == (4, True)
    assert digest(raised.value.run.state) == digest(by_a_plain_loop([1, 2, 3]))


def wanting(params: Any, batch: Any) -> jax.Array:
    """A loss that needs 64 TiB."""
    many = jax.lax.iota(jnp.float32, 2**44) * jax.lax.stop_gradient(params["w"][0])
    return loss(params, batch) + jnp.sort(many).max()


@fault("45", "a program that needs 64 TiB", "BuildError before it runs: bytes needed and there; the state is alive")
@pytest.mark.parametrize("on_error", ["raise", "rollback"])
def test_step_that_no_device_can_hold_is_refused_before_it_runs(on_error: str) -> None:
    large = sc.compile(sc.update(optax.sgd(0.1)) @ sc.grad(wanting))
    state = large.init({"w": np.zeros(3, np.float32)})
    with pytest.raises(sc.BuildError, match=r"needs [\d.]+ [TG]B on one device; cpu:0 has [\d.]+ GB") as raised:
        sc.run(large, state, FaultPlan().batches(3), on_error=on_error)
    assert (raised.value.step, raised.value.state_ok) == (1, True)
    assert digest(raised.value.run.state) == digest(state)


@fault("48", "an evaluation and a hook that raise", "StepError of that phase; the state is intact, bitwise")
@pytest.mark.parametrize("phase", ["eval", "hook"])
def test_failure_between_steps_leaves_the_state(phase: str) -> None:
    def fails(*about: Any) -> Any:
        raise ValueError("not today")

    options: dict[str, Any] = {"eval": sc.Eval(4, fails, [batch_of(1)])} if phase == "eval" else {"hooks": [(4, fails)]}
    with pytest.raises(sc.StepError) as raised:
        run_with(FaultPlan(), **options)
    assert (raised.value.phase, raised.value.step, raised.value.state_ok) == (phase, 4, True)
    assert digest(raised.value.run.state) == digest(by_a_plain_loop([1, 2, 3, 4]))


@fault("48", "memory that is not there, in the evaluation", 'StepError of phase "eval"; the state is intact')
def test_late_fault_of_the_evaluation_is_its_own() -> None:
    with pytest.raises(sc.StepError) as raised:
        run_with(FaultPlan(), eval=sc.Eval(4, lambda state, batch: {"late": absurd(jnp.float32(1))}, [batch_of(1)]))
    assert raised.value.phase == "eval"
    assert digest(raised.value.run.state) == digest(by_a_plain_loop([1, 2, 3, 4]))
