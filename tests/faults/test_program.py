"""The step itself and its program: 6 to 9, 12, 40, 42, 49 to 51; NaN that came with the batch: 29."""

import logging
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from faults.plan import FaultPlan, Remembering, batch_of, by_a_plain_loop, digest, fresh, loss, step
from faults.test_device import calling_back
from waiting import LIMIT_SECONDS, eventually

import stepc as sc
from stepc._core.nodes import MapNode
from stepc._language.kinds import Kind
from stepc._runner.watchdog import EXIT_CODE

fault = pytest.mark.fault
PARAMS = {"w": np.zeros(3, np.float32)}


def alive(state: Any) -> bool:
    return not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def widening() -> optax.GradientTransformation:
    """An optimizer whose count is an integer at first, and then a number."""
    return optax.GradientTransformation(
        lambda params: {"count": jnp.zeros((), jnp.int32)},
        lambda grads, state, params: (grads, {"count": state["count"] + 0.5}),
    )


def growing(state: dict[str, Any], batch: Any) -> Any:
    return {"w": jnp.append(state["w"], 0.0)}, {"loss": jnp.float32(0)}


@fault(
    "6", "an optimizer that returns another dtype than it took, found in the trace", "BuildError; the state is alive"
)
@fault("6", "a jitted step of one's own that returns another shape", "BuildError after step 1: path, in, out")
def test_step_that_changes_its_state_is_refused() -> None:
    odd = sc.compile(sc.update(widening()) @ sc.grad(loss))
    with pytest.raises(sc.BuildError, match=r"opt_state/count.*int32.*float32") as raised:
        sc.run(odd, odd.init(PARAMS), FaultPlan().batches(3))
    assert (raised.value.step, raised.value.state_ok) == (1, True)
    assert alive(raised.value.run.state)
    with pytest.raises(sc.BuildError, match=r"w +in float32\[3\], out float32\[4\]") as raised:
        sc.run(jax.jit(growing), {"w": jnp.zeros(3)}, FaultPlan().batches(3))  # pyright: ignore
    assert (raised.value.step, raised.value.state_ok) == (1, True)


def no_gradient(grads: Any) -> Any:
    return None, {}


def a_text(grads: Any) -> Any:
    return "a text"


@dataclass(frozen=True, repr=False)
class Mine(sc.Transform):
    """A transform of the user's own."""

    takes: ClassVar = Kind.GRADIENT
    gives: ClassVar = Kind.GRADIENT
    function: Any

    def __repr__(self) -> str:
        return "mine()"

    def reference(self, inner: Any) -> Any:
        raise AssertionError("only the reference asks for it")

    def expand(self) -> tuple[MapNode, ...]:
        return (MapNode(self.function, (), name="mine", written="mine()"),)


@fault("7", "a transform of one's own that returns None, text, for a gradient", "BuildError; the state is alive")
@pytest.mark.parametrize("function", [no_gradient, a_text])
def test_transform_that_returns_no_gradient_is_refused(function: Any) -> None:
    odd = sc.compile(sc.update(optax.sgd(0.1)) @ Mine(function) @ sc.grad(loss))
    with pytest.raises(sc.BuildError) as raised:
        sc.run(odd, odd.init(PARAMS), FaultPlan().batches(3))
    assert (raised.value.step, raised.value.state_ok) == (1, True)
    assert "mine()" in str(raised.value)
    assert alive(raised.value.run.state)


@fault(
    "8",
    "two loss scales; a transform of steps on the right of update; clip on the left",
    "ConfigError, PipelineTypeError",
)
def test_transforms_that_do_not_fit_are_refused() -> None:
    tail = sc.update(optax.sgd(0.1))
    with pytest.raises(sc.ConfigError, match="loss_scale"):
        sc.compile(tail @ sc.loss_scale() @ sc.loss_scale() @ sc.grad(loss))
    with pytest.raises(sc.PipelineTypeError, match="Write"):
        tail @ sc.skip_nonfinite(limit=3) @ sc.grad(loss)
    with pytest.raises(sc.PipelineTypeError, match="Write"):
        sc.clip(1.0) @ tail @ sc.grad(loss)


