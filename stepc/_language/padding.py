"""`pad_batch`: fill up a short last batch, with a mask that leaves the filling out. It knows no pipeline."""

from typing import Any, TypeAlias, TypeVar

import jax
import numpy as np
from jaxtyping import Bool

from stepc._language.fields import is_positive_integer
from stepc._language.state import as_arrays, leaves_by_path
from stepc.errors import BatchError, faults_in_one, leaf_text, listed

Mask: TypeAlias = Bool[np.ndarray, " rows"]
Tree = TypeVar("Tree")  # whatever the user makes a batch of


def pad_batch(batch: Tree, rows: int) -> tuple[Tree, Mask]:
    """Fill a batch up to a number of rows, and say which of them are real.

    Meaning: the rows of the batch, then copies of its first row; the mask is True for the former.
    Why: a batch of another size is another program, which is traced and compiled again. A padded batch, weighted by the
      mask in a `Mean` loss, runs the same program and gives exactly the gradient of the real rows.

    Args:
      batch: a tree of host arrays with the same number of rows, from 1 to `rows`.
      rows: the number of rows to fill up to, a positive integer.
    Shapes: every leaf `[rows, ...]`; the mask is `[rows]`.
    Errors: BatchError with all faults: no rows, more than `rows`, leaves that differ, a `rows` that is not positive.
    The filling is computed, with weight 0, so it must be valid input; copies of a real row are.
    Example:
      >>> batch, mask = pad_batch({"x": np.arange(3)}, 4)
      >>> batch["x"], mask
      (array([0, 1, 2, 0]), array([ True,  True,  True, False]))

    Source: ours; padded batches as in jax_privacy.
    """
    batch = as_arrays(batch)
    leaves = [(leaf_text(path, "the batch"), leaf) for path, leaf in leaves_by_path(batch)]
    sizes = {shown: np.shape(leaf)[0] for shown, leaf in leaves if np.ndim(leaf)}
    faults = [] if leaves else ["the batch has no leaves."]
    if is_positive_integer(rows):
        wrong = {shown: size for shown, size in sizes.items() if not 1 <= size <= rows}
        faults += [f"{shown} has {size} rows; expected 1 to {rows}." for shown, size in wrong.items()]
    else:
        faults.append(f"rows must be a positive integer, got {rows!r}.")
    faults += [f"{shown} is a scalar: it has no rows on axis 0." for shown, _ in leaves if shown not in sizes]
    masked = [shown for shown, leaf in leaves if isinstance(leaf, np.ma.MaskedArray)]
    faults += [f"{shown} is a masked array; give its mask as a leaf of its own." for shown in masked]
    if len(set(sizes.values())) > 1:
        counts = listed(f"{shown} has {size}" for shown, size in sizes.items())
        faults.append(f"the leaves differ in their number of rows: {counts}.")
    if faults:
        what = faults_in_one(faults, of="the batch to pad")
        raise BatchError(what[:1].upper() + what[1:])
    missing = rows - next(iter(sizes.values()))

    def filled(leaf: Any) -> np.ndarray:  # Any: a host array, or a device array, which is fetched
        array = np.asarray(leaf)
        return np.concatenate([array, np.repeat(array[:1], missing, axis=0)])

    return jax.tree.map(filled, batch), np.arange(rows) < rows - missing
