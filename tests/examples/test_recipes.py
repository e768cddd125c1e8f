"""The recipes, each with the real library: what a run resumes, what a tracker has, and what a job does on SIGTERM."""

import importlib
import importlib.util
import inspect
import logging
import os
import re
import shutil
import struct
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from waiting import eventually

import stepc as sc

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "examples" / "recipes"
LIBRARIES = {
    "grain_batches": "grain",
    "hf_datasets": "datasets",
    "mlflow_logger": "mlflow",
    "slurm_train": "stepc",
    "tensorboard_logger": "tensorboardX",
    "tf_data": "tensorflow",
    "torch_dataloader": "torch",
    "torch_exact": "torch",
    "tyro_config": "tyro",
    "wandb_logger": "wandb",
}
pytestmark = pytest.mark.filterwarnings("default")  # those of the libraries are not ours


def recipe(name: str) -> ModuleType:
    """A recipe, if its library is here."""
    if importlib.util.find_spec(LIBRARIES[name]) is None:
        pytest.skip(f"{LIBRARIES[name]} is not installed: pip install '.[recipes]'")
    return importlib.import_module(f"examples.recipes.{name}")


def weights(run: sc.Run) -> np.ndarray:
    return np.asarray(run.state.params["w"])


def test_each_recipe_is_tested_short_and_on_the_page() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__") == sorted(LIBRARIES)
    page = (ROOT / "docs" / "recipes.md").read_text()
    for path in sorted(FOLDER.iterdir()):
        if path.name not in ("__init__.py", "__pycache__"):
            assert len(path.read_text().splitlines()) <= 90
            assert f"(../examples/recipes/{path.name})" in page, path.name


@pytest.mark.parametrize("name", ["grain_batches", "hf_datasets", "tf_data", "torch_exact"])
def test_data_run_in_parts_is_the_whole_run_bitwise(name: str, tmp_path: Path) -> None:
    """The parts end within an epoch and at its end; an epoch has seven or eight batches."""
    main = recipe(name).main
    whole = main(tmp_path / "whole", steps=23)
    for steps in (3, 7, 16):
        main(tmp_path / "parts", steps=steps)
    parts = main(tmp_path / "parts", steps=23)
    assert parts.steps == whole.steps == 23
    np.testing.assert_array_equal(weights(parts), weights(whole))
    assert weights(whole).min() > 0.1  # of the 1 that each of them becomes


def test_torch_workers_give_the_same_run_and_resume(tmp_path: Path) -> None:
    main = recipe("torch_exact").main
    whole = main(tmp_path / "whole", steps=9)
    main(tmp_path / "parts", steps=4, num_workers=1)
    parts = main(tmp_path / "parts", steps=9, num_workers=1)
    np.testing.assert_array_equal(weights(parts), weights(whole))


def test_torch_order_leaves_out_the_short_batch_and_changes_each_epoch() -> None:
    order = recipe("torch_exact").Order(20, seed=0)
    batches = iter(order)
    first, second, third, fourth = (next(batches) for _ in range(4))
    assert len({*first, *second}) == 16 and len({*third, *fourth}) == 16
    assert first + second != third + fourth
    order.first = 3
    assert next(iter(order)) == fourth


def test_torch_dataloader_resumes_its_state_and_begins_its_data_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    main = recipe("torch_dataloader").main
    first = main(tmp_path, steps=8)
    with caplog.at_level(logging.WARNING, "stepc"):
        again = main(tmp_path, steps=12)
    assert "resume_not_exact" in caplog.text
    assert (first.steps, again.steps) == (8, 12)
    whole = main(tmp_path / "whole", steps=12)
    assert not np.array_equal(weights(again), weights(whole))


LOGGERS = [("wandb_logger", "WandbLogger"), ("mlflow_logger", "MlflowLogger")]


@pytest.mark.parametrize(("name", "logger"), LOGGERS)
def test_logger_has_at_most_fifteen_lines(name: str, logger: str) -> None:
    assert len(inspect.getsource(getattr(recipe(name), logger)).splitlines()) <= 15


