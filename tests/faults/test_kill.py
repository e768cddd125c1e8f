"""kill -9 and what the next start makes of it: 57, 58."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from faults.plan import by_a_plain_loop, digest
from faults.test_signals import TESTS

fault = pytest.mark.fault
STEPS = 300


def start(folder: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "faults.job", str(folder), f"--steps={STEPS}", "--every=10"]
    return subprocess.Popen(command, cwd=TESTS, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def losses_in(folder: Path) -> list[tuple[int, float]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines if "event" not in line]


def killed_and_resumed(folder: Path, times: int, *, seed: int) -> int:
    """Kill the job at random moments, begin it again each time, at last let it end; how often it was killed."""
    draw, kills = random.Random(seed), 0
    while kills < times:
        job = start(folder)
        time.sleep(draw.uniform(0.8, 2.6))  # from the imports, over the first save, to the end
        if job.poll() is not None:
            assert job.returncode == 0, job.communicate()[1]
            (folder / "digest").unlink()
            for one in (folder / "kept").iterdir():  # it got to its end: kill it on the way there again
                if one.name.isdecimal() and int(one.name) > 100:
                    one.rename(folder / "kept" / f"{one.name}.deleting")
        job.kill()
        job.communicate()
        kills += 1
    job = start(folder)
    assert job.wait(timeout=120) == 0, job.communicate()[1]
    job.communicate()
    return kills


def assert_exact(folder: Path) -> None:
    assert (folder / "digest").read_text() == digest(by_a_plain_loop(list(range(1, STEPS + 1))))
    assert [step for step, _ in losses_in(folder)] == list(range(1, STEPS + 1))


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, float]]:
    folder = tmp_path_factory.mktemp("whole")
    job = start(folder)
    assert job.wait(timeout=120) == 0, job.communicate()[1]
    job.communicate()
    return losses_in(folder)


@fault("57", "kill -9 at 10 random moments of one run", "final state and all 300 losses bitwise as without")
@fault("58", "kill -9 before and in the first save", "begins anew, without a clean-up by hand")
def test_kill_at_random_moments_resumes_exactly(tmp_path: Path, losses: Any) -> None:
    assert killed_and_resumed(tmp_path, 10, seed=1) == 10
    assert_exact(tmp_path)
    assert losses_in(tmp_path) == losses


@pytest.mark.long
@fault("57", "kill -9 at 200 random moments, in 20 runs", "final states and all losses bitwise as without")
def test_kill_at_two_hundred_random_moments_resumes_exactly(tmp_path: Path, losses: Any) -> None:
    for number in range(20):
        folder = tmp_path / str(number)
        folder.mkdir()
        killed_and_resumed(folder, 10, seed=100 + number)
        assert_exact(folder)
        assert losses_in(folder) == losses
