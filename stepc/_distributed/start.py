"""How the processes of a job find each other."""

import logging
import os
import threading
from collections.abc import Mapping

import jax

from stepc import _jax
from stepc._distributed.coordination import listen
from stepc.errors import ConfigError

_LOG = logging.getLogger("stepc")
# What `stepc launch` tells each process that it starts.
COORDINATOR, NUM_PROCESSES, PROCESS_ID = "STEPC_COORDINATOR", "STEPC_NUM_PROCESSES", "STEPC_PROCESS_ID"
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def init_distributed(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    listen_on: str | None = None,
    heartbeat_seconds: int = 30,
    shutdown_seconds: int = 30,
    start_seconds: int = 300,
) -> None:
    """Join the other processes of the job, before anything else uses jax.

    Meaning: afterwards `jax.devices()` are those of all processes, and a mesh over them makes one program of all.
    Why: a job of many hosts. In a job of `stepc launch`, SLURM, Open MPI, Kubernetes or Cloud TPU nothing need be
      given: `jax.distributed.initialize` finds out.

    Args:
      coordinator: "host:port" of process 0, where it listens for the others. On 127.0.0.1 all stays on this machine.
      num_processes: how many there are; the same on each.
      process_id: which this one is, counted from 0.
      listen_on: the address of this machine to listen on; by default all, or 127.0.0.1 if the coordinator is there.
      heartbeat_seconds: after how long a silent process counts as dead; jax ends all others then.
      shutdown_seconds: how long a process that ends waits for the others to end.
      start_seconds: how long it waits for the others to come.
    Errors: ConfigError if it is called twice, after jax has looked for its devices, with numbers that cannot be, or
      if nothing says where the others are. If the others do not come, or process 0 counts otherwise, jax ends the
      process by SIGABRT; the log says so before.
    From here on an exception that ends one process ends all, within two seconds and with its text on each. jax's own
    wait for SIGTERM (`reached_preemption_sync_point`) is switched off: `run` takes SIGTERM itself, between steps, on
    all processes at once; outside of `run` it ends the process, as it does without jax.
    """
    seconds = {"heartbeat_seconds": heartbeat_seconds, "shutdown_seconds": shutdown_seconds}
    _check(coordinator, num_processes, process_id, {**seconds, "start_seconds": start_seconds})
    if jax.distributed.is_initialized():
        raise ConfigError("The processes have found each other already: `init_distributed` is called once.")
    if _jax.has_started():
        raise ConfigError(
            "jax has looked for its devices already, those of this process alone.",
            suggestion="Call `init_distributed` before anything that computes or asks for devices.",
        )
    if coordinator is None and COORDINATOR in os.environ:
        coordinator, num_processes, process_id = _launched(os.environ)
    host, port = (None, None) if coordinator is None else coordinator.rsplit(":", 1)
    listen_on = listen_on or ("127.0.0.1" if host in LOOPBACK else None)
    jax.config.update("jax_enable_preemption_service", False)
    waiting = _told_before_the_end(start_seconds, f"{coordinator}, process {process_id} of {num_processes}")
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            coordinator_bind_address=None if listen_on is None or port is None else f"{listen_on}:{port}",
            heartbeat_timeout_seconds=heartbeat_seconds,
            shutdown_timeout_seconds=shutdown_seconds,
            initialization_timeout=start_seconds,
        )
    except (ValueError, RuntimeError) as error:  # jax: nothing was found out, or the others did not come
        raise _refused(error, coordinator, num_processes, process_id) from error
    finally:
        waiting.cancel()
    if listen_on is not None:
        _jax.keep_on(listen_on)
    listen()


def _told_before_the_end(seconds: int, where: str) -> threading.Timer:
    """Says what may be wrong just before jax gives up: it does so by SIGABRT, and no exception comes."""
    text = "the other processes did not come for %d s (%s): either one did not start, or their numbers do not fit"
    timer = threading.Timer(seconds * 0.9, _LOG.error, (text, seconds, where))
    timer.daemon = True
    timer.start()
    return timer


def is_launched() -> bool:
    """Whether `stepc launch` started this process."""
    return COORDINATOR in os.environ


def _launched(told: Mapping[str, str]) -> tuple[str, int, int]:
    return told[COORDINATOR], int(told[NUM_PROCESSES]), int(told[PROCESS_ID])


def _check(coordinator: object, num: object, me: object, seconds: Mapping[str, object]) -> None:
    faults: list[tuple[str, str, object]] = []
    if coordinator is not None and not (
        isinstance(coordinator, str) and coordinator.rpartition(":")[0] and coordinator.rpartition(":")[2].isdecimal()
    ):
        faults.append(("coordinator", 'a host and a port, such as "10.0.0.1:1234"', coordinator))
    if num is not None and not _is_whole(num, 1):
        faults.append(("num_processes", "a positive integer", num))
    if me is not None and not _is_whole(me, 0):
        faults.append(("process_id", "an integer from 0", me))
    elif isinstance(num, int) and isinstance(me, int) and _is_whole(num, 1) and me >= num:
        faults.append(("process_id", f"less than num_processes, which is {num}", me))
    faults += [(name, "a positive integer", value) for name, value in seconds.items() if not _is_whole(value, 1)]
    if faults:
        facts = [(name, f"expected {expected}, got {got!r}") for name, expected, got in faults]
        raise ConfigError("The processes cannot find each other so.", facts=facts)


def _is_whole(value: object, least: int) -> bool:
    return type(value) is int and value >= least


def _refused(error: Exception, coordinator: str | None, num: int | None, me: int | None) -> ConfigError:
    given = {"coordinator": coordinator, "num_processes": num, "process_id": me}
    facts = [(name, "to be found out" if value is None else str(value)) for name, value in given.items()]
    facts.append(("jax says", f"{type(error).__name__}: {error}".partition("\n")[0]))
    missing = [name for name, value in given.items() if value is None]
    remedy = f"Either give {', '.join(missing)}, or start the job by `stepc launch`, SLURM, Open MPI or Kubernetes."
    return ConfigError("The processes did not find each other.", facts=facts, suggestion=remedy if missing else None)
