"""What an encoder makes of the rows it is given, and how that of several calls becomes that of the whole batch.

Arithmetic of leaves. It knows no transform, no loop and no mesh.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stepc._language.state import ARRAY_LIKE, describe_leaf, path_of
from stepc._language.terms import Last, Max, Mean, Min, Sum, accumulation_dtype
from stepc.errors import LossError, faults_in_one, leaf_text, listed

_TERMS = (Sum, Mean, Max, Min, Last)


class Encoded(NamedTuple):
    """What an encoder returned, as arrays.

    Args:
      rows: the leaves with rows on axis 0.
      sums: the leaves that are added up, in float32 at least: of each `Sum` its value, of each `Mean` total and count.
    """

    rows: tuple[Any, ...]  # Any, twice: arrays
    sums: tuple[Any, ...]


@dataclass(frozen=True)
class EncodedTree:
    """The structure of what an encoder returns.

    Args:
      tree: its structure, where a `Sum` and a `Mean` are leaves.
      kinds: of each leaf: "rows", "sum" or "mean".
      paths: of each leaf.
    """

    tree: Any  # Any: a jax.tree_util.PyTreeDef
    kinds: tuple[str, ...]
    paths: tuple[str, ...]

    def join(self, encoded: Encoded) -> Any:  # Any: the encoder's own tree
        """The tree as the encoder returned it."""
        rows, sums = iter(encoded.rows), iter(encoded.sums)
        leaves: list[Any] = []
        for kind in self.kinds:
            match kind:
                case "rows":
                    leaves.append(next(rows))
                case "sum":
                    leaves.append(Sum(next(sums)))
                case _:
                    leaves.append(Mean(next(sums), next(sums)))
        return self.tree.unflatten(leaves)


def take_apart(returned: Any, num_rows: int, written: str) -> tuple[EncodedTree, Encoded]:  # Any: an encoder's own tree
    """What an encoder returned for this number of rows.

    Errors: LossError with every leaf that has not these rows on axis 0, and is no sum of them.
    """
    pairs, tree = jax.tree_util.tree_flatten_with_path(returned, is_leaf=lambda leaf: isinstance(leaf, _TERMS))
    _check_leaves([(path_of(keys), leaf) for keys, leaf in pairs], num_rows, written)
    kinds, rows, sums = [], [], []
    for _, leaf in pairs:
        match leaf:
            case Sum(value):
                kinds.append("sum")
                sums.append(_wide(value))
            case Mean(total, count):
                kinds.append("mean")
                sums += [_wide(total), _wide(count).astype(_wide(total).dtype)]
            case _:
                kinds.append("rows")
                rows.append(jnp.asarray(leaf))
    return EncodedTree(tree, tuple(kinds), tuple(path_of(keys) for keys, _ in pairs)), Encoded(tuple(rows), tuple(sums))


def join_calls(calls: Sequence[Encoded], numbers: Sequence[Any]) -> Encoded:  # Any: arrays
    """What the encoder makes of all rows: those of every call in the order of their numbers, and the sums of sums."""
    order = jnp.argsort(jnp.concatenate(numbers))
    rows = tuple(jnp.concatenate(leaves)[order] for leaves in zip(*(call.rows for call in calls), strict=True))
    return Encoded(rows, tuple(reduce(add, leaves) for leaves in zip(*(call.sums for call in calls), strict=True)))


def is_floating(leaf: Any) -> bool:  # Any: an array
    """Whether a gradient can flow through a leaf."""
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _wide(value: Any) -> Any:  # Any, twice: an array, or a number
    value = jnp.asarray(value)
    return value.astype(accumulation_dtype(value.dtype))


def _check_leaves(leaves: list[tuple[str, Any]], num_rows: int, written: str) -> None:
    faults = [fault for path, leaf in leaves if (fault := _fault(leaf_text(path, "it"), leaf, num_rows))]
    if not leaves:
        faults = ["it has no leaves."]
    if faults:
        raise LossError(
            f"The encoder of `{written}` does not return what a head can be given: "
            f"{faults_in_one(faults, of='what it returns')}",
            facts=(("expected", f"arrays with the {num_rows} rows that it is given on axis 0, sc.Sum or sc.Mean"),),
        )


def _fault(shown: str, leaf: Any, num_rows: int) -> str | None:  # Any: whatever an encoder returns
    match leaf:
        case Sum(value):
            arrays = [value]
        case Mean(total, count):
            arrays = [total, count]
        case Max() | Min() | Last():
            return f"{shown} is an sc.{type(leaf).__name__}, which has no gradient over the whole batch."
        case _ if not isinstance(leaf, jax.Array | np.ndarray):
            return f"{shown} is {describe_leaf(leaf)}, not an array."
        case _ if not leaf.ndim or leaf.shape[0] != num_rows:
            return f"{shown} is {describe_leaf(leaf)}, without the rows; write `sc.Sum` for a sum over them."
        case _:
            arrays = [leaf]
    wrong = [one for one in arrays if not _is_number(one)]
    return f"{shown} holds {listed(map(describe_leaf, wrong))}, which are no numbers." if wrong else None


def _is_number(value: Any) -> bool:  # Any: whatever an encoder returns
    if not isinstance(value, ARRAY_LIKE):
        return False
    dtype = jnp.result_type(value)
    return any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_))
