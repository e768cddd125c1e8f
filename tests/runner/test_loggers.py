"""The loggers: what they write, and what remains after a resume."""

import io
import json
import math
import platform
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console as Terminal
from waiting import eventually

import stepc as sc
from stepc._runner.loggers.console import Console
from stepc._runner.loggers.files import JSONL


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def plain(clock: Clock, *, steps: int = 100, tokens_per_step: int = 1000) -> tuple[Console, io.StringIO]:
    written = io.StringIO()
    terminal = Terminal(file=written, force_terminal=False, width=40)
    return Console(steps=steps, tokens_per_step=tokens_per_step, terminal=terminal, clock=clock), written


def read_lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def test_console_speed_leaves_compilation_out() -> None:
    clock = Clock()
    console, written = plain(clock)
    clock.seconds = 50.0  # compiling
    console.log({"loss": 2.0}, 1)
    clock.seconds = 70.0
    console.log({"loss": 1.5}, 11)
    assert written.getvalue().splitlines() == [
        "step 1/100  loss 2.0000  - tokens/s  - left",
        "step 11/100  loss 1.5000  500 tokens/s  0:02:58 left",
    ]


def test_console_paused_leaves_the_pause_out() -> None:
    clock = Clock()
    console, written = plain(clock)
    console.log({"loss": 2.0}, 1)
    with console.paused():
        clock.seconds = 1000.0
    clock.seconds += 20.0
    console.log({"loss": 1.5}, 11)
    assert "500 tokens/s  0:02:58 left" in written.getvalue()


def test_console_no_terminal_prints_every_ten_seconds() -> None:
    clock = Clock()
    console, written = plain(clock)
    for step in range(1, 101):
        clock.seconds = float(step)
        console.log({"loss": 1.0}, step)
    printed = [line.split()[1] for line in written.getvalue().splitlines()]
    assert printed == [f"{step}/100" for step in (*range(1, 100, 10), 100)]


def test_console_no_terminal_prints_no_escapes() -> None:
    console, written = plain(Clock())
    with console:
        console.log({"loss": 1.0}, 1)
        console.say("[bold] a long line of text that is not wrapped [/bold]")
    assert "\x1b" not in written.getvalue()
    assert "[bold] a long line of text that is not wrapped [/bold]\n" in written.getvalue()


def test_console_loss_not_finite_is_shown() -> None:
    console, written = plain(Clock())
    console.log({"loss": math.nan}, 1)
    assert "loss nan" in written.getvalue()


def test_console_terminal_draws_a_bar_and_gives_the_cursor_back() -> None:
    clock, written = Clock(), io.StringIO()
    terminal = Terminal(file=written, force_terminal=True, width=100)
    with Console(steps=2, tokens_per_step=10, terminal=terminal, clock=clock) as console:
        console.log({"loss": 2.0}, 1)
        clock.seconds = 1.0
        console.log({"loss": 1.25}, 2)
    console.close()
    shown = written.getvalue()
    assert "step 2/2" in shown
    assert "loss 1.2500  10 tokens/s  0:00:00 left" in shown
    hide, show = "\x1b[?25l", "\x1b[?25h"
    assert shown.count(hide) == shown.count(show) == 1


