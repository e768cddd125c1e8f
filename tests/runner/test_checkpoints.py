"""Where checkpoints can be, which of them are ours, who holds the directory, and what may change before a resume."""

import errno
import os
import shutil
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults.plan import FaultPlan, Remembering, by_a_plain_loop, digest, fresh, step

import stepc as sc
from stepc._runner import checkpoint_lock


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


def test_what_is_no_checkpoint_is_left_alone(tmp_path: Path) -> None:
    saved_in(tmp_path)
    for name in ("0001", "2024", "٣"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("mine")
    shutil.copytree(tmp_path / "6", tmp_path / "0006")
    (tmp_path / "2").write_text("a file")
    (tmp_path / "4").symlink_to(tmp_path / "nowhere")
    run, logger = saved_in(tmp_path, 12, keep=1)
    assert digest(run.state) == right(12)
    assert steps_of("resumed", logger) == [6]
    assert not {"damaged_checkpoint", "abandoned_checkpoint", "failure"} & set(logger.names())
    left = ["0001", "0006", "12", "2", "2024", "4", "lock", "٣"]
    assert sorted(one.name for one in tmp_path.iterdir()) == left
    assert all((tmp_path / name / "notes.txt").read_text() == "mine" for name in ("0001", "2024", "٣"))


def test_link_to_a_checkpoint_is_read_and_not_deleted(tmp_path: Path) -> None:
    saved_in(tmp_path / "kept")
    (tmp_path / "kept" / "6").rename(tmp_path / "other disk")
    (tmp_path / "kept" / "6").symlink_to(tmp_path / "other disk")
    run, logger = saved_in(tmp_path / "kept", 12, keep=1)
    assert (steps_of("resumed", logger), digest(run.state)) == ([6], right(12))
    assert sorted(one.name for one in (tmp_path / "kept").iterdir()) == ["12", "6", "lock"]
    assert (tmp_path / "other disk" / "state").is_dir()


def test_renamed_checkpoint_neither_counts_nor_is_restored(tmp_path: Path) -> None:
    saved_in(tmp_path)
    (tmp_path / "3").rename(tmp_path / "70")
    run, logger = saved_in(tmp_path, 12, keep=1)
    assert (run.steps, digest(run.state)) == (12, right(12))
    assert steps_of("checkpoint", logger) == [9, 12]
    assert steps_of("resumed", logger) == [6]
    why = "CheckpointError: it is the checkpoint of step 3, and its folder was renamed"
    assert [facts["why"] for name, facts, at in logger.events if (name, at) == ("damaged_checkpoint", 70)] == [why]
    assert sorted(one.name for one in tmp_path.iterdir()) == ["12", "70", "lock"]


def test_only_a_renamed_checkpoint_is_an_error_that_names_its_step(tmp_path: Path) -> None:
    saved_in(tmp_path, 3)
    (tmp_path / "3").rename(tmp_path / "70")
    with pytest.raises(sc.ResumeError, match="70  CheckpointError: it is the checkpoint of step 3"):
        saved_in(tmp_path, 6)


def test_checkpoint_that_someone_deletes_first_is_not_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def renaming(self: Path, target: Path) -> Path:
        if self == tmp_path / "3":
            shutil.rmtree(self)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", renaming)
    assert "failure" not in saved_in(tmp_path, 9, keep=1)[1].names()
    assert sorted(one.name for one in tmp_path.iterdir()) == ["9", "lock"]


def refuse_deletion(monkeypatch: pytest.MonkeyPatch, of: Path) -> None:
    """As the file system of another user does, which root cannot be refused by."""
    rename = Path.rename

    def refusing(self: Path, target: Path) -> Path:
        if self == of:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refusing)


def test_deletion_that_fails_is_a_failure_to_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_deletion(monkeypatch, tmp_path / "3")
    what = r"Step 6 is saved, but older checkpoints could not be deleted: PermissionError: .*'.*/3'"
    with pytest.raises(sc.CheckpointError, match=what) as raised:
        saved_in(tmp_path, 9, keep=1)
    assert raised.value.run is not None
    assert digest(saved_in(tmp_path, 6, keep=2)[0].state) == right(6)


def test_deletion_that_fails_may_be_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_deletion(monkeypatch, tmp_path / "3")
    logger, keep = Remembering(), sc.Checkpoints(tmp_path, every=3, keep=1)
    data = FaultPlan().batches(12)
    run = sc.run(step(), fresh(), data, checkpoint=keep, loggers=[logger], on_error={"save": "skip"})
    assert (digest(run.state), run.failures) == (right(12), {"save": 3})
    assert (steps_of("checkpoint", logger), steps_of("failure", logger)) == ([3, 6, 9, 12], [6, 9, 12])
    assert {"3", "12"} <= {one.name for one in tmp_path.iterdir()}


