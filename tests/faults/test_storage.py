"""Faults of storage: rows 13 to 18 and 61 to 70. Real files, real damage, a real limit on their size."""

import json
import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import mesh_of
from faults.plan import Batches, FaultPlan, Remembering, batch_of, by_a_plain_loop, digest, fresh, loss, step
from faults.test_signals import TESTS
from faults.zygote import ended_by_itself
from waiting import LIMIT_SECONDS

import stepc as sc

fault = pytest.mark.fault


def run_in(folder: Path, num: int = 9, *, state: Any = None, every: int = 3, **options: Any) -> sc.Run:
    keep = sc.Checkpoints(folder, every=every)
    return sc.run(step(), fresh() if state is None else state, FaultPlan().batches(num), checkpoint=keep, **options)


def steps_in(folder: Path) -> set[str]:
    return {one.name for one in folder.iterdir() if one.name.isdecimal()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 3, 6 and 9, to be copied and never changed."""
    folder = tmp_path_factory.mktemp("saved") / "kept"
    run_in(folder)
    return folder


@pytest.fixture
def kept(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "kept")
    return tmp_path / "kept"


@fault("17", "steps that are done already", "returns at once with the restored state; event already_done")
def test_done_already_returns_at_once(kept: Path) -> None:
    logger = Remembering()
    run = run_in(kept, 100, steps=9, loggers=[logger])
    assert digest(run.state) == digest(by_a_plain_loop(list(range(1, 10))))
    assert (run.steps, run.ended) == (9, "steps")
    assert "already_done" in logger.names()


def test_second_run_resumes_exactly(kept: Path) -> None:
    run = run_in(kept, 14)
    assert (run.steps, digest(run.state)) == (14, digest(by_a_plain_loop(list(range(1, 15)))))
    assert steps_in(kept) == {"9", "12", "14"}


@fault("13", "a directory that is a file; one below a file", "CheckpointError before a step, with path and errno")
@pytest.mark.parametrize("below", ["", "deeper"])
def test_directory_that_is_a_file_is_refused(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(sc.CheckpointError, match="errno"):
        run_in(tmp_path / "file" / below)


@fault("14", "a state with an empty array", "CheckpointError before a step, with the path")
def test_state_that_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    with pytest.raises(sc.CheckpointError, match=r"nothing  expected at least one number, got float32\[0, 3\]"):
        run_in(tmp_path, state=replace(fresh(), model_state={"nothing": jnp.zeros((0, 3))}))


OTHERS: dict[str, tuple[Callable[[], Any], str]] = {
    "shape": (lambda: step().init({"w": np.zeros(4, np.float32)}), "params/w"),
    "leaf": (lambda: step().init({"w": np.zeros(3, np.float32), "v": np.zeros(3, np.float32)}), "params/v"),
    "dtype": (lambda: jax.tree.map(_narrow, fresh()), "saved float32[3], the state has bfloat16[3]"),
    "key": (lambda: replace(fresh(), slots={"key": jax.random.key(0, impl="rbg")}), "the state has key<rbg>"),
}


def _narrow(leaf: Any) -> Any:
    return leaf.astype(jnp.bfloat16) if leaf.dtype == jnp.float32 else leaf


@fault("15", "resume into another shape, leaf, dtype or key", "ResumeError with a table; the fresh state is alive")
@pytest.mark.parametrize("name", OTHERS)
def test_resume_into_another_state_is_refused(name: str, kept: Path) -> None:
    make, told = OTHERS[name]
    state = make()
    with pytest.raises(sc.ResumeError) as raised:
        run_in(kept, state=state)
    assert told in str(raised.value)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


@fault("16", "resume with another batch size", "DataError: another signature than before the checkpoint")
def test_resume_with_another_batch_size_is_refused(kept: Path) -> None:
    class Wider(type(FaultPlan())):
        def batch(self, number: int) -> Any:
            return batch_of(number, rows=8)

    with pytest.raises(sc.DataError, match="not that of the batches before the checkpoint"):
        sc.run(step(), fresh(), Wider().batches(12), checkpoint=sc.Checkpoints(kept, every=3))


class Shifted(Batches):
    """The same positions with other batches, as with another seed."""

    def __next__(self) -> Any:
        super().__next__()
        return batch_of(self.given + 100)


@fault("16", "resume with data of another seed", "ResumeError; check_data=False goes on")
def test_resume_with_other_data_is_refused(kept: Path) -> None:
    with pytest.raises(sc.ResumeError, match="not the data of the checkpoint"):
        sc.run(step(), fresh(), Shifted(12, FaultPlan()), checkpoint=sc.Checkpoints(kept, every=3))
    keep = sc.Checkpoints(kept, every=3, check_data=False)
    assert sc.run(step(), fresh(), Shifted(12, FaultPlan()), checkpoint=keep).steps == 12


@fault("16", "resume with data that ends sooner", "event data_not_checked; ends at once with the restored state")
def test_resume_with_data_that_ends_sooner_trains_on_nothing(kept: Path) -> None:
    logger = Remembering()
    run = sc.run(step(), fresh(), FaultPlan().batches(2), checkpoint=sc.Checkpoints(kept, every=3), loggers=[logger])
    assert "data_not_checked" in logger.names()
    assert (run.ended, digest(run.state)) == ("data", digest(by_a_plain_loop(list(range(1, 10)))))


@fault("16", "the batch before the checkpoint cannot be read again", "event data_not_checked; goes on exactly")
def test_resume_whose_data_cannot_be_compared_continues(kept: Path) -> None:
    logger, whole = Remembering(), by_a_plain_loop(list(range(1, 13)))
    last = max(int(one.name) for one in kept.iterdir() if one.name.isdecimal())
    plan = FaultPlan({last: "read"})
    run = sc.run(step(), fresh(), plan.batches(12), checkpoint=sc.Checkpoints(kept, every=3), loggers=[logger])
    assert "data_not_checked" in logger.names()
    assert digest(run.state) == digest(whole)


def test_last_step_is_saved_once(tmp_path: Path) -> None:
    logger = Remembering()
    run_in(tmp_path / "kept", 9, loggers=[logger])
    assert [step for name, _, step in logger.events if name == "checkpoint"] == [3, 6, 9]
    assert not (tmp_path / "kept" / "abandoned").exists()


class Unsaveable(Batches):
    """Its position cannot be saved after batch 5."""

    def get_state(self) -> dict[str, Any]:
        return {"given": self.given if self.given <= 5 else {self.given}}


@fault("61", "a save that cannot begin, policy skip", "failures; none counts as a checkpoint; bitwise as without")
def test_save_that_is_skipped_is_not_a_checkpoint(tmp_path: Path) -> None:
    logger, keep = Remembering(), sc.Checkpoints(tmp_path, every=3)
    data = Unsaveable(12, FaultPlan())
    run = sc.run(step(), fresh(), data, checkpoint=keep, loggers=[logger], on_error={"save": "skip"})
    assert {at for name, _, at in logger.events if name == "failure"} == {6, 9, 12}
    assert [at for name, _, at in logger.events if name == "checkpoint"] == [3]
    assert steps_in(tmp_path) == {"3"}
    assert digest(run.state) == digest(by_a_plain_loop(list(range(1, 13))))


@fault("18", "a second run in the same directory, while one is there", "CheckpointError that names the holder")
def test_second_run_at_once_is_refused(tmp_path: Path) -> None:
    def second(*about: Any) -> None:
        run_in(tmp_path)

    with pytest.raises(sc.StepError) as raised:
        run_in(tmp_path, hooks=[(4, second)])
    assert f"process {os.getpid()} on " in str(raised.value.__cause__)


def damaged(path: Path, how: str) -> None:
    match how:
        case "remove":
            path.unlink()
        case "empty":
            path.write_bytes(b"")
        case "truncate":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        case "flip":
            bytes_ = bytearray(path.read_bytes())
            if bytes_:
                bytes_[len(bytes_) // 2] ^= 16
            path.write_bytes(bytes_)


@fault(
    "63", "each file of the newest checkpoint, and the lock × remove, empty, truncate, flip a bit", "9 bitwise, or 6 is"
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax leaves futures of failed reads
@pytest.mark.parametrize("how", ["remove", "empty", "truncate", "flip"])
def test_damage_is_never_taken_for_a_state(how: str, saved: Path, tmp_path: Path) -> None:
    files = sorted(one.relative_to(saved) for one in (saved / "9").rglob("*") if one.is_file())
    files += [Path("lock")]  # the only file besides the older checkpoints
    assert len(files) > 10
    good = {number: digest(by_a_plain_loop(list(range(1, number + 1)))) for number in (6, 9)}
    outcomes = []
    for number, file in enumerate(files):
        folder = tmp_path / str(number)
        shutil.copytree(saved, folder)
        damaged(folder / file, how)
        logger = Remembering()
        run = sc.run(
            step(), fresh(), FaultPlan().batches(0), checkpoint=sc.Checkpoints(folder, every=3), loggers=[logger]
        )
        assert digest(run.state) == good[run.steps], f"{file}: silent garbage"
        if run.steps == 6:
            assert "damaged_checkpoint" in logger.names()
            assert not (folder / "9").exists()
            assert list((folder / "abandoned").glob("9-for-6-*"))
        outcomes.append(run.steps)
    assert 6 in outcomes


@fault("64", "an empty directory 12/, a temporary one, a stray file, a step without meta", "ignored; cleaned if ours")
def test_files_that_are_not_checkpoints_are_ignored(kept: Path) -> None:
    (kept / "12").mkdir()
    (kept / "15.orbax-checkpoint-tmp").mkdir()
    (kept / "notes.txt").write_text("mine")
    shutil.copytree(kept / "9", kept / "13")
    shutil.rmtree(kept / "13" / "meta")
    run = run_in(kept, 10)
    assert digest(run.state) == digest(by_a_plain_loop(list(range(1, 11))))
    assert not (kept / "15.orbax-checkpoint-tmp").exists()
    assert (kept / "notes.txt").read_text() == "mine"
    assert steps_in(kept) == {"6", "9", "10"}


@fault("65", "every checkpoint damaged", "ResumeError with a reason for each, not a fresh start")
def test_only_damaged_checkpoints_are_an_error(kept: Path) -> None:
    for number in (3, 6, 9):
        (kept / str(number) / "meta" / "metadata").write_text("{}")
    with pytest.raises(sc.ResumeError) as raised:
        run_in(kept, 12)
    assert [line.split()[0] for line in str(raised.value).splitlines()[2:5]] == ["9", "6", "3"]


@fault("66", "NaN after checkpoints, Rollback to the last", "its steps are saved anew; a restart goes on from them")
@fault("38", 'NaN at step 8, Rollback to the checkpoint of step 6, data="skip"', "bitwise without batches 7 and 8")
def test_rollback_to_a_checkpoint_is_exact(tmp_path: Path) -> None:
    plan = FaultPlan({8: "nan"})
    keep = sc.Checkpoints(tmp_path, every=3)
    logger = Remembering()
    run = sc.run(
        step(), fresh(), plan.batches(12), on_error={"nonfinite": "rollback"}, checkpoint=keep, loggers=[logger]
    )
    right = digest(by_a_plain_loop([1, 2, 3, 4, 5, 6, 9, 10, 11, 12]))
    assert (digest(run.state), run.steps, run.rollbacks) == (right, 10, 1)
    again = sc.run(step(), fresh(), plan.batches(12), checkpoint=keep)
    assert (digest(again.state), again.steps) == (right, 10)


@fault("38", 'device fault at step 8, Rollback to the checkpoint of step 6, data="replay"', "bitwise as without")
@pytest.mark.parametrize("prefetch", [0, 2])
def test_rollback_to_a_checkpoint_replays_the_data(tmp_path: Path, prefetch: int) -> None:
    plan = FaultPlan({8: "device"})
    run = sc.run(
        plan,
        fresh(),
        sc.Data(plan.batches(12), prefetch=prefetch),
        on_error={"device": sc.Rollback(1, data="replay")},
        checkpoint=sc.Checkpoints(tmp_path, every=3),
    )
    assert digest(run.state) == digest(by_a_plain_loop(list(range(1, 13))))


@fault("66", "the newest checkpoint damaged, then training goes on", "9 is set aside; 7, 9 and 12 are saved again")
def test_abandoned_steps_are_set_aside_and_saved_again(kept: Path) -> None:
    (kept / "9" / "meta" / "metadata").write_text("")
    run = run_in(kept, 12)
    assert digest(run.state) == digest(by_a_plain_loop(list(range(1, 13))))
    assert steps_in(kept) == {"6", "9", "12"}


@fault("61", "no room for a checkpoint (RLIMIT_FSIZE), in the first and in the last save", "CheckpointError; exit 1")
def test_full_disk_is_never_a_silent_success(tmp_path: Path) -> None:
    for every in ("5", "1000"):

        def run(place: Path, every: str = every) -> tuple[int, str]:
            words = [sys.executable, "-m", "faults.job", str(place), f"--every={every}", "--fsize=400"]
            ended = subprocess.run(words, cwd=TESTS, capture_output=True, text=True, timeout=LIMIT_SECONDS)
            return ended.returncode, ended.stderr

        folder = tmp_path / every
        folder.mkdir()
        place, code, said = ended_by_itself(run, folder)
        assert code == 1, said
        assert "CheckpointError" in said
        assert not steps_in(place / "kept")


@fault("69", "a checkpoint of 4 devices, restored on 1, 2 and 8", "every leaf bitwise equal, placed like the new state")
@pytest.mark.parametrize("num", [1, 2, 8])
def test_checkpoint_of_four_devices_is_restored_on_others(num: int, tmp_path: Path) -> None:
    def step_on(num: int) -> sc.Step:
        return sc.compile(sc.update(optax.adam(0.05)) @ sc.shard(sc.dp("data")) @ sc.grad(loss), mesh=mesh_of(data=num))

    keep = sc.Checkpoints(tmp_path, every=10)
    four = step_on(4)
    batches = [batch_of(number, rows=8) for number in range(1, 6)]
    saved = sc.run(four, four.init({"w": np.zeros(3, np.float32)}), batches, checkpoint=keep)
    other = step_on(num)
    restored = sc.run(other, other.init({"w": np.zeros(3, np.float32)}), [], checkpoint=keep, steps=5)
    assert digest(restored.state) == digest(saved.state)
    assert len(restored.state.params["w"].sharding.device_set) == num
    sc.run(other, restored.state, batches[:1])


@fault("70", "a checkpoint of a newer format", "ResumeError that says which")
def test_checkpoint_of_a_newer_stepc_is_refused(kept: Path) -> None:
    path = kept / "9" / "meta" / "metadata"
    stored = json.loads(path.read_text())
    body = json.dumps({**json.loads(stored["body"]), "format": 2})
    path.write_text(json.dumps({"body": body, "crc32": zlib.crc32(body.encode())}))
    with pytest.raises(sc.ResumeError, match="by a newer stepc"):
        run_in(kept)
