"""`stepc checkpoints`: the list, one checkpoint, two compared; damage and mistakes."""

import json
import re
import shutil
import zlib
from pathlib import Path

import pytest
from faults.plan import FaultPlan, batch_of, fresh, step

import stepc as sc
from stepc.cli import main


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "runs" / "first"
    values = iter([3.0, 1.5, 2.0])
    sc.run(
        step(), fresh(), FaultPlan().batches(6),
        eval=sc.Eval(2, lambda state, batch: {"loss": next(values)}, [batch_of(1)]),
        checkpoint=sc.Checkpoints(folder, every=2, keep=9, best=("eval/loss", "min")),
    )  # fmt: skip
    return folder


@pytest.fixture
def runs(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that a test may damage."""
    shutil.copytree(saved.parent, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def shown_by(words: str, code: int, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command prints, without what differs from run to run."""
    assert main(["checkpoints", *words.split()]) == code
    out, err = capsys.readouterr()
    text = re.sub(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "TIME", (err if code == 2 else out).replace(str(Path.cwd()), "CWD")
    )
    text = re.sub(r"\d+\.\d kB( on disk)?", r"SIZE\1", re.sub(r"(jax|orbax) [\d.]+", r"\1 V", text))
    return re.sub(r"(loss|grad_norm) [-\d.e]+", r"\1 X", text)


def test_list_has_a_line_for_each_checkpoint(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown_by("runs/first", 0, capsys).splitlines()
    assert [line.split() for line in (lines[0], lines[2])] == [
        ["step", "saved", "size", "eval/loss", "loss", "grad_norm"],
        ["4", "TIME", "SIZE", "1.5", *lines[2].split()[4:6], "intact,", "best", "by", "eval/loss,", "min"],
    ]
    assert [line.split()[0] for line in lines[1:]] == ["2", "4", "6"]
    assert lines[1].endswith("  intact") and lines[3].endswith("  intact") and len(lines) == 4


def test_damaged_checkpoint_is_in_the_list_with_the_reason(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(runs / "first" / "4" / "state")
    (runs / "first" / "6" / "meta" / "metadata").write_text("{")
    lines = shown_by("runs/first", 1, capsys).splitlines()
    assert lines[2].endswith("damaged: 6 of 6 leaves are missing: params/w, best by eval/loss, min")
    assert "damaged: JSONDecodeError: " in lines[3]
    assert "is damaged: 6 of 6 leaves are missing: params/w" in shown_by("runs/first compare 2 4", 1, capsys)


def test_show_reads_every_leaf(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown_by("runs/first show 4", 0, capsys)
    assert text == (
        "step     4\n"
        "saved    TIME, by 1 process, jax V, orbax V\n"
        "trained  update(optax.adam(0.05)) @ clip(10.0) @ grad(loss)\n"
        "metrics  grad_norm X, loss X, eval/loss X\n"
        "state    6 leaves, 52 B; SIZE on disk\n"
        "intact   yes: each leaf was read, and has its saved CRC-32\n"
        "\n"
        "params/w           float32[3]  12 B\n"
        "opt_state/0/count  int32[]     4 B\n"
        "opt_state/0/mu/w   float32[3]  12 B\n"
        "opt_state/0/nu/w   float32[3]  12 B\n"
        "step               int32[]     4 B\n"
        "rng                key<fry>[]  8 B\n"
    )


def test_show_finds_a_leaf_that_changed_on_the_disk(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = runs / "first" / "2" / "meta" / "metadata"
    meta = json.loads(json.loads(file.read_text())["body"])
    meta["leaves"][0][-1] ^= 1
    body = json.dumps(meta)
    file.write_text(json.dumps({"body": body, "crc32": zlib.crc32(body.encode())}))
    text = shown_by("runs/first show 2", 1, capsys)
    assert re.search("intact   no: params/w: CheckpointError: the CRC-32 of params/w is .{8}, and .{8} was saved", text)


def test_compare_says_which_leaves_differ_and_by_how_much(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown_by("runs/first compare 2 4", 1, capsys).splitlines()
    assert lines[0] == "1 of 6 leaves are equal, to the last bit"
    assert re.fullmatch(r"params/w +float32\[3\]  3 of 3 numbers, by at most [\d.]+, [\d.]+ of the largest", lines[1])
    assert re.fullmatch(r"step +int32\[\]     1 of 1 numbers, by at most 2, 1 of the largest", lines[5])
    shutil.copytree(runs / "first", runs / "second")
    assert shown_by("runs/first compare 2 runs/second/2", 0, capsys) == "6 of 6 leaves are equal, to the last bit\n"


def test_compare_of_other_states_names_the_leaves_of_one_alone(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sc.run(lambda w, batch: (w, {"loss": w["w"].sum()}), {"w": fresh().params["w"]}, [batch_of(1)],
           checkpoint=sc.Checkpoints("runs/plain", every=1))  # fmt: skip
    lines = shown_by("runs/plain compare 1 runs/first/2", 1, capsys).splitlines()
    assert lines[0] == "0 of 7 leaves are equal, to the last bit"
    assert lines[1].split(maxsplit=2) == ["w", "float32[3]", "in CWD/runs/first/2: nothing"]
    assert lines[2].split(maxsplit=2) == ["params/w", "nothing", "in CWD/runs/first/2: float32[3]"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("runs", "CheckpointError: There is no checkpoint in CWD/runs.\n\n  There are checkpoints in CWD/runs/first."),
        ("none", "CheckpointError: There is no checkpoint in CWD/none."),
        (
            "runs/first show",
            "ConfigError: Invalid arguments to `stepc checkpoints DIR show`.\n\n  takes  1 step\n  got    none",
        ),
        (
            "runs/first show 5",
            "CheckpointError: There is no checkpoint of step 5 in CWD/runs/first.\n\n  steps  6, 4, 2",
        ),
        ("runs/first show last", "ConfigError: Invalid step.\n\n  expected  a step, or DIR/STEP\n  got       last"),
    ],
)  # fmt: skip
def test_mistake_exits_with_two(runs: Path, words: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert shown_by(words, 2, capsys) == f"stepc: {text}\n"
