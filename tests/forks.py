"""Processes that start at once: each is a fork of one process that has imported everything and run nothing."""

import atexit
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

from waiting import LIMIT_SECONDS, eventually

TESTS = Path(__file__).parent


class Forked:
    """A process that runs `main` of a module; as much of `subprocess.Popen` as the tests need."""

    def __init__(self, pid: int, code: Path) -> None:
        self.pid, self._code = pid, code
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and self._code.exists():
            self.returncode = int(self._code.read_text())
        return self.returncode

    def wait(self, timeout: float = LIMIT_SECONDS) -> int:
        """The exit code, or minus the signal."""
        eventually(lambda: self.poll() is not None, timeout)
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        with suppress(ProcessLookupError):  # it has ended
            os.kill(self.pid, signal.SIGKILL)


class Forks:
    """The process that the others are forked from: it has imported `module`, and jax has no devices yet."""

    def __init__(self, module: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "forks", module], cwd=TESTS, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        atexit.register(self._process.communicate)

    def start(self, arguments: list[str], environment: dict[str, str], out: Path) -> Forked:
        """Run `main(arguments)` with more variables in the environment; `out` gets stdout and stderr."""
        assert self._process.stdin is not None and self._process.stdout is not None
        code = out.with_suffix(".code")
        code.unlink(missing_ok=True)
        out.write_text("")
        self._process.stdin.write(json.dumps([arguments, environment, str(out), str(code)]) + "\n")
        self._process.stdin.flush()
        return Forked(int(self._process.stdout.readline()), code)


@cache
def forks_of(module: str) -> Forks:
    """One for each module and worker of the tests."""
    return Forks(module)


def main() -> None:
    run = importlib.import_module(sys.argv[1]).main
    importlib.import_module("orbax.checkpoint")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the monitors
    for line in sys.stdin:
        arguments, environment, out, code = json.loads(line)
        if os.fork() == 0:
            monitor(run, arguments, environment, Path(out), Path(code))


def monitor(
    run: Callable[[list[str]], None], arguments: list[str], environment: dict[str, str], out: Path, code: Path
) -> None:
    """Fork the process, say its number, wait for it and write its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        os.environ.update(environment)
        said = os.open(out, os.O_WRONLY | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(said, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.exit(run(arguments))
    print(pid, flush=True)
    _, status = os.waitpid(pid, 0)
    new = code.with_suffix(".new")
    new.write_text(str(os.waitstatus_to_exitcode(status)))
    new.rename(code)
    os._exit(0)


if __name__ == "__main__":
    main()
