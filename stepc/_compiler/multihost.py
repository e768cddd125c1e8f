"""What a step does differently when its mesh lies on several processes: arrays from parts, and agreement first."""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from stepc._compiler.validation import check_batch
from stepc._core.nodes import Program
from stepc._distributed.coordination import ADDRESS, key_value_store, poll
from stepc._language.kinds import Batch, Params
from stepc._language.state import leaves_by_path
from stepc.errors import BatchError, ConfigError

MOST_LINES, SHOWN = 5000, 200  # of a program, of a line
NOT_JOINED = "The mesh lies on {} processes, and they have not found each other."


@dataclass(frozen=True)
class RowSharding:
    """How the rows of a batch lie.

    Args:
      axes: the mesh axes that they lie along.
      place: which dimension of a leaf they are.
      lying: of a batch's shapes, how each leaf lies.
    """

    mesh: Mesh
    axes: tuple[str, ...]
    place: int
    lying: Callable[[Batch], Any]  # Any: a tree of NamedSharding


@cache
def mesh_processes(mesh: Mesh | None) -> tuple[int, ...]:
    """The processes that a mesh lies on, if there are several."""
    found = () if mesh is None else tuple(sorted({device.process_index for device in mesh.devices.flat}))
    return found if len(found) > 1 else ()


def check_same(topic: str, mine: Mapping[str, str], among: tuple[int, ...]) -> None:
    """Refuse what is not the same on all processes, on all of them, before anything is computed together.

    Errors: ConfigError with both sides; PeerError if one does not come.
    """
    found = key_value_store()
    if found is None:
        raise ConfigError(NOT_JOINED.format(len(among)), suggestion="Call `sc.init_distributed()` first.")
    if facts := found.differences(topic, mine, among=among):
        raise ConfigError(f"The processes do not agree on the {topic}.", facts=facts)


def check_start(step: str, mesh: Mesh | None, params: Params, seed: Any, model_state: Any) -> None:  # Any: as in `init`
    """Let the processes of a mesh compare what a state is made of. Errors: as `check_same`."""
    if among := mesh_processes(mesh):
        drawn = {"seed": repr(seed)} if isinstance(seed, int) else tree_digest({"seed": seed})
        trees = tree_digest({"params": params}) | tree_digest({"model_state": model_state})
        check_same("pipeline and parameters", {"pipeline": step, **drawn, **trees}, among)


def check_program(program: Any, seen: set[str], state: Any, batch: Batch, mesh: Mesh | None) -> None:
    """Let the processes of a mesh compare their programs for a form of batch, once, before it runs.

    Args:
      program: jitted; what is traced here is not traced again by its call.
      seen: the forms that were compared.
    Why: a number that a loss or an optimizer closes over stands in no pipeline's text.
    Errors: as `check_same`.
    """
    among = mesh_processes(mesh)
    if not among or (form := repr(jax.tree.map(jnp.shape, batch))) in seen:
        return
    seen.add(form)
    lines = ADDRESS.sub("", str(program.trace(state, batch).jaxpr)).splitlines()
    digest = zlib.crc32("".join(lines).encode())
    if (poll((digest >> 1,), among) != digest >> 1).any():
        told = {f"line {number}": line.strip()[:SHOWN] for number, line in enumerate(lines[:MOST_LINES], start=1)}
        check_same("program", told, among)
        check_same("program", {"crc32": f"{digest:08x}"}, among)


def tree_digest(tree: Any) -> dict[str, str]:  # Any: a tree of arrays
    """Each leaf in a line, with a CRC-32 of its bytes where this process has all of them."""
    return {path or "the leaf": _line(leaf) for path, leaf in leaves_by_path(tree)}


def _line(leaf: Any) -> str:  # Any: an array, or a number
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return f"{leaf.dtype}{list(leaf.shape)}"
    host = np.asarray(_bare(leaf))
    return f"{host.dtype}{list(host.shape)} crc32 {zlib.crc32(host.tobytes()):08x}"


def global_batch(batch: Batch, rows: RowSharding, program: Program) -> Batch:
    """One batch of all processes, from the rows that each has; leaves that are one already stay.

    Errors: BatchError if the rows of all do not divide as the pipeline asks.
    """
    total, here = _parts(rows.mesh, rows.axes)
    shapes = jax.tree.map(lambda leaf: _shape(leaf, rows.place, total, here), batch)
    check_batch(shapes, program)
    return jax.tree.map(lambda leaf, shape, lying: _whole(leaf, shape, lying, rows), batch, shapes, rows.lying(shapes))


def checked_global_batch(batch: Batch, rows: RowSharding, program: Program) -> Batch:
    """`whole`, once all processes have shown that their rows fit together.

    Errors: BatchError on all of them if the rows differ: jax would make a different array on each, without a transform.
    """
    among = mesh_processes(rows.mesh)
    try:
        made, fault = global_batch(batch, rows, program), None
    except BatchError as error:
        made, fault = batch, error
    forms = {path or "the batch": f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves_by_path(batch)}
    seen = poll((zlib.crc32(repr(forms).encode()) >> 1, int(fault is not None)), among)
    if (seen[:, 0] != seen[0, 0]).any():
        check_batch_signatures(forms, among)
    if fault is not None:
        raise fault
    return made


def check_batch_signatures(forms: Mapping[str, str], among: tuple[int, ...]) -> None:
    """Refuse rows that do not fit together. Errors: BatchError on all, with both sides."""
    found = key_value_store()
    if found is not None and (facts := found.differences("batch", forms, among=among)):
        raise BatchError("The processes do not have rows that fit together.", facts=facts)


@cache
def _parts(mesh: Mesh, names: tuple[str, ...]) -> tuple[int, int]:
    numbers = [mesh.axis_names.index(name) for name in names]
    mine = [place for place, device in np.ndenumerate(mesh.devices) if device.process_index == jax.process_index()]
    return prod(mesh.shape[name] for name in names), len({tuple(place[n] for n in numbers) for place in mine})


def _shape(leaf: Any, axis: int, total: int, here: int) -> Any:  # Any: an array, or what is to be refused
    is_local = isinstance(leaf, np.ndarray) or isinstance(leaf, jax.Array) and leaf.is_fully_addressable
    if not is_local or leaf.ndim <= axis:
        return leaf
    sizes = list(leaf.shape)
    sizes[axis] = sizes[axis] * total // here
    return jax.ShapeDtypeStruct(tuple(sizes), leaf.dtype)


def _whole(leaf: Any, shape: Any, lying: NamedSharding, rows: RowSharding) -> jax.Array:  # Any: arrays, or their shapes
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return leaf if leaf.sharding == lying else jax.device_put(leaf, lying)
    bare = _bare(leaf)
    host = np.asarray(bare, jax.dtypes.canonicalize_dtype(bare.dtype))
    is_split = len(lying.spec) > rows.place and lying.spec[rows.place] is not None
    sizes = shape.shape if is_split else leaf.shape
    # A typed key is several numbers. Along every other dimension each process has the whole of it.
    made = jax.make_array_from_process_local_data(lying, host, (*sizes, *host.shape[leaf.ndim :]))
    return jax.random.wrap_key_data(made, impl=jax.random.key_impl(leaf)) if bare is not leaf else made


def _bare(leaf: Any) -> Any:  # Any: an array; of a typed key, its numbers
    is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf
