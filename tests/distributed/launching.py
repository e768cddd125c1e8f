"""Start the processes of a job on 127.0.0.1, and leave none behind."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from forks import Forked, forks_of
from xla_flags import FAST_COMPILES

TESTS = Path(__file__).parent.parent
TWO_DEVICES = "--xla_force_host_platform_device_count=2"
LIMIT_SECONDS = 300.0  # ten times what a test takes on an idle machine: one that takes longer hangs


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Job:
    """The processes of a job, and what each of them wrote."""

    def __init__(self, folder: Path, processes: list[Forked]) -> None:
        self.folder, self.processes = folder, processes

    def wait(self, seconds: float = LIMIT_SECONDS) -> list[int]:
        """The exit codes, when all have ended. Errors: AssertionError if one hangs."""
        until = time.monotonic() + seconds
        while any(one.poll() is None for one in self.processes):
            codes = [one.returncode for one in self.processes]
            assert time.monotonic() < until, (codes, [self.said(number) for number in range(len(codes))])
            time.sleep(0.01)
        return [one.returncode for one in self.processes]

    def wait_for(self, process: int, seconds: float = LIMIT_SECONDS) -> None:
        """Wait until one process has ended, whatever the others do. Errors: TimeoutExpired if it hangs."""
        self.processes[process].wait(seconds)

    def said(self, process: int) -> str:
        return (self.folder / f"{process}.out").read_text()

    def found(self, process: int) -> dict[str, Any]:
        return json.loads((self.folder / f"{process}.json").read_text())


def by_stepc(port: int, num: int, process: int) -> dict[str, str]:
    """The environment that `stepc launch` sets."""
    place = {"COORDINATOR": f"127.0.0.1:{port}", "NUM_PROCESSES": str(num), "PROCESS_ID": str(process)}
    return {f"STEPC_{name}": value for name, value in place.items()}


def by_slurm(port: int, num: int, process: int) -> dict[str, str]:
    """The environment that srun sets. jax would choose the port itself, so it is given a free one."""
    place = {"JOB_ID": "1", "STEP_NODELIST": "localhost", "NTASKS": str(num), "STEP_NUM_NODES": "1"}
    place |= {"PROCID": str(process), "LOCALID": str(process)}
    return {f"SLURM_{name}": value for name, value in place.items()} | _on_loopback(port)


def by_open_mpi(port: int, num: int, process: int) -> dict[str, str]:
    """The environment that mpirun sets."""
    place = {"SIZE": str(num), "RANK": str(process), "LOCAL_RANK": str(process)}
    mine = {f"OMPI_COMM_WORLD_{name}": value for name, value in place.items()}
    return {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911", **mine, **_on_loopback(port)}


def _on_loopback(port: int) -> dict[str, str]:
    return {"JAX_COORDINATOR_PORT": str(port), "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}"}


Place: TypeAlias = Callable[[int, int, int], dict[str, str]]


@contextmanager
def started(case: str, folder: Path, *, num: int = 2, place: Place = by_stepc, **told: object) -> Iterator[Job]:
    """A job of `distributed.job`; what is left of it at the end is killed."""
    folder.mkdir(exist_ok=True)
    port, job = free_port(), Job(folder, [])
    words = [f"{name}={value}" for name, value in told.items()]
    try:
        for process in range(num):
            here = {"XLA_FLAGS": f"{FAST_COMPILES} {TWO_DEVICES}", **place(port, num, process)}
            arguments = [case, str(folder), *words]
            job.processes.append(forks_of("distributed.job").start(arguments, here, folder / f"{process}.out"))
        yield job
    finally:
        for one in job.processes:
            if one.poll() is None:
                one.kill()
            one.wait()


def alone(case: str, folder: Path, *, devices: int, **told: object) -> dict[str, Any]:
    """The same in one process, with as many devices."""
    folder.mkdir(exist_ok=True)
    words = [f"{name}={value}" for name, value in told.items()]
    flags = {"XLA_FLAGS": f"{FAST_COMPILES} --xla_force_host_platform_device_count={devices}"}
    out = folder / "alone.out"
    process = forks_of("distributed.job").start([case, str(folder), *words], flags, out)
    assert process.wait(LIMIT_SECONDS) == 0, out.read_text()
    return json.loads((folder / "0.json").read_text())