def test_jsonl_makes_folders_and_writes_a_line_a_step(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "metrics.jsonl"
    with JSONL(path) as logger:
        logger.log({"loss": 2.5, "grad_norm": 1.0}, 1)
        logger.log({"loss": 2.25, "grad_norm": 0.5}, 2)
    assert read_lines(path) == [
        {"step": 1, "loss": 2.5, "grad_norm": 1.0},
        {"step": 2, "loss": 2.25, "grad_norm": 0.5},
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_jsonl_not_finite_is_null_and_named(tmp_path: Path, value: float) -> None:
    path = tmp_path / "metrics.jsonl"
    with JSONL(path) as logger:
        logger.log({"loss": value, "grad_norm": 1.0}, 3)
    assert read_lines(path) == [
        {"step": 3, "loss": None, "grad_norm": 1.0, "nonfinite": {"loss": str(value)}},
    ]


def test_jsonl_line_is_there_before_close(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    logger = JSONL(path)
    logger.log({"loss": 1.0}, 1)
    assert read_lines(path) == [{"step": 1, "loss": 1.0}]
    logger.close()
    logger.close()


def test_jsonl_existing_file_is_added_to(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2):
        with JSONL(path) as logger:
            logger.log({"loss": 1.0}, step)
    assert [line["step"] for line in read_lines(path)] == [1, 2]


def test_jsonl_metric_called_step_raises(tmp_path: Path) -> None:
    with JSONL(tmp_path / "metrics.jsonl") as logger, pytest.raises(sc.ConfigError, match="'step'"):
        logger.log({"loss": 1.0, "step": 2.0}, 1)


def test_loggers_of_a_run_get_the_same_steps(tmp_path: Path) -> None:
    def loss(params: dict[str, jnp.ndarray], batch: dict[str, jnp.ndarray]) -> jnp.ndarray:
        return jnp.square(params["w"] - batch["x"]).mean()

    def data() -> Iterator[Mapping[str, jnp.ndarray]]:
        while True:
            yield {"x": jnp.arange(4.0)}

    step = sc.compile(sc.update(optax.sgd(0.5)) @ sc.grad(loss))
    console, written = plain(Clock(), steps=7)
    path = tmp_path / "metrics.jsonl"
    with console, JSONL(path) as lines:
        state = step.init({"w": jnp.float32(0.0)}, seed=0)
        run = sc.run(step, state, data(), steps=7, loggers=(console, lines), log_every=3)
    assert run.logger_failures == {}
    assert [line["step"] for line in read_lines(path) if "event" not in line] == [1, 3, 6, 7]
    # Before 14.3, rich ended a bar with an empty line.
    assert [line.split()[1] for line in written.getvalue().splitlines() if line] == ["1/7", "7/7"]


def test_import_stepc_loads_no_extra() -> None:
    extras = ("rich", "matplotlib", "orbax", "grain", "tensorboardX")
    code = f"import sys, stepc; print([name for name in {extras} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def test_jsonl_trim_drops_later_steps_and_a_torn_line_and_keeps_events(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with JSONL(path) as logger:
        for step in (1, 2, 3):
            logger.log({"loss": 1.0}, step)
        logger.event("failure", {"what": "it"}, 3)
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    with JSONL(path) as logger:
        logger.trim(2)
        logger.log({"loss": 2.0}, 3)
    assert [line["step"] for line in read_lines(path)] == [1, 2, 3, 3]
    assert read_lines(path)[2] == {"what": "it", "step": 3, "event": "failure"}


def test_csv_writes_columns_and_widens_and_trims(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "metrics.csv"
    with sc.CSV(path) as logger:
        logger.log({"loss": 2.5}, 1)
        logger.log({"loss": 2.25, "eval/loss": 3.0}, 2)
        logger.log({"loss": math.nan}, 3)
    assert path.read_text() == "step,loss,eval/loss\n1,2.5,\n2,2.25,3.0\n3,nan,\n"
    with sc.CSV(path) as logger:
        logger.trim(1)
        logger.log({"eval/loss": 1.0}, 2)
    assert path.read_text() == "step,loss,eval/loss\n1,2.5,\n2,,1.0\n"


def test_tensorboard_writes_event_files(tmp_path: Path) -> None:
    with sc.TensorBoard(tmp_path) as logger:
        logger.log({"loss": 2.5}, 1)
        logger.event("failure", {"what": "it"}, 1)
        logger.trim(0)
        logger.log({"loss": 2.0}, 1)
    written = b"".join(path.read_bytes() for path in tmp_path.glob("events*"))
    assert b"loss" in written and b"failure" in written


def small_run(**options: object) -> sc.Run:
    step = sc.compile(sc.update(optax.sgd(0.5)) @ sc.grad(lambda params, batch: jnp.mean((params - batch) ** 2)))
    return sc.run(step, step.init(jnp.float32(0.0)), [jnp.arange(4.0)] * 8, **options)  # pyright: ignore


class Events(list[tuple[str, Mapping[str, str]]]):
    """A logger that keeps the events."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Not of interest."""

    def event(self, name: str, facts: Mapping[str, str], step: int) -> None:
        self.append((name, facts))


def test_start_event_names_versions_pipeline_mesh_and_plan_without_a_trace() -> None:
    events = Events()
    step = sc.compile(
        sc.update(optax.sgd(0.5)) @ sc.shard(sc.dp("data")) @ sc.grad(lambda params, batch: jnp.mean(params * batch)),
        mesh=jax.make_mesh((2,), ("data",), devices=jax.devices()[:2]),
    )
    sc.run(step, step.init(jnp.float32(0.0)), [jnp.arange(4.0)] * 3, loggers=[events])
    (start, header), (plan, told), *_ = events
    assert (start, plan) == ("start", "plan")
    assert header["trains"] == repr(step)
    assert header["mesh"] == "{'data': 2}"
    assert (header["jax"], header["python"]) == (jax.__version__, platform.python_version())
    assert header["stepc"] == version("stepc")
    assert told["plan"] == str(step.lower(step.init(jnp.float32(0.0)), jnp.arange(4.0)).plan)
    assert step.traces == 1


def test_batches_read_ahead_are_placed_by_the_reading_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    step = sc.compile(
        sc.update(optax.sgd(0.5)) @ sc.shard(sc.dp("data")) @ sc.grad(lambda params, batch: jnp.mean(params * batch)),
        mesh=mesh,
    )
    put, watched = step.put, step.step_with_diagnostics
    threads: list[str] = []
    specs: list[object] = []

    def noting_put(batch: np.ndarray) -> jax.Array:
        threads.append(threading.current_thread().name)
        return put(batch)

    def noting_call(state: sc.State, batch: jax.Array) -> Any:
        specs.append(batch.sharding.spec)
        return watched(state, batch)

    monkeypatch.setattr(step, "put", noting_put)
    monkeypatch.setattr(step, "step_with_diagnostics", noting_call)
    given = iter([np.arange(4, dtype=np.float32)] * 3)
    run = sc.run(step, step.init(jnp.float32(0.0)), sc.Data(given, prefetch=2))
    assert run.steps == 3
    assert threads == ["stepc-data"] * 3
    assert specs == [jax.sharding.PartitionSpec("data")] * 3


def test_watchdog_writes_the_stacks_of_a_run_that_hangs(caplog: pytest.LogCaptureFixture) -> None:
    def slow() -> Iterator[jax.Array]:
        yield jnp.arange(4.0)
        eventually(lambda: "no step has begun for" in caplog.text)
        yield jnp.arange(4.0)

    step = sc.compile(sc.update(optax.sgd(0.5)) @ sc.grad(lambda params, batch: jnp.mean((params - batch) ** 2)))
    step(step.init(jnp.float32(0.0)), jnp.arange(4.0))  # to compile takes longer than the watchdog waits
    sc.run(step, step.init(jnp.float32(0.0)), slow(), watchdog=sc.Watchdog(warn_seconds=0.3))
    assert "in slow" in caplog.text  # the line that hangs


def test_picture_is_drawn_when_a_run_ends(tmp_path: Path) -> None:
    small_run(loggers=[sc.Picture(tmp_path / "metrics.png")], log_every=1)
    assert (tmp_path / "metrics.png").read_bytes().startswith(b"\x89PNG")


def test_evaluation_is_logged_beside_the_losses(tmp_path: Path) -> None:
    judged: list[float] = []

    def judge(state: sc.State, batch: jnp.ndarray) -> dict[str, jnp.ndarray]:
        judged.append(float(state.params))
        return {"gap": jnp.abs(state.params - batch).mean()}

    with sc.CSV(tmp_path / "m.csv") as table:
        small_run(loggers=[table], log_every=4, eval=sc.Eval(4, judge, [jnp.zeros(4), jnp.ones(4)]))
    rows = (tmp_path / "m.csv").read_text().splitlines()
    assert rows[0] == "step,loss,eval/gap"
    assert len(judged) == 4


def test_evaluation_by_a_step_leaves_the_state(tmp_path: Path) -> None:
    step = sc.compile(sc.update(optax.sgd(0.5)) @ sc.grad(lambda params, batch: jnp.mean((params - batch) ** 2)))
    plain = small_run()
    judged = small_run(eval=sc.Eval(2, step, [jnp.arange(4.0)] * 2))
    assert float(judged.state.params) == float(plain.state.params)


def test_hook_gets_host_floats_and_a_copy() -> None:
    seen: list[tuple[int, float]] = []

    def hook(step: int, metrics: Mapping[str, float], snapshot: object) -> None:
        assert type(metrics["loss"]) is float and callable(snapshot)
        state = snapshot()
        state.params.delete()
        seen.append((step, metrics["loss"]))

    run = small_run(hooks=[(4, hook)])
    assert [step for step, _ in seen] == [4, 8]
    assert float(run.state.params) == float(small_run().state.params)


def test_snapshot_that_is_kept_beyond_its_step_says_so() -> None:
    kept: list[Any] = []

    def hook(step: int, metrics: Mapping[str, float], snapshot: Callable[[], Any]) -> None:
        snapshot()
        kept.append(snapshot)

    small_run(hooks=[(4, hook)])
    with pytest.raises(sc.ConfigError) as raised:
        kept[0]()
    assert str(raised.value) == (
        "`snapshot()` of step 4 was called after its hook had returned.\n\n"
        "  Call it in the hook, and keep the copy that it gives."
    )


def test_profile_of_some_steps_is_written(tmp_path: Path) -> None:
    small_run(profile=sc.Profile(3, 5, tmp_path))
    assert list(tmp_path.rglob("*.xplane.pb"))


def test_console_without_steps_or_tokens_shows_steps_and_events() -> None:
    clock, written = Clock(), io.StringIO()
    console = sc.Console(terminal=Terminal(file=written, force_terminal=False, width=60), clock=clock)
    console.log({"loss": 2.0}, 1)
    console.event("failure", {"what": "it"}, 1)
    console.log({"eval/loss": 1.5}, 1)
    clock.seconds = 20.0
    console.log({"loss": 1.5}, 11)
    assert written.getvalue().splitlines() == [
        "step 1  loss 2.0000  - steps/s  - left",
        "step 1: failure  what: it",
        "step 1  eval/loss 1.5000",
        "step 11  loss 1.5000  0 steps/s  - left",
    ]


def per_column(params: Any, rows: Any) -> tuple[jax.Array, dict[str, Any]]:
    error = params["w"][None] - rows["x"]
    metrics = {"error": sc.Mean(error.sum(axis=0), rows["x"].shape[0]), "largest": sc.Max(rows["x"].max(axis=0))}
    return jnp.mean(error**2), metrics


def array_run(tmp_path: Path, *, repeat: int = 1, **options: Any) -> tuple[sc.Run, list[np.ndarray]]:
    """A run whose step has two metrics of shape [3]; and its batches."""
    random = np.random.default_rng(0)
    batches = [random.integers(-4, 5, (8, 3)).astype(np.float32) for _ in range(4)]
    pipeline = sc.update(optax.sgd(0.0)) @ sc.accumulate(2) @ sc.grad(per_column, has_aux=True)
    step = sc.compile(sc.repeat(repeat) @ pipeline if repeat > 1 else pipeline)
    data = [{"x": one} for one in batches]
    if repeat > 1:
        data = [{"x": np.stack(batches[at : at + repeat])} for at in range(0, len(batches), repeat)]
    run = sc.run(step, step.init({"w": np.zeros(3, np.float32)}), data, log_every=1, **options)
    return run, batches


@pytest.mark.parametrize("repeat", [1, 2])
def test_array_metrics_are_lists_in_jsonl_and_histograms_in_tensorboard(tmp_path: Path, repeat: int) -> None:
    events, csv_path = Events(), tmp_path / "metrics.csv"
    seen: list[Mapping[str, Any]] = []

    def verdict(metrics: Mapping[str, Any]) -> None:
        seen.append(metrics)

    saved = sc.Checkpoints(tmp_path / "c", every=4)
    with sc.JSONL(tmp_path / "metrics.jsonl") as jsonl, sc.CSV(csv_path) as table, sc.TensorBoard(tmp_path) as board:
        run, batches = array_run(
            tmp_path, repeat=repeat, loggers=[jsonl, table, board, events], reject_if=verdict, checkpoint=saved
        )
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "event" not in line]
    for line, batch, metrics in zip(lines, batches, seen, strict=True):
        assert line["error"] == (-batch.mean(axis=0)).tolist() == metrics["error"].tolist()
        assert line["largest"] == batch.max(axis=0).tolist()
    assert run.metrics["largest"].tolist() == batches[-1].max(axis=0).tolist()
    # A table has scalars, and says once what it leaves out.
    assert csv_path.read_text().splitlines()[0] == "step,loss"
    told = [facts for name, facts in events if name == "metric_not_shown"]
    assert told == [
        {"logger": "CSV", "metrics": "error [3], largest [3]"},
        {"logger": "Events", "metrics": "error [3], largest [3]"},
    ]
    written = b"".join(path.read_bytes() for path in tmp_path.glob("events*"))
    assert b"largest" in written
    resumed, _ = array_run(tmp_path, repeat=repeat, checkpoint=saved)
    assert (run.steps, resumed.steps) == (4, 8)


def norms(grads: Any) -> tuple[Any, dict[str, jax.Array]]:
    return grads, {"norms": jnp.abs(grads["w"])}


@dataclass(frozen=True, repr=False)
class Norms(sc.Transform):
    """A user's own transform, with a metric that is no scalar."""

    takes = sc.Kind.GRADIENT
    gives = sc.Kind.GRADIENT

    def reference(self, inner: sc.Fn) -> sc.Fn:
        return sc.Fn(inner.init, lambda *given: inner.apply(*given).map(norms), inner.axes, inner.names)

    def expand(self) -> tuple[sc.nodes.MapNode, ...]:
        return (sc.nodes.MapNode(norms, (), written=repr(self)),)


@pytest.mark.parametrize("accumulated", [False, True])
def test_array_metric_of_a_users_transform_is_in_calls_and_runs(accumulated: bool) -> None:
    sc.testing.check_transform(Norms())
    outer, inner = (sc.accumulate(2) @ Norms(), sc.accumulate(2)) if accumulated else (Norms(), sc.accumulate(4))
    step = sc.compile(sc.update(optax.sgd(0.5)) @ outer @ inner @ sc.grad(per_column, has_aux=True))
    batch = {"x": np.arange(24, dtype=np.float32).reshape(8, 3)}
    state = step.init({"w": np.zeros(3, np.float32)})
    _, expected = step.reference(state, batch)
    run = sc.run(step, state, [batch])
    assert expected["norms"].shape == (3,)
    assert run.metrics["norms"].tolist() == expected["norms"].tolist()


def test_best_of_an_array_is_refused(tmp_path: Path) -> None:
    best = sc.Checkpoints(tmp_path / "c", every=1, best=("error", "min"))
    with pytest.raises(sc.ConfigError, match="is an array, which has no order"):
        array_run(tmp_path, checkpoint=best)


def test_number_of_an_array_that_is_not_finite_is_null_in_jsonl(tmp_path: Path) -> None:
    with sc.JSONL(tmp_path / "metrics.jsonl") as logger:
        logger.log({"loss": 1.0, "rates": np.array([[0.5, math.nan], [math.inf, 2.0]])}, 1)
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 1,
        "loss": 1.0,
        "rates": [[0.5, None], [None, 2.0]],
        "nonfinite": {"rates": "[[0.5, nan], [inf, 2.0]]"},
    }


@pytest.mark.parametrize("by_step", [True, False])
def test_evaluation_of_array_metrics_is_exact(tmp_path: Path, by_step: bool) -> None:
    sets = [{"x": np.arange(24, dtype=np.float32).reshape(8, 3)}, {"x": -np.arange(12, dtype=np.float32).reshape(4, 3)}]

    def by_hand(state: sc.State, batch: Any) -> dict[str, Any]:
        _, metrics = per_column(state.params, batch)
        return {**metrics, "spread": batch["x"].max(axis=0)}

    step = sc.compile(sc.update(optax.sgd(0.0)) @ sc.grad(per_column, has_aux=True))
    evaluate = step if by_step else by_hand
    with sc.JSONL(tmp_path / "metrics.jsonl") as logger:
        array_run(tmp_path, eval=sc.Eval(4, evaluate, sets), loggers=[logger])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (line,) = [line for line in lines if "eval/error" in line]
    rows = np.concatenate([one["x"] for one in sets])
    np.testing.assert_allclose(line["eval/error"], -rows.mean(axis=0), rtol=1e-6)  # a step divides in float32
    if not by_step:
        assert line["eval/largest"] == rows.max(axis=0).tolist()
        weighed = sum(len(one["x"]) * one["x"].max(axis=0).astype(np.float64) for one in sets) / len(rows)
        assert line["eval/spread"] == weighed.tolist()


@pytest.mark.parametrize("repeat", [1, 2])
def test_measured_array_of_a_gradient_goes_through_all_loggers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], repeat: int
) -> None:
    def by_column(grads: Any, params: Any) -> dict[str, Any]:
        return {"gradient": grads["w"], "none": params["w"][:0]}

    def mean_error(params: Any, rows: Any) -> jax.Array:
        return jnp.mean((params["w"][None] - rows["x"]).sum(axis=1) ** 2)

    random = np.random.default_rng(0)
    batches = [random.integers(-4, 5, (8, 3)).astype(np.float32) for _ in range(4)]
    pipeline = sc.update(optax.sgd(0.0)) @ sc.measure(by_column) @ sc.accumulate(2) @ sc.grad(mean_error)
    step = sc.compile(sc.repeat(repeat) @ pipeline if repeat > 1 else pipeline)
    data = [{"x": np.stack(batches[at : at + repeat]) if repeat > 1 else batches[at]} for at in range(0, 4, repeat)]
    with (
        sc.CSV(tmp_path / "metrics.csv") as table,
        sc.JSONL(tmp_path / "metrics.jsonl") as jsonl,
        sc.TensorBoard(tmp_path) as board,
        sc.Console(steps=4) as console,
    ):
        run = sc.run(step, step.init({"w": np.zeros(3)}), data, log_every=1, loggers=[table, jsonl, board, console])
    expected = [np.repeat(-2 * one.sum(axis=1).mean(), 3).tolist() for one in batches]
    lines = [line for line in read_lines(tmp_path / "metrics.jsonl") if "event" not in line]
    assert [line["gradient"] for line in lines] == expected
    assert [line["none"] for line in lines] == [[]] * 4
    assert run.metrics["gradient"].tolist() == expected[-1]
    head, *rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert (head, len(rows)) == ("step,loss", 4)
    shown = capsys.readouterr().out.splitlines()
    assert "step 1: metric_not_shown  logger: Console  metrics: gradient [3], none [0]" in shown
    assert [line for line in shown if line.startswith("step 1/4  loss ")]
    written = b"".join(path.read_bytes() for path in tmp_path.glob("events*"))
    assert b"gradient" in written and b"none" in written  # the event names both; a curve needs a number


def test_failure_of_a_step_with_an_empty_metric_shows_its_loss() -> None:
    def step(state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
        return state, {"none": jnp.zeros(0), "loss": jnp.array(jnp.nan), "grad_norm": jnp.ones(())}

    with pytest.raises(sc.NonFiniteError, match=r"loss +nan\n +grad_norm +1\.0"):
        sc.run(step, {"w": jnp.zeros(3)}, [np.ones(3)])