@fault(
    "9", "a static field of the state that changes", "BuildError at step 1, not 2: both trees; no compilation each step"
)
def test_static_field_that_changes_is_refused() -> None:
    calls = []

    def counting(state: Any, batch: Any) -> Any:
        calls.append(1)
        return {"w": state["w"], "count": optax.MaskedNode() if len(calls) % 2 else ()}, {"loss": jnp.float32(0)}

    with pytest.raises(sc.BuildError, match="each step would be compiled again") as raised:
        sc.run(counting, {"w": jnp.zeros(3), "count": ()}, FaultPlan().batches(5))  # pyright: ignore
    assert (raised.value.step, len(calls)) == (1, 1)
    assert "MaskedNode" in str(raised.value)


@fault("12", "jax_debug_nans, jax_debug_infs with a step that donates", "ConfigError that says why; the state is alive")
@pytest.mark.parametrize("flag", ["jax_debug_nans", "jax_debug_infs"])
def test_debug_nans_with_donation_is_refused(flag: str) -> None:
    state = fresh()
    jax.config.update(flag, True)
    try:
        with pytest.raises(sc.ConfigError, match=flag):
            sc.run(step(), state, FaultPlan().batches(3))
        assert alive(state)
    finally:
        jax.config.update(flag, False)


@fault(
    "29", "NaN in a batch; none in a batch on which the step fails", "NonFiniteError with leaf and count, or all finite"
)
def test_nan_in_the_batch_is_distinguished_from_nan_of_the_step() -> None:
    with pytest.raises(sc.NonFiniteError, match="batch +1 of 4 numbers are not finite in y"):
        sc.run(step(), fresh(), FaultPlan({3: "nan"}).batches(5))
    plan = FaultPlan({3: "flip"})
    with pytest.raises(sc.NonFiniteError, match="batch +every number is finite") as raised:
        sc.run(plan, fresh(), plan.batches(5))
    assert raised.value.step == 3
    on_devices = partial(jax.tree.map, jnp.asarray)
    with pytest.raises(sc.NonFiniteError, match="batch +1 of 4 numbers are not finite in y"):
        sc.run(step(), fresh(), sc.Data(FaultPlan({3: "nan"}).batches(5), place=on_devices))


def leaping(metrics: Mapping[str, float]) -> str | None:
    return f"the loss {metrics['loss']:.0f} is more than 1000" if metrics["loss"] > 1000 else None


def with_a_leap(at: int) -> list[Any]:
    batches = [batch_of(number) for number in range(1, 9)]
    batches[at - 1]["y"] = np.full(4, 1e3, np.float32)
    return batches


@fault(
    "40", "a loss that leaps, and `reject_if` that says so; policy raise", "RejectedError of that step, in its words"
)
@fault("40", "the same, policies skip and rollback", "bitwise without the batch; without those since the snapshot")
@pytest.mark.parametrize("window", [0, 2])
def test_loss_that_leaps_is_governed_as_nan_is(window: int) -> None:
    run = partial(sc.run, step(), reject_if=leaping, buffers=sc.Buffers(window, snapshot_every=3))
    with pytest.raises(sc.RejectedError, match="Step 5 is rejected: the loss .* is more than 1000") as raised:
        run(fresh(), with_a_leap(5))
    assert raised.value.step == 5
    skipped = run(fresh(), with_a_leap(5), on_error="skip")
    assert digest(skipped.state) == digest(by_a_plain_loop([1, 2, 3, 4, 6, 7, 8]))
    back = run(fresh(), with_a_leap(5), on_error="rollback")
    assert digest(back.state) == digest(by_a_plain_loop([1, 2, 3, 6, 7, 8]))


@fault("40", "`reject_if` itself raises", "StepError of phase reject_if; the state is alive, that of the last step")
def test_judgement_that_fails_leaves_the_state() -> None:
    def fails(metrics: Mapping[str, float]) -> str | None:
        return None if metrics["loss"] else str(1 / 0)

    plan = FaultPlan()
    with pytest.raises(sc.StepError, match="ZeroDivisionError") as raised:
        sc.run(lambda state, batch: (state, {"loss": jnp.float32(0)}), fresh(), plan.batches(4), reject_if=fails)
    assert raised.value.phase == "reject_if"
    assert alive(raised.value.run.state)


