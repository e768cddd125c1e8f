"""Bad input: rows 1 to 11. Loggers: rows 82 to 89."""

import contextlib
import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from faults.plan import FaultPlan, Remembering, batch_of, by_a_plain_loop, digest, fresh, step
from rich.console import Console as Terminal

import stepc as sc

fault = pytest.mark.fault
PLAIN = list(range(1, 10))


def run_with(*loggers: Any, **options: Any) -> sc.Run:
    return sc.run(step(), fresh(), FaultPlan().batches(9), loggers=loggers, log_every=1, **options)


@fault("1", "a step that cannot be called", "FieldTypeError; the state is alive")
@fault("10", "steps, hooks, buffers, policies that cannot be", "FieldTypeError or ConfigError, all faults at once")
@fault("11", "Rollback(data='replay') to checkpoints with data that cannot go back", "ConfigError with the remedy")
def test_arguments_that_cannot_be_are_refused(tmp_path: Path) -> None:
    state = fresh()
    keep = sc.Checkpoints(tmp_path, every=1)
    wrong: list[dict[str, Any]] = [
        {"steps": 0},
        {"log_every": 0},
        {"hooks": [(0, print)]},
        {"on_error": "ignore"},
        {"on_error": {"disk": "raise"}},
        {"on_error": sc.Rollback(data="replay"), "checkpoint": keep},
    ]
    for options in wrong:
        with pytest.raises(sc.ConfigError):
            sc.run(step(), state, [batch_of(1)], **options)
    for options in ({"steps": 1.5}, {"buffers": 2}, {"watchdog": 60}):
        with pytest.raises(sc.FieldTypeError):
            sc.run(step(), state, [batch_of(1)], **options)
    with pytest.raises(sc.FieldTypeError, match="a compiled step"):
        sc.run(None, state, [batch_of(1)])  # pyright: ignore
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


@fault("2", "a state with text in it", "ConfigError with the path")
@fault("4", "a state that was donated", "ConfigError with the path")
@fault("5", "the caller's state is used after the run", "no error: it was copied; Buffers(donate_state=True) takes it")
def test_state_is_checked_and_copied() -> None:
    with pytest.raises(sc.ConfigError, match="b  expected a jax array, got str"):
        sc.run(step(), {"b": "text"}, [batch_of(1)])  # pyright: ignore
    state = fresh()
    sc.run(step(), state, [batch_of(1)])
    assert digest(state) == digest(fresh())
    sc.run(step(), state, [batch_of(1)], buffers=sc.Buffers(donate_state=True))
    with pytest.raises(sc.ConfigError, match="deleted"):
        sc.run(step(), state, [batch_of(1)])


@fault("3", "the same buffer twice in the state, in the parameters", "copied: both are trained; logged with bytes")
def test_tied_leaves_are_copied_apart(caplog: pytest.LogCaptureFixture) -> None:
    tied, logger = jax.numpy.ones(3), Remembering()

    @jax.jit
    def both(state: Any, batch: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf + 1, state), {"loss": batch["y"].mean()}

    donating = jax.jit(both, donate_argnums=0)
    run = sc.run(donating, {"a": tied, "b": tied}, [batch_of(1)], loggers=[logger])  # pyright: ignore
    assert float(run.state["a"][0]) == float(run.state["b"][0]) == 2.0
    assert [facts["leaves"] for name, facts, _ in logger.events if name == "tied_leaves"] == ["a and b (12 bytes)"]
    caplog.clear()
    step().init({"w": tied, "head": {"w": tied}})
    assert "trained apart: head/w and w (12 bytes)" in caplog.text
    caplog.clear()
    step().init({"w": tied})
    assert not caplog.records


class Failing(Remembering):
    def __init__(self, *steps: int) -> None:
        super().__init__()
        self.steps = steps

    def log(self, metrics: Any, step: int) -> None:
        if step in self.steps:
            raise OSError("no")
        super().log(metrics, step)


@fault(
    "82",
    "a logger that raises once, always; on_error={'log': 'raise'}",
    "bitwise as without; left alone after three; StepError",
)
@fault("85", "a logger that keeps what it gets", "it got floats")
def test_logger_that_fails_changes_nothing() -> None:
    once, always = Failing(4), Failing(*PLAIN)
    run = run_with(once, always)
    assert digest(run.state) == digest(by_a_plain_loop(PLAIN))
    assert run.logger_failures == {"Failing": 1 + 3}
    assert [number for number, _ in once.told] == [1, 2, 3, 5, 6, 7, 8, 9]
    assert all(type(value) is float for _, metrics in once.told for value in metrics.values())
    with pytest.raises(sc.StepError) as raised:
        run_with(Failing(4), on_error={"log": "raise"})
    assert (raised.value.phase, raised.value.step, raised.value.state_ok) == ("log", 4, True)
    made = raised.value.run.steps  # the steps that were in flight are waited for, and not lost
    assert digest(raised.value.run.state) == digest(by_a_plain_loop(list(range(1, made + 1))))