def fail_flock(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def flock(*about: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(checkpoint_lock.fcntl, "flock", flock)


NO_FLOCK = pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])


@NO_FLOCK
def test_file_system_without_flock_has_another_lock(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_flock(monkeypatch, code)
    refused: list[str] = []

    def second(*about: Any) -> None:
        with pytest.raises(sc.CheckpointError) as raised:
            saved_in(tmp_path)
        refused.append(str(raised.value))

    logger, keep = Remembering(), sc.Checkpoints(tmp_path, every=3)
    data = FaultPlan().batches(6)
    run = sc.run(step(), fresh(), data, checkpoint=keep, loggers=[logger], hooks=[(4, second)])
    assert digest(run.state) == right(6)
    why = f"no flock here: {os.strerror(code)} ({errno.errorcode[code]})"
    assert [facts for name, facts, _ in logger.events if name == "exclusive_lock"] == [{"why": why}]
    assert len(refused) == 1
    assert f"used by    process {os.getpid()} on {socket.gethostname()}, since " in refused[0]
    assert refused[0].endswith(f"If that process has ended, delete {tmp_path / 'lock.exclusive'}.")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["3", "6", "lock"]


def test_exclusive_lock_of_a_process_that_has_ended_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_flock(monkeypatch, errno.ENOLCK)
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    lock = tmp_path / "lock.exclusive"
    lock.write_text(f"process {int(ended.stdout)} on {socket.gethostname()}, since yesterday")
    assert saved_in(tmp_path)[0].steps == 6
    assert sorted(one.name for one in tmp_path.iterdir()) == ["3", "6", "lock"]


@pytest.mark.parametrize("holder", ["process 1 on another host, since yesterday", ""])
def test_exclusive_lock_of_which_nothing_is_known_stays(
    holder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_flock(monkeypatch, errno.ENOLCK)
    (tmp_path / "lock.exclusive").write_text(holder)
    with pytest.raises(sc.CheckpointError, match="Another run is using this checkpoint directory"):
        saved_in(tmp_path)
    assert (tmp_path / "lock.exclusive").read_text() == holder


def test_lock_that_fails_otherwise_is_an_error_that_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_flock(monkeypatch, errno.EIO)
    with pytest.raises(sc.CheckpointError, match=r"reason +Input/output error \(errno 5\)") as raised:
        saved_in(tmp_path)
    assert isinstance(raised.value.__cause__, OSError)


def forked(act: Callable[[], object]) -> int:
    """A child that acts and then ends, without leaving the frames that it was forked in."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a fork where there are threads
        child = os.fork()
    if child == 0:
        try:
            act()
        finally:
            os._exit(0)
    return child


def test_child_that_outlives_the_run_does_not_hold_its_lock(tmp_path: Path) -> None:
    seen, see = os.pipe()
    wait, let_go = os.pipe()
    children: list[int] = []

    def look_and_live_on() -> None:
        files = [os.path.realpath(one) for one in Path("/proc/self/fd").iterdir()]
        os.write(see, b"held" if str(tmp_path / "lock") in files else b"free")
        os.read(wait, 1)

    keep = sc.Checkpoints(tmp_path, every=3)
    hooks = [(3, lambda *about: children.append(forked(look_and_live_on)))]
    sc.run(step(), fresh(), FaultPlan().batches(3), checkpoint=keep, hooks=hooks)
    try:
        assert os.read(seen, 4) == b"free"
        assert saved_in(tmp_path)[0].steps == 6
        assert os.waitpid(children[0], os.WNOHANG) == (0, 0)  # it lives
    finally:
        os.write(let_go, b"x")
        os.waitpid(children[0], 0)


def test_child_that_leaves_the_run_does_not_release_its_lock(tmp_path: Path) -> None:
    lock = checkpoint_lock.DirectoryLock(tmp_path)
    os.waitpid(forked(lock.release), 0)
    with pytest.raises(sc.CheckpointError, match="Another run is using"):
        checkpoint_lock.DirectoryLock(tmp_path)
    lock.release()
    checkpoint_lock.DirectoryLock(tmp_path).release()


def test_timeout_without_an_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(sc.ConfigError, match="timeout_seconds  expected a positive number, got inf"):
        sc.Checkpoints(tmp_path, every=1, timeout_seconds=float("inf"))
