"""Signals and ways out: 52 to 56, 59, 60. Real signals, to this process or to one of its own."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from faults.plan import FaultPlan, Remembering, batch_of, by_a_plain_loop, digest, fresh, step
from faults.test_device import calling_back
from faults.zygote import Zygote, errors_of
from waiting import LIMIT_SECONDS

import stepc as sc

fault = pytest.mark.fault
TESTS = Path(__file__).parent.parent


def endless() -> Iterator[Any]:
    batches = [batch_of(number) for number in range(1, 9)]
    while True:
        yield from batches


def after(steps: int) -> sc.State:
    return by_a_plain_loop([number % 8 + 1 for number in range(steps)])


def send_after(seconds: float, number: int = signal.SIGINT) -> threading.Timer:
    timer = threading.Timer(seconds, os.kill, (os.getpid(), number))
    timer.start()
    return timer


@fault("52", "SIGINT at 150 random moments of a run with snapshots", "KeyboardInterrupt with a live, exact state")
def test_interrupt_at_a_random_moment_loses_nothing() -> None:
    interrupted_at_random(150)


@pytest.mark.long
@fault("52", "SIGINT at 1,000 random moments", "0 lost states: each alive, and that of the number of steps it says")
def test_interrupt_at_a_thousand_random_moments_loses_nothing() -> None:
    interrupted_at_random(1000)


def interrupted_at_random(times: int) -> None:
    draw = random.Random(1)
    exact: dict[int, str] = {}
    state = fresh()
    arrived: list[int] = []

    def outside(number: int, frame: Any) -> None:
        """Python's own handler would raise: within a callback of the garbage collector, that is lost."""
        arrived.append(number)

    before = signal.signal(signal.SIGINT, outside)
    try:
        for trial in range(times):
            arrived.clear()
            timer = threading.Timer(draw.uniform(0.0005, 0.02), os.kill, (os.getpid(), signal.SIGINT))
            if trial % 3 == 0:
                timer.start()  # it may end before the run begins
            try:
                while not arrived:
                    batches = endless() if timer.ident else starting(timer)
                    sc.run(step(), state, batches, steps=10_000, on_error="retry", buffers=sc.Buffers(snapshot_every=3))
            except sc.Interrupted as error:
                run = error.run
                assert isinstance(run, sc.Run)
                assert int(run.state.step) == run.steps
                if run.steps not in exact:
                    exact[run.steps] = digest(after(run.steps))
                assert digest(run.state) == exact[run.steps]
            timer.join()
            assert arrived == [signal.SIGINT]
            assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
            assert signal.getsignal(signal.SIGINT) is outside
    finally:
        signal.signal(signal.SIGINT, before)


def starting(timer: threading.Timer) -> Iterator[Any]:
    """Batches, the first of which starts the timer: on a machine of any speed it ends among the steps."""
    timer.start()
    yield from endless()


@fault("53", "SIGINT while a host callback runs", "Interrupted, not a DeviceError; the state is alive")
def test_interrupt_in_a_callback_is_no_device_error() -> None:
    calling = calling_back(lambda number: os.kill(os.getpid(), signal.SIGINT) if number == 3 else None)
    with pytest.raises(sc.Interrupted) as raised:
        sc.run(calling, calling.init({"w": fresh().params["w"]}), FaultPlan().batches(100))
    assert int(raised.value.run.state.step) == raised.value.run.steps >= 3


