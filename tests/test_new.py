"""`stepc new`: each project trains, resumes, keeps its budget, and passes the linter and its own tests."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from stepc._projects import FILES, LIBRARIES
from stepc.cli import main

ROOT = Path(__file__).parent.parent


def run_in(directory: Path, *words: str) -> str:
    """What a process prints in a directory, with this stepc; its own number of devices."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, *words], cwd=directory, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("model", LIBRARIES)
def test_project_trains_and_passes_its_own_tests(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    directory = Path("moons")
    assert main(["new", "moons", "--model", model]) == 0
    assert capsys.readouterr().out == (
        "model.py, step.py, train.py, test_step.py in moons. Next:\n\n"
        "  cd moons\n"
        "  python train.py                            # trains, evaluates, saves; the same command resumes\n"
        "  pytest                                     # the budget of the step, and its reference\n"
        "  stepc explain step.py:build --mesh data=8  # what it computes and sends\n"
    )
    assert sorted(path.name for path in directory.iterdir()) == sorted(FILES)
    printed = run_in(directory, "-W", "error", "train.py", "60")
    found = re.search(r"^steps at step 60; the best checkpoint: {'accuracy': ([\d.]+)", printed, flags=re.MULTILINE)
    assert found is not None and float(found[1]) > 0.8  # the half moons overlap a little
    if model == "nnx":  # the same for all of them
        resumed = run_in(directory, "-W", "error", "train.py", "80")
        assert "step 60: resumed" in resumed and "\nsteps at step 80; the best checkpoint: " in resumed
    assert "4 passed" in run_in(directory, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider")


def test_budget_of_a_project_is_broken_by_a_dearer_step(tmp_path: Path) -> None:
    assert main(["new", str(tmp_path / "moons")]) == 0
    file = tmp_path / "moons" / "step.py"
    text = file.read_text()
    dearer = text.replace("@ sc.clip(1.0)\n    @ sc.accumulate(2)", "@ sc.accumulate(2) @ sc.clip(1.0) #").replace(
        "  # … over two", "\n    # … over two"
    )
    assert dearer != text
    file.write_text(dearer)
    with pytest.raises(AssertionError, match="gradient_reductions"):
        run_in(tmp_path / "moons", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "budget")


def test_command_line_reads_the_step_of_a_project(tmp_path: Path) -> None:
    assert main(["new", str(tmp_path), "--model", "linen"]) == 0
    shown = run_in(tmp_path, "-m", "stepc", "explain", "step.py:build", "--mesh", "data=8")
    assert "plan of update(optax.adamw(3e-3)) @ clip(1.0) @ accumulate(2)" in shown


def test_files_of_a_project_are_formatted(tmp_path: Path) -> None:
    for model in LIBRARIES:
        assert main(["new", str(tmp_path / model), "--model", model]) == 0
    ruff = [sys.executable, "-m", "ruff"]
    if subprocess.run([*ruff, "--version"], capture_output=True).returncode:
        pytest.skip("ruff is a tool of contributors")
    for words in (
        ["check", "--isolated", "--line-length=120"],
        ["format", "--check", "--isolated", "--line-length=120"],
    ):
        done = subprocess.run([*ruff, *words, str(tmp_path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            ["full"],
            "The directory full is not empty.\n\n  holds  a, b, c, d, e and 1 more\n\n"
            "  Name a directory that is new, or empty.",
        ),
        (["full/a"], "full/a is a file.\n\n  Name a directory that is new, or empty."),
    ],
)
def test_mistake_is_a_message_and_writes_nothing(
    words: list[str], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    for name in "abcdef":
        Path("full", name).write_text("mine")
    assert main(["new", *words]) == 2
    assert capsys.readouterr().err == f"stepc: ConfigError: {text}\n"
    assert sorted(path.name for path in Path("full").iterdir()) == list("abcdef")


def test_unknown_model_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["new", "x", "--model", "equinoks"])
    assert "Did you mean 'equinox'?" in capsys.readouterr().err
