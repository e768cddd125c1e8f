"""The loggers: what they write, where, and what they leave behind."""

import io
import json
import math
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax.numpy as jnp
import optax
import pytest
from rich.console import Console as Terminal

import stepc as sc
from stepc.runner.console import Console
from stepc.runner.jsonl import JSONL


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


def test_console_no_terminal_prints_now_and_then() -> None:
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


def test_loggers_in_a_run_are_told_the_same(tmp_path: Path) -> None:
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
    assert [line["step"] for line in read_lines(path)] == [1, 3, 6, 7]
    assert [line.split()[1] for line in written.getvalue().splitlines()] == ["1/7", "7/7"]


def test_import_stepc_loads_no_extra() -> None:
    code = "import sys, stepc; print([name for name in ('rich', 'matplotlib') if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
