"""The public surface: the literal list of names, what `dir` shows, and that each name is documented."""

import inspect
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
from catalogue import SAMPLES

import stepc as sc
from stepc._language.pipeline import transform_name

PACKAGE = Path(sc.__file__).parent
# Written out, so that a name is added or removed on purpose: users rely on it from the first release on.
NAMES = """
BatchError Budget BudgetError Buffers BuildError CSV CheckpointError Checkpoints Compiled ConfigError Console Data
DataError DeviceError EarlyStopping EquivalenceError Eval FieldTypeError FieldValueError Fn Gradient Interrupted JSONL
Kind Last LossError Lowered Max Mean Microbatch Min NonFiniteError PeerError Picture Pipeline PipelineTypeError
Preempted Profile Raise Reference RejectedError ResumeError Retry Rollback Run ShardingError Skip State Step StepError
StepResult StepcError Stop Sum TensorBoard Throughput Transform Tuning Watchdog accumulate across alternate cast clip
compile dp ema epochs errors evaluate grad init_distributed inspect logical loss_scale measure nodes noise pad_batch
reference remat repeat report restore rows run sam scale shard skip_nonfinite testing topology tp tune update
""".split()


def test_public_names_are_these() -> None:
    assert sc.__all__ == NAMES
    assert sorted(NAMES) == NAMES


def test_dir_shows_the_public_names_and_no_others() -> None:
    # In a process of its own: an import of `stepc.cli` elsewhere would add its name.
    code = "import json, stepc; print(json.dumps([name for name in dir(stepc) if not name.startswith('_')]))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(found.stdout) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_public_name_is_documented(name: str) -> None:
    assert inspect.getdoc(getattr(sc, name))


@pytest.mark.parametrize("module", [sc.inspect, sc.nodes, sc.report, sc.testing])
def test_names_of_a_public_module_are_documented(module: ModuleType) -> None:
    for name, value in vars(module).items():
        if not name.startswith("_") and callable(value):  # a table, such as PROBES, has no docstring
            assert inspect.getdoc(value), f"{module.__name__}.{name} has no docstring"


def test_version_is_that_of_the_distribution() -> None:
    assert sc.__version__ == metadata.version("stepc")


def test_types_are_shipped() -> None:
    assert (PACKAGE / "py.typed").exists()


TRANSFORMS = [name for name in NAMES if type(getattr(sc, name)).__name__ == "function"]
TRANSFORMS = [name for name in TRANSFORMS if getattr(sc, name).__module__.startswith("stepc._language.transforms")]
PARTS = ("Meaning:", "Why:", "Args:", "Shapes:", "Units:", "Type:", "Errors:", "Example:", "Source:")


@pytest.mark.parametrize("name", [*TRANSFORMS, "dp", "logical", "tp"])
def test_transform_is_documented_after_the_template(name: str) -> None:
    text = inspect.getdoc(getattr(sc, name)) or ""
    parts = tuple(part for part in PARTS if part != "Args:" or inspect.signature(getattr(sc, name)).parameters)
    parts = parts if name in TRANSFORMS else tuple(part for part in parts if part not in ("Shapes:", "Units:", "Type:"))
    places = [text.find(f"\n{part}") for part in parts]
    assert -1 not in places, [part for part, place in zip(parts, places, strict=True) if place == -1]
    assert places == sorted(places)


def test_every_transform_has_a_sample() -> None:
    classes = {transform_name(type(sample)) for sample in SAMPLES.values()}
    assert classes == set(TRANSFORMS)
    assert classes == {path.stem for path in (PACKAGE / "_language" / "transforms").glob("[!_]*.py")}
