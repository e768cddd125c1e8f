"""How the processes of a job find each other: `init_distributed`."""

import logging
import os
import threading
from collections.abc import Mapping

import jax

from stepc import _jax
from stepc._distributed.coordination import listen
from stepc.errors import ConfigError, first_line

_LOG = logging.getLogger("stepc")
# The environment that `stepc launch` gives each process.
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
    """Join the other processes of the job; call this before anything else uses jax.

    Meaning: afterwards `jax.devices()` lists the devices of all processes, and a mesh may span them.
    Why: to train on several hosts. Under `stepc launch`, SLURM, Open MPI, Kubernetes or Cloud TPU it needs no
      arguments: `stepc launch` sets the environment, and `jax.distributed.initialize` detects the others.

    Args:
      coordinator: "host:port" where process 0 listens for the others. With 127.0.0.1 all traffic stays on this machine.
      num_processes: the number of processes; the same on each.
      process_id: the index of this process, counted from 0.
      listen_on: the address of this machine to listen on. By default all of its addresses, or 127.0.0.1 if the
        coordinator is there.
      heartbeat_seconds: a process that is silent for this long counts as dead; jax then ends all others.
      shutdown_seconds: how long a process that ends waits for the others to end.
      start_seconds: how long to wait for the others to start.
    Errors: ConfigError for invalid arguments, for a second call, for a call after jax has listed its devices, and if
      neither the arguments nor the environment say where the others are. If the others do not start in time, or
      process 0 expects another number of them, jax ends the process by SIGABRT; the log says so just before.
    From here on an exception that ends one process ends all of them within two seconds, and each shows its text.
    jax's own handling of SIGTERM (`reached_preemption_sync_point`) is switched off: `run` handles SIGTERM between
    steps, at the same step on all processes; outside `run`, SIGTERM ends the process as it does without jax.
    """
    seconds = {
        "heartbeat_seconds": heartbeat_seconds,
        "shutdown_seconds": shutdown_seconds,
        "start_seconds": start_seconds,
    }
    _check_arguments(coordinator, num_processes, process_id, seconds)
    if jax.distributed.is_initialized():
        raise ConfigError("`init_distributed` was already called: call it once per process.")
    if _jax.backends_are_initialized():
        raise ConfigError(
            "jax has already listed its devices, those of this process alone.",
            suggestion="Call `init_distributed` before anything that computes or asks for devices.",
        )
    if coordinator is None and is_launched():
        coordinator = os.environ[COORDINATOR]
        num_processes, process_id = int(os.environ[NUM_PROCESSES]), int(os.environ[PROCESS_ID])
    host, port = (None, None) if coordinator is None else coordinator.rsplit(":", 1)
    listen_on = listen_on or ("127.0.0.1" if host in LOOPBACK else None)
    jax.config.update("jax_enable_preemption_service", False)
    # jax gives up by SIGABRT, not by an exception: what may be wrong must be in the log before.
    warning = threading.Timer(
        start_seconds * 0.9,
        _LOG.error,
        (
            "the other processes did not start within %d s (%s, process %s of %s): "
            "either one was not started, or their process_id or num_processes do not match",
            start_seconds,
            coordinator,
            process_id,
            num_processes,
        ),
    )
    warning.daemon = True
    warning.start()
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
    except (ValueError, RuntimeError) as error:  # jax detected no cluster, or could not connect
        raise _connection_error(error, coordinator, num_processes, process_id) from error
    finally:
        warning.cancel()
    if listen_on is not None:
        _jax.bind_cpu_collectives(listen_on)
    listen()


def is_launched() -> bool:
    """Whether `stepc launch` started this process."""
    return COORDINATOR in os.environ


def _check_arguments(coordinator: object, num: object, index: object, seconds: Mapping[str, object]) -> None:
    faults: list[tuple[str, str, object]] = []
    if coordinator is not None and not (
        isinstance(coordinator, str) and coordinator.rpartition(":")[0] and coordinator.rpartition(":")[2].isdecimal()
    ):
        faults.append(("coordinator", 'a host and a port, such as "10.0.0.1:1234"', coordinator))
    if num is not None and not _is_int_from(1, num):
        faults.append(("num_processes", "a positive integer", num))
    if index is not None and not _is_int_from(0, index):
        faults.append(("process_id", "an integer from 0", index))
    elif isinstance(num, int) and isinstance(index, int) and _is_int_from(1, num) and index >= num:
        faults.append(("process_id", f"less than num_processes={num}", index))
    faults += [(name, "a positive integer", value) for name, value in seconds.items() if not _is_int_from(1, value)]
    if faults:
        facts = [(name, f"expected {expected}, got {got!r}") for name, expected, got in faults]
        raise ConfigError("Invalid arguments to `init_distributed`.", facts=facts)


def _is_int_from(least: int, value: object) -> bool:
    return type(value) is int and value >= least


def _connection_error(error: Exception, coordinator: str | None, num: int | None, index: int | None) -> ConfigError:
    given = {"coordinator": coordinator, "num_processes": num, "process_id": index}
    facts = [(name, "not given" if value is None else str(value)) for name, value in given.items()]
    facts.append(("jax says", first_line(error)))
    missing = [name for name, value in given.items() if value is None]
    remedy = f"Either give {', '.join(missing)}, or start the job by `stepc launch`, SLURM, Open MPI or Kubernetes."
    return ConfigError("The processes did not find each other.", facts=facts, suggestion=remedy if missing else None)
