"""What is in a directory of checkpoints, in words: a list of them, one of them, and what differs between two."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from stepc._language.state import describe_leaf, key_data
from stepc._runner.checkpoint_store import checked_meta, missing_leaves, read_leaves, shapes_in, steps_in
from stepc._text import aligned_table, few_rows, readable_bytes
from stepc.errors import CheckpointError, first_line

MOST_METRICS = 4  # that a list has columns for
MOST_LEAVES = 200  # that a table lists


@dataclass(frozen=True)
class StoredCheckpoint:
    """One checkpoint, without its leaves.

    Args:
      fault: why it cannot be read, as far as its metadata and the names of its leaves show; None if it can.
    """

    directory: Path
    step: int
    meta: Mapping[str, Any] = field(default_factory=dict)  # Any: JSON values
    fault: str | None = None

    @property
    def path(self) -> Path:
        return self.directory / str(self.step)

    @property
    def saved_at(self) -> str:
        return f"{datetime.fromtimestamp(self.path.stat().st_mtime):%Y-%m-%d %H:%M:%S}"

    @property
    def disk_bytes(self) -> int:
        return sum(one.stat().st_size for one in self.path.rglob("*") if one.is_file())

    def metric(self, name: str) -> float | None:
        """A scalar metric; None for an array, and for one that was not recorded."""
        value = self.meta.get("metrics", {}).get(name)
        return value if isinstance(value, float | int) else None


def stored_checkpoints(directory: Path) -> list[StoredCheckpoint]:
    """Every checkpoint of a directory, oldest first. Errors: CheckpointError if there is none."""
    steps = steps_in(directory) if directory.is_dir() else []
    if not steps:
        runs = [one for one in directory.iterdir() if one.is_dir() and steps_in(one)] if directory.is_dir() else []
        remedy = f"There are checkpoints in {', '.join(map(str, sorted(runs)[:5]))}." if runs else None
        raise CheckpointError(f"There is no checkpoint in {directory}.", suggestion=remedy)
    return [stored_checkpoint(directory, step) for step in reversed(steps)]


def stored_checkpoint(directory: Path, step: int) -> StoredCheckpoint:
    """One checkpoint of a directory, intact or not. Errors: CheckpointError if it is not there."""
    if not (directory / str(step)).is_dir():
        facts = [("steps", ", ".join(map(str, steps_in(directory) if directory.is_dir() else ())) or "none")]
        raise CheckpointError(f"There is no checkpoint of step {step} in {directory}.", step=step, facts=facts)
    try:
        meta = checked_meta(directory, step)
        missing = missing_leaves(directory, step, meta["leaves"])
    except Exception as error:  # damage shows as ValueError, KeyError, AttributeError, a bare Exception, …
        return StoredCheckpoint(directory, step, fault=first_line(error)[:300])
    fault = f"{len(missing)} of {len(meta['leaves'])} leaves are missing: {missing[0]}" if missing else None
    return StoredCheckpoint(directory, step, meta, fault)


def best_of(checkpoints: Sequence[StoredCheckpoint]) -> tuple[int | None, str]:
    """The step of the best of these and by what it is, by the newest that says so; None and "" if none does."""
    criterion = next((one.meta["best"] for one in reversed(checkpoints) if one.meta.get("best")), None)
    if criterion is None:
        return None, ""
    name, mode = criterion
    sign = 1 if mode == "min" else -1
    values = [(sign * value, one.step) for one in checkpoints if (value := one.metric(name)) is not None]
    return min((pair for pair in values if math.isfinite(pair[0])), default=(0, None))[1], f"{name}, {mode}"


def list_of(checkpoints: Sequence[StoredCheckpoint]) -> str:
    """A line for each checkpoint: its step, when it was saved, its size, its metrics, and whether it is intact."""
    best, by = best_of(checkpoints)
    decides = [by.rpartition(", ")[0]] if by else []
    names = dict.fromkeys([*decides, "loss", *(name for one in checkpoints for name in one.meta.get("metrics", {}))])
    names = [name for name in names if any(one.metric(name) is not None for one in checkpoints)]
    shown = names[:MOST_METRICS]
    rows: list[Sequence[str]] = [("step", "saved", "size", *shown, "")]
    for one in checkpoints:
        values = [one.metric(name) for name in shown]
        state = f"damaged: {one.fault}" if one.fault else "intact"
        state += f", best by {by}" if one.step == best else ""
        cells = ("-" if value is None else f"{value:.6g}" for value in values)
        rows.append((str(one.step), one.saved_at, readable_bytes(one.disk_bytes), *cells, state))
    lines = aligned_table(rows)
    if hidden := names[MOST_METRICS:]:
        lines.append(f"also recorded: {', '.join(hidden)}")
    return "\n".join(lines)


def contents_of(checkpoint: StoredCheckpoint) -> tuple[str, bool]:
    """What a checkpoint holds, and whether every leaf of it could be read."""
    if not checkpoint.meta:
        return _damage(checkpoint, checkpoint.fault or ""), False
    meta, shapes = checkpoint.meta, shapes_in(checkpoint.meta)
    faults = [] if checkpoint.fault is None else [checkpoint.fault]
    faults += (
        [why for why in _read_each(checkpoint, shapes, list(shapes)) if isinstance(why, str)] if not faults else []
    )
    sizes = {path: _num_bytes(shape) for path, shape in shapes.items()}
    rows = [(path, describe_leaf(shape), readable_bytes(sizes[path])) for path, shape in shapes.items()]
    head = {
        "step": str(checkpoint.step),
        "saved": f"{checkpoint.saved_at}, by {meta['processes']} process{'es' * (meta['processes'] > 1)}, "
        + ", ".join(f"{name} {version}" for name, version in meta["versions"].items()),
        "trained": " @ ".join(text for text, _ in meta.get("settings") or ()) or "not recorded",
        "metrics": ", ".join(f"{name} {value}" for name, value in meta.get("metrics", {}).items()) or "none",
        "state": f"{len(shapes):,} leaves, {readable_bytes(sum(sizes.values()))}; "
        f"{readable_bytes(checkpoint.disk_bytes)} on disk",
        "intact": "no: " + "; ".join(faults[:3]) if faults else "yes: each leaf was read, and has its saved CRC-32",
    }
    table = aligned_table(few_rows(rows, most=MOST_LEAVES))
    return "\n".join([*aligned_table(head.items()), "", *table]), not faults


def comparison_of(first: StoredCheckpoint, second: StoredCheckpoint) -> tuple[str, bool]:
    """The leaves in which two checkpoints differ and by how much; and whether both are intact and differ in none."""
    if damaged := [_damage(one, one.fault) for one in (first, second) if one.fault is not None]:
        return "\n".join(damaged), False
    shapes, others = shapes_in(first.meta), shapes_in(second.meta)
    same_type = [path for path in shapes if path in others and _type_of(shapes[path]) == _type_of(others[path])]
    rows: list[Sequence[str]] = [
        (path, _described(shapes.get(path)), f"in {second.path}: {_described(others.get(path))}")
        for path in [*shapes, *(path for path in others if path not in shapes)]
        if path not in same_type
    ]
    num_equal = 0
    read = zip(_read_each(first, shapes, same_type), _read_each(second, others, same_type), same_type, strict=True)
    for mine, other, path in read:
        for one, found in ((first, mine), (second, other)):
            if isinstance(found, str):
                return _damage(one, found), False
        change = _change(mine, other)
        num_equal += change is None
        if change is not None:
            rows.append((path, describe_leaf(shapes[path]), change))
    lines = [f"{num_equal:,} of {len(shapes.keys() | others.keys()):,} leaves are equal, to the last bit"]
    return "\n".join([*lines, *aligned_table(few_rows(rows, most=MOST_LEAVES))]), not rows


def _read_each(
    checkpoint: StoredCheckpoint, shapes: Mapping[str, jax.ShapeDtypeStruct], paths: Sequence[str]
) -> Iterator[np.ndarray | str]:
    """Each of these leaves on the host, one at a time; or why it cannot be read."""
    with closing(ocp.Checkpointer(ocp.CompositeCheckpointHandler("state"))) as reader:
        for path in paths:
            try:
                like = {path: shapes[path]}
                found = read_leaves(reader, checkpoint.directory, checkpoint.step, like, checkpoint.meta)
                yield np.asarray(key_data(found[path]))
            except Exception as error:  # damage shows as ValueError, KeyError, AttributeError, a bare Exception, …
                yield f"{path}: {first_line(error)[:300]}"


def _change(mine: Any, other: Any) -> str | None:  # Any: arrays of numpy, of any dtype
    """By how much an array differs from another of its type; None if it does not."""
    if mine.tobytes() == other.tobytes():
        return None
    changed = mine != other
    share = f"{int(changed.sum()):,} of {mine.size:,} numbers"
    if mine.dtype == np.bool_ or np.issubdtype(mine.dtype, np.complexfloating):
        return share
    one, two = mine.astype(np.float64), other.astype(np.float64)
    most = float(np.max(np.abs(one - two)))
    largest = float(np.max(np.abs(one)))
    relative = f", {most / largest:.2g} of the largest" if largest and math.isfinite(most / largest) else ""
    return f"{share}, by at most {most:.3g}{relative}"


def _damage(checkpoint: StoredCheckpoint, why: str) -> str:
    return f"{checkpoint.path} is damaged: {why}"


def _type_of(shape: jax.ShapeDtypeStruct) -> tuple[Any, ...]:  # Any: a dtype
    return (shape.shape, shape.dtype)


def _described(shape: jax.ShapeDtypeStruct | None) -> str:
    return "nothing" if shape is None else describe_leaf(shape)


def _num_bytes(shape: jax.ShapeDtypeStruct) -> int:
    numbers = jax.eval_shape(key_data, shape)
    return numbers.size * numbers.dtype.itemsize
