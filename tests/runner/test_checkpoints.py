"""Where checkpoints can be, which of them are ours, who holds the directory, and what may change before a resume."""

from pathlib import Path
from typing import Any

import pytest
from faults.plan import FaultPlan, Remembering, by_a_plain_loop, digest, fresh, step

import stepc as sc


def saved_in(folder: str | Path, num: int = 6, **options: Any) -> tuple[sc.Run, Remembering]:
    """A run of `num` steps with a checkpoint every third step, and what its logger heard."""
    logger = Remembering()
    keep = sc.Checkpoints(folder, every=3, **options)
    return sc.run(step(), fresh(), FaultPlan().batches(num), checkpoint=keep, loggers=[logger]), logger


def steps_of(event: str, logger: Remembering) -> list[int]:
    return [at for name, _, at in logger.events if name == event]


def right(num: int) -> str:
    return digest(by_a_plain_loop(list(range(1, num + 1))))


UNUSABLE = ("x/[shared]/run", "a\\b", "a*b", "a?b", "[", "\\", "x/\\[y")


@pytest.mark.parametrize("name", UNUSABLE)
def test_path_that_orbax_globs_is_refused_at_the_start(name: str, tmp_path: Path) -> None:
    with pytest.raises(sc.CheckpointError, match="Orbax cannot save in this directory"):
        saved_in(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_working_directory_that_orbax_globs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "[shared]").mkdir()
    monkeypatch.chdir(tmp_path / "[shared]")
    with pytest.raises(sc.CheckpointError) as raised:
        saved_in("run")
    assert str(raised.value) == "\n\n".join(
        [
            "Orbax cannot save in this directory: its path holds '['.",
            f"  directory  {str(tmp_path / '[shared]' / 'run')!r}",
            "  Name another directory, or a link to this one.",
        ]
    )


def test_link_to_a_directory_that_orbax_globs_is_usable(tmp_path: Path) -> None:
    (tmp_path / "[shared]").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "[shared]")
    saved_in(tmp_path / "link")
    run, _ = saved_in(tmp_path / "link", 0)
    assert (run.steps, digest(run.state)) == (6, right(6))


def test_path_that_is_not_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(sc.CheckpointError, match="its path is not UTF-8"):
        saved_in(tmp_path / "x\udcff")
    with pytest.raises(sc.CheckpointError, match=r"its path holds '\\x00'"):
        saved_in(f"{tmp_path}/x\0y")


@pytest.mark.parametrize(
    "name", ["a b", "ü→é", "]{a,b}", "%20#&'\"", "a\nb", "$HOME", "n" * 200, "12", "lock", "~", "^!"]
)
def test_unusual_path_can_be_read_back(name: str, tmp_path: Path) -> None:
    saved_in(tmp_path / name, 3)
    run, _ = saved_in(tmp_path / name, 0)
    assert (run.steps, digest(run.state)) == (3, right(3))


def test_working_directory_that_changes_in_the_run_moves_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    keep = sc.Checkpoints("kept", every=3)
    leave = (2, lambda *about: monkeypatch.chdir(tmp_path / "elsewhere"))
    sc.run(step(), fresh(), FaultPlan().batches(6), checkpoint=keep, hooks=[leave])
    assert not list((tmp_path / "elsewhere").iterdir())
    assert (tmp_path / "kept" / "6").is_dir()


def test_home_directory_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    saved_in("~/run", 3)
    assert (tmp_path / "home" / "run" / "3").is_dir()
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    ("directory", "expected"),
    [
        ("", 'a path; "." is the working directory'),
        ("s3://bucket/run", "a directory on a mounted file system"),
        (Path("gs://bucket/run"), "a directory on a mounted file system"),
        ("file:///tmp/run", "a directory on a mounted file system"),
        ("~nobody-of-this-name/run", "the home directory of a user that exists"),
    ],
)
def test_directory_that_is_none_is_refused(directory: str | Path, expected: str) -> None:
    with pytest.raises(sc.ConfigError) as raised:
        sc.Checkpoints(directory, every=1)
    facts = f"directory  expected {expected}, got {directory!r}"
    assert str(raised.value) == f"Invalid arguments to `Checkpoints`.\n\n  {facts}"


def test_checkpoint_without_its_leaves_is_not_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def merge_nothing(*about: Any, **options: Any) -> None: ...

    name = "orbax.checkpoint._src.serialization.ocdbt_utils.merge_ocdbt_per_process_files"
    monkeypatch.setattr(name, merge_nothing)  # as where Orbax finds no file to merge: it logs that, and goes on
    logger = Remembering()
    with pytest.raises(sc.CheckpointError, match=r"Step 3 could not be saved: .* 6 of 6 leaves are not in it: "):
        sc.run(step(), fresh(), FaultPlan().batches(6), checkpoint=sc.Checkpoints(tmp_path, every=3), loggers=[logger])
    assert steps_of("checkpoint", logger) == []
    assert sorted(one.name for one in tmp_path.iterdir()) == ["abandoned", "lock"]
