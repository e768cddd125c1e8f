"""kill -9, and the resume after it: rows 57 and 58."""

import json
import random
import time
from pathlib import Path

import pytest
from faults.plan import by_a_plain_loop, digest
from faults.points import POINTS
from faults.zygote import Job, Zygote, errors_of

fault = pytest.mark.fault
STEPS = 120
AFTER = ("after the rename", "in the deletion of an old one")


def start(zygote: Zygote, folder: Path, *options: str) -> Job:
    folder.mkdir(exist_ok=True)
    return zygote.start(folder, f"--steps={STEPS}", "--every=10", *options)


def losses_in(folder: Path) -> list[tuple[int, float]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines if "event" not in line]


def killed_and_resumed(zygote: Zygote, folder: Path, times: int, *, seed: int) -> list[int]:
    """Kill the job at random moments, restart it each time, and at last let it finish. The step of each kill."""
    draw, steps = random.Random(seed), list[int]()
    while len(steps) < times:
        log = folder / "metrics.jsonl"
        lives = len(steps_of_lives(log))
        job = start(zygote, folder)
        if draw.random() < 1 / 3:  # while it starts, or reads a checkpoint
            time.sleep(draw.uniform(0.0, 1.0))
        else:  # in training, however slow the machine is
            until, at = time.monotonic() + 60, draw.randrange(STEPS)
            while not job.has_ended() and time.monotonic() < until:
                if len(found := steps_of_lives(log)) > lives and found[-1] >= at:
                    break
                time.sleep(0.001)
            time.sleep(draw.uniform(0.0, 0.1))
        job.kill()
        steps.append(steps_of_lives(log)[-1] if len(steps_of_lives(log)) > lives else 0)
        (folder / "digest").unlink(missing_ok=True)
        kept = [one for one in (folder / "kept").glob("*") if one.name.isdecimal()]
        if any(int(one.name) > 100 for one in kept):  # near its end: set it back
            for one in kept:
                if int(one.name) > 50:
                    one.rename(folder / "kept" / f"{one.name}.deleting")
    assert start(zygote, folder).wait() == 0, errors_of(folder)
    return steps


def steps_of_lives(log: Path) -> list[int]:
    """The last logged step of each start. An incomplete last line does not count."""
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    lives = list[int]()
    for line in (json.loads(line) for line in lines if line.endswith("\n")):
        if line.get("event") == "start":
            lives.append(0)
        if lives:
            lives[-1] = line["step"]
    return lives


def assert_exact(folder: Path, losses: list[tuple[int, float]]) -> None:
    assert (folder / "digest").read_text() == digest(by_a_plain_loop(list(range(1, STEPS + 1))))
    assert [step for step, _ in losses_in(folder)] == list(range(1, STEPS + 1))
    assert losses_in(folder) == losses


@pytest.fixture(scope="module")
def whole(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, float]]:
    """The losses of a run that is not killed."""
    folder = tmp_path_factory.mktemp("whole")
    assert start(zygote, folder).wait() == 0, errors_of(folder)
    return losses_in(folder)


@fault("57", "kill -9 at 25 random moments of two runs", "final states and all 120 losses bitwise as without")
@fault("58", "kill -9 before and in the first save, and while a checkpoint is read", "begins anew or reads it again")
@pytest.mark.parametrize("seed", [1, 2])
def test_kill_at_random_moments_resumes_exactly(seed: int, zygote: Zygote, tmp_path: Path, whole: list) -> None:
    steps = killed_and_resumed(zygote, tmp_path, 12 + seed % 2, seed=seed)
    assert_exact(tmp_path, whole)
    assert len(set(steps)) > 3, steps  # the kills are spread over the run


@fault("57", f"kill -9 at points: {', '.join(POINTS)}", "final state and all 120 losses bitwise as without")
@pytest.mark.parametrize("point", POINTS)
def test_kill_at_a_named_point_resumes_exactly(point: str, zygote: Zygote, tmp_path: Path, whole: list) -> None:
    assert start(zygote, tmp_path, "--kill", point).wait() == -9, errors_of(tmp_path)
    is_committed = (tmp_path / "kept" / "40").is_dir()
    assert point == "in a line of the log" or is_committed == (point in AFTER)
    assert start(zygote, tmp_path).wait() == 0, errors_of(tmp_path)
    assert_exact(tmp_path, whole)


@pytest.mark.long
@fault("57", "kill -9 at 200 random moments, in 20 runs", "final states and all losses bitwise as without")
@pytest.mark.parametrize("number", range(20))
def test_kill_at_two_hundred_random_moments(number: int, zygote: Zygote, tmp_path: Path, whole: list) -> None:
    steps = killed_and_resumed(zygote, tmp_path, 10, seed=100 + number)
    print("killed after the steps", steps)
    assert_exact(tmp_path, whole)
