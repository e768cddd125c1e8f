"""The private names of jax that stepc uses, all in this file, each with a fallback or a clear error if jax moves it."""

import sys
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar, copy_context
from functools import cache
from typing import Any, Protocol, TypeAlias, TypeVar, runtime_checkable

import jax
from jax.core import Tracer
from jax.extend import backend
from jax.extend.core import ClosedJaxpr, Primitive
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, get_abstract_mesh

from stepc.errors import ConfigError, ShardingError

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
    from jax._src import pjit, shard_map
except ImportError:  # fallback: a loss that passes its mesh to `shard_map` is refused, with the remedy
    pjit = shard_map = None
try:
    from jax.interpreters.mlir import register_lowering
except ImportError:  # fallback: a leaf that a step only writes reuses no buffer
    register_lowering = None
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


_FIRST = Primitive("first")  # of its operands
_FIRST.def_impl(lambda first, *_: first)
_FIRST.def_abstract_eval(lambda first, *_: first)
if register_lowering is not None:
    register_lowering(_FIRST, lambda _, first, *__: [first])


def first_of(first: jax.Array, *others: Any) -> jax.Array:  # Any: arrays
    """The first of them, by one operation of a program that reads them all and is compiled to nothing."""
    return first if register_lowering is None else _FIRST.bind(first, *others)


def is_transforming(tree: object) -> bool:
    """Whether a `jit`, `vmap`, `grad` or the like is running, which would make tracers of what this tree gives."""
    if trace_state_clean is not None:
        return not trace_state_clean()
    return has_tracers(tree)


def has_tracers(tree: object) -> bool:
    """Whether a leaf is what a transformed function is given in place of an array."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


def scan_counts(params: Any) -> tuple[int, int]:  # Any: those of an equation
    """How many of the inputs of a scan are constants, and how many it carries; it takes slices of the rest."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    constants, carried, _ = params["ft_in"].unpack()  # since jax 0.11
    return len(constants), len(carried)


# Any: the parameters of an operation
InlinedCall: TypeAlias = Callable[[ClosedJaxpr], tuple[Primitive, dict[str, Any]]]


def inlined_call(num_inputs: int) -> InlinedCall | None:
    """How the functions of `jax.numpy` run their programs: of a program with one result, a primitive and parameters.

    None if this jax runs them otherwise: operations are then not shared.
    """
    equation = jax.make_jaxpr(jax.jit(lambda *_: 0.0))(*[0.0] * num_inputs).eqns[0]
    if not {"jaxpr", "name", "inline"} <= equation.params.keys():
        return None
    inline = getattr(type(equation.params["inline"]), "JAX_EARLY", True)  # an enumeration since jax 0.11
    return lambda program: (equation.primitive, {**equation.params, "jaxpr": program, "inline": inline})


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


_MESH_OF_STEP: ContextVar[Mesh | None] = ContextVar("mesh_of_step", default=None)


@contextmanager
def as_mesh_of_step(mesh: Mesh) -> Generator[None]:
    """What a loss means by this mesh, while it is traced or run here: the mesh of the context, whatever its axis types.

    Why: a step is manual over the axes of its rows, and all its other axes are automatic. jax compares the mesh that a
      loss passes with that of the context, types included, and refuses it. Here it is known to be the same one.
    """
    if shard_map is not None and pjit is not None:
        _look_up_meshes()
    token = _MESH_OF_STEP.set(mesh)
    try:
        yield
    finally:
        _MESH_OF_STEP.reset(token)


def mesh_of_step() -> Mesh | None:
    """The mesh of the step that is traced or run here, if it has one."""
    return _MESH_OF_STEP.get()


@cache
def _look_up_meshes() -> None:
    """Let jax ask for the mesh of a step where it checks one. Outside of a step it gets its own answer."""
    for module, name, asking in ((shard_map, "_shmap_checks", _checked), (pjit, "_create_sharding_for_array", _made)):
        if name in vars(module):  # otherwise the fallback, as above
            setattr(module, name, asking(vars(module)[name]))


def _checked(check: Callable[..., Any]) -> Callable[..., Any]:  # Any, three times: of jax
    def asks_the_step(mesh: Any, *arguments: Any) -> Any:
        own = _MESH_OF_STEP.get()
        return check(mesh if own is None or mesh is None else _of_context(mesh, own, "shard_map"), *arguments)

    return asks_the_step


def _made(make: Callable[..., Any]) -> Callable[..., Any]:  # Any, four times: of jax
    def asks_the_step(mesh: Any, sharding: Any, name: str, asked_by: str) -> Any:
        own = _MESH_OF_STEP.get()
        if own is not None and asked_by == "with_sharding_constraint":
            if isinstance(sharding, NamedSharding) and _of_context(sharding.mesh, own, asked_by) is None:
                sharding = NamedSharding(own, sharding.spec, memory_kind=sharding.memory_kind)
            elif isinstance(sharding, PartitionSpec) and not get_abstract_mesh().manual_axes:
                sharding = NamedSharding(own, sharding)  # eagerly, an array may be on one device
        return make(mesh, sharding, name, asked_by)

    return asks_the_step


def _of_context(mesh: Mesh | AbstractMesh, own: Mesh, asked_by: str) -> Mesh | AbstractMesh | None:
    """The mesh if jax accepts it; None, which is the mesh of the context, if it is that of the step.

    Errors: ShardingError for any other mesh: a program has one.
    """
    if mesh.abstract_mesh == get_abstract_mesh():
        return mesh
    is_own = mesh.shape_tuple == own.shape_tuple
    if is_own and (isinstance(mesh, AbstractMesh) or mesh.devices.tolist() == own.devices.tolist()):
        return None
    raise ShardingError(
        f"The loss passes a mesh to `{asked_by}` that is not the mesh of the step.",
        facts=(("passed", _described(mesh)), ("of the step", _described(own))),
        suggestion="Give the loss the mesh that `compile` is given, or none: `jax.shard_map` takes that of the step by "
        "itself, and `jax.lax.with_sharding_constraint` takes `P(...)`.",
    )


def _described(mesh: Mesh | AbstractMesh) -> str:
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape_tuple)
    if isinstance(mesh, AbstractMesh):
        return axes
    ids = [device.id for device in mesh.devices.flat]
    return f"{axes}, of the devices {', '.join(map(str, ids[:8]))}{', ...' if len(ids) > 8 else ''}"


def _moved(name: str, purpose: str) -> ConfigError:
    return ConfigError(f"This jax has no `{name}`, which stepc needs for {purpose}; jax 0.10.2 has it.")
