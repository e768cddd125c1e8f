"""Storage that is lost, slow or hangs during a run: rows 62, 67 and 68. Each process must also end."""

import itertools
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from faults.plan import FaultPlan, Remembering, digest, fresh, step
from faults.zygote import Zygote, ended_by_itself, errors_of

import stepc as sc
from stepc._runner.checkpoint import CheckpointKeeper
from stepc._runner.checkpoint_store import CheckpointStore
from stepc._runner.events import EventLog
from stepc._runner.policies import FailureCounts

fault = pytest.mark.fault


@pytest.fixture
def anyones() -> Iterator[Path]:
    """A folder that an unprivileged user can reach, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


def events_in(folder: Path) -> list[tuple[str, int]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(line["event"], line["step"]) for line in lines if "event" in line]


@fault("62", "the directory removed, a file in its place, or read-only, after the first checkpoint", "CheckpointError")
@fault("62", "the same", "the process ends with code 1: nothing in Orbax waits; older checkpoints stay")
@pytest.mark.parametrize("how", ["removed", "file", "read-only"])
def test_directory_that_is_lost_is_an_error(how: str, zygote: Zygote, anyones: Path) -> None:
    assert zygote.start(anyones, "--every=5", "--lose", how).wait() == 1, errors_of(anyones)
    assert "CheckpointError: Step 10 could not be saved" in errors_of(anyones)
    assert events_in(anyones)[-1] == ("failure", 10)
    left = {"removed": [], "file": [], "read-only": ["5", "lock"]}[how]
    assert sorted(one.name for one in (anyones / "kept").glob("*")) == left


@fault(
    "68",
    "a save that hangs: the disk does not answer until the run has ended, in the call and in the thread",
    "CheckpointError after 5 s",
)
@pytest.mark.parametrize("point", ["before the first write", "before the rename"])
def test_save_that_hangs_is_given_up(point: str, zygote: Zygote, tmp_path: Path) -> None:
    def run(place: Path) -> tuple[int, str]:
        code = zygote.start(place, "--every=10", "--hang", point, "--timeout=5").wait()
        return code, errors_of(place)

    place, code, said = ended_by_itself(run, tmp_path)
    assert code == 1, said
    assert "did not finish in 5.0 s" in said
    assert {"10", "20", "30"} <= {one.name for one in (place / "kept").iterdir()}
    assert zygote.start(place, "--every=10").wait() == 0, errors_of(place)


@fault(
    "67", "a state whose save takes longer than the interval", "event slow_checkpoint with seconds; one save at a time"
)
def test_slow_storage_holds_the_run_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = CheckpointStore.wait

    def slowly(store: CheckpointStore) -> None:
        time.sleep(0.6)
        waiting(store)

    monkeypatch.setattr(CheckpointStore, "wait", slowly)
    monkeypatch.setattr(CheckpointStore, "is_busy", lambda store: True)  # the disk may be faster than this machine
    state = {"w": jnp.ones((1 << 23,)), "step": jnp.zeros((), jnp.int32)}  # 32 MB
    logger = Remembering()
    most = [0]

    def stepping(state: dict, batch: dict) -> tuple[dict, dict]:
        most[0] = max(most[0], len(list(tmp_path.glob("*.orbax-checkpoint-tmp"))))
        return {**state, "step": state["step"] + 1}, {"loss": jnp.float32(0)}

    run = sc.run(
        stepping, state, FaultPlan().batches(6), checkpoint=sc.Checkpoints(tmp_path, every=1), loggers=[logger]
    )
    waited = [float(facts["waited_seconds"]) for name, facts, _ in logger.events if name == "slow_checkpoint"]
    assert (run.steps, most[0]) == (6, 1)
    assert 1 <= len(waited) < 5  # at 0.6, 1.2 and 2.4 s of 3.0, and not at each of the five
    assert min(waited) >= 0.6
    assert (tmp_path / "6").is_dir()


@fault("66", "the last step is one that is saved anyway", "saved once: none is set aside")
def test_last_step_is_saved_once(tmp_path: Path) -> None:
    logger = Remembering()
    keep = sc.Checkpoints(tmp_path, every=2)
    run = sc.run(step(), fresh(), FaultPlan().batches(4), checkpoint=keep, loggers=[logger])
    assert [at for name, _, at in logger.events if name == "checkpoint"] == [2, 4]
    assert not (tmp_path / "abandoned").exists()
    assert digest(run.state) == digest(sc.run(step(), fresh(), [], steps=4, checkpoint=keep).state)


class InstantStore:
    """A store whose saves are always in flight."""

    def is_busy(self) -> bool:
        return True

    def save(self, *about: Any) -> None: ...

    def wait(self) -> None: ...

    def delete_old(self, **about: Any) -> None: ...


def test_waits_that_add_up_to_little_are_no_event() -> None:
    logger, now = Remembering(), itertools.count(0, 0.005)
    events = EventLog([logger], 1)
    keeper = CheckpointKeeper(
        sc.Checkpoints("runs", every=1),
        InstantStore(),
        FailureCounts({}),
        events,
        clock=lambda: next(now),  # pyright: ignore
    )
    for number in range(1, 301):
        keeper.save(number, None, None, {}, None, {})
    told = [at for name, _, at in logger.events if name == "slow_checkpoint"]
    assert len(told) == 2  # at half a second in all and at one, and not 299 times
