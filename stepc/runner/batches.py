"""What a batch looks like: the first is held against each later one, and host arrays are copied. Knows no iterator."""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stepc.errors import BatchError
from stepc.language.kinds import Batch
from stepc.language.padding import pad_batch
from stepc.language.state import leaves_by_path

MISSING, MASK = "nothing", "mask"


@dataclass(frozen=True)
class Spec:
    """The structure of a batch, and for each leaf where it is, its shape and its dtype.

    Args:
      forms: the class, the shape and the dtype of each leaf: what a step has time to compare.
      is_narrowed: whether a host leaf has a dtype that jax does not compute in, so that its numbers may not fit.
    """

    structure: Any  # Any: the type of a tree's structure is jax's own
    leaves: tuple[tuple[str, tuple[int, ...], str], ...]
    paths: tuple[str, ...]
    forms: tuple[tuple[type, tuple[int, ...], Any], ...] = ()  # Any: a dtype
    is_narrowed: bool = False

    def rows(self) -> dict[str, str]:
        """Each leaf as it is printed, by path."""
        return {
            path: f"{lies} {dtype}{list(shape)}"
            for path, (lies, shape, dtype) in zip(self.paths, self.leaves, strict=True)
        }


def checked(batch: Batch, first: Spec | None, saved: dict[str, str] | None = None) -> Spec:
    """The spec of a batch, which must be that of the first; and that one's rows what they were before a resume.

    Errors: BatchError with every fault: path, expected, got.
    """
    leaves, structure = jax.tree.flatten(batch)
    if first is None or structure != first.structure or not _have_forms(leaves, first.forms):
        first = _compared(batch, first, saved)
    if first.is_narrowed:
        _refuse("This batch holds numbers that do not fit where jax puts them.", _too_large(batch))
    return first


def _have_forms(leaves: list[Any], forms: tuple[tuple[type, tuple[int, ...], Any], ...]) -> bool:  # Any: as above
    for leaf, (kind, shape, dtype) in zip(leaves, forms, strict=True):
        if type(leaf) is not kind or leaf.shape != shape or leaf.dtype != dtype:
            return False
    return True


def _compared(batch: Batch, first: Spec | None, saved: dict[str, str] | None) -> Spec:
    """What `checked` does for the first batch, and for one that is not quite like it: an array of another class."""
    leaves, structure = jax.tree.flatten(batch)
    rows = tuple([_row(leaf) for leaf in leaves])
    if first is not None and first.leaves == rows and first.structure == structure:
        return first
    spec = Spec(structure, rows, tuple(path for path, _ in leaves_by_path(batch)))
    if first is not None:
        _refuse("This batch is not like the first one.", _unfit(batch) or _differences(spec, first))
    _refuse("This batch cannot be trained on.", _unfit(batch))
    _refuse("This batch is not like those before the checkpoint.", _changes(spec.rows(), saved or spec.rows()))
    return replace(
        spec,
        forms=tuple((type(leaf), leaf.shape, leaf.dtype) for leaf in leaves),
        is_narrowed=any(type(leaf) is np.ndarray and leaf.dtype != _canonical(leaf.dtype) for leaf in leaves),
    )


def is_short(batch: Batch, first: Spec | None) -> bool:
    """Whether a batch is like the first one, with fewer rows."""
    leaves, structure = jax.tree.flatten(batch)
    if first is None or structure != first.structure:
        return False
    rows = [_row(leaf) for leaf in leaves]
    return all(
        (lies, shape[1:], dtype) == (old_lies, old_shape[1:], old_dtype) and shape[:1] < old_shape[:1]
        for (lies, shape, dtype), (old_lies, old_shape, old_dtype) in zip(rows, first.leaves, strict=True)
    )


def padded(batch: Batch, first: Spec) -> Batch:
    """A short batch with as many rows as the first: copies of its first row, with zeros in the leaf "mask"."""
    filled, is_real = pad_batch(batch, first.leaves[0][1][0])
    mask = filled[MASK]
    mask[~is_real] = 0
    return jax.tree.map(lambda leaf, like: jnp.asarray(leaf) if isinstance(like, jax.Array) else leaf, filled, batch)