@fault("83", "a logger that takes 0.6 s, twice", "event slow_logger once, with seconds; all its time in log_seconds")
def test_slow_logger_is_logged() -> None:
    class Slow(Remembering):
        def log(self, metrics: Any, step: int) -> None:
            time.sleep(0.6 if step in (3, 5) else 0)

    other = Remembering()
    run = run_with(Slow(), other)
    assert digest(run.state) == digest(by_a_plain_loop(PLAIN))
    ((facts, at),) = [
        (facts, at) for name, facts, at in other.events if name == "slow_logger" and facts["logger"] == "Slow"
    ]
    assert at == 3
    assert float(facts["log_seconds"]) >= 0.6
    assert run.log_seconds["Slow"] >= 1.2


@fault("84", "a logger that raises KeyboardInterrupt or SystemExit", "it passes through")
@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_exit_from_a_logger_passes_through(kind: Any) -> None:
    class Leaving(Remembering):
        def log(self, metrics: Any, step: int) -> None:
            raise kind

    with pytest.raises(kind):
        run_with(Leaving())


@fault("86", "NaN in a metric, into JSONL", "valid JSON: null, and named")
def test_nan_is_valid_json(tmp_path: Path) -> None:
    with sc.JSONL(tmp_path / "m.jsonl") as lines, pytest.raises(sc.NonFiniteError):
        sc.run(step(), fresh(), FaultPlan({3: "nan"}).batches(5), loggers=[lines], log_every=1)
    with sc.JSONL(tmp_path / "m.jsonl") as lines:
        lines.log({"loss": np.nan}, 4)
    found = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert found[-1] == {"step": 4, "loss": None, "nonfinite": {"loss": "nan"}}


@fault("87", "a log on a disk that is full (/dev/full)", "results bitwise as without; counted")
def test_full_log_changes_nothing(tmp_path: Path) -> None:
    full = sc.JSONL(tmp_path / "m.jsonl")
    full.close()
    full._file.file = Path("/dev/full").open("w", buffering=1)
    run = run_with(full)
    assert digest(run.state) == digest(by_a_plain_loop(PLAIN))
    assert run.logger_failures == {"JSONL": 3}
    with pytest.raises(OSError):
        full.close()


@fault("88", "the event of an error cannot be logged", "the error itself is raised")
def test_error_that_cannot_be_logged_is_raised() -> None:
    class Mute(Remembering):
        def event(self, name: str, facts: Any, step: int) -> None:
            raise OSError("no")

    with pytest.raises(sc.NonFiniteError):
        sc.run(step(), fresh(), FaultPlan({3: "nan"}).batches(5), loggers=[Mute()])


@fault("89", "a loss that is not a scalar; no loss", "BuildError at step 1 that names it; a metric may be an array")
def test_loss_that_is_missing_or_no_scalar_is_refused() -> None:
    def odd(state: Any, batch: Any, **more: Any) -> Any:
        return state, {"norms": batch["x"].sum(0), **more}

    refused = {"expected a metric of this name": {}, r"expected shape \(\), got \(3,\)": {"loss": np.ones(3)}}
    for text, more in refused.items():
        with pytest.raises(sc.BuildError, match=rf"loss +{text}") as raised:
            sc.run(partial(odd, **more), fresh(), [batch_of(1)])
        assert raised.value.step == 1
        assert "norms" not in str(raised.value)


@fault("87", "a terminal that is gone (EPIPE)", "results bitwise as without; logged; it prints nothing from then on")
@pytest.mark.parametrize("is_bar", [True, False])
def test_closed_terminal_changes_nothing(is_bar: bool, caplog: pytest.LogCaptureFixture) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    gone = os.fdopen(writes, "w", buffering=1)
    with sc.Console(terminal=Terminal(file=gone, force_terminal=is_bar)) as console:
        run = run_with(console)
    with contextlib.suppress(BrokenPipeError):
        gone.close()
    assert digest(run.state) == digest(by_a_plain_loop(PLAIN))
    assert caplog.text.count("the terminal is closed") == 1


@fault("89", "names of metrics that change between steps", "event metrics_changed: which are gone, which are new")
def test_metrics_that_change_their_names_are_logged() -> None:
    def changing(state: Any, batch: Any) -> Any:
        state, metrics = step()(state, batch)
        return state, metrics if int(batch["n"][0]) != 3 else {"loss": metrics["loss"], "extra": metrics["loss"]}

    logger = Remembering()
    run = sc.run(changing, fresh(), FaultPlan().batches(5), loggers=[logger])
    assert digest(run.state) == digest(by_a_plain_loop([1, 2, 3, 4, 5]))
    told = [(facts["names"], at) for name, facts, at in logger.events if name == "metrics_changed"]
    assert told == [("gone: grad_norm; new: extra", 3), ("gone: extra; new: grad_norm", 4)]