@fault(
    "42", "a gradient that overflows at every scale", "NonFiniteError at the smallest scale, which it names; not before"
)
def test_loss_scale_that_is_used_up_is_an_error() -> None:
    def overflowing(params: Any, batch: Any) -> jax.Array:
        return jnp.sum(jnp.sqrt(jnp.abs(params["w"])) * 0) + 1.0  # the derivative of a root at 0 is infinite

    scaled = sc.compile(sc.update(optax.sgd(0.1)) @ sc.loss_scale() @ sc.grad(overflowing))
    with pytest.raises(sc.NonFiniteError, match="loss_scale +6.1035") as raised:
        sc.run(scaled, scaled.init(PARAMS), FaultPlan().batches(100))
    assert raised.value.step == 30  # from 2 ** 15 to 2 ** -14 in 29 steps


def weak_from(at: int, num: int = 8) -> list[Any]:
    """Batches on devices, of which one leaf has a weak type from some number on."""
    batches = [jax.tree.map(jnp.asarray, batch_of(number)) for number in range(1, num + 1)]
    for batch in batches[at - 1 :]:
        batch["y"] = jnp.full(4, 2.0)
    return batches


def compiled() -> sc.Step:
    return sc.compile(sc.update(optax.sgd(0.1)) @ sc.grad(loss))


@fault("49", "a leaf of weak type from step 5 on", "event recompiled with before and after; one such compilation")
@fault("49", "the same with max_recompiles=0", "BuildError at step 5; the state after that step is alive")
def test_recompilation_in_mid_run_is_logged() -> None:
    again, logger = compiled(), Remembering()
    sc.run(again, again.init(PARAMS), weak_from(5), loggers=[logger])
    ((_, facts, at),) = [one for one in logger.events if one[0] == "recompiled"]
    assert at == 5
    assert facts["why"] == "in the batch, `y` was float32[4], and is float32[4] of weak type"
    again = compiled()
    with pytest.raises(sc.BuildError, match="of weak type") as raised:
        sc.run(again, again.init(PARAMS), weak_from(5), watchdog=sc.Watchdog(max_recompiles=0))
    assert (raised.value.step, raised.value.state_ok) == (5, True)
    assert int(raised.value.run.state.step) == 5
    again = compiled()
    assert sc.run(again, again.init(PARAMS), weak_from(5), watchdog=sc.Watchdog(max_recompiles=1)).steps == 8


def test_run_of_a_fresh_step_traces_and_compiles_it_once() -> None:
    calls: list[str] = []
    compilations: list[str] = []

    def counted(params: Any, batch: Any) -> jax.Array:
        calls.append("loss")
        return loss(params, batch)

    def note(event: str, duration_secs: float, **about: str | int) -> None:
        if event.endswith("backend_compile_duration") and "stepc_step" in str(about):
            compilations.append(event)

    def fresh_step() -> tuple[sc.Step, sc.State]:
        calls.clear()
        made = sc.compile(sc.update(optax.sgd(0.1)) @ sc.grad(counted))
        return made, made.init(PARAMS)

    made, state = fresh_step()
    made.lower(state, batch_of(1))
    in_lower = len(calls)
    made, state = fresh_step()
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        sc.run(made, state, FaultPlan().batches(5), loggers=[Remembering()])
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    # `run` asks for the plan and the memory by `lower`; its own calls find that trace and that executable.
    assert (len(calls), made.traces, len(compilations)) == (in_lower, 1, 1)


@fault("50", "a step that cannot use a donated leaf", "event not_donated at step 1: leaf and bytes; none for ours")
@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_donation_that_is_not_used_is_logged() -> None:
    inner = jax.jit(lambda state, y: state["w"] + y.sum() * state["old"].mean(), donate_argnums=0)

    def wasteful(state: Any, batch: Any) -> Any:
        return {"w": inner(state, batch["y"]), "old": state["old"]}, {"loss": jnp.float32(0)}

    logger = Remembering()
    sc.run(wasteful, {"w": jnp.zeros(3), "old": jnp.zeros(64)}, [batch_of(1)], loggers=[logger])  # pyright: ignore
    assert [(facts["bytes"], facts["leaves"], at) for name, facts, at in logger.events if name == "not_donated"] == [
        ("256", "old", 1)
    ]
    logger = Remembering()
    sc.run(step(), fresh(), [batch_of(1)], loggers=[logger])
    assert "not_donated" not in logger.names()


