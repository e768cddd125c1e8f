"""The private names of jax that stepc uses, all in this file, each with a fallback or a clear error if jax moves it."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from contextvars import copy_context
from typing import Protocol, TypeVar, runtime_checkable

import jax
from jax.core import Tracer
from jax.extend import backend

from stepc.errors import ConfigError

try:
    from jax.interpreters.partial_eval import dce_jaxpr as dce_jaxpr
except ImportError:  # fallback: assume that every equation needs all of its inputs
    dce_jaxpr = None
try:
    from jax._src.core import trace_state_clean
except ImportError:  # fallback: only a state or a batch of tracers says that a transformation is running
    trace_state_clean = None
try:
    from jax._src import distributed, xla_bridge
except ImportError:  # error: `membership` says that this jax cannot train on several processes
    distributed = xla_bridge = None
try:
    from jax._src import compiler
except ImportError:  # fallback: a compilation is not recognised
    compiler = None
try:
    from jax._src import config as jax_config
    from jax._src.mesh import thread_resources
except ImportError:  # fallback: a thread has jax's global settings
    jax_config = thread_resources = None
try:
    from jaxlib._jax import make_gloo_tcp_collectives
except ImportError:  # error: `bind_cpu_collectives` says that this jax cannot choose an address
    make_gloo_tcp_collectives = None


@runtime_checkable
class Client(Protocol):
    """The key-value store that process 0 serves to all processes of a job. Whatever fails raises JaxRuntimeError."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None: ...

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str: ...

    def key_value_try_get(self, key: str) -> str: ...


def buffer_address(array: jax.Array) -> int:
    """Where the first shard of an array is in the memory of its device; a number of its own where jax does not tell."""
    try:
        return array.addressable_data(0).unsafe_buffer_pointer() if array.size else -id(array)
    except (AttributeError, NotImplementedError, RuntimeError):  # a typed key, a backend without addresses
        return -id(array)


def is_transforming(tree: object) -> bool:
    """Whether a `jit`, `vmap`, `grad` or the like is running, which would make tracers of what this tree gives."""
    if trace_state_clean is not None:
        return not trace_state_clean()
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


def is_compiling(thread: int) -> bool:
    """Whether a thread is inside a compilation of XLA: only its Python frames say so while it runs."""
    frame = sys._current_frames().get(thread)  # pyright: ignore[reportPrivateUsage] -- documented, despite its name
    while compiler is not None and frame is not None:
        if frame.f_code.co_filename == compiler.__file__:
            return True
        frame = frame.f_back
    return False


def membership() -> tuple[Client, int, int] | None:
    """The client, the index of this process and the number of processes; None before `init_distributed`.

    Errors: ConfigError if this jax keeps them elsewhere.
    """
    if distributed is None:
        raise _moved("jax._src.distributed", "several processes")
    state = distributed.global_state
    return None if state.client is None else (state.client, state.process_id, state.num_processes)


def backends_are_initialized() -> bool:
    """Whether jax has listed its devices; processes can no longer join then. False if this jax cannot tell."""
    return xla_bridge is not None and xla_bridge.backends_are_initialized()


def bind_cpu_collectives(host: str) -> None:
    """Let the CPU collectives listen on this address alone. jax has no option for it: by default it resolves a name.

    Errors: ConfigError if this jax makes them elsewhere.
    """
    joined = membership()
    if joined is None or xla_bridge is None or make_gloo_tcp_collectives is None:
        raise _moved("jaxlib._jax.make_gloo_tcp_collectives", "an address to listen on")
    client, make_client, make_gloo = joined[0], xla_bridge.make_cpu_client, make_gloo_tcp_collectives
    backend.register_backend_factory(
        "cpu",
        lambda: make_client(collectives=make_gloo(distributed_client=client, hostname=host)),
        priority=0,
        fail_quietly=False,
    )


T = TypeVar("T")


def in_this_context(act: Callable[[], T]) -> Callable[[], T]:
    """`act` for another thread, with the settings of this one: its context variables, and what jax keeps by thread.

    Why: inside of `with jax.enable_x64(True)` a thread of ours would make float32 of float64.
    """
    variables, settings = copy_context(), _settings_of_this_thread()

    def within() -> T:
        with settings():
            return act()

    return lambda: variables.run(within)


def _settings_of_this_thread() -> Callable[[], AbstractContextManager[object]]:
    """A context with what `jax.enable_x64(…)`, `jax.default_device(…)`, `with mesh:` and the like have set here."""
    resources = thread_resources
    if jax_config is None or resources is None:
        return nullcontext
    unset, stack = jax_config.config_ext.unset, list(resources.stack)
    states = {one: value for one in jax_config.config_states.values() if (value := one.get_local()) is not unset}
    others = [one for one in vars(jax_config).values() if type(one) is jax_config.config_ext.Config]
    values = {one: value for one in others if (value := one.get_local()) is not unset}

    def settings() -> AbstractContextManager[object]:
        entered = ExitStack()
        for state, value in states.items():
            entered.enter_context(state(value))
        for one, value in values.items():
            one.set_local(value)  # the thread is ours: it ends, and its settings with it
        resources.stack, resources.env = list(stack), stack[-1]
        return entered

    return settings


def _moved(name: str, purpose: str) -> ConfigError:
    return ConfigError(f"This jax has no `{name}`, which stepc needs for {purpose}; jax 0.10.2 has it.")