def test_wandb_offline_files_hold_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main = recipe("wandb_logger").main
    monkeypatch.setenv("WANDB_SILENT", "true")
    for steps in (15, 25):
        main(tmp_path / "first", steps=steps)
    record = importlib.import_module("wandb.proto.wandb_internal_pb2").Record
    files = sorted((tmp_path / "first" / "wandb").glob("offline-run-*-first/*.wandb"))
    assert len(files) == 2

    def found(file: Path) -> list[Any]:
        return [record.FromString(data) for data in records_of(file)]

    eventually(lambda: all(any(one.HasField("exit") for one in found(file)) for file in files))  # its process writes
    logged, ids, trained = [], [], []
    for one in [one for file in files for one in found(file)]:
        values = {item.key or "/".join(item.nested_key): item.value_json for item in one.history.item}
        logged += [(int(values["_step"]), float(values["loss"]))] if values else []
        ids += [one.run.run_id] if one.HasField("run") else []
        trained += [item.value_json for item in one.config.update if item.key == "trains"]
    assert ids == ["first", "first"]
    assert [step for step, _ in logged] == [1, 10, 15, 20, 25]
    losses = [loss for _, loss in logged]
    assert losses == sorted(losses, reverse=True)
    assert len(trained) == 2 and all("optax.adam(1e-2)" in text for text in trained)


def records_of(file: Path) -> Iterator[bytes]:
    """The records of a .wandb file, which is a log of LevelDB after a header of seven bytes."""
    data, place, parts = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:  # the end of a block
            place += left
            continue
        size, kind = struct.unpack_from("<HB", data, place + 4)
        parts += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # the whole, or its last part
            yield parts
            parts = b""


def test_mlflow_run_goes_on_under_its_id(tmp_path: Path) -> None:
    main = recipe("mlflow_logger").main
    mlflow = importlib.import_module("mlflow")
    for steps in (15, 25):
        main(tmp_path, steps=steps)
    client = mlflow.MlflowClient()
    (run,) = client.search_runs(["0"])
    logged = client.get_metric_history(run.info.run_id, "loss")
    assert run.info.run_id == (tmp_path / "mlflow_run_id").read_text()
    assert [one.step for one in logged] == [1, 10, 15, 20, 25]
    assert [one.value for one in logged] == sorted((one.value for one in logged), reverse=True)
    assert "adam" in run.data.tags["start.trains"] and run.data.tags["end.ended"] == "steps"


def test_tensorboard_has_curves_and_images(tmp_path: Path) -> None:
    main = recipe("tensorboard_logger").main
    main(tmp_path, steps=25)
    curves, images = ([*one.iterdir()] for one in (tmp_path / "curves", tmp_path / "images"))
    assert any(b"loss" in file.read_bytes() for file in curves)
    assert any(b"PNG" in file.read_bytes() for file in images)


def test_tyro_command_line_is_the_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = recipe("tyro_config")
    cli = importlib.import_module("tyro").cli
    assert "clip(1.0) @ accumulate(2)" in repr(module.pipeline(cli(module.Config, args=[])))
    words = ["--optimizer", "sgd", "--learning-rate", "0.1", "--clip", "None", "--directory", str(tmp_path)]
    config = cli(module.Config, args=[*words, "--steps", "12"])
    assert (config.optimizer, config.learning_rate) == ("sgd", 0.1)
    assert "clip" not in repr(module.pipeline(config))
    assert module.main(config).steps == 12
    with pytest.raises(SystemExit):
        cli(module.Config, args=["--optimizer", "lion"])
    assert "lion" in capsys.readouterr().err


