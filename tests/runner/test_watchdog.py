"""The watchdog: what counts as a stall, and what only takes long."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from waiting import LIMIT_SECONDS, eventually

import stepc as sc
from stepc._jax import is_compiling
from stepc._runner.watchdog import StallTime

TESTS = Path(__file__).parent.parent
SLOW = """
import sys, time
from pathlib import Path
import numpy as np
import optax
import orbax.checkpoint
from faults.plan import FaultPlan, batch_of, fresh, step
import stepc as sc
from stepc._runner.checkpoint_store import CheckpointStore

folder, options, began = Path(sys.argv[1]), {}, time.monotonic()
sc.run(step(), fresh(), FaultPlan().batches(1))  # compiled
EXIT = max(2.0, 2 * (time.monotonic() - began))  # twice what a machine of this speed needs for all that is no stall
LONGER = 1.25 * EXIT
match sys.argv[2]:
    case "trace":
        def loss(params, batch):
            time.sleep(LONGER)
            return ((batch["x"] @ params["w"] - batch["y"]) ** 2).mean()
        made = sc.compile(sc.update(optax.sgd(0.1)) @ sc.grad(loss))
        step, fresh = lambda: made, lambda: made.init({"w": np.zeros(3, np.float32)})
    case "evaluation":
        def judge(state, batch):
            time.sleep(LONGER / 4)
            return {"loss": state.params["w"].sum()}
        options["eval"] = sc.Eval(2, judge, [batch_of(1)] * 4)
    case "retry":
        options["on_error"] = {"data": sc.Retry(1, wait_seconds=LONGER)}
    case "save":
        saving = CheckpointStore.save
        def slow(*about):
            time.sleep(LONGER)
            saving(*about)
        CheckpointStore.save = slow
        options["checkpoint"] = sc.Checkpoints(folder / "kept", every=2)
    case "restore":
        options["checkpoint"] = sc.Checkpoints(folder / "kept", every=2)
        sc.run(step(), fresh(), FaultPlan().batches(2), **options)
        restoring = CheckpointStore.restore
        def slow(*about):
            time.sleep(LONGER)
            return restoring(*about)
        CheckpointStore.restore = slow
plan = FaultPlan({2: "read"} if sys.argv[2] == "retry" else {})

def batches():
    for number in range(1, 4):
        yield plan.batch(number)
    print("ready", LONGER, flush=True)
    while sys.argv[2] == "stopped" and not (folder / "go").exists():
        time.sleep(0.02)
        yield plan.batch(4)

data = plan.batches(3) if sys.argv[2] in ("retry", "restore") else batches()
run = sc.run(step(), fresh(), data, watchdog=sc.Watchdog(0.5, exit_seconds=EXIT), **options)
print("made", run.steps, flush=True)
"""


@pytest.mark.parametrize("phase", ["trace", "evaluation", "retry", "save", "restore"])
def test_phase_that_takes_longer_than_exit_seconds_is_no_stall(phase: str, tmp_path: Path) -> None:
    command = (sys.executable, "-c", SLOW, str(tmp_path), phase)
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "made 3"
    assert "the process ends" not in done.stderr


def test_process_that_was_stopped_and_continued_is_not_ended(tmp_path: Path) -> None:
    command = (sys.executable, "-c", SLOW, str(tmp_path), "stopped")
    with subprocess.Popen(command, cwd=TESTS, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        ready, longer = process.stdout.readline().split()
        assert ready == "ready"
        os.kill(process.pid, signal.SIGSTOP)
        eventually(lambda: Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
        time.sleep(float(longer))  # than its exit_seconds
        os.kill(process.pid, signal.SIGCONT)
        (tmp_path / "go").touch()
        said, errors = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 0, errors
    assert said.startswith("made ")


def test_time_in_which_the_process_did_not_run_does_not_count() -> None:
    time_ = StallTime(interval=1.0)
    for now in (1.0, 2.0, 3.0):
        time_.tick(now, 0.0, is_patient=False)
    assert (time_.waited, time_.stuck) == (3.0, 3.0)
    time_.tick(1000.0, 0.0, is_patient=False)
    assert (time_.waited, time_.stuck) == (5.0, 5.0)  # and not 1000


def test_patient_phases_are_waited_for_and_a_heartbeat_starts_again() -> None:
    time_ = StallTime(interval=1.0)
    time_.tick(1.0, 0.0, is_patient=False)
    time_.tick(2.0, 0.0, is_patient=True)
    assert (time_.waited, time_.stuck) == (2.0, 1.0)
    time_.tick(3.0, 2.5, is_patient=False)
    assert (time_.waited, time_.stuck) == (0.5, 0.5)


def test_compilation_is_recognised_while_it_runs() -> None:
    def long(x: jax.Array) -> jax.Array:
        for number in range(300):
            x = jnp.sin(x @ x) + number
        return x

    ended = threading.Event()

    def compiles() -> None:
        jax.jit(long).lower(jnp.ones((8, 8))).compile()
        ended.wait()

    thread = threading.Thread(target=compiles)
    thread.start()
    assert thread.ident is not None
    try:
        eventually(lambda: is_compiling(thread.ident or 0))
        eventually(lambda: not is_compiling(thread.ident or 0))
    finally:
        ended.set()
        thread.join()
    assert not is_compiling(threading.get_ident())


def test_wait_before_a_retry_is_a_number_however_many_there_were() -> None:
    assert [sc.Retry(9, wait_seconds=0.5).wait_before(attempt) for attempt in (1, 2, 5)] == [0.5, 1.0, 8.0]
    assert sc.Retry(10**6, wait_seconds=0.0).wait_before(10**5) == 0.0
