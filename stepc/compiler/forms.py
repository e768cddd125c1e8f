"""The form of a batch, which decides what program it runs: as a key to look up, and as text."""

from typing import Any, TypeAlias

import jax

from stepc.language.kinds import Batch
from stepc.language.state import leaves_by_path

# The tree, and the shape and dtype of each leaf. Any: a jax.tree_util.PyTreeDef, and what numpy calls a dtype.
Form: TypeAlias = tuple[Any, tuple[tuple[tuple[int, ...], Any], ...]]


def form_of(batch: Batch) -> Form:
    """The tree, shapes and dtypes of a batch; it hashes."""
    leaves, tree = jax.tree.flatten(batch)
    return tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


def shown(batch: Batch) -> str:
    """The paths, types and shapes of a batch that is traced, in a line."""
    weak = {True: " of weak type", False: ""}
    rows = [(path or "the batch", leaf, weak[jax.typeof(leaf).weak_type]) for path, leaf in leaves_by_path(batch)]
    return ", ".join(f"{path} {leaf.dtype}{list(leaf.shape)}{kind}" for path, leaf, kind in rows)


def why_again(was: str, now: str, batch: Batch) -> str:
    """Why a program was traced again for a batch, by what `shown` says of the one before it and of this one."""
    if was != now:
        return f"its form was {was}, and is {now}"
    if all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(batch)):
        return "the state is of another type, or its arrays lie elsewhere"
    return "jax types host arrays and device arrays apart"
