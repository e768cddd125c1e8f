"""Starts the processes of a job on this machine, to try out what will run on many. It knows no jax."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO

from stepc._distributed.start import COORDINATOR, NUM_PROCESSES, PROCESS_ID
from stepc.errors import ConfigError

LOOK_SECONDS = 0.05
END_SECONDS = 30.0  # how long the others may take to end by themselves, when one has failed
TERM_SECONDS = 10.0  # and then, when they were told to
SIGNALED = 128  # what a shell adds to the number of the signal that ended a process


def launch(num: int, command: Sequence[str]) -> int:
    """Run a command in `num` processes that find each other on 127.0.0.1; the exit code of the first that failed.

    Meaning: each gets the address, the number of processes and its own number in the environment, where
      `sc.init_distributed()` finds them. What it prints comes with its number before each line.
    Ctrl-C and SIGTERM go to each of them, once. When one fails, the others have 30 s to end by themselves.
    Errors: ConfigError for a number that is not positive, for no command, or one that is not there.
    """
    if num < 1 or not command:
        facts = (("processes", str(num)), ("command", " ".join(command) or "none"))
        raise ConfigError("There is nothing to launch.", facts=facts, suggestion="stepc launch -n 4 -- python train.py")
    words = [sys.executable, "-m", "stepc", *command[1:]] if command[0] == "stepc" else list(command)
    port = _free_port()
    processes: list[subprocess.Popen[bytes]] = []
    try:
        with _passed_on(processes):
            for process in range(num):
                processes.append(_started(words, port, num, process))
            threads = [_Printer(number, one.stdout) for number, one in enumerate(processes)]
            code = _waited(processes)
            for thread in threads:
                thread.join(TERM_SECONDS)  # what a process started may hold its output open
            return code
    except FileNotFoundError as error:
        raise ConfigError(f"There is no command `{command[0]}`.") from error
    finally:
        _send(processes, signal.SIGKILL)
        for one in processes:
            one.wait()


def _started(words: Sequence[str], port: int, num: int, process: int) -> "subprocess.Popen[bytes]":
    place = {COORDINATOR: f"127.0.0.1:{port}", NUM_PROCESSES: str(num), PROCESS_ID: str(process)}
    return subprocess.Popen(
        words,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **place},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # a terminal would send Ctrl-C too, and a second one acts at once
    )


def _waited(processes: "Sequence[subprocess.Popen[bytes]]") -> int:
    """The exit code of the first that failed, when all have ended; 0 if none failed."""
    first, since, is_told = 0, 0.0, False
    while any(one.poll() is None for one in processes):
        failed = [one.returncode for one in processes if one.poll()]
        if failed and not first:
            first, since = _shown(failed[0]), time.monotonic()
        waited = time.monotonic() - since
        if first and waited > END_SECONDS + TERM_SECONDS:
            return first  # the rest is killed
        if first and waited > END_SECONDS and not is_told:
            is_told = True
            _send(processes, signal.SIGTERM)
        time.sleep(LOOK_SECONDS)
    return first or max(_shown(one.returncode) for one in processes)


def _shown(code: int) -> int:
    return SIGNALED - code if code < 0 else code


@contextmanager
def _passed_on(processes: "Sequence[subprocess.Popen[bytes]]") -> Iterator[None]:
    """While this is entered, Ctrl-C and SIGTERM go to the processes, and end this one only with them."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, _: _send(processes, number)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _send(processes: "Sequence[subprocess.Popen[bytes]]", number: int) -> None:
    """To each process that lives, and to what it has started, as a terminal does."""
    for one in processes:
        if one.poll() is None:
            os.killpg(one.pid, number)


class _Printer(threading.Thread):
    """Prints what a process writes, line by line, with its number."""

    def __init__(self, number: int, out: IO[bytes] | None) -> None:
        super().__init__(daemon=True)
        self.number, self.out = number, out
        self.start()

    def run(self) -> None:
        if self.out is None:
            return
        with self.out:
            for line in self.out:
                sys.stdout.write(f"[{self.number}] {line.decode(errors='replace')}")
                sys.stdout.flush()


def _free_port() -> int:
    """One that was free a moment ago; another program may take it before process 0 does."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
