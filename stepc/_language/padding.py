"""A last batch that is short: rows to fill it, and a mask that leaves them out."""

from typing import Any, TypeAlias

import jax
import numpy as np
from jaxtyping import Bool

from stepc._language.kinds import Batch
from stepc._language.state import leaves_by_path
from stepc.errors import BatchError, faults_in_one

Mask: TypeAlias = Bool[np.ndarray, " rows"]


def pad_batch(batch: Batch, rows: int) -> tuple[Batch, Mask]:
    """Fill a batch up to a number of rows, and say which of them are real.

    Meaning: the rows of the batch, then copies of its first row; the mask is True for the former.
    Why: a batch of another size is another program: traced and compiled again. Filled up, and weighed by the mask in
      a `Mean` loss, it is the same program and exactly the gradient of the rows that are there.

    Args:
      batch: a tree of host arrays with the same number of rows, from 1 to `rows`.
      rows: how many rows there are to be.
    Shapes: every leaf `[rows, ...]`; the mask is `[rows]`.
    Errors: BatchError with all faults: no rows, more than `rows`, leaves that differ, a number that is not positive.
    The filling is computed and weighs nothing: it must be valid input, which copies of a real row are.
    Example:
      >>> batch, mask = pad_batch({"x": np.arange(3)}, 4)
      >>> batch["x"], mask
      (array([0, 1, 2, 0]), array([ True,  True,  True, False]))

    Source: ours; padded batches as in jax_privacy.
    """
    leaves = leaves_by_path(batch)
    sizes = {path: np.shape(leaf)[0] if np.ndim(leaf) else None for path, leaf in leaves}
    faults = [] if leaves else ["the batch has no leaves."]
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
        faults.append(f"rows is {rows!r}, not a positive integer.")
    else:
        faults += [
            f"`{path}` has {size} rows, and {rows} are asked for."
            for path, size in sizes.items()
            if _is_bad(size, rows)
        ]
    faults += [f"`{path}` is a scalar: it has no rows on axis 0." for path, size in sizes.items() if size is None]
    known = {path: size for path, size in sizes.items() if size is not None}
    if len(set(known.values())) > 1:
        counts = ", ".join(f"`{path}` has {size}" for path, size in known.items())
        faults.append(f"the leaves differ in their number of rows: {counts}.")
    if faults:
        what = faults_in_one(faults, of="what is to be padded")
        raise BatchError(what[:1].upper() + what[1:])
    missing = rows - next(iter(sizes.values()))  # pyright: ignore[reportOperatorIssue]

    def filled(leaf: Any) -> np.ndarray:  # Any: a host array, or a device array, which is fetched
        array = np.asarray(leaf)
        return np.concatenate([array, np.repeat(array[:1], missing, axis=0)])

    return jax.tree.map(filled, batch), np.arange(rows) < rows - missing


def _is_bad(size: int | None, rows: int) -> bool:
    return size is not None and not 1 <= size <= rows