@fault("52", "a second SIGINT while a hook runs", "leaves at once, by a plain KeyboardInterrupt")
def test_second_interrupt_leaves_at_once() -> None:
    def twice(*about: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second Ctrl-C did not act")

    with pytest.raises(KeyboardInterrupt) as raised:
        sc.run(step(), fresh(), endless(), hooks=[(3, twice)])
    assert type(raised.value) is KeyboardInterrupt


@fault("31", "data that hangs, then SIGTERM", "Preempted at once; the state of the last finished step")
@pytest.mark.parametrize("prefetch", [0, 1])
def test_wait_for_data_is_left_at_once(prefetch: int) -> None:
    def hangs() -> Iterator[Any]:
        yield batch_of(1)
        yield batch_of(2)
        send_after(0.1, signal.SIGTERM)
        waited.append(is_free.wait(LIMIT_SECONDS))
        yield batch_of(3)

    is_free, waited = threading.Event(), list[bool]()
    with pytest.raises(sc.Preempted) as raised:
        sc.run(step(), fresh(), sc.Data(hangs(), prefetch=prefetch))
    assert waited == []  # the data hangs still
    is_free.set()
    assert digest(raised.value.run.state) == digest(by_a_plain_loop([1, 2]))


RETRYING = """
from faults.plan import FaultPlan, batch_of, fresh, step
import stepc as sc

class Ready:
    def log(self, metrics, step):
        print("ready", flush=True)

def batches(tries=[]):
    tries.append(1)
    if len(tries) == 1:
        raise OSError("the disk is slow")
    while True:
        yield batch_of(1)

while True:
    try:
        sc.run(step(), fresh(), batches(), loggers=[Ready()])
    except sc.StepcError as error:
        print("caught", type(error).__name__, flush=True)
    except Exception:
        print("caught something else", flush=True)
"""


@fault("54", "SIGTERM to a loop that runs again after each StepcError", "exit 143; the loop does not catch it")
@fault("52", "SIGINT to the same", "ends by Interrupted, and the process by SIGINT")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_loop_that_catches_stepc_errors_ends_on_a_signal(number: int) -> None:
    job = [sys.executable, "-c", RETRYING]
    with subprocess.Popen(job, cwd=TESTS, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["caught DataError\n", "ready\n"]
        process.send_signal(number)
        said, errors = process.communicate(timeout=LIMIT_SECONDS)
    assert "caught" not in said
    assert process.returncode == (143 if number == signal.SIGTERM else -signal.SIGINT)
    assert number == signal.SIGTERM or "stepc.errors.Interrupted: Interrupted after step" in errors


TRAINING = """
import atexit, sys
from faults.plan import batch_of, fresh, step
import stepc as sc

class Ready:
    def log(self, metrics, step):
        if step == 1:
            print("ready", flush=True)

def batches():
    while True:
        yield batch_of(1)

if len(sys.argv) > 1:
    sys.excepthook = lambda *about: print("my own hook", about[1], flush=True)
atexit.register(lambda: print("cleaned up", flush=True))
sc.run(step(), fresh(), batches(), loggers=[Ready()], log_every=10**9)
"""


@pytest.mark.parametrize("argument", ["", "own"])
def test_interrupt_ends_the_loop_of_a_shell(argument: str, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(TRAINING)
    loop = f"for s in 1 2 3; do {sys.executable} {tmp_path}/train.py {argument}; done"
    with subprocess.Popen(
        ["bash", "-c", loop], cwd=TESTS, env={**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS.parent}"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    ) as shell:  # fmt: skip
        assert shell.stdout is not None and shell.stderr is not None
        try:
            assert shell.stdout.readline() == "ready\n", shell.stderr.read()
            os.killpg(shell.pid, signal.SIGINT)  # as a terminal does
            said = []
            while (line := shell.stdout.readline()) not in ("", "ready\n"):
                said.append(line)
            assert line == "", "the loop went on"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)
        errors = shell.stderr.read()
    assert said[-1] == "cleaned up\n"
    assert "Interrupted after step" in (said[0] if argument else errors)


class Signalling(Remembering):
    def __init__(self, number: int, at: int = 3) -> None:
        super().__init__()
        self.number, self.at = number, at

    def log(self, metrics: Any, step: int) -> None:
        super().log(metrics, step)
        if step == self.at:
            os.kill(os.getpid(), self.number)


@fault("56", "handlers of the user's own for SIGINT and SIGTERM", "called once, after the run; restored as they were")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_handlers_are_chained_and_restored(number: int) -> None:
    called: list[int] = []

    def mine(number: int, frame: Any) -> None:
        called.append(number)

    before = signal.signal(number, mine)
    try:
        with pytest.raises((sc.Interrupted, sc.Preempted)):
            sc.run(step(), fresh(), endless(), loggers=[Signalling(number)], log_every=1)
        assert (called, signal.getsignal(number)) == ([number], mine)
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGHUP])
def test_further_signals_end_a_run_as_sigterm_does(number: int, tmp_path: Path) -> None:
    logger = Signalling(number, at=4)
    before = signal.signal(number, signal.SIG_DFL)  # under `nohup` SIGHUP is ignored, and a run leaves it so
    try:
        with pytest.raises(sc.Preempted) as raised:
            sc.run(
                step(), fresh(), FaultPlan().batches(20), loggers=[logger], log_every=1,
                checkpoint=sc.Checkpoints(tmp_path, every=100),
                watchdog=sc.Watchdog(signals=(signal.SIGUSR1, signal.SIGHUP)),
            )  # fmt: skip
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    run = raised.value.run
    assert (raised.value.code, run.ended) == (128 + number, "preempted")
    assert (tmp_path / str(run.steps)).is_dir()
    assert digest(run.state) == digest(by_a_plain_loop(list(range(1, run.steps + 1))))
    (start,) = [facts for name, facts, _ in logger.events if name == "start"]
    assert start["signals"] == "SIGINT and SIGTERM and SIGUSR1 and SIGHUP"


@fault("56", "a run within a hook of a run, SIGINT in the inner one", "both end as interrupted; handlers restored")
def test_nested_runs_both_end() -> None:
    def inner(*about: Any) -> None:
        sc.run(step(), fresh(), endless(), loggers=[Signalling(signal.SIGINT)], log_every=1)

    with pytest.raises(sc.Interrupted):
        sc.run(step(), fresh(), endless(), hooks=[(2, inner)])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@fault("56", "a run in a thread", "no handler is set; the header says no_signal_protection")
def test_run_in_a_thread_sets_no_handler() -> None:
    logger = Remembering()
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=lambda: sc.run(step(), fresh(), FaultPlan().batches(3), loggers=[logger]))
    thread.start()
    thread.join()
    (start,) = [facts for name, facts, _ in logger.events if name == "start"]
    assert start["signals"] == "no_signal_protection"
    assert signal.getsignal(signal.SIGTERM) is before


