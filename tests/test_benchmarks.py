"""What the benchmarks can count exactly is counted on every push: stepc needs no more than the same step by hand.

Times are never asserted. The steps are those of `benchmarks/deferred_reduce.py` and `by_hand.py`, on small models.
"""

import dataclasses
import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.sharding import AxisType

import stepc as sc

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SCALARS = 256  # bytes: stepc also holds the norm of the gradient, a step counter and a key
KERNEL = 4 * 3 * 3 * 8 * 8  # bytes of a kernel of the small ResNet
# The convolutions of the loop that stepc computes channels last: it transposes up to three arrays for each.
REORDERED = {"mlp": 0, "resnet": 5}


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, Any]]:  # Any: modules
    """The benchmarks by name; they import each other as scripts do, and broadcast as jax does by default."""
    names = (
        "deferred_reduce", "by_hand", "memory", "input", "models", "memory_search", "page", "measuring", "nanogpt",
        "gpu", "precision",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch, jax.numpy_rank_promotion("allow"):
        patch.syspath_prepend(str(BENCHMARKS))
        for name in names:  # a folder of tests may have a module of that name
            patch.delitem(sys.modules, name, raising=False)
        yield {name: importlib.import_module(name) for name in names}
        for name in names:
            del sys.modules[name]


def small(scripts: dict[str, Any], name: str) -> Any:
    models = scripts["models"]
    return models.mlp((64, 128, 64), rows=64) if name == "mlp" else models.resnet(8, blocks=1, size=8, rows=64)


def num_copies(program: Any) -> int:
    return program.as_text().count(" copy(")


@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_eight_devices_reduce_once_in_the_memory_of_a_shard_map(scripts: dict[str, Any], name: str) -> None:
    by, model = scripts["deferred_reduce"], small(scripts, name)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    ours, by_hand, gspmd = (getattr(by, make)(model, mesh).program for make in ("ours", "by_hand", "gspmd_scan"))
    gradient = 4 * model.num_params
    sent = [
        [(row.kind, row.executions, row.bytes) for row in sc.inspect.collectives(program, mesh)]
        for program in (ours, by_hand, gspmd)
    ]
    assert sent[0] == sent[1] == [("all-reduce", 1, gradient + 4)]  # and the loss
    assert sum((executions or 0) * bytes_ for _, executions, bytes_ in sent[2]) >= by.K * gradient
    memory = [sc.inspect.memory(program).temporaries for program in (ours, by_hand)]
    assert memory[0] <= memory[1] + SCALARS + (KERNEL if REORDERED[name] else 0)
    assert num_copies(ours) <= num_copies(by_hand) + 3 * REORDERED[name]


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_one_device_needs_no_more_than_by_hand(scripts: dict[str, Any], name: str, k: int) -> None:
    by, model = scripts["by_hand"], small(scripts, name)
    traces = 0

    def loss(params: Any, batch: Any) -> jax.Array:
        nonlocal traces
        traces += 1
        return loss_of_model(params, batch)

    loss_of_model = model.make_loss()
    step = by.by_stepc(loss, k)
    lowered = step.lower(step.init(model.params), model.batch)
    ours = lowered.compile().executable
    assert traces == 1
    traces = 0
    init, hand = by.by_hand(loss, k)
    by_hand = hand.lower((model.params, init(model.params)), model.batch).compile()
    assert traces == 1
    memory = [program.memory_analysis().temp_size_in_bytes for program in (ours, by_hand)]
    reordered = REORDERED[name] if k > 1 else 0
    assert lowered.plan.reordered == reordered
    assert memory[0] <= memory[1] + SCALARS
    assert num_copies(ours) <= num_copies(by_hand) + 3 * reordered
    count = scripts["measuring"].num_instructions
    assert count(ours.as_text()) <= count(by_hand.as_text()) + 60 + 40 * reordered


@pytest.mark.parametrize(
    "what", ["clip(1.0)", "skip_nonfinite()", "epochs(2, minibatches=4)", "alternate(first, rest)"]
)
def test_transform_needs_no_more_than_by_hand_with_norms(scripts: dict[str, Any], what: str) -> None:
    memory, model = scripts["memory"], scripts["models"].mlp((64, 128, 128, 64), rows=64)
    case, (_, with_norms) = memory.cases(model, norms=False)[what], memory.cases(model, norms=True)[what]
    found = memory.temporaries(model, case, with_norms)
    assert found["stepc"] <= found["by hand with norms"] + SCALARS


def test_batch_of_a_run_is_copied_once_or_not_at_all(scripts: dict[str, Any]) -> None:
    copies = {"writable": 1, "writable, aligned": 1, "read-only, aligned": 0, "of jax": 0}
    assert scripts["input"].copies(1024, 64) == copies


def test_step_for_a_gpu_runs_in_small_on_a_cpu(
    scripts: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--quick"])
    monkeypatch.setattr(scripts["measuring"], "SHOWN", scripts["measuring"].Page())
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    scripts["gpu"].main()
    told = capsys.readouterr().out
    found = json.loads(told.splitlines()[-1])
    steps = {"stepc, attention of xla", "by hand, attention of xla"}
    assert set(found["results"]["differences"]) - {"torch.compile, fused AdamW"} == steps
    assert set(found["results"]["host_seconds"]) == set(found["results"]["differences"])
    assert {name for name, _, _ in found["ratios"]} == {*found["results"]["differences"], "sc.run"}
    assert importlib.util.find_spec("torch") or "torch is not installed: no row of PyTorch." in told
    assert "The peak of 'cpu' is not known, so there is no MFU." in told


def test_precision_learns_from_the_text_of_the_demo(scripts: dict[str, Any]) -> None:
    """It asked the demo for a function that had another name since, and nothing ran it."""
    precision = scripts["precision"]
    job = dataclasses.replace(precision.JOB, steps=1, batch=2, text_bytes=100_000, layers=1, context=8)
    (first, second) = precision.measure(job, (0, 1))["runs"]
    assert first["float32"] != second["float32"]
    assert abs(first["bfloat16"] - first["float32"]) < 0.1


def test_step_for_a_gpu_says_that_there_is_none(
    scripts: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    with pytest.raises(SystemExit):
        scripts["gpu"].main()
    assert "it needs a GPU, and JAX has found none: its backend is 'cpu'. See --quick." in capsys.readouterr().err


def test_mfu_is_of_the_peak_in_the_data_sheet_and_of_the_products_that_the_model_needs(scripts: dict[str, Any]) -> None:
    gpu, size = scripts["gpu"], scripts["nanogpt"].Size(2, 2, 8, 4, 16, 3)
    blocks = 2 * (3 + 1 + 4 + 4) * 8 * 8
    assert gpu.model_flops(size) == 12 * (6 * (16 * 8 + blocks + (2 * 2 + 1) * 8) + 12 * 2 * 8 * 4)
    assert gpu.peak_of("NVIDIA H200") == gpu.peak_of("NVIDIA H100 80GB HBM3") == 989e12


def test_page_shows_the_newest_result_its_plot_and_what_is_said_of_it(
    scripts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measuring, page = scripts["measuring"], scripts["page"]
    for module in (measuring, page):
        monkeypatch.setattr(module, "HERE", tmp_path)
    monkeypatch.setattr(measuring, "SHOWN", measuring.Page())
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "head.md").write_text("# Benchmarks\n")
    (tmp_path / "notes" / "small.md").write_text("It is small.\n")
    setting = measuring.begin("Is it small?")
    measuring.plot("one", measuring.Spread(1.0, 0.9, 1.2), 1.05)
    measuring.show("Sizes", [("", "ratio"), ("a|b", "1.00 (0.90-1.20)")])
    measuring.finish("small", {**setting, "date": "2026-01-01"}, [], quick=False, save=True)
    measuring.finish("small", {**setting, "date": "2026-01-02"}, [], quick=False, save=True)
    measuring.finish("small", {**setting, "date": "2026-01-03"}, [], quick=True, save=True)  # says nothing
    old = json.loads((tmp_path / "results" / "2026-01-01-small.json").read_text())
    del old["tables"]
    (tmp_path / "results" / "2025-01-01-older.json").write_text(json.dumps({**old, "benchmark": "older"}))
    page.main()
    head, section, question, when, picture, table, said = (tmp_path / "README.md").read_text().strip().split("\n\n", 6)
    assert (head, section, question) == ("# Benchmarks", "## `small`", "Is it small?")
    assert when.startswith("2026-01-02; commit ")
    assert picture == "![Ratios of small](plots/small.png)"
    assert (table, said) == ("**Sizes**", "|  | ratio |\n|---|---|\n| a\\|b | 1.00 (0.90-1.20) |\n\nIt is small.")
    assert (tmp_path / "plots" / "small.png").stat().st_size > 1000
