"""`stepc launch`: start the processes of a job on this machine, to try out what will run on many. It imports no jax."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import IO

from stepc._distributed.start import COORDINATOR, NUM_PROCESSES, PROCESS_ID
from stepc.errors import ConfigError

POLL_SECONDS = 0.05
END_SECONDS = 30.0  # how long the others may take to end by themselves once one has failed
TERM_SECONDS = 10.0  # and how long after SIGTERM, before SIGKILL
SIGNALED = 128  # what a shell adds to the number of the signal that ended a process


def launch(num_processes: int, command: Sequence[str]) -> int:
    """Run a command in several processes that find each other on 127.0.0.1; return the exit code of the first failure.

    Meaning: each process gets the address, the number of processes and its own index in its environment, where
      `sc.init_distributed()` finds them. Each line it prints is prefixed with its index.
    Ctrl-C and SIGTERM are passed on to each process, once. When one fails, the others have 30 s to end by themselves.
    Errors: ConfigError if the number is not positive, or the command is missing or not found.
    """
    if num_processes < 1 or not command:
        facts = (("processes", str(num_processes)), ("command", " ".join(command) or "none"))
        remedy = "Write, for example: stepc launch -n 4 -- python train.py"
        raise ConfigError("`stepc launch` needs a number of processes and a command.", facts=facts, suggestion=remedy)
    arguments = [sys.executable, "-m", "stepc", *command[1:]] if command[0] == "stepc" else list(command)
    coordinator = f"127.0.0.1:{_free_port()}"
    processes: list[subprocess.Popen[bytes]] = []
    try:
        with _passing_signals_on_to(processes):
            for index in range(num_processes):
                place = {COORDINATOR: coordinator, NUM_PROCESSES: str(num_processes), PROCESS_ID: str(index)}
                processes.append(
                    subprocess.Popen(
                        arguments,
                        env={**os.environ, "PYTHONUNBUFFERED": "1", **place},
                        stdout=subprocess.PIPE,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,  # else a terminal sends Ctrl-C as well, and the second acts at once
                    )
                )
            printers = [_Printer(index, process.stdout) for index, process in enumerate(processes)]
            code = _wait(processes)
            for printer in printers:
                printer.join(TERM_SECONDS)  # a child of the process may hold its output open
            return code
    except FileNotFoundError as error:
        raise ConfigError(f"Command not found: `{command[0]}`.") from error
    finally:
        _send(processes, signal.SIGKILL)
        for process in processes:
            process.wait()


def _wait(processes: "Sequence[subprocess.Popen[bytes]]") -> int:
    """The exit code of the first process that failed, once all have ended; 0 if none failed."""
    first_code, failed_at, is_terminated = 0, 0.0, False
    while any(process.poll() is None for process in processes):
        failed = [process.returncode for process in processes if process.poll()]
        if failed and not first_code:
            first_code, failed_at = _shell_code(failed[0]), time.monotonic()
        waited = time.monotonic() - failed_at
        if first_code and waited > END_SECONDS + TERM_SECONDS:
            return first_code  # `launch` kills the rest
        if first_code and waited > END_SECONDS and not is_terminated:
            is_terminated = True
            _send(processes, signal.SIGTERM)
        time.sleep(POLL_SECONDS)
    return first_code or max(_shell_code(process.returncode) for process in processes)


def _shell_code(code: int) -> int:
    return SIGNALED - code if code < 0 else code


@contextmanager
def _passing_signals_on_to(processes: "Sequence[subprocess.Popen[bytes]]") -> Generator[None]:
    """Ctrl-C and SIGTERM go to the processes; this one ends with them, not before."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, _: _send(processes, number)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _send(processes: "Sequence[subprocess.Popen[bytes]]", number: int) -> None:
    """Send a signal to each living process and to its children, as a terminal does."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, number)


class _Printer(threading.Thread):
    """Prints what a process writes, line by line, with its index in front."""

    def __init__(self, index: int, output: IO[bytes] | None) -> None:
        super().__init__(daemon=True)
        self.index, self.output = index, output
        self.start()

    def run(self) -> None:
        if self.output is None:
            return
        with self.output:
            for line in self.output:
                sys.stdout.write(f"[{self.index}] {line.decode(errors='replace')}")
                sys.stdout.flush()


def _free_port() -> int:
    """A port that is free now; another program may take it before process 0 does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