@fault("59", "SystemExit(3) from a hook, the data, data read ahead", "a last checkpoint; the same code")
@pytest.mark.parametrize("place", ["hook", "data", "ahead"])
def test_system_exit_saves_and_keeps_its_code(place: str, tmp_path: Path) -> None:
    def leaving() -> Iterator[Any]:
        for number in range(1, 6):
            yield batch_of(number)
        raise SystemExit(3)

    def leaves(*about: Any) -> None:
        raise SystemExit(3)

    keep = sc.Checkpoints(tmp_path, every=100)
    with pytest.raises(SystemExit) as raised:
        if place == "hook":
            sc.run(step(), fresh(), endless(), hooks=[(5, leaves)], checkpoint=keep)
        else:
            sc.run(step(), fresh(), sc.Data(leaving(), prefetch=2 if place == "ahead" else 0), checkpoint=keep)
    assert raised.value.code == 3
    assert (tmp_path / "5").is_dir()


class Leaving(Remembering):
    """A logger that leaves, by metrics and by events, from a step on."""

    def __init__(self, kind: type[BaseException]) -> None:
        super().__init__()
        self.kind = kind

    def log(self, metrics: Any, step: int) -> None:
        if step >= 3:
            raise self.kind(4)

    def event(self, name: str, facts: Any, step: int) -> None:
        if step >= 3:
            raise self.kind(5)


class Left(BaseException):
    """A user's own exit."""


@pytest.mark.parametrize("kind", [SystemExit, Left])
@pytest.mark.parametrize("place", ["logger", "verdict"])
def test_exit_that_is_asked_for_twice_saves(kind: type[BaseException], place: str, tmp_path: Path) -> None:
    judged: list[int] = []

    def verdict(metrics: Any) -> None:
        judged.append(1)
        if len(judged) >= 3:
            raise kind(4)

    options: dict[str, Any] = {"loggers": [Leaving(kind)], "log_every": 1} if place == "logger" else {}
    with pytest.raises(kind) as raised:
        sc.run(
            step(), fresh(), FaultPlan().batches(20), checkpoint=sc.Checkpoints(tmp_path, every=100),
            reject_if=verdict if place == "verdict" else None, **options,
        )  # fmt: skip
    assert raised.value.args == (4,)
    run = raised.value.__dict__["run"]
    assert 3 <= run.steps <= 5
    assert digest(run.state) == digest(by_a_plain_loop(list(range(1, run.steps + 1))))
    assert (tmp_path / str(run.steps)).is_dir()


