"""Where every leaf of a state lies, as a table and as a drawing. It is told, it decides nothing."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stepc.compiler.layout import Laid, followed, mirrors
from stepc.compiler.plan import Leaf
from stepc.core.layout import axes_of, shown
from stepc.language.state import State, leaves_by_path

_MOST_PARTS = 8  # of a dimension that is drawn part by part
_COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red")


@dataclass(frozen=True)
class LyingLeaf:
    """One leaf of a state.

    Args:
      path: its keys joined by `/`.
      shape: of the whole leaf.
      dtype: of its numbers.
      spec: how it lies along the axes of the mesh.
      bytes_: what one device holds of it.
      follows: which parameter it mirrors.
      because: why it stays whole along an axis that others lie in parts along, and what that costs.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: PartitionSpec
    bytes_: int
    follows: str = ""
    because: str = ""

    @property
    def about(self) -> str:
        """Both in one."""
        return ", ".join(text for text in (self.follows, self.because) if text)

    @property
    def lying(self) -> str:
        """The spec as it is written in source, or "whole"."""
        return shown(tuple(self.spec)) if any(self.spec) else "whole"


@dataclass(frozen=True, repr=False)
class Shardings:
    """Every leaf of a state, and where it lies: `str` is a table with drawings, `rich.print` shows it in colours."""

    rows: tuple[LyingLeaf, ...]
    mesh: Mesh | None

    @property
    def bytes_(self) -> int:
        """What one device holds of the state."""
        return sum(row.bytes_ for row in self.rows)

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return "\n".join(self._lines({}))

    def __rich__(self) -> str:
        specs = dict.fromkeys(row.spec for row in self.rows if any(row.spec))
        return "\n".join(self._lines({spec: _COLOURS[n % len(_COLOURS)] for n, spec in enumerate(specs)}))

    def _lines(self, colours: Mapping[PartitionSpec, str]) -> Iterator[str]:
        mesh = (
            "a single device" if self.mesh is None else ", ".join(f"{n}={size}" for n, size in self.mesh.shape.items())
        )
        yield f"state on {mesh}: {len(self.rows)} leaves, {self.bytes_:,} bytes on each device"
        cells = [
            (row.path, f"{row.dtype}{list(row.shape)}", row.lying, f"{row.bytes_:,} B", row.about) for row in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for row, cell in zip(self.rows, cells, strict=True):
            path, form, spec, size, about = (
                text.rjust(width) if n == 3 else text.ljust(width)
                for n, (text, width) in enumerate(zip(cell, widths, strict=True))
            )
            colour = colours.get(row.spec)
            spec = spec if colour is None else f"[{colour}]{spec}[/{colour}]"
            form = form.replace("[", r"\[") if colours else form
            yield f"  {path}  {form}  {spec}  {size}  {about}".rstrip()
        for spec in dict.fromkeys(row.spec for row in self.rows if any(row.spec)):
            likes = [row for row in self.rows if row.spec == spec]
            more = f" and {len(likes) - 1} more" if len(likes) > 1 else ""
            yield ""
            yield f"  {likes[0].path}{more}: {likes[0].lying}"
            yield from (f"    {line}" for line in _drawn(likes[0], self.mesh))


def shardings_table(state: State, laid: Laid, mesh: Mesh | None) -> Shardings:
    """The table of a state that lies on the mesh."""
    leaves = leaves_by_path(state)
    params = dict(leaves_by_path(state.params))
    follows = mirrors([path for path, _ in leaves], params)
    specs = dict(state.placement)
    rows = []
    for path, leaf in leaves:
        spec = specs.get(path, PartitionSpec())
        shape = leaf.shape if mesh is None else NamedSharding(mesh, spec).shard_shape(leaf.shape)
        whole = _bytes(leaf)
        bytes_ = whole * prod(shape) // max(prod(leaf.shape), 1)
        name = follows.get(path)
        row = LyingLeaf(path, leaf.shape, str(leaf.dtype), spec, bytes_)
        rows.append(_told(row, name, None if name is None else params[name], laid))
    return Shardings(tuple(rows), mesh)


def planned_leaves(state: State, laid: Laid, mesh: Mesh | None) -> tuple[Leaf, ...]:
    """The leaves as the plan lists them, in the order in which jax flattens them."""

    def lies(row: LyingLeaf) -> str:
        whole = ["whole on every device", *([row.because] if row.because else [])]
        return row.lying if any(row.spec) else ", ".join(whole)

    pairs = zip(shardings_table(state, laid, mesh).rows, jax.tree.leaves(state), strict=True)
    return tuple(Leaf(row.path, row.shape, row.dtype, _bytes(leaf), lies(row)) for row, leaf in pairs)


def _bytes(leaf: Any) -> int:  # Any: an array, or its shape
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return int(jax.eval_shape(jax.random.key_data, leaf).size) * 4
    return int(leaf.size) * leaf.dtype.itemsize


def _told(row: LyingLeaf, name: str | None, like: Any, laid: Laid) -> LyingLeaf:  # Any: the parameter it mirrors
    room = row.path.partition("/")[0]
    if room not in ("params", "opt_state", "slots"):
        return row
    if name is None or followed(row.shape, like.shape, ()) is None:
        return replace(row, follows="follows no parameter" if name is None else f"follows {name}, but not its shape")
    if laid.layout.zero >= (3 if room == "params" else 1) and laid.axis not in axes_of(row.spec):
        instead = f"{row.bytes_:,} B instead of {row.bytes_ // laid.num_parts:,} B"
        why = f"{instead}: no free dimension divides by {laid.num_parts}, the size of {laid.axis}"
        row = replace(row, because=why)
    return row if room == "params" else replace(row, follows=f"follows {name}")


def _drawn(row: LyingLeaf, mesh: Mesh | None) -> Iterator[str]:
    """The leaf cut into its parts, each with the numbers of the devices that hold it."""
    if mesh is None:
        return
    cut = [dim for dim, entry in enumerate(row.spec) if entry is not None]
    parts = [prod(mesh.shape[axis] for axis in axes_of((row.spec[dim],))) for dim in cut]
    if len(cut) > 2 or max(parts) > _MOST_PARTS:
        yield " × ".join(f"{number} parts of dimension {dim}" for dim, number in zip(cut, parts, strict=True))
        return
    table: dict[tuple[int, ...], list[int]] = {}
    for device, index in NamedSharding(mesh, row.spec).devices_indices_map(row.shape).items():
        place = tuple(
            (index[dim].start or 0) * number // row.shape[dim] for dim, number in zip(cut, parts, strict=True)
        )
        table.setdefault(place, []).append(device.id)
    heights, widths = (parts[0], parts[1]) if len(cut) == 2 else (1, parts[0])
    cells = {
        (top, left): ",".join(map(str, sorted(table[(top, left) if len(cut) == 2 else (left,)])))
        for top, left in product(range(heights), range(widths))
    }
    yield from _boxes(cells, heights, widths)


def _boxes(cells: Mapping[tuple[int, int], str], heights: int, widths: int) -> Iterator[str]:
    width = max(map(len, cells.values())) + 2
    bar = "─" * width
    yield f"┌{'┬'.join([bar] * widths)}┐"
    for top in range(heights):
        if top:
            yield f"├{'┼'.join([bar] * widths)}┤"
        yield f"│{'│'.join(cells[top, left].center(width) for left in range(widths))}│"
    yield f"└{'┴'.join([bar] * widths)}┘"