def test_tyro_other_numbers_resume_and_another_optimizer_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = recipe("tyro_config")
    module.main(module.Config(tmp_path, steps=10))
    with caplog.at_level(logging.WARNING, "stepc"):
        assert module.main(module.Config(tmp_path, steps=20, learning_rate=1e-3)).steps == 20
    assert "pipeline_changed" in caplog.text
    with pytest.raises(sc.ResumeError):
        module.main(module.Config(tmp_path, steps=30, optimizer="sgd"))


SRUN = """
import os, pathlib, signal, socket, subprocess, sys, time
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = str(free.getsockname()[1])
place = {"SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "1"}
place |= {"JAX_COORDINATOR_PORT": port, "JAX_COORDINATOR_BIND_ADDRESS": "127.0.0.1:" + port}
tasks = [
    subprocess.Popen(sys.argv[1:], env={**os.environ, **place, "SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)})
    for n in range(2)
]
if sys.argv[-1] == "1000000":  # the time is over after the first checkpoint
    while not [*pathlib.Path("runs/slurm").glob("[0-9]*")] and tasks[0].poll() is None:
        time.sleep(0.05)
    for one in tasks:
        one.send_signal(signal.SIGTERM)
sys.exit(max(one.wait() for one in tasks))
"""


def test_slurm_script_saves_on_sigterm_requeues_and_resumes(tmp_path: Path) -> None:
    """With an `srun` of ours, which starts two processes as SLURM does, and a `scontrol` that writes down its words."""
    commands = tmp_path / "bin"
    commands.mkdir()
    (tmp_path / "srun.py").write_text(SRUN)
    for name, line in {
        "srun": f'exec "{sys.executable}" "{tmp_path}/srun.py" "$@"',
        "python": f'exec "{sys.executable}" "$@"',
        "scontrol": f'echo "$@" >> "{tmp_path}/scontrol"',
    }.items():
        (commands / name).write_text(f"#!/bin/sh\n{line}\n")
        (commands / name).chmod(0o755)
    for name in ("slurm.sbatch", "slurm_train.py"):
        shutil.copy(FOLDER / name, tmp_path)

    def sbatch(steps: int) -> subprocess.CompletedProcess[str]:
        here = {"PATH": f"{commands}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "PYTHONPATH": str(ROOT)}
        environment = {**os.environ, **here, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
        words = ["bash", "slurm.sbatch", str(steps)]
        return subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    preempted = sbatch(1_000_000)
    assert preempted.returncode == 143, preempted.stderr
    assert (tmp_path / "scontrol").read_text() == "requeue 7\n"
    saved = max(int(path.name) for path in (tmp_path / "runs" / "slurm").iterdir() if path.name.isdecimal())
    finished = sbatch(saved + 5)
    assert finished.returncode == 0, finished.stderr
    assert f"\n{saved + 5} {{" in finished.stdout and f"resumed at step {saved}" in finished.stderr
    assert (tmp_path / "scontrol").read_text() == "requeue 7\n"  # not once more


def test_dockerfile_copies_what_is_there_and_starts_a_program_that_resumes(tmp_path: Path) -> None:
    """Nothing here can build an image. What it starts is run as in a container: one process, without SLURM."""
    lines = (FOLDER / "Dockerfile").read_text().splitlines()
    sources = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    assert sources and all((ROOT / source).exists() for source in sources)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [project["readme"], *project["license-files"]]
    assert {"pyproject.toml", "stepc", *needed} <= set(sources)
    extras = re.findall(r"EXTRAS=([\w,]+)", "\n".join(lines))
    assert extras and all(one in project["optional-dependencies"] for extra in extras for one in extra.split(","))
    (program,) = [line.split()[1:] for line in lines if line.startswith("COPY examples")]
    assert program[1] == "train.py" and lines[-1] == 'ENTRYPOINT ["python", "train.py"]'
    shutil.copy(ROOT / program[0], tmp_path / program[1])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    environment |= {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    for steps in ("3", "5"):
        words = [sys.executable, "train.py", steps]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and done.stdout.startswith(f"{steps} "), done.stderr
    assert "resumed at step 3" in done.stderr