@pytest.mark.parametrize("kind", [SystemExit, Left, KeyboardInterrupt])
def test_exception_without_checkpoints_carries_the_run(kind: type[BaseException]) -> None:
    def leaves(*about: Any) -> None:
        raise kind

    with pytest.raises(kind) as raised:
        sc.run(step(), fresh(), endless(), hooks=[(5, leaves)])
    run = raised.value.__dict__["run"]
    assert (run.steps, digest(run.state)) == (5, digest(after(5)))


def test_save_may_take_longer_than_a_thread_can_wait(tmp_path: Path) -> None:
    keep = sc.Checkpoints(tmp_path, every=2, timeout_seconds=1e12)
    sc.run(step(), fresh(), FaultPlan().batches(4), checkpoint=keep)
    assert (tmp_path / "4").is_dir()


@fault("60", "logger and last checkpoint fail while an error is handled", "the first error; others are notes")
def test_first_error_is_the_one_that_is_raised(tmp_path: Path) -> None:
    class Breaking(Remembering):
        def event(self, name: str, facts: Any, step: int) -> None:
            raise OSError("the log is full")

    def gone() -> Iterator[Any]:
        yield batch_of(1)
        (tmp_path / "kept" / "lock").unlink()
        (tmp_path / "kept").rmdir()
        (tmp_path / "kept").write_text("a file where the directory was")
        raise OSError("the data is gone")

    with pytest.raises(sc.DataError, match="the data is gone") as raised:
        sc.run(step(), fresh(), gone(), checkpoint=sc.Checkpoints(tmp_path / "kept", every=100), loggers=[Breaking()])
    assert "CheckpointError" in raised.value.__notes__[-1]


PLACES = ("data", "compile", "step", "eval", "save", "logger", "between")


STEPS = 4000


@pytest.fixture(scope="module")
def terminated(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, Path]]:
    """One process for each place: SIGTERM comes there; how it ended."""
    found = {}
    for place in PLACES:
        folder = tmp_path_factory.mktemp(place)
        options = ("--term", place, f"--steps={STEPS}")
        if place == "compile":  # a process of its own, which finds no program in a cache
            with (folder / "stderr").open("w") as said:
                job = [sys.executable, "-m", "faults.job", str(folder), *options]
                code = subprocess.run(job, cwd=TESTS, stderr=said, timeout=LIMIT_SECONDS).returncode
        else:
            code = zygote.start(folder, *options).wait()
        found[place] = (code, folder)
    return found


# The step that is made when the signal comes, and those that are dispatched by then. "compile" and "between" are by
# another thread, which runs when it runs.
LAST = {"data": (10, 12), "step": (20, 22), "eval": (7, 9), "save": (5, 40), "logger": (20, 23)}


@fault("54", "SIGTERM in data, compile, step, eval, save, logger, between", "exit 143; at most the steps in flight")
@fault("55", "SIGTERM twice, the second while the last checkpoint is written", "exit 143, one checkpoint, whole")
@pytest.mark.parametrize("place", PLACES)
def test_sigterm_anywhere_leaves_a_checkpoint(place: str, terminated: dict[str, tuple[int, Path]]) -> None:
    code, folder = terminated[place]
    assert code == 143, errors_of(folder)
    state = fresh()
    run = sc.run(step(), state, FaultPlan().batches(0), checkpoint=sc.Checkpoints(folder / "kept", every=1000))
    first, last = LAST.get(place, (0, STEPS - 1))
    assert first <= int(run.state.step) == run.steps <= last
    assert digest(run.state) == digest(by_a_plain_loop(list(range(1, run.steps + 1))))
