"""The demo as a user meets it: help, a whole run, mistakes, Ctrl-C and resuming, and no extra."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from waiting import LIMIT_SECONDS

from examples.gpt.__main__ import main

SMALL = (
    "--batch=8 --k=2 --layers=1 --width=16 --heads=2 --context=16 --text-bytes=200000 "
    "--validation-batches=1 --sample-bytes=20"
).split()


@pytest.fixture(autouse=True)
def eight_devices() -> None:
    """Start jax before the demo does: it would simulate two devices for all tests that follow."""
    assert len(jax.devices()) == 8


def command(directory: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "examples.gpt", *SMALL, f"--out={directory}", *options]


def steps_in(directory: Path) -> list[int]:
    lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if "event" not in line]


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """One run of six steps, for all tests that look at its files."""
    directory = tmp_path_factory.mktemp("runs") / "first"
    return directory, subprocess.run(command(directory, "--steps=6"), capture_output=True, text=True, timeout=300)


def test_demo_small_succeeds(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    _, ended = finished
    assert ended.returncode == 0, ended.stderr
    # What jax says where its CUDA plugin is installed without CUDA, as by the extra `pods`, is not ours.
    assert ended.stderr.replace("cuda_plugin_extension is not found.\n", "") == ""


def test_demo_prints_what_it_does_in_order(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    directory, ended = finished
    landmarks = [
        "skip_nonfinite() @ update(",
        '@ clip(1.0) @ accumulate(2) @ shard(dp("data")) @ grad(loss)\n',
        "\nplan of ",
        "\nall-reduce ",
        "\nstep 0: validation ",
        "\nstep 1/6  loss ",
        "\nstep 6: validation ",
        "(bigram ",
        "\na sample\n",
        f"\nmetrics  {directory}/metrics.jsonl",
        f"\ncurve    {directory}/loss.png\n",
    ]
    rest = ended.stdout
    for landmark in landmarks:
        assert landmark in rest
        rest = rest.partition(landmark)[2]


def test_demo_reduces_once_outside_the_loop(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    _, ended = finished
    (row,) = [line.split() for line in ended.stdout.splitlines() if line.startswith("all-reduce ")]
    _, _, _, axis, executions, in_loop, *_ = row
    assert (axis, executions, in_loop) == ("data", "1", "no")


def test_demo_leaves_metrics_and_a_picture(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    directory, _ = finished
    # A validation before the first step, after every second, and after the last; a log for every step.
    assert sorted(steps_in(directory)) == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6]
    assert is_png(directory / "loss.png")


def test_demo_finished_run_is_not_run_again(
    finished: tuple[Path, subprocess.CompletedProcess[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    directory, _ = finished
    before = (directory / "metrics.jsonl").read_bytes()
    assert main([*SMALL, f"--out={directory}", "--steps=6"]) == 0
    assert f"{directory} holds a finished run of 6 steps." in capsys.readouterr().out
    assert (directory / "metrics.jsonl").read_bytes() == before


def test_demo_directory_that_cannot_be_created_is_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    assert main([*SMALL, f"--out={tmp_path / 'file' / 'run'}", "--steps=1"]) == 2
    assert "run: Not a directory." in capsys.readouterr().err


def test_demo_fresh_starts_over(tmp_path: Path) -> None:
    assert main([*SMALL, f"--out={tmp_path}", "--steps=3"]) == 0
    assert main([*SMALL, f"--out={tmp_path}", "--steps=2", "--fresh"]) == 0
    assert sorted(steps_in(tmp_path)) == [0, 1, 1, 2, 2]


def test_demo_other_options_in_the_directory_of_a_run_are_refused(
    finished: tuple[Path, subprocess.CompletedProcess[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    directory, _ = finished
    assert main([*SMALL, f"--out={directory}", "--steps=7", "--seed=1"]) == 2
    shown = capsys.readouterr().err
    assert f"{directory} holds a run with other options." in shown
    assert "steps  began with 6, now 7" in shown
    assert "seed   began with 0, now 1" in shown


def test_demo_directory_of_other_files_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert main([*SMALL, f"--out={tmp_path}", "--steps=1", "--fresh"]) == 2
    assert "never overwrites" in capsys.readouterr().err
    assert [one.name for one in tmp_path.iterdir()] == ["thesis.txt"]


def test_demo_without_out_creates_a_directory_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*SMALL, "--steps=1"]) == 0
    assert main([*SMALL, "--steps=1"]) == 0
    directorys = list(Path("runs").iterdir())
    assert len(directorys) == 2
    assert all(steps_in(directory) == [0, 1, 1] for directory in directorys)


def test_demo_uneven_batch_is_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, f"--out={tmp_path / 'run'}", "--batch=7"]) == 2
    assert capsys.readouterr().err.startswith("examples.gpt: BatchError: 7 rows do not divide by 4 =")
    assert not (tmp_path / "run").exists()


def test_demo_more_devices_than_jax_has_is_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--devices=9"]) == 2
    assert "Cannot simulate 9 devices: jax is running already, with 8." in capsys.readouterr().err


def interrupted(directory: Path, *options: str) -> tuple[str, str]:
    """Start a run, send Ctrl-C after its first logged step, and return its output and errors."""
    with subprocess.Popen(
        command(directory, *options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None and running.stderr is not None
        while not running.stdout.readline().startswith("step 1/"):
            assert running.poll() is None, running.stderr.read()
        running.send_signal(signal.SIGINT)
        rest, errors = running.communicate(timeout=LIMIT_SECONDS)
    assert running.returncode == 130
    assert "Traceback" not in errors
    return rest, errors


def test_demo_continues_when_its_output_is_closed(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    with subprocess.Popen(
        command(directory, "--steps=30"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None and running.stderr is not None
        while not running.stdout.readline().startswith("step 1/"):
            assert running.poll() is None, running.stderr.read()
        running.stdout.close()  # as `head` does when it has its lines
        errors = running.stderr.read()
        assert running.wait(timeout=LIMIT_SECONDS) == 0, errors
    assert "Traceback" not in errors
    assert steps_in(directory)[-1] == 30


def test_demo_whose_output_is_closed_from_the_start_ends_without_a_traceback(tmp_path: Path) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    ended = subprocess.run(command(tmp_path / "run", "--steps=30"), stdout=writes, stderr=subprocess.PIPE, text=True)
    os.close(writes)
    assert (ended.returncode, ended.stderr) == (1, "")


def test_demo_ctrl_c_draws_the_curve_and_says_how_to_resume(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    rest, errors = interrupted(directory, "--steps=1000000")
    assert "Interrupted after step" in errors
    assert "the state is alive" in errors
    assert f"run this command again with --out {directory}\n" in rest
    assert f"curve    {directory}/loss.png" in rest
    assert steps_in(directory)[:2] == [0, 1]
    assert is_png(directory / "loss.png")


def logged_in(directory: Path) -> list[str]:
    return [line for line in (directory / "metrics.jsonl").read_text().splitlines() if '"event"' not in line]


def digests_of_last(directory: Path) -> list[object]:
    """The step of the last checkpoint, and path, shape, dtype and digest of every leaf."""
    last = max(int(one.name) for one in (directory / "checkpoints").iterdir() if one.name.isdecimal())
    (meta,) = (directory / "checkpoints" / str(last) / "meta").rglob("metadata")
    return [last, json.loads(json.loads(meta.read_text())["body"])["leaves"]]


def test_demo_interrupted_and_resumed_is_bitwise_the_uninterrupted_run(tmp_path: Path) -> None:
    options = ("--steps=500", "--dropout=0.1")
    uninterrupted, resumed = tmp_path / "uninterrupted", tmp_path / "resumed"
    subprocess.run(command(uninterrupted, *options), capture_output=True, check=True, timeout=300)
    interrupted(resumed, *options)
    assert not (resumed / "sample.txt").exists()
    again = subprocess.run(command(resumed, *options), capture_output=True, text=True, check=True, timeout=300)
    assert ": resumed  asked: 500" in again.stdout
    assert digests_of_last(resumed) == digests_of_last(uninterrupted)
    assert (resumed / "sample.txt").read_bytes() == (uninterrupted / "sample.txt").read_bytes()
    assert logged_in(resumed) == logged_in(uninterrupted)


def test_demo_help_shows_options_units_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for option in ("--steps STEPS", "--batch ROWS", "--k COUNT", "--devices DEVICES", "--seed SEED", "--out DIRECTORY"):
        assert option in shown
    assert "--dropout RATE" in shown
    assert "--bf16 compute the loss in bfloat16" in shown
    assert "microbatches per step, one after another (default: 4)" in shown
    assert "(default: runs/<date>-<time>)" in shown


@pytest.mark.parametrize("missing", ["rich", "matplotlib", "orbax"])
def test_demo_without_extra_says_what_to_install(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)  # Python's own way to say: not installed
    assert main([]) == 1
    assert capsys.readouterr().err == (
        f"examples.gpt: The demo needs {missing}. Install with: pip install -e '.[demo]'\n"
    )


def test_demo_impossible_numbers_are_all_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--steps=0", "--devices=-1"]) == 2
    shown = capsys.readouterr().err
    assert "steps    expected at least 1, got 0" in shown
    assert "devices  expected at least 1, got -1" in shown


def test_demo_dropout_of_everything_is_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dropout=1"]) == 2
    assert "dropout  expected at least 0 and below 1, got 1.0" in capsys.readouterr().err


def test_demo_dropout_and_bf16_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, f"--out={tmp_path / 'run'}", "--steps=2", "--dropout=0.5", "--bf16"]) == 0
    assert '@ grad(cast(jnp.bfloat16) @ loss, rng="example")\n' in capsys.readouterr().out
    assert sorted(steps_in(tmp_path / "run")) == [0, 1, 1, 2, 2]
