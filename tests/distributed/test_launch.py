"""`stepc launch`: real processes of real commands, what they print and how they end; and the demo under it."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from distributed.launching import LIMIT_SECONDS

from examples.gpt.__main__ import main as demo
from stepc._distributed.launch import launch
from stepc.cli import main

HELLO = "import os; print('hello', os.environ['STEPC_PROCESS_ID'], 'of', os.environ['STEPC_NUM_PROCESSES'])"
SECOND = "int(os.environ['STEPC_PROCESS_ID']) == 1"
COUNTING = """
import signal, sys, time
seen = []
signal.signal(signal.SIGINT, lambda *_: seen.append(1))
print("ready", flush=True)
while not seen:
    time.sleep(0.01)
time.sleep(0.5)
print("interrupted", len(seen), flush=True)
sys.exit(130)
"""
DEMO = [sys.executable, "-m", "examples.gpt"]
SMALL = ["--steps=6", "--batch=8", "--k=1", "--layers=1", "--width=16", "--heads=2", "--context=8", "--sample-bytes=4"]
TEXT = ["--text-bytes=200000", "--validation-batches=1"]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_launch_gives_each_process_its_index(capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(3, python(HELLO)) == 0
    assert sorted(capfd.readouterr().out.splitlines()) == [f"[{n}] hello {n} of 3" for n in range(3)]


@pytest.mark.parametrize(
    ("end", "code"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", 137), ("raise ValueError('no')", 1)]
)
def test_launch_ends_with_the_code_of_the_first_that_failed(end: str, code: int, tmp_path: Path) -> None:
    first = f"""
import os, sys, time
from pathlib import Path
number = Path({str(tmp_path / "number")!r})
if {SECOND}:
    number.with_suffix(".new").write_text(str(os.getpid()))
    number.with_suffix(".new").rename(number)
    {end}
while not number.exists():
    time.sleep(0.01)
while True:  # until the launcher has seen it end
    try:
        os.kill(int(number.read_text()), 0)
    except ProcessLookupError:
        sys.exit(5)
    time.sleep(0.01)
"""
    assert launch(2, python(first)) == code


def test_launch_passes_ctrl_c_on_once_to_each() -> None:
    command = [sys.executable, "-m", "stepc", "launch", "-n", "2", "--", *python(COUNTING)]
    launched = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        lines = [launched.stdout.readline() for _ in range(2)] if launched.stdout else []
        assert sorted(lines) == ["[0] ready\n", "[1] ready\n"]
        launched.send_signal(signal.SIGINT)
        out, _ = launched.communicate(timeout=LIMIT_SECONDS)
    finally:
        launched.kill()
    assert sorted(out.splitlines()) == ["[0] interrupted 1", "[1] interrupted 1"]
    assert launched.returncode == 130


def test_launch_of_an_invalid_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "-n", "0", "--", "stepc"]) == 2
    assert main(["launch", "-n", "2"]) == 2
    assert main(["launch", "-n", "2", "--", "no-such-command"]) == 2
    shown = capsys.readouterr().err
    assert "ConfigError: `stepc launch` needs a number of processes and a command." in shown
    assert "ConfigError: Command not found: `no-such-command`." in shown


def test_train_on_two_processes_has_the_losses_of_one(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(2, [*DEMO, *SMALL, *TEXT, "--devices=2", f"--out={tmp_path / 'two'}"]) == 0
    shown = capfd.readouterr().out
    assert "[0] compile(" in shown or "[0] skip_nonfinite(" in shown
    # Only process 0 prints; the other has only what libraries write.
    assert not [
        line
        for line in shown.splitlines()
        # A line of Gloo may be cut by one of the other process.
        if line.startswith("[1] ") and "Gloo" not in line and "peer ranks" not in line and line != "[1] "
    ]
    assert demo([*SMALL, *TEXT, "--devices=4", f"--out={tmp_path / 'one'}"]) == 0
    two, one = (losses_in(tmp_path / name / "metrics.jsonl") for name in ("two", "one"))
    assert [step for step, _ in two] == list(range(1, 7))
    np.testing.assert_allclose(one, two, rtol=1e-5)  # sums in another order


def test_mistake_of_one_ends_all(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "loss.png").write_text("of another run")  # process 0 alone looks there
    assert launch(2, [*DEMO, *SMALL, *TEXT, f"--out={tmp_path}"]) == 1
    shown = capfd.readouterr().out
    assert "[0] stepc.errors.ConfigError: " in shown and "is not the directory of a run" in shown
    assert "[1] stepc.errors.PeerError: Process 0 failed: ConfigError: " in shown


def losses_in(path: Path) -> list[tuple[int, float]]:
    lines = map(json.loads, path.read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]
