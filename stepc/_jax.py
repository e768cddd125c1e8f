"""The names of jax that are not public, or that it may move: all that are used, each with what is done without it."""

from typing import Protocol, runtime_checkable

from jax.extend import backend

from stepc.errors import ConfigError

try:
    from jax.interpreters.partial_eval import dce_jaxpr as dce_jaxpr
except ImportError:  # moved: then every equation is taken to need all of its inputs
    dce_jaxpr = None
try:
    from jax._src import distributed, xla_bridge
except ImportError:  # moved: then this jax cannot train on many processes, and says so when it is asked to
    distributed = xla_bridge = None
try:
    from jaxlib._jax import make_gloo_tcp_collectives
except ImportError:  # moved: then the processes of one machine cannot be kept to it
    make_gloo_tcp_collectives = None


@runtime_checkable
class Client(Protocol):
    """The store of texts that all processes of a job see, kept by process 0. What fails raises JaxRuntimeError."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None: ...

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str: ...

    def key_value_try_get(self, key: str) -> str: ...


def membership() -> tuple[Client, int, int] | None:
    """The store, the number of this process and how many there are; None before the processes have found each other.

    Errors: ConfigError if this jax keeps them elsewhere.
    """
    if distributed is None:
        raise _moved("jax._src.distributed", "many processes")
    state = distributed.global_state
    return None if state.client is None else (state.client, state.process_id, state.num_processes)


def has_started() -> bool:
    """Whether jax has looked for its devices already: then processes can no longer join. False if it cannot be told."""
    return xla_bridge is not None and xla_bridge.backends_are_initialized()


def keep_on(host: str) -> None:
    """Let the collectives of CPUs listen on this address alone. jax has no option for it: by default it asks DNS.

    Errors: ConfigError if this jax makes them elsewhere.
    """
    joined = membership()
    if joined is None or xla_bridge is None or make_gloo_tcp_collectives is None:
        raise _moved("jaxlib._jax.make_gloo_tcp_collectives", "an address to listen on")
    client, make, gloo = joined[0], xla_bridge.make_cpu_client, make_gloo_tcp_collectives
    backend.register_backend_factory(
        "cpu",
        lambda: make(collectives=gloo(distributed_client=client, hostname=host)),
        priority=0,
        fail_quietly=False,
    )


def _moved(name: str, what: str) -> ConfigError:
    return ConfigError(f"This jax has no `{name}`, which stepc needs for {what}; jax 0.10.2 has it.")
