"""Which leaves of a state are in the memory of the host, and how a program moves them. It knows no specs."""

from typing import Any

import jax

from stepc._compiler.sharding import BoundRules
from stepc._compiler.validation import check_memory
from stepc._language.kinds import Params
from stepc._language.state import State, leaves_by_path, memory_of, path_of
from stepc.errors import ConfigError

Space = jax.memory.Space
HOST = "pinned_host"  # the one memory besides that of the device in which a program takes and returns arrays


def in_host_memory(shapes: State, params: Params, model_state: Any, rules: BoundRules) -> frozenset[str]:
    """The leaves of a fresh state that are in the memory of the host: those of the caller, and what is offloaded.

    Args:
      model_state: the model's own tree, as the caller gave it.
    Errors: ConfigError with every array in a memory that no program takes.
    """
    given = leaves_by_path(State(params, (), (), (), model_state))
    check_memory({path: kind for path, leaf in given if (kind := memory_of(leaf))}, HOST)
    offloaded = leaves_by_path(shapes.opt_state) if rules.layout.offload == "optimizer" else []
    return frozenset(
        [path for path, leaf in given if memory_of(leaf)]
        + ["/".join(filter(None, ("opt_state", path))) for path, leaf in offloaded if leaf.ndim]
    )


def with_memory(shardings: Any, host: frozenset[str]) -> Any:  # Any, twice: a state of shardings
    """The shardings, in the memory of the host for these paths. Errors: ConfigError if the devices have no such memory.

    jax drops a kind of memory that a device does not describe, such as those of a GPU topology (0.10.2).
    """

    def placed(keys: Any, sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:  # Any: as in path_of
        moved = sharding.with_memory_kind(HOST) if path_of(keys) in host else sharding
        if path_of(keys) in host and moved.memory_kind != HOST:
            device = next(iter(sharding.device_set)).device_kind
            what = f"`{path_of(keys)}` is to be in the memory {HOST!r}, which the devices of the mesh do not describe."
            raise ConfigError(what, facts=(("device", device),), suggestion="Leave out `offload` for these devices.")
        return moved

    return jax.tree_util.tree_map_with_path(placed, shardings) if host else shardings


def is_on_host(leaf: jax.Array) -> bool:
    """Whether a leaf of a program is in the memory of the host."""
    return jax.typeof(leaf).memory_space == Space.Host


def to_device(tree: Any) -> Any:  # Any, twice: a tree of a program
    """The tree in the memory of the device."""
    return jax.tree.map(lambda leaf: jax.device_put(leaf, Space.Device) if is_on_host(leaf) else leaf, tree)


def to_memory(state: State, host: frozenset[str]) -> State:
    """The state, with the leaves of these paths in the memory of the host."""
    if not host:
        return state
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: jax.device_put(leaf, Space.Host) if path_of(keys) in host else leaf, state
    )


def to_memory_of(new: Any, moved: Any, given: Any) -> Any:  # Any: trees of one structure
    """Each leaf in the memory in which the program was given it. What was only moved to the device is not moved back.

    Args:
      moved: what `to_device` made of `given`.
    """

    def back(new: jax.Array, moved: jax.Array, given: jax.Array) -> jax.Array:
        return new if moved is given else given if new is moved else jax.device_put(new, Space.Host)

    return jax.tree.map(back, new, moved, given)
