"""Faults on one of several processes: rows 71 to 81. Real processes, real signals, real files."""

import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed.job import TRUTH, global_batch
from distributed.launching import Job, alone, started

fault = pytest.mark.fault


def done(folder: Path, *, num: int = 2, codes: tuple[int, ...] = (0, 0), **told: object) -> Job:
    with started("run", folder, num=num, **told) as job:
        assert tuple(job.wait()) == codes, [job.said(number) for number in range(num)]
        return job


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """20 steps of one process with four devices."""
    return alone("run", tmp_path_factory.mktemp("whole"), devices=4)


@pytest.fixture(scope="module")
def halfway(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """10 steps of two processes, with checkpoints."""
    return done(tmp_path_factory.mktemp("halfway"), checkpoint=5, steps=10)


def test_run_on_two_processes_equals_one(whole: dict[str, Any], tmp_path: Path) -> None:
    job = done(tmp_path, prefetch=2, compare_every=5)
    both = [job.found(process) for process in (0, 1)]
    assert [(one["ended"], one["steps"], one["digest"]) for one in both] == [("data", 20, whole["digest"])] * 2
    # Only process 0 has loggers. A loss is a sum over many rows, in another order.
    assert [step for step, _ in both[0]["told"]] == list(range(1, 21)) and both[1]["told"] == []
    for (_, mine), (_, theirs) in zip(both[0]["told"], whole["told"], strict=True):
        np.testing.assert_allclose(mine["loss"], theirs["loss"], rtol=1e-6)


@pytest.mark.parametrize("num", [1, 2, 4])
def test_checkpoint_of_two_processes_resumes_on_another_number(
    halfway: Job, whole: dict[str, Any], num: int, tmp_path: Path
) -> None:
    (tmp_path / "kept").mkdir()
    copy_tree(halfway.folder / "kept", tmp_path / "kept")
    if num == 1:
        found = [alone("run", tmp_path, devices=4, checkpoint=5)]
    else:
        job = done(tmp_path, num=num, codes=(0,) * num, checkpoint=5)
        found = [job.found(process) for process in range(num)]
    assert "resumed" in found[0]["events"] and "resume_not_exact" not in found[0]["events"]
    assert [(one["step"], one["given"]) for one in found] == [(20, 20)] * num
    assert {one["digest"] for one in found} == {whole["digest"]}


def test_sharded_state_is_restored_by_another_number_of_processes(whole: dict[str, Any], tmp_path: Path) -> None:
    both = done(tmp_path, checkpoint=5, steps=10, zero=3)
    assert both.found(0)["step"] == 10
    job = done(tmp_path, num=4, codes=(0,) * 4, checkpoint=5, zero=3)
    assert "resumed" in job.found(0)["events"]
    one = alone("run", tmp_path, devices=4, checkpoint=5, zero=1)  # restores, and is done
    assert {job.found(process)["digest"] for process in range(4)} == {one["digest"], whole["digest"]}


def by_hand_after_three_steps() -> np.ndarray:
    """The parameters after the first three batches: with the sign of the gradient they are exact."""
    weights = np.zeros_like(TRUTH)
    for number in (1, 2, 3):
        batch = global_batch(number)
        weights -= np.float32(0.25) * np.sign(batch["x"].T @ (batch["x"] @ weights - batch["y"]))
    return weights


def copy_tree(source: Path, target: Path) -> None:
    for one in source.rglob("*"):
        there = target / one.relative_to(source)
        there.mkdir(exist_ok=True) if one.is_dir() else there.write_bytes(one.read_bytes())


@fault("71", "one raises in data, hook, step, logger", "PeerError on the other: process, step, text; exit 1")
@pytest.mark.parametrize(
    ("told", "on", "own", "text"),
    [
        ({"fault": "read"}, 1, "DataError", "OSError: the disk is gone"),
        ({"where": "hook"}, 1, "StepError", "RuntimeError: the hook has failed"),
        ({"where": "hook"}, 0, "StepError", "RuntimeError: the hook has failed"),
        ({"where": "step"}, 1, "BuildError", "RuntimeError: the step has failed"),
        ({"where": "logger"}, 0, "StepError", "RuntimeError: the logger has failed"),
    ],
)
def test_error_on_one_ends_all(told: dict[str, str], on: int, own: str, text: str, tmp_path: Path) -> None:
    job = done(tmp_path, codes=(1, 1), on=on, raises=1, **told)
    mine, other = job.said(on), job.said(1 - on)
    assert f"stepc.errors.{own}: " in mine and text in mine
    assert f"stepc.errors.PeerError: Process {on} failed: " in other and text in other
    assert f"process  {on}\n  step     7\n" in other


@fault("71", "SystemExit(3) from a hook of one", "its own exit code; PeerError and exit 1 on the other")
def test_exit_of_one_ends_all_and_keeps_its_code(tmp_path: Path) -> None:
    job = done(tmp_path, codes=(1, 3), where="exit", raises=1)
    assert "stepc.errors.PeerError: Process 1 failed: SystemExit: 3" in job.said(0)


@fault("72", "a read that fails on one process, policy skip", "all leave out that batch; states bitwise equal")
def test_bad_batch_on_one_is_skipped_by_all(tmp_path: Path) -> None:
    job = done(tmp_path / "two", fault="read", on_error="skip")
    one = alone("run", tmp_path / "one", devices=4, fault="read", on=0, on_error="skip")
    for process in (0, 1):
        found = job.found(process)
        assert (found["step"], found["skipped"], found["digest"]) == (19, 1, one["digest"])


@fault("72", "a read that fails on one process, policy retry", "it reads again; the others keep their rows")
def test_failed_read_on_one_is_retried(whole: dict[str, Any], tmp_path: Path) -> None:
    job = done(tmp_path, fault="read_once", on_error="retry")
    assert [job.found(process)["digest"] for process in (0, 1)] == [whole["digest"]] * 2


@fault("73", "kill -9 of process 1, in host work, and while a checkpoint is written", "PeerError names it; one resumes")
@pytest.mark.parametrize("at", [6, 12])
def test_kill_of_one_ends_all_and_leaves_a_checkpoint(at: int, whole: dict[str, Any], tmp_path: Path) -> None:
    with started("run", tmp_path, fault="kill", at=at, checkpoint=5, raises=1) as job:
        other, killed = job.wait()
    assert killed == -9 and other == 1, job.said(0)
    assert "stepc.errors.PeerError: Process 1 is gone" in job.said(0)
    found = alone("run", tmp_path, devices=4, checkpoint=5)
    assert (found["step"], found["digest"]) == (20, whole["digest"])
    if at == 12:  # at 6 the first checkpoint is either committed or absent
        assert "resumed" in found["events"]


@fault("73", "kill -9 of process 1 in its first save, while process 0 waits for it", "PeerError that names it")
@pytest.mark.parametrize("options", [{}, {"steps": 5}], ids=["in the run", "at its end"])
def test_kill_in_the_first_save_is_named(options: dict[str, int], tmp_path: Path) -> None:
    with started("run", tmp_path, dies="save", checkpoint=5, raises=1, **options) as job:
        other, killed = job.wait()
    assert killed == -9 and other == 1, job.said(0)
    assert "stepc.errors.PeerError: Process 1 is gone: it crashed or was killed" in job.said(0)


@fault("74", "kill -9 of process 0", "jax ends the other; its exit code is not 0")
def test_kill_of_process_0_ends_all(tmp_path: Path) -> None:
    with started("run", tmp_path, fault="kill", on=0) as job:
        killed, other = job.wait()
    assert killed == -9 and other != 0


@fault("75", "a loader that hangs; SIGSTOP of process 1, of process 0", "the watchdog names it, and ends all")
@pytest.mark.parametrize(
    ("kind", "on", "text"),
    [
        ("hang", 1, "Process 1 failed: it has been in phase 'data' for"),
        ("stop", 1, "Process 1 failed: its heartbeat stopped in phase"),
        ("stop", 0, "Process 0 failed: it does not answer"),
    ],
)
def test_process_that_hangs_is_named(kind: str, on: int, text: str, tmp_path: Path) -> None:
    with started("run", tmp_path, fault=kind, on=on, warn_seconds=2) as job:
        job.wait_for(1 - on)
        assert job.processes[1 - on].returncode == 1, job.said(1 - on)
        who, what = text.split(" failed: ")
        lines = [line for line in job.said(1 - on).splitlines() if "stepc.errors.PeerError: " in line]
        # Either `run` raises, or its main thread is stuck and the failure broadcast ends the process.
        told = lines[0] if lines else job.found(1 - on)["error"]
        # Its own watchdog may be first, and then adds the step.
        assert f"PeerError: {who} failed" in told and what in told, told


@fault("76", "another number of steps, another policy on one process", "ConfigError on both, with both sides")
@pytest.mark.parametrize(
    "differs", ["steps:19", "on_error:skip", "short_batches:drop", "reject_if:none", "eval:plain,1", "checkpoint:4"]
)
def test_arguments_that_differ_between_processes_are_refused(differs: str, tmp_path: Path) -> None:
    job = done(tmp_path, steps=18, differs=differs)
    texts = [job.found(process)["error"] for process in (0, 1)]
    assert texts[0] == texts[1]
    assert texts[0].startswith("ConfigError: The processes do not agree on the arguments of the run.")
    assert f"{differs.partition(':')[0]}  process 0: " in texts[0]
    assert [job.found(process)["given"] for process in (0, 1)] == [0, 0]


@fault("76", "a short batch on one process, short_batches=drop", "all leave out that batch; bitwise as without it")
@pytest.mark.parametrize("prefetch", [0, 2])
def test_short_batch_on_one_is_left_out_by_all(prefetch: int, tmp_path: Path) -> None:
    job = done(tmp_path / "two", fault="rows", short_batches="drop", prefetch=prefetch)
    one = alone("run", tmp_path / "one", devices=4, fault="read", on=0, on_error="skip")
    for process in (0, 1):
        found = job.found(process)
        assert (found["ended"], found["step"], found["given"], found["digest"]) == ("data", 19, 20, one["digest"])
    assert job.found(0)["events"].count("batch_left_out") == 1


@fault("80", "`reject_if` rejects a step on one process alone", "RejectedError on both, or both leave it out")
@pytest.mark.parametrize("on", ["0", "1", "01"])
def test_verdict_of_one_is_that_of_all(on: str, tmp_path: Path) -> None:
    job = done(tmp_path / "raised", reject_if=on)
    for process in (0, 1):
        who = "" if str(process) in on else f"process {on}: "
        assert job.found(process)["error"].startswith(f"RejectedError: Step 7 is rejected: {who}I do not like it\n")
    job = done(tmp_path / "skipped", reject_if=on, on_error="skip")
    one = alone("run", tmp_path / "one", devices=4, fault="read", on=0, on_error="skip")
    for process in (0, 1):
        found = job.found(process)
        assert (found["ended"], found["step"], found["digest"]) == ("data", 19, one["digest"])


@fault("76", "an evaluation with another number of batches on one process", "StepError on both that names them")
def test_uneven_evaluation_is_refused_on_both(tmp_path: Path) -> None:
    job = done(tmp_path, eval="plain,3,2")
    texts = [job.found(process)["error"] for process in (0, 1)]
    assert texts[0] == texts[1]
    what = "Its data gave 2 batches on process 1, and more on process 0."
    assert texts[0].startswith(f"StepError: The eval at step 3 failed: ConfigError: {what}\n")


def test_evaluation_of_each_process_alone_is_refused_on_both(tmp_path: Path) -> None:
    job = done(tmp_path, eval="alone,1")
    texts = [job.found(process)["error"] for process in (0, 1)]
    assert texts[0] == texts[1]
    what = "Each process has metrics of its own, so `evaluate` has seen the rows of one process alone."
    assert texts[0].startswith(f"StepError: The eval at step 3 failed: ConfigError: {what}\n\n  loss  process 0: ")
    assert "`step.put(batch)`" in texts[0]


@fault("76", "the same, by a step on batches with a mask", "exact: the process without a batch adds no row")
def test_uneven_evaluation_by_a_step_is_exact(tmp_path: Path) -> None:
    job = done(tmp_path, eval="step,3,2", steps=3)
    ((at, found),) = [(at, one["eval/loss"]) for at, one in job.found(0)["told"] if "eval/loss" in one]
    # The state after three steps of `sign_sgd(0.25)`, and the rows that the masks keep: 8, 8, 4 and 8, 4.
    kept = [np.r_[0:16], np.r_[0:8, 8:12], np.r_[0:4]]
    weights = by_hand_after_three_steps()
    batches = [global_batch(number) for number in (1, 2, 3)]
    errors = [((one["x"] @ weights - one["y"]) ** 2)[rows] for one, rows in zip(batches, kept, strict=True)]
    assert (at, found) == (3, float(np.concatenate(errors).mean()))


@fault("76", "another number of rows on one process, in the first batch", "DataError on both before a step, both sides")
def test_signatures_that_differ_are_refused_before_the_first_step(tmp_path: Path) -> None:
    job = done(tmp_path, fault="rows", at=1)
    for process in (0, 1):
        assert "process 0: host float32[8, 8]; process 1: host float32[4, 8]" in job.found(process)["error"]


@fault(
    "77", "one number differs in one replica of the state", "PeerError on both at the next comparison, with the leaf"
)
def test_state_that_differs_is_found(tmp_path: Path) -> None:
    job = done(tmp_path, where="state", compare_every=3)
    texts = [job.found(process)["error"] for process in (0, 1)]
    assert texts[0] == texts[1]
    assert texts[0].startswith("PeerError: After step 9 the replicas of the state differ between processes.")
    assert "params/w  process 0: " in texts[0] and "; process 1: " in texts[0]


@fault("78", "SIGTERM, SIGINT to process 1 alone", "a checkpoint of the same step; exit 143 and 130 on both")
@pytest.mark.parametrize(("kind", "code"), [("term", 143), ("int", 130)])
def test_signal_to_one_ends_all_at_the_same_step(kind: str, code: int, tmp_path: Path) -> None:
    job = done(tmp_path, codes=(code, code), fault=kind, checkpoint=5, raises=1)
    assert sorted(one.name for one in (tmp_path / "kept").iterdir() if one.name.isdecimal()) == ["5", "6"]
    if kind == "int":
        assert "stepc.errors.Interrupted: Interrupted after step 6" in job.said(0)


@fault("79", "a hook of one process returns `Stop`", "all end after the same step, with its reason")
@pytest.mark.parametrize("on", [0, 1])
def test_stop_of_one_ends_all(on: int, tmp_path: Path) -> None:
    job = done(tmp_path, where="stop", on=on, prefetch=2)
    both = [job.found(process) for process in (0, 1)]
    assert [(one["ended"], one["step"], one["given"]) for one in both] == [("stopped", 7, 7)] * 2
    assert [both[on]["why"], both[1 - on]["why"]] == ["enough", f"process {on}: enough"]
    assert both[0]["digest"] == both[1]["digest"]


def test_profile_of_one_process_is_refused_where_steps_are_voted_on(tmp_path: Path) -> None:
    job = done(tmp_path, profile=1, reject_if="none")
    for process in (0, 1):
        error = job.found(process)["error"]
        assert error.startswith("ConfigError: The processes do not agree on the arguments of the run.")
        assert "profile  process 0: None; process 1: Profile(start=2, stop=4, " in error


def test_profile_of_one_process_changes_nothing(whole: dict[str, Any], tmp_path: Path) -> None:
    job = done(tmp_path, profile=1, where="hook", at=100)
    assert [job.found(process)["digest"] for process in (0, 1)] == [whole["digest"]] * 2
    assert (tmp_path / "trace").is_dir()


def test_best_checkpoint_of_two_processes_is_kept(tmp_path: Path) -> None:
    job = done(tmp_path, best_every=100, eval="step,3,2", steps=12)
    losses = {at: one["eval/loss"] for at, one in job.found(0)["told"] if "eval/loss" in one}
    best = min(losses, key=lambda at: losses[at])
    steps = {int(one.name) for one in (tmp_path / "kept").iterdir() if one.name.isdecimal()}
    assert sorted(losses) == [3, 6, 9, 12] and steps == {best, 12}


def test_early_stopping_ends_all_at_the_same_step(tmp_path: Path) -> None:
    for _ in ("it stops", "it resumes, and makes no step"):
        job = done(tmp_path, eval="put,1", checkpoint=100, prefetch=2)
        both = [job.found(process) for process in (0, 1)]
        assert [(one["ended"], one["step"]) for one in both] == [("stopped", 9)] * 2
        assert both[0]["why"] == both[1]["why"] and both[0]["digest"] == both[1]["digest"]
        assert both[0]["why"].startswith("eval/loss is no better for 2 evaluations: best ")


@fault("79", "the data of one process ends early", "all end after the same step; states bitwise equal")
def test_end_of_data_on_one_ends_all(tmp_path: Path) -> None:
    job = done(tmp_path, fault="ends")
    both = [job.found(process) for process in (0, 1)]
    assert [(one["ended"], one["step"]) for one in both] == [("data", 7)] * 2
    assert both[0]["digest"] == both[1]["digest"]


@fault("80", "NaN in the rows of one process", "raise, skip, skip_nonfinite: the same on both")
def test_nan_on_one_is_handled_by_all(tmp_path: Path) -> None:
    job = done(tmp_path / "raised", fault="nan")
    assert all(job.found(process)["error"].startswith("NonFiniteError: Step 7 is not") for process in (0, 1))
    for more in ({"on_error": "skip"}, {"where": "guarded"}):
        job = done(tmp_path / str(more), fault="nan", **more)
        both = [job.found(process) for process in (0, 1)]
        assert [(one["step"], one["skipped"]) for one in both] == [(19, 1)] * 2
        assert both[0]["digest"] == both[1]["digest"]


@fault("81", "no room for what one process writes (RLIMIT_FSIZE)", "not committed; CheckpointError on both")
@pytest.mark.parametrize("on", [0, 1])
def test_save_that_fails_on_one_fails_on_all(on: int, tmp_path: Path) -> None:
    job = done(tmp_path, fault="full", bytes=10, on=on, checkpoint=3)
    what = "CheckpointError: Step 3 could not be saved: "
    mine, other = (job.found(process)["error"].partition("\n")[0] for process in (on, 1 - on))
    assert mine.startswith(what)  # Orbax raises an OSError, or a ValueError with the text of one
    assert other == f"{what}OSError: process {on}: {mine.removeprefix(what)}"
    assert not [one for one in (tmp_path / "kept").iterdir() if one.name.isdecimal()]


@fault("81", "a position of the data that cannot be saved, on one process", "not committed; CheckpointError on both")
@pytest.mark.parametrize("on", [0, 1])
def test_save_that_one_cannot_begin_fails_on_all(on: int, tmp_path: Path) -> None:
    job = done(tmp_path, fault="position", at=2, on=on, checkpoint=3)
    mine, other = (job.found(process)["error"].partition("\n")[0] for process in (on, 1 - on))
    assert mine.startswith("CheckpointError: ") and "`get_state()`" in mine
    assert other.startswith(f"CheckpointError: Step 3 could not be saved: OSError: process {on}: CheckpointError: ")
    assert not [one for one in (tmp_path / "kept").iterdir() if one.name.isdecimal()]


@fault("81", "the directory becomes read-only to process 0, in a save and between two", "CheckpointError on both")
@pytest.mark.parametrize("kind", ["read-only", "read-only later"])
def test_directory_that_becomes_read_only_fails_on_all(kind: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "job"  # outside pytest's folders, which a user without rights cannot reach
        folder.parent.chmod(0o777)
        folder.mkdir()
        folder.chmod(0o777)
        job = done(folder, fault=kind, at=4, on=0, checkpoint=3)
        mine, other = (job.found(process)["error"].partition("\n")[0] for process in (0, 1))
        what = mine.partition(" could not be saved: ")[0]
        assert what == f"CheckpointError: Step {3 if kind == 'read-only' else 6}"
        assert other.startswith(f"{what} could not be saved: OSError: process 0: ")


FAULTS: list[dict[str, str]] = [
    {"fault": "read"}, {"fault": "read_once", "on_error": "retry"}, {"fault": "read", "on_error": "skip"},
    {"fault": "rows"}, {"fault": "nan"}, {"fault": "nan", "on_error": "skip"}, {"fault": "term"}, {"fault": "int"},
    {"fault": "kill"}, {"fault": "ends"}, {"fault": "hang", "warn_seconds": "2"},
    {"fault": "stop", "warn_seconds": "2"}, {"where": "hook"}, {"where": "step"}, {"where": "logger"},
    {"where": "exit"}, {"where": "state", "compare_every": "2"}, {"fault": "full", "bytes": "10"},
]  # fmt: skip
GO_ON = ("skip", "retry")


@pytest.mark.long
@fault("73", "100 random faults of rows 71 to 81, at random steps, on either process", "0 hangs; 0 silent differences")
def test_hundred_random_faults_never_hang(tmp_path: Path) -> None:
    random_faults(tmp_path, 100, seed=1)


def random_faults(folder: Path, num: int, *, seed: int) -> None:
    draw = random.Random(seed)
    for trial in range(num):
        told = dict(draw.choice(FAULTS), at=str(draw.randint(2, 15)), on=str(draw.randint(0, 1)))
        if draw.random() < 0.5 or told.get("fault") == "full":
            told["checkpoint"] = str(draw.randint(2, 6))
        with started("run", folder / str(trial), **told) as job:
            if told.get("fault") == "stop":
                job.wait_for(1 - int(told["on"]))  # the other one is stopped until it is killed
                continue
            codes = job.wait()
            both = [job.found(process) for process in (0, 1) if (job.folder / f"{process}.json").exists()]
        print(trial, told, codes, [one.get("error", one.get("ended", ""))[:60] for one in both])
        if told.get("on_error") in GO_ON or told.get("fault") in ("ends", "term", "int"):
            assert len(both) == 2 and both[0]["digest"] == both[1]["digest"], told
        elif told.get("where") != "logger" or told["on"] == "0":  # process 1 has no loggers
            assert codes != [0, 0] or all("error" in one for one in both), told
