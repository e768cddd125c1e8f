"""Processes forked inside a run behave as if there were no run: handlers, locks, files and threads."""

import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faults.plan import batch_of, fresh, step
from waiting import LIMIT_SECONDS, eventually

import stepc as sc

# To fork a process that has threads is what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:RuntimeWarning", "ignore:.*fork.*:DeprecationWarning")
FORK = multiprocessing.get_context("fork")
TESTS = Path(__file__).parent.parent


def sleep_for_ever(is_up: Any) -> None:
    is_up.set()
    while True:
        time.sleep(LIMIT_SECONDS)


class Worker(FORK.Process):
    """A child that sleeps until a signal ends it."""

    def __init__(self) -> None:
        self.is_up = FORK.Event()
        super().__init__(target=sleep_for_ever, args=(self.is_up,), daemon=True)


def ended_by(process: Worker, number: int) -> int | None:
    """The exit code of a child after a signal; one that ignores it is killed, and has another code."""
    # On a busy machine, a signal may come before the child has run at all: Python forgets those at a fork.
    assert process.is_up.wait(LIMIT_SECONDS) and process.pid is not None
    os.kill(process.pid, number)
    process.join(LIMIT_SECONDS / 10)
    process.kill()
    process.join()
    return process.exitcode


def loader(children: list[Any]) -> Iterator[Any]:
    """Batches from a loader that starts a worker within the first read."""
    children.append(Worker())
    children[0].start()
    for number in range(1, 4):
        yield batch_of(number)


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_worker_of_a_loader_ends_on_a_signal(number: int, prefetch: int) -> None:
    children: list[Any] = []
    codes: list[int | None] = []

    def hook(step: int, metrics: Any, snapshot: Any) -> None:
        codes.append(ended_by(children[0], number))

    run = sc.run(step(), fresh(), sc.Data(loader(children), prefetch=prefetch), hooks=[(2, hook)])
    # multiprocessing turns Python's own KeyboardInterrupt into exit code 1.
    assert (run.steps, codes) == (3, [-signal.SIGTERM if number == signal.SIGTERM else 1])


def test_worker_of_a_run_within_a_run_has_the_handlers_from_before_both() -> None:
    codes: list[int | None] = []

    def inner(*about: Any) -> None:
        children: list[Any] = []
        sc.run(step(), fresh(), loader(children))
        child = Worker()
        child.start()
        codes.extend(ended_by(one, signal.SIGTERM) for one in (children[0], child))

    sc.run(step(), fresh(), [batch_of(1)], hooks=[(1, inner)])
    assert codes == [-signal.SIGTERM] * 2


def seen_by_a_child(look: Callable[[], str]) -> str:
    """What `look` gives in a forked child."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(theirs, look().encode())
        os._exit(0)
    os.close(theirs)
    os.waitpid(child, 0)
    with os.fdopen(ours) as said:
        return said.read()


def test_child_keeps_a_handler_that_the_user_has_set_since() -> None:
    def mine(number: int, frame: Any) -> None: ...

    seen: list[str] = []

    def hook(*about: Any) -> None:
        before = signal.signal(signal.SIGTERM, mine)
        seen.append(seen_by_a_child(lambda: repr((signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)))))
        signal.signal(signal.SIGTERM, before)

    sc.run(step(), fresh(), [batch_of(1)], hooks=[(1, hook)])
    assert seen == [repr((mine, signal.default_int_handler))]


def test_pool_in_a_hook_ends() -> None:
    found: list[Any] = []

    def hook(*about: Any) -> None:
        with FORK.Pool(2) as pool:
            found.append(pool.map(abs, [-1, 2, -3]))
            workers = multiprocessing.active_children()
        eventually(lambda: not any(worker.is_alive() for worker in workers))

    sc.run(step(), fresh(), [batch_of(1)], hooks=[(1, hook)])
    assert found == [[1, 2, 3]]


def can_lock(directory: Path) -> bool:
    with (directory / "lock").open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def test_child_that_lives_on_does_not_hold_the_directory(tmp_path: Path) -> None:
    children: list[Any] = []
    held: list[bool] = []
    keep = sc.Checkpoints(tmp_path, every=1)

    def hook(*about: Any) -> None:
        held.append(not can_lock(tmp_path))

    run = sc.run(step(), fresh(), loader(children), steps=2, checkpoint=keep, hooks=[(1, hook)])
    assert children[0].is_alive() and held == [True, True]  # a child that is forked unlocks nothing
    again = sc.run(step(), fresh(), [batch_of(3)], steps=3, checkpoint=keep)
    children[0].kill()
    assert (run.steps, again.steps) == (2, 3)


KILLED = """
import multiprocessing, os, sys, time
from faults.plan import batch_of, fresh, step
import stepc as sc

def hook(*about):
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(1000,))
    child.start()
    print(child.pid, flush=True)
    os.kill(os.getpid(), 9)

sc.run(step(), fresh(), [batch_of(1)], hooks=[(1, hook)], checkpoint=sc.Checkpoints(sys.argv[1], every=1))
"""


def test_child_of_a_run_that_was_killed_does_not_hold_the_directory(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], cwd=TESTS, stdout=subprocess.PIPE) as job:
        assert job.stdout is not None
        child = int(job.stdout.readline())
        job.wait()
        try:
            os.kill(child, 0)  # it lives
            eventually(lambda: can_lock(tmp_path))  # its own copy of the lock is closed soon after it was forked
        finally:
            os.kill(child, signal.SIGKILL)


def test_child_that_leaves_by_the_run_touches_nothing_of_it(tmp_path: Path) -> None:
    """A hook forks, and the child ends as scripts do: by an exception through `run`."""
    ends: list[int] = []
    parent = os.getpid()

    def hook(*about: Any) -> None:
        if (child := os.fork()) == 0:
            raise SystemExit(5)
        ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    try:
        with sc.JSONL(tmp_path / "log.jsonl") as lines:
            run = sc.run(
                step(),
                fresh(),
                sc.Data([batch_of(number) for number in (1, 2, 3)], prefetch=2),
                hooks=[(2, hook)],
                checkpoint=sc.Checkpoints(tmp_path / "kept", every=100),
                watchdog=sc.Watchdog(warn_seconds=LIMIT_SECONDS),
                loggers=[lines],
            )
    except SystemExit as left:
        assert os.getpid() != parent
        os._exit(left.code if isinstance(left.code, int) else 1)
    assert (run.steps, ends) == (3, [5])
    assert sorted(path.name for path in (tmp_path / "kept").iterdir() if path.name.isdecimal()) == ["3"]
    assert '"failure"' not in (tmp_path / "log.jsonl").read_text()