@fault(
    "51", "a callback that hangs, in the middle and in the last step", "stacks in the log; then event hung, with them"
)
@pytest.mark.parametrize("at", [3, 5])
def test_step_that_hangs_is_logged_with_stacks(at: int, caplog: pytest.LogCaptureFixture) -> None:
    def sleeps(number: int) -> None:
        if number == at:
            eventually(lambda: "in sleeps" in caplog.text)
            seen.append("in sleeps" in caplog.text)

    seen: list[bool] = []
    calling, logger = calling_back(sleeps), Remembering()
    state = calling.init(PARAMS)
    sc.run(calling, state, FaultPlan().batches(1))  # compiled
    with caplog.at_level(logging.WARNING):
        sc.run(calling, state, FaultPlan().batches(5), loggers=[logger], watchdog=sc.Watchdog(warn_seconds=0.4))
    assert seen == [True]  # the log says so while it hangs
    (step,) = [step for name, facts, step in logger.events if name == "hung" and "in sleeps" in facts["stacks"]]
    assert at - 3 <= step < at


@fault("31", "data that hangs for a batch, with a watchdog of 0.4 s", "event hung, with the stack of the reading")
@pytest.mark.parametrize("prefetch", [0, 1])
def test_data_that_hangs_is_logged_with_stacks(prefetch: int, caplog: pytest.LogCaptureFixture) -> None:
    def reading_slowly() -> Iterator[Any]:
        for number in range(1, 6):
            if number == 4:
                eventually(lambda: "since step 2" in caplog.text)
            yield batch_of(number)

    logger = Remembering()
    sc.run(step(), fresh(), [batch_of(1)])  # compiled
    run = sc.run(
        step(), fresh(), sc.Data(reading_slowly(), prefetch=prefetch), loggers=[logger], watchdog=sc.Watchdog(0.4)
    )
    (stacks,) = [facts["stacks"] for name, facts, at in logger.events if name == "hung" and at == 2]
    assert "in reading_slowly" in stacks
    assert run.steps == 5


HANGING = """
import pathlib, sys, time
from faults.plan import FaultPlan, fresh, step
import stepc as sc

def hangs(state, batch):
    if int(batch["n"][0]) == 13:
        time.sleep(600)
    return step()(state, batch)

import orbax.checkpoint  # here, and the compilation: the watchdog is to see a step that hangs, not a slow machine
began = time.monotonic()
sc.run(step(), fresh(), FaultPlan().batches(1))
patience = max(2.0, 2 * (time.monotonic() - began))

folder = pathlib.Path(sys.argv[1])
keep = sc.Checkpoints(folder, every=5)
sc.run(hangs, fresh(), FaultPlan().batches(20), checkpoint=keep, watchdog=sc.Watchdog(0.5, exit_seconds=patience))
"""


@fault("51", "a step that never ends, with exit_seconds", "stacks, then exit code 75; run again it ends bitwise equal")
def test_step_that_hangs_ends_the_process_if_that_was_asked_for(tmp_path: Path) -> None:
    command = (sys.executable, "-c", HANGING, str(tmp_path))
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=LIMIT_SECONDS)
    assert done.returncode == EXIT_CODE == 75, done.stderr
    assert "in hangs" in done.stderr
    assert "since step 12: the process ends" in done.stderr
    logger, keep = Remembering(), sc.Checkpoints(tmp_path, every=5)
    run = sc.run(step(), fresh(), FaultPlan().batches(20), checkpoint=keep, loggers=[logger])
    assert "resumed" in logger.names()
    assert digest(run.state) == digest(by_a_plain_loop(list(range(1, 21))))
    with pytest.raises(sc.ConfigError, match="exit_seconds.*more than warn_seconds"):
        sc.Watchdog(warn_seconds=2.0, exit_seconds=1.0)