def check_mask(batch: Batch) -> None:
    """Refuse a batch without a mask: rows that fill it up would weigh as much as the others.

    Errors: BatchError.
    """
    if not (isinstance(batch, dict) and isinstance(batch.get(MASK), np.ndarray | jax.Array)):
        got = ", ".join(map(str, batch)) if isinstance(batch, dict) else type(batch).__name__
        raise BatchError(
            "Short batches cannot be filled up: this batch has no mask.",
            facts=[("expected", 'a dict with an array "mask"'), ("got", got)],
            suggestion="Give each row a 1 in a leaf 'mask', weighed by `sc.Mean((nll * mask).sum(), mask.sum())`.",
        )


def copied(batch: Batch) -> Batch:
    """The batch with its host arrays in memory of our own, in the dtypes that jax computes in.

    On CPU, jax may read a numpy buffer long after it was given it, also through `jnp.array`: a loader that uses its
    buffer again would change a batch in flight.
    """
    leaves, structure = jax.tree.flatten(batch)
    return structure.unflatten(
        [np.array(leaf, _canonical(leaf.dtype)) if isinstance(leaf, np.ndarray) else leaf for leaf in leaves]
    )


def _row(leaf: Any) -> tuple[str, tuple[int, ...], str]:  # Any: a leaf of a user's tree
    match leaf:
        case jax.Array():
            return "device", leaf.shape, leaf.dtype.name
        case np.memmap():
            return "host", leaf.shape, leaf.dtype.name
        case np.ndarray() | np.generic():
            return "host" if type(leaf) is np.ndarray else type(leaf).__name__, leaf.shape, leaf.dtype.name
        case _:
            return type(leaf).__name__, (), "object"


def _unfit(batch: Batch) -> list[tuple[str, str]]:
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch, is_leaf=lambda one: one is None):
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "batch"
        lies, shape, dtype = _row(leaf)
        if lies not in ("host", "device"):
            found.append((name, f"expected a numpy or jax array, got {type(leaf).__name__}"))
        elif not (jnp.issubdtype(leaf.dtype, np.number) or leaf.dtype == np.bool_ or _is_key(leaf)):
            found.append((name, f"expected numbers, got {dtype}{list(shape)}"))
        elif shape[:1] == (0,):
            found.append((name, f"expected rows, got {dtype}{list(shape)}"))
    return found if found or jax.tree.leaves(batch) else [("batch", "expected arrays, got none")]


def _is_key(leaf: Any) -> bool:  # Any: an array of jax or numpy
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _differences(spec: Spec, first: Spec) -> list[tuple[str, str]]:
    found = _changes(spec.rows(), first.rows())
    return found or [("structure", f"expected {first.structure}, got {spec.structure}")]


def _changes(now: dict[str, str], before: dict[str, str]) -> list[tuple[str, str]]:
    return [
        (path or "batch", f"expected {before.get(path, MISSING)}, got {now.get(path, MISSING)}")
        for path in [*before, *(one for one in now if one not in before)]
        if before.get(path) != now.get(path)
    ]


def _too_large(batch: Batch) -> list[tuple[str, str]]:
    found = []
    for path, leaf in leaves_by_path(batch):
        if not isinstance(leaf, np.ndarray) or leaf.dtype.kind not in "iu" or leaf.dtype == _canonical(leaf.dtype):
            continue
        holds = np.iinfo(_canonical(leaf.dtype))
        if leaf.min() < holds.min or leaf.max() > holds.max:
            found.append((path, f"expected {holds.dtype}, from {holds.min} to {holds.max}, got {_span(leaf)}"))
    return found


def _span(leaf: np.ndarray) -> str:
    return f"{leaf.dtype}, from {leaf.min()} to {leaf.max()}"


def _canonical(dtype: Any) -> Any:  # Any: a dtype of numpy
    return _canonical_where(dtype, jax.config.jax_enable_x64)  # pyright: ignore[reportAttributeAccessIssue]


@cache  # jax takes as long to say it as numpy to copy a small array
def _canonical_where(dtype: Any, is_x64: bool) -> Any:  # Any: as above
    return jax.dtypes.canonicalize_dtype(dtype)


def _refuse(what: str, faults: list[tuple[str, str]]) -> None:
    if faults:
        raise BatchError(what, facts=faults)