def test_data_that_ends_early_says_so() -> None:
    logger = Remembering()
    run = sc.run(step(), fresh(), FaultPlan().batches(3), steps=10, loggers=[logger])
    assert (run.steps, run.ended) == (3, "data")
    facts = {"asked": "10", "why": "the data has no further batch"}
    assert ("data_ended_early", facts, 3) in logger.events
    for steps in (3, None):
        logger = Remembering()
        sc.run(step(), fresh(), FaultPlan().batches(3), steps=steps, loggers=[logger])
        assert "data_ended_early" not in logger.names()


@pytest.mark.parametrize("kind", [sc.CSV, sc.JSONL])
def test_metric_with_the_name_of_a_column_is_refused(kind: Any, tmp_path: Path) -> None:
    def own(state: Any, batch: Any) -> Any:
        state, metrics = step()(state, batch)
        return state, {**metrics, "step": metrics["loss"]}

    with kind(tmp_path / "log") as logger, pytest.raises(sc.BuildError) as raised:
        sc.run(own, fresh(), FaultPlan().batches(3), loggers=[Remembering(), logger])
    assert f"metric 'step'  {kind.__name__} writes something else under this name" in str(raised.value)
    assert "Step 1 returns a metric under a name that a logger uses itself." in str(raised.value)
    assert raised.value.step == 1
    with kind(tmp_path / "log") as logger, pytest.raises(sc.ConfigError, match=f"{kind.__name__} uses 'step' itself"):
        logger.log({"loss": 1.0, "step": 7.0}, 3)
    assert sc.run(own, fresh(), FaultPlan().batches(3), loggers=[Remembering()]).steps == 3


def test_metric_with_the_name_of_a_column_is_refused_before_the_first_step_of_a_compiled_step(tmp_path: Path) -> None:
    def loss(params: Any, rows: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        value = jnp.mean((rows["x"] @ params["w"]) ** 2)
        return value, {"step": value}

    own = sc.compile(sc.update(optax.sgd(0.5)) @ sc.grad(loss, has_aux=True))
    state = own.init({"w": jnp.ones(2)})
    with sc.CSV(tmp_path / "log") as logger, pytest.raises(sc.BuildError) as raised:
        sc.run(own, state, [{"x": np.ones((4, 2), np.float32)}], loggers=[logger])
    assert str(raised.value) == (
        "Step 1 returns a metric under a name that a logger uses itself.\n\n"
        "  step           1\n"
        "  phase          build\n"
        "  state          alive, unchanged by the failed step\n"
        "  metric 'step'  CSV writes something else under this name"
    )
    assert raised.value.run is not None and raised.value.run.state is not None
    assert not state.params["w"].is_deleted()


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        ("wandb", "Give the run that `wandb.init(…)` returns: its `log` takes metrics and a step."),
        ("tensorboard", "Make one: `sc.TensorBoard(…)`."),
        ("console", "Make one: `sc.Console()`."),
    ],
)
def test_logger_given_by_name_is_refused_with_the_object_to_give(given: str, remedy: str) -> None:
    with pytest.raises(sc.FieldTypeError) as raised:
        sc.run(step(), fresh(), FaultPlan().batches(3), loggers=[given])  # type: ignore[list-item]
    assert str(raised.value) == (
        "Invalid arguments to `run`.\n\n"
        f"  loggers[0]  expected an object with a method log(metrics, step), got {given!r}\n\n"
        f"  {remedy}"
    )


def test_loggers_do_not_share_the_facts_of_an_event() -> None:
    class Emptying(Remembering):
        def event(self, name: str, facts: Any, step: int) -> None:
            facts.clear()

    other = Remembering()
    run_with(Emptying(), other)
    (facts,) = [facts for name, facts, _ in other.events if name == "end"]
    assert facts == {"ended": "data"}


def test_transfer_guard_is_no_fault_of_the_device() -> None:
    run_with()  # compiled
    right = digest(by_a_plain_loop(PLAIN))
    with jax.transfer_guard("disallow"):
        with pytest.raises(sc.StepError, match="Step 1 was stopped by `jax.transfer_guard`") as raised:
            sc.run(step(), fresh_outside_the_guard(), FaultPlan().batches(9), on_error="retry")
        assert type(raised.value) is sc.StepError
        assert (raised.value.phase, raised.value.state_ok, raised.value.run.failures) == (
            "dispatch",
            True,
            {"dispatch": 1},
        )
        assert (
            raised.value.suggestion
            == "`run` puts batches on the devices itself with `sc.Data(loader, place=step.put)`."
        )
        for options in ({"place": step().put}, {"prefetch": 2}):  # the remedy; a thread that reads ahead places too
            run = sc.run(step(), fresh_outside_the_guard(), sc.Data(FaultPlan().batches(9), **options))
            assert digest(run.state) == right


def fresh_outside_the_guard() -> sc.State:
    with jax.transfer_guard("allow"):
        return fresh()
