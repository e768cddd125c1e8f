"""The loggers: what they write, and what remains after a resume."""

import io
import json
import math
import platform
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
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
    assert [line.split()[1] for line in written.getvalue().splitlines()] == ["1/7", "7/7"]


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
