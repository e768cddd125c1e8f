"""What a step needs when its mesh spans several processes: agreement before it runs, global arrays from local rows.

`jax.experimental.multihost_utils` does not replace the agreement, as the tests of fault 76 show (test_together.py):
with `assert_equal` each process gets a different text, without both sides, so "start that differs" and "program that
differs is refused on both" fail; with `process_allgather` uneven rows abort a process (gloo: "data size doesn't match")
instead of being "refused on both"; `broadcast_one_to_all` hides a difference instead of naming it. None of them has a
timeout, or works for a mesh on some of the processes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from stepc._compiler.validation import check_batch
from stepc._core.nodes import Program
from stepc._distributed.coordination import ADDRESS, key_value_store, poll, poll_digest
from stepc._language.kinds import Batch, Params
from stepc._language.state import describe_leaf, key_data, leaf_crc32, leaves_by_path, with_key_type
from stepc.errors import BatchError, ConfigError

MAX_LINES, MAX_COLUMNS = 5000, 200  # of a program, when it is compared line by line


@cache
def mesh_processes(mesh: Mesh | None) -> tuple[int, ...]:
    """The processes that a mesh spans, if there are several."""
    processes = () if mesh is None else tuple(sorted({device.process_index for device in mesh.devices.flat}))
    return processes if len(processes) > 1 else ()


def check_start(step: str, mesh: Mesh | None, params: Params, seed: Any, model_state: Any) -> None:  # Any: as in `init`
    """Let the processes of a mesh compare what a state is made of. Errors: as `check_same`."""
    if among := mesh_processes(mesh):
        seeds = {"seed": repr(seed)} if isinstance(seed, int) else tree_digest({"seed": seed})
        trees = tree_digest({"params": params}) | tree_digest({"model_state": model_state})
        check_same("pipeline and parameters", {"pipeline": step, **seeds, **trees}, among)


def check_program(program: Any, compared: set[str], state: Any, batch: Batch, mesh: Mesh | None) -> None:
    """Let the processes of a mesh compare their programs, once for each signature of a batch, before they run.

    Args:
      program: a jitted function, Any as jax types it; its call reuses the trace that is made here.
      compared: the signatures that were compared; this one is added.
      state: of the step; Any: it is traced, not read.
    Why: a number that a loss or an optimizer closes over is not in the text of the pipeline.
    Errors: as `check_same`.
    """
    among = mesh_processes(mesh)
    if not among or (signature := repr(jax.tree.map(np.shape, batch))) in compared:
        return
    compared.add(signature)
    lines = ADDRESS.sub("", str(program.trace(state, batch).jaxpr)).splitlines()
    digest = poll_digest("".join(lines))
    if (poll((digest,), among) != digest).any():
        shown = {f"line {number}": line.strip()[:MAX_COLUMNS] for number, line in enumerate(lines[:MAX_LINES], start=1)}
        check_same("program", shown, among)
        check_same("program", {"digest": f"{digest:08x}"}, among)  # it differs in what is not shown


def check_same(topic: str, mine: Mapping[str, str], among: tuple[int, ...]) -> None:
    """Refuse what differs between processes, on all of them, before they compute anything together.

    Errors: ConfigError with both sides; PeerError if a process does not come to compare.
    """
    store = key_value_store()
    if store is None:
        what = f"The mesh spans {len(among)} processes, but they are not connected."
        raise ConfigError(what, suggestion="Call `sc.init_distributed()` first.")
    if facts := store.differences(topic, mine, among=among):
        raise ConfigError(f"The processes do not agree on the {topic}.", facts=facts)


def tree_digest(tree: Any) -> dict[str, str]:  # Any: a tree of arrays and numbers
    """Each leaf by path: its dtype and shape, and the CRC-32 of its bytes if this process holds them all."""

    def digest(leaf: Any) -> str:  # Any: an array, or a number
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return describe_leaf(leaf)
        host = np.asarray(key_data(leaf) if isinstance(leaf, jax.Array) else leaf)
        return f"{describe_leaf(host)} crc32 {leaf_crc32(host):08x}"

    return {path or "the leaf": digest(leaf) for path, leaf in leaves_by_path(tree)}


@dataclass(frozen=True)
class RowSharding:
    """How the rows of a batch are sharded.

    Args:
      axes: the mesh axes that they are sharded over.
      dimension: of a leaf that counts the rows.
      shardings: for the shapes of a batch, the sharding of each leaf.
    """

    mesh: Mesh
    axes: tuple[str, ...]
    dimension: int
    shardings: Callable[[Batch], Any]  # Any: a tree of NamedSharding


def checked_global_batch(batch: Batch, rows: RowSharding, program: Program) -> Batch:
    """As `global_batch`, after all processes have agreed that their rows fit together.

    Errors: BatchError on all of them if the rows differ; jax would silently make a different array on each.
    """
    among = mesh_processes(rows.mesh)
    try:
        made, fault = global_batch(batch, rows, program), None
    except BatchError as error:
        made, fault = batch, error
    leaves = {path or "the batch": describe_leaf(leaf) for path, leaf in leaves_by_path(batch)}
    polled = poll((poll_digest(repr(leaves)), int(fault is not None)), among)
    if (polled[:, 0] != polled[0, 0]).any():
        store = key_value_store()
        if store is not None and (facts := store.differences("batch", leaves, among=among)):
            raise BatchError("The batches of the processes have different signatures.", facts=facts)
    if fault is not None:
        raise fault
    return made


def global_batch(batch: Batch, rows: RowSharding, program: Program) -> Batch:
    """One batch from the rows that each process has. Leaves that span the processes already are kept.

    Errors: BatchError if the rows of all processes together do not divide as the pipeline requires.
    """
    num_shards, num_local = _row_shards(rows.mesh, rows.axes)

    def global_shape(leaf: Any) -> Any:  # Any: an array, or what is to be refused
        is_local = isinstance(leaf, np.ndarray) or isinstance(leaf, jax.Array) and leaf.is_fully_addressable
        if not is_local or leaf.ndim <= rows.dimension:
            return leaf
        sizes = list(leaf.shape)
        sizes[rows.dimension] = sizes[rows.dimension] * num_shards // num_local
        return jax.ShapeDtypeStruct(tuple(sizes), leaf.dtype)

    def global_leaf(leaf: Any, shape: Any, sharding: NamedSharding) -> jax.Array:  # Any: arrays, or their shapes
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return leaf if leaf.sharding == sharding else jax.device_put(leaf, sharding)
        data = key_data(leaf)
        host = np.asarray(data, jax.dtypes.canonicalize_dtype(data.dtype))
        is_sharded = len(sharding.spec) > rows.dimension and sharding.spec[rows.dimension] is not None
        sizes = shape.shape if is_sharded else leaf.shape  # along every other dimension each process has all of it
        sizes = (*sizes, *host.shape[leaf.ndim :])  # a typed key is several numbers
        return with_key_type(jax.make_array_from_process_local_data(sharding, host, sizes), leaf)

    shapes = jax.tree.map(global_shape, batch)
    check_batch(shapes, program)
    return jax.tree.map(global_leaf, batch, shapes, rows.shardings(shapes))


@cache
def _row_shards(mesh: Mesh, axes: tuple[str, ...]) -> tuple[int, int]:
    """How many shards the rows have, and how many of them this process has."""
    dims = [mesh.axis_names.index(axis) for axis in axes]
    local = [at for at, device in np.ndenumerate(mesh.devices) if device.process_index == jax.process_index()]
    return prod(mesh.shape[axis] for axis in axes), len({tuple(at[dim] for dim in dims) for at in local})
