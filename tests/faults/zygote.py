"""Jobs that start at once: each is a fork of one process that has imported everything and run nothing."""

import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from xla_flags import FAST_COMPILES

TESTS = Path(__file__).parent.parent


@dataclass
class Job:
    """A running process of `faults.job`."""

    number: int
    zygote: "Zygote"
    code: int | None = None

    def kill(self) -> None:
        """kill -9, and wait for the end."""
        with suppress(ProcessLookupError):  # it had ended
            os.kill(self.number, signal.SIGKILL)
        self.wait()

    def has_ended(self) -> bool:
        """Whether it is gone."""
        try:
            os.kill(self.number, 0)
        except ProcessLookupError:
            return True
        return False

    def wait(self) -> int:
        """Its exit code; for a signal, the negative number of it."""
        if self.code is None:
            self.code = int(self.zygote.line())
        return self.code


class Zygote:
    """The process that jobs are forked from. Compiled programs are cached in `programs`."""

    def __init__(self, programs: Path) -> None:
        kept = {
            "JAX_COMPILATION_CACHE_DIR": str(programs),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "XLA_FLAGS": FAST_COMPILES,
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "faults.zygote"], cwd=TESTS, env={**os.environ, **kept}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def start(self, folder: Path, *options: str) -> Job:
        """Start a job in a folder, where its stderr goes too."""
        assert self._process.stdin is not None
        self._process.stdin.write("\t".join([str(folder), *options]) + "\n")
        self._process.stdin.flush()
        return Job(int(self.line()), self)

    def line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    made = Zygote(tmp_path_factory.mktemp("programs"))
    yield made
    made.close()


def errors_of(folder: Path) -> str:
    return (folder / "stderr").read_text()


def main() -> None:
    """Fork a job for each line of stdin; print its process id, then its exit code."""
    for name in ("orbax.checkpoint", "stepc._runner.checkpoint_store"):
        importlib.import_module(name)
    job = importlib.import_module("faults.job")
    for line in sys.stdin:
        options = line.rstrip("\n").split("\t")
        number = os.fork()
        if number == 0:
            said = os.open(Path(options[0]) / "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(said, 2)
            os.dup2(said, 1)
            sys.exit(job.main(options))
        print(number, flush=True)
        _, status = os.waitpid(number, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def ended_by_itself(run: Callable[[Path], tuple[int, str]], folder: Path) -> tuple[Path, int, str]:
    """Where a process ran, its exit code and its stderr. It runs again if CPython aborted it at exit.

    Before 3.14 CPython ends a C++ thread that asks for the interpreter during shutdown, and then sometimes aborts: in
    1 to 4 of 120 processes whose save failed.
    """
    for attempt in range(3):
        place = folder / str(attempt)
        place.mkdir()
        code, said = run(place)
        if code != -signal.SIGABRT or "exception not rethrown" not in said:
            return place, code, said
    raise AssertionError("three aborts in a row are not by chance")


if __name__ == "__main__":
    main()
