"""The type of a meaning: the pair of functions that a word defines, and nothing else."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from stepc.language.kinds import Batch, Grads, Metrics, Rows
from stepc.language.state import State


class Gradient(NamedTuple):
    """What flows between gradient words: a gradient, and the metrics that travel with it."""

    grads: Grads
    metrics: Metrics


@dataclass(frozen=True)
class Fn:
    """A pair of pure functions, and the sizes of the mesh axes it is meant for.

    Args:
      init: fills a word's own part of a fresh state.
      apply: of a gradient, `(state, rows) -> Gradient`; of a step, `(state, batch) -> (state, metrics)`.
      axes: size of every mesh axis by name; a meaning knows no more of a mesh than that.
    """

    init: Callable[[State], State]
    apply: Callable[[State, Rows | Batch], Any]  # Any: by kind, as above
    axes: Mapping[str, int]


def mean_of(parts: Sequence[Gradient]) -> Gradient:
    """The sum of the parts, one after another, divided by how many there are."""
    return jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]) / len(leaves), *parts)


def num_rows(rows: Rows) -> int:
    """How many rows a batch has."""
    return jax.tree.leaves(rows)[0].shape[0]
