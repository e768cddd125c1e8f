"""Which devices talk to each other in a collective, and along which mesh axes that lies."""

import re
from collections.abc import Iterable

import jax
import numpy as np

from stepc.inspect.hlo import Instruction, Module

_EXPLICIT = re.compile(r"replica_groups=\{(\s*\{[\d,\s{}]*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:,\s*device_ids=\(([^{]*)\))?\s*\{([^}]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{([\d,\s{}]*)\}")
_AXIS = re.compile(r"'?([\w.\-]+)'?=(\d+)")
_AXIS_REFERENCE = re.compile(r"'?([\w.\-]+)'?(?::\((\d+)\)(\d+))?")


def groups(module: Module, instruction: Instruction) -> tuple[tuple[int, ...], ...]:
    """List the devices that exchange values, as positions in the program's device order.

    Meaning: `replica_groups` in any of its spellings; a permute has one group per pair that it joins.
    Why: XLA writes the same groups in four ways.

    Args:
      module: the program, which says how many devices there are; `replica_groups={}` means all of them.
      instruction: a collective.
    Errors: ValueError if `replica_groups` is spelled in a way that is not known here.
    The numbers are read as partition numbers, which is what they are in every program of one replica.
    Source: XLA, replica_group.cc and mesh_and_axis.cc, https://github.com/openxla/xla.
    """
    attributes = instruction.attributes
    if pairs := _PAIRS.search(attributes):
        return _listed(pairs[1])
    if explicit := _EXPLICIT.search(attributes):
        return _listed(explicit[1])
    if iota := _IOTA.search(attributes):
        return _rows(_iota(iota[2]).reshape(_sizes(iota[1])))
    if mesh := _MESH.search(attributes):
        return _mesh_groups(mesh[1], mesh[2], mesh[3])
    if "replica_groups=" in attributes and not re.search(r"replica_groups=\{\s*\}", attributes):
        raise ValueError(f"`{instruction.name}` has replica groups of an unknown form: {attributes[:200]}")
    return (tuple(range(module.num_devices)),)


def axes_of(grouped: tuple[tuple[int, ...], ...], mesh: jax.sharding.Mesh) -> tuple[str, ...]:
    """Name the mesh axes whose coordinate differs between two members of some group."""
    largest = max((member for group in grouped for member in group), default=0)
    if largest >= mesh.size:
        raise ValueError(f"The program uses device {largest}; the mesh has {mesh.size} devices, from 0.")
    # The numbers are positions in `mesh.devices.flat`, not device ids: on a mesh of reversed or permuted
    # devices, jax 0.10.2 prints the same groups as on the mesh in order (tests/inspect/test_collectives.py).
    varies = [False] * len(mesh.axis_names)
    for group in grouped:
        coordinates = np.unravel_index(np.asarray(group, dtype=np.int64), mesh.devices.shape)
        varies = [old or np.unique(new).size > 1 for old, new in zip(varies, coordinates, strict=True)]
    return tuple(name for name, varied in zip(mesh.axis_names, varies, strict=True) if varied)


def _listed(text: str) -> tuple[tuple[int, ...], ...]:
    """`{0,2},{1,3}`"""
    return tuple(_sizes(group) for group in re.findall(r"\{([\d,\s]*)\}", text) if group.strip())


def _iota(text: str) -> np.ndarray:
    """`[4,2]T(1,0)`: count up, shape so, transpose so, and lay flat."""
    dims, _, order = text.partition("T")
    counted = np.arange(np.prod(_sizes(dims))).reshape(_sizes(dims))
    return counted.transpose(_sizes(order) if order else None).reshape(-1)


def _mesh_groups(axes: str, device_ids: str | None, varied: str) -> tuple[tuple[int, ...], ...]:
    """`mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a','b':(1)2}`; the last is the major half of `b`."""
    sizes = {name: int(size) for name, size in _AXIS.findall(axes)}
    devices = np.arange(np.prod(list(sizes.values())))
    if device_ids:
        devices = _iota(device_ids) if device_ids.startswith("[") else np.asarray(_sizes(device_ids))
    coordinates = np.indices(tuple(sizes.values())).reshape(len(sizes), -1)
    kept = coordinates.copy()
    for name, before, size in _AXIS_REFERENCE.findall(varied):
        axis = list(sizes).index(name)
        # `:(before)size` names a digit of the coordinate; the more significant ones take `before` values.
        size = int(size or sizes[name])
        stride = sizes[name] // (int(before or 1) * size)
        kept[axis] -= coordinates[axis] // stride % size * stride
    key = np.ravel_multi_index(tuple(kept), tuple(sizes.values()))
    return _rows(devices[key == value] for value in np.unique(key))


def _rows(table: Iterable[np.ndarray]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(member) for member in row) for row in table)


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))
